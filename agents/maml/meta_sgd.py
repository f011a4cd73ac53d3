"""Meta-SGD (Li et al. 2017, Alg. 2): a learned rate for every single parameter.

    θ_i' = θ − α ∘ ∇ L(θ; D_i),   (θ, α) ← (θ, α) − β ∇_{(θ, α)} mean_i L_outer(θ_i'; D_i')

α has the shape of θ, may become negative, and is learned together with θ by the same outer step. Deviation: all rates
start at `inner_lr` and not at random ones, so that training starts as MAML.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from metarl.agents.maml.agent import GradientAgentConfig
from metarl.agents.maml.inner import Loss, MetaParams, OuterPhases, gradients
from metarl.nn.mlp import Params


class MetaSgdConfig(GradientAgentConfig):
    """Meta-SGD: second-order MAML with a learned inner rate for every parameter."""

    name: Literal["meta_sgd"] = "meta_sgd"
    inner_lr: float = Field(0.1, gt=0, description="where every inner rate starts")


@dataclass(frozen=True)
class MetaSgd:
    """θ' = θ − α ∘ ∇L(θ), with α learned."""

    config: MetaSgdConfig
    adapted: tuple[str, ...]
    outer_phases: ClassVar[OuterPhases] = "last"

    def learned(self, theta: Params) -> Params:
        """α: `inner_lr.<parameter>` in the shape of the parameter."""
        rates = {name: torch.full_like(theta[name], self.config.inner_lr) for name in self.adapted}
        return {f"inner_lr.{name}": value.requires_grad_() for name, value in rates.items()}

    def step(self, loss: Loss, meta: MetaParams, params: Params, batch: Any, create_graph: bool) -> Params:
        """A step at the learned rates; see `InnerMethod.step`."""
        gradient = gradients(loss, params, self.adapted, batch, create_graph)
        return params | {
            name: params[name] - meta.learned[f"inner_lr.{name}"] * value for name, value in gradient.items()
        }
