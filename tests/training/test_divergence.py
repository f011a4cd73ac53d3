"""Numbers that are not finite: an iteration is undone and counted; after three in a row a run stops as it was saved."""

import gc
import json
import weakref

import gymnasium
import numpy as np
import pytest
import torch

import metarl
import metarl.training.loop
import metarl.training.stage_evaluation
from metarl.errors import RunError
from metarl.runs.checkpoint import load_latest
from metarl.runs.divergence import tensor_stats
from metarl.runs.tracking import read_metrics
from metarl.training.loop import train

MAML = {"name": "maml_ppo", "hidden_sizes": [8], "outer": {"epochs": 2}}
RL2 = {"name": "rl2", "memory": {"size": 8}, "encoder_sizes": [8], "epochs": 2, "minibatches": 2}
each_agent = pytest.mark.parametrize("agent", [MAML, RL2], ids=["maml_ppo", "rl2"])


def config(agent=MAML, iterations=4, stages=1, **settings):
    tasks = {"family": "navigation", "name": "rotated_wedges", "horizon": 5}
    stage = [{"name": f"{i}", "tasks": {**tasks, "wedges": [i]}, "iterations": iterations} for i in range(stages)]
    small = {"num_tasks": 2, "rollouts_per_task": 2, "num_workers": 0, "device": "cpu", "stages": stage, "agent": agent}
    return {
        **small,
        "evaluation": {"num_tasks": 2, "every_iterations": 0},
        "checkpoint_every_iterations": 1,
        **settings,
    }


class Poison:
    """A stability method whose loss is NaN in some iterations, and whose end of a stage fails some times."""

    name = "poison"

    def __init__(self, iterations=(), ends=0, value=float("nan")):
        self.iterations, self.ends, self.value = set(iterations), ends, value
        self.iteration, self.consolidated, self.asked = 1, 0, []

    def loss(self, agent, rng, fraction):
        theta = agent.parameters()[
            "policy.log_std" if "policy.log_std" in agent.parameters() else "policy.head.log_std"
        ]
        return {"loss": theta.sum() * self.value} if self.iteration in self.iterations else {}

    def observe(self, agent, rollouts, before, rng):
        self.iteration += 1

    def end_stage(self, agent, rollouts, rng):
        self.asked.append((float(rollouts[0].rewards.sum()), rng.random()))
        if self.ends:
            self.ends -= 1
            raise FloatingPointError("the importance of parameters is not finite")
        self.consolidated += 1

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def tracked(run_dir, name):
    return [line[name] for line in read_metrics(run_dir) if name in line]


def agent_at(run_dir, iteration):
    return metarl.runs.checkpoint.load(run_dir / "checkpoints" / f"{iteration:06d}").state


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@each_agent
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_iteration_whose_loss_is_not_finite_changes_nothing_and_is_counted(tmp_path, agent, value):
    class Once(Poison):
        def loss(self, agent, rng, fraction):
            found = super().loss(agent, rng, fraction)
            self.iterations.discard(self.iteration)  # the next iteration is a sound one again
            return found

    run = train(config(agent, keep_checkpoints=9), methods=[Once({2}, value=value)], run_dir=tmp_path)
    assert run.finished
    assert tracked(tmp_path, "train/skipped_updates") == [0, 1, 0, 0]
    assert "train/loss" not in read_metrics(tmp_path)[1] and "meta_train/return_post" in read_metrics(tmp_path)[1]
    assert_equal(agent_at(tmp_path, 4), load_latest(tmp_path / "checkpoints").state)
    assert not (tmp_path / "diverged.json").exists()
    untouched = train(config(agent, keep_checkpoints=9), methods=[Poison()], run_dir=tmp_path / "sound")
    assert_equal(agent_at(tmp_path, 1), agent_at(untouched.run_dir, 1))
    # Undone iteration 2 is not kept as a checkpoint; iteration 3 learned from where iteration 1 had been.
    assert not (tmp_path / "checkpoints" / "000002").exists()
    assert not torch.equal(agent_at(tmp_path, 3)["iteration"], agent_at(untouched.run_dir, 3)["iteration"])


