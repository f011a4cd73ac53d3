"""Memory aware synapses (Aljundi et al. 2018): parameters that move the policy's outputs are held, whatever σ is.

    loss = λ · ½ Σ_i Σ_k Ω_ik (θ_k − θ_ik)²        Ω_k = E_s |∂(‖μ(s)‖² + ‖log σ(s)‖²)/∂θ_k|

Ω is scaled to a mean of 1, as EWC's importance is, and comes from the same derivatives, state by state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from metarl.errors import STRICT
from metarl.stability.quadratic import Anchors, Weights, unit_mean
from metarl.types import Agent, Rollout


class MasConfig(BaseModel):
    """Memory aware synapses."""

    model_config = STRICT

    name: Literal["mas"] = "mas"
    coef: float = Field(1.0, ge=0, description="λ; the importance of parameters has mean 1")
    states: int = Field(2560, ge=1, description="states that the importance is averaged over")


class Mas:
    """A `StabilityMethod` with a penalty.

    Args:
        config: its settings.
    """

    name = "mas"

    def __init__(self, config: MasConfig) -> None:
        self.config, self.anchors = config, Anchors()

    def loss(self, agent: Agent, rng: np.random.Generator, fraction: float) -> dict[str, Tensor]:
        """See `StabilityMethod.loss`."""
        return self.anchors.loss(agent, self.config.coef)

    def observe(
        self, agent: Agent, rollouts: Sequence[Rollout], before: Mapping[str, Tensor], rng: np.random.Generator
    ) -> None:
        """Nothing to note within a stage."""

    def end_stage(self, agent: Agent, rollouts: Sequence[Rollout], rng: np.random.Generator) -> None:
        """Measure what matters now, and anchor it."""
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        self.anchors.add(agent, importance(agent, rollouts, self.config.states, generator))

    def state_dict(self) -> dict[str, Tensor]:
        """See `StabilityMethod.state_dict`."""
        return self.anchors.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `StabilityMethod.load_state_dict`."""
        self.anchors.load_state_dict(state)


def importance(agent: Agent, rollouts: Sequence[Rollout], states: int, generator: torch.Generator) -> Weights:
    """Return Ω of the agent's policy, scaled to mean 1; see the module.

    Args:
        agent: whose policy.
        rollouts: K + 1, of the agent as it is.
        states: how many to average over.
        generator: draws them.
    """
    totals: Weights = {}
    for part in agent.sensitivities(rollouts, states, generator):
        slopes: Weights = {}
        for outputs, of_outputs in ((part.mean, part.of_mean), (part.log_std, part.of_log_std)):
            for name, slope in of_outputs.items():
                through = 2.0 * torch.einsum("sa,sa...->s...", outputs, slope)
                slopes[name] = slopes[name] + through if name in slopes else through
        for name, slope in slopes.items():
            totals[name] = totals.get(name, torch.zeros_like(slope[0])) + slope.abs().sum(0)
    return unit_mean(totals)
