"""RL²: PPO over whole trials of a policy with a memory, which adapts by what it remembers (Duan et al. 2016).

A trial is several episodes of one task. The memory (hidden state) is kept through a trial and reset before the next.
One update:

    inputs  = observation, last action, last reward, episode start       of every step of every trial, normalised
    states  = memory at the start of each chunk, values of each step     one pass without gradient
    A       = GAE along the trial, through the ends of episodes
    for epoch, for minibatch of trials:
        log π, V = networks(chunks from their states)                    back-propagation within a chunk
        Adam step on  PPO clip + value loss − entropy

Must not import environments, training or tracking.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from metarl.agents.rl2.config import Rl2Config
from metarl.agents.rl2.control_step import (
    ControlStep,
    Rl2Actor,
    Rl2State,
    active_rows,
    join_state,
    read_time_step,
    split_state,
)
from metarl.agents.rl2.controller import MemoryController
from metarl.agents.rl2.networks import Critic, LearnedCriticConfig, LinearCriticConfig, Policy, PolicyHead, Trunk
from metarl.agents.rl2.trials import (
    Inputs,
    PreviousStep,
    TrialBatch,
    Trials,
    chunks,
    normalized,
    read_memory,
    read_trials,
)
from metarl.errors import UserError
from metarl.nn.encoders import PIXEL_SCALE
from metarl.nn.jacobians import choose_steps, jacobian, plain_kernels
from metarl.nn.memory import unpack
from metarl.nn.normalizer import Normalizer
from metarl.nn.optimizer_state import check_entries, clip_gradients, load_optimizer_state, optimizer_state
from metarl.protocols import AuxiliaryLoss
from metarl.rl.returns import gae, normalize_advantages, return_scale, vtrace
from metarl.rl.surrogates import approximate_kl, ppo_clip_loss, weighted_mean
from metarl.rl.value import linear_values
from metarl.seeding import Purpose, integer_seed
from metarl.spaces import Spaces
from metarl.types import AdaptsBy, AgentSpec, PolicyJacobian, Prediction, Rollout, Task, TimeStep

LAST_LR = 0.1
"""Final learning rate, as a fraction of the initial one."""


class Rl2:
    """An `Agent` that adapts in its memory.

    Args:
        config: its settings.
        spec: what it is built for; it always sees the entries that hold the stage id.

    Raises:
        UserError: `observation_entries` names one that the observation does not have, or heads cannot be chosen.
    """

    adapts_by: AdaptsBy = "memory"
    adaptation_steps = training_adaptation_steps = 0

    def __init__(self, config: Rl2Config, spec: AgentSpec) -> None:
        size, generator = spec.spaces.observation_size, _generator(spec.seed)
        stage_id = range(size - spec.num_stage_ids, size)
        entries = tuple(range(size)) if config.observation_entries is None else config.observation_entries
        entries = (*(entry for entry in entries if entry not in stage_id), *stage_id)
        if max(entries) >= size:
            raise UserError(
                f"agent.observation_entries holds {max(entries)}; observations have entries 0 to {size - 1}"
            )
        if spec.stage_heads and not config.skip_inputs:
            raise UserError("stage_id head: the head is chosen by the inputs; agent.skip_inputs must be true")
        image = spec.spaces.image
        if image is not None and config.observation_entries is not None:
            raise UserError("agent.observation_entries chooses numbers; these observations are images: leave it out")
        if image is not None and isinstance(config.critic, LinearCriticConfig):
            raise UserError("agent.critic is linear, which cannot fit images; set it to shared or separate")
        self.config, self.device, self.seed, self.iteration = config, spec.device, spec.seed, 0
        self.trial_episodes, head = config.trial_episodes, config.head(spec.spaces)
        self.inputs = Inputs(entries, head, config.input_differences, config.input_time, image is not None)
        self._entries = torch.tensor(entries, device=self.device)
        sizes = self.inputs.size, config.encoder_sizes
        trunk_settings = *sizes, config.memory, config.skip_inputs, config.encoder.build(image), generator
        trunk = Trunk(*trunk_settings)
        raw_inputs = len(entries) - spec.num_stage_ids, len(entries)  # the stage id among the inputs
        begin = trunk.output_size - self.inputs.size  # of the inputs among the features
        chosen_by = slice(*(begin + place for place in raw_inputs)) if spec.stage_heads else None
        self.noise_size = head.noise_size
        policy_head = PolicyHead(trunk.output_size, head, config.state_dependent_std, generator, chosen_by)
        self.policy = Policy(trunk, policy_head).to(self.device)
        self.critic: Critic | None = None
        if isinstance(config.critic, LearnedCriticConfig):
            own = Trunk(*trunk_settings) if config.critic.name == "separate" else None
            self._value_coef = config.critic.loss_coef
            self.critic = Critic(trunk.output_size, config.critic.sizes, own, generator).to(self.device)
        self._optimizer = torch.optim.Adam(self.parameters().values(), lr=config.lr)
        raw = (raw_inputs, 1.0) if image is None else ((0, size), PIXEL_SCALE)
        normalizer = Normalizer.identity(self.inputs.size, config.normalizer_floor, *raw)
        self._use_normalizer(normalizer.to(self.device))

    def parameters(self) -> dict[str, Tensor]:
        """What is trained, by name; what policy and critic share is the policy's."""
        named = {f"policy.{name}": value for name, value in self.policy.named_parameters()}
        if self.critic is not None:
            shared = {id(value) for value in named.values()}
            own = self.critic.named_parameters()
            named |= {f"value.{name}": value for name, value in own if id(value) not in shared}
        return dict(named)

    def _use_normalizer(self, normalizer: Normalizer) -> None:
        self.normalizer = normalizer
        self._shift = normalizer.mean.float()
        self._scale = 1.0 / normalizer.variance.sqrt().clamp_min(normalizer.floor).float()

    def normalize(self, inputs: Tensor) -> Tensor:
        """Shift, scale and cut inputs `[..., I]`; what is not known (NaN) is taken as its mean."""
        return normalized(inputs, self._shift, self._scale)

    # --- acting and adapting -------------------------------------------------------------------------------------

    @torch.inference_mode()
    def initial_state(self, num_tasks: int) -> Rl2State:
        """Return an empty memory for `num_tasks` trials."""
        nothing = torch.zeros(num_tasks, device=self.device)
        sizes = len(self._entries), self.inputs.head.feedback_size
        observations, actions = (nothing[:, None].expand(-1, size) for size in sizes)
        time = torch.zeros(num_tasks, dtype=torch.int64, device=self.device)
        return Rl2State(
            self.policy.trunk.initial(num_tasks), PreviousStep(observations, actions, nothing), time, nothing
        )

    def actor(self) -> Rl2Actor:
        """Return a snapshot that acts, on the CPU; see `AdaptiveActor.actor`."""
        return Rl2Actor(self._step.to_cpu(), self.trial_episodes, self.noise_size)

    def act(self, time_step: TimeStep, noise: Tensor, state: Rl2State) -> tuple[Tensor, Tensor, Rl2State]:
        """Draw actions where the agent learns; see `Rl2Actor.act`."""
        return Rl2Actor(self._step, self.trial_episodes, self.noise_size).act(time_step, noise, state)

    @property
    def _step(self) -> ControlStep:
        """One control step as the agent is now."""
        return ControlStep(self.policy, self.inputs, self._entries, self._shift, self._scale)

    def log_prob(self, state: Rl2State, rollout: Rollout) -> Tensor:
        """Log-density of a trial's actions; see `ProtectedAgent.log_prob`."""
        return self._replay(state, rollout)[0]

    def adapt(self, state: Rl2State, rollout: Rollout, inner_lr: float | None = None) -> Rl2State:
        """Read a task's N rollouts, one after another, as one trial; see `Agent.adapt`."""
        if inner_lr is not None:
            raise ValueError(f"inner_lr is {inner_lr}; an agent that adapts in its memory makes no steps")
        return self._replay(state, rollout.map(lambda part: part.flatten(1, 2)[:, None]))[1]

    @torch.inference_mode()
    def _replay(self, state: Rl2State, rollout: Rollout) -> tuple[Tensor, Rl2State]:
        """Read recorded steps; returns log-densities `[M, N, T]` and the state after them."""
        rewards, log_probs = torch.full_like(rollout.rewards[..., 0], math.nan), torch.zeros_like(rollout.rewards)
        for t in range(rollout.valid.shape[-1]):
            active = rollout.valid[..., t]
            time_step = TimeStep(rollout.observations[..., t, :], rewards, rollout.episode_start[..., t], active)
            distribution, state = read_time_step(self._step, time_step, state)
            actions = rollout.actions[..., t, :].flatten(0, 1).to(self.device)
            log_probs[..., t] = distribution.log_prob(actions).view(active.shape)
            state = self._step.carry_out(state, actions, active_rows(time_step, self.device))
            rewards = torch.where(active, rollout.rewards[..., t], rewards)
        return log_probs, state._replace(reward=rewards.flatten().to(self.device))

    # --- on a robot ----------------------------------------------------------------------------------------------

    def controller(self, state: Rl2State, spaces: Spaces) -> MemoryController:
        """One control step of a trial that begins with what `state` remembers; see `Agent.controller`."""
        return MemoryController(self._step.to_cpu(), self.pack(state)["recall"], spaces)

    def pack(self, state: Rl2State) -> dict[str, Tensor]:
        """The whole state as one tensor; see `Agent.pack`."""
        return {"recall": join_state(*state)}

    def unpack(self, packed: Mapping[str, Tensor]) -> Rl2State:
        """See `Agent.unpack`."""
        empty = self.initial_state(1)
        check_entries(packed, self.pack(empty))
        memory, previous, steps, reward = split_state(packed["recall"].to(self.device), self.inputs)
        return Rl2State(unpack(memory, empty.memory), previous, steps, reward)

    # --- learning ------------------------------------------------------------------------------------------------

    def update(
        self, tasks: Sequence[Task], rollouts: Sequence[Rollout], auxiliary_loss: AuxiliaryLoss | None = None
    ) -> dict[str, float]:
        """Several epochs of PPO on one rollout of trials; see `Agent.update`."""
        (rollout,) = rollouts
        config = self.config
        trials = self._read(rollout)
        batch, metrics = self._prepare(trials, len(rollout.valid))
        metrics |= self._learn(batch, auxiliary_loss)
        if config.normalizer_iterations is None or self.iteration < config.normalizer_iterations:
            self._use_normalizer(self.normalizer.update(trials.inputs[:, :-1], trials.valid))
        self.iteration += 1
        return {f"train/{name}": value for name, value in metrics.items()}

    def _read(self, rollout: Rollout) -> Trials:
        return read_trials(self.inputs, rollout, self.config.success_bonus, self.config.free_episodes)

    @torch.no_grad()
    def _prepare(self, trials: Trials, tasks: int) -> tuple[TrialBatch, dict[str, float]]:
        """Read all trials once: memories at the start of each chunk, and advantages along the trials."""
        config, length = self.config, trials.valid.shape[1]
        steps = min(config.bptt_steps or length, length)
        inputs, valid = self.normalize(trials.inputs), trials.valid
        features, starts = read_memory(self.policy.trunk, inputs, steps)
        states = [starts]
        if self.critic is not None and self.critic.trunk is not None:
            features, starts = read_memory(self.critic.trunk, inputs, steps)
            states.append(starts)
        values, following = self._values(trials, inputs, features, tasks)
        ends = (trials.terminated, trials.last & ~trials.terminated)
        advantages = gae(trials.rewards, values, following, *ends, config.gamma, config.gae_lambda)
        targets = values + advantages
        unexplained = advantages[valid].var() / targets[valid].var().clamp_min(1e-12)
        if self.critic is not None:
            self.critic.rescale(targets[valid])
            targets = self.critic.normalized(targets)
        advantages = normalize_advantages(advantages.reshape(1, -1), valid.reshape(1, -1)).view_as(advantages)
        parts = (inputs[:, :-1], trials.actions, trials.log_probs, advantages, targets, valid.to(inputs.dtype))
        batch = TrialBatch(states, *(chunks(part, steps) for part in parts))
        return batch, {"explained_variance": 1.0 - float(unexplained)}

    def _values(self, trials: Trials, inputs: Tensor, features: Tensor, tasks: int) -> tuple[Tensor, Tensor]:
        """Return the values before and after each step, both `[B, T]`.

        What follows the end of an episode is the next one of the trial. After the last step a critic says what would
        follow if the trial went on; the linear baseline, a function of the time left, says 0.
        """
        if self.critic is not None:
            values = self.critic.values(features)
            return values[:, :-1], values[:, 1:]
        observations = inputs[:, :-1, : len(self._entries)]
        parts = (observations, trials.rewards, trials.last, trials.valid)
        observations, rewards, last, valid = (part.reshape(tasks, -1, *part.shape[1:]) for part in parts)
        previous, after = linear_values(observations, rewards, last, valid, self.config.gamma)
        return previous.flatten(0, 1), after.flatten(0, 1)

    def _learn(self, batch: TrialBatch, auxiliary_loss: AuxiliaryLoss | None) -> dict[str, float]:
        """Take the steps of Adam of one iteration; returns the mean of what was measured before each."""
        config, trained = self.config, self.parameters()
        lr = config.lr * max(LAST_LR, 1.0 - (1.0 - LAST_LR) * self.iteration / (config.lr_decay_iterations or math.inf))
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        measured: list[dict[str, float]] = []
        optimizer_steps = 0
        for part in self._minibatches(batch):
            if not len(part.weights):
                continue  # trials that were all dropped
            loss, metrics = self._loss(part)
            measured.append(dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True)))
            if measured[-1]["kl"] > config.max_kl:
                break
            kept = auxiliary_loss(1.0 / self._num_minibatches(batch)) if auxiliary_loss is not None else None
            if kept is not None:
                loss = loss + kept
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            clip_gradients(trained, config.max_grad_norm, float(loss.detach()), "lower agent.lr")
            self._optimizer.step()
            self.policy.head.keep_within_bounds()
            optimizer_steps += 1
        means = {name: math.fsum(each[name] for each in measured) / len(measured) for name in measured[0]}
        return means | {"lr": lr, "optimizer_steps": float(optimizer_steps)}

    def _minibatches(self, batch: TrialBatch) -> Iterator[TrialBatch]:
        """Shuffle the trials in each epoch and split them as evenly as possible; a trial's chunks stay together."""
        trials = len(batch.weights)
        generator = torch.Generator().manual_seed(integer_seed(self.seed, Purpose.MINIBATCHES, self.iteration))
        for _ in range(self.config.epochs):
            order = torch.randperm(trials, generator=generator).to(self.device)
            for chosen in order.tensor_split(self._num_minibatches(batch)):
                yield batch.select(chosen)

    def _num_minibatches(self, batch: TrialBatch) -> int:
        """As many as configured, at most the number of trials."""
        return min(self.config.minibatches, len(batch.weights))

    def _loss(self, batch: TrialBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return PPO's loss on S chunks, and what it is made of."""
        config = self.config
        features, _ = self.policy.trunk.scan(batch.inputs, batch.states[0])
        distribution = self.policy.head(features)
        weights, old = batch.weights.flatten(), batch.log_probs.flatten()
        log_probs = distribution.log_prob(batch.actions).flatten()
        loss, clipped = ppo_clip_loss(log_probs, old, batch.advantages.flatten(), weights, config.clip_eps)
        entropy = weighted_mean(distribution.entropy().flatten(), weights)
        metrics = {
            "policy_loss": loss,
            "kl": approximate_kl(log_probs, old, weights),
            "clip_fraction": clipped,
            "entropy": entropy,
            **{name: weighted_mean(value.flatten(), weights) for name, value in distribution.metrics().items()},
        }
        loss = loss - config.entropy_coef * entropy
        if config.saturation_coef:
            loss = loss + config.saturation_coef * weighted_mean(distribution.saturation().flatten(), weights)
        if self.critic is not None:
            if self.critic.trunk is not None:
                features, _ = self.critic.trunk.scan(batch.inputs, batch.states[1])
            errors = self.critic(features).flatten() - batch.targets.flatten()
            metrics["value_loss"] = 0.5 * weighted_mean(errors.square(), weights)
            loss = loss + self._value_coef * metrics["value_loss"]
        return loss, {name: value.detach() for name, value in metrics.items()}

    # --- for stability methods ---------------------------------------------------------------------------------------

    def replay_policy(self, rollouts: Sequence[Rollout], advantages: bool = False) -> Prediction:
        """Read recorded trials from their beginning; see `ProtectedAgent.replay_policy`."""
        (rollout,) = rollouts
        shape, trials = rollout.valid.shape, self._read(rollout)
        steps = shape[-1]
        inputs = self.normalize(trials.inputs if advantages else trials.inputs[:, :steps])
        features, _ = self.policy.trunk.scan(inputs, self.policy.trunk.initial(len(inputs)))
        distribution = self.policy.head(features[:, :steps])
        expected = None
        if self.critic is not None:
            if self.critic.trunk is not None:
                features, _ = self.critic.trunk.scan(inputs, self.critic.trunk.initial(len(inputs)))
            expected = self.critic.values(features[:, :steps]).view(shape)
        estimated, scale = None, torch.ones(())
        if self.critic is not None:
            scale = self.critic.scale[1]
        elif advantages:
            scale = return_scale(rollout, self.config.gamma)
        if advantages:
            with torch.no_grad():
                values, following = self._values(trials, inputs, features, len(rollout.valid))
                log_ratios = distribution.log_prob(trials.actions) - trials.log_probs
                ends = (trials.terminated, trials.last & ~trials.terminated)
                estimated = vtrace(trials.rewards, values, following, log_ratios, *ends, self.config.gamma)[1]
        distribution = distribution.map(lambda part: part.view(*shape, -1))
        return Prediction(distribution, expected, None if estimated is None else estimated.view(shape), scale)

    def policy_jacobians(
        self, rollouts: Sequence[Rollout], states: int, generator: torch.Generator
    ) -> Iterator[PolicyJacobian]:
        """Differentiate through all earlier steps of a trial; see `ProtectedAgent.policy_jacobians`."""
        (rollout,) = rollouts
        trials = self._read(rollout)
        inputs = self.normalize(trials.inputs[:, :-1])
        params = {f"policy.{name}": value for name, value in self.policy.named_parameters()}
        used = choose_steps(trials.valid.any(-1), states, generator)
        for i in used.tolist():
            chosen = choose_steps(trials.valid[i], max(1, states // len(used)), generator)
            read = inputs[None, i, : int(chosen[-1]) + 1]
            with plain_kernels():
                features, _ = self.policy.trunk.scan(read, self.policy.trunk.initial(1))
                distribution = self.policy.head(features[0, chosen])
                slopes = {name: jacobian(value, params) for name, value in distribution.parameters().items()}
            yield PolicyJacobian(distribution.map(Tensor.detach), slopes)

    @torch.no_grad()
    def hidden_units(self, rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
        """Activations of encoder and memory; see `ProtectedAgent.hidden_units`."""
        (rollout,) = rollouts
        trials, trunk = self._read(rollout), self.policy.trunk
        inputs = self.normalize(trials.inputs[:, :-1])
        encoded = trunk.encoder(trunk.without_pixels(inputs))
        remembered, _ = trunk.memory.scan(encoded, trunk.initial(len(inputs)))
        units = {"encoder": encoded, "memory": remembered} if self.config.encoder_sizes else {"memory": remembered}
        return {name: value[trials.valid] for name, value in units.items()}

    # --- saving --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that training changes; see `Agent.state_dict`."""
        trained = self.parameters()
        state = {**trained, **optimizer_state(self._optimizer, trained)}
        state |= {f"normalizer.{name}": value for name, value in self.normalizer.state_dict().items()}
        if self.critic is not None:
            state["value.scale"] = self.critic.scale
        state |= {"iteration": torch.tensor(self.iteration), "seed": torch.tensor(self.seed)}
        return {name: value.detach().cpu().contiguous() for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned; raises ValueError naming the entry that is missing or does not fit."""
        check_entries(state, self.state_dict())
        trained = self.parameters()
        load_optimizer_state(self._optimizer, trained, state)
        with torch.no_grad():
            for name, value in trained.items():
                value.copy_(state[name])
        if self.critic is not None:
            self.critic.scale = state["value.scale"].to(self.device)
        self.iteration, self.seed = int(state["iteration"]), int(state["seed"])
        statistics = {name: state[f"normalizer.{name}"] for name in self.normalizer.state_dict()}
        self._use_normalizer(self.normalizer.with_statistics(statistics, self.device))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
