"""Runs at the real command line: other settings, runaway numbers, two processes in one place; the table of the page."""

import json
import re
import signal
import time
from pathlib import Path

from metarl.config.schema import load_config
from metarl.runs.checkpoint import load_latest
from metarl.runs.tracking import read_metrics
from tests.faults.processes import NAVIGATION

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
LONG = ("--stages.0.iterations", "100000")


def wait_for(process, path):
    """Wait until a process has written something to a file."""
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)


def test_case_19_other_settings_are_listed_and_need_to_be_allowed(cli, mistake, tmp_path):
    run = (*NAVIGATION, "--run-dir", tmp_path / "run")
    assert cli(*run, "--max-iterations", 1).status == 0
    changed = (*run, "--resume", "--agent.inner-lr", "0.02", "--seed", 7)
    mistake(*changed, expected=["seed (0, now 7)", "agent.inner_lr (0.1, now 0.02)", "--allow-config-change"])
    mistake(*run, "--allow-config-change", expected=["requires --resume"])
    assert load_config(tmp_path / "run" / "config.yaml").seed == 0
    done = cli(*changed, "--allow-config-change")
    assert done.status == 0 and "finished" in done.out
    assert load_config(tmp_path / "run" / "config.yaml").seed == 7
    assert load_config(tmp_path / "run" / "config.before_000001.yaml").seed == 0


def test_case_24_numbers_that_run_away_end_a_run_which_then_goes_on(cli, tmp_path):
    """A rate by which the value network is beyond all numbers after its first step."""
    run = (*NAVIGATION, "--run-dir", tmp_path / "run", "--stages.0.iterations", 9, "--agent.critic", "learned")
    done = cli(*run, "--agent.value-lr", "1e35")
    (line,) = [line for line in done.err.splitlines() if "stopped at" in line]
    assert done.status == 1 and "Traceback" not in done.err
    for part in ("iteration 3", "3 times in a row", "diverged.json", "--resume --allow-config-change"):
        assert part in line
    assert [line["train/skipped_updates"] for line in read_metrics(tmp_path / "run")] == [1, 1, 1]
    statistics = json.loads((tmp_path / "run" / "diverged.json").read_text())
    assert statistics["position"]["iteration"] == 3 and statistics["rollouts"] and statistics["parameters"]
    checkpoint = load_latest(tmp_path / "run" / "checkpoints")
    assert checkpoint.position.iteration == 0
    assert all(bool(value.isfinite().all()) for value in checkpoint.state.values())
    healed = cli(*run, "--agent.value-lr", "1e-3", "--resume", "--allow-config-change")
    assert healed.status == 0
    assert [line["iteration"] for line in read_metrics(tmp_path / "run")] == [*range(1, 10), 9]


def test_case_25_a_second_process_is_told_the_number_of_the_first(navigating, mistake):
    process, run_dir = navigating(*LONG)
    wait_for(process, run_dir / "config.yaml")
    run = (*NAVIGATION, *LONG, "--run-dir", run_dir)
    for flag in ("--resume", "--overwrite"):
        mistake(*run, flag, expected=[f"in use by process {process.pid}", "--run-dir"])
    assert process.poll() is None  # and the first one does not mind


def test_case_25_the_lock_of_a_killed_process_is_taken_over(navigating, cli):
    process, run_dir = navigating(*LONG)
    wait_for(process, run_dir / "config.yaml")
    process.kill()
    process.wait()
    assert (run_dir / ".lock").exists()
    done = cli(*NAVIGATION, *LONG, "--run-dir", run_dir, "--resume", "--max-iterations", 2)
    assert done.status == 0 and not (run_dir / ".lock").exists()


def test_ctrl_c_on_a_pipeline_saves_though_nobody_reads_any_more(navigating):
    """As in `metarl train … 2>&1 | tee log`, where tee dies of the same signal."""
    process, run_dir = navigating(*LONG, "--checkpoint-every-iterations", 10**6)
    wait_for(process, run_dir / "metrics.jsonl")
    process.send_signal(signal.SIGSTOP)  # it must not write between the end of its reader and the signal
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=60) == 130
    assert load_latest(run_dir / "checkpoints").position.iteration > 0
    process.stdout = process.stderr = None


def test_the_page_names_a_test_for_each_case_and_no_other():
    rows = re.findall(r"^\| (\d+|also) \|.*$", PAGE.read_text(), re.MULTILINE)
    assert rows == [*map(str, range(1, 26)), "also"]
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", PAGE.read_text())
    assert len(named) >= 26
    for file, name in named:
        (path,) = (ROOT / "tests").rglob(file)
        assert re.search(rf"^def {name}(\w*)\(", path.read_text(), re.MULTILINE), f"{file} has no {name}"
