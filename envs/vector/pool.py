"""The environments of one process and the arrays that they read and write.

Which process has which environments, and whether others share the arrays, is up to `vector` and `workers`.
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
"""While the environments of one lane are stepped, actions are computed for the other (if a task has two episodes)."""

POOL = 400
"""Environments that all processes keep together at least, in use or idle, since building one takes longer than the
memory is worth (3.2 MB for a Meta-World environment, under 1 MB for a MuJoCo one)."""


def env_spaces(distribution: TaskDistribution) -> tuple[gymnasium.spaces.Box, gymnasium.spaces.Box]:
    """Return the observation and action space; raises ValueError for any but flat boxes with bounded actions."""
    env = distribution.make(distribution.train_tasks[0])
    observation_space, action_space = env.observation_space, env.action_space
    env.close()
    if not isinstance(observation_space, gymnasium.spaces.Box) or len(observation_space.shape) != 1:
        raise ValueError(f"observation space is {observation_space}; expected a Box of one dimension: flatten it")
    if not isinstance(action_space, gymnasium.spaces.Box) or len(action_space.shape) != 1:
        raise ValueError(f"action space is {action_space}; expected a Box of one dimension")
    if not (np.isfinite(action_space.low).all() and np.isfinite(action_space.high).all()):
        raise ValueError(f"action space is {action_space}; expected finite bounds, to which actions are scaled")
    return observation_space, action_space


@dataclass(frozen=True)
class Buffers:
    """The arrays that E environments read and write; shared between processes if there are workers."""

    observations: FloatArray  # [E, O]
    actions: NDArray[np.float32]  # [E, A]
    rewards: FloatArray  # [E]
    success: FloatArray  # [E]
    terminated: BoolArray  # [E]
    truncated: BoolArray  # [E]
    active: BoolArray  # [E]
    progress: NDArray[np.int64]  # [processes], grows with each environment that is built, reset or stepped there

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
        """Return arrays over `memory`, one writable buffer of bytes each."""
        return cls(
            **{name: np.frombuffer(memory[name], dtype).reshape(shape) for name, (shape, dtype) in shapes.items()}
        )

    def step(self, rows: slice) -> Step:
        """Return views of the environments `rows`."""
        return Step(
            self.observations[rows], self.rewards[rows], self.terminated[rows], self.truncated[rows], self.success[rows]
        )


class EnvPool:
    """The environments of one process: those in use, in order, and a pool of idle ones to retarget.

    The process has every `stride`-th of all environments in use, from `first` on, which is its number, too.

    Args:
        distribution: builds them.
        buffers: of the environments of all processes.
        pool_size: how many this process keeps, in use or idle; those in use are never fewer than its tasks.
        first: the number of the process, and of its first environment.
        stride: the number of processes.
    """

    def __init__(
        self, distribution: TaskDistribution, buffers: Buffers, pool_size: int, first: int = 0, stride: int = 1
    ) -> None:
        self._distribution, self._buffers, self._pool_size = distribution, buffers, pool_size
        self._first, self._stride = first, stride
        self._done = 0
        self._progress()
        self._used: list[tuple[Task, gymnasium.Env[Any, Any]]] = []
        self._idle: list[tuple[Task, gymnasium.Env[Any, Any]]] = []  # the longest unused first

    def assign(self, tasks: Sequence[Task]) -> None:
        """Have one environment for each task."""
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
            self._progress()
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

    def _progress(self) -> None:
        """Say that something has been done; from the first time on the process has started."""
        self._done += 1
        self._buffers.progress[self._first] = self._done

    def reset(self, seeds: NDArray[np.uint32]) -> None:
        """Reset all that this process has, its seeds in order; observations go to the buffers."""
        for i, (_, env) in enumerate(self._used):
            self._buffers.observations[self._first + i * self._stride] = env.reset(seed=int(seeds[i]))[0]
            self._progress()

    def step(self, start: int, stop: int) -> None:
        """Step those of `start` to `stop` that are active with the actions in the buffers; results go there, too."""
        buffers = self._buffers
        mine = range(self._first, self._first + len(self._used) * self._stride, self._stride)
        skipped = max(0, -(-(start - self._first) // self._stride))
        for i, (_, env) in zip(mine[skipped:], self._used[skipped:], strict=True):
            if i >= stop:
                break
            if buffers.active[i]:
                try:
                    observation, reward, terminated, truncated, info = env.step(buffers.actions[i].copy())
                except FloatingPointError:  # the physics diverged; NaN tells the caller to drop the episode
                    buffers.rewards[i] = np.nan
                    self._progress()
                    continue
                self._progress()
                buffers.observations[i] = observation
                buffers.rewards[i] = reward
                buffers.terminated[i] = terminated
                buffers.truncated[i] = truncated
                buffers.success[i] = info.get("success", np.nan)

    def close(self) -> None:
        """Close all that the process has, those in use and idle ones."""
        for _, env in self._used + self._idle:
            env.close()
        self._used, self._idle = [], []
