"""Trials as inputs of a memory, their chunks and values; learning reads the same inputs as acting."""

import itertools
from typing import NamedTuple

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metarl.agents.rl2 import agent as rl2
from metarl.agents.rl2.agent import Rl2, Rl2Config
from metarl.agents.rl2.networks import (
    EpisodicConfig,
    GruConfig,
    LearnedCriticConfig,
    LinearCriticConfig,
    LstmConfig,
    TransformerConfig,
)
from metarl.agents.rl2.trials import Inputs, TrialBatch, chunks, read_trials
from metarl.collect import collect, rollout_arrays
from metarl.envs import custom
from metarl.envs.vector.serial import SerialEnvs
from metarl.nn.distributions import GaussianHead
from metarl.seeding import children
from metarl.spaces import Spaces
from metarl.types import Rollout
from tests.agents.specs import spec

CPU = torch.device("cpu")
NAN = float("nan")

MEMORIES = {
    "gru": GruConfig(size=8),
    "lstm": LstmConfig(size=8),
    "transformer": TransformerConfig(size=8, layers=2, heads=2, context=5),
    "episodic": EpisodicConfig(size=8, heads=2, context=5),
}


class Episode(NamedTuple):
    observations: list  # one more than steps
    actions: list
    rewards: list
    terminated: bool = False
    success: list | None = None


