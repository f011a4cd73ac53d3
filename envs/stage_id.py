"""Stage ids: append the one-hot id of the stage to observations, so that a policy knows its place in a sequence.

The stage id is stored in each task, as the options `stage` and `stages`, so that a task can be rebuilt from its fields
alone. Imports neither torch nor the rest of metarl except `types`, `protocols` and `spaces`.
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
from metarl.spaces import Answers, env_attribute
from metarl.types import BoolArray, FloatArray, Step, Task

_OPTIONS = ("stage", "stages")
"""Task options that store the stage id: the index of the stage, from 0, and the number of stages."""


class StageIdTasks:
    """Tasks of another distribution, with the one-hot stage id at the end of observations; a `TaskDistribution`.

    Args:
        distribution: the tasks of the stage.
        stage: the index of the stage, from 0.
        num_stages: the number of stages.

    Raises:
        ValueError: `stage` is out of range, or (from `train_tasks` and `test_tasks`) a task already has such an option.
    """

    def __init__(self, distribution: TaskDistribution, stage: int, num_stages: int) -> None:
        if not 0 <= stage < num_stages:
            raise ValueError(f"stage is {stage} with num_stages={num_stages}; expected 0 ≤ stage < num_stages")
        self._distribution, self._stage, self._num_stages = distribution, stage, num_stages

    @functools.cached_property
    def train_tasks(self) -> list[Task]:
        """Tasks to meta-train on."""
        return self._add_stage_id(self._distribution.train_tasks)

    @functools.cached_property
    def test_tasks(self) -> list[Task]:
        """Held-out tasks."""
        return self._add_stage_id(self._distribution.test_tasks)

    def _add_stage_id(self, tasks: Sequence[Task]) -> list[Task]:
        stage_id = tuple(zip(_OPTIONS, (self._stage, self._num_stages), strict=True))
        for task in tasks:
            if has_stage_id(task):
                raise ValueError(
                    f"task {task.to_json()} already has an option stage or stages, which the stage id needs; rename it"
                )
        return [dataclasses.replace(task, options=(*task.options, *stage_id)) for task in tasks]

    def make(self, task: Task) -> StageIdEnv:
        """Build the environment of `task`."""
        return StageIdEnv(self._distribution.make(without_stage_id(task)), task)

    @property
    def make_batch(self) -> Callable[[int], StageIdBatch] | None:
        """Function that builds `max_envs` environments stepped as one computation; None if the tasks have none."""
        make_batch = getattr(self._distribution, "make_batch", None)
        return None if make_batch is None else lambda max_envs: StageIdBatch(make_batch(max_envs), self._num_stages)

    @property
    def retarget(self) -> Callable[[Any, Task], None] | None:
        """Function that gives an environment another task; None if the tasks have none."""
        retarget = getattr(self._distribution, "retarget", None)
        if retarget is None:
            return None

        def with_stage_id(env: StageIdEnv, task: Task) -> None:
            env.retarget(task)  # raises for a task that does not fit, before anything changes
            retarget(env.env, without_stage_id(task))

        return with_stage_id

    @property
    def difficulty(self) -> Callable[[Task], float] | None:
        """Function that returns the difficulty of a task; None if the tasks have none."""
        difficulty = getattr(self._distribution, "difficulty", None)
        return None if difficulty is None else lambda task: float(difficulty(without_stage_id(task)))


def has_stage_id(task: Task) -> bool:
    """Return whether observations of `task` end in a stage id."""
    return not dict(task.options).keys().isdisjoint(_OPTIONS)


def without_stage_id(task: Task) -> Task:
    """Return `task` without its stage id."""
    return dataclasses.replace(task, options=tuple(pair for pair in task.options if pair[0] not in _OPTIONS))


def one_hot(task: Task) -> FloatArray:
    """Return the one-hot stage id of a task, `[stages]`; raises ValueError if it is missing or invalid."""
    stage, stages = (dict(task.options).get(key) for key in _OPTIONS)
    if type(stage) is not int or type(stages) is not int or not 0 <= stage < stages:
        raise ValueError(f"task options are stage {stage!r} of stages {stages!r}; expected 0 ≤ stage < stages")
    stage_id = np.zeros(stages)
    stage_id[stage] = 1.0
    return stage_id


class StageIdEnv(gymnasium.Env[NDArray[Any], NDArray[Any]]):
    """Environment that appends the one-hot stage id of its task to observations.

    It is not a `gymnasium.Wrapper`: the task of what `unwrapped` returns must be the one that the wrapper has.

    Args:
        env: the environment of the task without its stage id; it may be in wrappers.
        task: the task with its stage id.

    Attributes:
        env: the inner environment, without the stage id.
        task: the current task.
        observation_names, action_names, dt: those of the inner environment, if it has them.

    Raises:
        UserError: from `reset` and `step`: the inner environment returned something else than its space says.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], task: Task) -> None:
        self.env, self.task, self._stage_id = env, task, one_hot(task)
        self.observation_space = _extend(env.observation_space, len(self._stage_id))
        self.action_space = env.action_space
        self.metadata, self.render_mode = env.metadata, env.render_mode
        self._answers = Answers(env.observation_space, task)
        if (names := env_attribute(env, "observation_names")) is not None:
            self.observation_names = (*names, *(f"stage_{k}" for k in range(len(self._stage_id))))
        for name in ("action_names", "dt"):
            if (value := env_attribute(env, name)) is not None:
                setattr(self, name, value)

    def retarget(self, task: Task) -> None:
        """Show the stage id of another task, which the inner environment has been given without it.

        Raises:
            ValueError: the task has another number of stages.
        """
        stage_id = one_hot(task)
        if len(stage_id) != len(self._stage_id):
            raise ValueError(
                f"got a task with {len(stage_id)} stages; this environment has {len(self._stage_id)}: call make(task)"
            )
        self.task, self._stage_id, self._answers.task = task, stage_id, task

    def _observe(self, observation: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate([observation, self._stage_id.astype(self.observation_space.dtype)])

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """Begin an episode."""
        super().reset(seed=seed)
        observation, info = self._answers.reset(self.env.reset(seed=seed, options=options))
        return self._observe(observation), info

    def step(self, action: NDArray[Any]) -> tuple[NDArray[Any], float, bool, bool, dict[str, Any]]:
        """Step the inner environment."""
        observation, reward, terminated, truncated, info = self._answers.step(self.env.step(action))
        return self._observe(observation), reward, terminated, truncated, info

    def render(self) -> Any:
        """Render the inner environment."""
        return self.env.render()

    def close(self) -> None:
        """Close the inner environment."""
        self.env.close()


class StageIdBatch:
    """Environments stepped as one computation, each with the stage id of its own task; a `BatchEnv`.

    Args:
        batch: the environments without stage ids.
        num_stages: the number of stages, the same for all tasks.
    """

    def __init__(self, batch: BatchEnv, num_stages: int) -> None:
        self._batch, self._num_stages = batch, num_stages
        self.max_envs, self.lanes = batch.max_envs, batch.lanes
        self.spaces = dataclasses.replace(
            batch.spaces, observation_size=batch.spaces.observation_size + num_stages, observation_parts=()
        )
        self._stage_ids = np.zeros((0, num_stages))

    def reset(self, tasks: Sequence[Task], seeds: NDArray[np.uint32]) -> NDArray[Any]:
        """See `BatchEnv.reset`."""
        stage_ids = [one_hot(task) for task in tasks]
        sizes = {len(stage_id) for stage_id in stage_ids}
        if not sizes <= {self._num_stages}:
            raise ValueError(f"tasks have {sorted(sizes)} stages; expected {self._num_stages} for every task")
        self._stage_ids = np.reshape(stage_ids, (len(stage_ids), self._num_stages))
        observations = self._batch.reset([without_stage_id(task) for task in tasks], seeds)
        return np.concatenate([observations, self._stage_ids], axis=-1)

    def step_async(self, rows: slice, actions: NDArray[np.float32], active: BoolArray) -> None:
        """See `BatchEnv.step_async`."""
        self._batch.step_async(rows, actions, active)

    def step_wait(self, rows: slice) -> Step:
        """See `BatchEnv.step_wait`."""
        step = self._batch.step_wait(rows)
        return step._replace(observations=np.concatenate([step.observations, self._stage_ids[rows]], axis=-1))

    def close(self) -> None:
        """See `BatchEnv.close`."""
        self._batch.close()


def _extend(space: gymnasium.Space[Any], num_stages: int) -> gymnasium.spaces.Box:
    """Return the observation space with a stage id appended; raises ValueError unless it is a one-dimensional Box."""
    if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
        raise ValueError(f"observation space is {space}; expected a one-dimensional Box: flatten it")
    low, high = (
        np.concatenate([bound, np.full(num_stages, end)], dtype=space.dtype, casting="unsafe")
        for bound, end in ((space.low, 0), (space.high, 1))
    )
    dtype: Any = space.dtype
    return gymnasium.spaces.Box(low, high, dtype=dtype)
