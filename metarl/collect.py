"""The episode loop: the only place where an agent meets an environment, and where numpy becomes torch.

`collect` steps many environments together, for training and evaluation. `run_episode` steps one, for recording and
playing. Both ask the agent through `act`. No other module of metarl steps an environment.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from metarl.protocols import Actor, AdaptiveActor, BatchEnv, Collector, EpisodesLostError
from metarl.seeding import children
from metarl.spaces import CheckedEnv, Spaces
from metarl.types import BoolArray, Rollout, Step, Task, TimeStep

MAX_RESTARTS = 3
"""How often in a row the same episodes may lose the processes that step them."""


class BrokenRolloutsError(FloatingPointError):
    """More than half of the rollouts had to be dropped.

    Attributes:
        rollout: all of them, as `collect` would return them; the dropped ones are not valid.
    """

    def __init__(self, message: str, rollout: Rollout) -> None:
        super().__init__(message)
        self.rollout = rollout


def act(
    actor: Actor,
    observations: NDArray[np.float32],
    rewards: NDArray[np.float32],
    episode_start: BoolArray,
    active: BoolArray,
    noise: torch.Tensor,
    state: Any,
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Ask an agent for actions in P rollouts of each of M tasks.

    Args:
        actor: acts.
        observations: `[M, P, O]`, raw.
        rewards: `[M, P]`, of the last step; NaN where unknown.
        episode_start: `[M, P]`.
        active: `[M, P]`; elsewhere the episode has ended.
        noise: `[M, P, noise_size]`, standard normal.
        state: what the last call returned.

    Returns:
        Actions `[M, P, A]` as drawn, in policy units; log-probabilities `[M, P]`; the next state.
    """
    time_step = TimeStep(*map(torch.from_numpy, (observations, rewards, episode_start, active)))
    return actor.act(time_step, noise, state)


class EnvStep(NamedTuple):
    """One step of a single environment."""

    observation: NDArray[Any]
    """Before the action, `[O]`; a copy."""
    action: Any
    """What the environment received; a copy."""
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


def run_episode(
    env: CheckedEnv,
    choose: Callable[[NDArray[Any], float, bool], Any],
    *,
    seed: int | None = None,
    reward: float = math.nan,
) -> Iterator[EnvStep]:
    """Run one episode of one environment, step by step.

    Args:
        env: its episodes must end (see `gymnasium.wrappers.TimeLimit`).
        choose: returns the action, as the environment expects it (see `CheckedEnv.env_action`), for (observation `[O]`,
            last reward, whether the episode begins).
        seed: of the reset.
        reward: of the last step before the episode, as an agent with a memory reads it; NaN: there was none.

    Yields:
        The steps, the last one terminated or truncated.

    Raises:
        UserError: the environment returned something else than its spaces say.
    """
    observation, start = env.reset(seed), True
    while True:
        action = copy.copy(choose(observation, reward, start))
        result = env.step_raw(action)
        yield EnvStep(observation, action, result.reward, result.terminated, result.truncated, result.info)
        if result.terminated or result.truncated:
            return
        observation, reward, start = result.observation, result.reward, False


