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
    """Restore what `adam_state` returned; a parameter without an entry starts afresh."""
    for name, param in params.items():
        if f"adam.step.{name}" in state:
            entries = {entry: state[f"adam.{entry}.{name}"].clone() for entry in _ENTRIES}
            optimizer.state[param] = {
                key: value if key == "step" else value.to(param.device) for key, value in entries.items()
            }
