"""L2 to the anchor: every parameter of the policy is held alike. The control for what EWC's importance is worth.

loss = λ · ½ Σ_i ‖θ − θ_i‖²        θ_i: the policy's parameters at the end of stage i
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from metarl.protocols import Agent
from metarl.settings import Settings
from metarl.stability.quadratic import Penalty, Weights
from metarl.types import Rollout


class L2Config(Settings):
    """L2 to the parameters at the end of each stage."""

    name: Literal["l2"] = "l2"
    coef: float = Field(1.0, ge=0, description="λ")


def method(config: L2Config) -> Penalty:
    """Return the method."""

    def equal(agent: Agent, rollouts: Sequence[Rollout], generator: torch.Generator) -> Weights:
        policy = {name: value for name, value in agent.parameters().items() if name.startswith("policy.")}
        return {name: torch.ones_like(value) for name, value in policy.items()}

    return Penalty(config.name, config.coef, equal)
