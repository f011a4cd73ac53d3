"""Random streams of wrappers: a function of the seed of the episode, the wrapper, and its position in the list."""

from __future__ import annotations

import zlib

import numpy as np


def episode_rng(seed: int | None, wrapper: str, position: int) -> np.random.Generator:
    """Return the generator of one wrapper for one episode, independent of the environment's and of other wrappers'.

    Args:
        seed: of the reset; None draws one from the operating system.
        wrapper: the name of the wrapper.
        position: its index in the list of wrappers.
    """
    key = zlib.crc32(wrapper.encode()), position
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
