"""Stages that start from another run, and stages that go from easy tasks to hard ones."""

import contextlib
import re

import gymnasium
import numpy as np
import pytest
import torch

import metarl
import metarl.training.loop
import metarl.training.warm_start
from metarl.config.schema import RunConfig, dump_config, load_config
from metarl.errors import UserError
from metarl.runs.checkpoint import load_latest
from metarl.runs.tracking import read_metrics
from metarl.training.loop import train


def config(*stages, agent=None, **settings):
    small = {
        "num_tasks": 2,
        "rollouts_per_task": 2,
        "num_workers": 0,
        "device": "cpu",
        "checkpoint_every_iterations": 1,
    }
    evaluation = {"num_tasks": 2, "every_iterations": 0}
    agent = {"hidden_sizes": [8], "critic": "learned", **(agent or {})}
    return {**small, "evaluation": evaluation, "agent": agent, "stages": list(stages), **settings}


def stage(iterations=1, tasks=None, **settings):
    tasks = {"family": "navigation", "horizon": 5, "num_train": 10, **(tasks or {})}
    return {"tasks": tasks, "iterations": iterations, **settings}


def state(run_dir):
    return load_latest(run_dir / "checkpoints").state


def metrics(run_dir):
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in read_metrics(run_dir)]


def assert_same_run(left, right):
    assert metrics(left) == metrics(right)
    assert load_latest(left / "checkpoints").position == load_latest(right / "checkpoints").position
    ours, theirs = state(left), state(right)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(settings, *args, **kwargs):
    """The one line with which training is refused before it begins."""
    with pytest.raises(UserError) as error:
        train(settings, *args, **kwargs, progress=lambda *_: pytest.fail("trained"))
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


