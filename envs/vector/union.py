"""Environments of several task distributions, the stages of a run, in a shared set of processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium

from metarl.envs import FAMILIES
from metarl.envs.vector.serial import make_envs
from metarl.envs.vector.workers import WORKER_TIMEOUT
from metarl.errors import UserError
from metarl.protocols import BatchEnv, TaskDistribution
from metarl.types import Task


def check_distinct_tasks(distributions: Sequence[TaskDistribution]) -> None:
    """Check that no task belongs to two custom distributions, which may build different environments for it.

    Equal tasks of the built-in families always have equal environments.

    Raises:
        UserError: two custom distributions have an equal task.
    """
    owner: dict[Task, TaskDistribution] = {}
    for distribution in distributions:
        for task in (*distribution.train_tasks, *distribution.test_tasks):
            if task.family not in FAMILIES and owner.setdefault(task, distribution) is not distribution:
                raise UserError(f"two stages have a custom distribution named {task.family!r}; give each a unique name")


class UnionOfTasks:
    """Union of several distributions, so that their environments share worker processes and a pool.

    Args:
        distributions: distributions with equal spaces and distinct tasks; see `check_distinct_tasks`.
    """

    def __init__(self, distributions: Sequence[TaskDistribution]) -> None:
        self._distributions = list(distributions)
        self._owner: dict[Task, int] = {}
        for index, distribution in enumerate(distributions):
            for task in (*distribution.train_tasks, *distribution.test_tasks):
                self._owner.setdefault(task, index)

    @property
    def train_tasks(self) -> list[Task]:
        """The training tasks of all distributions."""
        return [task for distribution in self._distributions for task in distribution.train_tasks]

    @property
    def test_tasks(self) -> list[Task]:
        """The held-out tasks of all distributions."""
        return [task for distribution in self._distributions for task in distribution.test_tasks]

    @property
    def make_batch(self) -> Callable[[int], BatchEnv] | None:
        """`make_batch` of the distributions, if one computation can step the tasks of all; else None."""
        kinds = {(task.family, task.benchmark) for task in self._owner}
        own = [getattr(distribution, "make_batch", None) for distribution in self._distributions]
        return own[0] if len(kinds) == 1 and None not in own else None

    @property
    def retarget(self) -> Callable[[Any, Task], None] | None:
        """Function that gives an environment another task of its owner; None unless all distributions have one."""
        own = [getattr(distribution, "retarget", None) for distribution in self._distributions]
        return None if None in own else lambda env, task: own[self._owner[task]](env, task)  # type: ignore[misc]

    def make(self, task: Task) -> gymnasium.Env[Any, Any]:
        """Build the environment of `task` with the first distribution that contains it."""
        return self._distributions[self._owner[task]].make(task)


def make_stage_envs(
    distributions: Sequence[TaskDistribution],
    max_envs: Sequence[int],
    num_workers: int,
    worker_timeout_s: float = WORKER_TIMEOUT,
) -> list[BatchEnv]:
    """Return the environments of each stage; the caller closes all of them.

    Stages may share an object, which is safe to close repeatedly.

    Args:
        distributions: the task distribution of each stage; an object may appear more than once.
        max_envs: the maximum number of environments stepped together, for each stage.
        num_workers: the number of worker processes for all stages together.
        worker_timeout_s: see `make_envs`.
    """
    check_distinct_tasks(distributions)
    envs: dict[int, BatchEnv] = {}
    shared = [i for i, tasks in enumerate(distributions) if getattr(tasks, "make_batch", None) is None]
    unique = list({id(distributions[i]): distributions[i] for i in shared}.values())
    if unique:
        union = unique[0] if len(unique) == 1 else UnionOfTasks(unique)
        envs |= dict.fromkeys(shared, make_envs(union, max(max_envs[i] for i in shared), num_workers, worker_timeout_s))
    for i in set(range(len(distributions))) - envs.keys():
        envs[i] = make_envs(distributions[i], max_envs[i], num_workers)
    return [envs[i] for i in range(len(distributions))]
