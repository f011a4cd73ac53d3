"""One control step of an agent with a memory: what it reads, remembers and does, as a function of tensors alone.

Training, `Policy.predict` and an exported ONNX file run this one function. Learning reads whole trials at once
(`trials.py`): the same inputs and networks, scanned instead of stepped.

Must not import environments, training or tracking.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from metarl.agents.rl2.networks import Policy
from metarl.agents.rl2.trials import Inputs, PreviousStep, normalized
from metarl.nn.distributions import Distribution
from metarl.nn.memory import State, pack, rows
from metarl.types import TimeStep


class Rl2State(NamedTuple):
    """The hidden state of B trials in progress: the agent's adaptation state."""

    memory: State
    previous: PreviousStep
    time: Tensor  # [B], integers, steps of the episode so far
    reward: Tensor  # [B], the last reward where it is known and not yet read; else NaN; 0 before the first step

    def select(self, index: Tensor) -> Rl2State:
        """Return the state of some trials, in the order of `index` `[B']`; one may be named several times."""
        previous = PreviousStep(*(part[index] for part in self.previous))
        return Rl2State(rows(self.memory, index), previous, self.time[index], self.reward[index])


class ControlStep(NamedTuple):
    """What a control step is made of.

    Attributes:
        policy: trunk and head.
        inputs: what the memory reads.
        entries: `[O']`, entries of an observation that the agent sees.
        shift: `[I]`, of inputs.
        scale: `[I]`.
    """

    policy: Policy
    inputs: Inputs
    entries: Tensor
    shift: Tensor
    scale: Tensor

    def read(
        self, state: Rl2State, observations: Tensor, rewards: Tensor, start: Tensor, active: Tensor | None = None
    ) -> tuple[Distribution, Rl2State]:
        """Read one step of B trials; returns the distribution of actions and the state before they are chosen.

        Args:
            state: of B trials.
            observations: `[B, O]`, raw.
            rewards: `[B]`, of the last step; NaN where unknown: there the one that `state` holds is read.
            start: `[B]`, bool: an episode begins.
            active: `[B]`, bool: elsewhere the state stays as it is; None: everywhere.
        """
        now = observations[:, self.entries].float()
        rewards = torch.where(rewards.isnan(), state.reward, rewards)
        time = torch.where(start, 0, state.time)
        inputs = normalized(self.inputs(now, state.previous, rewards, start, time), self.shift, self.scale)
        features, memory = self.policy.trunk.step(inputs, state.memory, active)
        previous, steps = PreviousStep(now, state.previous.actions, rewards), time + 1
        if active is not None:
            previous = PreviousStep(
                torch.where(active[:, None], now, state.previous.observations),
                state.previous.actions,
                torch.where(active, rewards, state.previous.rewards),
            )
            steps = torch.where(active, steps, state.time)
        return self.policy.head(features), Rl2State(memory, previous, steps, torch.full_like(rewards, math.nan))

    def carry_out(self, state: Rl2State, actions: Tensor, active: Tensor | None = None) -> Rl2State:
        """Return the state after actions `[B, A]`, as the memory will read them."""
        feedback = self.inputs.head.feedback(actions)
        if active is not None:
            feedback = torch.where(active[:, None], feedback, state.previous.actions)
        return state._replace(previous=state.previous._replace(actions=feedback))

    def to_cpu(self) -> ControlStep:
        """Return a snapshot on the CPU."""
        tensors = (part.detach().cpu().clone() for part in (self.entries, self.shift, self.scale))
        return ControlStep(self.policy.snapshot(), self.inputs, *tensors)


class Rl2Actor(NamedTuple):
    """An `Actor` with a memory.

    Attributes:
        step: one control step.
        trial_episodes: L.
        noise_size: numbers of noise that an action takes.
    """

    step: ControlStep
    trial_episodes: int
    noise_size: int

    @torch.inference_mode()
    def act(self, time_step: TimeStep, noise: Tensor, state: Rl2State) -> tuple[Tensor, Tensor, Rl2State]:
        """Draw actions; see `Actor.act`. A state of M trials applies to all P trials of a task."""
        tasks, parallel = time_step.rewards.shape
        distribution, state = read_time_step(self.step, time_step, state)
        actions = distribution.sample(noise.flatten(0, 1).to(self.step.shift.device))
        log_probs = distribution.log_prob(actions)
        after = self.step.carry_out(state, actions, active_rows(time_step, actions.device))
        return actions.view(tasks, parallel, -1).cpu(), log_probs.view(tasks, parallel).cpu(), after


def active_rows(time_step: TimeStep, device: torch.device) -> Tensor | None:
    """Return which of the B = M · P rollouts are active, `[B]`; None if all are."""
    return None if bool(time_step.active.all()) else time_step.active.reshape(-1).to(device)


def read_time_step(step: ControlStep, time_step: TimeStep, state: Rl2State) -> tuple[Distribution, Rl2State]:
    """Read a time step into B = M · P trials; see `ControlStep.read`."""
    batch, device = time_step.rewards.numel(), step.shift.device
    if len(state.time) != batch:
        if len(state.time) != len(time_step.rewards):
            raise ValueError(f"the state has {len(state.time)} trials, the time step {tuple(time_step.rewards.shape)}")
        each = torch.arange(len(state.time), device=device).repeat_interleave(batch // len(state.time))
        state = state.select(each)
    observations = time_step.observations.flatten(0, 1).to(device)
    rewards, start = (part.reshape(-1).to(device) for part in (time_step.rewards, time_step.episode_start))
    return step.read(state, observations, rewards, start, active_rows(time_step, device))


def join_state(memory: State, previous: PreviousStep, steps: Tensor, reward: Tensor) -> Tensor:
    """Put the state of B trials into one tensor `[B, S − 1]`.

    Args:
        memory: of B sequences.
        previous: observations, actions and rewards one step ago.
        steps: `[B]`, of the episode so far.
        reward: `[B]`, the last reward where it is known and not yet read, else NaN.
    """
    rest = previous.observations, previous.actions, *(part[:, None] for part in (previous.rewards, steps, reward))
    return torch.cat([pack(memory), *rest], -1)


def split_state(joint: Tensor, inputs: Inputs) -> tuple[Tensor, PreviousStep, Tensor, Tensor]:
    """Undo `join_state`; the memory stays packed."""
    sizes = len(inputs.entries), inputs.head.feedback_size, 1, 1, 1
    parts = torch.split(joint, [joint.shape[1] - sum(sizes), *sizes], -1)
    packed, observations, actions, rewards, steps, reward = parts
    return packed, PreviousStep(observations, actions, rewards[:, 0]), steps[:, 0].long(), reward[:, 0]
