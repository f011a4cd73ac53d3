"""The episode loop: the only place where an agent meets an environment, and where numpy becomes torch.

`collect` steps many environments together, for training and evaluation. `run_episode` steps one, for recording and
playing. Both ask the agent through `act`. No other module of metarl steps an environment.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from metarl.protocols import Actor, AdaptiveActor, BatchEnv, Collector, EpisodesLostError
from metarl.seeding import children
from metarl.types import BoolArray, FloatArray, Rollout, Step, Task, TimeStep

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


def scale_actions(actions: FloatArray, low: FloatArray, high: FloatArray) -> FloatArray:
    """Map policy actions `[..., A]`, in which ±1 are the bounds, to the action space with bounds `[A]`."""
    return (high + low) / 2 + (high - low) / 2 * actions


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
        Actions `[M, P, A]` as drawn, in which ±1 are the bounds; log-probabilities `[M, P]`; the next state.
    """
    time_step = TimeStep(*map(torch.from_numpy, (observations, rewards, episode_start, active)))
    return actor.act(time_step, noise, state)


class EnvStep(NamedTuple):
    """One step of a single environment."""

    observation: Any
    """Before the action; a copy."""
    action: Any
    """What the environment received."""
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


def run_episode(
    env: gymnasium.Env[Any, Any],
    choose: Callable[[Any, float, bool], Any],
    *,
    seed: int | None = None,
    reward: float = math.nan,
) -> Iterator[EnvStep]:
    """Run one episode of one environment, step by step.

    Args:
        env: its episodes must end (see `gymnasium.wrappers.TimeLimit`).
        choose: returns the action, in the units of the environment, for (observation, last reward, whether the episode
            begins).
        seed: of the reset.
        reward: of the last step before the episode, as an agent with a memory reads it; NaN: there was none.

    Yields:
        The steps, the last one terminated or truncated.
    """
    observation, _ = env.reset(seed=seed)
    start = True
    while True:
        before = np.array(observation)  # the environment may change its own array in place
        action = choose(observation, reward, start)
        observation, gained, terminated, truncated, info = env.step(action)
        reward, start = float(gained), False
        yield EnvStep(before, action, reward, bool(terminated), bool(truncated), info)
        if terminated or truncated:
            return


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
    episodes = actor.trial_episodes
    horizons = [int(task.option("horizon")) for task in tasks]
    shape = (len(tasks), rollouts_per_task, episodes * max(horizons))
    drawn = [_noise(*own, rollouts_per_task, episodes, actor.noise_size) for own in zip(seeds, horizons, strict=True)]
    noise = torch.stack([F.pad(own, (0, 0, 0, max(horizons) - own.shape[2])).flatten(1, 2) for own in drawn])
    # The first two words of each task's are the seed of its noise.
    words = [task_seeds.generate_state(rollouts_per_task * episodes + 2, np.uint32)[2:] for task_seeds in seeds]
    env_seeds = np.stack(words).reshape(*shape[:2], episodes)
    arrays = rollout_arrays(shape, envs.observation_space.shape[0], envs.action_space.shape[0])
    in_flight = min(rollouts_per_task, envs.max_envs // len(tasks))
    with _one_thread():
        for start in range(0, rollouts_per_task, in_flight):
            wave = slice(start, min(start + in_flight, rollouts_per_task))
            with_part = (noise[:, wave], env_seeds[:, wave], _part(arrays, wave))
            _despite_losses(functools.partial(_run_wave, envs, actor, state, tasks, *with_part))
    dropped = ~arrays["valid"].reshape(*shape[:2], episodes, -1).any(-1).all(-1)
    for array in arrays.values():
        array[dropped] = 0
    if episodes > 1:
        _close_gaps(arrays)
    length = int(arrays["valid"].any((0, 1)).sum())  # padding comes last
    whole = {name: torch.from_numpy(array[:, :, : max(1, length)]) for name, array in arrays.items()}
    rollout = Rollout(**whole)
    if dropped.mean() > 0.5:
        raise BrokenRolloutsError(
            f"{int(dropped.sum())} of {dropped.size} rollouts had a NaN or infinite observation, reward or action and "
            "were dropped; the environment is broken or the actions drive the simulation apart",
            rollout,
        )
    return rollout


def _despite_losses(run: Callable[[], None]) -> None:
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


def _close_gaps(arrays: dict[str, NDArray[Any]]) -> None:
    """Lay the episodes of each rollout end to end, where some were shorter than the horizon; padding comes last."""
    valid = arrays["valid"]
    if (valid[..., :-1] >= valid[..., 1:]).all():
        return
    order = np.argsort(~valid, axis=-1, kind="stable")
    for name, array in arrays.items():
        arrays[name] = np.take_along_axis(array, order.reshape(*order.shape, *[1] * (array.ndim - 3)), axis=2)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Act with one thread: on batches this small more only wait for each other, and the workers need the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _noise(seeds: np.random.SeedSequence, horizon: int, rollouts: int, episodes: int, size: int) -> torch.Tensor:
    """Draw the noise of one task's actions `[N, L, horizon, A]`; other tasks have no effect."""
    generator = torch.Generator().manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
    return torch.randn(rollouts, episodes, horizon, size, generator=generator)


def _part(arrays: dict[str, NDArray[Any]], rollouts: slice) -> dict[str, NDArray[Any]]:
    return {name: array[:, rollouts] for name, array in arrays.items()}


def _run_wave(
    envs: BatchEnv,
    actor: Actor,
    state: Any,
    tasks: Sequence[Task],
    noise: torch.Tensor,
    seeds: NDArray[Any],
    arrays: dict[str, NDArray[Any]],
) -> None:
    """Run P rollouts of each task side by side: noise `[M, P, T, A]`, seeds `[M, P, L]`; writes `[M, P, T, ...]`.

    The rollouts of each task are split into lanes. While the environments of one lane are stepped, the agent acts in
    the next; a single rollout is a single lane. (To split the tasks as well has been measured: for two cores and ten
    environments it is slower.) All begin an episode together, with the state and the last reward that the episode
    before has left to them.
    """
    num_tasks, parallel = noise.shape[:2]
    horizon = noise.shape[2] // seeds.shape[2]
    count = min(parallel, envs.lanes)
    lanes = [slice(parallel * i // count, parallel * (i + 1) // count) for i in range(count)]
    rows = [slice(num_tasks * lane.start, num_tasks * lane.stop) for lane in lanes]
    in_order = [task for lane in lanes for task in tasks for _ in range(lane.start, lane.stop)]
    low, high = envs.action_space.low.astype(np.float64), envs.action_space.high.astype(np.float64)
    states, rewards = [state] * count, [np.full(lane.stop - lane.start, np.nan, np.float32) for lane in rows]
    for episode in range(seeds.shape[2]):
        observations = envs.reset(in_order, np.concatenate([seeds[:, lane, episode].reshape(-1) for lane in lanes]))
        records = [
            _Episodes(horizon, observations[lane], len(low), last) for lane, last in zip(rows, rewards, strict=True)
        ]
        begin = episode * horizon
        for t in range(horizon + 1):
            for i, record in enumerate(records):
                if t > 0 and record.active.any():
                    record.write(t - 1, envs.step_wait(rows[i]))
                if t < horizon and record.active.any():
                    drawn = noise[:, lanes[i], begin + t]
                    actions, log_probs, states[i] = act(actor, *record.now(t, num_tasks), drawn, states[i])
                    record.write_actions(t, actions, log_probs)
                    if record.active.any():
                        scaled = scale_actions(np.clip(record.actions[t].astype(np.float64), -1.0, 1.0), low, high)
                        envs.step_async(rows[i], scaled, record.active)
        rewards = [record.last_rewards for record in records]
        for lane, record in zip(lanes, records, strict=True):
            for name, array in record.arrays().items():
                time_last = array.swapaxes(0, 1).reshape(num_tasks, -1, horizon, *array.shape[2:])
                arrays[name][:, lane, begin : begin + horizon] = time_last


def rollout_arrays(shape: tuple[int, int, int], observation_size: int, action_size: int) -> dict[str, NDArray[Any]]:
    """Return the arrays of a `Rollout` by name, all zero: nothing is valid yet.

    Args:
        shape: (M, N, T).
        observation_size: O.
        action_size: A.
    """
    last = {"observations": (observation_size,), "next_observations": (observation_size,), "actions": (action_size,)}
    floats = {name: np.zeros((*shape, *size), np.float32) for name, size in last.items()}
    floats |= {name: np.zeros(shape, np.float32) for name in ("rewards", "log_probs", "success")}
    flags = {name: np.zeros(shape, np.bool_) for name in ("terminated", "truncated", "episode_start", "valid")}
    return {**floats, **flags}


class _Episodes:
    """An episode of the E environments of a lane, `[T, E, ...]`: each step writes a row, in float32, as agents read it.

    Args:
        horizon: T.
        observations: `[E, O]`, of the reset.
        action_size: A.
        rewards: `[E]`, of the last step of the episode before; NaN if there was none.
    """

    def __init__(self, horizon: int, observations: FloatArray, action_size: int, rewards: NDArray[np.float32]) -> None:
        envs, observation_size = observations.shape
        self.observations = np.zeros((horizon + 1, envs, observation_size), np.float32)
        self.actions = np.zeros((horizon, envs, action_size), np.float32)
        self.rewards, self.log_probs, self.success = (np.zeros((horizon, envs), np.float32) for _ in range(3))
        self.terminated, self.truncated, self.valid = (np.zeros((horizon, envs), np.bool_) for _ in range(3))
        with np.errstate(over="ignore"):
            self.observations[0] = observations
        self.active: BoolArray = np.isfinite(self.observations[0]).all(-1)
        self.dropped = ~self.active
        self.last_rewards = rewards

    def now(self, t: int, num_tasks: int) -> tuple[NDArray[np.float32], NDArray[np.float32], BoolArray, BoolArray]:
        """Return what the agent reads before step t, `[M, P, …]`: observations, last rewards, starts, active."""
        observations = self.observations[t].reshape(num_tasks, -1, self.observations.shape[-1])
        shape = observations.shape[:2]
        return observations, self.last_rewards.reshape(shape), np.full(shape, t == 0), self.active.reshape(shape)

    def write_actions(self, t: int, actions: torch.Tensor, log_probs: torch.Tensor) -> None:
        """Write the actions of step t, and deactivate the environments whose action is not finite."""
        self.actions[t] = actions.reshape(self.actions.shape[1:])
        self.log_probs[t] = log_probs.reshape(-1)
        sane = np.isfinite(self.actions[t]).all(-1)
        if not sane.all():
            self.actions[t][~sane] = 0
            self.dropped |= self.active & ~sane
            self.active = self.active & sane

    def write(self, t: int, step: Step) -> None:
        """Write step t of the active environments, and deactivate those whose episode has ended or is broken."""
        with np.errstate(over="ignore"):
            self.observations[t + 1] = step.observations
            self.rewards[t] = step.rewards
        self.success[t], self.valid[t], self.terminated[t] = step.success, self.active, step.terminated
        self.truncated[t] = step.truncated | ~step.terminated if t + 1 == len(self.valid) else step.truncated
        self.last_rewards = np.where(self.active, self.rewards[t], self.last_rewards)
        sane = np.isfinite(self.observations[t + 1]).all(-1) & np.isfinite(self.rewards[t])
        self.dropped |= self.active & ~sane
        self.active = self.active & sane & ~step.terminated & ~self.truncated[t]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays of a `Rollout` by name, `[T, E, ...]`, with zeros where no step is valid."""
        valid = self.valid & ~self.dropped
        recorded = ("actions", "rewards", "log_probs", "success", "terminated", "truncated")
        arrays = {
            name: np.where(valid.reshape(*valid.shape, *[1] * (array.ndim - 2)), array, array.dtype.type(0))
            for name, array in (
                ("observations", self.observations[:-1]),
                ("next_observations", self.observations[1:]),
                *((name, getattr(self, name)) for name in recorded),
            )
        }
        episode_start = valid.copy()
        episode_start[1:] = False
        return {**arrays, "episode_start": episode_start, "valid": valid}


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
