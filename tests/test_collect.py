"""collect() with a scripted agent on environments whose every number is known."""

import dataclasses

import gymnasium
import numpy as np
import pytest
import torch

from metarl.agents import build
from metarl.agents.maml.maml import MamlPpoConfig
from metarl.collect import BrokenRolloutsError, LocalCollector, adapt_and_collect, collect, per_phase
from metarl.envs import custom, distribution
from metarl.envs.vector.serial import SerialEnvs, make_envs
from metarl.seeding import children
from tests.agents.specs import spec

LOW, HIGH = np.array([-2.0, 0.0]), np.array([4.0, 1.0])
NAN = float("nan")
CPU = torch.device("cpu")


class Line(gymnasium.Env):
    """Observes steps taken, a random start and the action that it received; pays 1 a step.

    Its task's index says more: task i terminates at step `ends_at[i]`, succeeds at step `solved_at[i]` only, and from
    step `breaks_at[i]` on its reward, or its observation, is not finite. If `growing`, step k pays k.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float64)
    action_space = gymnasium.spaces.Box(LOW.astype(np.float32), HIGH.astype(np.float32))

    def __init__(
        self, task, ends_at=None, solved_at=None, breaks_at=None, breaks="reward", random=False, growing=False
    ):
        self.ends_at = (ends_at or {}).get(task.index)
        self.solved_at = None if solved_at is None else solved_at.get(task.index, -1)
        self.breaks_at = (breaks_at or {}).get(task.index, 10**6)
        self.breaks, self.random, self.growing = breaks, random, growing

    def _observation(self, action):
        broken = self.breaks == "observation" and self.elapsed >= self.breaks_at
        return np.array([self.elapsed, np.inf if broken else self.start, *action])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.elapsed, self.start = 0, self.np_random.uniform()
        if self.random:  # how an episode goes depends on its seed
            self.ends_at = 2 if self.start < 0.3 else 4
            self.breaks_at = 3 if self.start > 0.8 else 10**6
        return self._observation((0.0, 0.0)), {}

    def step(self, action):
        self.elapsed += 1
        reward = float("nan") if self.breaks == "reward" and self.elapsed >= self.breaks_at else 1.0
        reward *= self.elapsed if self.growing else 1
        info = {} if self.solved_at is None else {"success": self.elapsed == self.solved_at}
        return self._observation(action), reward, self.elapsed == self.ends_at, False, info


class Scripted:
    """Acts with its noise, or always alike; log_prob is the number of adaptations plus 0.01 a step that it acted."""

    device = torch.device("cpu")
    adapts_by = "gradient"
    adaptation_steps = noise_size = 2
    trial_episodes = 1

    def __init__(self, action=None):
        self.action = action
        self.adapted_on = []

    def initial_state(self, num_tasks):
        return 0.0

    def act(self, time_step, noise, state):
        assert time_step.observations.dtype == torch.float32
        assert noise.shape == (*time_step.observations.shape[:2], 2)
        actions = noise if self.action is None else torch.tensor(self.action).expand(noise.shape)
        return actions, torch.full(noise.shape[:2], state), state + 0.01

    def adapt(self, state, rollout):
        self.adapted_on.append(rollout)
        return state + 1.0


def lines(num_tasks, horizon=5, **settings):
    tasks = custom("line", lambda task: Line(task, **settings), num_train=num_tasks, num_test=1, horizon=horizon)
    return tasks, tasks.train_tasks


def run(num_tasks, rollouts, *, seed=0, max_envs=None, agent=None, horizon=5, **settings):
    tasks, train = lines(num_tasks, horizon, **settings)
    envs = SerialEnvs(tasks, max_envs or num_tasks * rollouts)
    return collect(envs, agent or Scripted(), 0.0, train, rollouts, children(np.random.SeedSequence(seed), len(train)))


def assert_same(left, right):
    for name, tensor in vars(left).items():
        torch.testing.assert_close(tensor, getattr(right, name), rtol=0, atol=0, equal_nan=True, msg=name)


def test_the_rollout_keeps_the_action_drawn_and_the_environment_gets_it_scaled():
    rollout = run(2, 1, agent=Scripted(action=(2.5, -0.5)))
    torch.testing.assert_close(rollout.actions, torch.tensor([2.5, -0.5]).expand(2, 1, 5, 2), rtol=0, atol=0)
    # 2.5 is clipped to 1: 1 + 3 = 4. 0.5 − 0.5 · 0.5 = 0.25.
    received = torch.tensor([4.0, 0.25]).expand(2, 1, 5, 2)
    torch.testing.assert_close(rollout.next_observations[..., 2:], received, rtol=0, atol=0)


def test_a_full_horizon_by_hand():
    rollout = run(2, 3)
    shape = (2, 3, 5)
    assert rollout.observations.shape == rollout.next_observations.shape == (*shape, 4)
    assert rollout.actions.shape == (*shape, 2)
    ones = torch.ones(shape)
    for name in ("rewards", "log_probs", "terminated", "truncated", "episode_start", "valid", "success"):
        assert getattr(rollout, name).shape == shape
    torch.testing.assert_close(rollout.rewards, ones, rtol=0, atol=0)
    torch.testing.assert_close(rollout.observations[..., 0], ones * torch.arange(5.0), rtol=0, atol=0)
    torch.testing.assert_close(rollout.next_observations[..., 0], ones * torch.arange(1.0, 6.0), rtol=0, atol=0)
    torch.testing.assert_close(rollout.next_observations[..., :4, :], rollout.observations[..., 1:, :], rtol=0, atol=0)
    torch.testing.assert_close(rollout.log_probs, ones * 0.01 * torch.arange(5.0), rtol=0, atol=1e-6)
    assert rollout.valid.all()
    assert not rollout.terminated.any()
    assert rollout.truncated.tolist() == [[[False] * 4 + [True]] * 3] * 2
    assert rollout.episode_start.tolist() == [[[True] + [False] * 4] * 3] * 2
    assert rollout.success.isnan().all()
    assert rollout.episode_returns().tolist() == [[[5.0]] * 3] * 2
    assert rollout.env_steps == 30
    assert len(rollout.observations[..., 0, 1].unique()) == 6  # a seed for each episode


def test_terminated_is_not_truncated():
    # Task 0 ends at step 2, task 1 at the horizon by itself, task 2 is cut off there.
    rollout = run(3, 2, ends_at={0: 2, 1: 5})
    for n in (0, 1):
        assert rollout.terminated[:, n].tolist() == [[0, 1, 0, 0, 0], [0, 0, 0, 0, 1], [0] * 5]
        assert rollout.valid[:, n].tolist() == [[1, 1, 0, 0, 0], [1] * 5, [1] * 5]
        # gymnasium's TimeLimit says truncated in the step in which task 1 ended; both flags are kept apart.
        assert rollout.truncated[:, n].tolist() == [[0] * 5, [0, 0, 0, 0, 1], [0, 0, 0, 0, 1]]
    torch.testing.assert_close(rollout.next_observations[0, :, 1, 0], torch.tensor([2.0, 2.0]), rtol=0, atol=0)
    for name, tensor in vars(rollout).items():
        assert not tensor[0, :, 2:].any(), name  # padding
    assert rollout.episode_returns().tolist() == [[[2.0], [2.0]], [[5.0], [5.0]], [[5.0], [5.0]]]
    assert rollout.env_steps == 2 * (2 + 5 + 5)


def test_an_environment_that_forgets_its_horizon_is_truncated_there():
    tasks, train = lines(2, ends_at={0: 5})
    tasks = tasks._replace(make=lambda task: Line(task, ends_at={0: 5}))  # without TimeLimit
    rollout = collect(SerialEnvs(tasks, 2), Scripted(), 0.0, train, 1, children(np.random.SeedSequence(0), len(train)))
    assert rollout.terminated[:, 0].tolist() == [[0, 0, 0, 0, 1], [0] * 5]
    assert rollout.truncated[:, 0].tolist() == [[0] * 5, [0, 0, 0, 0, 1]]


def test_an_episode_stops_at_the_horizon_of_its_own_task():
    tasks, train = lines(1)
    mixed = [train[0], dataclasses.replace(train[0], options={"horizon": 3})]
    rollout = collect(SerialEnvs(tasks, 4), Scripted(), 0.0, mixed, 2, children(np.random.SeedSequence(0), len(mixed)))
    for n in (0, 1):
        assert rollout.valid[:, n].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
        assert rollout.truncated[:, n].tolist() == [[0, 0, 0, 0, 1], [0, 0, 1, 0, 0]]


@pytest.mark.parametrize("episodes", [1, 3])
def test_what_happens_in_a_task_does_not_depend_on_the_horizons_of_others(episodes):
    tasks, train = lines(2)
    short, seeds = dataclasses.replace(train[0], options={"horizon": 3}), children(np.random.SeedSequence(0), 2)
    alone = collect(SerialEnvs(tasks, 2), Diary(episodes), None, [short], 2, seeds[:1])
    beside = collect(SerialEnvs(tasks, 4), Diary(episodes), None, [short, train[1]], 2, seeds)
    assert (alone.valid.shape[-1], beside.valid.shape[-1]) == (3 * episodes, 5 * episodes)
    for name, value in vars(alone).items():
        assert torch.equal(getattr(beside, name)[:1, :, : 3 * episodes].nan_to_num(), value.nan_to_num()), name


def test_a_rollout_is_as_long_as_its_longest_episode():
    rollout = run(2, 2, ends_at={0: 2, 1: 3})
    assert rollout.rewards.shape == (2, 2, 3)
    assert rollout.terminated[:, 0].tolist() == [[0, 1, 0], [0, 0, 1]]
    assert not rollout.truncated.any()


def test_success_at_any_step():
    rollout = run(3, 1, solved_at={0: 3, 1: 5, 2: 9})
    assert rollout.success[:, 0].tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 0, 1], [0] * 5]
    assert rollout.episode_success().tolist() == [[[1.0]], [[1.0]], [[0.0]]]
    assert run(1, 1).episode_success().isnan().all()


@pytest.mark.parametrize("breaks", ["reward", "observation"])
def test_a_broken_episode_is_dropped_whole(breaks):
    # One of four tasks breaks, in its first step or when it has gone on for a while.
    for step in (1, 4):
        rollout = run(4, 2, breaks_at={1: step}, breaks=breaks, solved_at={0: 1, 1: 1})
        assert rollout.valid.all(-1).tolist() == [[True] * 2, [False] * 2, [True] * 2, [True] * 2]
        for name, tensor in vars(rollout).items():
            assert not tensor[1].any(), name
            assert tensor.isfinite().all(), name
        expected = torch.tensor([[5.0, 5.0], [NAN, NAN], [5.0, 5.0], [5.0, 5.0]])
        torch.testing.assert_close(rollout.episode_returns(), expected[..., None], rtol=0, atol=0, equal_nan=True)
        success = torch.tensor([[1.0, 1.0], [NAN, NAN], [0.0, 0.0], [0.0, 0.0]])
        torch.testing.assert_close(rollout.episode_success(), success[..., None], rtol=0, atol=0, equal_nan=True)
        assert rollout.env_steps == 3 * 2 * 5


@pytest.mark.parametrize("max_envs", [4, 8])
def test_more_than_half_of_the_episodes_dropped_is_an_error(max_envs):
    half = run(4, 2, max_envs=max_envs, breaks_at={0: 2, 3: 5})
    assert half.episode_returns().isnan().any((1, 2)).tolist() == [True, False, False, True]
    with pytest.raises(BrokenRolloutsError, match="6 of 8 rollouts had a NaN") as caught:
        run(4, 2, max_envs=max_envs, breaks_at={0: 2, 1: 1, 3: 5})
    rollout = caught.value.rollout  # what is left of it can be looked at
    assert rollout.valid.tolist() == [[[n == 2] * 5] * 2 for n in range(4)]
    assert rollout.episode_returns().flatten().nan_to_num(-1).tolist() == [-1, -1, -1, -1, 5, 5, -1, -1]
    with pytest.raises(FloatingPointError, match="8 of 8") as caught:
        run(4, 2, max_envs=max_envs, breaks_at={0: 1, 1: 1, 2: 1, 3: 1})
    rollout = caught.value.rollout
    assert rollout.env_steps == 0 and rollout.rewards.shape == (4, 2, 1)
    assert rollout.episode_returns().isnan().all() and rollout.episode_success().isnan().all()


def test_a_broken_first_observation_is_dropped_too(monkeypatch):
    reset = Line.reset

    def broken(self, **arguments):
        observation, info = reset(self, **arguments)
        return (np.full(4, np.nan) if self.ends_at == 4 else observation), info

    monkeypatch.setattr(Line, "reset", broken)
    rollout = run(3, 1, ends_at={0: 4})
    assert rollout.observations.isfinite().all()
    assert rollout.valid.any(-1).tolist() == [[False], [True], [True]]


def test_a_number_beyond_float32_is_dropped_too():
    tasks, train = lines(3)
    huge = gymnasium.wrappers.TransformReward
    tasks = tasks._replace(make=lambda task: huge(Line(task), lambda reward: 1e39 if task.index == 0 else reward))
    with np.errstate(over="ignore"):
        rollout = collect(
            SerialEnvs(tasks, 3), Scripted(), 0.0, train, 1, children(np.random.SeedSequence(0), len(train))
        )
    assert rollout.rewards.isfinite().all()


def test_waves_do_not_change_the_result():
    together = run(3, 4, seed=2, max_envs=12, horizon=6, random=True)
    lengths = together.valid.sum(-1)
    assert set(lengths.unique().tolist()) == {0, 2, 4}  # dropped, early and late: the seed decides
    for max_envs in (3, 5, 6, 9, 20):  # waves of 1, 1, 2, 3 and then 1, and 4
        assert_same(run(3, 4, seed=2, max_envs=max_envs, horizon=6, random=True), together)


def test_equal_seeds_give_equal_rollouts_and_others_differ():
    first = run(2, 2, seed=1)
    torch.manual_seed(5)
    np.random.seed(5)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert_same(run(2, 2, seed=1), first)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)
    other = run(2, 2, seed=2)
    assert not (other.actions == first.actions).any()  # the noise
    assert not (other.observations[..., 1] == first.observations[..., 1]).any()  # the seeds of the environments


def test_noise_is_standard_normal_and_independent():
    actions = run(4, 25, horizon=50).actions  # 10,000 numbers
    assert abs(float(actions.mean())) < 0.05  # σ = 0.01
    assert abs(float(actions.std()) - 1.0) < 0.05
    assert len(actions.unique()) > 9_990


def test_too_many_tasks_are_refused():
    with pytest.raises(ValueError, match="3 tasks do not fit into 2 environments"):
        run(3, 1, max_envs=2)


def test_the_number_of_threads_is_restored_even_after_an_error():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        run(1, 1)
        assert torch.get_num_threads() == 2
        broken = Scripted()
        broken.act = None
        with pytest.raises(TypeError):
            run(1, 1, agent=broken)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_each_adaptation_step_gets_fresh_data():
    tasks, train = lines(2)
    agent = Scripted()
    rollouts = adapt_and_collect(
        LocalCollector(SerialEnvs(tasks, 4)), agent, train, 2, children(np.random.SeedSequence(0), len(train))
    )
    assert len(rollouts) == 3
    assert len(agent.adapted_on) == 2
    assert all(seen is rollout for seen, rollout in zip(agent.adapted_on, rollouts[:-1], strict=True))
    for k, rollout in enumerate(rollouts):  # collected in the state after k adaptations
        expected = (k + 0.01 * torch.arange(5.0)).expand(2, 2, 5)
        torch.testing.assert_close(rollout.log_probs, expected, rtol=0, atol=1e-6)
    for left, right in ((0, 1), (0, 2), (1, 2)):
        assert not (rollouts[left].actions == rollouts[right].actions).any()
        assert not (rollouts[left].observations[..., 1] == rollouts[right].observations[..., 1]).any()


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_number_of_adaptation_steps_may_be_given(steps):
    tasks, train = lines(2)
    agent, envs = Scripted(), SerialEnvs(tasks, 4)
    rollouts = adapt_and_collect(
        LocalCollector(envs), agent, train, 2, children(np.random.SeedSequence(0), len(train)), adaptation_steps=steps
    )
    assert (len(rollouts), len(agent.adapted_on)) == (steps + 1, steps)


def test_adapt_and_collect_repeats_itself_for_equal_seeds():
    tasks, train = lines(2, random=True, horizon=6)

    def rollouts(seed):
        return adapt_and_collect(
            LocalCollector(SerialEnvs(tasks, 8)),
            Scripted(),
            train,
            8,
            children(np.random.SeedSequence(seed), len(train)),
        )

    for left, right in zip(rollouts(3), rollouts(3), strict=True):
        assert_same(left, right)
    assert not torch.equal(rollouts(3)[0].actions, rollouts(4)[0].actions)
    with pytest.raises(ValueError, match="2 tasks do not fit into 1 environments"):
        adapt_and_collect(
            LocalCollector(SerialEnvs(tasks, 1)), Scripted(), train, 1, children(np.random.SeedSequence(0), len(train))
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "tasks",
    [
        distribution("metaworld", benchmark="custom", names=("reach-v3", "push-v3"), horizon=12),
        distribution("mujoco", name="HopperRandParams", horizon=40),
    ],
    ids=["metaworld", "mujoco"],
)
def test_the_number_of_workers_does_not_change_a_rollout(tasks):
    """5 rollouts of 3 tasks, 2 at a time, in lanes: waves of 6 environments over 0, 1, 2 and 4 processes."""
    chosen = [tasks.train_tasks[i] for i in (0, -1, 3)]
    rollouts = []
    for workers in (0, 1, 2, 4):
        envs = make_envs(tasks, 6, workers)
        sizes = (space.shape[0] for space in (envs.observation_space, envs.action_space))
        agent = build(MamlPpoConfig(), spec(*sizes))
        seeds = children(np.random.SeedSequence(1), 3)
        rollouts.append(collect(envs, agent, agent.initial_state(3), chosen, 5, seeds))
        envs.close()
    assert rollouts[0].env_steps > 100
    for other in rollouts[1:]:
        assert_same(other, rollouts[0])


# trials


class Diary:
    """Remembers how many steps it has lived (its log_prob), and records its inputs."""

    device = torch.device("cpu")
    adapts_by = "memory"
    adaptation_steps, noise_size = 0, 2

    def __init__(self, trial_episodes=3):
        self.trial_episodes = trial_episodes
        self.time_steps = []

    def act(self, time_step, noise, state):
        lived = torch.zeros(noise.shape[:2]) if state is None else state
        self.time_steps.append(time_step)
        return noise, lived, lived + time_step.active


def trial(num_tasks, rollouts=2, *, max_envs=None, agent=None, seed=0, **settings):
    tasks, train = lines(num_tasks, 4, **settings)
    envs = SerialEnvs(tasks, max_envs or num_tasks * rollouts)
    seeds = children(np.random.SeedSequence(seed), num_tasks)
    return collect(envs, agent or Diary(), None, train, rollouts, seeds)


@pytest.mark.parametrize("max_envs", [2, 4])
def test_the_memory_lives_through_a_trial_and_no_longer(max_envs):
    # Two trials a task, in one wave or in two; 3 episodes of 4 steps. The memory counts on, and begins anew.
    rollout = trial(2, max_envs=max_envs)
    assert rollout.valid.all() and rollout.log_probs.shape == (2, 2, 12)
    assert (rollout.log_probs == torch.arange(12.0)).all()
    assert rollout.episode_start.nonzero()[:, 2].tolist() == [0, 4, 8] * 4
    assert rollout.truncated.nonzero()[:, 2].tolist() == [3, 7, 11] * 4
    assert rollout.episode[0, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert rollout.episode_returns().tolist() == [[[4.0] * 3] * 2] * 2


def test_shorter_episodes_are_laid_end_to_end():
    # Task 1 ends at step 3, itself, while the other goes on: 3 · 3 steps and 3 of padding, behind them all.
    rollout = trial(2, rollouts=1, ends_at={1: 3}, solved_at={1: 2})
    assert rollout.valid[:, 0].tolist() == [[True] * 12, [True] * 9 + [False] * 3]
    assert rollout.log_probs[1, 0].tolist() == [*range(9), 0, 0, 0]  # its memory waits for the other
    assert rollout.terminated[1, 0].nonzero().flatten().tolist() == [2, 5, 8]
    assert rollout.episode_start[1, 0].nonzero().flatten().tolist() == [0, 3, 6]
    assert not rollout.truncated[1].any()
    elapsed = rollout.observations[..., 0]
    assert elapsed[1, 0].tolist() == [0, 1, 2] * 3 + [0, 0, 0]
    assert rollout.next_observations[1, 0, :, 0].tolist() == [1, 2, 3] * 3 + [0, 0, 0]  # the true last ones
    assert rollout.episode_success()[1, 0].tolist() == [1.0] * 3 and rollout.env_steps == 21


def test_an_agent_is_told_the_last_reward_and_where_episodes_begin():
    agent = Diary(2)
    trial(2, rollouts=1, agent=agent, ends_at={1: 3}, growing=True)
    assert len(agent.time_steps) == 8
    rewards, starts, active = (
        torch.stack([getattr(time_step, name)[:, 0] for time_step in agent.time_steps]).tolist()
        for name in ("rewards", "episode_start", "active")
    )
    assert str(rewards[0]) == "[nan, nan]"  # there was none
    assert [own for own, _ in rewards[1:]] == [1, 2, 3, 4, 1, 2, 3]  # also the last one of the episode before
    assert [own for _, own in rewards[1:4] + rewards[4:7]] == [1, 2, 3, 3, 1, 2]
    assert starts == [[i in (0, 4)] * 2 for i in range(8)]
    assert active == [[True, i not in (3, 7)] for i in range(8)]


def test_the_episodes_of_a_trial_differ_and_do_not_depend_on_the_environments():
    rollout = trial(3, random=True)
    for other in (trial(3, random=True, max_envs=3), trial(3, random=True, agent=Diary())):
        for name, tensor in vars(rollout).items():
            torch.testing.assert_close(getattr(other, name), tensor, equal_nan=True, msg=name)
    begun = rollout.observations[..., 1][rollout.episode_start]
    assert len(set(begun.tolist())) == len(begun)  # every episode has a seed of its own
    noise = rollout.actions[rollout.valid][:, 0]
    assert len(set(noise.tolist())) == len(noise)


def test_a_trial_with_a_broken_episode_is_dropped_whole():
    rollout = trial(3, rollouts=1, breaks_at={1: 3})
    assert rollout.valid.any(-1).flatten().tolist() == [True, False, True]
    for name, tensor in vars(rollout).items():
        assert not tensor[1].any(), name
    assert rollout.episode_returns()[1, 0].isnan().tolist() == [True] * 3
    # Of eight trials of two episodes some break in one of them only; the other one is not kept either.
    rollout = trial(1, rollouts=8, agent=Diary(2), random=True, seed=1)
    whole = rollout.valid.any(-1)[0]
    assert 4 <= whole.sum() < 8 and (rollout.episode_start.sum(-1)[0] == 2 * whole).all()


def test_by_phase_holds_for_rollouts_between_adaptations_and_for_episodes_of_a_trial():
    one, two = run(2, 3), run(2, 3, ends_at={1: 2})
    assert per_phase([one, two], lambda r: r.episode_returns()).tolist() == [[5.0, 5.0], [5.0, 2.0]]
    lived = trial(2, ends_at={1: 3}, breaks_at={})
    assert per_phase([lived], lambda r: r.episode_returns()).tolist() == [[4.0] * 3, [3.0] * 3]


class Counted(Diary):
    """A diary whose state begins with the number of its task, and which acts by it."""

    def initial_state(self, num_tasks):
        return torch.arange(float(num_tasks))[:, None]

    def act(self, time_step, noise, state):
        return noise + 100.0 * state[..., None], state.expand(time_step.rewards.shape), state


@pytest.mark.parametrize("rollouts", [1, 3])
def test_each_lane_acts_with_the_state_of_its_own_tasks(rollouts):
    # Three rollouts of each of 5 tasks are two lanes, of 1 and 2 of them.
    tasks, train = lines(5, 4)
    agent, seeds = Counted(2), children(np.random.SeedSequence(0), 5)
    results = []
    for lanes in (1, 2):
        envs = SerialEnvs(tasks, 5 * rollouts)
        envs.lanes = lanes
        results.append(collect(envs, agent, agent.initial_state(5), train, rollouts, seeds))
        expected = torch.arange(5.0)[:, None, None].expand(5, rollouts, 8)
        torch.testing.assert_close(results[-1].log_probs, expected, rtol=0, atol=0)
    for name, tensor in vars(results[0]).items():
        torch.testing.assert_close(getattr(results[1], name), tensor, rtol=0, atol=0, equal_nan=True, msg=name)
