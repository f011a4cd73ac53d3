"""The agent of the MAML family: parameters θ that a few gradient steps adapt to a task.

It owns θ, what an `InnerMethod` learns in addition, the value function, the normaliser and the outer step. The methods,
one file each, make and differentiate a step of adaptation; `meta_objective.py` holds the outer objective, and
`outer.py` the optimisers that improve it.

Must not import environments, training or tracking.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import AliasChoices, BeforeValidator, Field, PositiveInt, model_validator
from torch import Tensor

from metarl.agents.maml.controller import MlpController
from metarl.agents.maml.inner import Batch, InnerMethod, MetaParams, PolicyLoss, inner_loop
from metarl.agents.maml.meta_objective import MetaObjective
from metarl.agents.maml.outer import OuterConfig, PpoConfig, build_outer
from metarl.errors import UserError
from metarl.nn.distributions import ActionHead, GaussianHead, action_head
from metarl.nn.encoders import PIXEL_SCALE, EncoderConfig
from metarl.nn.jacobians import choose_steps, mlp_jacobian
from metarl.nn.mlp import ACTIVATIONS, MlpPolicy, Params, mlp_modules
from metarl.nn.normalizer import Normalizer
from metarl.nn.optimizer_state import check_entries
from metarl.protocols import AuxiliaryLoss
from metarl.rl.returns import gae, normalize_advantages, return_scale, vtrace
from metarl.rl.surrogates import ESTIMATORS, weighted_mean
from metarl.rl.value import LearnedValue, linear_values
from metarl.seeding import Purpose, integer_seed
from metarl.settings import Settings, as_tuple
from metarl.spaces import Spaces
from metarl.types import (
    AdaptsBy,
    AgentSpec,
    PolicyJacobian,
    Prediction,
    Rollout,
    Task,
    TimeStep,
)


class GradientAgentConfig(Settings):
    """Settings that all methods of the family share."""

    name: str
    hidden_sizes: Annotated[tuple[PositiveInt, ...], BeforeValidator(as_tuple)] = Field(
        (64, 64), description="widths of the policy's hidden layers"
    )
    activation: Literal["tanh", "relu"] = Field("tanh", description="nonlinearity of the hidden layers")
    init_std: float = Field(1.0, gt=0, description="initial action standard deviation; actions span ±1")
    min_std: float = Field(0.05, gt=0, description="lower bound of the standard deviation")
    max_std: float = Field(2.0, gt=0, description="upper bound of the standard deviation")
    adaptation_steps: int = Field(1, ge=1, description="K, inner gradient steps, each on fresh data")
    inner_lr: float = Field(0.1, gt=0, description="step size of the adaptation")
    adapted_modules: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = Field(
        ("all",), min_length=1, description="modules that adapt: all, or any of layer_0, layer_1, …, head, log_std"
    )
    estimator: Literal["lvc", "dice", "score_function"] = Field(
        "lvc",
        description="surrogate of the inner steps; lvc: low variance; dice: exact to second order given exact "
        "advantages, high variance; score_function: BIASED to second order, to compare with",
    )
    gamma: float = Field(0.99, ge=0, le=1, description="discount a step")
    gae_lambda: float = Field(0.97, ge=0, le=1, description="GAE's trade-off: 0 one-step, 1 Monte Carlo")
    critic: Literal["linear", "learned"] = Field(
        "linear",
        validation_alias=AliasChoices("critic", "baseline"),
        description="linear features fitted per task and phase, or one value network for all tasks",
    )
    value_lr: float = Field(1e-3, gt=0, description="Adam's learning rate of the value network (critic: learned)")
    value_epochs: int = Field(5, ge=1, description="passes of the value network over the data (critic: learned)")
    saturation_coef: float = Field(
        0.0,
        ge=0,
        description="weight of max(0, |mean| − 1)² after adaptation: a mean far beyond the bounds is hard to unlearn",
    )
    normalizer_iterations: int | None = Field(
        None,
        ge=0,
        description="iterations in which the observation normaliser learns; none: all; 0: observations stay raw",
    )
    normalizer_floor: float = Field(0.01, gt=0, description="smallest scale of the normaliser, in observation units")
    encoder: EncoderConfig = Field(default_factory=EncoderConfig)
    outer: OuterConfig = Field(default_factory=PpoConfig)

    def head(self, spaces: Spaces) -> ActionHead:
        """Return what makes a distribution of the policy's outputs."""
        return action_head(spaces, self.init_std, self.min_std, self.max_std)

    @model_validator(mode="after")
    def _bounds(self) -> GradientAgentConfig:
        GaussianHead(1, self.init_std, self.min_std, self.max_std)
        modules = ("encoder", *mlp_modules(len(self.hidden_sizes), GaussianHead.free_parameters))
        for name in self.adapted_modules:
            if name != "all" and name not in modules:
                raise ValueError(f"adapted_modules: got {name!r}, expected all or any of {', '.join(modules)}")
        return self

    def adapted(self, spaces: Spaces) -> tuple[str, ...]:
        """Return the names of the parameters that adapt; raises UserError if there are none."""
        encoder = self.encoder.build(spaces.image)
        modules = {} if encoder is None else {"encoder": encoder.names}
        modules |= mlp_modules(len(self.hidden_sizes), self.head(spaces).free_parameters)
        if not {"all", *modules} & set(self.adapted_modules):
            raise UserError(
                f"agent.adapted_modules names {', '.join(self.adapted_modules)}; for these spaces there are "
                f"{', '.join(modules)}"
            )
        chosen = [names for module, names in modules.items() if {"all", module} & set(self.adapted_modules)]
        return tuple(name for names in chosen for name in names)


