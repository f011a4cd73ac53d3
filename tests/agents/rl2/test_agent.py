"""RL²: its memory through a trial, its gradients against a loop of steps, saving, and a task that needs a memory."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from metarl.agents.rl2.agent import Rl2, Rl2Config
from metarl.agents.rl2.networks import (
    EpisodicConfig,
    GruConfig,
    LearnedCriticConfig,
    LinearCriticConfig,
    LstmConfig,
    PolicyHead,
    TransformerConfig,
)
from metarl.agents.rl2.trials import read_trials
from metarl.collect import collect
from metarl.envs import custom
from metarl.errors import UserError
from metarl.nn.distributions import GaussianHead
from metarl.nn.memory import History, rows
from metarl.seeding import children
from metarl.spaces import Spaces
from metarl.types import Step, TimeStep
from tests.agents.rollouts import assert_same, snapshot
from tests.agents.specs import spec

CPU = torch.device("cpu")

MEMORIES = {
    "gru": GruConfig(size=16),
    "lstm": LstmConfig(size=16),
    "transformer": TransformerConfig(size=16, layers=1, heads=2, context=16),
    "episodic": EpisodicConfig(size=16, heads=2, context=16),
}
every_memory = pytest.mark.parametrize("memory", MEMORIES)


def make_agent(memory="gru", observations=2, actions=2, seed=0, **changes):
    settings = {"encoder_sizes": (16,), "critic": LearnedCriticConfig(sizes=(16,)), "epochs": 2, "minibatches": 2}
    return Rl2(Rl2Config(memory=MEMORIES[memory], **settings | changes), spec(observations, actions, CPU, seed))


class Points:
    """A point on the plane that should be at the task's place; an episode ends by itself after 1 to 8 steps."""

    lanes, max_envs = 1, 100
    spaces = Spaces.within_one(2, 2)

    def reset(self, tasks, seeds):
        streams = [np.random.default_rng(seed) for seed in seeds]
        self.points = np.stack([stream.normal(size=2) for stream in streams])
        self.lengths = np.array([stream.integers(1, 9) for stream in streams])
        self.places = np.array([[np.sin(task.index), np.cos(task.index)] for task in tasks])
        self.elapsed = np.zeros(len(tasks), np.int64)
        return self.points.copy()

    def step_async(self, rows, actions, active):
        self.points = self.points + np.where(active[:, None], 0.3 * np.clip(actions, -1.0, 1.0), 0.0)
        self.elapsed = self.elapsed + active

    def step_wait(self, rows):
        rewards = -np.abs(self.points - self.places).sum(-1)
        return Step(
            self.points, rewards, self.elapsed == self.lengths, self.elapsed == 6, (rewards > -0.5).astype(float)
        )


POINTS = custom("points", None, num_train=4, num_test=1, horizon=6).train_tasks


def rollout_of(agent, seed=0, rollouts=3, tasks=POINTS, envs=None, state=None):
    state = agent.initial_state(len(tasks)) if state is None else state
    return collect(envs or Points(), agent, state, tasks, rollouts, children(np.random.SeedSequence(seed), len(tasks)))


def learned(memory="gru", **changes):
    """An agent that has learned once, so that its inputs are normalised, and whose actions depend on its memory."""
    agent = make_agent(memory, **changes)
    strengthen(agent)
    agent.update((), [rollout_of(agent, seed=99)])
    return agent


def strengthen(agent):
    with torch.no_grad():
        agent.policy.head.mean[0].weight.mul_(50.0)


def known(state):
    """What a state holds, row by row."""
    held = {"time": state.time, **{f"previous.{name}": part for name, part in state.previous._asdict().items()}}
    for number, part in enumerate(state.memory):
        if isinstance(part, History):
            for row, length in enumerate(part.lengths.tolist()):
                held[f"keys.{number}.{row}"] = part.keys[row, max(0, length - part.context) : length]
                held[f"values.{number}.{row}"] = part.values[row, max(0, length - part.context) : length]
        else:
            held[f"hidden.{number}"] = part
    return {name: part.clone() for name, part in held.items()}


class Altered:
    """An agent that acts without noise, optionally without memory of earlier episodes; keeps its last state."""

    device = CPU
    trial_episodes = 2

    def __init__(self, agent, forget=False):
        self.agent, self.forget, self.noise_size = agent, forget, agent.noise_size

    def act(self, time_step, noise, state):
        if self.forget and time_step.episode_start.all():
            state = self.agent.initial_state(time_step.rewards.numel())
            time_step = time_step._replace(rewards=0.0 * time_step.rewards)
        actions, log_probs, self.last = self.agent.act(time_step, 0.0 * noise, state)
        return actions, log_probs, self.last


