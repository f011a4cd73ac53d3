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
    """Return the state of all streams as tensors."""
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
    if torch.cuda.is_available():
        state |= {f"torch.cuda.{i}": each for i, each in enumerate(torch.cuda.get_rng_state_all())}
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Restore what `random_state` returned; GPUs that are not here are passed over."""
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
