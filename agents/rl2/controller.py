"""The controller of an agent with a memory: what `Policy.predict` runs and an ONNX file holds.

Normaliser, network, clipping and the units of the action space are inside; the hidden state goes in and comes out.
Must not import environments or training.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from metarl.agents.rl2.control_step import ControlStep, Rl2State, join_state, split_state
from metarl.nn.action_units import ActionUnits
from metarl.nn.memory import unpack
from metarl.spaces import Spaces


class MemoryController(nn.Module):
    """The controller of an agent with a memory; a snapshot on the CPU.

    Its state is one vector `[S]` for each trial, and zeros begin a trial:

        memory | last observation O' | last action A' | last reward | steps of the episode | reward not yet read | begun

    Unknown rewards are NaN, in the state as in the inputs.

    Args:
        step: one control step, on the CPU.
        initial: the state `[1, S − 1]` where a trial begins, which is not empty where episodes have been read.
        spaces: of the environment.

    Attributes:
        state_size: S.
        reward_scale: mean and standard deviation by which it normalises rewards.
        observation_scale: the same for observations, `[O]`; 0 and 1 for entries that it does not see.
    """

    def __init__(self, step: ControlStep, initial: Tensor, spaces: Spaces) -> None:
        super().__init__()
        self._policy, self._inputs = step.policy, step.inputs
        self._like = self._policy.trunk.initial(1)
        self._units = ActionUnits(spaces)
        self._entries: Tensor
        self._shift: Tensor
        self._scale: Tensor
        self._initial: Tensor
        buffers = {"entries": step.entries, "shift": step.shift, "scale": step.scale, "initial": initial}
        for name, value in buffers.items():
            self.register_buffer(f"_{name}", value.detach().cpu().clone())
        self.state_size = initial.shape[1] + 1
        mean, deviation = np.zeros(spaces.observation_size), np.ones(spaces.observation_size)
        seen, count = self._entries.numpy(), len(step.inputs.entries)
        mean[seen], deviation[seen] = self._shift[:count].numpy(), 1.0 / self._scale[:count].numpy()
        self.observation_scale = mean, deviation
        reward = count + step.inputs.head.feedback_size  # its place among the inputs
        self.reward_scale: dict[str, float] | None = {
            "mean": float(step.shift[reward]),
            "std": float(1.0 / step.scale[reward]),
        }

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
            noise: `[B, noise_size]` or `[1, noise_size]`, standard normal; None or zeros: the mode.
        """
        begun = state[:, -1:] > 0
        packed, previous, steps, reward = split_state(torch.where(begun, state[:, :-1], self._initial), self._inputs)
        before = Rl2State(unpack(packed, self._like, fixed=True), previous, steps, reward)
        start = episode_start | ~begun[:, 0]
        rewards = torch.where(begun[:, 0], rewards, math.nan)
        step = ControlStep(self._policy, self._inputs, self._entries, self._shift, self._scale)
        distribution, after = step.read(before, observations, rewards, start)
        drawn = distribution.mode if noise is None else distribution.sample(noise)
        joint = join_state(*step.carry_out(after, drawn))
        return self._units(drawn), torch.cat([joint, torch.ones_like(joint[:, :1])], -1)
