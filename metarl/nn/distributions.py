"""Distributions of actions, and how network outputs make one. No other module knows which distribution it is.

The action space chooses: a diagonal Gaussian for a box, categorical distributions for choices. Actions `[..., A]` are
in policy units (see `metarl.spaces.Spaces`): in a box ±1 are the bounds, a choice is its number from 0, as a float.
Shapes: `[...]` any batch, A action size, C = Σ choices.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from metarl.spaces import Spaces

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

    def saturation(self) -> Tensor:
        """Return by how much the mode lies outside the action space, `[...]`; 0 where it cannot."""

    def metrics(self) -> dict[str, Tensor]:
        """Return what is worth tracking, each `[...]`."""


class ActionHead(Protocol):
    """Makes distributions of network outputs, and of actions what a memory reads back."""

    @property
    def free_parameters(self) -> tuple[str, ...]:
        """Names of the parameters that no network puts out; they adapt and are trained as others are."""

    @property
    def output_size(self) -> int:
        """How many numbers the network puts out."""

    @property
    def deviation_size(self) -> int:
        """How many deviations depend on the state, if any shall; 0: the distribution has none."""

    @property
    def noise_size(self) -> int:
        """How many standard normal numbers an action takes."""

    @property
    def feedback_size(self) -> int:
        """How many numbers of its last action a memory reads."""

    def init(self) -> dict[str, Tensor]:
        """Return the free parameters at the start."""

    def __call__(self, outputs: Tensor, params: Mapping[str, Tensor], deviations: Tensor | None = None) -> Distribution:
        """Return the distribution.

        Args:
            outputs: of the network, `[..., S, output_size]`.
            params: holds the free parameters, each `[..., A]`; other entries don't matter.
            deviations: `[..., S, deviation_size]`, where they depend on the state.
        """

    def feedback(self, actions: Tensor) -> Tensor:
        """Return what a memory reads of actions `[..., A]`: `[..., feedback_size]`."""

    def keep_within_bounds(self, params: Mapping[str, Tensor]) -> None:
        """Bring free parameters that a step has carried past their bounds back, in place."""

    def metrics(self, params: Mapping[str, Tensor]) -> dict[str, float]:
        """Return what is worth tracking of the free parameters."""

    def stable_baselines3_parameters(self, params: Mapping[str, Tensor], half_range: Tensor) -> dict[str, Tensor]:
        """Return the free parameters of stable-baselines3's policy, in the units of the environment.

        Args:
            params: holds ours, each `[A]`.
            half_range: `[A]`, half the width of the action space.
        """


def action_head(spaces: Spaces, init_std: float = 1.0, min_std: float = 0.05, max_std: float = 2.0) -> ActionHead:
    """Return the head for an action space; the deviations matter for a box alone (see `GaussianHead`)."""
    if spaces.choices:
        return CategoricalHead(spaces.choices)
    return GaussianHead(spaces.action_size, init_std, min_std, max_std)


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

    def saturation(self) -> Tensor:
        """Σ max(0, |mean| − 1)²: actions are clipped there, and nothing else keeps a mean from drifting far out."""
        return (self.mean.abs() - 1.0).relu().square().sum(-1)

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
    def deviation_size(self) -> int:
        """How many deviations depend on the state, if any shall: A."""
        return self.action_size

    @property
    def noise_size(self) -> int:
        """How many standard normal numbers an action takes: A."""
        return self.action_size

    @property
    def feedback_size(self) -> int:
        """How many numbers of its last action a memory reads: A."""
        return self.action_size

    def feedback(self, actions: Tensor) -> Tensor:
        """Return actions as they are carried out: within ±1."""
        return actions.clamp(-1.0, 1.0)

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


@dataclass(frozen=True)
class Categorical:
    """Independent choices, one for each action dimension; a `Distribution`.

    Attributes:
        logits: `[..., C]`, of the choices of all dimensions, one after another.
        choices: `[A]`, the number of choices of each dimension.
    """

    logits: Tensor
    choices: tuple[int, ...]

    @property
    def mode(self) -> Tensor:
        """See `Distribution.mode`."""
        return self._choose(self.logits)

    def sample(self, noise: Tensor) -> Tensor:
        """The largest of logits plus Gumbel noise −log(−log Φ(z)) (Gumbel 1954), z standard normal `[..., C]`."""
        uniform = 0.5 * (1.0 + torch.erf(noise * math.sqrt(0.5)))
        uniform = uniform.clamp(_LEAST_UNIFORM, 1.0 - _LEAST_UNIFORM)
        return self._choose(self.logits - (-uniform.log()).log())

    def log_prob(self, actions: Tensor) -> Tensor:
        """See `Distribution.log_prob`; the sum of log-probabilities over action dimensions."""
        chosen = zip(self._log_probs(), actions.long().unbind(-1), strict=True)
        return torch.stack([part.gather(-1, action.unsqueeze(-1)).squeeze(-1) for part, action in chosen]).sum(0)

    def entropy(self) -> Tensor:
        """See `Distribution.entropy`."""
        return -torch.stack([(part.exp() * part).sum(-1) for part in self._log_probs()]).sum(0)

    def kl(self, other: Distribution) -> Tensor:
        """See `Distribution.kl`."""
        assert isinstance(other, Categorical)
        pairs = zip(self._log_probs(), other._log_probs(), strict=True)
        return torch.stack([(own.exp() * (own - theirs)).sum(-1) for own, theirs in pairs]).sum(0)

    def parameters(self) -> dict[str, Tensor]:
        """See `Distribution.parameters`."""
        return {"logits": self.logits}

    def with_parameters(self, parameters: Mapping[str, Tensor]) -> Categorical:
        """See `Distribution.with_parameters`."""
        return Categorical(parameters["logits"], self.choices)

    def map(self, function: Callable[[Tensor], Tensor]) -> Categorical:
        """See `Distribution.map`."""
        return Categorical(function(self.logits), self.choices)

    def expanded(self) -> Categorical:
        """See `Distribution.expanded`."""
        return self

    def fisher_diagonal(self, parameter: str, slopes: Tensor) -> Tensor:
        """F = Σ_s Σ_d [Σ_c p_c (∂l_c/∂θ)² − (Σ_c p_c ∂l_c/∂θ)²]: the variance of the logits' slopes."""
        total = slopes.new_zeros(slopes.shape[2:])
        for log_probs, own in zip(self._log_probs(), torch.split(slopes, list(self.choices), 1), strict=True):
            probs = log_probs.exp()
            mean = torch.einsum("sc,sc...->s...", probs, own)
            centred = own - mean.unsqueeze(1)
            total = total + torch.einsum("sc,sc...->...", probs, centred.square())
        return total

    def saturation(self) -> Tensor:
        """0: a choice always lies in the action space."""
        return self.logits.new_zeros(self.logits.shape[:-1])

    def metrics(self) -> dict[str, Tensor]:
        """The mean probability of the likeliest choice, `mode_probability`."""
        return {"mode_probability": torch.stack([part.exp().amax(-1) for part in self._log_probs()]).mean(0)}

    def _log_probs(self) -> list[Tensor]:
        """Return log-probabilities of each dimension's choices, each `[..., choices]`."""
        return [part.log_softmax(-1) for part in torch.split(self.logits, list(self.choices), -1)]

    def _choose(self, scores: Tensor) -> Tensor:
        """Return the best choice of each dimension, `[..., A]`, of scores `[..., C]`."""
        best = [part.argmax(-1) for part in torch.split(scores, list(self.choices), -1)]
        return torch.stack(best, -1).to(scores.dtype)