def collect(
    envs: BatchEnv,
    actor: Actor,
    state: Any,
    tasks: Sequence[Task],
    rollouts_per_task: int,
    seeds: Sequence[np.random.SeedSequence],
) -> Rollout:
    """Run `rollouts_per_task` rollouts of each task, of `actor.trial_episodes` episodes each, begun in `state`.

    Rollouts of a task beyond what fits into `envs.max_envs` run one after another, in waves. The number of workers does
    not change the result, that of environments changes it by rounding alone: the noise of every action and the seed of
    every episode are drawn beforehand. So nothing changes it either if a process that steps environments dies: the
    wave that lost it runs again from its beginning. A rollout with a NaN or infinite observation, reward or action is
    dropped: all its steps become invalid. Such an action is never taken.

    Args:
        envs: at least M environments.
        actor: acts; it does not change.
        state: of M tasks, from `initial_state` or `adapt`.
        tasks: M.
        rollouts_per_task: N.
        seeds: one a task, the only source of randomness.

    Returns:
        A rollout `[M, N, T, ...]` on the CPU; T is the length of the longest one, at most the tasks' horizon times L.

    Raises:
        ValueError: more tasks than environments.
        BrokenRolloutsError: more than half of the rollouts had to be dropped.
        RuntimeError: an environment raised; or a wave lost its processes more than `MAX_RESTARTS` times.
    """
    if len(tasks) > envs.max_envs:
        raise ValueError(f"{len(tasks)} tasks do not fit into {envs.max_envs} environments; collect them in parts")
    shape = len(tasks), rollouts_per_task, actor.trial_episodes
    # Of each episode the seed of its noise and that of its environment, which no other episode changes.
    words = [own.generate_state(2 * math.prod(shape[1:]), np.uint64) for own in seeds]
    of_episodes: NDArray[np.uint64] = np.array(words, np.uint64).reshape(*shape, 2)
    in_flight = min(rollouts_per_task, envs.max_envs // len(tasks))
    parts: list[_Part] = []
    with _one_thread():
        for start in range(0, rollouts_per_task, in_flight):
            wave = of_episodes[:, start : start + in_flight]
            parts += _despite_losses(functools.partial(_run_wave, envs, actor, state, tasks, wave, start))
    arrays, dropped = _assemble(parts, shape, envs.spaces)
    _settle_success(arrays["success"], arrays["valid"], tasks)
    rollout = Rollout(**{name: torch.from_numpy(array) for name, array in arrays.items()})
    if dropped.mean() > 0.5:
        raise BrokenRolloutsError(
            f"{int(dropped.sum())} of {dropped.size} rollouts had a NaN or infinite observation, reward or action and "
            "were dropped; the environment is broken or the actions drive the simulation apart",
            rollout,
        )
    return rollout


def _despite_losses(run: Callable[[], list[_Part]]) -> list[_Part]:
    """Run again what loses the processes that step its environments; raises RuntimeError after `MAX_RESTARTS`."""
    for _ in range(MAX_RESTARTS + 1):
        try:
            return run()
        except EpisodesLostError as error:
            lost = error
    raise RuntimeError(
        f"{lost}, after {MAX_RESTARTS} restarts in a row; look at the environment: with --num-workers 0 it runs in the "
        "main process and shows its own error"
    ) from lost


class _Part(NamedTuple):
    """One episode of some rollouts of each task."""

    rollouts: slice
    episode: int
    arrays: dict[str, NDArray[Any]]  # of a `Rollout`, [M, p, T', ...], T' the steps of the longest episode


def _assemble(
    parts: list[_Part], shape: tuple[int, int, int], spaces: Spaces
) -> tuple[dict[str, NDArray[Any]], BoolArray]:
    """Lay the episodes of each rollout end to end; returns the arrays of a `Rollout`, and which `[M, N]` are dropped.

    Args:
        parts: all episodes; freed one by one.
        shape: (M, N, L).
        spaces: of the environments.
    """
    lengths = np.zeros(shape, np.int64)
    for part in parts:
        lengths[:, part.rollouts, part.episode] = part.arrays["valid"].sum(-1)
    dropped: BoolArray = (lengths == 0).any(-1)
    lengths[dropped] = 0
    begins = lengths.cumsum(-1) - lengths
    steps = max(1, int(lengths.sum(-1).max()))
    arrays = rollout_arrays((*shape[:2], steps), shape[2], spaces)
    while parts:
        rollouts, episode, own = parts.pop()
        finals = own.pop("final_observations")
        finals[dropped[:, rollouts]] = 0
        arrays["final_observations"][:, rollouts, episode] = finals
        begin = begins[:, rollouts, episode]
        task, rollout, step = (own["valid"] & ~dropped[:, rollouts, None]).nonzero()
        to = task, rollout + rollouts.start, begin[task, rollout] + step
        if len(task) == own["valid"].size and (begin == begin[0, 0]).all():  # all have the same place: copy at once
            first = int(begin[0, 0])
            for name, array in own.items():
                arrays[name][:, rollouts, first : first + array.shape[2]] = array
        else:
            for name, array in own.items():
                arrays[name][to] = array[task, rollout, step]
    return arrays, dropped


def _settle_success(success: NDArray[np.float32], valid: BoolArray, tasks: Sequence[Task]) -> None:
    """Set success to 0, in place, where an environment leaves it out though others of its class say it.

    Many environments report success only in the step that reaches it.
    """
    classes = [(task.family, task.benchmark, task.name) for task in tasks]
    left_out = valid & np.isnan(success)
    if not left_out.any():
        return
    for name in set(classes):
        own = np.array([other == name for other in classes])
        if (valid[own] & ~left_out[own]).any():
            success[own] = np.where(left_out[own], np.float32(0), success[own])


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Act with one thread: on batches this small more only wait for each other, and the workers need the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Noise:
    """The noise of the actions of one episode in each of M · P environments, drawn as steps need it.

    Args:
        seeds: `[M, P]`, of the episodes.
        size: numbers that an action takes.
    """

    BLOCK = 64
    """Steps drawn at once; always all of them, since how many are drawn together changes the numbers."""

    def __init__(self, seeds: NDArray[np.uint64], size: int) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds.reshape(-1).tolist()]
        self._block = torch.zeros(len(self._generators), self.BLOCK, size)
        self._shape = seeds.shape

    def __call__(self, t: int, active: BoolArray) -> torch.Tensor:
        """Return the noise of step t, `[M, P, size]`; t counts up from 0. Where not `active` `[M · P]` it is stale."""
        place = t % self.BLOCK
        if place == 0:
            for row in active.nonzero()[0].tolist():
                self._block[row].normal_(generator=self._generators[row])
        return self._block[:, place].view(*self._shape, -1)


