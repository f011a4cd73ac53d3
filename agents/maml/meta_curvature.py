"""Meta-Curvature (Park & Oliva 2019): a learned preconditioner of the inner gradient.

    θ_i' = θ − α MC(∇ L(θ; D_i)),   MC(G) = M_o G M_i for a weight matrix G `[out, in]`

M_o `[out, out]` mixes the gradients of a layer's outputs and M_i `[in, in]` those of its inputs; vectors (biases, the
log standard deviations) have M_o alone. Both start as the identity, so that training starts as MAML, and are learned
together with θ by the same outer step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from metarl.agents.maml.agent import GradientAgentConfig
from metarl.agents.maml.inner import Loss, MetaParams, OuterPhases, gradients
from metarl.nn.mlp import Params


class MetaCurvatureConfig(GradientAgentConfig):
    """Meta-Curvature: second-order MAML with a learned linear transformation of each layer's inner gradient."""

    name: Literal["meta_curvature"] = "meta_curvature"


@dataclass(frozen=True)
class MetaCurvature:
    """θ' = θ − α M_o ∇L(θ) M_i, with M_o and M_i learned."""

    config: MetaCurvatureConfig
    adapted: tuple[str, ...]
    outer_phases: ClassVar[OuterPhases] = "last"

    def learned(self, theta: Params) -> Params:
        """`curvature_out.<parameter>` and, for matrices, `curvature_in.<parameter>`: identities."""
        sizes = {f"curvature_out.{name}": theta[name].shape[0] for name in self.adapted}
        sizes |= {f"curvature_in.{name}": theta[name].shape[1] for name in self.adapted if theta[name].ndim == 2}
        like = theta[self.adapted[0]]
        return {
            name: torch.eye(size, dtype=like.dtype, device=like.device).requires_grad_() for name, size in sizes.items()
        }

    def step(self, loss: Loss, meta: MetaParams, params: Params, batch: Any, create_graph: bool) -> Params:
        """A step along the transformed gradient; see `InnerMethod.step`."""
        gradient = gradients(loss, params, self.adapted, batch, create_graph)
        return params | {
            name: params[name] - self.config.inner_lr * precondition(meta.learned, name, value)
            for name, value in gradient.items()
        }


def precondition(learned: Params, name: str, gradient: Tensor) -> Tensor:
    """Return M_o G M_i for a gradient `[out, in]`, M_o g for one of `[out]`; either may be stacked `[M, ...]`."""
    outputs, inputs = learned[f"curvature_out.{name}"], learned.get(f"curvature_in.{name}")
    return gradient @ outputs.mT if inputs is None else outputs @ gradient @ inputs
