"""Fast helpers for the official source of Meta-World: the same bits, without the overhead of numpy and scipy.

Imports nothing of metarl.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from math import sqrt
from types import FunctionType, SimpleNamespace
from typing import Any

import metaworld.utils.reward_utils as official_rewards
import numpy as np
from metaworld.sawyer_xyz_env import SawyerXYZEnv
from numpy.typing import NDArray


def norm(x: Any, ord: Any = None, axis: Any = None, keepdims: bool = False) -> Any:
    """Same as `np.linalg.norm`: the root of the same dot product."""
    if type(x) is not np.ndarray or x.ndim != 1 or (ord is not None and ord != 2) or axis is not None or keepdims:
        return np.linalg.norm(x, ord, axis, keepdims)
    x = x.ravel()
    return np.float64(sqrt(x.dot(x)))


def _hstack(arrays: Sequence[Any], **options: Any) -> Any:
    if options or len(arrays) != 2 or not (type(arrays[0]) is type(arrays[1]) is np.ndarray):
        return np.hstack(arrays, **options)
    return np.concatenate(arrays) if arrays[0].ndim == 1 else np.hstack(arrays)


def _clip(x: Any, low: Any, high: Any, **options: Any) -> Any:
    return x if isinstance(x, np.floating) and low <= x <= high else np.clip(x, low, high, **options)


def _copied(x: Any) -> Any:
    return x.copy() if type(x) is np.ndarray else np.copy(x)


_AT_MARGIN = 0.1
_LONG_TAIL = sqrt(1 / _AT_MARGIN - 1)
_GAUSSIAN = np.sqrt(-2 * np.log(_AT_MARGIN))


def tolerance(
    x: Any,
    bounds: tuple[float, float] = (0.0, 0.0),
    margin: Any = 0.0,
    sigmoid: str = "gaussian",
    value_at_margin: float = _AT_MARGIN,
) -> Any:
    """Same as `reward_utils.tolerance`; faster for scalars with the settings that rewards use."""
    low, high = bounds
    if type(x) is np.ndarray or not margin > 0 or low > high or value_at_margin != _AT_MARGIN:
        return official_rewards.tolerance(x, bounds, margin, sigmoid, value_at_margin)  # type: ignore[arg-type]
    if low <= x <= high:
        return 1.0
    distance = (low - x if x < low else x - high) / margin
    if sigmoid == "long_tail":
        return 1 / ((float(distance) * _LONG_TAIL) ** 2 + 1)
    if sigmoid == "gaussian":
        return float(np.exp(-0.5 * (distance * _GAUSSIAN) ** 2))
    return official_rewards.tolerance(x, bounds, margin, sigmoid, value_at_margin)  # type: ignore[arg-type]


class _Rotation:
    """The part of `scipy.spatial.transform.Rotation` that the official source uses."""

    @staticmethod
    def from_matrix(matrix: NDArray[np.float64]) -> _Rotation:
        """Return the rotation of a matrix `[3, 3]`, without scipy's check: MuJoCo's matrices are orthogonal."""
        rotation = _Rotation()
        rotation._matrix = matrix
        return rotation

    _matrix: NDArray[np.float64]

    def as_quat(self) -> NDArray[np.float64]:
        """Return x, y, z, w, with the operations in scipy's order (`Rotation.from_matrix`, Markley 2008)."""
        (a, b, c), (d, e, f), (g, h, i) = self._matrix.tolist()
        trace = a + e + i
        largest = max(a, e, i, trace)
        if a == largest:
            x, y, z, w = 1 - trace + 2 * a, d + b, g + c, h - f
        elif e == largest:
            x, y, z, w = d + b, 1 - trace + 2 * e, h + f, c - g
        elif i == largest:
            x, y, z, w = g + c, h + f, 1 - trace + 2 * i, d - b
        else:
            x, y, z, w = h - f, c - g, d - b, 1 + trace
        length = sqrt(x * x + y * y + z * z + w * w)
        return np.array((x / length, y / length, z / length, w / length))


_LINALG = SimpleNamespace(**{**vars(np.linalg), "norm": norm})
_NUMPY = {"linalg": _LINALG, "abs": abs, "hstack": _hstack, "clip": _clip, "copy": _copied}
_REPLACED = {
    "np": SimpleNamespace(**{**vars(np), **_NUMPY}),
    "reward_utils": SimpleNamespace(**{**vars(official_rewards), "tolerance": tolerance}),
    "Rotation": _Rotation,
}


@cache
def fast_globals(module: str) -> dict[str, Any]:
    """Return the globals of an official module with the slow helpers replaced."""
    official = vars(sys.modules[module])
    return {**official, **{name: value for name, value in _REPLACED.items() if name in official}}


_REQUIRES_TASK = SawyerXYZEnv._Decorators.assert_task_is_set(lambda: None).__code__


def rebuilt(value: Any) -> Any:
    """Return the same function over fast globals, without upstream's check for a task, which `step` performs."""
    if isinstance(value, staticmethod):
        return staticmethod(rebuilt(value.__func__))
    if isinstance(value, property):
        return property(rebuilt(value.fget))
    if not isinstance(value, FunctionType):
        return value
    if value.__code__ is _REQUIRES_TASK:
        value = value.__closure__[0].cell_contents  # type: ignore[index]
    function = FunctionType(
        value.__code__, fast_globals(value.__module__), value.__name__, value.__defaults__, value.__closure__
    )
    function.__kwdefaults__ = value.__kwdefaults__
    return function
