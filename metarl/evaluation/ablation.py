"""Ablations of agents with a memory: no memory of earlier episodes, or no information from rewards.

Each ablation is an `AdaptiveActor` that wraps an agent and changes its inputs. The agent is not retrained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from metarl.protocols import Actor, AdaptiveActor
from metarl.rl.returns import time_in_episode
from metarl.types import Rollout, TimeStep

Ablation: TypeAlias = Literal["memory", "reward"]
"""`memory`: the memory is reset at each episode; `reward`: the agent reads the rewards of the average task."""


def ablated(agent: AdaptiveActor, ablation: Ablation, rollouts: Sequence[Rollout]) -> AdaptiveActor:
    """Return the agent without its memory or its rewards.

    Args:
        agent: an agent with a memory.
        ablation: the part to remove.
        rollouts: rollouts of the unablated agent on the same tasks, to average rewards over.
    """
    return WithoutMemory(agent) if ablation == "memory" else WithoutReward(agent, average_rewards(rollouts))


class WithoutMemory:
    """The agent with its memory reset at each episode of a trial, as if it were the first one.

    Args:
        agent: the agent to ablate.
    """

    def __init__(self, agent: AdaptiveActor) -> None:
        self._agent = agent
        self.device, self.adapts_by, self.adaptation_steps = agent.device, agent.adapts_by, 0
        self.trial_episodes, self.noise_size = agent.trial_episodes, agent.noise_size

    def actor(self) -> Actor:
        """See `AdaptiveActor.actor`."""
        return WithoutMemory(self._agent)

    def initial_state(self, num_tasks: int) -> Any:
        """See `AdaptiveActor.initial_state`."""
        return self._agent.initial_state(num_tasks)

    def act(self, time_step: TimeStep, noise: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        """See `AdaptiveActor.act`; all rollouts start their episodes together."""
        if bool(time_step.episode_start.all()):
            state = self._agent.initial_state(len(time_step.rewards))
            time_step = time_step._replace(rewards=torch.full_like(time_step.rewards, math.nan))
        return self._agent.act(time_step, noise, state)

    def adapt(self, state: Any, rollout: Rollout) -> Any:
        """See `AdaptiveActor.adapt`."""
        return self._agent.adapt(state, rollout)


class _Counted(NamedTuple):
    """The agent's state, and the next episode and step."""

    state: Any
    episode: int = -1
    time: int = 0


class WithoutReward:
    """The agent with the reward of the average task at each step of a trial.

    A constant reward would be out of the agent's distribution. The average is within it and carries no information
    about the task.

    Args:
        agent: the agent to ablate.
        rewards: `[L, H]`, the reward of each step of each episode of a trial; beyond H the last one is repeated.
    """

    def __init__(self, agent: AdaptiveActor, rewards: Tensor) -> None:
        self._agent, self._rewards = agent, rewards
        self.device, self.adapts_by, self.adaptation_steps = agent.device, agent.adapts_by, 0
        self.trial_episodes, self.noise_size = agent.trial_episodes, agent.noise_size

    def actor(self) -> Actor:
        """See `AdaptiveActor.actor`."""
        return WithoutReward(self._agent, self._rewards)

    def initial_state(self, num_tasks: int) -> Any:
        """See `AdaptiveActor.initial_state`."""
        return _Counted(self._agent.initial_state(num_tasks))

    def act(self, time_step: TimeStep, noise: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        """See `AdaptiveActor.act`; all rollouts start their episodes together."""
        starts = bool(time_step.episode_start.all())
        episode, time = (state.episode + 1, 0) if starts else (state.episode, state.time)
        last = min(time, self._rewards.shape[1]) - 1  # episodes may last longer than those of the unablated agent
        reward = self._rewards[episode, last] if time else self._rewards[episode - 1, -1] if episode else math.nan
        time_step = time_step._replace(rewards=torch.full_like(time_step.rewards, float(reward)))
        actions, log_probs, after = self._agent.act(time_step, noise, state.state)
        return actions, log_probs, _Counted(after, episode, time + 1)

    def adapt(self, state: Any, rollout: Rollout) -> Any:
        """See `AdaptiveActor.adapt`."""
        return state._replace(state=self._agent.adapt(state.state, rollout))


def average_rewards(rollouts: Sequence[Rollout]) -> Tensor:
    """Return the mean reward at each step of each episode of a trial, over all tasks and trials, `[L, H]`.

    After the end of all episodes, the mean of the last step is repeated.

    Args:
        rollouts: rollouts of trials of L episodes, each of any number of tasks.
    """
    parts = []
    for rollout in rollouts:
        time, valid = time_in_episode(rollout.episode_start), rollout.valid
        parts.append(torch.stack([rollout.episode[valid], time[valid], rollout.rewards[valid]]).cpu())
    episode, time, rewards = torch.cat(parts, 1)
    shape = int(episode.max()) + 1, int(time.max()) + 1
    where = episode.long() * shape[1] + time.long()
    totals = torch.zeros(shape).view(-1).index_add(0, where, rewards)
    counts = torch.zeros(shape).view(-1).index_add(0, where, torch.ones_like(rewards))
    means = (totals / counts).view(shape)
    for step in range(1, shape[1]):
        means[:, step] = torch.where(means[:, step].isnan(), means[:, step - 1], means[:, step])
    return means