# A task that is solved by remembering

CUE = 0.8


class Cues:
    """A trial of two episodes: the first shows −0.8 or 0.8 and pays nothing, the second shows nothing.

    The cue is seen before the first step alone. The first action of the second episode is paid with 1 − |action − cue|;
    whoever does not remember gets at most 1 − (|a − 0.8| + |a + 0.8|) / 2 ≤ 0.2 on average over both cues.
    """

    lanes, max_envs = 1, 64
    spaces = Spaces.within_one(1, 1)

    def __init__(self, show_cue=True, horizon=6):
        self.show_cue, self.horizon, self.episode = show_cue, horizon, 1

    def reset(self, tasks, seeds):
        self.episode, self.elapsed = 1 - self.episode, 0
        self.cues = np.array([CUE if task.index % 2 else -CUE for task in tasks])
        return (self.cues * (self.show_cue and self.episode == 0))[:, None]

    def step_async(self, rows, actions, active):
        self.actions, self.elapsed = np.clip(actions[:, 0], -1.0, 1.0), self.elapsed + 1

    def step_wait(self, rows):
        pays = (self.episode == 1 and self.elapsed == 1) or not self.show_cue
        rewards = np.where(pays, 1.0 - np.abs(self.actions - self.cues), 0.0)
        never = np.zeros(len(rewards), np.bool_)
        return Step(
            np.zeros((len(rewards), 1)), rewards, never, ~never & (self.elapsed == self.horizon), never * np.nan
        )


def cue_tasks(horizon=6):
    return custom("cues", None, num_train=8, num_test=1, horizon=horizon).train_tasks


def score(agent, tasks, forget=False, show_cue=True):
    """What the second episode pays to an agent that acts without noise."""
    envs = Cues(show_cue, tasks[0].option("horizon"))
    rollout = rollout_of(Altered(agent, forget), 0, 1, tasks, envs, agent.initial_state(len(tasks)))
    return float(rollout.episode_returns()[..., 1].mean())


def train(memory, iterations, show_cue=True, horizon=6, seed=0, **changes):
    settings = {"init_std": 0.5, "lr": 5e-3, "epochs": 4, "max_kl": 0.1} | changes
    agent, tasks, envs = make_agent(memory, 1, 1, seed, **settings), cue_tasks(horizon), Cues(show_cue, horizon)
    for iteration in range(iterations):
        agent.update((), [rollout_of(agent, [seed, iteration], 8, tasks, envs)])
    return agent, tasks


@every_memory
def test_each_memory_recalls_in_the_second_episode_what_the_first_has_shown(memory):
    agent, tasks = train(memory, 20)
    assert score(agent, tasks) > 0.7
    assert score(agent, tasks, forget=True) <= 0.2 + 1e-6


def test_what_the_first_episode_has_paid_decides_the_second():
    """Episodes of one step, in which nothing is seen: the agent reads the first reward when the second episode begins.

    An agent that does not know it gets 0.2 on average, as above.
    """
    agent, tasks = train("gru", 30, show_cue=False, horizon=1)
    assert score(agent, tasks, show_cue=False) > 0.6
    assert score(agent, tasks, forget=True, show_cue=False) <= 0.2 + 1e-6


# The memory of a trial


@every_memory
def test_the_memory_lives_through_a_trial_and_ends_with_it(memory):
    """Two tasks differ in the first observation alone; noise is none. Three trials of each, one after another."""
    agent = make_agent(memory, 1, 1)
    strengthen(agent)
    tasks, envs = cue_tasks()[:2], Cues()
    envs.max_envs = 2
    rollout = rollout_of(Altered(agent), 0, 3, tasks, envs, agent.initial_state(2))
    second = rollout.actions[:, :, 6]  # the first action of the second episode
    assert rollout.observations[:, :, 6].abs().max() == 0
    assert (second[0] - second[1]).abs().min() > 1e-4  # what the first episode has shown
    for trial in (1, 2):
        torch.testing.assert_close(rollout.actions[:, trial], rollout.actions[:, 0], rtol=0, atol=1e-6)
    forgetful = rollout_of(Altered(agent, True), 0, 3, tasks, envs, agent.initial_state(2)).actions[:, :, 6]
    torch.testing.assert_close(forgetful[0], forgetful[1], rtol=0, atol=1e-6)