def _run_wave(
    envs: BatchEnv, actor: Actor, state: Any, tasks: Sequence[Task], seeds: NDArray[np.uint64], first: int
) -> list[_Part]:
    """Run P rollouts of each task side by side, with seeds `[M, P, L, 2]` of noise and environment.

    The rollouts of each task are split into lanes. While the environments of one lane are stepped, the agent acts in
    the next; a single rollout is a single lane. (To split the tasks as well has been measured: for two cores and ten
    environments it is slower.) All begin an episode together, with the state and the last reward that the episode
    before has left to them. `first` is the number of the first rollout among all of them.
    """
    num_tasks, parallel, episodes = seeds.shape[:3]
    horizons = np.array([task.option("horizon") for task in tasks])
    count = min(parallel, envs.lanes)
    lanes = [slice(parallel * i // count, parallel * (i + 1) // count) for i in range(count)]
    rows = [slice(num_tasks * lane.start, num_tasks * lane.stop) for lane in lanes]
    in_order = [task for lane in lanes for task in tasks for _ in range(lane.start, lane.stop)]
    env_seeds = (seeds[..., 1] >> 33).astype(np.uint32)  # simulators keep seeds in signed 32-bit integers
    states, rewards = [state] * count, [np.full(lane.stop - lane.start, np.nan, np.float32) for lane in rows]
    parts: list[_Part] = []
    for episode in range(episodes):
        observations = envs.reset(in_order, np.concatenate([env_seeds[:, lane, episode].reshape(-1) for lane in lanes]))
        records = [
            _Episodes(np.repeat(horizons, lane.stop - lane.start), observations[row], envs.spaces, last)
            for lane, row, last in zip(lanes, rows, rewards, strict=True)
        ]
        noise = [_Noise(seeds[:, lane, episode, 0], actor.noise_size) for lane in lanes]
        t = 0
        while any(record.active.any() for record in records):
            for i, record in enumerate(records):
                if t > 0 and record.active.any():
                    record.write(t - 1, envs.step_wait(rows[i]))
                if record.active.any():
                    now = record.now(t, num_tasks)
                    actions, log_probs, states[i] = act(actor, *now, noise[i](t, record.active), states[i])
                    record.write_actions(t, actions, log_probs)
                    if record.active.any():
                        envs.step_async(rows[i], record.actions[t], record.active)
            t += 1
        rewards = [record.last_rewards for record in records]
        for lane, record in zip(lanes, records, strict=True):
            own = {
                name: array.swapaxes(0, 1).reshape(num_tasks, lane.stop - lane.start, len(array), *array.shape[2:])
                for name, array in record.arrays().items()
            }
            own["final_observations"] = record.final_observations().reshape(num_tasks, lane.stop - lane.start, -1)
            parts.append(_Part(slice(first + lane.start, first + lane.stop), episode, own))
    return parts


def rollout_arrays(shape: tuple[int, int, int], episodes: int, spaces: Spaces) -> dict[str, NDArray[Any]]:
    """Return the arrays of a `Rollout` by name, all zero: nothing is valid yet.

    Args:
        shape: (M, N, T).
        episodes: L.
        spaces: of the environments.
    """
    size, dtype = spaces.observation_size, spaces.observation_dtype
    floats: dict[str, NDArray[Any]] = {"observations": np.zeros((*shape, size), dtype)}
    floats["final_observations"] = np.zeros((*shape[:2], episodes, size), dtype)
    floats["actions"] = np.zeros((*shape, spaces.action_size), np.float32)
    floats |= {name: np.zeros(shape, np.float32) for name in ("rewards", "log_probs", "success")}
    flags = {name: np.zeros(shape, np.bool_) for name in ("terminated", "truncated", "episode_start", "valid")}
    return {**floats, **flags}


class _Episodes:
    """An episode of the E environments of a lane, `[T, E, ...]`, as agents read it: each step writes a row.

    The arrays grow with the steps, not with the horizon.

    Args:
        horizons: `[E]`.
        observations: `[E, O]`, of the reset.
        spaces: of the environments.
        rewards: `[E]`, of the last step of the episode before; NaN if there was none.
    """

    def __init__(
        self, horizons: NDArray[np.int64], observations: NDArray[Any], spaces: Spaces, rewards: NDArray[np.float32]
    ) -> None:
        envs, self._horizons = len(observations), horizons
        steps = min(int(horizons.max()), 128)
        self.observations = np.zeros((steps + 1, envs, spaces.observation_size), spaces.observation_dtype)
        self.actions = np.zeros((steps, envs, spaces.action_size), np.float32)
        self.rewards, self.log_probs, self.success = (np.zeros((steps, envs), np.float32) for _ in range(3))
        self.terminated, self.truncated, self.valid = (np.zeros((steps, envs), np.bool_) for _ in range(3))
        with np.errstate(over="ignore"):
            self.observations[0] = observations
        self.active: BoolArray = np.isfinite(self.observations[0]).all(-1)
        self.dropped = ~self.active
        self.last_rewards = rewards

    def now(self, t: int, num_tasks: int) -> tuple[NDArray[Any], NDArray[np.float32], BoolArray, BoolArray]:
        """Return what the agent reads before step t, `[M, P, …]`: observations, last rewards, starts, active."""
        observations = self.observations[t].reshape(num_tasks, -1, self.observations.shape[-1])
        shape = observations.shape[:2]
        return observations, self.last_rewards.reshape(shape), np.full(shape, t == 0), self.active.reshape(shape)

    def write_actions(self, t: int, actions: torch.Tensor, log_probs: torch.Tensor) -> None:
        """Write the actions of step t, and deactivate the environments whose action is not finite."""
        if t == len(self.valid):
            self._grow()
        self.actions[t] = actions.reshape(self.actions.shape[1:])
        self.log_probs[t] = log_probs.reshape(-1)
        sane = np.isfinite(self.actions[t]).all(-1)
        if not sane.all():
            self.actions[t][~sane] = 0
            self.dropped |= self.active & ~sane
            self.active = self.active & sane

    def _grow(self) -> None:
        """Make room for twice as many steps."""
        for name, array in vars(self).items():
            if name in ("observations", *self._RECORDED, "valid"):
                more = np.zeros((len(self.valid), *array.shape[1:]), array.dtype)
                setattr(self, name, np.concatenate([array, more]))

    def write(self, t: int, step: Step) -> None:
        """Write step t of the active environments, and deactivate those whose episode has ended or is broken."""
        with np.errstate(over="ignore"):
            self.observations[t + 1] = step.observations
            self.rewards[t] = step.rewards
        self.success[t], self.valid[t], self.terminated[t] = step.success, self.active, step.terminated
        self.truncated[t] = step.truncated | ((t + 1 >= self._horizons) & ~step.terminated)
        self.last_rewards = np.where(self.active, self.rewards[t], self.last_rewards)
        sane = np.isfinite(self.observations[t + 1]).all(-1) & np.isfinite(self.rewards[t])
        self.dropped |= self.active & ~sane
        self.active = self.active & sane & ~step.terminated & ~self.truncated[t]

    _RECORDED = ("actions", "rewards", "log_probs", "success", "terminated", "truncated")

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return arrays of a `Rollout` by name, `[T, E, ...]`, with zeros where no step is valid."""
        steps = int(self.valid.any(-1).sum())
        valid = self.valid[:steps] & ~self.dropped
        recorded = [(name, getattr(self, name)[:steps]) for name in ("observations", *self._RECORDED)]
        arrays = {
            name: np.where(valid.reshape(*valid.shape, *[1] * (array.ndim - 2)), array, array.dtype.type(0))
            for name, array in recorded
        }
        episode_start = valid.copy()
        episode_start[1:] = False
        return {**arrays, "episode_start": episode_start, "valid": valid}

    def final_observations(self) -> NDArray[Any]:
        """Return the observation after the last step of each environment, `[E, O]`."""
        final: NDArray[Any] = self.observations[self.valid.sum(0), np.arange(self.valid.shape[1])]
        return final


class LocalCollector:
    """Collects in this process and its workers; a `Collector`.

    Args:
        envs: what is stepped; closed with the collector.
    """

    def __init__(self, envs: BatchEnv) -> None:
        self.envs, self.max_tasks = envs, envs.max_envs

    @property
    def restarts(self) -> int:
        """See `Collector`."""
        return int(getattr(self.envs, "restarts", 0))

    def collect(
        self,
        agent: AdaptiveActor,
        state: Any,
        tasks: Sequence[Task],
        rollouts_per_task: int,
        seeds: Sequence[np.random.SeedSequence],
    ) -> Rollout:
        """See `Collector.collect`."""
        return collect(self.envs, agent, state, tasks, rollouts_per_task, seeds).to(agent.device)

    def close(self) -> None:
        """See `Collector.close`."""
        self.envs.close()


def adapt_and_collect(
    collector: Collector,
    agent: AdaptiveActor,
    tasks: Sequence[Task],
    rollouts_per_task: int,
    seeds: Sequence[np.random.SeedSequence],
    adaptation_steps: int | None = None,
) -> list[Rollout]:
    """Collect before adaptation and after each step of it: the procedure of training and of evaluation alike.

    Args:
        collector: takes at least M tasks.
        agent: adapts as it does in training, with exploring actions and fresh data for each step.
        tasks: M.
        rollouts_per_task: N.
        seeds: one for each task, the only source of randomness: what happens in a task does not depend on the others.
        adaptation_steps: K; the agent's own if None.

    Returns:
        K + 1 rollouts.
    """
    steps = agent.adaptation_steps if adaptation_steps is None else adaptation_steps
    state = agent.initial_state(len(tasks))
    rollouts: list[Rollout] = []
    seeds_of_phases = zip(*(children(task_seeds, steps + 1) for task_seeds in seeds), strict=True)
    for phase_seeds in seeds_of_phases:
        if rollouts:
            state = agent.adapt(state, rollouts[-1])
        rollouts.append(collector.collect(agent, state, tasks, rollouts_per_task, phase_seeds))
    return rollouts


def per_phase(rollouts: Sequence[Rollout], measure: Callable[[Rollout], torch.Tensor]) -> torch.Tensor:
    """Return how each task went before adaptation, and after each part of it, `[M, phases]`.

    A phase is one of the rollouts between which an agent adapts, or one episode of a trial; the shapes alone
    say which.

    Args:
        rollouts: K + 1.
        measure: of episodes, `[M, N, L]`; NaN is left out of the mean over N.
    """
    return torch.cat([measure(rollout).nanmean(1) for rollout in rollouts], -1)
