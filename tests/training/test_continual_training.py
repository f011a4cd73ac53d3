"""Sequences of stages: what is tracked, stability methods in training, stopping and resuming, controls, own methods."""

import json

import gymnasium
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import metarl
import metarl.envs.manager
import metarl.evaluation.held_out
import metarl.training.loop
import metarl.training.stage_evaluation
from metarl.config.schema import as_config, load_config
from metarl.errors import UserError
from metarl.runs.checkpoint import load_latest
from metarl.runs.tracking import read_metrics
from metarl.stability.l2 import L2Config
from metarl.training.loop import train

AGENTS = {
    "maml": {"name": "maml_ppo", "hidden_sizes": [8], "outer": {"epochs": 2}},
    "rl2": {"name": "rl2", "memory": {"size": 8}, "encoder_sizes": [8], "epochs": 1, "minibatches": 2},
}
both_agents = pytest.mark.parametrize("agent", AGENTS)
slow = pytest.mark.slow
each_agent = pytest.mark.parametrize("agent", ["maml", pytest.param("rl2", marks=slow)])

EWC = {"name": "ewc", "fisher_states": 40}
REPLAY = {"name": "replay", "capacity": 8}
MER = {"name": "mer", "capacity": 8, "batches": 2}
MAS = {"name": "mas", "states": 40}


def wedges(*families, iterations=2):
    return [
        {
            "name": f"wedge {family}",
            "tasks": {"family": "navigation", "name": "rotated_wedges", "wedges": [family], "horizon": 5},
            "iterations": iterations,
            "score_range": [-10.0, 0.0],  # of returns; success is 0 in so few steps
        }
        for family in families
    ]


def config(agent, stages=(0, 1), stability=(), iterations=2, **settings):
    stages = wedges(*stages, iterations=iterations) if isinstance(stages[0], int) else list(stages)
    small = {"num_tasks": 2, "rollouts_per_task": 2, "num_workers": 0, "device": "cpu", "keep_checkpoints": 20}
    small |= {"evaluation": {"num_tasks": 2, "every_iterations": 0}, "agent": AGENTS[agent]}
    return {**small, "stages": stages, "stability": list(stability), **settings}


def metrics(run_dir, *without):
    """The lines of metrics.jsonl without what the clock says, and without entries of other prefixes."""
    dropped = ("time/", *without)
    return [{k: v for k, v in line.items() if not k.startswith(dropped)} for line in read_metrics(run_dir)]


def states(run_dir):
    """Everything in the newest checkpoint."""
    checkpoint = load_latest(run_dir / "checkpoints")
    state = {f"agent {name}": value for name, value in checkpoint.state.items()}
    if (checkpoint.path / "stability.safetensors").exists():
        state |= {f"stability {name}": value for name, value in checkpoint.load("stability").items()}
    return state


def agent_at(run_dir, iteration):
    return metarl.runs.checkpoint.load(run_dir / "checkpoints" / f"{iteration:06d}").state


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def assert_same_run(left, right):
    assert metrics(left) == metrics(right)
    ours, theirs = states(left), states(right)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    assert load_latest(left / "checkpoints").position == load_latest(right / "checkpoints").position


# What is tracked


