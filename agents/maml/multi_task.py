"""Training without meta-learning: a control for what meta-learning adds.

On many tasks this is the "pretrained" baseline of the MAML paper (Finn et al. 2017, 5.3): one policy trained on all of
them at once, θ ← outer step on mean_i L_outer(θ; D_i), with PPO by default. On a single task it is PPO from scratch.
Training does not adapt (K = 0, all env steps go into θ); evaluation takes `adaptation_steps` gradient steps from θ, as
for the meta-learners.
"""

from __future__ import annotations

import functools
from typing import Literal

from pydantic import Field, model_validator

from metarl.agents.maml.agent import GradientAgentConfig
from metarl.agents.maml.maml import Maml
from metarl.agents.maml.outer import PpoConfig


class MultiTaskConfig(GradientAgentConfig):
    """Multi-task PPO: one policy for all tasks, fine-tuned at evaluation alone; on a single task PPO from scratch."""

    name: Literal["multi_task"] = "multi_task"
    estimator: Literal["lvc"] = Field("lvc", description="surrogate; to first order they are all the same")
    adaptation_steps: int = Field(1, ge=1, description="K, gradient steps at evaluation; training takes none")

    @model_validator(mode="after")
    def _nothing_to_hold_back(self) -> MultiTaskConfig:
        if isinstance(self.outer, PpoConfig) and self.outer.inner_kl_coef:
            raise ValueError("outer.inner_kl_coef has no effect without inner steps in training; leave it out")
        return self


MultiTask = functools.partial(Maml, outer_phases="first")
"""The outer loss of θ itself; MAML's step where it is evaluated."""
