"""Samples the tasks of an iteration. Owns the balance over classes; imports nothing of metarl but `types`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from metarl.types import Task


class EnvManager:
    """Draws tasks from a list, balanced over their classes.

    Args:
        tasks: the tasks to draw from, of one or more classes (`Task.name`).
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        if not tasks:
            raise ValueError("no tasks to sample from; expected at least one")
        self._classes: dict[str, list[Task]] = {}
        for task in tasks:
            self._classes.setdefault(task.name, []).append(task)

    def sample(self, num_tasks: int, rng: np.random.Generator) -> list[Task]:
        """Draw `num_tasks` tasks: class counts differ by at most one, goals repeat only when a class runs out of them.

        Any number works: the classes that come once more than others are drawn at random.

        Args:
            num_tasks: M ≥ 1.
            rng: the only source of randomness; equal generators give equal tasks.
        """
        classes = list(self._classes)
        counts = np.full(len(classes), num_tasks // len(classes))
        counts[rng.permutation(len(classes))[: num_tasks % len(classes)]] += 1
        drawn: list[Task] = []
        for name, count in zip(classes, counts, strict=True):
            goals = self._classes[name]
            rounds = [rng.permutation(len(goals)) for _ in range(-(-count // len(goals)))]
            drawn += [goals[i] for i in np.concatenate(rounds)[:count]] if rounds else []
        return drawn
