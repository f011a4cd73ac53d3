"""collect(): where agents meet environments. The only caller of environments, and the only numpy → torch boundary."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from metarl.seeding import children
from metarl.types import Agent, BatchEnv, BoolArray, FloatArray, Rollout, Step, Task


def scale_actions(actions: FloatArray, low: FloatArray, high: FloatArray) -> FloatArray:
    """Map policy actions `[..., A]`, in which ±1 are the bounds, to the action space with bounds `[A]`."""
    return (high + low) / 2 + (high - low) / 2 * actions


def collect(
    envs: BatchEnv,
    agent: Agent,
    state: Any,
    tasks: Sequence[Task],
    rollouts_per_task: int,
    seeds: Sequence[np.random.SeedSequence],
) -> Rollout:
    """Run `rollouts_per_task` complete episodes of each task with the agent in `state`.

    Rollouts of a task beyond what fits into `envs.max_envs` run one after another, in waves. The number of workers does
    not change the result, that of environments changes it by rounding alone: the noise of every action and the seed of
    every episode are drawn beforehand. An episode with a NaN or infinite observation or reward is dropped: all its
    steps become invalid.

    Args:
        envs: at least M environments.
        agent: acts; nothing of it changes.
        state: of M tasks, from `initial_state` or `adapt`.
        tasks: M.
        rollouts_per_task: N.
        seeds: one a task, the only source of randomness.

    Returns:
        A rollout `[M, N, T, ...]` on the agent's device, moved there at once; T is the length of the longest episode,
        at most the tasks' horizon.

    Raises:
        ValueError: more tasks than environments.
        RuntimeError: more than half of the episodes had to be dropped.
    """
    if len(tasks) > envs.max_envs:
        raise ValueError(f"{len(tasks)} tasks do not fit into {envs.max_envs} environments; collect them in parts")
    horizon = max(int(task.option("horizon")) for task in tasks)
    shape = (len(tasks), rollouts_per_task, horizon)
    noise = torch.stack([_noise(task_seeds, *shape[1:], envs.action_space.shape[0]) for task_seeds in seeds])
    env_seeds = np.stack([task_seeds.generate_state(rollouts_per_task + 2, np.uint32)[2:] for task_seeds in seeds])
    recorder = _Recorder(shape, envs.observation_space.shape[0], envs.action_space.shape[0])
    in_flight = min(rollouts_per_task, envs.max_envs // len(tasks))
    with _one_thread():
        for start in range(0, rollouts_per_task, in_flight):
            wave = slice(start, min(start + in_flight, rollouts_per_task))
            _run_wave(envs, agent, state, tasks, noise[:, wave], env_seeds[:, wave], recorder, wave)
    return recorder.rollout().to(agent.device)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Act with one thread: on batches this small more only wait for each other, and the workers need the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _noise(seeds: np.random.SeedSequence, *shape: int) -> torch.Tensor:
    """Draw the noise of one task's actions `[N, T, A]`."""
    generator = torch.Generator().manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
    return torch.randn(*shape, generator=generator)


def _run_wave(
    envs: BatchEnv,
    agent: Agent,
    state: Any,
    tasks: Sequence[Task],
    noise: torch.Tensor,
    seeds: NDArray[Any],
    recorder: _Recorder,
    wave: slice,
) -> None:
    """Run P episodes of each task side by side: noise `[M, P, T, A]`, seeds `[M, P]`."""
    num_tasks, parallel, horizon, action_size = noise.shape
    low, high = envs.action_space.low.astype(np.float64), envs.action_space.high.astype(np.float64)
    observations = envs.reset([task for task in tasks for _ in range(parallel)], seeds.reshape(-1)).copy()
    active = np.ones(num_tasks * parallel, dtype=np.bool_)
    for t in range(horizon):
        inputs = torch.from_numpy(observations.reshape(num_tasks, parallel, -1)).float()
        actions, log_probs, state = agent.act(inputs, noise[:, :, t], state)
        scaled = scale_actions(np.clip(actions.double().numpy(), -1.0, 1.0), low, high)
        step = envs.step(scaled.reshape(-1, action_size), active)
        active = recorder.record(wave, t, observations, actions.numpy(), log_probs.numpy(), step, active)
        if not active.any():
            break
        observations = step.observations.copy()


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