@every_memory
def test_acting_leaves_the_state_as_it_was(memory):
    agent = learned(memory)
    rollout = rollout_of(agent)
    state = agent.adapt(agent.initial_state(4), rollout)
    previous = known(state)
    first, second = (rollout_of(agent, 5, state=state) for _ in range(2))
    assert_same(vars(first), vars(second), rtol=0, atol=0)
    assert_same(known(state), previous, rtol=0, atol=0)
    assert not torch.allclose(first.actions, rollout_of(agent, 5).actions, atol=1e-3)


@every_memory
def test_a_rollout_that_is_read_leaves_the_state_that_acting_left(memory):
    agent = learned(memory, trial_episodes=3)
    spy = Altered(agent)
    spy.trial_episodes = 3
    rollout = rollout_of(spy, 3, 1, state=agent.initial_state(4))
    lengths = rollout.valid.sum(-1)
    assert lengths.min() < lengths.max()
    assert_same(known(agent.adapt(agent.initial_state(4), rollout)), known(spy.last), rtol=1e-5, atol=1e-5)


def test_several_rollouts_of_a_task_are_read_one_after_another():
    agent = learned("episodic")
    rollout = rollout_of(agent, 3, 2)
    assert (rollout.valid.sum(-1) < rollout.valid.shape[-1]).any()
    after = agent.adapt(agent.initial_state(4), rollout)
    for task in range(4):
        valid = rollout.valid[task].flatten()

        def of_task_alone(part, task=task, valid=valid):
            flat = part[task].flatten(0, 1)
            return (flat[valid] if len(flat) == len(valid) else flat)[None, None]

        steps = rollout.map(of_task_alone)
        alone = agent.adapt(agent.initial_state(1), steps)
        of_task = after._replace(
            memory=rows(after.memory, torch.tensor([task])),
            previous=type(after.previous)(*(part[[task]] for part in after.previous)),
            time=after.time[[task]],
        )
        assert_same(known(of_task), known(alone), rtol=1e-5, atol=1e-5)


def percept_of(tasks, parallel, seed=0, active=None):
    generator = torch.Generator().manual_seed(seed)
    shape = (tasks, parallel)
    active = torch.ones(shape, dtype=torch.bool) if active is None else active
    return TimeStep(
        torch.randn(*shape, 2, generator=generator),
        torch.randn(shape, generator=generator),
        torch.rand(shape, generator=generator) < 0.3,
        active,
    )


@every_memory
def test_a_state_of_tasks_stands_for_all_rollouts_of_each(memory):
    """One state a task and 3 rollouts of each: as if every rollout began with the state of its task."""
    agent = learned(memory)
    state = agent.adapt(agent.initial_state(4), rollout_of(agent))
    time_step, noise = percept_of(4, 3), torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(1))
    actions, log_probs, after = agent.act(time_step, noise, state)
    following, _, _ = agent.act(time_step, noise, after)
    for p in range(3):
        column = TimeStep(*(part[:, p : p + 1] for part in time_step))
        own, own_log_probs, own_after = agent.act(column, noise[:, p : p + 1], state)
        torch.testing.assert_close(actions[:, p : p + 1], own, rtol=0, atol=1e-5)
        torch.testing.assert_close(log_probs[:, p : p + 1], own_log_probs, rtol=0, atol=1e-5)
        again, _, _ = agent.act(column, noise[:, p : p + 1], own_after)
        torch.testing.assert_close(following[:, p : p + 1], again, rtol=0, atol=1e-5)


@every_memory
def test_where_an_episode_has_ended_nothing_is_remembered(memory):
    agent = learned(memory)
    _, _, state = agent.act(percept_of(4, 2), torch.zeros(4, 2, 2), agent.initial_state(4))
    active = torch.tensor([[1, 0], [0, 1], [0, 0], [1, 1]], dtype=torch.bool)
    time_step = percept_of(4, 2, seed=1, active=active)._replace(episode_start=~active)
    _, _, after = agent.act(time_step, torch.ones(4, 2, 2), state)
    was, now = known(state), known(after)
    whole = ("time", "previous", "hidden")
    for row, moves in enumerate(active.flatten().tolist()):
        for name, part in was.items():
            if name.startswith(whole):
                assert torch.equal(part[row], now[name][row]) != moves
            elif name.endswith(f".{row}"):
                assert len(now[name]) == len(part) + moves
                assert torch.equal(now[name][: len(part)], part)