@each_agent
def test_what_an_undone_iteration_computed_is_let_go_at_once(tmp_path, monkeypatch, agent):
    """On a GPU it may take much of the memory, and the next iteration needs as much; nobody collects garbage there."""
    collect, held, alive = metarl.training.loop.adapt_and_collect, [], []

    def watched(*args):
        alive.append(sum(tensor() is not None for tensor in held))
        rollouts = collect(*args)
        held.extend(weakref.ref(rollout.rewards) for rollout in rollouts)
        return rollouts

    class Once(Poison):
        def loss(self, agent, rng, fraction):
            found = super().loss(agent, rng, fraction)
            if found:
                held.append(weakref.ref(found["loss"]))
                self.iterations.clear()  # the next iteration is a sound one again
            return found

    monkeypatch.setattr(metarl.training.loop, "adapt_and_collect", watched)
    gc.disable()
    try:
        train(config(agent), methods=[Once({2})], run_dir=tmp_path)
    finally:
        gc.enable()
    assert tracked(tmp_path, "train/skipped_updates") == [0, 1, 0, 0]
    assert alive == [0, 0, 0, 0]


@each_agent
def test_three_in_a_row_stop_the_run_at_its_last_checkpoint_with_the_statistics(tmp_path, agent):
    with pytest.raises(
        RunError, match=r"iteration 5: .*not finite.*3 times in a row.*diverged\.json.*--resume"
    ) as error:
        train(config(agent, iterations=9), methods=[Poison({3})], run_dir=tmp_path)
    assert "\n" not in str(error.value)
    checkpoint = load_latest(tmp_path / "checkpoints")
    assert checkpoint.position.iteration == 2 and checkpoint.position.skipped == 0
    assert tracked(tmp_path, "train/skipped_updates") == [0, 0, 1, 1, 1]
    statistics = json.loads((tmp_path / "diverged.json").read_text())
    assert statistics["position"]["iteration"] == 5 and "not finite" in statistics["error"]
    rollout = statistics["rollouts"][0]
    assert rollout["observations"]["count"] == 2 * rollout["env_steps"] > 0
    assert {"min", "max", "mean", "std", "count", "not_finite"} == rollout["rewards"].keys()
    assert len(rollout["tasks"]) == 2 and all(task["dropped_rollouts"] == 0 for task in rollout["tasks"])
    assert all(each["not_finite"] == 0 for each in statistics["parameters"].values())
    assert any(each["not_finite"] for each in statistics["gradients"].values())
    healed = train(config(agent, iterations=9), methods=[Poison()], run_dir=tmp_path, resume=True)
    assert healed.finished
    assert [line["iteration"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 9]
    assert sum(tracked(tmp_path, "train/skipped_updates")) == 0


def test_a_run_that_is_stopped_among_bad_iterations_goes_on_counting(tmp_path):
    """Two before the stop and one after it are three in a row."""
    train(config(iterations=9), methods=[Poison({3})], run_dir=tmp_path, max_iterations=4)
    assert load_latest(tmp_path / "checkpoints").position.skipped == 2
    with pytest.raises(RunError, match="iteration 5"):
        train(config(iterations=9), methods=[Poison({1})], run_dir=tmp_path, resume=True)


def test_what_the_update_leaves_is_looked_at_too(tmp_path):
    """A value network that runs away does so without a word of the policy's loss."""
    agent = {**MAML, "critic": "learned", "value_lr": 1e35}
    with pytest.raises(RunError, match=r"the update made .*value\..*NaN or infinite"):
        train(config(agent, iterations=9), run_dir=tmp_path)
    assert all(bool(value.isfinite().all()) for value in load_latest(tmp_path / "checkpoints").state.values())


def test_a_fisher_that_is_not_finite_is_measured_again_on_other_rollouts(tmp_path, caplog):
    method, other = Poison(ends=2), Poison()
    run = train(config(iterations=1, stages=2), methods=[method, other], run_dir=tmp_path)
    assert run.finished and method.consolidated == 1 and other.consolidated == 1  # each once
    assert len(method.asked) == 3 and all(len(set(part)) == 3 for part in zip(*method.asked, strict=True))
    assert caplog.text.count("the end of stage 0 failed and is tried again: the importance of parameters") == 2
    sound = train(config(iterations=1, stages=2), methods=[Poison()], run_dir=tmp_path / "sound")
    assert run.policy.env_steps == sound.policy.env_steps + 2 * 40  # those of the other rollouts count


def test_a_fisher_that_stays_so_stops_the_run(tmp_path):
    with pytest.raises(RunError, match=r"importance of parameters.*3 times in a row"):
        train(config(iterations=2, stages=2), methods=[Poison(ends=3)], run_dir=tmp_path)
    assert load_latest(tmp_path / "checkpoints").position.iteration == 2
    assert json.loads((tmp_path / "diverged.json").read_text())["rollouts"]
    healed = train(config(iterations=2, stages=2), methods=[Poison()], run_dir=tmp_path, resume=True)
    assert healed.finished


@pytest.mark.parametrize("failures", [2, 3])
def test_activations_that_are_not_finite_are_measured_again_and_never_end_in_a_traceback(
    tmp_path, monkeypatch, caplog, failures
):
    original, calls = metarl.training.loop.network_use, []

    def measure(*args):
        calls.append(args)
        if len(calls) <= failures:
            raise ValueError("activations hold NaN or infinity")
        return original(*args)

    monkeypatch.setattr(metarl.training.loop, "network_use", measure)
    if failures < 3:
        assert train(config(iterations=1, stages=2), run_dir=tmp_path).finished
        assert caplog.text.count("the end of stage 0 failed and is tried again: activations hold NaN") == 2
        return
    with pytest.raises(RunError, match=r"activations hold NaN.*3 times in a row"):
        train(config(iterations=1, stages=2), run_dir=tmp_path)
    assert load_latest(tmp_path / "checkpoints").position.iteration == 1


class Broken(gymnasium.Env):
    """Observations of every task but the first are NaN after the second step of some episodes."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gymnasium.spaces.Box(-1, 1, (2,))
    episodes, broken = 0, range(0)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        Broken.episodes += 1
        self.mine, self.t = Broken.episodes, 0
        return np.zeros(2), {}

    def step(self, action):
        self.t += 1
        bad = self.mine in Broken.broken and self.t == 2
        return np.full(2, np.nan if bad else self.t), -float(np.square(action).sum()), False, False, {}


@pytest.fixture
def broken_tasks():
    Broken.episodes = 0
    yield metarl.envs.custom("broken", lambda task: Broken(), num_train=4, num_test=2, horizon=4)
    Broken.broken = range(0)


def custom(**settings):
    return {**config(**settings), "stages": [{"tasks": {"family": "custom"}, "iterations": 4}]}


def test_broken_episodes_are_left_out_and_counted(tmp_path, broken_tasks):
    """8 episodes an iteration: 2 tasks · 2 rollouts · 2 phases."""
    Broken.broken = range(9, 11)
    assert train(custom(), broken_tasks, run_dir=tmp_path).finished
    assert tracked(tmp_path, "train/dropped_episodes") == [0, 2, 0, 0]
    assert tracked(tmp_path, "train/skipped_updates") == [0, 0, 0, 0]


def test_an_iteration_of_which_most_episodes_break_comes_to_nothing(tmp_path, broken_tasks):
    Broken.broken = range(9, 12)
    assert train(custom(), broken_tasks, run_dir=tmp_path).finished
    assert tracked(tmp_path, "train/skipped_updates") == [0, 1, 0, 0]
    assert tracked(tmp_path, "train/dropped_episodes") == [0, 3, 0, 0]
    lines = read_metrics(tmp_path)
    assert "meta_train/return_post" not in lines[1]
    assert lines[1]["env_steps"] - lines[0]["env_steps"] == 4  # the one whole episode


def test_a_broken_environment_stops_the_run_with_its_statistics(tmp_path, broken_tasks):
    Broken.broken = range(9, 10**6)
    with pytest.raises(RunError, match=r"4 of 4 rollouts had a NaN.*3 times in a row"):
        train(custom(), broken_tasks, run_dir=tmp_path)
    (rollout,) = json.loads((tmp_path / "diverged.json").read_text())["rollouts"]
    assert [task["dropped_rollouts"] for task in rollout["tasks"]] == [2, 2]
    assert load_latest(tmp_path / "checkpoints").position.iteration == 1


def test_what_is_known_at_a_stages_end_is_tracked_though_its_evaluation_breaks(tmp_path, monkeypatch):
    evaluate = metarl.training.stage_evaluation.evaluate_agent

    def broken(*args, env_steps, **kwargs):
        if env_steps:
            raise FloatingPointError("8 of 8 rollouts")
        return evaluate(*args, env_steps=env_steps, **kwargs)

    monkeypatch.setattr(metarl.training.stage_evaluation, "evaluate_agent", broken)
    assert train(config(iterations=1, stages=2), run_dir=tmp_path).finished
    lines = [line for line in read_metrics(tmp_path) if any(name.startswith("plasticity/") for name in line)]
    assert [line["iteration"] for line in lines] == [1, 2]


def test_figures_of_a_tensor_leave_out_what_is_not_finite():
    assert tensor_stats(torch.tensor([1.0, float("nan"), 3.0, float("inf")])) == {
        "count": 4,
        "not_finite": 2,
        "min": 1.0,
        "max": 3.0,
        "mean": 2.0,
        "std": 1.0,
    }
    assert tensor_stats(torch.tensor([float("nan")])) == {"count": 1, "not_finite": 1}
    assert tensor_stats(torch.zeros(0)) == {"count": 0, "not_finite": 0}
