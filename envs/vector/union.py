"""Environments of several task distributions, the stages of a run, in one set of processes."""

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


def check_apart(distributions: Sequence[TaskDistribution]) -> None:
    """Check that equal tasks of different distributions are the same, as those of built-in families are.

    Raises:
        UserError: two distributions of one's own have an equal task; its environment is that of either.
    """
    owner: dict[Task, TaskDistribution] = {}
    for distribution in distributions:
        for task in (*distribution.train_tasks, *distribution.test_tasks):
            if task.family not in FAMILIES and owner.setdefault(task, distribution) is not distribution:
                raise UserError(f"two stages have distributions called {task.family!r}; give each a name of its own")


class UnionOfTasks:
    """Several distributions as one, so that their environments share worker processes and a pool.

    Args:
        distributions: with equal spaces; see `check_apart`.
    """

    def __init__(self, distributions: Sequence[TaskDistribution]) -> None:
        self._distributions = list(distributions)
        self._owner: dict[Task, int] = {}
        for number, distribution in enumerate(distributions):
            for task in (*distribution.train_tasks, *distribution.test_tasks):
                self._owner.setdefault(task, number)

    @property
    def train_tasks(self) -> list[Task]:
        """Of all."""
        return [task for distribution in self._distributions for task in distribution.train_tasks]

    @property
    def test_tasks(self) -> list[Task]:
        """Of all."""
        return [task for distribution in self._distributions for task in distribution.test_tasks]

    @property
    def make_batch(self) -> Callable[[int], BatchEnv] | None:
        """That of the distributions, if one computation can step the tasks of all; else None."""
        kinds = {(task.family, task.benchmark) for task in self._owner}
        own: Callable[[int], BatchEnv] | None = getattr(self._distributions[0], "make_batch", None)
        return own if len(kinds) == 1 else None

    def make(self, task: Task) -> gymnasium.Env[Any, Any]:
        """Build the environment of `task`, as the first distribution that has it does."""
        return self._distributions[self._owner[task]].make(task)


def make_stage_envs(
    distributions: Sequence[TaskDistribution],
    max_envs: Sequence[int],
    num_workers: int,
    worker_timeout_s: float = WORKER_TIMEOUT,
) -> list[BatchEnv]:
    """Return environments for each of several distributions; close each of them, once or more often.

    Args:
        distributions: of the stages; the same object may come again.
        max_envs: how many are stepped together, for each.
        num_workers: processes, for all together.
        worker_timeout_s: see `make_envs`.
    """
    check_apart(distributions)
    made: dict[int, BatchEnv] = {}
    shared = [i for i, each in enumerate(distributions) if getattr(each, "make_batch", None) is None]
    different = list({id(distributions[i]): distributions[i] for i in shared}.values())
    if different:
        whole = different[0] if len(different) == 1 else UnionOfTasks(different)
        envs = make_envs(whole, max(max_envs[i] for i in shared), num_workers, worker_timeout_s)
        made |= dict.fromkeys(shared, envs)
    for i in set(range(len(distributions))) - made.keys():
        made[i] = make_envs(distributions[i], max_envs[i], num_workers)
    return [made[i] for i in range(len(distributions))]
