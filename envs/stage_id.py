"""Cues: observations that end in a one-hot of the stage, so that a policy knows which part of a sequence it is in.

Imports neither torch nor the rest of metarl but `types`. The cue is part of each task, as options `stage` and `stages`,
so that a task is rebuilt from its fields alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from metarl.protocols import BatchEnv, TaskDistribution
from metarl.types import BoolArray, FloatArray, Step, Task

_OPTIONS = ("stage", "stages")
"""The options of a task that hold its cue: the stage, counted from 0, and how many there are."""


class StageIdTasks:
    """The tasks of another distribution, whose observations end in a one-hot of the stage; a `TaskDistribution`.

    Args:
        distribution: the tasks of the stage.
        stage: which one it is, from 0.
        num_stages: how many there are.
    """

    def __init__(self, distribution: TaskDistribution, stage: int, num_stages: int) -> None:
        if not 0 <= stage < num_stages:
            raise ValueError(f"stage is {stage} of {num_stages}; expected 0 to {num_stages - 1}")
        self._distribution, self._stage, self._num_stages = distribution, stage, num_stages

    @functools.cached_property
    def train_tasks(self) -> list[Task]:
        """Tasks to meta-train on."""
        return self._cued(self._distribution.train_tasks)

    @functools.cached_property
    def test_tasks(self) -> list[Task]:
        """Held-out tasks."""
        return self._cued(self._distribution.test_tasks)

    def _cued(self, tasks: Sequence[Task]) -> list[Task]:
        values = (self._stage, self._num_stages)
        cued = []
        for task in tasks:
            if has_stage_id(task):
                raise ValueError(
                    f"{task.to_json()} has an option stage or stages, which a cue takes; name it otherwise"
                )
            cued.append(dataclasses.replace(task, options=(*task.options, *zip(_OPTIONS, values, strict=True))))
        return cued

    def make(self, task: Task) -> StageIdEnv:
        """Build the environment of `task`."""
        return StageIdEnv(self._distribution.make(without_stage_id(task)), task)

    @property
    def make_batch(self) -> Callable[[int], StageIdBatch] | None:
        """Build `max_envs` environments that step as one computation; None if the tasks have no such form."""
        make_batch = getattr(self._distribution, "make_batch", None)
        return None if make_batch is None else lambda max_envs: StageIdBatch(make_batch(max_envs), self._num_stages)

    @property
    def difficulty(self) -> Callable[[Task], float] | None:
        """Return how hard a task is; None if the tasks have no order."""
        difficulty = getattr(self._distribution, "difficulty", None)
        return None if difficulty is None else lambda task: float(difficulty(without_stage_id(task)))


def has_stage_id(task: Task) -> bool:
    """Return whether observations of `task` end in a one-hot of its stage."""
    return not dict(task.options).keys().isdisjoint(_OPTIONS)


def without_stage_id(task: Task) -> Task:
    """Return the task that `task` is without its cue."""
    return dataclasses.replace(task, options=tuple(pair for pair in task.options if pair[0] not in _OPTIONS))


def one_hot(task: Task) -> FloatArray:
    """Return the cue of a task, `[stages]`; raises ValueError if it has none or it is not one of a stage."""
    stage, stages = (dict(task.options).get(key) for key in _OPTIONS)
    if type(stage) is not int or type(stages) is not int or not 0 <= stage < stages:
        raise ValueError(f"task options are stage {stage!r} of stages {stages!r}; expected 0 ≤ stage < stages")
    cue = np.zeros(stages)
    cue[stage] = 1.0
    return cue


class StageIdEnv(gymnasium.Env[NDArray[Any], NDArray[Any]]):
    """An environment whose observations end in the one-hot of its task's stage, held by composition.

    It is no `gymnasium.Wrapper`, since the environment below one is retargeted as `env.unwrapped` and would be given a
    task that it does not know. It has a method `set_task(task)` if that environment has one.

    Args:
        env: the environment of the task without its cue.
        task: the task with its cue.

    Attributes:
        env: the environment without the cue.
        task: the task that it is aimed at.
        observation_names, action_names, dt: those of the environment, if it has any.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], task: Task) -> None:
        self.env, self.task, self._cue = env, task, one_hot(task)
        self.observation_space, self.action_space = _extended(env.observation_space, len(self._cue)), env.action_space
        self.metadata, self.render_mode = env.metadata, env.render_mode
        below: Any = env.unwrapped
        if hasattr(below, "set_task"):
            self.set_task = self._set_task
        if hasattr(below, "observation_names"):
            self.observation_names = (*below.observation_names, *(f"stage_{k}" for k in range(len(self._cue))))
        for name in ("action_names", "dt"):
            if hasattr(below, name):
                setattr(self, name, getattr(below, name))

    def _set_task(self, task: Task) -> None:
        """Aim at another task of the same class and number of stages; call `reset` next."""
        cue = one_hot(task)
        if len(cue) != len(self._cue):
            raise ValueError(f"set_task got a task of {len(cue)} stages, the environment is of {len(self._cue)}")
        self.env.unwrapped.set_task(without_stage_id(task))  # type: ignore[attr-defined]
        self.task, self._cue = task, cue

    def _observe(self, observation: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate([observation, self._cue.astype(self.observation_space.dtype)])

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """Begin an episode."""
        super().reset(seed=seed)
        observation, info = self.env.reset(seed=seed, options=options)
        return self._observe(observation), info

    def step(self, action: NDArray[Any]) -> tuple[NDArray[Any], float, bool, bool, dict[str, Any]]:
        """Take a step of the environment; the cue stays the same."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._observe(observation), float(reward), terminated, truncated, info

    def render(self) -> Any:
        """Return what the environment renders."""
        return self.env.render()

    def close(self) -> None:
        """Close the environment."""
        self.env.close()


class StageIdBatch:
    """Environments stepped as one computation, each with the cue of its own task; a `BatchEnv`.

    Args:
        batch: the environments without cues.
        num_stages: how many stages there are; all tasks must agree with it.
    """

    def __init__(self, batch: BatchEnv, num_stages: int) -> None:
        self._batch, self._num_stages = batch, num_stages
        self.max_envs, self.lanes = batch.max_envs, batch.lanes
        self.observation_space = _extended(batch.observation_space, num_stages)
        self.action_space = batch.action_space
        self._cues = np.zeros((0, num_stages))

    def reset(self, tasks: Sequence[Task], seeds: NDArray[np.uint32]) -> FloatArray:
        """See `BatchEnv.reset`."""
        cues = [one_hot(task) for task in tasks]
        numbers = {len(cue) for cue in cues}
        if not numbers <= {self._num_stages}:
            raise ValueError(f"tasks are of {sorted(numbers)} stages; expected {self._num_stages}")
        self._cues = np.reshape(cues, (len(cues), self._num_stages))
        observations = self._batch.reset([without_stage_id(task) for task in tasks], seeds)
        return np.concatenate([observations, self._cues], axis=-1)

    def step_async(self, rows: slice, actions: FloatArray, active: BoolArray) -> None:
        """See `BatchEnv.step_async`."""
        self._batch.step_async(rows, actions, active)

    def step_wait(self, rows: slice) -> Step:
        """See `BatchEnv.step_wait`."""
        step = self._batch.step_wait(rows)
        return step._replace(observations=np.concatenate([step.observations, self._cues[rows]], axis=-1))

    def close(self) -> None:
        """See `BatchEnv.close`."""
        self._batch.close()


def _extended(space: gymnasium.Space[Any], num_stages: int) -> gymnasium.spaces.Box:
    """The space of observations that end in a cue; raises ValueError for any but a flat box."""
    if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
        raise ValueError(f"observation space is {space}; expected a Box of one dimension: flatten it")
    low, high = (
        np.concatenate([bound, np.full(num_stages, end)], dtype=space.dtype, casting="unsafe")
        for bound, end in ((space.low, 0), (space.high, 1))
    )
    dtype: Any = space.dtype
    return gymnasium.spaces.Box(low, high, dtype=dtype)
