"""`wrappers:` in a config: YAML, flags, help, errors; what is built from it; how a run is described."""

import re
from types import SimpleNamespace

import pytest

import metarl
from metarl.build import distribution_of, env_of, horizon_of, stage_distributions, task_distribution
from metarl.cli import main
from metarl.cli.plot import _tasks, _tasks_name
from metarl.config.schema import RunConfig, as_config, dump_config, load_config
from metarl.config.settings_help import describe_settings
from metarl.deploy.onnx_export import describe
from metarl.envs import StageIdTasks, WrappedTasks
from metarl.errors import UserError
from metarl.spaces import CheckedEnv, env_attribute
from tests.envs.wrappers.counter import Counters

WRAPPERS = [{"name": "action_repeat", "times": 2}, {"name": "frame_stack", "frames": 3}]
STAGE = {"tasks": {"family": "mujoco", "name": "HalfCheetahVel", "horizon": 9, "num_train": 2}, "wrappers": WRAPPERS}
CUSTOM = {"tasks": {"family": "custom"}, "iterations": 1}
FLAG = "[{name: action_repeat, times: 2}, {name: frame_stack, frames: 3}]"


def test_a_config_with_wrappers_is_read_back(tmp_path):
    config = RunConfig.model_validate({"stages": [STAGE]})
    assert [(each.name, *each.model_dump(exclude={"name"}).values()) for each in config.stages[0].wrappers] == [
        ("action_repeat", 2),
        ("frame_stack", 3),
    ]
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_a_config_from_before_there_were_wrappers_is_read_as_one_without(tmp_path):
    path, config = tmp_path / "config.yaml", load_config("cw10_rl2")
    old = re.sub(r"\n  wrappers: \[\]", "", dump_config(config))
    assert "wrappers" not in old and dump_config(config).count("wrappers: []") == 10
    path.write_text(old)
    assert load_config(path) == config


def test_flags_set_wrappers_and_their_settings():
    assert load_config("quickstart").stages[0].wrappers == ()
    config = load_config("quickstart", ["--stages.0.wrappers", FLAG])
    assert config.stages[0].wrappers == RunConfig.model_validate({"stages": [STAGE]}).stages[0].wrappers
    one = load_config("quickstart", ["--stages.0.wrappers", "{name: hide_entries, names: goal_x}"])
    assert one.stages[0].wrappers[0].names == ("goal_x",)
    changed = load_config("quickstart", ["--stages.0.wrappers", FLAG, "--stages.0.wrappers.1.frames", "5"])
    assert [each.name for each in changed.stages[0].wrappers] == ["action_repeat", "frame_stack"]
    assert changed.stages[0].wrappers[1].frames == 5


def test_help_shows_wrappers_as_the_flag_takes_them():
    text = re.sub(r"\n {4,}", " ", describe_settings(load_config("quickstart", ["--stages.0.wrappers", FLAG]), 200))
    [line] = [line for line in text.splitlines() if line.startswith("  --stages.0.wrappers ")]
    assert "one of frame_stack, observation_noise, action_noise, " in line
    shown = re.search(r"\(default: '(.*)'\)$", line)[1]
    assert load_config("quickstart", ["--stages.0.wrappers", shown]) == load_config(
        "quickstart", ["--stages.0.wrappers", FLAG]
    )
    assert re.search(r"--stages.0.wrappers.1.frames INT +number of observations.*\(default: 3\)", text)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stages.0.wrappers", "frame_stak"], "got 'frame_stak', expected one of .*did you mean 'frame_stack'"),
        (["--stages.0.wrappers", "frame_stack"], "--stages.0.wrappers.0.frames: field required"),
        (["--stages.0.wrappers", "[{frames: 2}]"], "--stages.0.wrappers.0: no name; expected one of action_delay"),
        (["--stages.0.wrappers", "4"], "--stages.0.wrappers.0: got 4, expected nested settings"),
        (["--stages.0.wrappers.0.frames", "4"], "there is no stages.0.wrappers.0; the list has 0 item"),
        (["--stages.0.wrappers", FLAG, "--stages.0.wrappers.1.frame", "4"], "unknown setting; did you mean .*frames"),
        (["--stages.0.wrappers", FLAG, "--stages.0.wrappers.0.times", "0"], "--stages.0.wrappers.0.times: got 0"),
    ],
)
def test_mistakes_are_told_in_one_line(flags, message):
    with pytest.raises(UserError, match=message) as error:
        load_config("quickstart", flags)
    assert "\n" not in str(error.value)


# What is built


def test_every_way_to_the_tasks_of_a_run_wraps_them():
    config = as_config({"stages": [STAGE]})
    tasks = task_distribution(config.stages[0])
    assert isinstance(tasks, WrappedTasks)
    assert [tasks.train_tasks[0]] == distribution_of(config).train_tasks[:1]
    assert stage_distributions(config, None)[0].train_tasks == tasks.train_tasks
    assert horizon_of(config) == tasks.train_tasks[0].option("horizon") == 5  # 4 · 2 + 1
    other = distribution_of(config, "HalfCheetahDir").train_tasks[0]
    assert other.option("wrappers") == tasks.train_tasks[0].option("wrappers") and other.option("horizon") == 5
    env = env_of(config)
    assert env.observation_space.shape == (3 * 17,) and env.unwrapped.task.option("horizon") == 9
    assert as_config({"stages": [{**STAGE, "wrappers": []}]}).stages[0].wrappers == ()
    assert not isinstance(task_distribution(as_config("quickstart").stages[0]), WrappedTasks)