def test_entries_of_the_observation_that_are_not_chosen_have_no_effect():
    agent = make_agent(observation_entries=(1,))
    time_step, noise = percept_of(3, 1), torch.zeros(3, 1, 2)
    blind = time_step._replace(observations=time_step.observations * torch.tensor([-7.0, 1.0]))
    other = time_step._replace(observations=time_step.observations * torch.tensor([1.0, -7.0]))
    state = agent.initial_state(3)
    expected, _, _ = agent.act(time_step, noise, state)
    assert torch.equal(agent.act(blind, noise, state)[0], expected)
    assert not torch.allclose(agent.act(other, noise, state)[0], expected, atol=1e-5)


# Learning


def detached(state):
    return tuple(
        replace(part, keys=part.keys.detach(), values=part.values.detach(), newest=[])
        if isinstance(part, History)
        else part.detach()
        for part in state
    )


def read_by_steps(trunk, inputs, chunk):
    """Features `[B, T, F]` by a loop of steps, with the gradient cut where a chunk begins."""
    state, features, every = trunk.initial(len(inputs)), [], torch.arange(len(inputs))
    for t in range(inputs.shape[1]):
        state = rows(detached(state) if t % chunk == 0 else state, every)  # in memory of its own
        output, state = trunk.step(inputs[:, t], state)
        features.append(output)
    return torch.stack(features, 1)


def loss_by_steps(agent, batch, length, chunk):
    """PPO's loss on whole trials, written out."""
    config = agent.config
    inputs, actions, old, advantages, targets, weights = (part.flatten(1, 2)[:, :length] for part in batch[1:])
    features = read_by_steps(agent.policy.trunk, inputs, chunk)
    mean = agent.policy.head.mean(features)
    std = agent.policy.head.log_std.exp().clamp(config.min_std, config.max_std).expand_as(mean)
    normal = torch.distributions.Normal(mean, std)
    ratio = (normal.log_prob(actions).sum(-1) - old).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - config.clip_eps, 1 + config.clip_eps) * advantages)
    loss = -surrogate - config.entropy_coef * normal.entropy().sum(-1)
    if agent.critic.trunk is not None:
        features = read_by_steps(agent.critic.trunk, inputs, chunk)
    loss = loss + config.critic.loss_coef * 0.5 * (agent.critic.head(features)[..., 0] - targets).square()
    valid = weights > 0
    beyond = ((ratio - 1).abs() > config.clip_eps)[valid].float().mean()
    return loss[valid].mean(), beyond


def prepared(agent, rollout):
    trials = read_trials(agent.inputs, rollout, agent.config.success_bonus, agent.config.free_episodes)
    return agent._prepare(trials, len(rollout.valid))[0]


def gradients_of(agent, loss):
    return dict(zip(agent.parameters(), torch.autograd.grad(loss, list(agent.parameters().values())), strict=True))


@every_memory
@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("chunk", [1, 5, None])
def test_the_gradient_is_that_of_a_loop_of_steps(memory, critic, chunk):
    """Cut at chunk starts, of the loss written out; the policy has changed since it acted, so that ratios differ."""
    changes = {
        "critic": LearnedCriticConfig(name=critic, sizes=(16,), loss_coef=0.7),
        "entropy_coef": 0.3,
        "clip_eps": 0.1,
    }
    agent = learned(memory, bptt_steps=chunk, **changes)
    rollout = rollout_of(agent, 3)
    length = rollout.valid.shape[-1]
    assert rollout.valid.sum(-1).min() < length and length % 5
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in agent.parameters().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    batch = prepared(agent, rollout)
    loss, metrics = agent._loss(batch.select(torch.arange(12)))
    expected, beyond = loss_by_steps(agent, batch, length, chunk or length)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert 0.05 < beyond < 0.95 and float(metrics["clip_fraction"]) == pytest.approx(float(beyond), abs=1e-6)
    assert_same(gradients_of(agent, loss), gradients_of(agent, expected), rtol=1e-3, atol=1e-5)


