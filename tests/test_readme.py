"""The README's Python runs as it stands there."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from metarl.cli import main

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def block(containing: str) -> str:
    (found,) = [text for text in BLOCKS if containing in text]
    return found


def run(code: str, folder: Path) -> str:
    (folder / "example.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "example.py"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_task_of_your_own_is_learned(tmp_path):
    printed = run(block("class Reach1D"), tmp_path)
    gain = ast.literal_eval(printed.strip().splitlines()[-1])
    assert gain["ci95"][0] > 1.0, "adapting to the hidden goal must gain return; without learning the gain is about 0"
    assert (tmp_path / "runs" / "reach-1d" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_an_imported_agent_predicts_adapts_and_is_evaluated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = {"stages.0.tasks.horizon": 100, "num-tasks": 2, "rollouts-per-task": 1, "evaluation.num-tasks": 1}
    flags |= {"max-iterations": 1, "num-workers": 0}
    with pytest.raises(SystemExit) as ended:
        main(["train", "quickstart", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))])
    assert ended.value.code == 0
    code = block("agent.adapt(episodes)") + "\nassert len(report['tasks']) == 5 and policy is not agent"
    run(code, tmp_path)


@pytest.mark.slow
def test_an_agent_with_a_memory_lives_through_a_trial(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--max-iterations 1 --num-workers 0 --num-tasks 2 --rollouts-per-task 1 --evaluation.num-tasks 1"
    with pytest.raises(SystemExit) as ended:
        main(["train", "ml1_reach_rl2", "--agent.minibatches", "1", *flags.split()])
    assert ended.value.code == 0
    run(block("# a trial begins") + "\nassert episode == 2 and ended and state is not None", tmp_path)


@pytest.mark.slow
def test_a_stability_method_of_ones_own_guards_a_run(tmp_path):
    text = (README.parent / "docs" / "continual.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert float(run(code, tmp_path).strip().splitlines()[-1]) > -1.0
    lines = (tmp_path / "runs" / "hold_still" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    key = "stability/hold_still/loss"
    losses = [line[key] for line in map(json.loads, lines) if key in line]
    assert len(losses) == 3 and max(losses) > 0.0  # in the second stage alone