def lay_out(trials, tasks=1):
    """A rollout of trials, task by task; one without episodes was dropped."""
    shape = (tasks, len(trials) // tasks, max(sum(len(episode.rewards) for episode in trial) for trial in trials))
    first = next(trial[0] for trial in trials if trial)
    spaces = Spaces.within_one(len(first.observations[0]), len(first.actions[0]))
    arrays = rollout_arrays(shape, max(map(len, trials)), spaces)
    for number, trial in enumerate(trials):
        begin = 0
        for place, episode in enumerate(trial):
            end = begin + len(episode.rewards)
            where = (*divmod(number, shape[1]), slice(begin, end))
            arrays["observations"][where] = episode.observations[:-1]
            arrays["final_observations"][(*where[:2], place)] = episode.observations[-1]
            arrays["actions"][where], arrays["rewards"][where] = episode.actions, episode.rewards
            arrays["success"][where] = NAN if episode.success is None else episode.success
            ends = arrays["terminated" if episode.terminated else "truncated"]
            ends[(*where[:2], end - 1)] = arrays["episode_start"][(*where[:2], begin)] = True
            arrays["valid"][where] = True
            begin = end
    return Rollout(**{name: torch.from_numpy(array) for name, array in arrays.items()})


LONG = [
    Episode([[1, 10], [2, 25], [3, 99]], [[0.5], [1.5]], [1, 2], terminated=True, success=[0, 1]),
    Episode([[4, 40], [5, 47], [8, 46], [7, 70]], [[-2.0], [0.25], [-0.5]], [4, 9, 16], success=[0, 0, 1]),
]
SHORT = [
    Episode([[-1, 0], [-9, -9]], [[0.1]], [-3]),
    Episode([[-2, 5], [-4, 6], [-8, 9]], [[0.2], [-7.0]], [-1, -5], terminated=True),
]
TRIALS = [LONG, SHORT, [], SHORT]  # two of each of two tasks; one was dropped

LONG_INPUTS = [
    # observation, last action within ±1, last reward, start, change of observation, of reward, time / 100
    [1, 10, 0, 0, 1, 0, 0, 0, 0],
    [2, 25, 0.5, 1, 0, 1, 15, 0, 0.01],
    [4, 40, 1, 2, 1, 0, 0, 0, 0],  # the second episode reads the last action and reward of the first
    [5, 47, -1, 4, 0, 1, 7, 0, 0.01],  # but the reward's change not before its third step: 9 − 4
    [8, 46, 0.25, 9, 0, 3, -1, 5, 0.02],
    [7, 70, -0.5, 16, 0, -1, 24, 7, 0.03],  # behind the last step, where the trial was cut off
]
SHORT_INPUTS = [
    [-1, 0, 0, 0, 1, 0, 0, 0, 0],
    [-2, 5, 0.1, -3, 1, 0, 0, 0, 0],
    [-4, 6, 0.2, -1, 0, -2, 1, 0, 0.01],
    [-8, 9, -1, -5, 0, -4, 3, -4, 0.02],
]
ALL = Inputs((0, 1), GaussianHead(1), True, True)


def test_what_is_told_at_each_step_by_hand():
    trials = read_trials(ALL, lay_out(TRIALS, tasks=2), 0.0, 0)
    assert trials.inputs.shape == (4, 6, ALL.size) == (4, 6, 9)
    torch.testing.assert_close(trials.inputs[0], torch.tensor(LONG_INPUTS))
    for row in (1, 3):
        torch.testing.assert_close(trials.inputs[row, :4], torch.tensor(SHORT_INPUTS))
    assert trials.valid.tolist() == [[True] * 5, [True] * 3 + [False] * 2, [False] * 5, [True] * 3 + [False] * 2]
    assert trials.last.tolist() == [[0, 0, 0, 0, 1], [0, 0, 1, 0, 0], [0] * 5, [0, 0, 1, 0, 0]]
    # What ended an episode within a trial did not end the trial.
    assert trials.terminated.tolist() == [[0] * 5, [0, 0, 1, 0, 0], [0] * 5, [0, 0, 1, 0, 0]]
    assert trials.actions[0, :, 0].tolist() == [0.5, 1.5, -2.0, 0.25, -0.5]  # as drawn: their density is meant


@pytest.mark.parametrize(
    ("entries", "differences", "time", "columns"),
    [
        ((0, 1), False, False, [0, 1, 2, 3, 4]),
        ((0, 1), False, True, [0, 1, 2, 3, 4, 8]),
        ((1,), False, False, [1, 2, 3, 4]),
        ((1,), True, False, [1, 2, 3, 4, 6, 7]),
        ((1, 0), True, True, [1, 0, 2, 3, 4, 6, 5, 7, 8]),
    ],
)
def test_inputs_that_are_switched_off(entries, differences, time, columns):
    inputs = Inputs(entries, GaussianHead(1), differences, time)
    assert inputs.size == len(columns)
    found = read_trials(inputs, lay_out(TRIALS, tasks=2), 0.0, 0).inputs
    torch.testing.assert_close(found[0], torch.tensor(LONG_INPUTS)[:, columns])
    torch.testing.assert_close(found[1, :4], torch.tensor(SHORT_INPUTS)[:, columns])


@pytest.mark.parametrize(
    ("bonus", "free", "long", "short"),
    [
        (0.0, 0, [1, 2, 4, 9, 16], [-3, -1, -5]),
        (10.0, 0, [1, 12, 4, 9, 26], [-3, -1, -5]),  # a step counts as unsolved where success is undefined
        (0.0, 1, [0, 0, 4, 9, 16], [0, -1, -5]),
        (10.0, 1, [0, 0, 4, 9, 26], [0, -1, -5]),
    ],
)
def test_bonus_and_free_episodes_are_in_the_objective_and_not_in_what_is_told(bonus, free, long, short):
    rollout = lay_out(TRIALS, tasks=2)
    rollout.rewards[~rollout.valid] = 7.0
    trials = read_trials(ALL, rollout, bonus, free)
    assert trials.rewards.tolist() == [long, [*short, 0, 0], [0] * 5, [*short, 0, 0]]
    torch.testing.assert_close(trials.inputs[0], torch.tensor(LONG_INPUTS))
    torch.testing.assert_close(trials.inputs[1, :4], torch.tensor(SHORT_INPUTS))


def test_reading_trials_leaves_the_rollout_as_it_was():
    rollout = lay_out(TRIALS, tasks=2)
    previous = rollout.map(torch.clone)
    read_trials(ALL, rollout, 1.0, 1)
    for name, part in vars(rollout).items():
        torch.testing.assert_close(part, getattr(previous, name), rtol=0, atol=0, equal_nan=True)


# Chunks


@settings(max_examples=50)
@given(st.integers(1, 4), st.integers(1, 20), st.integers(1, 25))
def test_chunks_hold_every_step_once_and_in_order(batch, length, steps):
    part = torch.arange(1, batch * length + 1).view(batch, length)
    cut = chunks(part, steps)
    assert cut.shape == (batch, -(-length // steps), steps)
    for row in range(batch):
        held = cut[row].flatten().tolist()
        assert held == part[row].tolist() + [0] * (len(held) - length)
    wide = chunks(part[..., None] * torch.tensor([1, -1]), steps)
    assert torch.equal(wide[..., 0], cut) and torch.equal(wide[..., 1], -cut)


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 11), min_size=2, max_size=7).filter(any),
    st.integers(1, 13),
    st.integers(1, 4),
)
def test_each_epoch_holds_every_valid_step_once_with_the_state_of_its_chunk(lengths, steps, minibatches):
    trials, length = len(lengths), max(lengths)
    steps = min(steps, length)
    agent = make_agent(minibatches=minibatches, epochs=3)
    ids = torch.arange(trials * length).view(trials, length)
    weights = (torch.arange(length) < torch.tensor(lengths)[:, None]).float()
    count = -(-length // steps)
    starts = torch.arange(trials) * length + (torch.arange(count) * steps)[:, None]  # chunk by chunk all trials
    states = [(starts.reshape(-1, 1),), (-starts.reshape(-1, 1),)]
    cut = [chunks(part, steps) for part in (ids[..., None], ids[..., None], ids, ids, ids, weights)]
    order = []
    for part in agent._minibatches(TrialBatch(states, *cut)):
        assert part.inputs.shape == (len(part.weights), steps, 1)
        kept = part.weights > 0
        assert kept[:, 0].all()  # no chunk without a step
        for held in (part.inputs[..., 0], part.actions[..., 0], part.log_probs, part.advantages):
            assert torch.equal(held, part.targets)
        assert torch.equal(part.states[0][0][:, 0], part.targets[:, 0])
        assert torch.equal(part.states[1][0][:, 0], -part.targets[:, 0])
        order.append(part.targets[kept].tolist())
    parts = len(order) // 3
    assert parts <= minibatches and len(order) == 3 * parts
    epochs = [order[i * parts : (i + 1) * parts] for i in range(3)]
    for epoch in epochs:
        assert sorted(itertools.chain.from_iterable(epoch)) == sorted(ids[weights > 0].tolist())
        for one in epoch:  # a trial is whole
            in_part = {index // length for index in one}
            assert len(one) == sum(lengths[trial] for trial in in_part)


@pytest.mark.parametrize(("trials", "minibatches", "sizes"), [(10, 4, [3, 3, 2, 2]), (9, 4, [3, 2, 2, 2])])
def test_there_are_as_many_minibatches_as_asked_for_of_nearly_equal_size(trials, minibatches, sizes):
    agent = make_agent(minibatches=minibatches, epochs=1)
    states = [(torch.zeros(trials, 1),)]
    cut = [chunks(part, 2) for part in (*[torch.zeros(trials, 2, 1)] * 2, *[torch.ones(trials, 2)] * 4)]
    assert [len(part.weights) for part in agent._minibatches(TrialBatch(states, *cut))] == sizes


# Values


def make_agent(observations=2, actions=1, seed=0, memory="gru", **changes):
    defaults = {"encoder_sizes": (8,), "critic": LearnedCriticConfig(sizes=(8,))}
    return Rl2(Rl2Config(memory=MEMORIES[memory], **defaults | changes), spec(observations, actions, CPU, seed))


def value_is_the_observation(agent):
    """V of a step is its first observation, which the features hold behind the memory's output."""
    (layer,) = agent.critic.head
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
        layer.weight[0, agent.policy.trunk.memory.output_size] = 1.0


def plain(values, rewards, following, terminated=False):
    """An episode whose observations are the values of its steps, and of what it led to."""
    return Episode([[value] for value in (*values, following)], [[0.0]] * len(rewards), rewards, terminated)


@pytest.mark.parametrize("bptt_steps", [None, 1, 3])
def test_advantages_of_a_trial_by_hand(bptt_steps):
    """γ = λ = 0.5. V = 3 4 | 6 8, rewards 1 2 | 4 1; the first episode ends itself, or is cut off, at 10.

    V after: 4 6 8, since the second episode follows the first, and 2 behind the trial, unless it ended itself.
    δ_0 = 1 + 0.5·4 − 3 = 0    δ_1 = 2 + 0.5·6 − 4 = 1    δ_2 = 4 + 0.5·8 − 6 = 2
    cut off:       δ_3 = 1 + 0.5·2 − 8 = −6    A = 0.28125, 1.125, 0.5, −6       A_t = δ_t + 0.25 A_{t+1}
    ended itself:  δ_3 = 1         − 8 = −7    A = 0.265625, 1.0625, 0.25, −7
    A shorter trial, V = 5 | 1, rewards 2 | 3, cut off at 7:  δ = 2 + 0.5·1 − 5 = −2.5,  3 + 0.5·7 − 1 = 5.5
                                               A = −1.125, 5.5
    """
    trials = [
        [plain([3, 4], [1, 2], 10, terminated=True), plain([6, 8], [4, 1], 2)],
        [plain([3, 4], [1, 2], 10), plain([6, 8], [4, 1], 2, terminated=True)],
        [plain([5], [2], 9, terminated=True), plain([1], [3], 7)],
        [],
    ]
    agent = make_agent(1, critic=LearnedCriticConfig(sizes=()), gamma=0.5, gae_lambda=0.5, bptt_steps=bptt_steps)
    value_is_the_observation(agent)
    agent.critic.scale = torch.tensor([0.0, 1.0, 0.0])
    read = read_trials(agent.inputs, lay_out(trials, tasks=2), 0.0, 0)
    batch, metrics = agent._prepare(read, 2)
    values = torch.tensor([3.0, 4, 6, 8, 3, 4, 6, 8, 5, 1])
    advantages = torch.tensor([0.28125, 1.125, 0.5, -6, 0.265625, 1.0625, 0.25, -7, -1.125, 5.5])
    targets = values + advantages
    valid = batch.weights > 0
    mean, std, seen = agent.critic.scale
    assert (mean, std, seen) == pytest.approx((float(targets.mean()), float(targets.std()), 1.0), abs=1e-5)
    torch.testing.assert_close(batch.targets[valid], (targets - mean) / std, rtol=0, atol=1e-5)
    normalized = (advantages - advantages.mean()) / advantages.std(correction=0)
    torch.testing.assert_close(batch.advantages[valid], normalized, rtol=0, atol=1e-5)
    assert (batch.advantages[~valid] == 0).all()
    explained = 1 - float(advantages.var() / targets.var())
    assert metrics == {"explained_variance": pytest.approx(explained, abs=1e-4)}


def test_targets_follow_the_returns_slowly():
    """Mean and deviation of the second update weigh 1/2, of the third 1/3; of the 20th and all later ones 1/20."""
    agent = make_agent()
    for returns, mean, std in (
        ([0.0, 2.0], 1.0, 2**0.5),
        ([10.0, 14.0], 6.5, 1.5 * 2**0.5),
        ([3.0, 3.0], 16 / 3, 2**0.5),
    ):
        agent.critic.rescale(torch.tensor(returns))
        assert agent.critic.scale[:2].tolist() == pytest.approx([mean, std], abs=1e-5)
    agent.critic.scale = torch.tensor([0.0, 1.0, 500.0])
    agent.critic.rescale(torch.tensor([20.0, 20.0]))
    assert agent.critic.scale.tolist() == pytest.approx([1.0, 0.95, 501.0], abs=1e-5)
    features = torch.randn(3, agent.policy.trunk.output_size)
    values = agent.critic.values(features)
    torch.testing.assert_close(values, agent.critic(features) * 0.95 + 1.0)
    torch.testing.assert_close(agent.critic.normalized(values), agent.critic(features))


def test_the_linear_baseline_knows_the_time_left_in_the_trial():
    """Every step pays 1 and γ = 1: the value is the number of steps left, linear in the trial's time; A = 0.

    Behind the last step it is 0, though the trial was cut off.
    """
    agent = make_agent(2, critic=LinearCriticConfig(), gamma=1.0, gae_lambda=0.5)
    generator = torch.Generator().manual_seed(0)

    def episode(steps, terminated):
        return Episode(torch.randn(steps + 1, 2, generator=generator), torch.zeros(steps, 1), [1] * steps, terminated)

    trials = [[episode(n, n % 4 == 0), episode(100 - n, n % 3 == 0)] for n in (20, 30, 40, 50, 60, 70, 80, 33)]
    read = read_trials(agent.inputs, lay_out(trials, tasks=2), 0.0, 0)
    batch, metrics = agent._prepare(read, 2)
    torch.testing.assert_close(batch.targets[:, 0], torch.arange(100.0, 0.0, -1.0).expand(8, 100), rtol=0, atol=0.3)
    assert metrics["explained_variance"] > 0.9999


def test_the_linear_baseline_is_fitted_to_each_task():
    """Task 0 pays 1 a step and task 1 pays −1: both are predicted, which one fit for both would not do."""
    agent = make_agent(2, critic=LinearCriticConfig(), gamma=1.0, gae_lambda=1.0)
    zeros = torch.zeros(5, 2)
    trials = [[Episode(zeros, zeros[:4, :1], [pays] * 4)] * 2 for pays in (1, 1, -1, -1)]
    _, metrics = agent._prepare(read_trials(agent.inputs, lay_out(trials, tasks=2), 0.0, 0), 2)
    assert metrics["explained_variance"] > 0.999


def test_the_linear_baseline_is_fitted_to_all_trials_of_a_task_together():
    """Of two trials alike, one pays 1 a step, the other −1: expected is 0. A fit for each would explain all of it."""
    agent = make_agent(2, critic=LinearCriticConfig(), gamma=1.0, gae_lambda=1.0)
    zeros = torch.zeros(5, 2)
    trials = [[Episode(zeros, zeros[:4, :1], [pays] * 4)] * 2 for pays in (1, -1)]
    _, metrics = agent._prepare(read_trials(agent.inputs, lay_out(trials, tasks=1), 0.0, 0), 1)
    assert metrics["explained_variance"] == pytest.approx(0.0, abs=1e-3)


# Learning reads what acting did


class Walk(gymnasium.Env):
    """A point on a line that the task pulls; an episode ends by itself after 1 to 8 steps, as its seed decides."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, task):
        self.pull = np.sin(3.0 * task.index)

    def _observation(self):
        return np.array([self.position, 100.0 + self.elapsed, self.ends_at * np.cos(self.elapsed)])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.elapsed, self.position, self.ends_at = 0, self.np_random.normal(), self.np_random.integers(1, 9)
        return self._observation(), {}

    def step(self, action):
        self.elapsed += 1
        self.position += 0.5 * action[0] + 0.2 * self.pull
        reward = 3.0 * self.position + action[1]
        return self._observation(), reward, self.elapsed == self.ends_at, False, {"success": self.position > 0.5}


WALKS = custom("walk", Walk, num_train=6, num_test=1, horizon=6)


def walk(agent, rollouts, seed):
    envs, seeds = SerialEnvs(WALKS, 6 * rollouts), children(np.random.SeedSequence(seed), 6)
    envs.lanes = 1  # so that a spy sees all tasks in one call
    return collect(envs, agent, agent.initial_state(6), WALKS.train_tasks, rollouts, seeds)


def walker(memory, **changes):
    """An agent that has learned once, so that inputs are normalised, and whose actions depend on its inputs."""
    agent = make_agent(3, 2, memory=memory, trial_episodes=3, state_dependent_std=True, input_time=True, **changes)
    with torch.no_grad():
        agent.policy.head.mean[0].weight.mul_(50.0)
        agent.policy.head.deviation[0].weight.mul_(20.0)
    agent.update((), [walk(agent, 3, 0)])
    assert float(agent.normalizer.count) > 100
    return agent


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("bptt_steps", [None, 5])
def test_the_policy_that_learns_is_the_one_that_acted(monkeypatch, memory, bptt_steps):
    agent = walker(memory, bptt_steps=bptt_steps, minibatches=2)
    rollout = walk(agent, 3, 1)
    steps = rollout.valid.sum(-1)
    assert steps.min() < steps.max() == rollout.valid.shape[-1] and rollout.valid.shape[-1] % 5
    assert (rollout.terminated & ~rollout.truncated).any() and rollout.truncated.any()
    followed = agent.log_prob(agent.initial_state(6), rollout)
    torch.testing.assert_close(followed[rollout.valid], rollout.log_probs[rollout.valid], rtol=0, atol=1e-5)
    seen = []
    loss = rl2.ppo_clip_loss
    monkeypatch.setattr(rl2, "ppo_clip_loss", lambda *a: seen.append([part for part in a[:4]]) or loss(*a))
    batch, _ = agent._prepare(read_trials(agent.inputs, rollout, 0.0, 0), 6)
    for part in agent._minibatches(batch):
        _, metrics = agent._loss(part)
        assert metrics["clip_fraction"] == 0 and metrics["kl"] < 1e-8
    for log_probs, old, _, weights in seen:
        torch.testing.assert_close(log_probs[weights > 0], old[weights > 0], rtol=0, atol=1e-5)
    assert rollout.log_probs[rollout.valid].std() > 0.3
    epoch = torch.cat([old[weights > 0] for _, old, _, weights in seen[:2]])
    torch.testing.assert_close(epoch.sort().values, rollout.log_probs[rollout.valid].sort().values, rtol=0, atol=0)


@pytest.mark.parametrize("changes", [{}, {"observation_entries": (2, 0)}, {"input_differences": False}])
def test_learning_is_told_what_acting_was_told(monkeypatch, changes):
    agent = walker("gru", **changes)
    inputs_of_steps, step = [], agent.policy.trunk.step

    def spy(inputs, state, active=None):
        inputs_of_steps.append((inputs, torch.ones(6, dtype=torch.bool) if active is None else active))
        return step(inputs, state, active)

    monkeypatch.setattr(agent.policy.trunk, "step", spy)
    rollout = walk(agent, 1, 1)
    trials = read_trials(agent.inputs, rollout, agent.config.success_bonus, 0)
    inputs = agent.normalize(trials.inputs)
    for row in range(6):
        as_acted = torch.stack([inputs[row] for inputs, active in inputs_of_steps if active[row]])
        torch.testing.assert_close(inputs[row, :-1][trials.valid[row]], as_acted, rtol=0, atol=1e-5)
    assert inputs[:, :-1][trials.valid].std(0).min() > 0.1
