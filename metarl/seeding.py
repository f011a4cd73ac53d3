"""Derives every seed of a run from one root seed, by purpose and position; no generator is carried along.

The seed of an iteration's rollouts is a function of (root seed, stage, iteration). Hence a run does not depend on the
number of workers or the frequency of evaluations, and resumes bit for bit without saved generators. (`random_state.py`
saves the global generators, for code outside metarl.)
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """The purpose of a random stream; the numbers must never change, since seeds depend on them."""

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
    """Return the seed sequence for a purpose and position; different arguments give independent seeds.

    Args:
        root: the run's seed.
        purpose: the purpose of the random stream.
        position: the position in the run, e.g. (stage, iteration).
    """
    return np.random.SeedSequence(root, spawn_key=(int(purpose), *position))


def integer_seed(root: int, purpose: Purpose, *position: int) -> int:
    """Return a seed for a torch generator."""
    return int(seeds(root, purpose, *position).generate_state(1, np.uint64)[0] >> np.uint64(1))


def children(parent: np.random.SeedSequence, count: int) -> list[np.random.SeedSequence]:
    """Return independent child seeds of `parent`, the same at every call (unlike `spawn`, which counts its calls)."""
    return [np.random.SeedSequence(parent.entropy, spawn_key=(*parent.spawn_key, i)) for i in range(count)]
