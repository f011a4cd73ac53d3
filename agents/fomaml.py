"""FOMAML: first-order MAML (Finn et al. 2017, 5.2; Nichol et al. 2018, Sec. 2).

    θ_i^{k+1} = θ_i^k − α g_i^k,   g_i^k = ∇ L(θ_i^k; D_i^k)        the inner steps of MAML
    ∇_θ J ≈ mean_i ∇ L_outer(θ_i^K; D_i^K)                          taken AT θ_i^K, applied to θ

The inner gradients g count as constants, so that dθ_i^K / dθ = I: no second derivatives, about half the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field

from metarl.agents.gradient_agent import GradientAgentConfig
from metarl.agents.inner import Loss, MetaParams, OuterPhases, descend, gradients
from metarl.policies import Params


class FomamlConfig(GradientAgentConfig):
    """First-order MAML: the gradient at the adapted parameters is applied to θ, without second derivatives."""

    name: Literal["fomaml"] = "fomaml"
    estimator: Literal["lvc"] = Field("lvc", description="surrogate; to first order they are all the same")


@dataclass(frozen=True)
class Fomaml:
    """θ' = θ − α stop_grad(∇L(θ))."""

    config: GradientAgentConfig
    adapted: tuple[str, ...]
    outer_phases: ClassVar[OuterPhases] = "last"

    def learned(self, theta: Params) -> Params:
        """Nothing beside θ."""
        return {}

    def step(self, loss: Loss, meta: MetaParams, params: Params, batch: Any, create_graph: bool) -> Params:
        """MAML's step without the graph of its gradient; see `Method.step`."""
        gradient = gradients(loss, params, self.adapted, batch, create_graph=False)
        return descend(params, gradient, self.config.inner_lr)
