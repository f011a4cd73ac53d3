"""A run that is killed at random moments ends as one that never was."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from metarl.config.schema import load_config
from metarl.runs.checkpoint import load_latest, save
from metarl.runs.tracking import Tracker
from metarl.training.loop import train
from metarl.types import Position
from tests.faults import kill_often, processes
from tests.faults.kill_often import MARK, alive, different, orphans

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@linux
@pytest.mark.slow
def test_a_run_killed_at_random_moments_and_resumed_ends_as_if_it_had_not_been(tmp_path, capsys):
    result = kill_often.main(["--kills", "8", "--seed", "2", "--folder", str(tmp_path)])
    assert kill_often.wrong(result) == []
    assert min(result["kills"].values()) >= 2  # some in start-up, some in training
    assert result["entries"]["lines"] > 40 and result["entries"]["scalars"] > 500
    assert "checkpoints lost" in capsys.readouterr().out


# What compares, compares


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    train(load_config("navigation_maml_ppo", processes.SMALL.split()), run_dir=run_dir)
    return run_dir


def a_line_less(run_dir):
    path = run_dir / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def a_number_changed(run_dir):
    path = run_dir / "metrics.jsonl"
    path.write_text(path.read_text().replace('"env_steps": ', '"env_steps": 1', 1))


def a_scalar_twice(run_dir):
    with Tracker(run_dir, None, {}, Position(), load_latest(run_dir / "checkpoints").manifest.logs) as tracker:
        tracker.write(Position(env_steps=20), {"train/loss": 1.0})
    a_line_less(run_dir)  # only TensorBoard has it


def an_event_file_less(run_dir):
    next((run_dir / "tensorboard").iterdir()).unlink()


def a_bit_of_a_tensor_changed(run_dir):
    found = load_latest(run_dir / "checkpoints")
    state = {name: value.clone() for name, value in found.state.items()}
    state["policy.weight_0"].view(torch.int32)[0, 0] ^= 1
    save(run_dir / "checkpoints", {"agent": state}, found.position, found.spaces, 1)


def another_config(run_dir):
    with (run_dir / "config.yaml").open("a") as file:
        file.write("# other\n")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (a_line_less, "metrics.jsonl"),
        (a_number_changed, "metrics.jsonl"),
        (a_scalar_twice, "tensorboard"),
        (an_event_file_less, "tensorboard"),
        (a_bit_of_a_tensor_changed, "agent.policy.weight_0"),
        (another_config, "config.yaml"),
    ],
)
def test_the_comparison_sees_each_difference(tmp_path, run, change, expected):
    for name in ("one", "other"):
        shutil.copytree(run, tmp_path / name)
    assert different(tmp_path / "one", tmp_path / "other") == []
    change(tmp_path / "one")
    for pair in (("one", "other"), ("other", "one")):
        assert all(each.startswith(expected) for each in different(*(tmp_path / name for name in pair)))
        assert different(*(tmp_path / name for name in pair)) != []


@linux
def test_processes_of_a_run_are_found_by_their_mark():
    with subprocess.Popen(["sleep", "60"], env={**os.environ, MARK: "abc"}) as process:
        try:
            while not alive("abc"):
                assert process.poll() is None
            assert orphans("abc", 0.1) == [process.pid] and orphans("abcd", 0.1) == []
        finally:
            process.kill()
    assert orphans("abc") == []
