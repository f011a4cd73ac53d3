"""Tasks of one's own: a gymnasium environment and one function that builds it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium

from metarl.types import Task

Make = Callable[[Task], gymnasium.Env[Any, Any]]
Difficulty = Callable[[Task], float]


class CustomTasks(NamedTuple):
    """A task distribution made by `custom`."""

    train_tasks: list[Task]
    test_tasks: list[Task]
    make: Make
    difficulty: Difficulty | None = None


def custom(
    name: str,
    make: Make,
    *,
    num_train: int,
    num_test: int,
    horizon: int,
    seed: int = 0,
    difficulty: Difficulty | None = None,
) -> CustomTasks:
    """Return a distribution whose tasks are `make(task)`.

    Args:
        name: the name of the family.
        make: builds the gymnasium environment of a task, alike for equal tasks: draw its goal from
            `numpy.random.default_rng([task.seed, task.index])`. Test tasks come with other indices than training tasks.
            With more than one worker it must be importable (not a lambda). If the environment reports
            `info["success"]`, success is tracked.
        num_train: how many training tasks.
        num_test: how many held-out tasks.
        horizon: steps after which an episode is truncated, if the environment did not end it before.
        seed: the seed of the tasks.
        difficulty: how hard a task is, harder is larger, which a curriculum needs; importable like `make`.
    """
    if min(num_train, num_test, horizon) < 1:
        raise ValueError(f"num_train, num_test and horizon must be ≥ 1, got {num_train}, {num_test} and {horizon}")
    options = (("horizon", horizon),)
    train = [Task(name, name, "train", name, index, seed, options) for index in range(num_train)]
    test = [Task(name, name, "test", name, num_train + index, seed, options) for index in range(num_test)]
    return CustomTasks(train, test, functools.partial(_make_limited, make), difficulty)


def _make_limited(make: Make, task: Task) -> gymnasium.Env[Any, Any]:
    return gymnasium.wrappers.TimeLimit(make(task), task.option("horizon"))