@every_memory
def test_one_chunk_that_covers_the_trial_is_no_chunk_at_all(memory):
    rollout = rollout_of(learned(memory), 3)
    length = rollout.valid.shape[-1]
    found = {}
    for steps in (None, length, length + 5, 1, 3):
        agent = learned(memory)
        agent.config = agent.config.model_copy(update={"bptt_steps": steps})
        loss, _ = agent._loss(prepared(agent, rollout).select(torch.arange(12)))
        found[steps] = {"loss": loss.detach(), **gradients_of(agent, loss)}
    assert_same(found[length], found[None], rtol=0, atol=0)
    assert_same(found[length + 5], found[None], rtol=0, atol=0)
    recurrent = next(name for name in found[None] if "weight_hh" in name or "key_value" in name)
    for steps in (1, 3):  # the same loss; its gradient does not reach as far
        torch.testing.assert_close(found[steps]["loss"], found[None]["loss"], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(found[steps][recurrent], found[None][recurrent], rtol=1e-2, atol=1e-5)


def test_an_update_is_a_function_of_the_seed_and_the_rollout():
    rollout = rollout_of(make_agent(), 3)
    previous = rollout.map(torch.clone)
    agents = [make_agent() for _ in range(3)]
    agents[2].seed = 1  # of the order of minibatches alone
    torch.manual_seed(1)
    first = agents[0].update((), [rollout])
    torch.manual_seed(2)
    generator_state = torch.get_rng_state()
    assert agents[1].update((), [rollout]) == first
    assert torch.equal(torch.get_rng_state(), generator_state)
    assert_same(snapshot(agents[0]), snapshot(agents[1]), rtol=0, atol=0)
    assert_same(vars(rollout), vars(previous), rtol=0, atol=0)
    agents[2].update((), [rollout])
    name = "policy.head.mean.0.weight"
    assert not torch.equal(agents[2].parameters()[name], agents[0].parameters()[name])
    orders = [[part.targets[0, 0].item() for part in agent._minibatches(prepared(agent, rollout))] for agent in agents]
    assert orders[0] == orders[1]
    assert not torch.equal(make_agent(seed=1).parameters()[name], make_agent().parameters()[name])


def test_the_order_of_minibatches_is_drawn_anew_in_each_epoch_and_iteration():
    agent = make_agent(epochs=2, minibatches=1)
    batch = prepared(agent, rollout_of(agent, 3))
    orders = [part.targets[:, 0].tolist() for part in agent._minibatches(batch)]
    agent.iteration = 1
    orders += [part.targets[:, 0].tolist() for part in agent._minibatches(batch)]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"critic": LearnedCriticConfig(name="separate", sizes=(16,))},
        {"critic": LinearCriticConfig()},
        {"state_dependent_std": True, "bptt_steps": 4},
        {"memory": "lstm"},
        {"memory": "transformer"},
        {"memory": "episodic"},
        {"encoder_sizes": (), "input_differences": False, "input_time": True},
        {"success_bonus": 1.0, "free_episodes": 1, "entropy_coef": 0.1},
    ],
    ids=str,
)
def test_each_kind_of_agent_learns(changes):
    agent = make_agent(**changes, epochs=1)
    previous = {name: value.detach().clone() for name, value in agent.parameters().items()}
    metrics = agent.update((), [rollout_of(agent)])
    assert all(np.isfinite(value) for value in metrics.values()), metrics
    assert metrics["train/optimizer_steps"] == 2
    still = [name for name, value in agent.parameters().items() if torch.equal(value, previous[name])]
    assert still == []
    critic, names = changes.get("critic"), previous.keys()
    assert any(name.startswith("value.head") for name in names) != isinstance(critic, LinearCriticConfig)
    assert any(name.startswith("value.trunk") for name in names) == (critic is not None and critic.name == "separate")
    assert ("train/value_loss" in metrics) != isinstance(critic, LinearCriticConfig)
    assert not any(name.startswith("value.trunk") and name.replace("value", "policy", 1) not in names for name in names)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_shared_critic_trains_the_memory_of_the_policy(critic):
    """With advantages of 0 and no entropy only the value loss is left."""
    agent = make_agent(critic=LearnedCriticConfig(name=critic, sizes=(16,)))
    batch = prepared(agent, rollout_of(agent))
    loss, metrics = agent._loss(batch._replace(advantages=0.0 * batch.advantages).select(torch.arange(12)))
    torch.testing.assert_close(loss.detach(), 0.5 * metrics["value_loss"])
    loss.backward()
    reached = [name for name, value in agent.policy.trunk.named_parameters() if value.grad.abs().max() > 1e-6]
    assert (len(reached) == len(list(agent.policy.trunk.named_parameters()))) == (critic == "shared")
    assert (reached == []) == (critic == "separate")


def test_training_counts_the_bonus_and_leaves_out_free_episodes():
    """Seen in the scale of the returns that the critic learns."""
    agent, expected, plain = (
        make_agent(**changes) for changes in 2 * [{"success_bonus": 10.0, "free_episodes": 1}] + [{}]
    )
    rollout = rollout_of(agent, rollouts=12)
    assert 0 < rollout.success.sum() < rollout.valid.sum()
    expected._prepare(read_trials(expected.inputs, rollout, 10.0, 1), 4)
    agent.update((), [rollout])
    plain.update((), [rollout])
    torch.testing.assert_close(agent.critic.scale, expected.critic.scale, rtol=1e-5, atol=1e-5)
    assert (agent.critic.scale - plain.critic.scale).abs().max() > 0.5