# Starting from another run


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run of another class of agents and another seed, with optimisers that have made steps."""
    run_dir = tmp_path_factory.mktemp("pretrained")
    train(config(stage(2), agent={"name": "multi_task"}, seed=7), run_dir=run_dir)
    assert any("optimizer." in name for name in state(run_dir))
    return run_dir


def begun(settings, run_dir):
    """The state of an agent that a run starts with."""
    assert not train(settings, run_dir=run_dir, max_minutes=0).finished
    assert metrics(run_dir) == []
    return state(run_dir)


def test_a_stage_starts_from_what_both_agents_have(tmp_path, pretrained):
    fresh = begun(config(stage()), tmp_path / "fresh")
    found, source = begun(config(stage(init_from=str(pretrained))), tmp_path / "run"), state(pretrained)
    assert found.keys() == fresh.keys()  # no entry of an optimiser
    shared = {name for name in found if name.startswith(("policy.", "normalizer.", "value."))}
    assert {"policy.weight_0", "policy.log_std", "normalizer.count", "value.weight_0", "value.scale"} <= shared
    for name in found:
        assert torch.equal(found[name], (source if name in shared else fresh)[name]), name
    assert not torch.equal(found["policy.weight_0"], fresh["policy.weight_0"])
    assert (
        source["normalizer.count"] == found["normalizer.count"] == 2 * 2 * 2 * 5
    )  # iterations, tasks, rollouts, steps
    assert source["iteration"] == 2 and found["iteration"] == 0  # its own counter


def test_without_it_nothing_is_taken_over(tmp_path):
    left, right = (begun(config(stage(**extra)), tmp_path / str(len(extra))) for extra in ({}, {"init_from": None}))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert left["normalizer.count"] == 0


def test_what_an_agent_learned_beside_the_policy_is_taken_if_the_other_learns_it_too(tmp_path):
    meta_sgd = {"name": "meta_sgd"}
    train(config(stage(2), agent=meta_sgd), run_dir=tmp_path / "source")
    rates = {name: value for name, value in state(tmp_path / "source").items() if name.startswith("inner_lr.")}
    assert rates and not torch.equal(rates["inner_lr.weight_1"], torch.full((2, 8), 0.1))
    from_it = stage(init_from=str(tmp_path / "source"))
    found = begun(config(from_it, agent=meta_sgd | {"inner_lr": 0.3}), tmp_path / "same")
    assert all(torch.equal(found[name], value) for name, value in rates.items())
    assert not any(name.startswith("inner_lr.") for name in begun(config(from_it), tmp_path / "without"))
    train(config(stage()), run_dir=tmp_path / "maml")
    found = begun(config(stage(init_from=str(tmp_path / "maml")), agent=meta_sgd), tmp_path / "own")
    assert torch.equal(found["policy.weight_0"], state(tmp_path / "maml")["policy.weight_0"])
    assert torch.equal(found["inner_lr.weight_1"], torch.full((2, 8), 0.1))


def test_an_agent_without_a_value_function_does_without(tmp_path, pretrained):
    found = begun(config(stage(init_from=str(pretrained)), agent={"critic": "linear"}), tmp_path)
    assert torch.equal(found["policy.weight_1"], state(pretrained)["policy.weight_1"])
    assert not any(name.startswith("value.") for name in found)


def test_a_relative_path_starts_at_the_working_directory(tmp_path, pretrained, monkeypatch):
    monkeypatch.chdir(pretrained.parent)
    found = begun(config(stage(init_from=pretrained.name)), tmp_path)
    assert torch.equal(found["policy.weight_0"], state(pretrained)["policy.weight_0"])


def crash_in(stage, iteration):
    def crash(position, scalars):
        if (position.stage, position.stage_iteration) == (stage, iteration):
            raise KeyboardInterrupt

    return crash


def interrupted(settings, run_dir, **kwargs):
    """Stop a run, by a limit or in the middle of an iteration; returns the position that it can be resumed from."""
    with contextlib.suppress(KeyboardInterrupt):
        assert not train(settings, run_dir=run_dir, **kwargs).finished
    position = load_latest(run_dir / "checkpoints").position
    return position.stage, position.stage_iteration


@pytest.fixture(scope="module")
def sequence(tmp_path_factory, pretrained):
    """Two stages, of which the second starts from another run, and the run without interruption."""
    settings = config(stage(2), stage(3, init_from=str(pretrained)))
    run_dir = tmp_path_factory.mktemp("sequence")
    assert train(settings, run_dir=run_dir).finished
    return settings, run_dir


@pytest.mark.parametrize(
    ("how", "where"),
    [
        ({"max_iterations": 1}, (0, 1)),
        ({"progress": crash_in(1, 1)}, (1, 0)),  # saved at the end of the stage before, as that one left the agent
        ({"max_iterations": 2}, (1, 0)),  # the same, where the run was stopped
        ({"max_iterations": 3}, (1, 1)),
        ({"progress": crash_in(1, 3)}, (1, 2)),
    ],
)
def test_stop_and_resume_equals_going_on(tmp_path, sequence, how, where):
    settings, whole = sequence
    assert interrupted(settings, tmp_path, **how) == where
    assert train(settings, run_dir=tmp_path, resume=True).finished
    assert_same_run(tmp_path, whole)


def test_a_later_stage_starts_from_the_other_run_with_fresh_optimisers(tmp_path, sequence, pretrained, monkeypatch):
    settings, _ = sequence
    assert interrupted(settings, tmp_path, max_iterations=2) == (1, 0)
    before, source = state(tmp_path), state(pretrained)
    acting, collect = [], metarl.training.loop.adapt_and_collect

    def spied(envs, agent, *rest):
        acting.append({name: value.clone() for name, value in agent.state_dict().items()})
        return collect(envs, agent, *rest)

    monkeypatch.setattr(metarl.training.loop, "adapt_and_collect", spied)
    train(settings, run_dir=tmp_path, resume=True)
    after = acting[0]
    assert any(".exp_avg." in name for name in before) and not any(".exp_avg." in name for name in after)
    assert after.pop("optimizer.lr") == load_config("navigation_maml_ppo").agent.outer.lr
    for name, value in after.items():
        taken = name.startswith(("policy.", "normalizer.", "value."))
        assert torch.equal(value, (source if taken else before)[name]), name
    assert not torch.equal(before["policy.weight_0"], after["policy.weight_0"])


def test_a_stage_that_has_begun_needs_the_other_run_no_more(tmp_path):
    source = tmp_path / "source"
    train(config(stage(), agent={"name": "multi_task"}), run_dir=source)
    settings = config(stage(2, init_from=str(source)), stage())
    train(settings, run_dir=tmp_path / "whole")
    assert interrupted(settings, tmp_path / "run", max_iterations=1) == (0, 1)
    source.rename(tmp_path / "gone")
    assert train(settings, run_dir=tmp_path / "run", resume=True).finished
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_stage_that_is_still_to_begin_needs_it(tmp_path):
    source = tmp_path / "source"
    train(config(stage()), run_dir=source)
    settings = config(stage(2), stage(init_from=str(source)))
    assert interrupted(settings, tmp_path / "run", max_iterations=1) == (0, 1)
    source.rename(tmp_path / "gone")
    before = files(tmp_path / "run")
    assert "stages.1.init_from" in refused(settings, run_dir=tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == before


def test_resuming_with_another_start_is_refused(tmp_path, pretrained):
    settings = config(stage(2, init_from=str(pretrained)))
    train(settings, run_dir=tmp_path, max_iterations=1)
    assert "stages.0.init_from" in refused(config(stage(2)), run_dir=tmp_path, resume=True)


def damage(run_dir):
    for path in (run_dir / "checkpoints").glob("*/agent.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])


def execute(run_dir):
    (run_dir / "config.yaml").write_text(f"seed: !!python/object/apply:os.mkdir ['{run_dir / 'executed'}']")


@pytest.mark.parametrize(
    ("source", "change", "expected"),
    [
        (None, None, r"source holds no run: there is no config\.yaml"),
        (config(stage()), damage, r"cannot load .*source: .*agent\.safetensors: [0-9,]+ bytes; the manifest says"),
        (config(stage()), execute, r"source/config\.yaml:1:7: not valid YAML"),
        (
            config(stage(tasks={"name": "cued_wedges"})),
            None,
            r"source was trained for \(observation, action\) sizes \(6, 2\); the tasks of this run have \(2, 2\)",
        ),
        (
            config(stage(), agent={"hidden_sizes": [4]}),
            None,
            r"source: 'policy\.bias_0': found shape \(4,\), expected shape \(8,\)",
        ),
        (
            config(stage(), agent={"hidden_sizes": []}),
            None,
            r"source: 'policy\.bias_0': found shape \(2,\), expected shape \(8,\)",
        ),
        (
            config(stage(), agent={"hidden_sizes": [8, 2]}),
            None,
            r"source: 'policy\.bias_2': found shape \(2,\), expected nothing",
        ),
        (
            config(stage(), agent={"activation": "relu"}),
            None,
            r"source: agent\.activation: found 'relu', expected 'tanh'",
        ),
    ],
)
def test_a_run_that_does_not_fit_is_refused_before_anything_is_done(tmp_path, source, change, expected):
    train(config(stage()), run_dir=tmp_path / "run")
    if source:
        train(source, run_dir=tmp_path / "source")
    if change:
        change(tmp_path / "source")
    before = files(tmp_path)
    settings = config(stage(), stage(init_from=str(tmp_path / "source")))
    for run_dir, overwrite in ((tmp_path / "run", True), (tmp_path / "new", False)):
        message = refused(settings, run_dir=run_dir, overwrite=overwrite)
        assert message.startswith("stages.1.init_from: ")
        assert re.search(expected, message)
    assert files(tmp_path) == before and not (tmp_path / "new").exists()


def test_a_value_function_of_another_size_is_named(tmp_path, pretrained, monkeypatch):
    """Shared by name, though of another shape: neither taken over nor passed over in silence."""
    target = metarl.load(pretrained)
    fitting = target.agent.state_dict()
    monkeypatch.setattr(target.agent, "state_dict", lambda: fitting | {"value.weight_0": torch.zeros(9, 2)})
    with pytest.raises(UserError, match=r"x: 'value\.weight_0': found shape \(8, 2\), expected shape \(9, 2\)"):
        metarl.training.warm_start.taken_over(target, metarl.load(pretrained), "x")


def test_a_run_cannot_start_from_itself(tmp_path):
    train(config(stage()), run_dir=tmp_path / "run")
    before = files(tmp_path)
    settings = config(stage(init_from=str(tmp_path / "other" / ".." / "run")))
    assert "is the directory of this run" in refused(settings, run_dir=tmp_path / "run", overwrite=True)
    assert files(tmp_path) == before


# From easy tasks to hard ones


@pytest.fixture
def drawn(monkeypatch):
    """The training tasks of each iteration."""
    iterations = []

    def spy(*args, collect=metarl.training.loop.adapt_and_collect):
        iterations.append(args[2])
        return collect(*args)

    monkeypatch.setattr(metarl.training.loop, "adapt_and_collect", spy)
    return iterations


CURRICULUM = {"start_fraction": 0.2, "iterations": 4}


def test_tasks_come_from_easy_to_hard(tmp_path, drawn):
    train(config(stage(6, curriculum=CURRICULUM), num_tasks=4), run_dir=tmp_path)
    tasks = metarl.envs.distribution("navigation", horizon=5, num_train=10)
    difficulties = sorted(tasks.difficulty(task) for task in tasks.train_tasks)
    # 0.2 · 10 = 2 of ten tasks, then two more each iteration.
    counts = [2, 4, 6, 8, 10, 10]
    assert len(drawn) == 6
    for count, chosen in zip(counts, drawn, strict=True):
        hardest = max(tasks.difficulty(task) for task in chosen)
        assert hardest <= difficulties[count - 1]
    assert len(set(drawn[0])) == 2 and len(set(drawn[1])) == 4
    lines = [line for line in metrics(tmp_path) if "train/task_fraction" in line]
    assert [line["train/task_fraction"] for line in lines] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]


def test_each_stage_counts_from_its_own_beginning(tmp_path, drawn):
    train(config(stage(3), stage(2, curriculum=CURRICULUM), num_tasks=4), run_dir=tmp_path)
    fractions = [line.get("train/task_fraction") for line in metrics(tmp_path) if "meta_train/return_pre" in line]
    assert fractions == [None, None, None, 0.2, 0.4]
    # tasks are also drawn at the end of each stage, after the third and the fifth iteration
    assert [len(set(tasks)) for tasks in drawn] == [4, 4, 4, 4, 2, 4, 4]


def test_without_a_curriculum_tasks_are_drawn_as_after_its_end(tmp_path, drawn):
    ends = {"start_fraction": 0.2, "iterations": 2}
    train(config(stage(4, curriculum=ends), num_tasks=4), run_dir=tmp_path / "with")
    train(config(stage(4), num_tasks=4), run_dir=tmp_path / "without")
    assert drawn[2:4] == drawn[6:8] and drawn[0] != drawn[4]
    assert not any("train/task_fraction" in line for line in metrics(tmp_path / "without"))


@pytest.mark.parametrize("stop", [1, 3])
def test_a_curriculum_goes_on_where_it_stopped(tmp_path, stop):
    settings = config(stage(5, curriculum=CURRICULUM))
    train(settings, run_dir=tmp_path / "whole")
    train(settings, run_dir=tmp_path / "parts", max_iterations=stop)
    assert train(settings, run_dir=tmp_path / "parts", resume=True).finished
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


class Still(gymnasium.Env):
    """Nothing happens."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,))
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,))

    def __init__(self, task):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, dtype=np.float32), {}

    def step(self, action):
        return np.zeros(2, dtype=np.float32), 0.0, False, False, {}


