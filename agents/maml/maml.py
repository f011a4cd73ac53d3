"""MAML: model-agnostic meta-learning (Finn et al. 2017), with PPO, TRPO or a plain gradient as its outer step.

One iteration, for tasks i = 1..M (their Alg. 3; with PPO in the form of ProMP, Rothfuss et al. 2019):

    θ_i⁰ = θ
    for k in 0..K−1:   collect fresh support data D_i^k with θ_i^k
                       θ_i^{k+1} = θ_i^k − α ∇ L(θ_i^k; D_i^k)           (`Maml.step`)
    collect query data D_i^K with θ_i^K
    θ ← outer step on mean_i L_outer(θ_i^K; D_i^K), differentiated through all K steps

The gradient is exact to second order: it flows through the inner gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from metarl.agents.maml.agent import GradientAgentConfig
from metarl.agents.maml.inner import Loss, MetaParams, OuterPhases, descend, gradients
from metarl.agents.maml.outer import GradientConfig, PpoConfig, TrpoConfig
from metarl.nn.mlp import Params


class MamlPpoConfig(GradientAgentConfig):
    """MAML-PPO: second-order MAML, epochs of PPO's clipped objective after adaptation; ProMP with its KL term."""

    name: Literal["maml_ppo"] = "maml_ppo"
    outer: PpoConfig = Field(default_factory=PpoConfig)


class MamlTrpoConfig(GradientAgentConfig):
    """MAML-TRPO: second-order MAML, one natural-gradient step within a trust region; as in the MAML paper."""

    name: Literal["maml_trpo"] = "maml_trpo"
    outer: TrpoConfig = Field(default_factory=TrpoConfig)


class MamlVpgConfig(GradientAgentConfig):
    """MAML-VPG: second-order MAML, one plain policy-gradient step of Adam, RMSProp or SGD."""

    name: Literal["maml_vpg"] = "maml_vpg"
    outer: GradientConfig = Field(default_factory=GradientConfig)


@dataclass(frozen=True)
class Maml:
    """θ' = θ − α ∇L(θ).

    Attributes:
        config: its settings.
        adapted: names of the parameters that adapt.
        second_order: whether ∇L is differentiated, too; else it counts as a constant.
        outer_phases: what the outer loss is taken of; see `InnerMethod`.
    """

    config: GradientAgentConfig
    adapted: tuple[str, ...]
    second_order: bool = True
    outer_phases: OuterPhases = "last"

    def learned(self, theta: Params) -> Params:
        """Return nothing: θ is all that is learned."""
        return {}

    def step(self, loss: Loss, meta: MetaParams, params: Params, batch: Any, create_graph: bool) -> Params:
        """Finn et al. 2017, Sec. 2.2; see `InnerMethod.step`."""
        gradient = gradients(loss, params, self.adapted, batch, create_graph and self.second_order)
        return descend(params, gradient, self.config.inner_lr)
