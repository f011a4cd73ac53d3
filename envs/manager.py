"""Samples the tasks of an iteration. Owns balance and curriculum; imports nothing of metarl but `types`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from metarl.types import FloatArray, Task


class Curriculum(NamedTuple):
    """Tasks from easy to hard: the part of them that is sampled from grows linearly with the iteration.

    Attributes:
        difficulty: how hard a task is, in any unit; harder is larger.
        start_fraction: the easiest fraction of the tasks, in (0, 1], that iteration 0 samples from.
        iterations: ≥ 1; from this iteration on, counted from 0, all tasks are sampled from.
    """

    difficulty: Callable[[Task], float]
    start_fraction: float
    iterations: int

    def fraction(self, iteration: int) -> float:
        """Return the fraction at an iteration; exactly 1 at the end."""
        return 1.0 - (1.0 - self.start_fraction) * max(0.0, 1.0 - iteration / self.iterations)


class Manager(Protocol):
    """What an iteration asks for its tasks."""

    def fraction(self, iteration: int) -> float:
        """Return which part of the tasks an iteration draws from, in (0, 1]."""

    def sample(self, num_tasks: int, rng: np.random.Generator, iteration: int = 0) -> list[Task]:
        """Draw `num_tasks` tasks."""


class JointManager:
    """Draws tasks of several managers, as many of each, but for the remainder; which ones get more is drawn.

    Args:
        managers: of the stages of a run, say.
    """

    def __init__(self, managers: Sequence[Manager]) -> None:
        self._managers = list(managers)

    def fraction(self, iteration: int) -> float:
        """Return which part of the tasks an iteration draws from, in (0, 1]: the mean over managers."""
        return sum(manager.fraction(iteration) for manager in self._managers) / len(self._managers)

    def sample(self, num_tasks: int, rng: np.random.Generator, iteration: int = 0) -> list[Task]:
        """Draw `num_tasks` tasks; see `EnvManager.sample`."""
        counts = np.full(len(self._managers), num_tasks // len(self._managers))
        counts[rng.permutation(len(counts))[: num_tasks % len(counts)]] += 1
        parts = zip(self._managers, counts.tolist(), strict=True)
        return [task for manager, count in parts if count for task in manager.sample(count, rng, iteration)]


class EnvManager:
    """Draws tasks from a list, balanced over their classes.

    Args:
        tasks: the tasks to draw from, of one or more classes (`Task.name`).
        curriculum: which of them an iteration draws from; all if None.

    Raises:
        ValueError: there are no tasks, a difficulty is not finite, or all tasks are equally hard.
    """

    def __init__(self, tasks: Sequence[Task], curriculum: Curriculum | None = None) -> None:
        if not tasks:
            raise ValueError("no tasks to sample from; expected at least one")
        self._tasks, self._curriculum = list(tasks), curriculum
        self._difficulties = np.zeros(len(tasks))
        if curriculum is not None:
            self._difficulties = np.array([curriculum.difficulty(task) for task in tasks], dtype=np.float64)
            _check_order(self._tasks, self._difficulties)

    def allowed(self, iteration: int) -> list[Task]:
        """Return the tasks that an iteration draws from, in the order of the list.

        With a curriculum they are its fraction of all, rounded up, and whatever is just as hard as the hardest of them:
        equally hard tasks come in together.
        """
        if self._curriculum is None:
            return self._tasks
        # Rounded, since 1 − (1 − 0.3) of 10 tasks are 3.0000000000000004 in floating point.
        count = math.ceil(round(self._curriculum.fraction(iteration) * len(self._tasks), 9))
        hardest = np.sort(self._difficulties)[max(count, 1) - 1]
        return [self._tasks[i] for i in np.flatnonzero(self._difficulties <= hardest)]

    def fraction(self, iteration: int) -> float:
        """Return which part of the tasks an iteration draws from, in (0, 1]."""
        return len(self.allowed(iteration)) / len(self._tasks)

    def sample(self, num_tasks: int, rng: np.random.Generator, iteration: int = 0) -> list[Task]:
        """Draw `num_tasks` tasks: class counts differ by at most one, goals repeat only when a class runs out of them.

        Any number works: the classes that come once more than others are drawn at random. With a curriculum the same
        holds of the tasks that are allowed, and of the classes that they belong to.

        Args:
            num_tasks: M ≥ 1.
            rng: the only source of randomness; equal generators give equal tasks.
            iteration: of the stage, from 0; without a curriculum it has no effect.
        """
        classes: dict[str, list[Task]] = {}
        for task in self.allowed(iteration):
            classes.setdefault(task.name, []).append(task)
        counts = np.full(len(classes), num_tasks // len(classes))
        counts[rng.permutation(len(classes))[: num_tasks % len(classes)]] += 1
        drawn: list[Task] = []
        for goals, count in zip(classes.values(), counts, strict=True):
            rounds = [rng.permutation(len(goals)) for _ in range(-(-count // len(goals)))]
            drawn += [goals[i] for i in np.concatenate(rounds)[:count]] if rounds else []
        return drawn


def _check_order(tasks: Sequence[Task], difficulties: FloatArray) -> None:
    wrong = np.flatnonzero(~np.isfinite(difficulties))
    if len(wrong):
        first = wrong[0]
        raise ValueError(
            f"the difficulty of {tasks[first].to_json()} is {difficulties[first]}; expected a finite number"
        )
    if np.ptp(difficulties) <= 1e-9 * np.abs(difficulties).max():
        raise ValueError(
            f"the {len(tasks)} training task(s) of {tasks[0].benchmark} are all equally hard: none comes first; leave "
            "out the curriculum"
        )
