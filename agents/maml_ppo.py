"""MAML-PPO: model-agnostic meta-learning with likelihood-ratio inner steps and a PPO-clip outer objective.

One iteration, for tasks i = 1..M (Finn et al. 2017, Alg. 3; outer objective in the form of ProMP, Rothfuss et al.
2019):

    θ_i⁰ = θ
    for k in 0..K−1:   collect fresh support data D_i^k with θ_i^k
                       θ_i^{k+1} = θ_i^k − α ∇ L_LR(θ_i^k; D_i^k)           (`adapt`)
    collect query data D_i^K with θ_i^K
    for each epoch:    recompute θ_i^K from the CURRENT θ through all K steps
                       θ ← Adam(θ, ∇_θ mean_i [L_clip(θ_i^K; D_i^K) + η Σ_k KL_k])   (`update`)

The gradient is exact to second order: it flows through the inner gradients. All tasks of a chunk are one batched
computation on parameters stacked as `[M, ...]`; the loss of a task depends on its own parameters alone, so that the
gradient of the sum holds the gradient of each. Chunks bound the memory.

Must not import environments, training or tracking.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import BaseModel, BeforeValidator, Field, PositiveInt
from torch import Tensor

from metarl.agents.value import LearnedValue, linear_values
from metarl.errors import STRICT, as_tuple
from metarl.normalizer import Normalizer
from metarl.objectives import approximate_kl, likelihood_ratio_loss, ppo_clip_loss
from metarl.optimizers import adam_state, load_adam_state
from metarl.policies import GaussianMlp, Params, gaussian_log_prob
from metarl.returns import gae, normalize_advantages
from metarl.types import Rollout

CPU_CHUNK_BYTES = 2_500_000
"""Bytes of one layer's activations in a chunk of tasks on a CPU: it should stay in the cache (measured with
`scripts/bench_meta_update.py`)."""

GPU_CHUNK_FRACTION = 0.01
"""The same on a GPU, as a fraction of its free memory: an update holds about forty times as much."""


def chunk_bytes(device: torch.device) -> int:
    """Return how large one layer's activations may be in a chunk of tasks."""
    if device.type == "cuda":
        return int(GPU_CHUNK_FRACTION * torch.cuda.mem_get_info(device)[0])
    return CPU_CHUNK_BYTES


LR_STEP = 1.1
"""By how much the outer learning rate changes an iteration. As the policy's deviation shrinks, the same step in θ moves
the adapted policy further: at a constant rate a single step comes to exceed max_kl, and the return falls again."""


class MamlPpoConfig(BaseModel):
    """MAML-PPO."""

    model_config = STRICT

    name: Literal["maml_ppo"] = "maml_ppo"
    hidden_sizes: Annotated[tuple[PositiveInt, ...], BeforeValidator(as_tuple)] = Field(
        (64, 64), description="widths of the policy's hidden layers"
    )
    activation: Literal["tanh", "relu"] = Field("tanh", description="nonlinearity of the hidden layers")
    init_std: float = Field(1.0, gt=0, description="initial action standard deviation; actions span ±1")
    min_std: float = Field(0.05, gt=0, description="lower bound of the standard deviation")
    max_std: float = Field(2.0, gt=0, description="upper bound of the standard deviation")
    adaptation_steps: int = Field(1, ge=1, description="K, inner gradient steps, each on fresh data")
    inner_lr: float = Field(0.1, gt=0, description="step size of the adaptation")
    learn_inner_lr: bool = Field(False, description="learn one inner rate per parameter, starting from inner_lr")
    outer_lr: float = Field(1e-3, gt=0, description="Adam's learning rate for the meta-update, at most; see max_kl")
    epochs: int = Field(5, ge=1, description="outer steps on the data of an iteration")
    clip_eps: float = Field(0.3, gt=0, description="PPO clip range of the outer objective")
    inner_kl_coef: float = Field(0.0, ge=0, description="weight of KL(collecting‖current policy) on the support data")
    max_kl: float = Field(
        0.05,
        gt=0,
        description="an iteration's epochs end when KL(old‖new) on the query data, measured before each step, exceeds "
        "it; the learning rate then falls by a tenth for the next iteration, else it rises by a tenth, up to outer_lr. "
        "Needs epochs ≥ 2",
    )
    max_grad_norm: float = Field(0.5, gt=0, description="the meta-gradient is scaled down to this norm")
    gamma: float = Field(0.99, ge=0, le=1, description="discount a step")
    gae_lambda: float = Field(0.97, ge=0, le=1, description="GAE's trade-off: 0 one-step, 1 Monte Carlo")
    baseline: Literal["linear", "learned"] = Field(
        "linear", description="linear features fitted per task and phase, or one value network for all tasks"
    )
    value_lr: float = Field(1e-3, gt=0, description="Adam's learning rate of the value network (baseline: learned)")
    value_epochs: int = Field(5, ge=1, description="passes of the value network over the data (baseline: learned)")
    normalize_observations: bool = Field(True, description="scale observations by their running mean and deviation")
    normalizer_floor: float = Field(0.01, gt=0, description="smallest scale of the normaliser, in observation units")