@pytest.fixture(scope="module", params=AGENTS)
def tracked(request, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp(f"tracked-{request.param}")
    settings = config(
        request.param, stability=[EWC, REPLAY], evaluation={"num_tasks": 2, "every_iterations": 1}, seed=3
    )
    return run_dir, train(settings, run_dir=run_dir)


def test_lines_and_environment_steps(tracked):
    """40 steps an iteration: 2 tasks · 2 rollouts · 5 steps · 2 phases or episodes; 40 to consolidate a stage."""
    run_dir, run = tracked
    lines = metrics(run_dir)
    found = [(line["stage"], line["iteration"], line["env_steps"], "train/loss" in line) for line in lines]
    trained = [(stage, iteration, steps) for stage, iteration, steps, _ in found if iteration]
    assert found[0][:3] == (0, 0, 0)  # what it can do before training
    first = [(0, 1, 40), (0, 1, 40), (0, 2, 80), (0, 2, 120)]
    second = [(1, 3, 160), (1, 3, 160), (1, 4, 200), (1, 4, 240)]
    assert trained == first + second
    assert run.policy.env_steps == load_latest(run_dir / "checkpoints").position.env_steps == 240


def test_the_account_is_tracked_and_written(tracked):
    run_dir, run = tracked
    lines = [line for line in metrics(run_dir) if "continual/score/wedge 0" in line]
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3, 4]
    for line in lines:
        for phase in ("score", "score_pre"):
            assert all(np.isfinite(line[f"continual/{phase}/wedge {stage}"]) for stage in (0, 1))
    figures = ("average_performance", "forgetting", "backward_transfer", "forward_transfer", "min_acc", "plasticity")
    assert {f"continual/{name}" for name in figures} <= lines[-1].keys()
    assert not {f"continual/{name}" for name in figures} & lines[1].keys()  # no stage has ended
    report = json.loads((run_dir / "evaluation" / "continual.json").read_text())
    assert report == run.report["continual"] and report["stages"] == ["wedge 0", "wedge 1"]
    for phase, key in (("post", "score"), ("pre", "score_pre")):
        expected = [[lines[i][f"continual/{key}/wedge {stage}"] for stage in (0, 1)] for i in (0, 2, 4)]
        assert report[f"scores_{phase}"] == expected
    last, matrix = lines[-1], np.array(report["scores_post"])
    assert last["continual/average_performance"] == pytest.approx(matrix[2].mean())
    assert last["continual/forgetting"] == pytest.approx((matrix[1, 0] - matrix[2, 0]) / 2)
    assert last["meta_test/return_post"] == pytest.approx(run.report["aggregate"]["return_post"]["mean"])
    at_ends = [line for line in metrics(run_dir) if any(name.startswith("plasticity/") for name in line)]
    assert [line["iteration"] for line in at_ends] == [2, 4]
    assert all(0 <= value <= 1 for line in at_ends for name, value in line.items() if name.endswith("dormant_fraction"))
    assert all(value >= 1 for line in at_ends for name, value in line.items() if name.endswith("effective_rank"))


def test_what_methods_cost_is_tracked_from_the_second_stage_on(tracked):
    run_dir, _ = tracked
    updates = [line for line in metrics(run_dir) if "meta_train/return_pre" in line]
    keys = {"stability/ewc/loss", "stability/replay/loss", "stability/replay/kl"}
    assert [keys <= line.keys() for line in updates] == [False, False, True, True]
    assert not any(name.startswith("stability/") for line in updates[:2] for name in line)
    assert all(updates[3][key] > 0 for key in keys)


def test_tensorboard_shows_the_matrix_of_scores(tracked):
    run_dir, _ = tracked
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    for name in ("continual/score_matrix", "continual/score_matrix_pre"):
        assert [image.step for image in events.Images(name)] == [120, 240]
    assert {"continual/forgetting", "stability/ewc/loss"} <= set(events.Tags()["scalars"])


def test_a_run_of_one_stage_has_no_continual_metrics(tmp_path):
    run = train(config("maml", (0,), [EWC]), run_dir=tmp_path)
    assert not any(name.startswith(("continual/", "plasticity/")) for line in metrics(tmp_path) for name in line)
    assert metrics(tmp_path)[0]["iteration"] == 1 and "continual" not in run.report
    assert run.policy.env_steps == 80 and not (tmp_path / "evaluation" / "continual.json").exists()


# What methods do to training


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory):
    folders = {}
    for agent in AGENTS:
        folders[agent] = tmp_path_factory.mktemp(f"fine-tuned-{agent}")
        train(config(agent, checkpoint_every_iterations=1), run_dir=folders[agent])
    return folders


NOTHING = {"cloning_coef": 0.0, "value_coef": 0.0, "policy_coef": 0.0}


