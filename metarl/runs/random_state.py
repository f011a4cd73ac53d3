"""The state of the global random streams: of Python, numpy and torch, the GPUs' included.

metarl itself draws from none of them (see `metarl.seeding`); environments and methods of one's own may.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def random_state() -> dict[str, Tensor]:
    """Return the state of all streams as tensors; GPUs that nothing has used are passed over, and left alone."""
    version, words, gauss = random.getstate()
    _, key, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python.words": torch.tensor([version, *words], dtype=torch.int64),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy.key": torch.tensor(np.asarray(key).astype(np.int64)),
        "numpy.position": torch.tensor([position, has_gauss]),
        "numpy.gauss": torch.tensor([cached], dtype=torch.float64),
        "torch.cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state |= {f"torch.cuda.{i}": each for i, each in enumerate(torch.cuda.get_rng_state_all())}
    return state


_BELOW_2_32 = (0, 2**32 - 1)
_POSITION = (0, 624)
"""In the 624 words of a Mersenne twister, after whose last new ones are made."""


def check_random_state(state: Mapping[str, Tensor]) -> None:
    """Raise ValueError naming the entry that is missing or that no stream can be in; numpy would crash at some."""
    words = _numbers(state, "python.words", torch.int64, 626)
    _check_range("python.words", words[:1], 3, 3)  # the version
    _check_range("python.words", words[1:-1], *_BELOW_2_32)
    _check_range("python.words", words[-1:], *_POSITION)
    _numbers(state, "python.gauss", torch.float64, 0, 1)
    _check_range("numpy.key", _numbers(state, "numpy.key", torch.int64, 624), *_BELOW_2_32)
    position = _numbers(state, "numpy.position", torch.int64, 2)
    _check_range("numpy.position", position[:1], *_POSITION)
    _check_range("numpy.position", position[1:], 0, 1)  # whether there is a second normal number
    _numbers(state, "numpy.gauss", torch.float64, 1)
    try:
        torch.Generator().set_state(_numbers(state, "torch.cpu", torch.uint8, len(torch.get_rng_state())))
    except RuntimeError as error:
        raise ValueError(f"cannot load 'torch.cpu': {error}") from error
    for name in sorted(name for name in state if name.startswith("torch.cuda.")):
        _, offset = _numbers(state, name, torch.uint8, 16).clone().view(torch.int64).tolist()
        if offset % 4:
            raise ValueError(f"cannot load {name!r}: expected an offset that is a multiple of 4, found {offset}")


def _numbers(state: Mapping[str, Tensor], name: str, dtype: torch.dtype, *sizes: int) -> Tensor:
    """Return an entry, one of so many numbers; raises ValueError."""
    if name not in state:
        raise ValueError(f"cannot load {name!r}: found nothing")
    value = state[name]
    if value.dtype != dtype or value.ndim != 1 or len(value) not in sizes:
        numbers = " or ".join(map(str, sizes))
        raise ValueError(
            f"cannot load {name!r}: expected {numbers} of {dtype}, found {value.dtype} of shape {tuple(value.shape)}"
        )
    return value


def _check_range(name: str, values: Tensor, least: int, most: int) -> None:
    if bool(((values < least) | (values > most)).any()):
        raise ValueError(f"cannot load {name!r}: expected numbers from {least} to {most}, found others")


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Restore what `random_state` returned; GPUs that are not here are passed over.

    Raises:
        ValueError: an entry is missing, or no stream can be in that state; see `check_random_state`.
    """
    check_random_state(state)
    version, *words = state["python.words"].tolist()
    gauss = state["python.gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    position, has_gauss = state["numpy.position"].tolist()
    key = state["numpy.key"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, position, has_gauss, float(state["numpy.gauss"])))
    torch.set_rng_state(state["torch.cpu"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"torch.cuda.{i}" in state:
            torch.cuda.set_rng_state(state[f"torch.cuda.{i}"], i)
