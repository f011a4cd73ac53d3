"""Outer steps: how the meta-parameters inner_loop the meta-gradient. PPO-clip, TRPO, or a plain gradient."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from metarl.agents.maml.inner import Batch
from metarl.agents.maml.meta_objective import MetaObjective
from metarl.nn.conjugate_gradient import conjugate_gradient, dot
from metarl.nn.mlp import Params
from metarl.nn.optimizer_state import clip_gradients, load_optimizer_state, optimizer_state
from metarl.rl.surrogates import likelihood_ratio_loss, ppo_clip_loss
from metarl.settings import Settings, named_by_default

LR_STEP = 1.1
"""By how much PPO's learning rate changes an iteration. As the policy's deviation shrinks, the same step in θ moves
the adapted policy further: at a constant rate a single step comes to exceed max_kl, and the return falls again."""


CURE = "lower agent.outer's step size or agent.inner_lr"

NAMES = (
    "ppo, trpo or gradient (maml_ppo, maml_trpo and maml_vpg: their own); another one's settings are shown by "
    "--agent.outer.name NAME --help"
)


class PpoConfig(Settings):
    """Several steps of Adam on PPO's clipped objective, each with the adaptation recomputed (ProMP)."""

    name: Literal["ppo"] = Field("ppo", description=NAMES)
    lr: float = Field(1e-3, gt=0, description="Adam's learning rate for the meta-update, at most; see max_kl")
    epochs: int = Field(5, ge=1, description="outer steps on the data of an iteration")
    clip_eps: float = Field(0.3, gt=0, description="PPO clip range of the outer objective")
    inner_kl_coef: float = Field(0.0, ge=0, description="weight of KL(collecting‖current policy) on the support data")
    max_kl: float = Field(
        0.05,
        gt=0,
        description="an iteration's epochs end when KL(old‖new) on the query data, measured before each step, exceeds "
        "it; the learning rate then falls by a tenth for the next iteration, else it rises by a tenth, up to lr. "
        "Needs epochs ≥ 2",
    )
    max_grad_norm: float = Field(0.5, gt=0, description="the meta-gradient is scaled down to this norm")


class TrpoConfig(Settings):
    """One natural-gradient step within a trust region (Schulman et al. 2015); published MAML figures use it."""

    name: Literal["trpo"] = Field("trpo", description=NAMES)
    max_kl: float = Field(0.01, gt=0, description="largest KL(old‖new) of the adapted policies, mean over tasks")
    cg_iterations: int = Field(10, ge=1, description="steps of conjugate gradient for the natural gradient")
    damping: float = Field(1e-4, ge=0, description="added to the Fisher information's diagonal")
    backtrack_ratio: float = Field(0.8, gt=0, lt=1, description="a step that fails is shortened by this factor")
    max_backtracks: int = Field(15, ge=0, description="shortened steps to try; if all fail, the iteration makes none")


class GradientConfig(Settings):
    """One plain step along the meta-gradient."""

    name: Literal["gradient"] = Field("gradient", description=NAMES)
    optimizer: Literal["adam", "rmsprop", "sgd"] = Field("adam", description="what makes the step")
    lr: float = Field(1e-3, gt=0, description="its learning rate")
    max_grad_norm: float = Field(0.5, gt=0, description="the meta-gradient is scaled down to this norm")


OuterConfig = Annotated[
    PpoConfig | TrpoConfig | GradientConfig,
    Field(discriminator="name"),
    BeforeValidator(functools.partial(named_by_default, "ppo")),
]
"""One member for each outer step, discriminated by `name`; PPO by default."""


class Outer(Protocol):
    """Moves the meta-parameters; owns its state between iterations."""

    def step(self, objective: MetaObjective) -> dict[str, float]:
        """Improve on the objective of one iteration; returns metrics.

        Raises:
            FloatingPointError: the loss or its gradient is not finite; nothing was changed by that step.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that a step changes, except for the meta-parameters."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned; raises ValueError naming an entry that does not fit."""


def build_outer(config: PpoConfig | TrpoConfig | GradientConfig, trained: Params) -> Outer:
    """Return the outer step of a config for the meta-parameters that are trained, by name."""
    if isinstance(config, TrpoConfig):
        return Trpo(config, trained)
    return Ppo(config, trained) if isinstance(config, PpoConfig) else GradientStep(config, trained)


