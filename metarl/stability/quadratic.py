"""A quadratic penalty around what the parameters were: shared by EWC, L2 and MAS, which differ in what weighs it.

Must not import agents, environments or training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from metarl.nn.optimizer_state import check_entries
from metarl.protocols import ProtectedAgent
from metarl.types import Rollout

Weights = dict[str, Tensor]
"""How much each number of each parameter matters, by name, in the parameter's shape."""


class Anchors:
    """½ Σ_i Σ_k w_ik (θ_k − θ_ik)² over all anchors i, kept as ONE quadratic whatever their number.

    A sum of quadratics in θ is a quadratic: with W = Σ w_i and C = Σ w_i θ_i / W it is ½ Σ W (θ − C)² + a constant,
    which is kept, too, so that the value is that of the sum. Memory and time do not grow with the stages.

    Attributes:
        weights: W by name; empty before the first anchor.
        centers: C by name.
        constant: the value at C.
    """

    def __init__(self) -> None:
        self.weights: Weights = {}
        self.centers: Weights = {}
        self.constant = torch.zeros(())

    def loss(self, agent: ProtectedAgent, coef: float) -> dict[str, Tensor]:
        """Return `coef` times the penalty at the agent's parameters, as `StabilityMethod.loss` does."""
        return {"loss": coef * self.penalty(agent)} if coef and self.weights else {}

    def penalty(self, agent: ProtectedAgent) -> Tensor:
        """Return the penalty at the agent's parameters; there must be an anchor."""
        params = agent.parameters()
        names = sorted(self.weights)  # as they come back from disk, so that a resumed run adds up in the same order
        theta = torch.cat([params[name].flatten() for name in names])
        weights, centers = (torch.cat([part[name].flatten() for name in names]) for part in self._on(theta))
        return 0.5 * (weights * (theta - centers).square()).sum() + self.constant.to(theta.device)

    def _on(self, like: Tensor) -> tuple[Weights, Weights]:
        move = {name: value.to(like.device) for name, value in self.weights.items()}
        self.weights, self.centers = move, {name: value.to(like.device) for name, value in self.centers.items()}
        return self.weights, self.centers

    def add(self, agent: ProtectedAgent, weights: Weights) -> None:
        """Add an anchor where the agent's parameters are now."""
        if weights:
            self._on(next(iter(weights.values())))  # what was loaded is where it was loaded
        params = agent.parameters()
        for name, new in weights.items():
            here = params[name].detach().clone()
            old = self.weights.get(name, torch.zeros_like(new))
            center, total = self.centers.get(name, here), old + new
            moved = torch.where(total > 0, (old * center + new * here) / total.clamp_min(1e-30), here)
            parted = old * (center - moved).square() + new * (here - moved).square()
            self.constant = self.constant.to(here.device) + 0.5 * parted.sum()
            self.weights[name], self.centers[name] = total, moved

    def replace(self, agent: ProtectedAgent, weights: Weights, decay: float) -> None:
        """Let `weights`, added to `decay` times the old ones, have their one anchor where the agent is now."""
        if weights:
            self._on(next(iter(weights.values())))  # what was loaded is where it was loaded
        params = agent.parameters()
        for name, new in weights.items():
            self.weights[name] = decay * self.weights[name] + new if name in self.weights else new
            self.centers[name] = params[name].detach().clone()

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, flat."""
        state = {f"weight.{name}": value for name, value in self.weights.items()}
        state |= {f"center.{name}": value for name, value in self.centers.items()}
        return state | {"constant": self.constant} if state else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned; raises ValueError naming the entry that is missing or does not fit."""
        groups = {
            prefix: {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            for prefix in ("weight.", "center.")
        }
        for prefix, other in (("center.", "weight."), ("weight.", "center.")):
            check_entries(state, {prefix + name: value for name, value in groups[other].items()})
        if state:
            check_entries(state, {"constant": torch.zeros(())})
        self.weights, self.centers = groups["weight."], groups["center."]
        self.constant = state.get("constant", torch.zeros(()))


Importance = Callable[[ProtectedAgent, Sequence[Rollout], torch.Generator], Weights]
"""What matters in an agent now: (agent, K + 1 fresh rollouts of it, generator that chooses states) → weights."""


class Penalty:
    """A `StabilityMethod` that holds parameters where they were at the end of each stage, by what they mattered there.

    Args:
        name: of the method.
        coef: λ; at 0 the method costs nothing.
        importance: measures what matters.
        decay: None: an anchor for each stage; else one, at the last, with γ = `decay` times the earlier importance.
    """

    def __init__(self, name: str, coef: float, importance: Importance, decay: float | None = None) -> None:
        self.name, self.anchors = name, Anchors()
        self._coef, self._importance, self._decay = coef, importance, decay

    def loss(self, agent: ProtectedAgent, rng: np.random.Generator, fraction: float) -> dict[str, Tensor]:
        """See `StabilityMethod.loss`."""
        return self.anchors.loss(agent, self._coef)

    def observe(
        self, agent: ProtectedAgent, rollouts: Sequence[Rollout], before: Mapping[str, Tensor], rng: np.random.Generator
    ) -> None:
        """Nothing to note within a stage."""

    def end_stage(self, agent: ProtectedAgent, rollouts: Sequence[Rollout], rng: np.random.Generator) -> None:
        """Measure what matters now, and anchor it."""
        weights = self._importance(agent, rollouts, torch.Generator().manual_seed(int(rng.integers(2**63))))
        if self._decay is None:
            self.anchors.add(agent, weights)
        else:
            self.anchors.replace(agent, weights, self._decay)

    def state_dict(self) -> dict[str, Tensor]:
        """See `StabilityMethod.state_dict`."""
        return self.anchors.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `StabilityMethod.load_state_dict`."""
        self.anchors.load_state_dict(state)


def unit_mean(weights: Mapping[str, Tensor]) -> Weights:
    """Scale the weights of a group of parameters so that their mean is 1; all zeros stay so.

    Raises:
        FloatingPointError: they are not finite.
    """
    if not all(bool(value.isfinite().all()) for value in weights.values()):
        raise FloatingPointError(
            "the importance of parameters is not finite; the policy has come apart, lower the agent's step size"
        )
    total = sum(float(value.double().sum()) for value in weights.values())
    mean = total / max(1, sum(value.numel() for value in weights.values()))
    return {name: value / mean if mean > 0 else value for name, value in weights.items()}
