"""Environment manager: the task sampler, which draws the tasks of each iteration.

It balances the tasks over their classes and follows the curriculum. Of metarl it imports only `types`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from metarl.types import FloatArray, Task


class Curriculum(NamedTuple):
    """Curriculum from easy to hard tasks: the fraction of tasks to sample from grows linearly with the iteration.

    Attributes:
        difficulty: function that returns the difficulty of a task, in any unit; harder is larger.
        start_fraction: the easiest fraction of the tasks, in (0, 1], that iteration 0 samples from.
        iterations: ≥ 1; the first iteration, counted from 0, that samples from all tasks.
    """

    difficulty: Callable[[Task], float]
    start_fraction: float
    iterations: int

    def fraction(self, iteration: int) -> float:
        """Return the fraction of the tasks, in (0, 1], to sample from at an iteration; exactly 1 at the end."""
        return 1.0 - (1.0 - self.start_fraction) * max(0.0, 1.0 - iteration / self.iterations)


class Manager(Protocol):
    """Interface of a task sampler."""

    def fraction(self, iteration: int) -> float:
        """Return the fraction of the tasks, in (0, 1], that an iteration samples from."""

    def sample(self, num_tasks: int, rng: np.random.Generator, iteration: int = 0) -> list[Task]:
        """Draw `num_tasks` tasks."""


class JointManager:
    """Task sampler that draws equally from several managers; the remainder goes to managers chosen at random.

    Args:
        managers: the managers to draw from, e.g. one for each stage of a run.
    """

    def __init__(self, managers: Sequence[Manager]) -> None:
        self._managers = list(managers)

    def fraction(self, iteration: int) -> float:
        """Return the fraction of the tasks, in (0, 1], that an iteration samples from: the mean over managers."""
        return sum(manager.fraction(iteration) for manager in self._managers) / len(self._managers)

    def sample(self, num_tasks: int, rng: np.random.Generator, iteration: int = 0) -> list[Task]:
        """Draw `num_tasks` tasks; see `EnvManager.sample`."""
        counts = np.full(len(self._managers), num_tasks // len(self._managers))
        counts[rng.permutation(len(counts))[: num_tasks % len(counts)]] += 1
        parts = zip(self._managers, counts.tolist(), strict=True)
        return [task for manager, count in parts if count for task in manager.sample(count, rng, iteration)]


class EnvManager:
    """Task sampler over a list of tasks, balanced over their classes.

    Args:
        tasks: the tasks to draw from, of one or more classes (`Task.name`).
        curriculum: the curriculum; None samples from all tasks at every iteration.

    Raises:
        ValueError: there are no tasks, a difficulty is not finite, or all tasks are equally hard.
    """

    def __init__(self, tasks: Sequence[Task], curriculum: Curriculum | None = None) -> None:
        if not tasks:
            raise ValueError("tasks is empty; expected at least one task to sample from")
        self._tasks, self._curriculum = list(tasks), curriculum
        self._difficulties = np.zeros(len(tasks))
        if curriculum is not None:
            self._difficulties = np.array([curriculum.difficulty(task) for task in tasks], dtype=np.float64)
            _check_order(self._tasks, self._difficulties)

    def allowed(self, iteration: int) -> list[Task]:
        """Return the tasks that an iteration samples from, in the order of the list.

        With a curriculum these are the easiest fraction of all tasks, rounded up, and any task as hard as the hardest
        of them: equally hard tasks enter together.
        """
        if self._curriculum is None:
            return self._tasks
        # Rounded because 1 − (1 − 0.3) of 10 tasks is 3.0000000000000004 in floating point.
        count = math.ceil(round(self._curriculum.fraction(iteration) * len(self._tasks), 9))
        hardest = np.sort(self._difficulties)[max(count, 1) - 1]
        return [self._tasks[i] for i in np.flatnonzero(self._difficulties <= hardest)]

    def fraction(self, iteration: int) -> float:
        """Return the fraction of the tasks, in (0, 1], that an iteration samples from."""
        return len(self.allowed(iteration)) / len(self._tasks)

    def sample(self, num_tasks: int, rng: np.random.Generator, iteration: int = 0) -> list[Task]:
        """Draw `num_tasks` tasks: class counts differ by at most one, and goals repeat only when a class runs out.

        If the classes do not divide `num_tasks`, those that appear once more are chosen at random. A curriculum
        restricts the tasks, and with them the classes, to those that `allowed` returns.

        Args:
            num_tasks: M ≥ 1.
            rng: the only source of randomness; equal generators give equal tasks.
            iteration: the iteration of the stage, from 0; without a curriculum it has no effect.
        """
        classes: dict[str, list[Task]] = {}
        for task in self.allowed(iteration):
            classes.setdefault(task.name, []).append(task)
        counts = np.full(len(classes), num_tasks // len(classes))
        counts[rng.permutation(len(classes))[: num_tasks % len(classes)]] += 1
        sampled: list[Task] = []
        for goals, count in zip(classes.values(), counts, strict=True):
            rounds = [rng.permutation(len(goals)) for _ in range(-(-count // len(goals)))]
            sampled += [goals[i] for i in np.concatenate(rounds)[:count]] if rounds else []
        return sampled


def _check_order(tasks: Sequence[Task], difficulties: FloatArray) -> None:
    not_finite = np.flatnonzero(~np.isfinite(difficulties))
    if len(not_finite):
        first = not_finite[0]
        raise ValueError(
            f"the difficulty of {tasks[first].to_json()} is {difficulties[first]}; expected a finite number"
        )
    if np.ptp(difficulties) <= 1e-9 * np.abs(difficulties).max():
        raise ValueError(
            f"the {len(tasks)} training task(s) of {tasks[0].benchmark} are all equally hard, so a curriculum cannot "
            "order them; leave out the curriculum"
        )