def likelihood_ratio(log_probs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The outer surrogate without a clip: minus E[π/π_old · A], whose gradient is the policy gradient."""
    loss = likelihood_ratio_loss(log_probs, batch.log_probs, batch.advantages, batch.weights)
    return loss, torch.zeros_like(loss)


def _reset(trained: Params) -> None:
    for value in trained.values():
        value.grad = None


class Ppo:
    """Epochs of Adam on the clipped surrogate; every epoch adapts again from the current θ (Rothfuss et al. 2019)."""

    def __init__(self, config: PpoConfig, trained: Params) -> None:
        self.config, self._trained, self._lr = config, trained, config.lr
        self._optimizer = torch.optim.Adam(trained.values(), lr=config.lr)

    def step(self, objective: MetaObjective) -> dict[str, float]:
        """See `Outer.step`."""
        config = self.config
        metrics = {"outer_lr": self._lr}
        self._optimizer.param_groups[0]["lr"] = self._lr
        epochs = 0
        for _ in range(config.epochs):
            _reset(self._trained)
            metrics |= objective.backward(self._surrogate, config.inner_kl_coef)
            if metrics["kl"] > config.max_kl:
                break
            metrics["grad_norm"] = clip_gradients(self._trained, config.max_grad_norm, metrics["loss"], CURE)
            self._optimizer.step()
            epochs += 1
        factor = LR_STEP if epochs == config.epochs else 1.0 / LR_STEP
        self._lr = min(self._lr * factor, config.lr)
        return {**metrics, "epochs": float(epochs)}

    def _surrogate(self, log_probs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return ppo_clip_loss(log_probs, batch.log_probs, batch.advantages, batch.weights, self.config.clip_eps)

    def state_dict(self) -> dict[str, Tensor]:
        """See `Outer.state_dict`."""
        state = optimizer_state(self._optimizer, self._trained)
        return {"optimizer.lr": torch.tensor(self._lr, dtype=torch.float64), **state}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Outer.load_state_dict`."""
        load_optimizer_state(self._optimizer, self._trained, state)
        self._lr = float(state.get("optimizer.lr", self.config.lr))


class GradientStep:
    """One step of Adam, RMSProp or SGD."""

    def __init__(self, config: GradientConfig, trained: Params) -> None:
        self.config, self._trained = config, trained
        optimizers: dict[str, Any] = {
            "adam": torch.optim.Adam,
            "rmsprop": torch.optim.RMSprop,
            "sgd": torch.optim.SGD,
        }
        self._optimizer: torch.optim.Optimizer = optimizers[config.optimizer](trained.values(), lr=config.lr)

    def step(self, objective: MetaObjective) -> dict[str, float]:
        """See `Outer.step`."""
        _reset(self._trained)
        metrics = objective.backward(likelihood_ratio)
        metrics["grad_norm"] = clip_gradients(self._trained, self.config.max_grad_norm, metrics["loss"], CURE)
        self._optimizer.step()
        return metrics

    def state_dict(self) -> dict[str, Tensor]:
        """See `Outer.state_dict`."""
        return optimizer_state(self._optimizer, self._trained)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Outer.load_state_dict`."""
        load_optimizer_state(self._optimizer, self._trained, state)


class Trpo:
    """The natural gradient by conjugate gradient, then a line search (Schulman et al. 2015, Appendix C).

    It has no state. The constraint is on the policies AFTER adaptation, as functions of θ, as in the published
    code of Finn et al. 2017.
    """

    def __init__(self, config: TrpoConfig, trained: Params) -> None:
        self.config, self._trained = config, trained

    def step(self, objective: MetaObjective) -> dict[str, float]:
        """See `Outer.step`."""
        config, trained = self.config, self._trained
        _reset(trained)
        before = objective.backward(likelihood_ratio)
        norm = clip_gradients(trained, math.inf, before["loss"], CURE)
        gradient = {name: torch.zeros_like(v) if v.grad is None else v.grad.clone() for name, v in trained.items()}

        def curvature(vector: Params) -> Params:
            product = objective.fisher_product(vector)
            return {name: product[name] + config.damping * value for name, value in vector.items()}

        direction = conjugate_gradient(curvature, gradient, config.cg_iterations)
        length = float(dot(direction, curvature(direction)))
        metrics = {**before, "grad_norm": norm, "step_fraction": 0.0, "surrogate_gain": 0.0}
        if not math.isfinite(length):
            raise FloatingPointError(f"the natural gradient is not finite (squared length {length}); {CURE}")
        if not length > 0:
            return metrics
        scale = math.sqrt(2.0 * config.max_kl / length)
        start = {name: value.detach().clone() for name, value in trained.items()}
        for attempt in range(config.max_backtracks + 1):
            fraction = config.backtrack_ratio**attempt
            self._move(start, direction, -fraction * scale)
            after = objective.measure(likelihood_ratio)
            if after["loss"] < before["loss"] and after["kl"] <= config.max_kl:
                return {
                    **metrics,
                    **after,
                    "step_fraction": fraction,
                    "surrogate_gain": before["loss"] - after["loss"],
                }
        self._move(start, direction, 0.0)
        return metrics

    @torch.no_grad()
    def _move(self, start: Params, direction: Params, length: float) -> None:
        for name, value in self._trained.items():
            value.copy_(start[name] + length * direction[name])

    def state_dict(self) -> dict[str, Tensor]:
        """See `Outer.state_dict`."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Outer.load_state_dict`."""