class Batch(NamedTuple):
    """Samples of one phase, episodes laid end to end: S = N · T. With stacked tasks all have `[M]` in front."""

    observations: Tensor  # [S, O], normalised
    actions: Tensor  # [S, A]
    log_probs: Tensor  # [S], of the policy that collected
    advantages: Tensor  # [S]
    weights: Tensor  # [S], 1 for a valid sample, else 0

    def tasks(self, which: slice | int) -> Batch:
        """Return the batch of some tasks; an index drops the task dimension."""
        return Batch(*(value[which] for value in self))


LogProb = Callable[[Params, Tensor, Tensor], Tensor]
"""log π_θ(a|s) from (θ, observations, actions)."""


def inner_step(
    log_prob: LogProb, params: Params, inner_lr: Params, support: Batch, *, create_graph: bool = True
) -> tuple[Params, Tensor]:
    """One adaptation step, θ' = θ − α ∇ L_LR(θ), differentiable with respect to θ and α (Finn et al. 2017, Eq. 1).

    Args:
        log_prob: the policy.
        params: θ, plain or stacked `[M, ...]`; part of a graph or leaves that require a gradient.
        inner_lr: α for each parameter, broadcast against it.
        support: data collected with θ (or, in later epochs, with what θ was then), stacked like θ.
        create_graph: False if nothing will be differentiated through the step.

    Returns:
        θ', and the KL of the collecting policy from the current one on the support data, scalar or `[M]`.
    """
    log_probs = log_prob(params, support.observations, support.actions)
    loss = likelihood_ratio_loss(log_probs, support.log_probs, support.advantages, support.weights)
    gradients = torch.autograd.grad(loss.sum(), list(params.values()), create_graph=create_graph)
    adapted = {
        name: value - inner_lr[name] * gradient
        for (name, value), gradient in zip(params.items(), gradients, strict=True)
    }
    return adapted, approximate_kl(log_probs, support.log_probs, support.weights)


class MetaLoss(NamedTuple):
    """The outer objective of some tasks, each entry scalar or `[M]`."""

    loss: Tensor
    kl: Tensor  # of the query data's policy from the current adapted one
    clip_fraction: Tensor


def meta_loss(
    log_prob: LogProb,
    params: Params,
    inner_lr: Params,
    supports: Sequence[Batch],
    query: Batch,
    clip_eps: float,
    inner_kl_coef: float,
) -> MetaLoss:
    """The PPO-clip loss after K inner steps from θ (Rothfuss et al. 2019, "ProMP").

    Args:
        log_prob: the policy.
        params: θ, plain or stacked.
        inner_lr: α for each parameter.
        supports: K batches, one an inner step.
        query: data collected with the parameters that the K steps led to at the time.
        clip_eps: PPO's clip range.
        inner_kl_coef: η, weight of the KL on the support data.
    """
    adapted, penalty = params, torch.zeros(())
    for support in supports:
        adapted, inner_kl = inner_step(log_prob, adapted, inner_lr, support)
        penalty = penalty + inner_kl
    log_probs = log_prob(adapted, query.observations, query.actions)
    loss, clip_fraction = ppo_clip_loss(log_probs, query.log_probs, query.advantages, query.weights, clip_eps)
    kl = approximate_kl(log_probs.detach(), query.log_probs, query.weights)
    return MetaLoss(loss + inner_kl_coef * penalty, kl, clip_fraction)


