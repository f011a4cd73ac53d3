"""Meta-Dropout (Lee et al. 2020): learned multiplicative noise on the hidden layers of the inner loop.

    z ~ N(μ_φ(h_{l−1}), I),   a_l ← a_l ∘ softplus(z)              on pre-activations, while the inner loss is computed
    θ_i' = θ − α ∇_θ L(θ, φ; D_i),   (θ, φ) ← outer step on mean_i L_outer(θ_i'; D_i')

φ, a linear map a layer from the activations below, is learned by the outer step and never adapts. It starts where
softplus(z) is 1 at the mean of z. Deviations: acting and the outer loss know no factor at all, where the paper keeps
softplus(μ), so that the policy that acts stays a plain network, and the likelihood ratio to the data is that of this
policy (`PolicyLoss.perturbed`); the output layer has no noise; all tasks and all K steps of an iteration share one
draw. It follows from the run's seed and the number of the iteration: `adapt`, every epoch of `update` and a resumed run
see the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from metarl.agents.maml.agent import GradientAgentConfig
from metarl.agents.maml.inner import MetaParams, OuterPhases, PolicyLoss, descend
from metarl.nn.mlp import Params
from metarl.seeding import Purpose, integer_seed

UNIT = math.log(math.e - 1.0)
"""softplus(UNIT) = 1."""


class MetaDropoutConfig(GradientAgentConfig):
    """Meta-Dropout: second-order MAML with learned, input-dependent noise on the hidden layers of the inner loop."""

    name: Literal["meta_dropout"] = "meta_dropout"
    estimator: Literal["lvc"] = Field("lvc", description="surrogate of the inner steps: the one defined under noise")


@dataclass(frozen=True)
class MetaDropout:
    """θ' = θ − α ∇L(θ, φ), with φ learned."""

    config: MetaDropoutConfig
    adapted: tuple[str, ...]
    outer_phases: ClassVar[OuterPhases] = "last"

    def learned(self, theta: Params) -> Params:
        """φ: `noise_weight.<layer>` in the shape of the layer's weight, and `noise_bias.<layer>`."""
        learned: Params = {}
        for layer in range(sum(name.startswith("weight_") for name in theta) - 1):
            weight, bias = theta[f"weight_{layer}"], theta[f"bias_{layer}"]
            learned[f"noise_weight.{layer}"] = torch.zeros_like(weight).requires_grad_()
            learned[f"noise_bias.{layer}"] = torch.full_like(bias, UNIT).requires_grad_()
        return learned

    def step(self, loss: PolicyLoss, meta: MetaParams, params: Params, batch: Any, create_graph: bool) -> Params:
        """MAML's step on the perturbed loss; see `InnerMethod.step`."""

        def perturb(layer: int, below: Tensor, hidden: Tensor) -> Tensor:
            seed = integer_seed(meta.seed, Purpose.META_DROPOUT, meta.iteration, layer)
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(hidden.shape[-2:], generator=generator, dtype=hidden.dtype).to(hidden.device)
            weight, bias = meta.learned[f"noise_weight.{layer}"], meta.learned[f"noise_bias.{layer}"]
            mean = torch.nn.functional.linear(below, weight, bias)
            return hidden * torch.nn.functional.softplus(mean + noise)

        # A copy to differentiate for: the gradient leaves out how the ratio depends on θ, its derivative does not.
        learning = params | {name: params[name].clone() for name in self.adapted}
        value = loss.perturbed(learning, params, batch, perturb).sum()
        found = torch.autograd.grad(value, [learning[name] for name in self.adapted], create_graph=create_graph)
        return descend(params, dict(zip(self.adapted, found, strict=True)), self.config.inner_lr)