class GradientActor(NamedTuple):
    """An `Actor` that acts with the parameters of each task, on the CPU next to the environments.

    Attributes:
        policy: what the parameters mean.
        normalizer: of observations.
        noise_size: numbers of noise that an action takes.
        trial_episodes: 1, since nothing is remembered.
    """

    policy: MlpPolicy
    normalizer: Normalizer
    noise_size: int
    trial_episodes: int = 1

    @torch.no_grad()
    def act(self, time_step: TimeStep, noise: Tensor, state: Params) -> tuple[Tensor, Tensor, Params]:
        """Draw actions; see `Actor.act`. Of the time step only the observations matter."""
        distribution = self.policy.distribution(state, self.normalizer(time_step.observations))
        actions = distribution.sample(noise)
        return actions, distribution.log_prob(actions), state


class GradientAgent:
    """An `Agent` that adapts by gradient steps.

    Args:
        method: how it adapts, and what it learns in addition to θ.
        config: its settings.
        spec: what it is built for. Updates run on the spec's device, acting on the CPU with small copies.
    """

    adapts_by: AdaptsBy = "gradient"
    trial_episodes = 1

    def __init__(self, method: InnerMethod, config: GradientAgentConfig, spec: AgentSpec) -> None:
        self.method, self.config, self.device = method, config, spec.device
        self.adaptation_steps = config.adaptation_steps
        self.training_adaptation_steps = 0 if method.outer_phases == "first" else config.adaptation_steps
        size, head = spec.spaces.observation_size, config.head(spec.spaces)
        image = spec.spaces.image
        if image is not None and config.critic == "linear":
            raise UserError("agent.critic is linear, which cannot fit images; set it to learned")
        heads = spec.num_stage_ids if spec.stage_heads else 1
        self.noise_size = head.noise_size
        encoder = config.encoder.build(image)
        self.policy = MlpPolicy(size, head, config.hidden_sizes, config.activation, heads, encoder)
        self._loss = PolicyLoss(self.policy.log_prob, ESTIMATORS[config.estimator])
        generator = torch.Generator().manual_seed(spec.seed)
        params = self.policy.init(generator)
        theta = {name: value.to(self.device).requires_grad_() for name, value in params.items()}
        self.meta = MetaParams(theta, method.learned(theta), seed=spec.seed)
        self.value: LearnedValue | None = None
        if config.critic == "learned":
            value_settings = (size, config.hidden_sizes, config.value_lr, config.value_epochs)
            self.value = LearnedValue(*value_settings, generator, self.device)
        if image is None:
            normalizer = Normalizer.identity(size, config.normalizer_floor, (size - spec.num_stage_ids, size))
        else:
            normalizer = Normalizer.identity(size, config.normalizer_floor, (0, size), PIXEL_SCALE)
        self._use_normalizer(normalizer)
        self._outer = build_outer(config.outer, self.meta.named())

    def _use_normalizer(self, normalizer: Normalizer) -> None:
        """Keep one copy for updates and one for acting, so that acting never waits for the device."""
        self.normalizer, self._acting_normalizer = normalizer.to(self.device), normalizer.to("cpu")

    # --- acting and adapting -------------------------------------------------------------------------------------

    def initial_state(self, num_tasks: int) -> Params:
        """θ for every task, stacked `[M, ...]`, on the CPU."""
        return {name: value.detach().cpu().expand(num_tasks, *value.shape) for name, value in self.meta.theta.items()}

    def actor(self) -> GradientActor:
        """Return a snapshot that acts; see `AdaptiveActor.actor`."""
        return GradientActor(self.policy, self._acting_normalizer, self.noise_size)

    def act(self, time_step: TimeStep, noise: Tensor, state: Params) -> tuple[Tensor, Tensor, Params]:
        """See `GradientActor.act`."""
        return self.actor().act(time_step, noise, state)

    @torch.no_grad()
    def log_prob(self, state: Params, rollout: Rollout) -> Tensor:
        """Log-density of given actions, computed where the rollout is; see `ProtectedAgent.log_prob`."""
        device = rollout.valid.device
        params = {name: value.to(device) for name, value in state.items()}
        inputs = self._acting_normalizer.to(device)(rollout.observations).flatten(1, 2)
        return self.policy.log_prob(params, inputs, rollout.actions.flatten(1, 2)).view(rollout.valid.shape)

    def adapt(self, state: Params, rollout: Rollout, inner_lr: float | None = None) -> Params:
        """One inner step for every task on its own data; see `Agent.adapt`.

        With `inner_lr` the step is scaled by what it is to the configured one, where learned rates began.
        """
        support = self._prepare(rollout.to(self.device))
        params = {name: value.detach().to(self.device).clone().requires_grad_() for name, value in state.items()}
        adapted = self.method.step(self._loss, self.meta, params, support, create_graph=False)
        if inner_lr is not None:
            factor = inner_lr / self.config.inner_lr
            adapted = {name: params[name] + factor * (value - params[name]) for name, value in adapted.items()}
        return {name: value.detach().cpu() for name, value in adapted.items()}

    def _prepare(self, rollout: Rollout) -> Batch:
        """Estimate advantages, normalise them for each task, and lay the episodes end to end."""
        observations, _, advantages = self._advantages(rollout)
        steps = torch.arange(rollout.valid.shape[-1], device=advantages.device).expand_as(advantages)
        parts = (observations, rollout.actions, rollout.log_probs, advantages, rollout.valid, steps)
        observations, actions, log_probs, advantages, valid, steps = (part.flatten(1, 2) for part in parts)
        advantages = normalize_advantages(advantages, valid)
        return Batch(observations, actions, log_probs, advantages, valid.to(advantages.dtype), steps)

    def _advantages(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        """Return normalised observations `[M, N, T, O]`, values and advantages `[M, N, T]`."""
        observations = self.normalizer(rollout.observations)
        values, next_values = self._values(rollout, observations)
        ends = (rollout.terminated, rollout.truncated)
        advantages = gae(rollout.rewards, values, next_values, *ends, self.config.gamma, self.config.gae_lambda)
        return observations, values, advantages

    def _values(self, rollout: Rollout, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values before and after each step, both `[M, N, T]`; `observations` are normalised."""
        if self.value is None:
            last = rollout.terminated | rollout.truncated
            return linear_values(observations, rollout.rewards, last, rollout.valid, self.config.gamma)
        return self.value.values(rollout, observations, self.normalizer(rollout.next_observations))

    # --- on a robot ----------------------------------------------------------------------------------------------

    def controller(self, state: Params, spaces: Spaces) -> MlpController:
        """One control step at the parameters of one task; see `Agent.controller`."""
        params = {name: value[0] for name, value in state.items()}
        return MlpController(self.policy, params, self.normalizer, spaces)

    def pack(self, state: Params) -> dict[str, Tensor]:
        """The parameters as they are; see `Agent.pack`."""
        return dict(state)

    def unpack(self, packed: Mapping[str, Tensor]) -> Params:
        """See `Agent.unpack`."""
        check_entries(packed, self.initial_state(1))
        return {name: packed[name] for name in self.meta.theta}

    # --- learning ------------------------------------------------------------------------------------------------

    def update(
        self, tasks: Sequence[Task], rollouts: Sequence[Rollout], auxiliary_loss: AuxiliaryLoss | None = None
    ) -> dict[str, float]:
        """One meta-update on the K support rollouts and the query rollout; see `Agent.update`."""
        config = self.config
        if len(rollouts) != self.training_adaptation_steps + 1:
            raise ValueError(f"got {len(rollouts)} rollouts, expected {self.training_adaptation_steps + 1}: K + 1")
        metrics = self._outer.step(self.objective([self._prepare(rollout) for rollout in rollouts], auxiliary_loss))
        self.policy.head.keep_within_bounds(self.meta.theta)
        self.meta = self.meta._replace(iteration=self.meta.iteration + 1)
        metrics |= self.policy.head.metrics(self.meta.theta) | self._fit_value(rollouts)
        if config.normalizer_iterations is None or self.meta.iteration <= config.normalizer_iterations:
            normalizer = self.normalizer
            for rollout in rollouts:
                normalizer = normalizer.update(rollout.observations, rollout.valid)
            self._use_normalizer(normalizer)
        return {f"train/{name}": value for name, value in metrics.items()}

    def objective(self, batches: Sequence[Batch], auxiliary_loss: AuxiliaryLoss | None = None) -> MetaObjective:
        """Return the outer objective on the K support batches and the query batch, each `[M, S, ...]`."""
        width = max(self.config.hidden_sizes, default=self.policy.observation_size)
        penalty = self._saturation if self.config.saturation_coef else None
        return MetaObjective(
            self.method, self._loss, self.policy.log_prob, self.meta, batches, width, auxiliary_loss, penalty
        )

    def _saturation(self, params: Params, batch: Batch) -> Tensor:
        distribution = self.policy.distribution(params, batch.observations)
        return self.config.saturation_coef * weighted_mean(distribution.saturation(), batch.weights)

    def _fit_value(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        if self.value is None:
            return {}
        samples = []
        for rollout in rollouts:
            observations, values, advantages = self._advantages(rollout)
            samples.append((observations.flatten(0, 2), (values + advantages).flatten(), rollout.valid.flatten()))
        observations, targets, valid = (torch.cat(part) for part in zip(*samples, strict=True))
        return self.value.fit(
            observations, targets, valid, integer_seed(self.meta.seed, Purpose.MINIBATCHES, self.meta.iteration)
        )

    # --- for stability methods ---------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, Tensor]:
        """What the outer step trains, by name."""
        return {name: value for name, value in self.meta.named().items() if value.requires_grad}

    def replay_policy(self, rollouts: Sequence[Rollout], advantages: bool = False) -> Prediction:
        """Adapt θ to recorded support data again, with the method's gradients; see `ProtectedAgent.replay_policy`."""
        *supports, query = rollouts
        tasks, shape = len(query.valid), query.valid.shape
        theta = {name: value.expand(tasks, *value.shape) for name, value in self.meta.theta.items()}
        batches = [self._prepare(support) for support in supports]
        params = inner_loop(self.method, self._loss, self.meta._replace(theta=theta), batches)[-1]
        observations = self.normalizer(query.observations)
        distribution = self.policy.distribution(params, observations.flatten(1, 2)).expanded()
        distribution = distribution.map(lambda part: part.view(*shape, -1))
        estimated, scale = None, torch.ones(())
        if advantages:
            scale = return_scale(query, self.config.gamma)
            with torch.no_grad():
                values, following = self._values(query, observations)
                log_ratios = distribution.log_prob(query.actions) - query.log_probs
                ends = (query.terminated, query.truncated)
                estimated = vtrace(query.rewards, values, following, log_ratios, *ends, self.config.gamma)[1]
        return Prediction(distribution, None, estimated, scale)

    def policy_jacobians(
        self, rollouts: Sequence[Rollout], states: int, generator: torch.Generator
    ) -> Iterator[PolicyJacobian]:
        """Differentiate each task's policy at θ⁰ … θᴷ, to first order (∂θᵏ/∂θ = 1); see `ProtectedAgent`."""
        batches = [self._prepare(rollout) for rollout in rollouts]
        tasks = len(batches[0].weights)
        each = max(1, states // (tasks * len(batches)))
        for params, batch in zip(self._path(batches), batches, strict=True):
            for i in range(tasks):
                chosen = choose_steps(batch.weights[i] > 0, each, generator)
                if len(chosen):
                    own = {name: value[i] for name, value in params.items()}
                    yield mlp_jacobian(self.policy, own, batch.observations[i, chosen])

    def hidden_units(self, rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
        """Activations of the adapted policies; see `ProtectedAgent.hidden_units`."""
        batches = [self._prepare(rollout) for rollout in rollouts]
        units: dict[str, Tensor] = {}

        def listen(layer: int, below: Tensor, hidden: Tensor) -> Tensor:
            activations = ACTIVATIONS[self.config.activation](hidden)
            units[f"layer_{layer}"] = activations[batches[-1].weights > 0]
            return hidden

        adapted = self._path(batches)[-1]
        with torch.no_grad():
            self.policy.distribution(adapted, batches[-1].observations, listen)
        return units

    def _path(self, batches: Sequence[Batch]) -> list[Params]:
        """Adapt θ to each task's data again; returns θ⁰ … θᴷ, stacked `[M, ...]`, without a graph."""
        theta = {name: value.expand(len(batches[0].weights), *value.shape) for name, value in self.meta.theta.items()}
        path = inner_loop(self.method, self._loss, self.meta._replace(theta=theta), batches[:-1], create_graph=False)
        return [{name: value.detach() for name, value in params.items()} for params in path]

    # --- saving --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that training changes; see `Agent.state_dict`."""
        state = {**self.meta.named(), **self._outer.state_dict()}
        state |= {f"normalizer.{name}": value for name, value in self.normalizer.state_dict().items()}
        if self.value is not None:
            state |= {f"value.{name}": value for name, value in self.value.state_dict().items()}
        state |= {"iteration": torch.tensor(self.meta.iteration), "seed": torch.tensor(self.meta.seed)}
        return {name: value.detach().cpu().contiguous() for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned; raises ValueError naming the entry that is missing or does not fit."""
        check_entries(state, self.state_dict())
        self._outer.load_state_dict(state)
        with torch.no_grad():
            for name, value in self.meta.named().items():
                value.copy_(state[name])
        self.meta = self.meta._replace(iteration=int(state["iteration"]), seed=int(state["seed"]))
        statistics = {name: state[f"normalizer.{name}"] for name in self.normalizer.state_dict()}
        self._use_normalizer(self.normalizer.with_statistics(statistics, self.device))
        if self.value is not None:
            self.value.load_state_dict({name.removeprefix("value."): value for name, value in state.items()})
