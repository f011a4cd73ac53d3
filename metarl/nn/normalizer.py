"""Observation normalization: running mean and variance that scale observations before a policy sees them.

Imports nothing of metarl.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normalizer:
    """Mean and variance of all observations so far; each update returns a new normaliser.

    Statistics of a random policy alone would saturate the policy's input: on Meta-World a random policy hardly moves
    the hand, so that goals lie many of its standard deviations away. Therefore the statistics keep learning from the
    trained policy's data, `floor` bounds the scale from below, and nothing is clipped.

    Attributes:
        mean: `[O]`, float64.
        variance: `[O]`, float64.
        count: scalar, float64, how many observations it has seen.
        floor: smallest scale, in the units of the observation; a constant entry is not blown up.
        raw: range of entries that are not normalised: the first, and the one behind the last.
        raw_scale: what they are divided by.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor
    floor: float
    raw: tuple[int, int] = (0, 0)
    raw_scale: float = 1.0

    @classmethod
    def identity(
        cls, observation_size: int, floor: float, raw: tuple[int, int] = (0, 0), raw_scale: float = 1.0
    ) -> Normalizer:
        """Return the normaliser that has seen nothing; it changes nothing but the scale of raw entries."""
        size = (observation_size,)
        mean, variance = torch.zeros(size, dtype=torch.float64), torch.ones(size, dtype=torch.float64)
        variance[slice(*raw)] = raw_scale**2
        return cls(mean, variance, torch.zeros((), dtype=torch.float64), floor, raw, raw_scale)

    def __call__(self, observations: Tensor) -> Tensor:
        """Shift and scale `[..., O]`."""
        scale = self.variance.sqrt().clamp_min(self.floor)
        if not observations.is_floating_point():  # bytes of images
            observations = observations.float()
        return (observations - self.mean.to(observations.dtype)) / scale.to(observations.dtype)

    def update(self, observations: Tensor, valid: Tensor) -> Normalizer:
        """Merge a batch into the statistics (Chan et al. 1979), in float64.

        Args:
            observations: `[..., O]`.
            valid: `[...]`, bool.
        """
        batch = observations[valid].double()
        if len(batch) == 0:
            return self
        count = torch.tensor(float(len(batch)), dtype=torch.float64, device=batch.device)
        total = self.count + count
        delta = batch.mean(0) - self.mean
        squares = self.variance * self.count + batch.var(0, correction=0) * count
        variance = (squares + delta.square() * self.count * count / total) / total
        mean = self.mean + delta * count / total
        mean[slice(*self.raw)], variance[slice(*self.raw)] = 0.0, self.raw_scale**2
        return replace(self, mean=mean, variance=variance, count=total)

    def to(self, device: torch.device | str) -> Normalizer:
        """Return the normaliser on `device`."""
        return self.with_statistics(self.state_dict(), device)

    def with_statistics(self, state: Mapping[str, Tensor], device: torch.device | str) -> Normalizer:
        """Return the normaliser with the statistics that `state_dict` returned, on `device`."""
        mean, variance, count = (state[name].to(device) for name in ("mean", "variance", "count"))
        return replace(self, mean=mean, variance=variance, count=count)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the statistics by name."""
        return {"mean": self.mean, "variance": self.variance, "count": self.count}
