"""Meta-experience replay (Riemer et al. 2019): replay, and steps of Reptile that align the gradients of old and new.

An iteration's update makes many steps of its optimiser on new and replayed trials, from θ_0 to θ_k; then

    θ ← θ_0 + β (θ_k − θ_0)              within a batch: after every iteration
    θ ← Θ + γ (θ − Θ),  Θ ← θ            across batches: after every s iterations

Deviation: the paper's steps are those of SGD on single examples; here they are those of the agent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from metarl.protocols import ProtectedAgent
from metarl.stability.replay import Replay, ReplayConfig
from metarl.types import Rollout


class MerConfig(ReplayConfig):
    """Meta-experience replay: experience replay, and Reptile within and across batches."""

    name: Literal["mer"] = "mer"  # type: ignore[assignment]
    within: float = Field(
        0.7, gt=0, le=1, description="β: interpolation factor towards the new parameters, within an iteration"
    )
    across: float = Field(
        0.7, gt=0, le=1, description="γ: interpolation factor towards the new parameters, across several iterations"
    )
    batches: int = Field(5, ge=1, description="s, iterations between two steps across")


class Mer:
    """A `StabilityMethod` with replay that moves the agent's parameters.

    Args:
        config: its settings.
        folder: for trials that do not fit into memory; None: the system's.
    """

    name = "mer"

    def __init__(self, config: MerConfig, folder: Path | None = None) -> None:
        self.config, self._replay = config, Replay(config, folder)
        self._start: dict[str, Tensor] = {}  # Θ
        self._iterations = 0

    def loss(self, agent: ProtectedAgent, rng: np.random.Generator, fraction: float) -> dict[str, Tensor]:
        """That of replay; see `StabilityMethod.loss`."""
        return self._replay.loss(agent, rng, fraction)

    def observe(
        self, agent: ProtectedAgent, rollouts: Sequence[Rollout], before: Mapping[str, Tensor], rng: np.random.Generator
    ) -> None:
        """Take the steps of Reptile; see `StabilityMethod.observe`."""
        self._replay.observe(agent, rollouts, before, rng)
        if not self._start:
            self._start = {name: value.clone() for name, value in before.items()}
        interpolate_(agent, before, self.config.within)
        self._iterations += 1
        if self._iterations % self.config.batches == 0:
            interpolate_(agent, self._start, self.config.across)
            self._start = {name: value.detach().clone() for name, value in agent.parameters().items()}

    def end_stage(self, agent: ProtectedAgent, rollouts: Sequence[Rollout], rng: np.random.Generator) -> None:
        """See `StabilityMethod.end_stage`."""
        self._replay.end_stage(agent, rollouts, rng)

    def state_dict(self) -> dict[str, Tensor]:
        """See `StabilityMethod.state_dict`."""
        start = {f"start.{name}": value for name, value in self._start.items()}
        return {**self._replay.state_dict(), **start, "iterations": torch.tensor(self._iterations)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `StabilityMethod.load_state_dict`."""
        if "iterations" not in state:
            raise ValueError("cannot load 'iterations': found nothing")
        if int(state["iterations"]) and not any(name.startswith("start.") for name in state):
            raise ValueError("cannot load 'start.…': found nothing")
        start = {name.removeprefix("start."): value for name, value in state.items() if name.startswith("start.")}
        self._replay.load_state_dict(state)
        self._start, self._iterations = start, int(state["iterations"])


@torch.no_grad()
def interpolate_(agent: ProtectedAgent, start: Mapping[str, Tensor], fraction: float) -> None:
    """Interpolate an agent's parameters from `start` to where they are (Nichol et al. 2018, "Reptile")."""
    for name, value in agent.parameters().items():
        value.copy_(torch.lerp(start[name].to(value.device), value, fraction))