_LEAST_UNIFORM = 1e-7
"""What uniform numbers are cut at, so that their logarithms are finite in float32."""


@dataclass(frozen=True)
class CategoricalHead:
    """Makes categorical distributions of network outputs, which are their logits.

    Attributes:
        choices: `[A]`, the number of choices of each action dimension.
    """

    free_parameters: ClassVar[tuple[str, ...]] = ()

    choices: tuple[int, ...]

    @property
    def output_size(self) -> int:
        """How many numbers the network puts out: C."""
        return sum(self.choices)

    @property
    def deviation_size(self) -> int:
        """0: there are no deviations."""
        return 0

    @property
    def noise_size(self) -> int:
        """How many standard normal numbers an action takes: C."""
        return sum(self.choices)

    @property
    def feedback_size(self) -> int:
        """How many numbers of its last action a memory reads: C."""
        return sum(self.choices)

    def init(self) -> dict[str, Tensor]:
        """Return no free parameters."""
        return {}

    def __call__(self, outputs: Tensor, params: Mapping[str, Tensor], deviations: Tensor | None = None) -> Categorical:
        """Return the distribution; see `ActionHead`."""
        return Categorical(outputs, self.choices)

    def feedback(self, actions: Tensor) -> Tensor:
        """Return the choices one-hot, `[..., C]`."""
        parts = zip(actions.long().unbind(-1), self.choices, strict=True)
        return torch.cat([torch.nn.functional.one_hot(action, size) for action, size in parts], -1).float()

    def keep_within_bounds(self, params: Mapping[str, Tensor]) -> None:
        """Do nothing: logits have no bounds."""

    def metrics(self, params: Mapping[str, Tensor]) -> dict[str, float]:
        """Return nothing."""
        return {}

    def stable_baselines3_parameters(self, params: Mapping[str, Tensor], half_range: Tensor) -> dict[str, Tensor]:
        """Return nothing: stable-baselines3's categorical policy has no free parameters either."""
        return {}