class _Recorder:
    """Preallocated arrays of one rollout; float32, as the agent will read them."""

    def __init__(self, shape: tuple[int, int, int], observation_size: int, action_size: int) -> None:
        self._arrays = rollout_arrays(shape, observation_size, action_size)
        self._shape = shape

    def record(
        self,
        wave: slice,
        t: int,
        observations: FloatArray,
        actions: FloatArray,
        log_probs: FloatArray,
        step: Step,
        active: BoolArray,
    ) -> BoolArray:
        """Write step t of a wave; returns which environments go on, `[E]`."""
        numbers = np.concatenate([observations, step.observations, step.rewards[:, None]], axis=-1)
        sane: BoolArray = (np.abs(numbers) <= np.finfo(np.float32).max).all(-1)  # False for NaN, too
        written = active & sane
        truncated = step.truncated | ((t == self._shape[2] - 1) & ~step.terminated)
        self._put("observations", wave, t, observations, written)
        self._put("next_observations", wave, t, step.observations, written)
        self._put("actions", wave, t, actions, written)
        self._put("log_probs", wave, t, log_probs, written)
        self._put("rewards", wave, t, step.rewards, written)
        self._put("success", wave, t, step.success, written)
        self._put("terminated", wave, t, step.terminated, written)
        self._put("truncated", wave, t, truncated, written)
        self._put("episode_start", wave, t, np.full(len(active), t == 0), written)
        self._put("valid", wave, t, active, written)
        self._drop(wave, (active & ~sane).reshape(self._shape[0], -1))
        going_on: BoolArray = written & ~step.terminated & ~truncated
        return going_on

    def _put(self, name: str, wave: slice, t: int, values: np.ndarray[Any, Any], written: BoolArray) -> None:
        target = self._arrays[name][:, wave, t]
        values = values.reshape(target.shape)
        if written.all():
            target[...] = values
        else:
            mask = written.reshape(target.shape[:2])
            target[mask] = values[mask]

    def _drop(self, wave: slice, broken: BoolArray) -> None:
        if broken.any():
            for array in self._arrays.values():
                array[:, wave][broken] = 0

    def rollout(self) -> Rollout:
        """Return the rollout on the CPU, cut to its longest episode."""
        dropped = ~self._arrays["valid"].any(-1)
        if dropped.mean() > 0.5:
            raise RuntimeError(
                f"{int(dropped.sum())} of {dropped.size} episodes had a NaN or infinite observation or reward and were "
                "dropped; the environment is broken or the actions drive the simulation apart"
            )
        length = int(np.flatnonzero(self._arrays["valid"].any((0, 1)))[-1]) + 1
        return Rollout(**{name: torch.from_numpy(array[:, :, :length]) for name, array in self._arrays.items()})


def adapt_and_collect(
    envs: BatchEnv,
    agent: Agent,
    tasks: Sequence[Task],
    rollouts_per_task: int,
    seeds: Sequence[np.random.SeedSequence],
    adaptation_steps: int | None = None,
) -> list[Rollout]:
    """Collect before adaptation and after each step of it: the procedure of training and of evaluation alike.

    Args:
        envs: at least M environments.
        agent: adapts as it does in training, with exploring actions and fresh data for each step.
        tasks: M.
        rollouts_per_task: N.
        seeds: one a task, the only source of randomness: what happens in a task does not depend on the others.
        adaptation_steps: K; the agent's own if None.

    Returns:
        K + 1 rollouts.
    """
    steps = agent.adaptation_steps if adaptation_steps is None else adaptation_steps
    state = agent.initial_state(len(tasks))
    rollouts: list[Rollout] = []
    by_phase = zip(*(children(task_seeds, steps + 1) for task_seeds in seeds), strict=True)
    for phase_seeds in by_phase:
        if rollouts:
            state = agent.adapt(state, rollouts[-1])
        rollouts.append(collect(envs, agent, state, tasks, rollouts_per_task, phase_seeds))
    return rollouts
