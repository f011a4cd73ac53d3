"""L2 to the anchor: every parameter of the policy is held alike. The control for what EWC's importance is worth.

loss = λ · ½ Σ_i ‖θ − θ_i‖²        θ_i: the policy's parameters at the end of stage i
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from metarl.errors import STRICT
from metarl.stability.quadratic import Anchors
from metarl.types import Agent, Rollout


class L2Config(BaseModel):
    """L2 to the parameters at the end of each stage."""

    model_config = STRICT

    name: Literal["l2"] = "l2"
    coef: float = Field(1.0, ge=0, description="λ")


class L2:
    """A `StabilityMethod` with a penalty.

    Args:
        config: its settings.
    """

    name = "l2"

    def __init__(self, config: L2Config) -> None:
        self.config, self.anchors = config, Anchors()

    def loss(self, agent: Agent, rng: np.random.Generator, fraction: float) -> dict[str, Tensor]:
        """See `StabilityMethod.loss`."""
        return self.anchors.loss(agent, self.config.coef)

    def observe(
        self, agent: Agent, rollouts: Sequence[Rollout], before: Mapping[str, Tensor], rng: np.random.Generator
    ) -> None:
        """Nothing to note within a stage."""

    def end_stage(self, agent: Agent, rollouts: Sequence[Rollout], rng: np.random.Generator) -> None:
        """Anchor the policy where it is."""
        policy = {name: value for name, value in agent.parameters().items() if name.startswith("policy.")}
        self.anchors.add(agent, {name: torch.ones_like(value) for name, value in policy.items()})

    def state_dict(self) -> dict[str, Tensor]:
        """See `StabilityMethod.state_dict`."""
        return self.anchors.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `StabilityMethod.load_state_dict`."""
        self.anchors.load_state_dict(state)
