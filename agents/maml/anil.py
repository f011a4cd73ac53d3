"""ANIL, almost no inner loop (Raghu et al. 2020): only the head adapts, on features that all tasks share.

    θ = (body, head);   head_i' = head − α ∇_head L(body, head; D_i),   body_i' = body
    θ ← outer step on mean_i L_outer(body, head_i'; D_i'), for body and head, through the inner step

Any other named subset of modules may adapt: `adapted_modules`, of every agent in this family; ANIL's default is what
makes it ANIL.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from metarl.agents.maml.agent import GradientAgentConfig
from metarl.agents.maml.maml import Maml
from metarl.settings import as_tuple


class AnilConfig(GradientAgentConfig):
    """ANIL: second-order MAML in which only the policy's head adapts to a task."""

    name: Literal["anil"] = "anil"
    adapted_modules: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = Field(
        ("head",), min_length=1, description="modules that adapt: all, or any of layer_0, layer_1, …, head, log_std"
    )


Anil = Maml
"""MAML's step, on what `adapted_modules` names."""
