"""Adam's state as flat, named tensors, for checkpoints that hold tensors alone. Imports nothing of metarl."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_ENTRIES = ("step", "exp_avg", "exp_avg_sq")


def adam_state(optimizer: torch.optim.Adam, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `adam.<entry>.<parameter>` for every parameter that has been stepped."""
    return {
        f"adam.{entry}.{name}": optimizer.state[param][entry]
        for name, param in params.items()
        if param in optimizer.state
        for entry in _ENTRIES
    }


def load_adam_state(optimizer: torch.optim.Adam, params: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Restore what `adam_state` returned; a parameter without entries starts afresh.

    Raises:
        ValueError: an entry is missing or has another shape; the message names it.
    """
    optimizer.state.clear()
    for name, param in params.items():
        if any(f"adam.{entry}.{name}" in state for entry in _ENTRIES):
            for entry in _ENTRIES:
                key, expected = f"adam.{entry}.{name}", () if entry == "step" else tuple(param.shape)
                found = tuple(state[key].shape) if key in state else "nothing"
                if found != expected:
                    raise ValueError(f"cannot load {key!r}: expected shape {expected}, found {found}")
            entries = {entry: state[f"adam.{entry}.{name}"].clone() for entry in _ENTRIES}
            optimizer.state[param] = {
                key: value if key == "step" else value.to(param.device) for key, value in entries.items()
            }