def test_updates_bring_the_values_closer_to_the_returns():
    agent = make_agent(lr=3e-3, epochs=4)
    rollouts = [rollout_of(agent, seed) for seed in range(2)]
    explained = [agent.update((), [rollouts[0]])["train/explained_variance"] for _ in range(25)]
    assert explained[0] < 0.3 and explained[-1] > 0.7


def test_the_rate_falls_linearly_to_a_tenth():
    agent, rollout = make_agent(lr=0.01, lr_decay_iterations=4), rollout_of(make_agent())
    rates = [agent.update((), [rollout])["train/lr"] for _ in range(6)]
    assert rates == pytest.approx([0.01, 0.00775, 0.0055, 0.00325, 0.001, 0.001])
    assert agent._optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    constant = make_agent(lr=0.01)
    assert [constant.update((), [rollout])["train/lr"] for _ in range(3)] == [0.01] * 3


def test_steps_end_when_the_kl_exceeds_its_bound():
    """A step that large is followed by no other, and the iteration after it goes on as usual."""
    shape = {"lr": 0.1, "minibatches": 1, "max_grad_norm": 1e6}
    bound, free, one = make_agent(**shape, epochs=6), make_agent(**shape, epochs=6, max_kl=1e9), None
    one = make_agent(**shape, epochs=1)
    rollout = rollout_of(bound)
    metrics = bound.update((), [rollout])
    assert metrics["train/optimizer_steps"] == 1
    assert metrics["train/kl"] > 0.05 / 2  # the mean of 0 and what exceeded the bound
    one.update((), [rollout])
    assert_same(snapshot(bound), snapshot(one), rtol=0, atol=0)
    assert free.update((), [rollout])["train/optimizer_steps"] == 6
    assert bound.update((), [rollout_of(bound, 1)])["train/optimizer_steps"] >= 1


def test_a_minibatch_beyond_the_bound_ends_the_iteration_though_the_next_would_not():
    agent = make_agent(epochs=2, minibatches=2)
    rollout, loss, kl = rollout_of(agent), agent._loss, iter([0.0, 0.06, 0.0, 0.0])

    def scripted(part):
        value, metrics = loss(part)
        return value, metrics | {"kl": torch.tensor(next(kl))}

    agent._loss = scripted
    metrics = agent.update((), [rollout])
    assert metrics["train/optimizer_steps"] == 1
    assert metrics["train/kl"] == pytest.approx(0.03)  # of the two that were looked at
    assert list(kl) == [0.0, 0.0]


def test_the_ratio_is_1_before_the_first_step_of_every_iteration():
    """What acts, and what learns from it, scale their inputs alike, though the statistics go on learning."""
    agent = make_agent(epochs=1, minibatches=1)
    counts = [0.0]
    for seed in range(3):
        rollout = rollout_of(agent, seed)
        metrics = agent.update((), [rollout])
        assert metrics["train/clip_fraction"] == 0 and metrics["train/kl"] < 1e-7
        counts.append(counts[-1] + rollout.env_steps)
        assert float(agent.normalizer.count) == counts[-1]
        trials = read_trials(agent.inputs, rollout, 0.0, 0)
        if seed == 0:
            inputs = trials.inputs[:, :-1][trials.valid].double()
            torch.testing.assert_close(agent.normalizer.mean, inputs.mean(0))
            torch.testing.assert_close(agent.normalizer.variance, inputs.var(0, correction=0))
    assert not torch.allclose(agent.normalize(trials.inputs), trials.inputs, atol=0.1)