def still(difficulty=None):
    return metarl.envs.custom("still", Still, num_train=4, num_test=1, horizon=2, difficulty=difficulty)


CUSTOM = {"tasks": {"family": "custom"}, "iterations": 1, "curriculum": {"iterations": 3, "start_fraction": 0.5}}


def test_tasks_of_ones_own_come_in_the_order_of_their_difficulty(tmp_path, drawn):
    train(config(CUSTOM), still(lambda task: -task.index), run_dir=tmp_path)
    assert {task.index for task in drawn[0]} == {2, 3}


@pytest.mark.parametrize(
    ("tasks", "own", "expected"),
    [
        ({"name": "semicircle"}, None, "the 10 training task(s) of semicircle are all equally hard"),
        (CUSTOM["tasks"], still(), "these tasks have no order of difficulty; give their distribution a method"),
        (CUSTOM["tasks"], still(lambda task: float("nan")), '"index": 0'),
    ],
)
def test_tasks_without_an_order_have_no_curriculum(tmp_path, tasks, own, expected):
    train(config(stage()), run_dir=tmp_path / "run")
    before = files(tmp_path)
    first = stage() if own is None else CUSTOM | {"curriculum": {}}
    second = CUSTOM if own else stage(tasks=tasks, curriculum=CURRICULUM)
    for run_dir, overwrite in ((tmp_path / "run", True), (tmp_path / "new", False)):
        message = refused(config(first, second), own, run_dir=run_dir, overwrite=overwrite)
        assert message.startswith("stages.1.curriculum: ") and expected in message
    assert files(tmp_path) == before and not (tmp_path / "new").exists()


