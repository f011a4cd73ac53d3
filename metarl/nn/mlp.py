"""MLPs as functions of explicit parameters: to be adapted, stacked over tasks and differentiated through.

A policy object is a frozen description; its parameters are a flat dict of tensors that the caller owns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metarl.nn.distributions import ActionHead, Distribution
from metarl.nn.encoders import ImageEncoder

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


def mlp_modules(hidden_layers: int, free: tuple[str, ...] = ()) -> dict[str, tuple[str, ...]]:
    """Return the parameters of each module of an MLP by name: `layer_0`, …, `head` (the last) and `free` ones."""
    names = [f"layer_{layer}" for layer in range(hidden_layers)] + ["head"]
    layers = {name: (f"weight_{layer}", f"bias_{layer}") for layer, name in enumerate(names)}
    return {**layers, **{name: (name,) for name in free}}


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


def tanh_layers(sizes: tuple[int, ...], output_gain: float, generator: torch.Generator) -> nn.Sequential:
    """Return tanh layers with orthogonal weights, gain √2, and a linear last one (Andrychowicz et al. 2021)."""
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        layer = nn.Linear(fan_in, fan_out)
        final = i == len(sizes) - 2
        nn.init.orthogonal_(layer.weight, output_gain if final else math.sqrt(2.0), generator=generator)
        nn.init.zeros_(layer.bias)
        layers += [layer] if final else [layer, nn.Tanh()]
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class MlpPolicy:
    """A policy without a memory: an MLP whose outputs make a distribution of actions.

    Attributes:
        observation_size: O.
        head: what makes the distribution.
        hidden_sizes: widths of the hidden layers.
        activation: `tanh` or `relu`.
        heads: output layers; if there are several, the last entries of an observation choose one, one-hot.
        encoder: reads images before the MLP does; None: observations are vectors.
    """

    observation_size: int
    head: ActionHead
    hidden_sizes: tuple[int, ...] = (64, 64)
    activation: str = "tanh"
    heads: int = 1
    encoder: ImageEncoder | None = None

    def init(self, generator: torch.Generator) -> Params:
        """Draw parameters; the outputs start near 0."""
        inputs = self.observation_size if self.encoder is None else self.encoder.size
        sizes = (inputs, *self.hidden_sizes, self.head.output_size * self.heads)
        encoder = {} if self.encoder is None else self.encoder.init(generator)
        return {**encoder, **init_mlp(sizes, 0.01, generator), **self.head.init()}

    def distribution(self, params: Params, observations: Tensor, perturb: Perturb | None = None) -> Distribution:
        """Return the distribution of actions, `[..., S]`, for observations `[..., S, O]`."""
        inputs = observations if self.encoder is None else self.encoder(params, observations)
        outputs = apply_mlp(params, inputs, self.activation, perturb)
        if self.heads > 1:
            outputs = choose_head(outputs, observations[..., -self.heads :])
        return self.head(outputs, params)

    def log_prob(self, params: Params, observations: Tensor, actions: Tensor, perturb: Perturb | None = None) -> Tensor:
        """Joint log-density of actions.

        Args:
            params: plain, or stacked with `[M]` in front.
            observations: `[S, O]` or `[M, S, O]`, normalised.
            actions: `[S, A]` or `[M, S, A]`.
            perturb: changes the hidden layers.

        Returns:
            `[S]` or `[M, S]`.
        """
        return self.distribution(params, observations, perturb).log_prob(actions)


def choose_head(outputs: Tensor, stage_ids: Tensor) -> Tensor:
    """Return the output of one head, `[..., A]`, of the outputs of all of them `[..., heads · A]`.

    Args:
        outputs: of all heads, one after another.
        stage_ids: `[..., heads]`, one-hot.
    """
    by_head = outputs.reshape(*outputs.shape[:-1], stage_ids.shape[-1], -1)
    return (by_head * stage_ids.unsqueeze(-1)).sum(-2)