def test_inputs_are_cut_at_ten_deviations_and_the_unknown_is_their_mean():
    agent = learned()
    mean, std = agent.normalizer.mean.float(), agent.normalizer.variance.sqrt().float()
    for deviations, expected in ((3.0, 3.0), (50.0, 10.0), (-50.0, -10.0), (float("inf"), 10.0), (float("nan"), 0.0)):
        torch.testing.assert_close(
            agent.normalize(mean + deviations * std), torch.full_like(mean, expected), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    "critic",
    [LearnedCriticConfig(sizes=(16,)), LearnedCriticConfig(name="separate", sizes=(16,)), LinearCriticConfig()],
)
@pytest.mark.parametrize("bptt_steps", [None, 4])
def test_padding_and_dropped_trials_have_no_influence(critic, bptt_steps):
    clean, dirty = (make_agent(critic=critic, bptt_steps=bptt_steps, minibatches=1) for _ in range(2))
    rollout = rollout_of(clean)
    assert rollout.valid.sum(-1).min() < rollout.valid.shape[-1]
    generator = torch.Generator().manual_seed(5)

    def with_garbage(name, part):
        garbage = 3.0 * torch.randn(part.shape, generator=generator)
        return (
            torch.where(rollout.valid[(...,) + (None,) * (part.ndim - 3)], part, garbage)
            if part.is_floating_point()
            else part
        )

    steps = {name: part for name, part in vars(rollout).items() if name != "final_observations"}
    garbage = replace(rollout, **{name: with_garbage(name, part) for name, part in steps.items()})
    nothing = garbage.map(lambda part: torch.cat([part, torch.zeros_like(part[:, :1])], 1))
    metrics = clean.update((), [rollout])
    assert dirty.update((), [garbage]) == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    assert_same(snapshot(dirty), snapshot(clean), rtol=1e-4, atol=1e-6)
    clean, dirty = (make_agent(critic=critic, bptt_steps=bptt_steps, minibatches=1, epochs=1) for _ in range(2))
    assert dirty.update((), [nothing]) == pytest.approx(clean.update((), [rollout]), rel=1e-4, abs=1e-5)
    assert_same(gradients(dirty), gradients(clean), rtol=1e-3, atol=1e-5)


def gradients(agent):
    return {name: value.grad for name, value in agent.parameters().items()}