# The settings


def test_the_settings_come_back_from_yaml_and_are_flags(tmp_path):
    settings = RunConfig.model_validate(config(stage(init_from="runs/a", curriculum=CURRICULUM)))
    path = tmp_path / "mine.yaml"
    path.write_text(dump_config(settings), encoding="utf-8")
    assert load_config(path) == settings
    flags = "--stages.0.init-from runs/b --stages.0.curriculum.iterations 9 --stages.0.curriculum.start-fraction 0.5"
    found = load_config(path, flags.split()).stages[0]
    assert (found.init_from, found.curriculum.iterations, found.curriculum.start_fraction) == ("runs/b", 9, 0.5)
    plain = RunConfig().stages[0]
    assert plain.init_from is None and plain.curriculum.iterations == 0


@pytest.mark.parametrize(
    ("curriculum", "expected"),
    [
        ({"iterations": -1}, "stages.0.curriculum.iterations: got -1, expected greater than or equal to 0"),
        ({"iterations": 3, "start_fraction": 0}, "start_fraction: got 0, expected greater than 0"),
        ({"iterations": 3, "start_fraction": 1.1}, "start_fraction: got 1.1, expected less than or equal to 1"),
        ({"start_fraction": 0.5}, "start_fraction=0.5 with iterations=0: set the iterations of the curriculum"),
        ({"iteration": 3}, "unknown setting; did you mean 'iterations'?"),
    ],
)
def test_wrong_settings_are_named(tmp_path, curriculum, expected):
    assert expected in refused(config(stage(curriculum=curriculum)), run_dir=tmp_path / "run")
