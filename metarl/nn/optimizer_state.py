"""The state of optimisers and agents as flat, named tensors, for checkpoints that hold tensors alone.

Imports nothing of metarl.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

_ENTRIES: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.Adam: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.RMSprop: ("step", "square_avg"),
    torch.optim.SGD: (),
}
"""What each optimiser keeps a parameter, without momentum for the last two."""


def optimizer_state(optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `optimizer.<entry>.<parameter>` for every parameter that has been stepped."""
    return {
        f"optimizer.{entry}.{name}": optimizer.state[param][entry]
        for name, param in params.items()
        if param in optimizer.state
        for entry in _ENTRIES[type(optimizer)]
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> None:
    """Restore what `optimizer_state` returned; a parameter without entries starts afresh.

    Raises:
        ValueError: an entry is missing or has another shape; the message names it, and nothing was changed.
    """
    entries = _ENTRIES[type(optimizer)]
    stepped = {name: param for name, param in params.items() if any(f"optimizer.{e}.{name}" in state for e in entries)}
    for name, param in stepped.items():
        for entry in entries:
            key, expected = f"optimizer.{entry}.{name}", () if entry == "step" else tuple(param.shape)
            found = tuple(state[key].shape) if key in state else "nothing"
            if found != expected:
                raise ValueError(f"cannot load {key!r}: expected shape {expected}, found {found}")
    optimizer.state.clear()
    for name, param in stepped.items():
        values = {entry: state[f"optimizer.{entry}.{name}"].clone() for entry in entries}
        optimizer.state[param] = {
            key: value if key == "step" else value.to(param.device) for key, value in values.items()
        }


def clip_gradients(params: Mapping[str, Tensor], max_norm: float, loss: float, cure: str) -> float:
    """Scale the gradient of parameters down to `max_norm`.

    Args:
        params: by name.
        max_norm: the largest norm of all of them together.
        loss: whose gradient it is.
        cure: what to do if it is not finite.

    Returns:
        Its norm before.

    Raises:
        FloatingPointError: the loss or its gradient is not finite; the gradient stays as it is.
    """
    gradients = {name: value.grad for name, value in params.items() if value.grad is not None}
    norm = torch.nn.utils.get_total_norm(gradients.values())
    measured = float(norm)
    if not math.isfinite(measured + loss):
        raise FloatingPointError(f"the gradient is not finite (norm {measured}, loss {loss}); {cure}")
    torch.nn.utils.clip_grads_with_norm_(params.values(), max_norm, norm)
    return measured


def check_entries(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check an agent's state before it is loaded; what belongs to optimisers `load_optimizer_state` checks.

    Args:
        state: to load.
        expected: the state that the agent has.

    Raises:
        ValueError: an entry is missing or has another shape; the message names it.
    """
    for name, value in expected.items():
        if "optimizer" not in name.split(".") and (name not in state or state[name].shape != value.shape):
            found = tuple(state[name].shape) if name in state else "nothing"
            raise ValueError(f"cannot load {name!r}: expected shape {tuple(value.shape)}, found {found}")
