"""RL²: PPO over whole trials of a policy with a memory, which adapts by what it remembers (Duan et al. 2016).

A trial is several episodes of one task; the memory lives through it and begins anew with the next. One update:

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
from typing import NamedTuple

import torch
from torch import Tensor

from metarl.agents.rl2.config import Rl2Config
from metarl.agents.rl2.controller import MemoryController, joined, split
from metarl.agents.rl2.networks import Critic, GaussianHead, LearnedCriticConfig, Policy, Trunk
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
from metarl.nn.distributions import gaussian_log_prob
from metarl.nn.jacobians import choose_steps, jacobian, plain_kernels
from metarl.nn.memory import State, rows, unpack
from metarl.nn.normalizer import Normalizer
from metarl.nn.optimizer_state import check_entries, clip_gradients, load_optimizer_state, optimizer_state
from metarl.protocols import AuxiliaryLoss
from metarl.rl.returns import gae, normalize_advantages, return_scale, vtrace
from metarl.rl.surrogates import approximate_kl, ppo_clip_loss, saturation, weighted_mean
from metarl.rl.value import linear_values
from metarl.seeding import Purpose, integer_seed
from metarl.types import FloatArray, PolicyJacobian, Prediction, Rollout, TimeStep

LAST_LR = 0.1
"""What the learning rate falls to, a fraction of what it was at first."""

_UNIT_ENTROPY = 0.5 * math.log(2.0 * math.pi * math.e)
"""Of a Gaussian in one dimension with standard deviation 1."""


class Rl2State(NamedTuple):
    """What the agent knows of B trials in progress: its adaptation state."""

    memory: State
    previous: PreviousStep
    time: Tensor  # [B], integers, the step of the episode; −1 before the first
    reward: Tensor  # [B], of the last step, where it is known and has not been told yet; else NaN; 0 before the first


class Rl2:
    """An `Agent` that adapts in its memory.

    Args:
        config: its settings.
        observation_size: O.
        action_size: A.
        device: where it acts and learns.
        seed: of the initial parameters and of the order of minibatches.
        cues: see `metarl.agents.build`; the agent always sees them.
        heads: see there.

    Raises:
        UserError: `observation_entries` names one that the observation does not have, or heads have no cue.
    """

    adaptation_steps = training_adaptation_steps = 0

    def __init__(
        self,
        config: Rl2Config,
        observation_size: int,
        action_size: int,
        device: torch.device,
        seed: int,
        cues: int = 0,
        heads: bool = False,
    ) -> None:
        told = range(observation_size - cues, observation_size)
        entries = tuple(range(observation_size)) if config.observation_entries is None else config.observation_entries
        entries = (*(entry for entry in entries if entry not in told), *told)
        if max(entries) >= observation_size:
            raise UserError(
                f"agent.observation_entries holds {max(entries)}; observations have entries 0 to {observation_size - 1}"
            )
        self.config, self.device, self.seed, self.iteration = config, device, seed, 0
        self.trial_episodes = config.trial_episodes
        self.observation_size, self.action_size = observation_size, action_size
        self.inputs = Inputs(entries, action_size, config.input_differences, config.input_time)
        self._entries = torch.tensor(entries, device=device)
        generator = torch.Generator().manual_seed(seed)
        trunk_settings = self.inputs.size, config.encoder_sizes, config.memory, config.skip_inputs, generator
        trunk = Trunk(*trunk_settings)
        std = (config.init_std, config.min_std, config.max_std)
        if heads and not config.skip_inputs:
            raise UserError("stage_id head: the head is chosen by the inputs; agent.skip_inputs must be true")
        told_inputs = len(entries) - cues, len(entries)
        begin = trunk.output_size - self.inputs.size  # of the inputs among the features
        cue = slice(*(begin + place for place in told_inputs)) if heads else None
        head = GaussianHead(trunk.output_size, action_size, std, config.state_dependent_std, generator, cue)
        self.policy = Policy(trunk, head).to(device)
        self.critic: Critic | None = None
        if isinstance(config.critic, LearnedCriticConfig):
            own = None
            if config.critic.name == "separate":
                own = Trunk(*trunk_settings)
            self._value_coef = config.critic.loss_coef
            self.critic = Critic(trunk.output_size, config.critic.sizes, own, generator).to(device)
        self._optimizer = torch.optim.Adam(self.parameters().values(), lr=config.lr)
        self._use_normalizer(Normalizer.identity(self.inputs.size, config.normalizer_floor, told_inputs).to(device))

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
        """A memory that holds nothing, for `num_tasks` trials."""
        nothing = torch.zeros(num_tasks, device=self.device)
        observations, actions = (nothing[:, None].expand(-1, size) for size in (len(self._entries), self.action_size))
        time = torch.full((num_tasks,), -1, device=self.device)
        return Rl2State(
            self.policy.trunk.initial(num_tasks), PreviousStep(observations, actions, nothing), time, nothing
        )

    @torch.inference_mode()
    def act(self, time_step: TimeStep, noise: Tensor, state: Rl2State) -> tuple[Tensor, Tensor, Rl2State]:
        """Draw actions; see `Agent.act`. A state of M trials stands for all P of a task."""
        tasks, parallel = time_step.rewards.shape
        mean, log_std, perceived = self._perceive(time_step, state)
        drawn = mean + log_std.exp() * noise.flatten(0, 1).to(self.device)
        log_probs = gaussian_log_prob(mean, log_std, drawn)
        actions = drawn.view(tasks, parallel, -1).cpu()
        return actions, log_probs.view(tasks, parallel).cpu(), self._carried_out(time_step, drawn, perceived)

    def _perceive(self, time_step: TimeStep, state: Rl2State) -> tuple[Tensor, Tensor, Rl2State]:
        """Read a time step into B = M · P memories; returns mean and log deviation `[B, A]`, and what is known."""
        batch = time_step.rewards.numel()
        if len(state.time) != batch:
            if len(state.time) != len(time_step.rewards):
                raise ValueError(
                    f"the state is of {len(state.time)} trials, the time_step of {time_step.rewards.shape}"
                )
            each = torch.arange(len(state.time), device=self.device).repeat_interleave(batch // len(state.time))
            memory, previous, *rest = state
            state = Rl2State(
                rows(memory, each), PreviousStep(*(part[each] for part in previous)), *(part[each] for part in rest)
            )
        now = time_step.observations.flatten(0, 1).to(self.device)[:, self._entries]
        rewards, start = (part.reshape(-1).to(self.device) for part in (time_step.rewards, time_step.episode_start))
        rewards = torch.where(rewards.isnan(), state.reward, rewards)
        active = None if bool(time_step.active.all()) else time_step.active.reshape(-1).to(self.device)
        time = (state.time + 1).masked_fill(start, 0)
        inputs = self.normalize(self.inputs(now, state.previous, rewards, start, time))
        features, memory = self.policy.trunk.step(inputs, state.memory, active)
        previous = PreviousStep(now, state.previous.actions, rewards)
        if active is not None:
            previous = PreviousStep(
                torch.where(active[:, None], now, state.previous.observations),
                state.previous.actions,
                torch.where(active, rewards, state.previous.rewards),
            )
            time = torch.where(active, time, state.time)
        mean, log_std = self.policy.head(features)
        return mean, log_std, Rl2State(memory, previous, time, torch.full_like(rewards, math.nan))

    def _carried_out(self, time_step: TimeStep, actions: Tensor, state: Rl2State) -> Rl2State:
        """What is known after actions `[B, A]`."""
        actions = actions.clamp(-1.0, 1.0)
        if not bool(time_step.active.all()):
            active = time_step.active.reshape(-1, 1).to(self.device)
            actions = torch.where(active, actions, state.previous.actions)
        return state._replace(previous=state.previous._replace(actions=actions))

    def log_prob(self, state: Rl2State, rollout: Rollout) -> Tensor:
        """Log-density of a trial's actions; see `Agent.log_prob`."""
        return self._replay(state, rollout)[0]

    def adapt(self, state: Rl2State, rollout: Rollout, inner_lr: float | None = None) -> Rl2State:
        """Remember a task's N rollouts, one after another, as one trial; see `Agent.adapt`."""
        if inner_lr is not None:
            raise ValueError(f"inner_lr is {inner_lr}; an agent that adapts in its memory makes no steps")
        return self._replay(state, rollout.map(lambda part: part.flatten(1, 2)[:, None]))[1]

    @torch.inference_mode()
    def _replay(self, state: Rl2State, rollout: Rollout) -> tuple[Tensor, Rl2State]:
        """Live through recorded steps; returns log-densities `[M, N, T]` and what is known then."""
        rewards, log_probs = torch.full_like(rollout.rewards[..., 0], math.nan), torch.zeros_like(rollout.rewards)
        for t in range(rollout.valid.shape[-1]):
            active = rollout.valid[..., t]
            time_step = TimeStep(rollout.observations[..., t, :], rewards, rollout.episode_start[..., t], active)
            mean, log_std, state = self._perceive(time_step, state)
            actions = rollout.actions[..., t, :].flatten(0, 1).to(self.device)
            log_probs[..., t] = gaussian_log_prob(mean, log_std, actions).view(active.shape)
            state = self._carried_out(time_step, actions, state)
            rewards = torch.where(active, rollout.rewards[..., t], rewards)
        return log_probs, state._replace(reward=rewards.flatten().to(self.device))

    # --- on a robot ----------------------------------------------------------------------------------------------

    def controller(self, state: Rl2State, low: FloatArray, high: FloatArray) -> MemoryController:
        """One control step of a trial that begins with what `state` remembers; see `Agent.controller`."""
        initial = self.pack(state)["recall"]
        parts = self.inputs, self._entries, self._shift, self._scale, initial, self.observation_size
        return MemoryController(self.policy, *parts, low, high)

    def pack(self, state: Rl2State) -> dict[str, Tensor]:
        """All that is known as one tensor; see `Agent.pack`."""
        memory, previous, time, reward = state
        return {"recall": joined(memory, previous, time + 1, reward)}

    def unpack(self, packed: Mapping[str, Tensor]) -> Rl2State:
        """See `Agent.unpack`."""
        empty = self.initial_state(1)
        check_entries(packed, self.pack(empty))
        memory, previous, steps, reward = split(packed["recall"].to(self.device), self.inputs)
        return Rl2State(unpack(memory, empty.memory), previous, steps - 1, reward)

    # --- learning ------------------------------------------------------------------------------------------------

    def update(self, rollouts: Sequence[Rollout], auxiliary_loss: AuxiliaryLoss | None = None) -> dict[str, float]:
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
        """Split the trials anew in each epoch, as evenly as they go; a trial's chunks stay together."""
        trials = len(batch.weights)
        generator = torch.Generator().manual_seed(integer_seed(self.seed, Purpose.MINIBATCHES, self.iteration))
        for _ in range(self.config.epochs):
            order = torch.randperm(trials, generator=generator).to(self.device)
            for chosen in order.tensor_split(self._num_minibatches(batch)):
                yield batch.of(chosen)

    def _num_minibatches(self, batch: TrialBatch) -> int:
        """As many as were asked for, if there are as many trials."""
        return min(self.config.minibatches, len(batch.weights))

    def _loss(self, batch: TrialBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return PPO's loss on S chunks, and what it is made of."""
        config = self.config
        features, _ = self.policy.trunk.scan(batch.inputs, batch.states[0])
        mean, log_std = self.policy.head(features)
        weights, old = batch.weights.flatten(), batch.log_probs.flatten()
        log_probs = gaussian_log_prob(mean, log_std, batch.actions).flatten()
        loss, clipped = ppo_clip_loss(log_probs, old, batch.advantages.flatten(), weights, config.clip_eps)
        entropy = weighted_mean((log_std + _UNIT_ENTROPY).sum(-1).flatten(), weights)
        metrics = {
            "policy_loss": loss,
            "kl": approximate_kl(log_probs, old, weights),
            "clip_fraction": clipped,
            "entropy": entropy,
            "std": weighted_mean(log_std.exp().mean(-1).flatten(), weights),
        }
        loss = loss - config.entropy_coef * entropy
        if config.saturation_coef:
            loss = loss + config.saturation_coef * saturation(mean.flatten(0, 1), weights)
        if self.critic is not None:
            if self.critic.trunk is not None:
                features, _ = self.critic.trunk.scan(batch.inputs, batch.states[1])
            errors = self.critic(features).flatten() - batch.targets.flatten()
            metrics["value_loss"] = 0.5 * weighted_mean(errors.square(), weights)
            loss = loss + self._value_coef * metrics["value_loss"]
        return loss, {name: value.detach() for name, value in metrics.items()}

    # --- what guards earlier stages asks ---------------------------------------------------------------------------

    def replay_policy(self, rollouts: Sequence[Rollout], advantages: bool = False) -> Prediction:
        """Read recorded trials from their beginning; see `Agent.replay_policy`."""
        (rollout,) = rollouts
        shape, trials = rollout.valid.shape, self._read(rollout)
        steps = shape[-1]
        inputs = self.normalize(trials.inputs if advantages else trials.inputs[:, :steps])
        features, _ = self.policy.trunk.scan(inputs, self.policy.trunk.initial(len(inputs)))
        mean, log_std = self.policy.head(features[:, :steps])
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
                log_ratios = gaussian_log_prob(mean, log_std, trials.actions) - trials.log_probs
                ends = (trials.terminated, trials.last & ~trials.terminated)
                estimated = vtrace(trials.rewards, values, following, log_ratios, *ends, self.config.gamma)[1]
        mean, log_std = mean.view(*shape, -1), log_std.view(*shape, -1)
        return Prediction(mean, log_std, expected, None if estimated is None else estimated.view(shape), scale)

    def policy_jacobians(
        self, rollouts: Sequence[Rollout], states: int, generator: torch.Generator
    ) -> Iterator[PolicyJacobian]:
        """Differentiate through all earlier steps of a trial; see `Agent.policy_jacobians`."""
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
                mean, log_std = self.policy.head(features[0, chosen])
                slopes = jacobian(mean, params), jacobian(log_std, params)
            yield PolicyJacobian(mean.detach(), log_std.detach(), *slopes)

    @torch.no_grad()
    def hidden_units(self, rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
        """Activations of encoder and memory; see `Agent.hidden_units`."""
        (rollout,) = rollouts
        trials, trunk = self._read(rollout), self.policy.trunk
        inputs = self.normalize(trials.inputs[:, :-1])
        encoded = trunk.encoder(inputs)
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
