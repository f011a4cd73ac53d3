"""From what a policy draws to the units of an action space."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from metarl.spaces import Spaces


class ActionUnits(nn.Module):
    """From policy units to those of an action space: to the bounds of a box, to the numbers of choices.

    Args:
        spaces: of the environment.
    """

    def __init__(self, spaces: Spaces) -> None:
        super().__init__()
        self.low: Tensor
        self.high: Tensor
        self.centre: Tensor
        self.half_range: Tensor
        self._is_box = spaces.action_kind == "box"
        low, high = spaces.action_bounds
        # Rounded inwards: an action at a bound of float64 must not lie beyond it.
        least, most = low.astype(np.float32), high.astype(np.float32)
        least = np.where(least < low, np.nextafter(least, np.float32(np.inf)), least)
        most = np.where(most > high, np.nextafter(most, np.float32(-np.inf)), most)
        ends = {"low": least, "high": most, "centre": (high + low) / 2, "half_range": (high - low) / 2}
        for name, value in ends.items():
            self.register_buffer(name, torch.from_numpy(value).float())

    def forward(self, actions: Tensor) -> Tensor:
        """Return actions `[B, A]` of a box scaled and clipped, rounding included; of choices their numbers, int64."""
        if self._is_box:
            return torch.clamp(self.centre + self.half_range * actions, self.low, self.high)
        return (actions + self.low).long()