@pytest.mark.parametrize(
    ("agent", "methods"),
    [
        ("maml", [EWC | {"coef": 0.0}]),
        ("rl2", [EWC | {"coef": 0.0}, MAS | {"coef": 0.0}, {"name": "l2", "coef": 0.0}]),
        ("maml", [REPLAY | NOTHING]),
        pytest.param("rl2", [REPLAY | NOTHING], marks=slow),
        ("maml", [MER | NOTHING | {"within": 1.0, "across": 1.0}]),
    ],
)
def test_without_a_coefficient_methods_are_fine_tuning_bit_for_bit(tmp_path, fine_tuned, agent, methods):
    train(config(agent, stability=methods), run_dir=tmp_path)
    assert metrics(tmp_path, "stability/") == metrics(fine_tuned[agent])
    assert equal(load_latest(tmp_path / "checkpoints").state, load_latest(fine_tuned[agent] / "checkpoints").state)


@pytest.mark.parametrize(
    ("agent", "method"),
    [
        ("maml", EWC | {"coef": 1.0}),
        ("rl2", EWC | {"coef": 1.0}),
        pytest.param("maml", EWC | {"anchors": "online", "decay": 0.9}, marks=slow),
        pytest.param("rl2", MAS, marks=slow),
        pytest.param("maml", {"name": "l2"}, marks=slow),
        ("maml", REPLAY),
        ("rl2", REPLAY),
        pytest.param("maml", REPLAY | {"cloning_coef": 0.0, "policy_coef": 1.0, "min_sample_size": 0.0}, marks=slow),
    ],
)
def test_methods_change_training_from_the_second_stage_on(tmp_path, fine_tuned, agent, method):
    train(config(agent, stability=[method], checkpoint_every_iterations=1), run_dir=tmp_path)
    for iteration in (1, 2):
        assert equal(agent_at(tmp_path, iteration), agent_at(fine_tuned[agent], iteration))
    for iteration in (3, 4):
        assert not equal(agent_at(tmp_path, iteration), agent_at(fine_tuned[agent], iteration))
    ours, theirs = metrics(tmp_path), metrics(fine_tuned[agent])
    first = [line for line in theirs if line["stage"] == 0]
    assert ours[: len(first)] == first and ours[-1] != theirs[-1]


def test_mer_changes_training_from_the_beginning(tmp_path, fine_tuned):
    train(config("maml", stability=[MER], checkpoint_every_iterations=1), run_dir=tmp_path)
    ours, theirs = agent_at(tmp_path, 1)["policy.weight_0"], agent_at(fine_tuned["maml"], 1)["policy.weight_0"]
    assert not torch.equal(ours, theirs)


@each_agent
def test_a_strong_penalty_holds_the_policy_where_it_was(tmp_path, fine_tuned, agent):
    """L2 is as good as a frozen policy; the rest goes on."""
    train(config(agent, stability=[{"name": "l2", "coef": 1e4}], checkpoint_every_iterations=1), run_dir=tmp_path)

    def moved(run_dir):
        before, after = agent_at(run_dir, 2), agent_at(run_dir, 4)
        return max(float((after[name] - before[name]).abs().max()) for name in after if name.startswith("policy."))

    assert moved(tmp_path) < 0.7 * moved(fine_tuned[agent])


@each_agent
def test_more_evaluations_train_identically(tmp_path, agent):
    for name, every in (("often", 1), ("never", 0)):
        settings = config(agent, stability=[EWC, REPLAY], evaluation={"num_tasks": 2, "every_iterations": every})
        train(settings, run_dir=tmp_path / name)
    assert equal(states(tmp_path / "often"), states(tmp_path / "never"))
    updates = [[line for line in metrics(tmp_path / name) if "train/loss" in line] for name in ("often", "never")]
    assert updates[0] == updates[1]


# Stopping and resuming


