"""Policies as functions of explicit parameters: to be adapted, stacked over tasks and differentiated through.

A policy object is a frozen description; its parameters are a flat dict of tensors that the caller owns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metarl.nn.distributions import gaussian_log_prob

Params = dict[str, Tensor]
"""Parameters by name. Stacked over tasks, every tensor has a leading `[M]`."""

Perturb = Callable[[int, Tensor, Tensor], Tensor]
"""Changes what a hidden layer puts into its nonlinearity: (layer, its inputs, its pre-activations) → the latter."""

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}


def init_mlp(sizes: tuple[int, ...], output_gain: float, generator: torch.Generator) -> Params:
    """Draw an MLP: orthogonal weights, gain √2 in hidden layers (Andrychowicz et al. 2021), zero biases.

    Args:
        sizes: input size, hidden sizes, output size.
        output_gain: gain of the last layer.
        generator: the only source of randomness.

    Returns:
        `weight_i` `[out, in]` and `bias_i` `[out]` for each layer i.
    """
    params: Params = {}
    for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        gain = output_gain if layer == len(sizes) - 2 else math.sqrt(2.0)
        weight = torch.empty(fan_out, fan_in)
        torch.nn.init.orthogonal_(weight, gain, generator=generator)
        params[f"weight_{layer}"], params[f"bias_{layer}"] = weight, torch.zeros(fan_out)
    return params


def mlp_modules(hidden_layers: int) -> dict[str, tuple[str, ...]]:
    """Return the parameters of each module of an MLP by name: `layer_0`, …, and `head`, the output layer."""
    names = [f"layer_{layer}" for layer in range(hidden_layers)] + ["head"]
    return {name: (f"weight_{layer}", f"bias_{layer}") for layer, name in enumerate(names)}


def apply_mlp(params: Params, inputs: Tensor, activation: str, perturb: Perturb | None = None) -> Tensor:
    """Apply an MLP with linear output.

    Args:
        params: from `init_mlp`, plain or stacked over tasks; other entries are passed over.
        inputs: `[S, in]`, or `[M, S, in]` with stacked parameters.
        activation: `tanh` or `relu`.
        perturb: changes the hidden layers (Meta-Dropout).

    Returns:
        `[S, out]` or `[M, S, out]`.
    """
    nonlinearity = ACTIVATIONS[activation]
    layers = sum(name.startswith("weight_") for name in params)
    hidden = inputs
    for layer in range(layers):
        below, hidden = hidden, linear(hidden, params[f"weight_{layer}"], params[f"bias_{layer}"])
        if layer < layers - 1:
            hidden = nonlinearity(hidden if perturb is None else perturb(layer, below, hidden))
    return hidden


def linear(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a layer to inputs `[S, in]`, or `[M, S, in]` with stacked weight `[M, out, in]` and bias `[M, out]`."""
    if weight.ndim == 2:
        return torch.nn.functional.linear(inputs, weight, bias)
    return torch.baddbmm(bias.unsqueeze(-2), inputs, weight.mT)


@dataclass(frozen=True)
class GaussianMlp:
    """A Gaussian policy: mean from an MLP, a standard deviation that does not depend on the observation.

    Attributes:
        observation_size: O.
        action_size: A.
        hidden_sizes: widths of the hidden layers.
        activation: `tanh` or `relu`.
        init_std: standard deviation at the start; 1 covers the action space, which is ±1.
        min_std: lower bound; the gradient at a bound is 0.
        max_std: upper bound.
        heads: output layers; if there are several, the last entries of an observation choose one, one-hot.
    """

    observation_size: int
    action_size: int
    hidden_sizes: tuple[int, ...] = (64, 64)
    activation: str = "tanh"
    init_std: float = 1.0
    min_std: float = 0.05
    max_std: float = 2.0
    heads: int = 1

    def init(self, generator: torch.Generator) -> Params:
        """Draw parameters; the mean starts near 0."""
        sizes = (self.observation_size, *self.hidden_sizes, self.action_size * self.heads)
        log_std = torch.full((self.action_size,), math.log(self.init_std))
        return {**init_mlp(sizes, 0.01, generator), "log_std": log_std}

    @staticmethod
    def modules(hidden_layers: int) -> dict[str, tuple[str, ...]]:
        """Return the parameters of each module by name: `layer_0`, …, `head` and `log_std`."""
        return {**mlp_modules(hidden_layers), "log_std": ("log_std",)}

    def distribution(
        self, params: Params, observations: Tensor, perturb: Perturb | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return mean `[..., S, A]` and log standard deviation `[..., 1, A]` for observations `[..., S, O]`."""
        log_std = params["log_std"].clamp(*self._bounds)
        mean = apply_mlp(params, observations, self.activation, perturb)
        if self.heads > 1:
            mean = choose_head(mean, observations[..., -self.heads :])
        return mean, log_std.unsqueeze(-2)

    def keep_within_bounds(self, params: Params) -> None:
        """Bring a deviation that a step has carried past its bounds back, in place: there it has no gradient."""
        with torch.no_grad():
            params["log_std"].clamp_(*self._bounds)

    @property
    def _bounds(self) -> tuple[float, float]:
        return math.log(self.min_std), math.log(self.max_std)

    def log_prob(self, params: Params, observations: Tensor, actions: Tensor, perturb: Perturb | None = None) -> Tensor:
        """Joint log-density of actions: the SUM over action dimensions.

        Args:
            params: plain, or stacked with `[M]` in front.
            observations: `[S, O]` or `[M, S, O]`, normalised.
            actions: `[S, A]` or `[M, S, A]`.
            perturb: changes the hidden layers.

        Returns:
            `[S]` or `[M, S]`.
        """
        mean, log_std = self.distribution(params, observations, perturb)
        return gaussian_log_prob(mean, log_std, actions)


def check_deviations(init_std: float, min_std: float, max_std: float) -> None:
    """Raise ValueError unless the initial standard deviation lies within its bounds."""
    if not min_std <= init_std <= max_std:
        raise ValueError(f"init_std is {init_std}; expected between min_std {min_std} and max_std {max_std}")


def choose_head(outputs: Tensor, cues: Tensor) -> Tensor:
    """Return what one head says, `[..., A]`, of the outputs of all of them `[..., heads · A]`; cues `[..., heads]`."""
    by_head = outputs.reshape(*outputs.shape[:-1], cues.shape[-1], -1)
    return (by_head * cues.unsqueeze(-1)).sum(-2)
