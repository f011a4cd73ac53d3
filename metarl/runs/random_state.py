"""Saves and restores the global random streams of Python, numpy and torch, GPUs included.

metarl draws from none of them (see `metarl.seeding`); custom environments and methods may.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_state() -> dict[str, Tensor]:
    """Return a copy of the state of every stream; of GPUs only those that this process already uses."""
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
        state |= {f"torch.cuda.{i}": gpu for i, gpu in enumerate(torch.cuda.get_rng_state_all())}
    return state


def check_random_state(state: Mapping[str, Tensor]) -> None:
    """Raise ValueError if `set_random_state` cannot restore this state; the global streams stay as they are."""
    try:
        _restore(state, random.Random(), np.random.RandomState(), torch.Generator())
        for name in (name for name in state if name.startswith("torch.cuda.")):
            _, offset = state[name].view(torch.int64).tolist()
            if state[name].dtype != torch.uint8 or offset % 4:
                raise ValueError(f"{name}: expected 16 bytes with an offset that is a multiple of 4")
    except Exception as error:  # the libraries raise whatever they run into
        raise ValueError(f"invalid random state: {type(error).__name__}: {str(error)[:200]}") from error


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Restore what `random_state` returned, except for GPUs that this machine lacks; raises ValueError."""
    check_random_state(state)
    _restore(state, random, np.random, torch.default_generator)
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"torch.cuda.{i}" in state:
            torch.cuda.set_rng_state(state[f"torch.cuda.{i}"], i)


def _restore(state: Mapping[str, Tensor], python: Any, numpy: Any, cpu: torch.Generator) -> None:
    version, *words = state["python.words"].tolist()
    python.setstate((version, tuple(words), next(map(float, state["python.gauss"].tolist()), None)))
    position, has_gauss = state["numpy.position"].tolist()
    if not 0 <= position <= 624:  # numpy would read beyond its key, and crash
        raise ValueError(f"numpy.position is {position}; expected 0 to 624")
    key = state["numpy.key"].numpy().astype(np.uint32)
    numpy.set_state(("MT19937", key, position, has_gauss, float(state["numpy.gauss"])))
    cpu.set_state(state["torch.cpu"])
