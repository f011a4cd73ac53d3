"""Elastic weight consolidation (Kirkpatrick et al. 2017): parameters that mattered for earlier stages are held.

    loss = λ · ½ Σ_i Σ_k F_ik (θ_k − θ_ik)²        F_i, θ_i: Fisher information and parameters at the end of stage i

F is the diagonal of the Fisher information of the Gaussian policy in closed form, each state by itself, then averaged:

    F_k = E_s Σ_d [ (∂μ_d/∂θ_k)² / σ_d² + 2 (∂log σ_d/∂θ_k)² ]

(Wolczyk et al. 2021, "Continual World", App. B.) A squared gradient of a batch's mean would underestimate it. States
come from fresh trials; an agent that adapts by gradient steps is differentiated at its adapted parameters, one with a
memory through all earlier steps of the trial. F is scaled to a mean of 1, so that λ carries over between networks;
parameters that the mean does not depend on, such as a free log σ, whose Fisher information is the constant 2, are
scaled by themselves. Value functions are free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator

from metarl.protocols import ProtectedAgent
from metarl.settings import Settings
from metarl.stability.quadratic import Penalty, Weights, unit_mean
from metarl.types import Rollout


class EwcConfig(Settings):
    """Elastic weight consolidation."""

    name: Literal["ewc"] = "ewc"
    coef: float = Field(1.0, ge=0, description="λ; the importance of parameters has mean 1")
    anchors: Literal["stages", "online"] = Field(
        "stages", description="stages: a penalty around the end of each; online: one around the last, importance summed"
    )
    decay: float = Field(
        1.0, ge=0, le=1, description="γ of online: what remains of earlier importance at a stage's end"
    )
    fisher_states: int = Field(2560, ge=1, description="states that the Fisher information is averaged over")

    @model_validator(mode="after")
    def _decay_has_a_use(self) -> EwcConfig:
        if self.decay != 1.0 and self.anchors == "stages":
            raise ValueError(f"decay={self.decay} with anchors='stages': only online anchors decay")
        return self


def method(config: EwcConfig) -> Penalty:
    """Return the method."""

    def importance(agent: ProtectedAgent, rollouts: Sequence[Rollout], generator: torch.Generator) -> Weights:
        return fisher(agent, rollouts, config.fisher_states, generator)

    return Penalty(config.name, config.coef, importance, config.decay if config.anchors == "online" else None)


def fisher(agent: ProtectedAgent, rollouts: Sequence[Rollout], states: int, generator: torch.Generator) -> Weights:
    """Return the diagonal Fisher information of the agent's policy, scaled to mean 1; see the module.

    Args:
        agent: whose policy.
        rollouts: K + 1, of the agent as it is.
        states: how many to average over.
        generator: draws them.

    Raises:
        FloatingPointError: it is not finite.
    """
    groups: list[Weights] = []
    for weights in fisher_sums(agent, rollouts, states, generator).values():
        groups.append({})
        for name, value in weights.items():
            group = next((each for each in groups if name in each), groups[-1])
            group[name] = group[name] + value if name in group else value
    return {name: value for group in groups for name, value in unit_mean(group).items()}


def fisher_sums(
    agent: ProtectedAgent, rollouts: Sequence[Rollout], states: int, generator: torch.Generator
) -> dict[str, Weights]:
    """Return the Fisher information through each parameter of the distribution of actions, averaged over states."""
    sums: dict[str, Weights] = {}
    count = 0
    for part in agent.policy_jacobians(rollouts, states, generator):
        count += len(part.distribution.mode)
        for output, slopes in part.slopes.items():
            weights = sums.setdefault(output, {})
            for name, slope in slopes.items():
                added = part.distribution.fisher_diagonal(output, slope)
                weights[name] = weights[name] + added if name in weights else added
    return {output: {name: value / count for name, value in weights.items()} for output, weights in sums.items()}
