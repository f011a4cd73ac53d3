"""The environments of one process and the arrays that they read and write.

`serial` and `workers` decide which process owns which environments, and whether processes share the arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from metarl.errors import PhysicsDivergedError, UserError
from metarl.protocols import TaskDistribution
from metarl.spaces import CheckedEnv, Spaces, described
from metarl.types import BoolArray, FloatArray, Step, Task

LANES = 2
"""One lane of environments steps while actions are computed for the other (if a task has two episodes or more)."""

POOL = 400
"""Minimum total capacity of the pools of all processes, in environments, in use or idle. Building one takes long and
keeping it is cheap: 3.2 MB for a Meta-World environment, under 1 MB for a MuJoCo one."""


def env_spaces(distribution: TaskDistribution) -> Spaces:
    """Return the spaces of the first training task's environment; raises UserError for those agents cannot have."""
    env = CheckedEnv(distribution.make(distribution.train_tasks[0]), distribution.train_tasks[0])
    env.close()
    return env.spaces


@dataclass(frozen=True)
class Buffers:
    """Arrays that E environments read and write; shared between processes if there are workers."""

    observations: NDArray[Any]  # [E, O], float64 or, of images, uint8
    actions: NDArray[np.float32]  # [E, A], in policy units
    rewards: FloatArray  # [E]
    success: FloatArray  # [E]
    terminated: BoolArray  # [E]
    truncated: BoolArray  # [E]
    active: BoolArray  # [E]
    progress: NDArray[np.int64]  # [processes], counts the environments built, reset and stepped by each process

    @staticmethod
    def shapes(envs: int, spaces: Spaces, processes: int = 1) -> dict[str, tuple[tuple[int, ...], DTypeLike]]:
        """Return the shape and dtype of each array, by name."""
        return {
            "observations": ((envs, spaces.observation_size), np.float64 if spaces.image is None else np.uint8),
            "actions": ((envs, spaces.action_size), np.float32),
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
        distribution: the task distribution, which builds the environments and may reuse them (`retarget`).
        spaces: what each environment must have; bounds of actions may differ.
        buffers: the arrays of all processes.
        pool_size: the number of environments to keep, in use or idle; more are kept only if more are in use.
        first: the index of the process, and of its first environment.
        stride: the number of processes.

    Raises:
        UserError: an environment has other spaces, or returned something else than they say.
    """

    def __init__(
        self,
        distribution: TaskDistribution,
        spaces: Spaces,
        buffers: Buffers,
        pool_size: int,
        first: int = 0,
        stride: int = 1,
    ) -> None:
        self._distribution, self._spaces, self._buffers, self._pool_size = distribution, spaces, buffers, pool_size
        self._retarget = getattr(distribution, "retarget", None)
        self._first, self._stride = first, stride
        self._done = 0
        self._report_progress()
        self._used: list[tuple[Task, CheckedEnv]] = []
        self._idle: list[tuple[Task, CheckedEnv]] = []  # least recently used first
        self._scaling: ActionScaling | None = None

    def assign(self, tasks: Sequence[Task]) -> None:
        """Bring one environment per task into use, in order."""
        if [task for task, _ in self._used] == list(tasks):
            return
        if self._retarget is not None:
            self._idle += self._used
        else:
            for _, env in self._used:
                env.close()
        self._used = []
        for task in tasks:
            self._used.append((task, self._take(task)))
            self._report_progress()
        surplus = max(0, len(self._used) + len(self._idle) - self._pool_size)
        for _, env in self._idle[:surplus]:
            env.close()
        del self._idle[:surplus]
        self._scaling = ActionScaling.of([env for _, env in self._used])

    def _take(self, task: Task) -> CheckedEnv:
        kind = (task.family, task.benchmark, task.name, task.options)
        for i, (other, env) in enumerate(self._idle):
            if (other.family, other.benchmark, other.name, other.options) == kind:
                del self._idle[i]
                assert self._retarget is not None
                self._retarget(env.env, task)
                env.retarget(task)
                return env
        env = CheckedEnv(self._distribution.make(task), task)
        misfit = self._spaces.misfit(env.spaces, bounds=False)
        if misfit:
            raise UserError(f"{described(task)}: {misfit.replace('agent was trained for', 'first task has')}")
        return env

    def _report_progress(self) -> None:
        """Increment the progress counter of this process; the first call reports that it has started."""
        self._done += 1
        self._buffers.progress[self._first] = self._done

    def reset(self, seeds: NDArray[np.uint32]) -> None:
        """Reset the environments in use with `seeds`, in order; write observations to the buffers."""
        for i, (_, env) in enumerate(self._used):
            self._buffers.observations[self._first + i * self._stride] = env.reset(int(seeds[i]))
            self._report_progress()

    def step(self, start: int, stop: int) -> None:
        """Step the active environments from `start` to `stop`, from the actions to the results in the buffers."""
        buffers = self._buffers
        owned = range(self._first, self._first + len(self._used) * self._stride, self._stride)
        skipped = max(0, -(-(start - self._first) // self._stride))
        chosen = [i for i in owned[skipped:] if i < stop]
        if not chosen:
            return
        drawn = buffers.actions[chosen[0] : stop : self._stride]
        actions = None if self._scaling is None else self._scaling(drawn, slice(skipped, skipped + len(chosen)))
        for place, (i, (_, env)) in enumerate(zip(chosen, self._used[skipped:], strict=False)):
            if not buffers.active[i]:
                continue
            try:
                result = env.step_raw(env.env_action(drawn[place]) if actions is None else actions[place])
            except PhysicsDivergedError:  # the caller drops an episode with NaN
                buffers.rewards[i] = np.nan
                self._report_progress()
                continue
            self._report_progress()
            buffers.observations[i] = result.observation
            buffers.rewards[i] = result.reward
            buffers.terminated[i] = result.terminated
            buffers.truncated[i] = result.truncated
            buffers.success[i] = result.success

    def close(self) -> None:
        """Close all environments of the process, in use and idle."""
        for _, env in self._used + self._idle:
            env.close()
        self._used, self._idle = [], []


@dataclass(frozen=True)
class ActionScaling:
    """Scales the actions of many environments at once, each to the bounds of its own task, as `CheckedEnv` does one.

    Attributes:
        low: `[E, A]`, in the dtype of the action spaces, as the rest.
        high: `[E, A]`.
        centre: `[E, A]`, float64.
        half_range: `[E, A]`, float64.
    """

    low: NDArray[Any]
    high: NDArray[Any]
    centre: FloatArray
    half_range: FloatArray

    @classmethod
    def of(cls, envs: Sequence[CheckedEnv]) -> ActionScaling | None:
        """Return the scaling of environments whose actions lie in boxes of one dtype; None if there are others."""
        spaces = [env.env.action_space for env in envs]
        if not envs or envs[0].spaces.action_kind != "box" or len({space.dtype for space in spaces}) > 1:
            return None
        low, high = (np.stack([getattr(space, name) for space in spaces]) for name in ("low", "high"))
        wide = low.astype(np.float64), high.astype(np.float64)
        return cls(low, high, (wide[1] + wide[0]) / 2, (wide[1] - wide[0]) / 2)

    def __call__(self, actions: NDArray[np.float32], rows: slice) -> NDArray[Any]:
        """Return a new array of actions `[e, A]` that lie in their spaces, of policy units `[e, A]`."""
        scaled = self.centre[rows] + self.half_range[rows] * np.clip(actions.astype(np.float64), -1.0, 1.0)
        within: NDArray[Any] = np.clip(scaled.astype(self.low.dtype), self.low[rows], self.high[rows])
        return within
