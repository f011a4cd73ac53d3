"""What an agent does on a robot: one control step as a function of tensors alone.

`Policy.predict` runs it, and an exported model is this very function written down: normaliser, network, clipping and
the units of the action space are inside, what is remembered goes in and comes out. Must not import environments or
training.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from torch import Tensor, nn

from metarl.agents.rl2.networks import Policy
from metarl.agents.rl2.trials import Inputs, PreviousStep, normalized
from metarl.nn.action_bounds import ActionBounds
from metarl.nn.memory import State, pack, unpack
from metarl.types import FloatArray


class MemoryController(nn.Module):
    """The controller of an agent with a memory; a snapshot on the CPU.

    All that it remembers is one vector `[S]` a trial, and zeros begin a trial:

        memory | last observation O' | last action A | last reward | steps of the episode | reward not told yet | begun

    Rewards that were not told are NaN, in it as in what goes in.

    Args:
        policy: trunk and head.
        inputs: what the memory is told.
        entries: of an observation, which the agent sees.
        shift: `[I]`, of inputs.
        scale: `[I]`.
        initial: the packed state `[1, S − 1]` where a trial begins, which is not empty where episodes have been read.
        observation_size: O.
        low: `[A]`, of the action space.
        high: `[A]`.

    Attributes:
        state_size: S.
        reward_scale: mean and standard deviation by which it normalises rewards.
        observation_scale: the same of observations, `[O]`; 0 and 1 for entries that it does not see.
    """

    def __init__(
        self,
        policy: Policy,
        inputs: Inputs,
        entries: Tensor,
        shift: Tensor,
        scale: Tensor,
        initial: Tensor,
        observation_size: int,
        low: FloatArray,
        high: FloatArray,
    ) -> None:
        super().__init__()
        self._policy = copy.deepcopy(policy).cpu().requires_grad_(False).eval()
        self._inputs, self._like = inputs, self._policy.trunk.initial(1)
        self._bounds = ActionBounds(low, high)
        self._entries: Tensor
        self._shift: Tensor
        self._scale: Tensor
        self._initial: Tensor
        for name, value in (("entries", entries), ("shift", shift), ("scale", scale), ("initial", initial)):
            self.register_buffer(f"_{name}", value.detach().cpu().clone())
        self.state_size = initial.shape[1] + 1
        mean, deviation = np.zeros(observation_size), np.ones(observation_size)
        seen, count = self._entries.numpy(), len(inputs.entries)
        mean[seen], deviation[seen] = self._shift[:count].numpy(), 1.0 / self._scale[:count].numpy()
        self.observation_scale = mean, deviation
        reward = count + inputs.action_size  # its place among the inputs
        self.reward_scale: dict[str, float] | None = {"mean": float(shift[reward]), "std": float(1.0 / scale[reward])}

    def forward(
        self,
        observations: Tensor,
        rewards: Tensor,
        episode_start: Tensor,
        state: Tensor,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return actions `[B, A]`, in the units of the action space, and the next state `[B, S]`.

        Args:
            observations: `[B, O]`, raw.
            rewards: `[B]`, of the last step; NaN: not known. Not read where a trial begins: it would be of another one.
            episode_start: `[B]`, bool; where a trial begins an episode does.
            state: `[B, S]`, what the last step returned; zeros where a trial begins.
            noise: `[B, A]` or `[1, A]`, standard normal; None or zeros: the mean.
        """
        begun = state[:, -1:] > 0
        packed, previous, steps, told = split(torch.where(begun, state[:, :-1], self._initial), self._inputs)
        start = episode_start | ~begun[:, 0]
        time = torch.where(start, 0, steps)
        rewards = torch.where(begun[:, 0] & ~rewards.isnan(), rewards, told)
        now = observations[:, self._entries]
        inputs = normalized(self._inputs(now, previous, rewards, start, time), self._shift, self._scale)
        features, memory = self._policy.trunk.step(inputs, unpack(packed, self._like, fixed=True))
        mean, log_std = self._policy.head(features)
        drawn = mean if noise is None else mean + log_std.exp() * noise
        after = joined(
            memory, PreviousStep(now, drawn.clamp(-1.0, 1.0), rewards), time + 1, torch.full_like(rewards, math.nan)
        )
        return self._bounds(drawn), torch.cat([after, torch.ones_like(after[:, :1])], -1)


def joined(memory: State, previous: PreviousStep, steps: Tensor, told: Tensor) -> Tensor:
    """Put what is known of B trials into one tensor `[B, S − 1]`.

    Args:
        memory: of B sequences.
        previous: what there was one step ago.
        steps: `[B]`, of the episode so far.
        told: `[B]`, the last reward where it is known and has not been told yet, else NaN.
    """
    rest = previous.observations, previous.actions, *(part[:, None] for part in (previous.rewards, steps, told))
    return torch.cat([pack(memory), *rest], -1)


def split(joint: Tensor, inputs: Inputs) -> tuple[Tensor, PreviousStep, Tensor, Tensor]:
    """Undo `joined`; the memory stays packed."""
    sizes = len(inputs.entries), inputs.action_size, 1, 1, 1
    parts = torch.split(joint, [joint.shape[1] - sum(sizes), *sizes], -1)
    packed, observations, actions, rewards, steps, told = parts
    return packed, PreviousStep(observations, actions, rewards[:, 0]), steps[:, 0].long(), told[:, 0]
