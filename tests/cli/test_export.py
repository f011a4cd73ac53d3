"""`metarl export`, on a run of navigation."""

import pytest

import metarl
from metarl.build import task_of
from metarl.config.schema import RunConfig
from metarl.deploy.policy import load
from metarl.evaluation.held_out import adapt_to
from metarl.runtime import OnnxPolicy


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "goals"
    tasks = {"family": "navigation", "name": "goals", "horizon": 5, "num_train": 4, "num_test": 3}
    settings = {"num_workers": 0, "num_tasks": 2, "rollouts_per_task": 2, "evaluation": {"num_tasks": 1}}
    agent = {"hidden_sizes": [8], "adaptation_steps": 2}
    metarl.train({**settings, "agent": agent, "stages": [{"tasks": tasks, "iterations": 1}]}, run_dir=path)
    return path


def test_a_run_is_exported_before_and_after_adapting(command, run_dir, tmp_path):
    plain, adapted = tmp_path / "plain.onnx", tmp_path / "folder" / "adapted.onnx"
    status, said, _ = command("export", run_dir, plain)
    assert status == 0 and f"{plain}: before adaptation, " in said
    options = ("--adapt-on", "goals:2", "--seed", 3, "--rollouts-per-task", 4)
    status, said, _ = command("export", run_dir, adapted, *options)
    assert status == 0 and f"{adapted}: adapted to goals 2 (test), " in said
    policy, observation = load(run_dir), [0.2, -0.1]
    task = task_of(policy.config, "goals:2")
    expected = {plain: policy, adapted: adapt_to(policy, task, rollouts_per_task=4, seed=3)}
    actions = []
    for path, reference in expected.items():
        loaded = OnnxPolicy(path)
        actions.append(loaded.predict(observation, deterministic=True)[0])
        assert actions[-1] == pytest.approx(reference.predict(observation, deterministic=True)[0], abs=1e-5)
        assert loaded.metadata["adapted"] == reference.adapted
    assert abs(actions[0] - actions[1]).max() > 1e-4
    assert loaded.metadata["task"] == {**loaded.metadata["task"], "name": "goals", "index": 2, "split": "test"}
    assert loaded.metadata["observation_names"] == ["position_x", "position_y"]


def test_a_saved_policy_is_exported_as_it_is(command, run_dir, tmp_path):
    policy = load(run_dir)
    adapt_to(policy, task_of(policy.config)).save(tmp_path / "saved")
    status, _, error = command("export", tmp_path / "saved", tmp_path / "twice.onnx", "--adapt-on", "goals:1")
    assert status == 2 and "is already adapted; omit --adapt-on" in error
    status, said, _ = command("export", tmp_path / "saved", tmp_path / "once.onnx")
    assert status == 0 and "once.onnx: adapted, " in said


def test_the_task_of_a_stage_has_its_stage_id():
    wedges = [
        {"tasks": {"family": "navigation", "name": "cued_wedges", "wedges": [k]}, "iterations": 1} for k in (0, 1)
    ]
    config = RunConfig.model_validate({"stages": wedges, "stage_id": "input"})
    first, last = (task_of(config, stage=stage.name) for stage in config.stages)
    assert (first.name, first.option("stage")) == ("wedge-0", 0)
    assert (last.name, last.option("stage")) == ("wedge-1", 1) and task_of(config, "wedge-1:3").index == 3
    assert task_of(config, "wedge-0:3", stage=config.stages[0].name).option("stage") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}", "policy.pt"], "policy.pt does not end in .onnx"),
        (["{run}", "p.onnx", "--seed", "1"], "--seed requires --adapt-on"),
        (["{run}", "p.onnx", "--split", "train"], "--split requires --adapt-on"),
        (["{run}", "p.onnx", "--stage", "goals"], "--stage requires --adapt-on"),
        (["{run}", "p.onnx", "--adapt-on", "goals", "--stage", "other"], "the run has no stage 'other'"),
        (["{run}", "p.onnx", "--adapt-on", ""], "unknown task or benchmark ''"),
        (["{run}", "p.onnx", "--adapt-on", "goals:3"], "there is no goals:3; the test split has 3 of goals"),
        (["{run}", "p.onnx", "--adapt-on", "goals:x"], "expected a number after the colon, e.g. goals:3"),
        (["{run}", "p.onnx", "--adapt-on", "goal"], "unknown task or benchmark 'goal': did you mean 'goals'?"),
        (["{run}", "p.onnx", "--adapt-on", "reach-v3"], "observations have shape (39,); the agent was trained for"),
        (["nowhere", "p.onnx"], "nowhere holds no run"),
        (["{run}"], "the following arguments are required: FILE.onnx"),
    ],
)
def test_mistakes_are_told_in_a_line(command, run_dir, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    status, _, error = command("export", *(word.replace("{run}", str(run_dir)) for word in words))
    assert status == 2 and message in error and error.count("\n") == 1 and not list(tmp_path.glob("*.onnx"))
