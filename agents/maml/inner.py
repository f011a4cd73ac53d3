"""Inner steps: how the parameters of each task follow from the meta-parameters. Pure functions of parameters.

The meta-learners of this package differ in their `InnerMethod`: what it learns in addition to θ, and how it makes one
step of adaptation. All of them work on one task with plain parameters, or on M tasks at once with parameters stacked as
`[M, ...]`: the loss of a task depends on its own parameters alone, so that the gradient of the sum holds the gradient
of each. Nothing here knows environments; with another `Loss` the same core learns regression
(`scripts/studies/sinusoid.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from metarl.nn.mlp import Params, Perturb
from metarl.rl.surrogates import Estimator, score_function_loss

LogProb = Callable[..., Tensor]
"""log π_θ(a|s), `[S]` or `[M, S]`, from (θ, observations, actions, and optionally a `Perturb`)."""


class Batch(NamedTuple):
    """Samples of one phase, episodes laid end to end: S = N · T. With stacked tasks all have `[M]` in front."""

    observations: Tensor  # [S, O], normalised
    actions: Tensor  # [S, A]
    log_probs: Tensor  # [S], of the policy that collected
    advantages: Tensor  # [S]
    weights: Tensor  # [S], 1 for a valid sample, else 0
    steps: Tensor  # [S], integers: step within the episode

    def tasks(self, which: slice | int) -> Batch:
        """Return the batch of some tasks; an index drops the task dimension."""
        return Batch(*(value[which] for value in self))


class Loss(Protocol):
    """What an inner step descends: each task's loss on its own data, scalar or `[M]`."""

    def __call__(self, params: Params, batch: Any) -> Tensor:
        """Return the loss of `params` on a batch."""


class MetaParams(NamedTuple):
    """The meta-parameters.

    Attributes:
        theta: θ, where every task starts; plain, or stacked `[M, ...]`.
        learned: what the method learns in addition to θ, by name; shared by all tasks.
        iteration: meta-updates so far.
        seed: with the iteration, the root of everything that an inner step draws.
    """

    theta: Params
    learned: Params
    iteration: int = 0
    seed: int = 0

    def named(self) -> Params:
        """Return all meta-parameters, by their names on disk."""
        return {**{f"policy.{name}": value for name, value in self.theta.items()}, **self.learned}


OuterPhases = Literal["first", "last", "all"]


class InnerMethod(Protocol):
    """How one meta-learner adapts.

    Attributes:
        outer_phases: what the outer loss is taken of: the `last` of the K + 1 phases, after all steps; `all` of them,
            summed, each at the parameters that collected it; or the `first`, when training does not adapt at all.
    """

    @property
    def outer_phases(self) -> OuterPhases:
        """See above."""

    def learned(self, theta: Params) -> Params:
        """Return what is learned in addition to θ, by name; values that require a gradient are trained."""

    def step(self, loss: Loss, meta: MetaParams, params: Params, batch: Any, create_graph: bool) -> Params:
        """One step of adaptation.

        Args:
            loss: of a task on its data.
            meta: the meta-parameters.
            params: the task's parameters so far, plain or stacked; they require a gradient.
            batch: fresh data, collected with `params`.
            create_graph: whether the result will be differentiated with respect to `meta`.

        Returns:
            The adapted parameters, attached to `meta` as the method wants them differentiated.
        """


def gradients(loss: Loss, params: Params, names: Sequence[str], batch: Any, create_graph: bool) -> Params:
    """Return ∇L of each task for some of its parameters, by name; itself differentiable if `create_graph`."""
    found = torch.autograd.grad(loss(params, batch).sum(), [params[name] for name in names], create_graph=create_graph)
    return dict(zip(names, found, strict=True))


def descend(params: Params, gradient: Params, inner_lr: float) -> Params:
    """Return θ − α g for the parameters that `gradient` names, the others as they are."""
    return params | {name: params[name] - inner_lr * value for name, value in gradient.items()}


def inner_loop(
    method: InnerMethod, loss: Loss, meta: MetaParams, supports: Sequence[Any], create_graph: bool = True
) -> list[Params]:
    """Adapt step by step from θ.

    Args:
        method: makes the steps.
        loss: of a task on its data.
        meta: the meta-parameters; θ plain, or stacked as the data is.
        supports: K batches of data, one a step.
        create_graph: whether the result will be differentiated.

    Returns:
        θ⁰ = θ, θ¹, …, θᴷ.
    """
    path = [meta.theta]
    for support in supports:
        path.append(method.step(loss, meta, path[-1], support, create_graph))
    return path


@dataclass(frozen=True)
class PolicyLoss:
    """The inner loss of reinforcement learning: a surrogate for −E[return] on the samples of one phase.

    Attributes:
        log_prob: of the policy.
        estimator: one of `metarl.rl.surrogates.ESTIMATORS`.
    """

    log_prob: LogProb
    estimator: Estimator

    def __call__(self, params: Params, batch: Batch) -> Tensor:
        """Return the loss, scalar or `[M]`."""
        log_probs = self.log_prob(params, batch.observations, batch.actions)
        return self.estimator(log_probs, batch.log_probs, batch.advantages, batch.weights, batch.steps)

    def perturbed(self, params: Params, acting: Params, batch: Batch, perturb: Perturb) -> Tensor:
        """Return the loss of a policy that acts without a perturbation and learns with one (Meta-Dropout).

        −E[π_acting/π_old · A · log π_params], the log-density alone being perturbed. Its gradient for `params` is the
        policy gradient; differentiated once more where both are θ, the ratio makes it that of data collected by the
        policy that acts, as in LVC.
        """
        inputs = batch.observations, batch.actions
        log_ratio = torch.where(batch.weights > 0, self.log_prob(acting, *inputs) - batch.log_probs, 0.0)
        log_probs = self.log_prob(params, *inputs, perturb)
        advantages = log_ratio.exp() * batch.advantages
        return score_function_loss(log_probs, batch.log_probs, advantages, batch.weights)
