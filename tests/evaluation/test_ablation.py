"""Controls for agents with a memory, with a scripted agent whose every input is written down."""

import torch

from metarl.evaluation.ablation import WithoutMemory, WithoutReward, average_rewards
from metarl.types import Rollout, TimeStep

NAN = float("nan")


class Scripted:
    """Its memory is the list of rewards that it read in this trial."""

    device, trial_episodes, adaptation_steps = torch.device("cpu"), 2, 0
    adapts_by, noise_size = "memory", 1

    def initial_state(self, num_tasks):
        return ()

    def act(self, time_step, noise, state):
        state = (*state, time_step.rewards.flatten().tolist())
        return noise, time_step.rewards, state


def live(agent, rewards, starts):
    """Pass rewards to two rollouts of a task; returns the memory after each step."""
    state, memories = agent.initial_state(1), []
    for reward, start in zip(rewards, starts, strict=True):
        flags = torch.full((1, 2), start)
        time_step = TimeStep(torch.zeros(1, 2, 3), torch.tensor([reward]), flags, torch.ones_like(flags))
        state = agent.act(time_step, torch.zeros(1, 2, 1), state)[2]
        memories.append(getattr(state, "state", state))
    return memories


REWARDS = [[0.0, 0.0], [1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
STARTS = [True, False, True, False]


def test_without_memory_each_episode_is_a_first_one():
    assert live(Scripted(), REWARDS, STARTS)[-1] == tuple(REWARDS)
    memories = live(WithoutMemory(Scripted()), REWARDS, STARTS)
    assert str(memories[1]) == "([nan, nan], [1.0, 2.0])"
    # The second episode begins with nothing, not even with the last reward of the first.
    assert str(memories[2]) == "([nan, nan],)" and str(memories[3]) == "([nan, nan], [5.0, 6.0])"


def test_without_reward_the_average_task_is_told():
    # Steps pay 10 and 20 in the first episode, 30 and 40 in the second: the agent reads the last ones.
    agent = WithoutReward(Scripted(), torch.tensor([[10.0, 20.0], [30.0, 40.0]]))
    for _ in range(2):  # also a second time
        first, *others = live(agent, REWARDS, STARTS)[-1]
        assert str(first) == "[nan, nan]" and others == [[10.0] * 2, [20.0] * 2, [30.0] * 2]


def test_an_episode_may_last_longer_than_any_that_rewards_are_known_of():
    agent = WithoutReward(Scripted(), torch.tensor([[10.0, 20.0]]))
    memory = live(agent, [[0.0, 0.0]] * 5, [True, False, False, False, False])[-1]
    assert [reward for reward, _ in memory[1:]] == [10.0, 20.0, 20.0, 20.0]


def test_rewards_are_averaged_over_tasks_and_trials_step_by_step():
    # Two trials of two episodes; the second one's episodes are shorter. Steps of the same (episode, time) are averaged:
    # (1 + 5) / 2, 2, (3 + 7) / 2 and 4. A second rollout adds 8 to (0, 0): (1 + 5 + 8) / 3, and a trial of its own.
    start = torch.tensor([[True, False, True, False], [True, True, False, False]])
    valid = torch.tensor([[True, True, True, True], [True, True, False, False]])
    rewards = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 7.0, 100.0, 100.0]])

    def rollout(rewards, start, valid):
        shape = (1, *rewards.shape)
        nothing = torch.zeros(shape)
        flags = nothing.bool()
        vector = torch.zeros(*shape, 1)
        return Rollout(vector, vector, vector, rewards[None], nothing, flags, flags, start[None], valid[None], nothing)

    first = rollout(rewards, start, valid)
    torch.testing.assert_close(average_rewards([first]), torch.tensor([[3.0, 2.0], [5.0, 4.0]]))
    second = rollout(torch.tensor([[8.0, 9.0]]), torch.tensor([[True, True]]), torch.tensor([[True, True]]))
    expected = torch.tensor([[14.0 / 3.0, 2.0], [19.0 / 3.0, 4.0]])
    torch.testing.assert_close(average_rewards([first, second]), expected)
    # Where no trial has such a step, the mean of the step before goes on.
    only = rollout(rewards[1:], start[1:], valid[1:])
    longer = rollout(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[True, False, True]]), torch.ones(1, 3).bool())
    torch.testing.assert_close(average_rewards([only, longer]), torch.tensor([[3.0, 2.0], [5.0, 5.0]]))
