"""The environments of one process and the arrays that they read and write.

`serial` and `workers` decide which process owns which environments, and whether processes share the arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import DTypeLike, NDArray

from metarl.protocols import TaskDistribution
from metarl.types import BoolArray, FloatArray, Step, Task

LANES = 2
"""One lane of environments steps while actions are computed for the other (if a task has two episodes or more)."""

POOL = 400
"""Minimum total capacity of the pools of all processes, in environments, in use or idle. Building one takes long and
keeping it is cheap: 3.2 MB for a Meta-World environment, under 1 MB for a MuJoCo one."""


def env_spaces(distribution: TaskDistribution) -> tuple[gymnasium.spaces.Box, gymnasium.spaces.Box]:
    """Return the observation and action space; raises ValueError unless both are one-dimensional, actions bounded."""
    env = distribution.make(distribution.train_tasks[0])
    observation_space, action_space = env.observation_space, env.action_space
    env.close()
    if not isinstance(observation_space, gymnasium.spaces.Box) or len(observation_space.shape) != 1:
        raise ValueError(f"observation space is {observation_space}; expected a one-dimensional Box: flatten it")
    if not isinstance(action_space, gymnasium.spaces.Box) or len(action_space.shape) != 1:
        raise ValueError(f"action space is {action_space}; expected a one-dimensional Box: flatten it")
    if not (np.isfinite(action_space.low).all() and np.isfinite(action_space.high).all()):
        raise ValueError(f"action space is {action_space}; expected finite bounds, since actions are scaled to them")
    return observation_space, action_space


@dataclass(frozen=True)
class Buffers:
    """Arrays that E environments read and write; shared between processes if there are workers."""

    observations: FloatArray  # [E, O]
    actions: NDArray[np.float32]  # [E, A]
    rewards: FloatArray  # [E]
    success: FloatArray  # [E]
    terminated: BoolArray  # [E]
    truncated: BoolArray  # [E]
    active: BoolArray  # [E]
    progress: NDArray[np.int64]  # [processes], counts the environments built, reset and stepped by each process

    @staticmethod
    def shapes(
        envs: int, observation_size: int, action_size: int, processes: int = 1
    ) -> dict[str, tuple[tuple[int, ...], DTypeLike]]:
        """Return the shape and dtype of each array, by name."""
        return {
            "observations": ((envs, observation_size), np.float64),
            "actions": ((envs, action_size), np.float32),
            "rewards": ((envs,), np.float64),
            "success": ((envs,), np.float64),
            "terminated": ((envs,), np.bool_),
            "truncated": ((envs,), np.bool_),
            "active": ((envs,), np.bool_),
            "progress": ((processes,), np.int64),
        }

    @classmethod
    def view(cls, memory: dict[str, Any], shapes: dict[str, tuple[tuple[int, ...], DTypeLike]]) -> Buffers:
        """Return arrays backed by `memory`, which has one writable byte buffer for each array."""
        return cls(
            **{name: np.frombuffer(memory[name], dtype).reshape(shape) for name, (shape, dtype) in shapes.items()}
        )

    def step(self, rows: slice) -> Step:
        """Return the results of the environments `rows`, as views."""
        return Step(
            self.observations[rows], self.rewards[rows], self.terminated[rows], self.truncated[rows], self.success[rows]
        )


class EnvPool:
    """The environments of one process: those in use, in order, and idle ones to reuse for other tasks.

    Process `first` of `stride` owns the environments `first`, `first + stride`, `first + 2 · stride`, …

    Args:
        distribution: the task distribution, which builds the environments.
        buffers: the arrays of all processes.
        pool_size: the number of environments to keep, in use or idle; more are kept only if more are in use.
        first: the index of the process, and of its first environment.
        stride: the number of processes.
    """

    def __init__(
        self, distribution: TaskDistribution, buffers: Buffers, pool_size: int, first: int = 0, stride: int = 1
    ) -> None:
        self._distribution, self._buffers, self._pool_size = distribution, buffers, pool_size
        self._first, self._stride = first, stride
        self._done = 0
        self._report_progress()
        self._used: list[tuple[Task, gymnasium.Env[Any, Any]]] = []
        self._idle: list[tuple[Task, gymnasium.Env[Any, Any]]] = []  # least recently used first

    def assign(self, tasks: Sequence[Task]) -> None:
        """Bring one environment per task into use, in order."""
        if [task for task, _ in self._used] == list(tasks):
            return
        for task, env in self._used:
            if hasattr(env.unwrapped, "set_task"):
                self._idle.append((task, env))
            else:
                env.close()
        self._used = []
        for task in tasks:
            self._used.append((task, self._take(task)))
            self._report_progress()
        surplus = max(0, len(self._used) + len(self._idle) - self._pool_size)
        for _, env in self._idle[:surplus]:
            env.close()
        del self._idle[:surplus]

    def _take(self, task: Task) -> gymnasium.Env[Any, Any]:
        kind = (task.family, task.benchmark, task.name, task.options)
        for i, (other, env) in enumerate(self._idle):
            if (other.family, other.benchmark, other.name, other.options) == kind:
                del self._idle[i]
                env.unwrapped.set_task(task)  # type: ignore[attr-defined]
                return env
        return self._distribution.make(task)

    def _report_progress(self) -> None:
        """Increment the progress counter of this process; the first call reports that it has started."""
        self._done += 1
        self._buffers.progress[self._first] = self._done

    def reset(self, seeds: NDArray[np.uint32]) -> None:
        """Reset the environments in use with `seeds`, in order; write observations to the buffers."""
        for i, (_, env) in enumerate(self._used):
            self._buffers.observations[self._first + i * self._stride] = env.reset(seed=int(seeds[i]))[0]
            self._report_progress()

    def step(self, start: int, stop: int) -> None:
        """Step the active environments from `start` to `stop`, from the actions to the results in the buffers."""
        buffers = self._buffers
        owned = range(self._first, self._first + len(self._used) * self._stride, self._stride)
        skipped = max(0, -(-(start - self._first) // self._stride))
        for i, (_, env) in zip(owned[skipped:], self._used[skipped:], strict=True):
            if i >= stop:
                break
            if buffers.active[i]:
                try:
                    observation, reward, terminated, truncated, info = env.step(buffers.actions[i].copy())
                except FloatingPointError:  # the physics diverged: the caller drops an episode with NaN
                    buffers.rewards[i] = np.nan
                    self._report_progress()
                    continue
                self._report_progress()
                buffers.observations[i] = observation
                buffers.rewards[i] = reward
                buffers.terminated[i] = terminated
                buffers.truncated[i] = truncated
                buffers.success[i] = info.get("success", np.nan)

    def close(self) -> None:
        """Close all environments of the process, in use and idle."""
        for _, env in self._used + self._idle:
            env.close()
        self._used, self._idle = [], []
