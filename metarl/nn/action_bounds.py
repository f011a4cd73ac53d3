"""From what a policy draws to the units of an action space."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from metarl.types import FloatArray


class ActionBounds(nn.Module):
    """From ±1 to the bounds of the action space.

    Args:
        low: `[A]`.
        high: `[A]`.
    """

    def __init__(self, low: FloatArray, high: FloatArray) -> None:
        super().__init__()
        self.low: Tensor
        self.high: Tensor
        self.centre: Tensor
        self.half_range: Tensor
        # Rounded inwards: an action at a bound of float64 must not lie beyond it.
        least, most = low.astype(np.float32), high.astype(np.float32)
        least = np.where(least < low, np.nextafter(least, np.float32(np.inf)), least)
        most = np.where(most > high, np.nextafter(most, np.float32(-np.inf)), most)
        ends = {"low": least, "high": most, "centre": (high + low) / 2, "half_range": (high - low) / 2}
        for name, value in ends.items():
            self.register_buffer(name, torch.from_numpy(value).float())

    def forward(self, actions: Tensor) -> Tensor:
        """Scale and clip `[B, A]`; rounding does not lead out of the bounds."""
        return torch.clamp(self.centre + self.half_range * actions, self.low, self.high)
