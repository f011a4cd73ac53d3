"""Trials as a memory reads them: its inputs at each step, and how a batch of trials is cut into chunks (BPTT).

Pure functions. Must not import environments, training or tracking.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from metarl.nn.distributions import ActionHead
from metarl.nn.memory import Memory, State, join, rows
from metarl.rl.returns import time_in_episode
from metarl.types import Rollout


class Inputs(NamedTuple):
    """Inputs of a memory: observation, last action, last reward, whether an episode begins (Duan et al. 2016, 3).

    Attributes:
        entries: of the observation, O' of them.
        head: what makes actions, and of them what the memory reads.
        differences: whether the changes of observation and reward since the last step are inputs, too; a step changes
            little, so that they hardly show in the values themselves.
        time: whether the step of the episode is an input.
        image: whether the entries are pixels, whose changes are no inputs.
    """

    entries: tuple[int, ...]
    head: ActionHead
    differences: bool
    time: bool
    image: bool = False

    @property
    def size(self) -> int:
        """I, of which the first O' are the observation."""
        changes = self.differences and not self.image
        return len(self.entries) * (1 + changes) + self.head.feedback_size + 2 + self.differences + self.time

    def __call__(self, now: Tensor, previous: PreviousStep, rewards: Tensor, start: Tensor, time: Tensor) -> Tensor:
        """Put the inputs `[..., I]` together.

        Args:
            now: `[..., O']`, observations.
            previous: of one step ago.
            rewards: `[...]`, of the last step.
            start: `[...]`, bool: an episode begins.
            time: `[...]`, integers: the step of the episode, from 0.
        """
        parts = [now, previous.actions, rewards[..., None], start[..., None].to(now.dtype)]
        if self.differences:  # there is none at an episode's first step, and none of rewards at its second
            if not self.image:
                parts.append(torch.where((time >= 1)[..., None], now - previous.observations, 0.0))
            parts.append(torch.where(time >= 2, rewards - previous.rewards, 0.0)[..., None])
        if self.time:
            parts.append(time[..., None].to(now.dtype) / 100.0)
        return torch.cat(parts, -1)


class PreviousStep(NamedTuple):
    """What an agent knew one step ago; zeros where a trial begins."""

    observations: Tensor  # [..., O']
    actions: Tensor  # [..., A'], what the memory reads of them: within ±1, or choices one-hot
    rewards: Tensor  # [...], the last reward then


INPUT_BOUND = 10.0
"""Inputs are cut at this many standard deviations: the first contact of a run must not blow up a memory."""


def normalized(inputs: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shift, scale and cut inputs `[..., I]`; an unknown input (NaN) is replaced by its mean."""
    return ((inputs - shift) * scale).nan_to_num(0.0).clamp(-INPUT_BOUND, INPUT_BOUND)


class Trials(NamedTuple):
    """B trials of up to T steps, their episodes end to end; step T is what follows a trial's last action."""

    inputs: Tensor  # [B, T + 1, I]; the entry behind a trial's last step is what would be read next
    actions: Tensor  # [B, T, A]
    log_probs: Tensor  # [B, T], of the policy that acted
    rewards: Tensor  # [B, T], of the objective
    valid: Tensor  # [B, T], bool
    last: Tensor  # [B, T], bool: the last step of the trial
    terminated: Tensor  # [B, T], bool: the trial's last step ended its last episode by itself


def read_trials(inputs: Inputs, rollout: Rollout, success_bonus: float, free_episodes: int) -> Trials:
    """Lay rollouts `[M, N, T]` out as B = M · N trials.

    Args:
        inputs: of the memory.
        rollout: trials.
        success_bonus: added to the reward of a solved step in the objective; the memory reads the plain reward.
        free_episodes: number of first episodes whose rewards carry no weight in the objective, so that exploring in
            them costs nothing (Stadie et al. 2018, "E-RL²").
    """
    objective = rollout.rewards + success_bonus * rollout.success.nan_to_num()
    objective = objective * (rollout.episode >= free_episodes)
    rollout, objective = rollout.map(lambda part: part.flatten(0, 1)), objective.flatten(0, 1)
    valid = rollout.valid
    last = valid & ~F.pad(valid[:, 1:], (0, 1))
    entries = list(inputs.entries)
    now = _one_longer(rollout.observations[..., entries].float())
    ends = F.pad(last, (1, 0))  # one step behind the last
    final_episode = rollout.episode[last]
    now[ends] = rollout.final_observations[last.nonzero(as_tuple=True)[0], final_episode][:, entries].float()
    rewards, start = F.pad(rollout.rewards, (1, 0)), F.pad(rollout.episode_start, (0, 1))
    actions = _one_longer(inputs.head.feedback(rollout.actions)).roll(1, 1)
    previous = PreviousStep(_one_longer(now[:, :-1]).roll(1, 1), actions, F.pad(rewards[:, :-1], (1, 0)))
    return Trials(
        inputs(now, previous, rewards, start, time_in_episode(start)),
        rollout.actions,
        rollout.log_probs,
        objective * valid,
        valid,
        last,
        rollout.terminated & last,
    )


def _one_longer(part: Tensor) -> Tensor:
    """Append a step of zeros to `[B, T, ...]`."""
    return F.pad(part, (0, 0, 0, 1))


def chunks(part: Tensor, steps: int) -> Tensor:
    """Cut `[B, T, ...]` into `[B, ⌈T / steps⌉, steps, ...]`: every step once, in order, with zeros behind the last."""
    missing = -part.shape[1] % steps
    padded = F.pad(part, (0, 0) * (part.ndim - 2) + (0, missing))
    return padded.reshape(len(part), -1, steps, *part.shape[2:])


class TrialBatch(NamedTuple):
    """B trials of n chunks of C steps; a minibatch: S chunks."""

    states: list[State]  # of the policy's trunk and, if it has one, the critic's; rows: chunk by chunk all trials
    inputs: Tensor  # [B, n, C, I] or [S, C, I], normalised
    actions: Tensor  # [..., C, A]
    log_probs: Tensor  # [..., C]
    advantages: Tensor  # [..., C]
    targets: Tensor  # [..., C], of the value function, normalised
    weights: Tensor  # [..., C], 1 for a valid step, else 0

    def select(self, trials: Tensor) -> TrialBatch:
        """Return the chunks of some trials, those without any step left out."""
        place, chunk = self.weights[trials].any(-1).nonzero(as_tuple=True)  # once: a GPU is waited for here
        trial = trials[place]
        states, *parts = self
        row = chunk * len(self.weights) + trial
        return TrialBatch([rows(state, row) for state in states], *(part[trial, chunk] for part in parts))


def read_memory(trunk: Memory, inputs: Tensor, steps: int) -> tuple[Tensor, State]:
    """Read trials `[B, T + 1, I]`; returns features `[B, T + 1, F]` and the memories where chunks of T start."""
    state, starts, features = trunk.initial(len(inputs)), [], []
    for begin in range(0, inputs.shape[1], steps):
        if begin < inputs.shape[1] - 1:
            starts.append(state)
        part, state = trunk.scan(inputs[:, begin : begin + steps], state)
        features.append(part)
    return torch.cat(features, 1), join(starts)
