"""Memory aware synapses (Aljundi et al. 2018): parameters that move the policy's outputs are held, at any σ.

    loss = λ · ½ Σ_i Σ_k Ω_ik (θ_k − θ_ik)²        Ω_k = E_s |∂(‖μ(s)‖² + ‖log σ(s)‖²)/∂θ_k|

Ω is scaled to a mean of 1, as EWC's importance is, and comes from the same derivatives, state by state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from metarl.protocols import ProtectedAgent
from metarl.settings import Settings
from metarl.stability.quadratic import Penalty, Weights, unit_mean
from metarl.types import Rollout


class MasConfig(Settings):
    """Memory aware synapses."""

    name: Literal["mas"] = "mas"
    coef: float = Field(1.0, ge=0, description="λ; the importance of parameters has mean 1")
    states: int = Field(2560, ge=1, description="states that the importance is averaged over")


def method(config: MasConfig) -> Penalty:
    """Return the method."""

    def measured(agent: ProtectedAgent, rollouts: Sequence[Rollout], generator: torch.Generator) -> Weights:
        return importance(agent, rollouts, config.states, generator)

    return Penalty(config.name, config.coef, measured)


def importance(agent: ProtectedAgent, rollouts: Sequence[Rollout], states: int, generator: torch.Generator) -> Weights:
    """Return Ω of the agent's policy, scaled to mean 1; see the module.

    Args:
        agent: whose policy.
        rollouts: K + 1, of the agent as it is.
        states: how many to average over.
        generator: draws them.
    """
    totals: Weights = {}
    for part in agent.policy_jacobians(rollouts, states, generator):
        slopes: Weights = {}
        for output, values in part.distribution.parameters().items():
            for name, slope in part.slopes[output].items():
                through = 2.0 * torch.einsum("sa,sa...->s...", values, slope)
                slopes[name] = slopes[name] + through if name in slopes else through
        for name, slope in slopes.items():
            totals[name] = totals.get(name, torch.zeros_like(slope[0])) + slope.abs().sum(0)
    return unit_mean(totals)