def test_stages_with_equal_tasks_and_wrappers_share_an_object():
    noise = [{"name": "reward_scale", "factor": 2}, WRAPPERS[1]]
    stages = [STAGE, STAGE, {**STAGE, "wrappers": noise}]
    for given, expected in ((None, "mujoco"), (Counters(), "counter")):
        first, second, third = stage_distributions(as_config({"stages": stages}), given)
        assert first is second and first is not third
        assert [tasks.train_tasks[0].family for tasks in (first, third)] == [expected] * 2
        assert "reward_scale" in third.train_tasks[0].option("wrappers")
    each = [Counters(), Counters(horizon=7)]
    config = as_config({"stages": [{**CUSTOM, "wrappers": WRAPPERS}, CUSTOM]})
    wrapped, plain = stage_distributions(config, each)
    assert plain is each[1] and wrapped.train_tasks[0].option("horizon") == 3
    config = as_config({"stages": [{**CUSTOM, "wrappers": WRAPPERS}, CUSTOM], "stage_id": "input"})
    assert all(isinstance(tasks, StageIdTasks) for tasks in stage_distributions(config, each))


def settings(**others):
    return {
        "num_tasks": 2,
        "rollouts_per_task": 2,
        "num_workers": 0,
        "device": "cpu",
        "agent": {"name": "maml_ppo", "hidden_sizes": [4], "outer": {"epochs": 1}},
        "evaluation": {"num_tasks": 1},
        **others,
    }


def test_a_run_on_custom_tasks_collects_from_wrapped_environments(tmp_path, capsys):
    wrappers = [*WRAPPERS, {"name": "observation_noise", "std": 0.1}, {"name": "reward_scale", "factor": 10}]
    stages = [{**CUSTOM, "wrappers": wrappers}, {**CUSTOM, "wrappers": wrappers}]
    config = settings(stages=stages, stage_id="input")
    run = metarl.train(config, Counters(horizon=5), run_dir=tmp_path / "run")
    assert run.policy.spaces.observation_size == 3 * 3 + 2  # frames, then the stage id
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"meta_train/return_pre": 150.0' in lines  # 10 · (1 + … + 5)
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "run")])
    out = capsys.readouterr().out
    described = "action_repeat times 2, frame_stack frames 3, observation_noise std 0.1, reward_scale factor 10.0"
    assert out.count(f"wrappers     {described}\n") == 2
    with pytest.raises(SystemExit) as error:
        main(["evaluate", str(tmp_path / "run"), "--official"])
    assert error.value.code == 2 and "which have no wrappers; this run has some" in capsys.readouterr().err


def test_spaces_must_be_equal_in_all_stages(tmp_path):
    stages = [CUSTOM, {**CUSTOM, "wrappers": WRAPPERS}]
    with pytest.raises(UserError, match="all stages need the same observation and action space"):
        metarl.train(settings(stages=stages), Counters(), run_dir=tmp_path / "run")


def test_the_command_line_names_a_wrapper_that_does_not_fit_in_one_line(tmp_path, capsys):
    flag = "{name: hide_entries, names: [position_z]}"
    with pytest.raises(SystemExit) as error:
        main(["train", "navigation_maml_ppo", "--stages.0.wrappers", flag, "--run-dir", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert error.value.code == 2 and said.count("\n") == 1
    assert "task goals 0 of navigation: hide_entries: there is no entry 'position_z'; did you mean" in said


# How runs and exported policies are described


def test_runs_are_compared_only_on_equal_wrappers():
    first, same, bare = (
        SimpleNamespace(config=as_config({"stages": [{**STAGE, "wrappers": wrappers}]}))
        for wrappers in (WRAPPERS, list(WRAPPERS), [])
    )
    assert _tasks(first) == _tasks(same) != _tasks(bare)
    assert _tasks_name(first.config).endswith("action repeat times 2, frame stack frames 3")
    assert "frame" not in _tasks_name(bare.config)


def test_an_exported_policy_has_the_names_and_the_control_period_of_the_wrapped_environment():
    config = as_config({"stages": [STAGE]})
    env = env_of(config)
    controller = SimpleNamespace(reward_scale=None, state_size=0)
    spaces = CheckedEnv(env).spaces
    about = describe(
        controller, config, spaces, trial_episodes=3, adapted=False, env_steps=0, noise_size=0, env=env, task=None,
        control_period_s=None,
    )  # fmt: skip
    assert about["control_period_s"] == pytest.approx(2 * env.unwrapped.dt)
    assert len(about["observation_names"]) == 3 * 17 and about["observation_names"][0].endswith("_t-2")
    assert about["action_names"] == list(env_attribute(env, "action_names"))
    assert about["trial"] == {"episodes": 3, "horizon": 5}