def test_a_minibatch_of_dropped_trials_alone_changes_nothing_that_it_should_not():
    """4 trials, one of them dropped, in 4 minibatches."""
    agent = make_agent(minibatches=4)
    rollout = rollout_of(agent, rollouts=1)
    dropped = rollout.map(lambda part: torch.cat([torch.zeros_like(part[:1]), part[1:]]))
    metrics = agent.update((), [dropped])
    assert all(np.isfinite(value) for value in metrics.values())
    assert all(value.isfinite().all() for value in snapshot(agent).values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_stops_the_run_before_a_step(value):
    agent = make_agent()
    rollout = rollout_of(agent)
    rollout.rewards[1, 2, 0] = value
    previous = {name: part.detach().clone() for name, part in agent.parameters().items()}
    with pytest.raises(FloatingPointError, match="gradient is not finite"):
        agent.update((), [rollout])
    assert_same({name: part.detach() for name, part in agent.parameters().items()}, previous, rtol=0, atol=0)


def test_gradients_are_scaled_down_to_their_greatest_norm():
    norms = []
    for greatest in (1e6, 0.01):
        agent = make_agent(max_grad_norm=greatest, epochs=1, minibatches=1)
        agent.update((), [rollout_of(agent)])
        norms.append(float(nn.utils.get_total_norm(gradients(agent).values())))
    assert norms[0] > 0.02 and norms[1] == pytest.approx(0.01, rel=1e-3)


# The policy's deviation


@pytest.mark.parametrize("state_dependent", [False, True])
def test_the_deviation_stays_within_its_bounds(state_dependent):
    head = PolicyHead(3, GaussianHead(2, 1.0, 0.1, 1.5), state_dependent, torch.Generator().manual_seed(0))
    features = torch.randn(100, 3, generator=torch.Generator().manual_seed(1))
    mean, log_std = head(features).parameters().values()
    assert mean.shape == log_std.shape == (100, 2)
    torch.testing.assert_close(log_std.exp(), torch.ones(100, 2), rtol=0, atol=0.1)
    assert (log_std.std(0).min() > 0) == state_dependent
    if state_dependent:
        with torch.no_grad():
            head.deviation[0].weight.mul_(1000.0)
        std = head(features).log_std.exp().detach()
        assert std.min() == pytest.approx(0.1) and std.max() == pytest.approx(1.5)
    for shift, bound in ((-9.0, 0.1), (9.0, 1.5)):
        with torch.no_grad():
            head.log_std.fill_(1000.0 * shift)
        std = head(features).log_std.exp()
        torch.testing.assert_close(std, torch.full((100, 2), bound))


def test_a_step_does_not_carry_the_deviation_past_its_bound():
    """Beyond it the gradient is 0, and the deviation would stay there for good. Entropy drives it up to 1.5."""
    agent = make_agent(lr=0.2, entropy_coef=10.0, max_kl=1e9)
    agent.update((), [rollout_of(agent)])
    assert agent.policy.head.log_std.max().item() == pytest.approx(math.log(1.5))


# Saving


@pytest.mark.parametrize("critic", ["shared", "separate", "linear"])
def test_a_loaded_agent_goes_on_exactly(critic):
    chosen = LinearCriticConfig() if critic == "linear" else LearnedCriticConfig(name=critic, sizes=(16,))
    changes = {"critic": chosen, "lr_decay_iterations": 5}
    agent, other = make_agent(**changes), make_agent(**changes, seed=3)
    agent.update((), [rollout_of(agent, 0)])
    other.load_state_dict(snapshot(agent))
    assert_same(snapshot(other), snapshot(agent), rtol=0, atol=0)
    rollout = rollout_of(agent, 1)
    assert_same(vars(rollout_of(other, 1)), vars(rollout), rtol=0, atol=0)
    for _ in range(2):
        assert other.update((), [rollout]) == agent.update((), [rollout])
    assert_same(snapshot(other), snapshot(agent), rtol=0, atol=0)


def test_a_state_before_the_first_update_can_be_loaded():
    agent, other = make_agent(), make_agent(seed=1)
    other.update((), [rollout_of(other)])
    other.load_state_dict(snapshot(agent))
    rollout = rollout_of(agent, 1)
    assert other.update((), [rollout]) == agent.update((), [rollout])
    assert_same(snapshot(other), snapshot(agent), rtol=0, atol=0)


@pytest.mark.parametrize(
    "name",
    [
        "policy.trunk.memory._cell.weight_hh_l0",
        "policy.head.log_std",
        "value.head.0.weight",
        "value.scale",
        "normalizer.mean",
        "iteration",
        "optimizer.exp_avg.policy.head.log_std",
    ],
)
def test_an_entry_that_does_not_fit_is_named_and_nothing_is_loaded(name):
    agent, other = make_agent(), make_agent(seed=1)
    agent.update((), [rollout_of(agent)])
    state, previous = snapshot(agent), snapshot(other)
    for wrong in ({k: v for k, v in state.items() if k != name}, {**state, name: torch.zeros(7, 7)}):
        with pytest.raises(ValueError, match=rf"cannot load '{name}': expected shape .*, found "):
            other.load_state_dict(wrong)
        assert_same(snapshot(other), previous, rtol=0, atol=0)


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory": {"name": "transformer", "size": 10, "heads": 4}}, "size is 10, heads is 4; expected a multiple"),
        ({"memory": {"name": "episodic", "size": 9, "heads": 2}}, "size is 9, heads is 2; expected a multiple"),
        ({"free_episodes": 2}, "free_episodes is 2 of trial_episodes 2; one must count"),
        ({"trial_episodes": 3, "free_episodes": 4}, "free_episodes is 4 of trial_episodes 3"),
        ({"init_std": 2.0}, "init_std is 2.0; expected between min_std 0.1 and max_std 1.5"),
        ({"init_std": 0.05}, "init_std is 0.05; expected between"),
        ({"min_std": 0.5, "max_std": 0.2, "init_std": 0.3}, "init_std is 0.3; expected between"),
        ({"bptt_steps": 0}, "greater than or equal to 1"),
        ({"observation_entries": (0, -1)}, "greater than or equal to 0"),
        ({"hidden_sizes": (8,)}, "Extra inputs"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValidationError, match=message):
        Rl2Config(**settings)


def test_an_entry_that_the_observation_does_not_have():
    with pytest.raises(UserError, match="observation_entries holds 5; observations have entries 0 to 1"):
        make_agent(observation_entries=(0, 5))
    assert make_agent(observation_entries=(1,)).inputs.entries == (1,)


def test_a_memory_is_chosen_by_its_name():
    assert isinstance(Rl2Config(memory={"name": "lstm"}).memory, LstmConfig)
    assert isinstance(Rl2Config(critic={"name": "linear"}).critic, LinearCriticConfig)
    assert Rl2Config(memory={"size": 7}).memory == GruConfig(size=7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_memory
def test_the_gpu_computes_what_the_cpu_does(memory):
    config = make_agent(memory).config
    agents = [Rl2(config, spec(2, 2, torch.device(name), 0)) for name in ("cpu", "cuda")]
    rollouts = [rollout_of(agent) for agent in agents]
    torch.testing.assert_close(rollouts[1].log_probs.cpu(), rollouts[0].log_probs, rtol=1e-4, atol=1e-5)
    for agent in agents:
        agent.update((), [rollouts[0].to(agent.device)])
    on_cpu, on_gpu = (agent.state_dict() for agent in agents)
    for name, value in on_cpu.items():
        torch.testing.assert_close(on_gpu[name], value, rtol=1e-3, atol=1e-4, msg=name)
