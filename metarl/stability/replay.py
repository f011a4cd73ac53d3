"""Experience replay for on-policy agents: whole trials of earlier stages are read again (Rolnick et al. 2019).

Of each stage a uniform sample of its trials is kept; all stages have equal shares of a fixed room. Whenever the agent
learns from new trials, it also predicts its actions in some stored ones, drawn evenly from the stages that have
ended, and

    loss = c_π KL(π_then ‖ π)  +  c_V ½ (V − V_then)² / σ_R²  −  c_PG E[ρ (r + γ v' − V) log π] / σ_R

"Then" is the agent at the end of the trial's stage, not the one that collected it: what is cloned is the best of the
stage (Rolnick et al. clone the outputs of the time of collecting). An agent that adapts by gradient steps adapts again
to the stored support data, then and now, as if it had been collected then, and is compared on the query data; one with
a memory reads the trial from its beginning. The last term is V-trace's policy gradient with the rewards of the trial;
it is left out where the effective sample size of its importance weights is low. σ_R is the standard deviation of
returns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from metarl.protocols import ProtectedAgent
from metarl.rl.surrogates import weighted_mean
from metarl.settings import Settings
from metarl.stability.reservoir import Items, Reservoir, items_of, join, rollouts_of
from metarl.types import Rollout

_LABEL_BATCH = 32
"""Trials that are labelled at once."""


class ReplayConfig(Settings):
    """Experience replay of whole trials, with cloning of the policy and values at the end of their stage."""

    name: Literal["replay"] = "replay"
    capacity: int = Field(400, ge=1, description="number of trials kept, the same for each stage (for MAML, of tasks)")
    share: float = Field(0.33, gt=0, lt=1, description="replayed trials of all that a step learns from")
    cloning_coef: float = Field(1.0, ge=0, description="weight of KL(then‖now) of the policy")
    value_coef: float = Field(
        0.5, ge=0, description="weight of the squared change of values, in deviations of the return (shared critics)"
    )
    policy_coef: float = Field(0.0, ge=0, description="weight of V-trace's policy gradient")
    min_sample_size: float = Field(
        0.3, ge=0, le=1, description="effective fraction of the samples below which that gradient is left out"
    )
    memory_gb: float = Field(
        1.0, ge=0, description="GiB of trials beyond which they are stored on disk, in the run directory"
    )


class Replay:
    """A `StabilityMethod` with a loss on stored trials.

    Args:
        config: its settings.
        folder: for trials that do not fit into memory; None: the system's.
    """

    name = "replay"

    def __init__(self, config: ReplayConfig, folder: Path | None = None) -> None:
        self.config, self._folder = config, folder
        self.ended: list[Reservoir] = []  # labelled, a stage each
        self.current: Reservoir | None = None
        self.new_trials = 0  # of an iteration

    def loss(self, agent: ProtectedAgent, rng: np.random.Generator, fraction: float) -> dict[str, Tensor]:
        """See `StabilityMethod.loss`."""
        config = self.config
        if not self.ended:
            return {}
        count = max(1, round(config.share / (1.0 - config.share) * self.new_trials * fraction))
        items = self.draw(count, rng)
        rollouts = rollouts_of(items, agent.device)
        now, last = agent.replay_policy(rollouts, advantages=config.policy_coef > 0), rollouts[-1]
        length, weights = last.valid.shape[-1], last.valid.flatten().to(last.rewards.dtype)
        labels = {name: value[:, :, :length].to(agent.device) for name, value in items.items() if "." not in name}
        then = now.distribution.with_parameters(labels)
        change = weighted_mean(then.kl(now.distribution).flatten(), weights)
        losses = {"kl": change, "loss": config.cloning_coef * change}
        if now.values is not None and config.value_coef:
            error = ((now.values - labels["values"]) / now.scale).square().flatten()
            losses["loss"] = losses["loss"] + config.value_coef * 0.5 * weighted_mean(error, weights)
        if now.advantages is not None:
            log_probs = now.distribution.log_prob(last.actions)
            size = effective_sample_size(log_probs.detach() - last.log_probs, last.valid)
            gained = weighted_mean((now.advantages / now.scale * log_probs).flatten(), weights)
            losses["effective_sample_size"] = size
            losses["loss"] = losses["loss"] - config.policy_coef * (size >= config.min_sample_size) * gained
        return losses

    def draw(self, count: int, rng: np.random.Generator) -> Items:
        """Draw trials of the stages that have ended: as many of each, but for the remainder, with replacement."""
        shares = np.full(len(self.ended), count // len(self.ended))
        shares[rng.permutation(len(shares))[: count % len(shares)]] += 1
        return join(
            [
                reservoir.take(rng.integers(0, len(reservoir), share))
                for reservoir, share in zip(self.ended, shares.tolist(), strict=True)
                if share
            ]
        )

    def observe(
        self, agent: ProtectedAgent, rollouts: Sequence[Rollout], before: Mapping[str, Tensor], rng: np.random.Generator
    ) -> None:
        """Keep some of an iteration's trials; those that were dropped are passed over."""
        items = items_of(rollouts)
        self.new_trials = len(items["0.valid"])
        whole = torch.stack([items[f"{k}.valid"].flatten(1).any(1) for k in range(len(rollouts))]).all(0)
        if self.current is None:
            capacity = max(1, self.config.capacity // (len(self.ended) + 1))
            for reservoir in self.ended:
                reservoir.shrink(capacity, rng)
            self.current = self._reservoir(capacity)
        self.current.add({name: value[whole] for name, value in items.items()}, rng)

    def _reservoir(self, capacity: int) -> Reservoir:
        share = capacity / self.config.capacity
        return Reservoir(capacity, share * self.config.memory_gb * 2**30, self._folder)

    def end_stage(self, agent: ProtectedAgent, rollouts: Sequence[Rollout], rng: np.random.Generator) -> None:
        """Label the trials of the stage with the policy and values of now."""
        reservoir, labelled = self.current, []
        if reservoir is not None and len(reservoir):
            for places in np.array_split(np.arange(len(reservoir)), -(-len(reservoir) // _LABEL_BATCH)):
                labels = self._labels(agent, rollouts_of(reservoir.take(places), agent.device))
                labelled.append((places, {name: value.detach().cpu() for name, value in labels.items()}))
            for places, items in labelled:  # only when all of them are there
                reservoir.set(places, items)
            self.ended.append(reservoir)
        self.current = None

    @staticmethod
    def _labels(agent: ProtectedAgent, rollouts: list[Rollout]) -> Items:
        """Return the policy and values in stored trials, as if the agent had collected the data that it adapts to.

        Raises:
            FloatingPointError: it is not finite.
        """
        state, labels = agent.initial_state(len(rollouts[-1].valid)), {}
        for k, support in enumerate(rollouts[:-1]):
            log_probs = agent.log_prob(state, support).to(support.valid.device) * support.valid
            labels[f"{k}.log_probs"] = log_probs
            rollouts[k] = replace(support, log_probs=log_probs)
            state = agent.adapt(state, rollouts[k])
        then = agent.replay_policy(rollouts)
        labels |= then.distribution.parameters()
        labels["values"] = torch.zeros_like(rollouts[-1].rewards) if then.values is None else then.values
        for name, value in labels.items():
            valid = rollouts[int(name.split(".")[0]) if "." in name else -1].valid
            if not bool(value[valid].isfinite().all()):
                raise FloatingPointError(f"what the agent does in stored trials is not finite ({name})")
        return labels

    def state_dict(self) -> dict[str, Tensor]:
        """See `StabilityMethod.state_dict`."""
        held = [*self.ended, *([self.current] if self.current is not None else [])]
        state = {f"{i}/{name}": value for i, part in enumerate(held) for name, value in part.state_dict().items()}
        return {**state, "ended": torch.tensor(len(self.ended)), "new_trials": torch.tensor(self.new_trials)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `StabilityMethod.load_state_dict`."""
        for name in ("ended", "new_trials"):
            if name not in state:
                raise ValueError(f"cannot load {name!r}: found nothing")
        groups: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            if "/" in name:
                number, _, field = name.partition("/")
                groups.setdefault(int(number), {})[field] = value
        ended = int(state["ended"])
        expected = {key for group in groups.values() for key in group}
        labels = {key for key in expected if "." not in key} - {"seen", "capacity"}  # of stages that have ended
        for place in range(max([ended, *(place + 1 for place in groups)])):
            absent = expected - groups.get(place, {}).keys() - (set() if place < ended else labels)
            if place not in groups or absent:
                raise ValueError(f"cannot load '{place}/{min(absent, default='')}': found nothing")
        reservoirs = []
        for _, group in sorted(groups.items()):
            reservoirs.append(self._reservoir(int(group.get("capacity", torch.ones(())))))
            reservoirs[-1].load_state_dict(group)
        self.ended, self.new_trials = reservoirs[:ended], int(state["new_trials"])
        self.current = reservoirs[ended] if len(reservoirs) > ended else None


def effective_sample_size(log_ratios: Tensor, valid: Tensor) -> Tensor:
    """Return (Σ w)² / (n Σ w²) of the importance weights of n steps (Kish 1965): 1 on policy, near 0 far from it.

    Args:
        log_ratios: log π − log π_old, any shape.
        valid: bool, which of them count.
    """
    weights = log_ratios[valid].double()
    weights = (weights - weights.max()).exp()
    return weights.sum().square() / (len(weights) * weights.square().sum())
