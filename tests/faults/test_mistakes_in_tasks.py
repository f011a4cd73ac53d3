"""Tasks that there are none of, and tasks that an agent was not made for.

The numbers are those of the cases in docs/reliability.md.
"""

import json

import pytest

import metarl
from tests.faults.processes import NAVIGATION

# 7: names of tasks


def test_case_07_an_unknown_task_is_answered_with_the_nearest(mistake):
    message = mistake("train", "quickstart", "--stages.0.tasks.name", "reach-v9")
    assert "--stages.0.tasks.name: unknown Meta-World task 'reach-v9': did you mean 'reach-v3'?" in message
    assert "`metarl list envs` shows all" in message


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ("family: metaworld, benchmark: ML1, name: reach", "did you mean 'reach-v3'?"),
        ("family: metaworld, benchmark: ML1, name: ''", "unknown Meta-World task"),
        ("family: metaworld, benchmark: ML11", "benchmark: got 'ML11', expected 'ML1', 'ML10'"),
        ("family: metaworld, benchmark: ML1", "ML1 needs a name"),
        ("family: metaworld, benchmark: ML10, name: reach-v3", "ML1 needs a name, the others have none"),
        ("family: mujoco, name: AntDirr", "did you mean 'AntDir'?"),
        ("family: navigation, name: goal", "did you mean 'goals'?"),
        ("family: metawrld", "did you mean 'metaworld'?"),
        ("family: custom", "the tasks are custom ones: train from Python"),
    ],
)
def test_case_07_other_names_of_tasks(refused, config, tasks, expected):
    refused("train", config(f"stages: [{{tasks: {{{tasks}}}}}]"), expected=[expected])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gaols", "did you mean 'goals'?"),
        ("reach-v9", "did you mean 'reach-v3'?"),
        ("ml10", "did you mean 'ML10'?"),
        ("", "unknown task or benchmark"),
    ],
)
def test_case_07_of_a_trained_agent(refused, run_dir, name, expected):
    refused("evaluate", run_dir, "--tasks", name, expected=[expected, "`metarl list envs` shows all"])
    refused("play", run_dir, "--task", name, expected=[expected])


@pytest.mark.parametrize("index", ["x", "-1", "1.5", "²", "٣", "99999", "9" * 5000, "1:2", " 1"])
def test_case_07_an_index_that_is_none(refused, run_dir, index):
    message = refused("play", run_dir, "--task", f"goals:{index}")
    assert "expected a number" in message or "counted from 0" in message


# 8: a meta-batch that the classes do not divide


@pytest.mark.slow
@pytest.mark.parametrize("num_tasks", [3, 5])
def test_case_08_a_meta_batch_that_the_classes_do_not_divide_works(cli, tmp_path, num_tasks):
    """Two classes, drawn as evenly as can be."""
    tasks = "{family: metaworld, benchmark: custom, horizon: 5, names: [reach-v3, push-v3]}"
    flags = ["--stages.0.tasks", tasks, "--num-tasks", num_tasks, "--stages.0.iterations", "1"]
    done = cli(*NAVIGATION, *flags, "--run-dir", tmp_path / "run")
    assert done.status == 0, done.err
    first, *_ = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert first["env_steps"] == num_tasks * 2 * 5


# 18: other tasks than the agent was made for


@pytest.mark.slow
def test_case_18_tasks_of_other_sizes_name_both_shapes(mistake, run_dir):
    both = ["observations have shape (17,)", "trained for (2,)"]
    mistake("evaluate", run_dir, "--tasks", "HalfCheetahVel", "--num-tasks", "1", "--num-workers", "0", expected=both)
    mistake("export", run_dir, "x.onnx", "--adapt-on", "HalfCheetahVel", expected=both)


def test_case_18_a_checkpoint_of_other_sizes_than_the_config_says(command, copied):
    text = (copied / "config.yaml").read_text()
    assert "\n  - 8\n" in text
    (copied / "config.yaml").write_text(text.replace("\n  - 8\n", "\n  - 9\n"))
    status, _, err = command("evaluate", copied, "--num-tasks", "1", "--num-workers", "0")
    message = err.splitlines()[-1]
    assert status == 2 and "Traceback" not in err
    assert "does not fit the run's config" in message and "(9, 2)" in message and "(8, 2)" in message


@pytest.mark.slow
def test_case_18_a_run_on_tasks_of_other_sizes_is_not_resumed(mistake, copied):
    flags = ["--stages.0.tasks", "{family: mujoco, name: HalfCheetahVel, horizon: 5}", "--allow-config-change"]
    message = mistake(*NAVIGATION, *flags, "--run-dir", copied, "--resume")
    assert "observation" in message and "17" in message and "2" in message


@pytest.mark.parametrize(
    ("observation", "expected"),
    [
        ([0.0] * 3, [r"\(3,\)", r"\(2,\)"]),
        ([[0.0]], [r"\(1, 1\)", "2"]),
        (0.0, [r"\(\)", "2"]),
        ([], [r"\(0,\)", "2"]),
        ([[[0.0, 0.0]]], [r"\(1, 1, 2\)", "2"]),
        ([0.0, float("nan")], ["NaN", "nan|finite|NaN"]),
        ([float("inf"), 0.0], ["infinit|finite"]),
    ],
)
def test_predict_refuses_other_shapes_and_what_is_not_finite(run_dir, observation, expected):
    policy = metarl.load(run_dir)
    for pattern in expected:
        with pytest.raises(ValueError, match=pattern):
            policy.predict(observation)
