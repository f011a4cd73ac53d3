"""What wrappers require of spaces, and how their errors name a space. Imports only metarl's errors."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict
from numpy.typing import NDArray

from metarl.errors import UserError


def space_name(space: gymnasium.Space[Any]) -> str:
    """Return a space in a few words, e.g. `Box (39,) of float64`."""
    if isinstance(space, Box):
        return f"Box {space.shape} of {space.dtype}"
    if isinstance(space, Dict):
        return f"Dict with {', '.join(map(str, space.spaces))}"
    return type(space).__name__


def is_image(space: gymnasium.Space[Any]) -> bool:
    """Return whether a space is one of images, `[H, W, C]` of uint8."""
    return isinstance(space, Box) and len(space.shape) == 3 and space.dtype == np.uint8


def require_bounded_box(space: gymnasium.Space[Any], wrapper: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return low and high of a space of actions; raises UserError unless it is a Box of floats with finite bounds."""
    if not isinstance(space, Box) or space.dtype is None or space.dtype.kind != "f":
        raise UserError(f"{wrapper}: action space is {space_name(space)}; expected a Box of floats")
    if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
        raise UserError(f"{wrapper}: action space is {space_name(space)} with infinite bounds; expected finite ones")
    return space.low, space.high
