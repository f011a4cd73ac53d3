"""Custom tasks: wrap a function that builds your gymnasium environment in a task distribution."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium

from metarl.types import Task

Make = Callable[[Task], gymnasium.Env[Any, Any]]
Difficulty = Callable[[Task], float]


class CustomTasks(NamedTuple):
    """Task distribution returned by `custom`."""

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
    """Return a distribution whose environments are built by `make(task)`.

    Args:
        name: the name of the family.
        make: function that builds the gymnasium environment of a task. It must depend on the task alone: draw the goal
            from `numpy.random.default_rng([task.seed, task.index])`. Training and test tasks have different indices.
            Worker processes import it, so it must not be a lambda if there are any. Success is tracked if the
            environment reports `info["success"]`.
        num_train: the number of training tasks.
        num_test: the number of held-out tasks.
        horizon: the number of steps after which an episode is truncated.
        seed: the seed of the tasks.
        difficulty: function that returns the difficulty of a task, harder is larger; only a curriculum needs it.
            Importable like `make`.

    Raises:
        ValueError: `num_train`, `num_test` or `horizon` is below 1.
    """
    if min(num_train, num_test, horizon) < 1:
        raise ValueError(f"num_train, num_test and horizon must be ≥ 1, got {num_train}, {num_test} and {horizon}")
    options = (("horizon", horizon),)
    train = [Task(name, name, "train", name, index, seed, options) for index in range(num_train)]
    test = [Task(name, name, "test", name, num_train + index, seed, options) for index in range(num_test)]
    return CustomTasks(train, test, functools.partial(_make_limited, make), difficulty)


def _make_limited(make: Make, task: Task) -> gymnasium.Env[Any, Any]:
    return gymnasium.wrappers.TimeLimit(make(task), task.option("horizon"))
