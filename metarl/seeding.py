"""All randomness of a run comes from one root seed, by purpose and position; no stream is carried along.

The seed of an iteration's rollouts is a function of (root seed, stage, iteration). A run therefore does not depend on
the number of workers or on how often it is evaluated, and a resumed run needs no saved generator to go on exactly.
(`random_state.py` saves the global ones, for what is not metarl's own.)
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a random stream is for; the numbers are part of what makes a run reproducible and never change."""

    AGENT = 0
    TASKS = 1
    ROLLOUTS = 2
    EVALUATION_TASKS = 3
    EVALUATION_ROLLOUTS = 4
    UNTRAINED_AGENT = 5
    BOOTSTRAP = 6
    META_DROPOUT = 7
    MINIBATCHES = 8
    STABILITY = 9
    CONSOLIDATION = 10


def seeds(root: int, purpose: Purpose, *position: int) -> np.random.SeedSequence:
    """Return the seeds for one use: the same arguments give the same seeds, other ones independent seeds.

    Args:
        root: the run's seed.
        purpose: what they are for.
        position: where in the run, e.g. (stage, iteration).
    """
    return np.random.SeedSequence(root, spawn_key=(int(purpose), *position))


def integer_seed(root: int, purpose: Purpose, *position: int) -> int:
    """Return a seed for a torch generator."""
    return int(seeds(root, purpose, *position).generate_state(1, np.uint64)[0] >> np.uint64(1))


def children(parent: np.random.SeedSequence, count: int) -> list[np.random.SeedSequence]:
    """Return independent seeds below `parent`, the same each time (`spawn` counts its calls)."""
    return [np.random.SeedSequence(parent.entropy, spawn_key=(*parent.spawn_key, i)) for i in range(count)]
