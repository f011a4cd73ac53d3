"""Runs and ONNX files of commit a4c29e7, one small run of each agent: they load, evaluate, resume, and act.

`tests/data/a4c29e7/<run>` is a run directory, stopped early, with

    report.json    what `metarl evaluate` of that commit said of it
    resumed.json   the lines of metrics.jsonl that it wrote when it was resumed to its end

Numbers are compared to 1e-3, since they come from another processor.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import metarl
from metarl.cli import main
from metarl.config.schema import load_config
from metarl.runtime import OnnxPolicy

DATA = Path(__file__).parent / "data" / "a4c29e7"
RUNS = sorted(path.parent.name for path in DATA.glob("*/config.yaml"))


@pytest.fixture
def run(request, tmp_path):
    """A copy of a run."""
    return Path(shutil.copytree(DATA / request.param, tmp_path / request.param))


def close(found, expected):
    """Whether two JSON values hold the same numbers, but for rounding; new keys may have come."""
    if isinstance(expected, dict):
        return all(close(found[key], value) for key, value in expected.items())
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(close, found, expected))
    return found == (pytest.approx(expected, rel=1e-3, abs=1e-3) if isinstance(expected, float) else expected)


def test_there_is_a_run_of_each_kind():
    agents = {load_config(DATA / name / "config.yaml").agent.name for name in RUNS}
    assert len(agents) == 12 and len(RUNS) == 18


@pytest.mark.parametrize("run", RUNS, indirect=True)
def test_an_old_run_evaluates_as_it_did(run):
    report = json.loads((run / "report.json").read_text())
    words = ["--num-tasks", "2", "--rollouts-per-task", "2", "--num-workers", "0", "--json", str(run / "now.json")]
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", str(run), *words])
    assert close(json.loads((run / "now.json").read_text()), report)


@pytest.mark.parametrize("run", RUNS, indirect=True)
def test_an_old_run_resumes_as_it_did(run):
    before = len((run / "metrics.jsonl").read_text().splitlines())
    resumed = metarl.train(load_config(run / "config.yaml"), run_dir=run, resume=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][before:]
    assert resumed.finished and close(lines, json.loads((run / "resumed.json").read_text()))


@pytest.mark.parametrize("name", sorted(path.stem for path in DATA.glob("*.onnx")))
def test_an_old_onnx_file_acts_as_its_run_adapted_now(name):
    from metarl.build import task_of
    from metarl.evaluation import adapt_to

    policy = metarl.load(DATA / name)
    policy, exported = adapt_to(policy, task_of(policy.config, "goals:1")), OnnxPolicy(DATA / f"{name}.onnx")
    rng, state, theirs = np.random.default_rng(0), None, None
    for step in range(12):
        observation, reward = rng.uniform(-1, 1, (1, 2)), -float(rng.uniform())
        start = np.array([step in (0, 6)])
        action, state = policy.predict(observation, state, start, deterministic=True, reward=reward)
        other, theirs = exported.predict(observation, theirs, start, deterministic=True, reward=reward)
        np.testing.assert_allclose(action, other, atol=1e-3)
