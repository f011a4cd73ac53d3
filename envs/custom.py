"""Custom tasks: wrap a function that builds your gymnasium environment in a task distribution."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium

from metarl.types import Task

Make = Callable[[Task], gymnasium.Env[Any, Any]]
Difficulty = Callable[[Task], float]
Retarget = Callable[[Any, Task], None]


class CustomTasks(NamedTuple):
    """Task distribution returned by `custom`."""

    train_tasks: list[Task]
    test_tasks: list[Task]
    make: Make
    difficulty: Difficulty | None = None
    retarget: Retarget | None = None


def custom(
    name: str,
    make: Make,
    *,
    num_train: int,
    num_test: int,
    horizon: int,
    seed: int = 0,
    difficulty: Difficulty | None = None,
    retarget: Retarget | None = None,
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
        retarget: function `(env, task)` that gives an environment of `make` another task, so that environments are
            reused; None: each task gets a new one. Importable like `make`.

    Raises:
        ValueError: `num_train`, `num_test` or `horizon` is below 1, or `name` is a built-in family's.
    """
    from metarl.envs import FAMILIES

    if name in FAMILIES:
        raise ValueError(f"name is {name!r}, a built-in family; give your tasks another name")
    if min(num_train, num_test, horizon) < 1:
        raise ValueError(f"num_train, num_test and horizon must be ≥ 1, got {num_train}, {num_test} and {horizon}")
    options = (("horizon", horizon),)
    train = [Task(name, name, "train", name, index, seed, options) for index in range(num_train)]
    test = [Task(name, name, "test", name, num_train + index, seed, options) for index in range(num_test)]
    return CustomTasks(train, test, functools.partial(_make_limited, make), difficulty, _retarget_limited(retarget))


class Limited(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Truncates episodes at the horizon of the task; unlike gymnasium's TimeLimit it leaves the rest to be checked.

    Args:
        env: the environment.
        horizon: the number of steps after which an episode is truncated.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], horizon: int) -> None:
        super().__init__(env)
        self.horizon, self._steps = horizon, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Begin an episode."""
        self._steps = 0
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> Any:
        """Step; the last step of the horizon is truncated, unless it terminated."""
        answer = self.env.step(action)
        self._steps += 1
        if self._steps < self.horizon or type(answer) is not tuple or len(answer) != 5:
            return answer
        return (*answer[:3], True, answer[4])


def _make_limited(make: Make, task: Task) -> Limited:
    return Limited(make(task), task.option("horizon"))


def _retarget_limited(retarget: Retarget | None) -> Retarget | None:
    return None if retarget is None else functools.partial(_give_task, retarget)


def _give_task(retarget: Retarget, env: Limited, task: Task) -> None:
    retarget(env.env, task)
    env.horizon = task.option("horizon")
