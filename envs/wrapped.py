"""Wrapped tasks: environments in the wrappers of `metarl.envs.wrappers`, which each task carries.

The wrappers are stored in each task, as the options `wrappers` and `unwrapped_horizon`, so that a task can be rebuilt
from its fields alone; its option `horizon` counts the steps of the wrapped environment. Imports neither torch nor the
rest of metarl except `types`, `protocols`, `spaces` and `errors`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import gymnasium
from pydantic import BaseModel, ValidationError

from metarl.envs.stage_id import has_stage_id
from metarl.envs.wrappers import WRAPPER_LIST, parse_wrappers, wrap, wrapped_horizon
from metarl.envs.wrappers.checked import Checked
from metarl.envs.wrappers.time_limit import TimeLimit
from metarl.errors import UserError
from metarl.protocols import TaskDistribution
from metarl.spaces import described
from metarl.types import Task

_OPTIONS = ("wrappers", "unwrapped_horizon")
"""Task options that store wrappers: a JSON list of their settings, and the horizon without them."""


class WrappedTasks:
    """Tasks of another distribution, in wrappers; a `TaskDistribution`.

    It has no `make_batch`: wrapped environments step one by one, in worker processes.

    Args:
        distribution: the tasks.
        wrappers: settings of each, e.g. `{"name": "frame_stack", "frames": 4}`, from the innermost to the outermost.

    Raises:
        ValueError: a setting is wrong; or (from `train_tasks` and `test_tasks`) a task has wrappers or a stage id
            already, or no horizon.
        UserError: from `make`: the environment has spaces that a wrapper does not support.
    """

    def __init__(self, distribution: TaskDistribution, wrappers: Iterable[Mapping[str, Any] | BaseModel]) -> None:
        self._distribution, self._wrappers = distribution, parse_wrappers(wrappers)

    @functools.cached_property
    def train_tasks(self) -> list[Task]:
        """Tasks to meta-train on."""
        return self._add_wrappers(self._distribution.train_tasks)

    @functools.cached_property
    def test_tasks(self) -> list[Task]:
        """Held-out tasks."""
        return self._add_wrappers(self._distribution.test_tasks)

    def _add_wrappers(self, tasks: Sequence[Task]) -> list[Task]:
        listed = WRAPPER_LIST.dump_json(self._wrappers).decode()
        wrapped = []
        for task in tasks:
            options = dict(task.options)
            if has_wrappers(task):
                raise ValueError(
                    f"task {task.to_json()} already has an option wrappers or unwrapped_horizon; list all wrappers once"
                )
            if has_stage_id(task):
                raise ValueError(f"task {task.to_json()} has a stage id, which is outside of wrappers; add it last")
            horizon = _positive("horizon", options.get("horizon"))
            options |= {
                "horizon": wrapped_horizon(horizon, self._wrappers),
                "wrappers": listed,
                "unwrapped_horizon": horizon,
            }
            wrapped.append(dataclasses.replace(task, options=tuple(options.items())))
        return wrapped

    def make(self, task: Task) -> gymnasium.Env[Any, Any]:
        """Build the environment of `task`, with the wrappers of the task."""
        return wrap_env(self._distribution.make(without_wrappers(task)), task)

    @property
    def retarget(self) -> Callable[[Any, Task], None] | None:
        """Function that gives an environment another task; None if the tasks have none."""
        retarget = getattr(self._distribution, "retarget", None)
        if retarget is None:
            return None

        def in_wrappers(env: gymnasium.Env[Any, Any], task: Task) -> None:
            while not isinstance(env, Checked):
                env = env.env  # type: ignore[attr-defined]
            retarget(env.env, without_wrappers(task))
            env.retarget(task)

        return in_wrappers

    @property
    def difficulty(self) -> Callable[[Task], float] | None:
        """Function that returns the difficulty of a task; None if the tasks have none."""
        difficulty = getattr(self._distribution, "difficulty", None)
        return None if difficulty is None else lambda task: float(difficulty(without_wrappers(task)))


def add_wrappers(distribution: TaskDistribution, wrappers: Iterable[Mapping[str, Any] | BaseModel]) -> TaskDistribution:
    """Return the tasks in wrappers; the same object if there are none."""
    wrappers = tuple(wrappers)
    return WrappedTasks(distribution, wrappers) if wrappers else distribution


def has_wrappers(task: Task) -> bool:
    """Return whether a task carries wrappers."""
    return not dict(task.options).keys().isdisjoint(_OPTIONS)


def without_wrappers(task: Task) -> Task:
    """Return `task` without its wrappers, with the horizon that it had; raises ValueError if that is missing."""
    options = dict(task.options)
    horizon = _positive("unwrapped_horizon", options.get("unwrapped_horizon"))
    kept = {key: value for key, value in options.items() if key not in _OPTIONS} | {"horizon": horizon}
    return dataclasses.replace(task, options=tuple(kept.items()))


def wrap_env(env: gymnasium.Env[Any, Any], task: Task) -> gymnasium.Env[Any, Any]:
    """Return an environment in the wrappers that a task carries.

    The innermost layers check what the environment returns, and truncate it at the horizon without wrappers.

    Args:
        env: the environment of the task without its wrappers.
        task: the task with its wrappers.

    Raises:
        ValueError: the task carries no valid wrappers.
        UserError: the environment is none, or has spaces that a wrapper does not support.
    """
    wrappers, horizon = _wrappers_of(task), without_wrappers(task).option("horizon")
    if not (isinstance(env, gymnasium.Env) and hasattr(env, "observation_space") and hasattr(env, "action_space")):
        raise UserError(
            f"{described(task)}: make returned {type(env).__name__}; expected a gymnasium.Env with observation_space "
            "and action_space"
        )
    try:
        return wrap(TimeLimit(Checked(env, task), horizon), wrappers)
    except UserError as error:
        raise UserError(f"{described(task)}: {error}") from error


def _wrappers_of(task: Task) -> tuple[Any, ...]:
    """Return the configs of the wrappers that a task carries; raises ValueError."""
    text = dict(task.options).get("wrappers")
    try:
        return WRAPPER_LIST.validate_json(str(text))
    except ValidationError as error:
        cause = error.errors(include_url=False)[0]["msg"]
        raise ValueError(
            f"task option wrappers is {str(text)[:80]!r}: {cause}; expected a JSON list of wrappers"
        ) from error


def _positive(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"task option {name} is {value!r}; expected a number of steps")
    return value