class MamlPpo:
    """The agent: owns θ, the inner rates, the baseline, the normaliser and the optimiser; an `Agent`.

    Args:
        config: its settings.
        observation_size: O.
        action_size: A.
        device: where updates are computed. Acting happens on the CPU, beside the environments, with small copies.
        seed: of the initial parameters.
    """

    def __init__(
        self, config: MamlPpoConfig, observation_size: int, action_size: int, device: torch.device, seed: int
    ) -> None:
        self.config, self.device = config, device
        self.adaptation_steps = config.adaptation_steps
        self.policy = GaussianMlp(
            observation_size,
            action_size,
            config.hidden_sizes,
            config.activation,
            config.init_std,
            config.min_std,
            config.max_std,
        )
        generator = torch.Generator().manual_seed(seed)
        params = self.policy.init(generator)
        self.params: Params = {name: value.to(device).requires_grad_() for name, value in params.items()}
        self.inner_lr: Params = {
            name: torch.full_like(value, config.inner_lr).requires_grad_(config.learn_inner_lr)
            for name, value in self.params.items()
        }
        self.value: LearnedValue | None = None
        if config.baseline == "learned":
            value_args = (observation_size, config.hidden_sizes, config.value_lr, config.value_epochs)
            self.value = LearnedValue(*value_args, generator, device)
        self._use_normalizer(Normalizer.identity(observation_size, config.normalizer_floor))
        self._optimizer = torch.optim.Adam(self._trained.values(), lr=config.outer_lr)
        self._outer_lr = config.outer_lr

    def _use_normalizer(self, normalizer: Normalizer) -> None:
        """Keep one copy for updates and one for acting, so that acting never waits for the device."""
        self.normalizer, self._acting_normalizer = normalizer.to(self.device), normalizer.to("cpu")

    @property
    def _trained(self) -> Params:
        rates = {f"inner_lr.{name}": value for name, value in self.inner_lr.items() if value.requires_grad}
        return {**{f"policy.{name}": value for name, value in self.params.items()}, **rates}

    # --- acting and adapting -------------------------------------------------------------------------------------

    def initial_state(self, num_tasks: int) -> Params:
        """θ for every task, stacked `[M, ...]`, on the CPU."""
        return {name: value.detach().cpu().expand(num_tasks, *value.shape) for name, value in self.params.items()}

    @torch.no_grad()
    def act(self, observations: Tensor, noise: Tensor, state: Params) -> tuple[Tensor, Tensor, Params]:
        """Draw actions; see `Agent.act`."""
        mean, log_std = self.policy.distribution(state, self._acting_normalizer(observations))
        actions = mean + log_std.exp() * noise
        return actions, gaussian_log_prob(mean, log_std, actions), state

    @torch.no_grad()
    def log_prob(self, state: Params, observations: Tensor, actions: Tensor) -> Tensor:
        """Log-density of given actions; see `Agent.log_prob`."""
        inputs = self._acting_normalizer(observations).flatten(1, 2)
        return self.policy.log_prob(state, inputs, actions.flatten(1, 2)).view(actions.shape[:-1])

    def adapt(self, state: Params, rollout: Rollout) -> Params:
        """One inner step for every task on its own data; see `Agent.adapt`."""
        support = self._prepare(rollout.to(self.device))
        params = {name: value.detach().to(self.device).clone().requires_grad_() for name, value in state.items()}
        adapted, _ = inner_step(self.policy.log_prob, params, self.inner_lr, support, create_graph=False)
        return {name: value.detach().cpu() for name, value in adapted.items()}

    def _prepare(self, rollout: Rollout) -> Batch:
        """Estimate advantages, normalise them for each task, and lay the episodes end to end."""
        observations, _, advantages = self._advantages(rollout)
        parts = (observations, rollout.actions, rollout.log_probs, advantages, rollout.valid)
        observations, actions, log_probs, advantages, valid = (part.flatten(1, 2) for part in parts)
        advantages = normalize_advantages(advantages, valid)
        return Batch(observations, actions, log_probs, advantages, valid.to(advantages.dtype))

    def _advantages(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        """Return normalised observations `[M, N, T, O]`, values and advantages `[M, N, T]`."""
        observations = self.normalizer(rollout.observations)
        if self.value is None:
            values, next_values = linear_values(rollout, observations, self.config.gamma)
        else:
            values, next_values = self.value.values(rollout, observations, self.normalizer(rollout.next_observations))
        ends = (rollout.terminated, rollout.truncated)
        advantages = gae(rollout.rewards, values, next_values, *ends, self.config.gamma, self.config.gae_lambda)
        return observations, values, advantages

    # --- learning ------------------------------------------------------------------------------------------------

    def update(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """One meta-update on the K support rollouts and the query rollout; see `Agent.update`."""
        config = self.config
        *supports, query = [self._prepare(rollout) for rollout in rollouts]
        metrics = {"train/outer_lr": self._outer_lr}
        self._optimizer.param_groups[0]["lr"] = self._outer_lr
        epochs = 0
        for _ in range(config.epochs):
            self._optimizer.zero_grad()
            outcome = self.accumulate_gradient(supports, query)
            metrics |= {f"train/{name}": float(value) for name, value in outcome.items()}
            if metrics["train/kl"] > config.max_kl:
                break
            norm = torch.nn.utils.clip_grad_norm_(self._trained.values(), config.max_grad_norm)
            metrics["train/grad_norm"] = float(norm)
            if not math.isfinite(metrics["train/loss"] + metrics["train/grad_norm"]):
                raise FloatingPointError(f"the meta-gradient is not finite: {metrics}; lower outer_lr or inner_lr")
            self._optimizer.step()
            epochs += 1
        factor = LR_STEP if epochs == config.epochs else 1.0 / LR_STEP
        self._outer_lr = min(self._outer_lr * factor, config.outer_lr)
        std = self.params["log_std"].detach().exp().clamp(config.min_std, config.max_std).mean()
        metrics |= {"train/epochs": float(epochs), "train/std": float(std)} | self._fit_value(rollouts)
        if config.normalize_observations:
            normalizer = self.normalizer
            for rollout in rollouts:
                normalizer = normalizer.update(rollout.observations, rollout.valid)
            self._use_normalizer(normalizer)
        return metrics

    def accumulate_gradient(self, supports: Sequence[Batch], query: Batch) -> dict[str, Tensor]:
        """Add the gradient of the mean meta-loss over tasks to θ's, chunk by chunk; returns means over tasks."""
        config = self.config
        num_tasks, samples = query.weights.shape
        widest = max(config.hidden_sizes, default=self.policy.observation_size)
        chunk = max(1, chunk_bytes(self.device) // (4 * samples * widest))
        totals: dict[str, Tensor] = {}
        for start in range(0, num_tasks, chunk):
            count = min(chunk, num_tasks - start)
            which = slice(start, start + count) if count > 1 else start
            params = self.params
            if count > 1:
                params = {name: value.expand(count, *value.shape) for name, value in params.items()}
            outcome = meta_loss(
                self.policy.log_prob,
                params,
                self.inner_lr,
                [support.tasks(which) for support in supports],
                query.tasks(which),
                config.clip_eps,
                config.inner_kl_coef,
            )
            (outcome.loss.sum() / num_tasks).backward()  # type: ignore[no-untyped-call]
            for name, value in outcome._asdict().items():
                totals[name] = totals.get(name, torch.zeros((), device=self.device)) + value.detach().sum() / num_tasks
        return totals

    def _fit_value(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        if self.value is None:
            return {}
        samples = []
        for rollout in rollouts:
            observations, values, advantages = self._advantages(rollout)
            samples.append((observations.flatten(0, 2), (values + advantages).flatten(), rollout.valid.flatten()))
        return self.value.fit(*(torch.cat(part) for part in zip(*samples, strict=True)))

    # --- saving --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that training changes; see `Agent.state_dict`."""
        state = {f"policy.{name}": value for name, value in self.params.items()}
        state |= {f"inner_lr.{name}": value for name, value in self.inner_lr.items()}
        state |= {f"normalizer.{name}": value for name, value in self.normalizer.state_dict().items()}
        if self.value is not None:
            state |= {f"value.{name}": value for name, value in self.value.state_dict().items()}
        state |= {"outer_lr": torch.tensor(self._outer_lr, dtype=torch.float64)}
        state |= adam_state(self._optimizer, self._trained)
        return {name: value.detach().cpu().contiguous() for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned; raises ValueError naming the entry that is missing or does not fit."""
        for name, value in self.state_dict().items():
            if "adam." not in name and (name not in state or state[name].shape != value.shape):
                found = tuple(state[name].shape) if name in state else "nothing"
                raise ValueError(f"cannot load {name!r}: expected shape {tuple(value.shape)}, found {found}")
        with torch.no_grad():
            for prefix, params in (("policy", self.params), ("inner_lr", self.inner_lr)):
                for name, value in params.items():
                    value.copy_(state[f"{prefix}.{name}"])
        statistics = {name: state[f"normalizer.{name}"] for name in self.normalizer.state_dict()}
        self._use_normalizer(Normalizer(**statistics, floor=self.config.normalizer_floor))
        if self.value is not None:
            self.value.load_state_dict({name.removeprefix("value."): value for name, value in state.items()})
        self._outer_lr = float(state["outer_lr"])
        load_adam_state(self._optimizer, self._trained, state)
