"""Distributions of actions, and how network outputs make one. No other module knows which distribution it is.

Actions are in policy units: ±1 are the bounds of the action space. Shapes: `[...]` any batch, A action size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

_LOG_SQRT_2_PI = 0.5 * math.log(2.0 * math.pi)
_UNIT_ENTROPY = 0.5 * math.log(2.0 * math.pi * math.e)
"""Entropy of a Gaussian in one dimension with standard deviation 1."""


class Distribution(Protocol):
    """A distribution of actions for each entry of a batch."""

    @property
    def mode(self) -> Tensor:
        """The most likely action, `[..., A]`."""

    def sample(self, noise: Tensor) -> Tensor:
        """Return actions `[..., A]` drawn with given standard normal noise `[..., noise_size]`; zeros give the mode."""

    def log_prob(self, actions: Tensor) -> Tensor:
        """Return the joint log-density `[...]` of actions `[..., A]`: the SUM over action dimensions."""

    def entropy(self) -> Tensor:
        """Return the entropy `[...]` in nats."""

    def kl(self, other: Distribution) -> Tensor:
        """Return KL(self‖other) `[...]`; `other` is of the same kind."""

    def parameters(self) -> dict[str, Tensor]:
        """Return the tensors that define the distribution, by name; what a network puts out comes first."""

    def with_parameters(self, parameters: Mapping[str, Tensor]) -> Distribution:
        """Return a distribution of the same kind with other parameters."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Distribution:
        """Return the distribution with `function` applied to each parameter."""

    def expanded(self) -> Distribution:
        """Return the distribution with all parameters broadcast to one shape."""

    def fisher_diagonal(self, parameter: str, slopes: Tensor) -> Tensor:
        """Return the diagonal Fisher information of θ through one parameter, summed over S states.

        Args:
            parameter: name of a parameter of the distribution, `[S, A]`.
            slopes: its derivative for θ, `[S, A, ...]`.

        Returns:
            `[...]`, the shape of θ.
        """

    def metrics(self) -> dict[str, Tensor]:
        """Return what is worth tracking, each `[...]`."""


@dataclass(frozen=True)
class DiagonalGaussian:
    """Independent Gaussians, one for each action dimension; a `Distribution`.

    Attributes:
        mean: `[..., A]`.
        log_std: `[..., A]`, or of a shape that broadcasts to it.
    """

    mean: Tensor
    log_std: Tensor

    @property
    def mode(self) -> Tensor:
        """See `Distribution.mode`."""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """See `Distribution.sample`."""
        return self.mean + self.log_std.exp() * noise

    def log_prob(self, actions: Tensor) -> Tensor:
        """See `Distribution.log_prob`."""
        squares = ((actions - self.mean) * (-self.log_std).exp()).square()
        return -(0.5 * squares + self.log_std + _LOG_SQRT_2_PI).sum(-1)

    def entropy(self) -> Tensor:
        """See `Distribution.entropy`."""
        return (self.log_std + _UNIT_ENTROPY).sum(-1)

    def kl(self, other: Distribution) -> Tensor:
        """See `Distribution.kl`."""
        assert isinstance(other, DiagonalGaussian)
        variances = (2.0 * (self.log_std - other.log_std)).exp()
        squares = variances + ((self.mean - other.mean) * (-other.log_std).exp()).square()
        return (other.log_std - self.log_std + 0.5 * (squares - 1.0)).sum(-1)

    def parameters(self) -> dict[str, Tensor]:
        """See `Distribution.parameters`."""
        return {"mean": self.mean, "log_std": self.log_std}

    def with_parameters(self, parameters: Mapping[str, Tensor]) -> DiagonalGaussian:
        """See `Distribution.with_parameters`."""
        return DiagonalGaussian(parameters["mean"], parameters["log_std"])

    def map(self, function: Callable[[Tensor], Tensor]) -> DiagonalGaussian:
        """See `Distribution.map`."""
        return DiagonalGaussian(function(self.mean), function(self.log_std))

    def expanded(self) -> DiagonalGaussian:
        """See `Distribution.expanded`."""
        return DiagonalGaussian(self.mean, self.log_std.expand_as(self.mean))

    def fisher_diagonal(self, parameter: str, slopes: Tensor) -> Tensor:
        """F = Σ_s Σ_d (∂μ_d/∂θ)² / σ_d² through the mean, 2 Σ_s Σ_d (∂log σ_d/∂θ)² through the deviation."""
        if parameter == "mean":
            return torch.einsum("sa,sa...->...", (-2.0 * self.log_std).exp(), slopes.square())
        return 2.0 * slopes.square().sum((0, 1))

    def metrics(self) -> dict[str, Tensor]:
        """The mean standard deviation over action dimensions, `std`."""
        return {"std": self.log_std.exp().mean(-1)}


@dataclass(frozen=True)
class GaussianHead:
    """Makes diagonal Gaussians of network outputs: the mean is the output, log σ a free parameter.

    Attributes:
        action_size: A.
        init_std: standard deviation at the start; 1 covers the action space, which is ±1.
        min_std: lower bound; the gradient at a bound is 0.
        max_std: upper bound.

    Raises:
        ValueError: the initial deviation lies outside its bounds.
    """

    free_parameters: ClassVar[tuple[str, ...]] = ("log_std",)
    """Names of the parameters that no network puts out; they adapt and are trained as others are."""

    action_size: int
    init_std: float = 1.0
    min_std: float = 0.05
    max_std: float = 2.0

    def __post_init__(self) -> None:
        if not self.min_std <= self.init_std <= self.max_std:
            raise ValueError(
                f"init_std is {self.init_std}; expected between min_std {self.min_std} and max_std {self.max_std}"
            )

    @property
    def output_size(self) -> int:
        """How many numbers the network puts out: A."""
        return self.action_size

    @property
    def noise_size(self) -> int:
        """How many standard normal numbers an action takes: A."""
        return self.action_size

    def init(self) -> dict[str, Tensor]:
        """Return the free parameters at the start."""
        return {"log_std": torch.full((self.action_size,), math.log(self.init_std))}

    def __call__(
        self, outputs: Tensor, params: Mapping[str, Tensor], deviations: Tensor | None = None
    ) -> DiagonalGaussian:
        """Return the distribution.

        Args:
            outputs: of the network, `[..., S, A]`.
            params: holds the free parameters, `[..., A]`; other entries don't matter.
            deviations: added to log σ, `[..., S, A]`, for one that depends on the state; None: it does not.
        """
        log_std = params["log_std"].unsqueeze(-2) if deviations is None else params["log_std"] + deviations
        return DiagonalGaussian(outputs, log_std.clamp(*self._bounds))

    def keep_within_bounds(self, params: Mapping[str, Tensor]) -> None:
        """Bring a deviation that a step has carried past its bounds back, in place: there it has no gradient."""
        with torch.no_grad():
            params["log_std"].clamp_(*self._bounds)

    def metrics(self, params: Mapping[str, Tensor]) -> dict[str, float]:
        """Return what is worth tracking of the free parameters."""
        return {"std": float(params["log_std"].detach().exp().mean())}

    def stable_baselines3_parameters(self, params: Mapping[str, Tensor], half_range: Tensor) -> dict[str, Tensor]:
        """Return the free parameters of stable-baselines3's policy, in the units of the environment.

        Args:
            params: holds ours, `[A]`.
            half_range: `[A]`, half the width of the action space.
        """
        return {"log_std": params["log_std"].clamp(*self._bounds) + half_range.log()}

    @functools.cached_property
    def _bounds(self) -> tuple[float, float]:
        return math.log(self.min_std), math.log(self.max_std)