@pytest.mark.parametrize(
    ("agent", "methods"),
    [
        ("maml", [EWC, REPLAY]),
        ("rl2", [EWC, REPLAY]),
        ("maml", [MER]),
        pytest.param("rl2", [MER], marks=slow),
        pytest.param("maml", [MAS, {"name": "l2"}], marks=slow),
        pytest.param("rl2", [MAS, {"name": "l2"}], marks=slow),
        pytest.param("rl2", [], marks=slow),
    ],
)
def test_stopping_and_resuming_equals_never_having_stopped(tmp_path, agent, methods):
    """In the middle of the second of three stages."""
    settings = config(agent, (0, 1, 2), methods, iterations=2, seed=4)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(settings, run_dir=whole).finished
    run = train(settings, run_dir=parts, max_iterations=3)
    assert not run.finished and (run.report is None or "continual" in run.report)
    resumed = train(settings, run_dir=parts, resume=True)
    assert resumed.finished
    assert_same_run(parts, whole)
    assert (whole / "evaluation" / "continual.json").read_text() == (
        parts / "evaluation" / "continual.json"
    ).read_text()


@pytest.mark.parametrize(
    ("agent", "methods", "stop"),
    [
        ("maml", [EWC], 1),
        ("rl2", [MAS], 1),
        ("maml", [{"name": "l2"}], 1),
        ("rl2", [REPLAY], 1),
        ("maml", [EWC, REPLAY], 2),
        pytest.param("rl2", [MER], 2, marks=slow),
    ],
)
def test_a_run_is_resumed_before_its_methods_have_much_to_remember(tmp_path, agent, methods, stop):
    """In the first stage, where penalties have nothing at all, and right at its end."""
    settings = config(agent, stability=methods)
    train(settings, run_dir=tmp_path / "whole")
    train(settings, run_dir=tmp_path / "parts", max_iterations=stop)
    train(settings, run_dir=tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_crash_after_consolidating_consolidates_once(tmp_path):
    """The evaluation at the stage's end is the last that is heard of the run: the stage's end is gone through again."""

    def crash(position, scalars):
        if position.iteration == 2 and "continual/forgetting" in scalars:
            raise KeyboardInterrupt

    settings = config("maml", stability=[EWC, REPLAY])
    train(settings, run_dir=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(settings, run_dir=tmp_path / "parts", progress=crash)
    train(settings, run_dir=tmp_path / "parts", resume=True)
    assert equal(states(tmp_path / "parts"), states(tmp_path / "whole"))
    assert metrics(tmp_path / "parts")[-1] == metrics(tmp_path / "whole")[-1]


def test_a_run_stopped_before_its_first_iteration_is_evaluated_once_before_training(tmp_path):
    answers = iter([False, True])
    run = train(config("maml"), run_dir=tmp_path / "parts", should_stop=lambda: next(answers))
    assert not run.finished
    train(config("maml"), run_dir=tmp_path / "parts", resume=True)
    train(config("maml"), run_dir=tmp_path / "whole")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_run_whose_metrics_are_damaged_is_not_resumed_with_an_account_that_lacks_some(tmp_path):
    train(config("maml"), run_dir=tmp_path, max_iterations=1)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"stage"', b"'stage'", 1))
    with pytest.raises(UserError, match=r"metrics.jsonl:1: damaged, "):
        train(config("maml"), run_dir=tmp_path, resume=True)
    path.write_bytes(whole)
    train(config("maml"), run_dir=tmp_path / "whole")
    assert train(config("maml"), run_dir=tmp_path, resume=True).finished
    assert metrics(tmp_path) == metrics(tmp_path / "whole")


def test_a_run_without_what_its_methods_knew_is_not_resumed(tmp_path):
    """Nothing that was to be guarded may be forgotten without a word."""
    train(config("maml", stability=[EWC]), run_dir=tmp_path, max_iterations=3)
    newest = load_latest(tmp_path / "checkpoints").path
    for path in (tmp_path / "checkpoints").iterdir():
        if path != newest:
            (path / "manifest.json").unlink()
    (newest / "stability.safetensors").unlink()
    with pytest.raises(UserError, match=r"stability\.safetensors"):
        train(config("maml", stability=[EWC]), run_dir=tmp_path, resume=True)


# Controls


def spied(monkeypatch, settings, run_dir, **more):
    """Train; returns for each collection of training its tasks' classes and the agent's state before it."""
    calls, collect = [], metarl.training.loop.adapt_and_collect

    def spy(envs, agent, tasks, *args):
        state = {name: value.clone() for name, value in agent.state_dict().items()}
        calls.append((sorted(task.name for task in tasks), state))
        return collect(envs, agent, tasks, *args)

    with monkeypatch.context() as patch:
        patch.setattr(metarl.training.loop, "adapt_and_collect", spy)
        train(settings, run_dir=run_dir, **more)
    return calls


def test_without_a_control_each_stage_has_its_own_tasks(tmp_path, monkeypatch):
    calls = spied(monkeypatch, config("maml"), tmp_path)
    # 2 iterations and the stage's end, twice
    assert [names for names, _ in calls] == 3 * [["wedge-0"] * 2] + 3 * [["wedge-1"] * 2]


@each_agent
def test_joint_training_has_tasks_of_all_stages_in_every_iteration(tmp_path, monkeypatch, agent):
    calls = spied(monkeypatch, config(agent, control="joint", num_tasks=4), tmp_path)
    assert [names for names, _ in calls] == 6 * [["wedge-0"] * 2 + ["wedge-1"] * 2]
    lines = [line for line in metrics(tmp_path) if "meta_train/return_pre" in line]
    assert [line["stage"] for line in lines] == [0, 0, 1, 1]
    assert "continual/forgetting" in metrics(tmp_path)[-1]


@each_agent
def test_from_scratch_each_stage_begins_with_a_new_agent(tmp_path, monkeypatch, agent):
    calls = spied(monkeypatch, config(agent, control="scratch"), tmp_path)
    (_, first), (_, later), (_, second) = calls[0], calls[1], calls[3]
    assert equal(first, second) and not equal(first, later)
    assert not equal(calls[4][1], second)


@pytest.mark.parametrize(
    ("agent", "control", "stop"),
    [
        ("maml", "scratch", 3),
        ("maml", "joint", 3),
        pytest.param("maml", "scratch", 2, marks=slow),
        pytest.param("rl2", "scratch", 3, marks=slow),
    ],
)
def test_a_control_is_resumed_where_it_stopped(tmp_path, agent, control, stop):
    settings = config(agent, control=control)
    train(settings, run_dir=tmp_path / "whole")
    train(settings, run_dir=tmp_path / "parts", max_iterations=stop)
    train(settings, run_dir=tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_run_stopped_between_stages_keeps_the_agent_that_it_has_trained(tmp_path):
    """The next stage begins anew, but is not begun: the score of the checkpoint is that of the agent in it."""
    settings = config("maml", control="scratch")
    stopped = train(settings, run_dir=tmp_path / "stopped", max_iterations=2)
    on = train(settings, run_dir=tmp_path / "on", max_iterations=3)
    assert load_latest(tmp_path / "stopped" / "checkpoints").position.stage == 1
    assert equal(agent_at(stopped.run_dir, 2), agent_at(on.run_dir, 2))
    assert equal(stopped.policy.agent.state_dict(), agent_at(on.run_dir, 2))


# Stages that come again


def evaluations(monkeypatch, settings, distribution=None, **where):
    """Train; returns which tasks were evaluated, in order."""
    found, evaluate = [], metarl.training.stage_evaluation.evaluate_agent

    def spy(agent, envs, tasks, *args, **kwargs):
        found.append(tasks)
        return evaluate(agent, envs, tasks, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(metarl.training.stage_evaluation, "evaluate_agent", spy)
        train(settings, distribution, **where)
    return found


def test_tasks_that_come_again_are_evaluated_once_with_equal_scores(tmp_path, monkeypatch):
    found = evaluations(monkeypatch, config("maml", (0, 1, 0), iterations=1), run_dir=tmp_path)
    assert len(found) == 4 * 2  # before training and after each stage; two kinds of tasks
    lines = [line for line in metrics(tmp_path) if "continual/score/wedge 0" in line]
    for line in lines:
        assert line["continual/score/wedge 0"] == line["continual/score/wedge 0 (2)"]
        assert line["continual/score/wedge 0"] != line["continual/score/wedge 1"]
    matrix = np.array(json.loads((tmp_path / "evaluation" / "continual.json").read_text())["scores_post"])
    assert matrix.shape == (4, 3) and (matrix[:, 0] == matrix[:, 2]).all()


def test_tasks_that_come_again_with_another_stage_id_are_others(tmp_path, monkeypatch):
    found = evaluations(monkeypatch, config("maml", (0, 1, 0), iterations=1, stage_id="input"), run_dir=tmp_path)
    assert [dict(tasks[0].options)["stage"] for tasks in found] == 4 * [0, 1, 2]
    last = metrics(tmp_path)[-1]
    assert last["continual/score/wedge 0"] != last["continual/score/wedge 0 (2)"]


# Custom methods and tasks


class Pull:
    """½ · 2 ‖θ − θ*‖² of the policy, for each stage that has ended: what a user would write."""

    name = "l2"

    def __init__(self):
        self.ends = []

    def loss(self, agent, rng, fraction):
        params = agent.parameters()
        squares = [(params[name] - end[name]).square().sum() for end in self.ends for name in sorted(end)]
        return {"loss": sum(squares)} if squares else {}

    def observe(self, agent, rollouts, before, rng):
        pass

    def end_stage(self, agent, rollouts, rng):
        policy = {name: value for name, value in agent.parameters().items() if name.startswith("policy.")}
        self.ends.append({name: value.detach().clone() for name, value in policy.items()})

    def state_dict(self):
        return {f"{i}/{name}": value for i, end in enumerate(self.ends) for name, value in end.items()}

    def load_state_dict(self, state):
        ends = {}
        for key, value in state.items():
            number, _, name = key.partition("/")
            ends.setdefault(int(number), {})[name] = value
        self.ends = [ends[number] for number in sorted(ends)]


@each_agent
def test_a_method_of_one_s_own_does_what_the_built_in_one_does(tmp_path, agent):
    train(config(agent), methods=[Pull()], run_dir=tmp_path / "own")
    train(config(agent, stability=[L2Config(coef=2.0)]), run_dir=tmp_path / "built-in")
    ours, theirs = (load_latest(tmp_path / name / "checkpoints").state for name in ("own", "built-in"))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6, msg=name)
    train(config(agent), run_dir=tmp_path / "none")
    assert not equal(ours, load_latest(tmp_path / "none" / "checkpoints").state)
    found, expected = (metrics(tmp_path / name)[-2] for name in ("own", "built-in"))
    key = "stability/l2/loss"
    assert found[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-9) and expected[key] > 0


def test_a_method_of_one_s_own_is_resumed(tmp_path):
    settings = config("maml", (0, 1, 2), iterations=2)
    train(settings, methods=[Pull()], run_dir=tmp_path / "whole")
    train(settings, methods=[Pull()], run_dir=tmp_path / "parts", max_iterations=3)
    train(settings, methods=[Pull()], run_dir=tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


class Line(gymnasium.Env):
    """A point on a line that is paid for going one way."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,))
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))

    def __init__(self, task, pay):
        self.pay = pay

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), self.pay, False, False, {}


def pay_1(task):
    return Line(task, 1.0)


def pay_2(task):
    return Line(task, 2.0)


def custom(name, make):
    return metarl.envs.custom(name, make, num_train=4, num_test=2, horizon=3)


CUSTOM = [{"name": name, "tasks": {"family": "custom"}, "iterations": 1} for name in ("first", "second")]


@pytest.mark.parametrize(
    ("names", "control"), [(("one", "two"), "none"), (("one", "two"), "joint"), (("same", "same"), "none")]
)
def test_each_stage_may_have_a_distribution_of_its_own(tmp_path, names, control):
    """3 steps pay 1 each in the first, 2 in the second, also where both families have one name, or it is refused."""
    distributions = [custom(name, make) for name, make in zip(names, (pay_1, pay_2), strict=True)]
    settings = config("maml", CUSTOM, control=control)
    try:
        train(settings, distributions, run_dir=tmp_path)
    except UserError as error:
        assert names == ("same", "same") and "same" in str(error)
        return
    lines = metrics(tmp_path)
    keys = "continual/score/first", "continual/score/second"
    scores = [tuple(line[key] for key in keys) for line in lines if keys[0] in line]
    assert set(scores) == {(3.0, 6.0)}
    returns = [line["meta_train/return_post"] for line in lines if "meta_train/return_post" in line]
    assert returns == ([4.5, 4.5] if control == "joint" else [3.0, 6.0])


def test_distributions_are_told_apart_whatever_the_config_names(tmp_path):
    """The config's tasks are the default ones, twice."""
    stages = [{"name": name, "iterations": 1} for name in ("first", "second")]
    train(config("maml", stages), [custom("one", pay_1), custom("two", pay_2)], run_dir=tmp_path)
    last = metrics(tmp_path)[-1]
    assert (last["continual/score/first"], last["continual/score/second"]) == (3.0, 6.0)


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_distributions_than_stages_is_refused(tmp_path, count):
    with pytest.raises(UserError, match=f"{count} distributions for 2 stages; give one for each, or one for all"):
        train(config("maml", CUSTOM), [custom("one", pay_1)] * count, run_dir=tmp_path)
    assert not (tmp_path / "config.yaml").exists()


# Settings


def test_a_method_named_twice_is_refused():
    with pytest.raises(UserError, match="stability names ewc twice; name each method once"):
        as_config(config("maml", stability=["ewc", {"name": "ewc", "coef": 2.0}]))


def test_methods_are_given_by_flags():
    flags = ["--stability", "ewc", "replay", "--stability.0.coef", "3", "--stability.1.capacity", "7"]
    first, second = load_config("navigation_maml_ppo", flags).stability
    assert (first.name, first.coef, first.fisher_states) == ("ewc", 3.0, 2560)
    assert (second.name, second.capacity) == ("replay", 7)
    (only,) = load_config("navigation_maml_ppo", ["--stability", "mer"]).stability
    assert only.name == "mer"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--stability ewx", "ewx.*did you mean 'ewc'"),
        ("--stability ewc --stability.1.coef 3", r"there is no stability\.1; the list has 1 item"),
        ("--stability ewc ewc", "twice"),
        ("--stability ewc --stability.0.decay 0.5", "only online anchors decay"),
        ("--stability replay --stability.0.share 1", "less than 1"),
    ],
)
def test_a_method_that_is_none_is_told(flags, message):
    with pytest.raises(UserError, match=message):
        load_config("navigation_maml_ppo", flags.split())


class Listening:
    """A stability method that draws from every stream that it is given."""

    name = "listening"

    def __init__(self):
        self.drawn = []

    def loss(self, agent, rng, fraction):
        self.drawn.append(("loss", rng.random()))
        return {}

    def observe(self, agent, rollouts, before, rng):
        self.drawn.append(("observe", rng.random()))

    def end_stage(self, agent, rollouts, rng):
        self.drawn.append(("end_stage", rng.random()))

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert not state


def test_each_use_of_randomness_has_a_stream_of_its_own(tmp_path):
    methods = [Listening(), Listening()]
    train(config("maml"), methods=methods, run_dir=tmp_path)
    values = [value for method in methods for _, value in method.drawn]
    assert {use for use, _ in methods[0].drawn} == {"loss", "observe", "end_stage"}
    assert len(set(values)) == len(values)


def test_held_out_tasks_are_not_chosen_by_what_chooses_training_tasks(tmp_path, monkeypatch):
    """As many tasks of either kind, from which as many are drawn: the same stream would draw the same numbers."""
    original, chosen = metarl.envs.manager.EnvManager.sample, []

    def sample(manager, count, rng, *rest):
        found = original(manager, count, rng, *rest)
        chosen.append([task.index for task in found])
        return found

    monkeypatch.setattr(metarl.envs.manager.EnvManager, "sample", sample)
    stage = {"tasks": {"family": "navigation", "horizon": 5, "num_train": 50, "num_test": 50}, "iterations": 2}
    settings = config("maml", [stage]) | {"num_tasks": 8, "evaluation": {"num_tasks": 8, "every_iterations": 0}}
    train(settings, run_dir=tmp_path)
    assert len(chosen) >= 3
    assert len({tuple(indices) for indices in chosen}) == len(chosen)
