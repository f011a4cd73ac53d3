"""The policy that users hold, of an agent with a memory: predicting, recording and adapting within a trial."""

import numpy as np
import pytest
import torch

import metarl
from metarl.build import build_agent
from metarl.config.schema import RunConfig
from metarl.deploy.policy import Policy
from metarl.errors import UserError
from metarl.evaluation.held_out import evaluate
from metarl.spaces import Spaces
from metarl.types import TimeStep

AGENT = {"name": "rl2", "trial_episodes": 3, "encoder_sizes": [8], "memory": {"name": "gru", "size": 8}}


@pytest.fixture(scope="module")
def policy():
    config = RunConfig.model_validate({"seed": 3, "num_workers": 0, "rollouts_per_task": 2, "agent": AGENT})
    spaces = Spaces(2, (-1.0, -1.0), (1.0, 1.0))
    agent = build_agent(config, spaces, torch.device("cpu"))
    with torch.no_grad():  # away from a mean near 0, as if it had been trained
        for name, value in agent.parameters().items():
            value.copy_(0.5 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
    return Policy(config, agent, spaces, 1234, agent.initial_state(1))


@pytest.fixture(scope="module")
def goals():
    return metarl.envs.distribution("navigation", name="goals", horizon=5, num_train=7, num_test=6)


def walk(policy, observations, rewards, starts, state=None):
    """Predict step by step; returns actions and the last state."""
    actions = []
    for observation, reward, start in zip(observations, rewards, starts, strict=True):
        action, state = policy.predict(observation, state, np.array([start]), deterministic=True, reward=reward)
        actions.append(action)
    return np.array(actions), state


STEPS = np.random.default_rng(0).uniform(-1, 1, (6, 2))
REWARDS = [0.0, -1.0, -0.5, -2.0, -0.3, -0.1]
STARTS = [True, False, False, True, False, False]


def test_predict_remembers_in_the_state_that_it_returns(policy):
    actions, state = walk(policy, STEPS, REWARDS, STARTS)
    again, _ = walk(policy, STEPS, REWARDS, STARTS)
    np.testing.assert_array_equal(actions, again)  # nothing is left in the policy
    begun, between = walk(policy, STEPS[:3], REWARDS[:3], STARTS[:3])
    np.testing.assert_array_equal(begun, actions[:3])
    for _ in range(2):  # a state stays as it is: going on from it twice gives the same
        went_on, _ = walk(policy, STEPS[3:], REWARDS[3:], STARTS[3:], between)
        np.testing.assert_array_equal(went_on, actions[3:])
    forgetful, _ = walk(policy, STEPS[3:], REWARDS[3:], STARTS[3:])
    assert np.abs(forgetful - actions[3:]).max() > 1e-3
    assert actions.dtype == np.float32 and state is not None


def test_what_predict_is_told_matters(policy):
    actions, _ = walk(policy, STEPS, REWARDS, STARTS)
    other_rewards, _ = walk(policy, STEPS, [0.0, 0.0, 0.0, 0.0, 0.0, 0.0], STARTS)
    other_starts, _ = walk(policy, STEPS, REWARDS, [True] + [False] * 5)
    assert np.abs(other_rewards - actions)[1:].max() > 1e-3 and np.abs(other_starts - actions)[3:].max() > 1e-3
    # An unknown reward counts as the average of training: 0 in an agent whose normaliser has seen nothing.
    silent, _ = walk(policy, STEPS, [None] * 6, STARTS)
    np.testing.assert_allclose(silent, other_rewards, atol=1e-6)


def test_predict_takes_a_batch(policy):
    alone, _ = walk(policy, STEPS, REWARDS, STARTS)
    both, state = [], None
    for observation, reward, start in zip(STEPS, REWARDS, STARTS, strict=True):
        batch = np.stack([np.zeros(2), observation])
        action, state = policy.predict(batch, state, np.full(2, start), True, np.array([0.3, reward]))
        both.append(action[1])
    np.testing.assert_allclose(both, alone, atol=1e-6)


def test_adapting_to_a_recorded_trial_leads_to_the_state_that_recording_it_did(policy, goals):
    torch.manual_seed(0)
    env = metarl.envs.make(goals.test_tasks[0])
    state, reward, trajectories = policy.state, np.nan, []
    for _ in range(2):
        trajectory, state = policy._record_episode(env, state, reward)
        reward = float(trajectory.rewards[-1])
        trajectories.append(trajectory)
    torch.manual_seed(0)
    for one, other in zip(trajectories, policy.record(env, 2), strict=True):
        np.testing.assert_array_equal(one.actions, other.actions)
    adapted = policy.adapt(trajectories)
    assert adapted.adapted and not policy.adapted and reward != 0.0
    twice = policy.adapt(trajectories[:1]).adapt(trajectories[1:])
    observation = np.array([0.1, -0.2])
    rewards, start = torch.full((1, 1), reward), torch.ones(1, 1, dtype=torch.bool)
    time_step = TimeStep(torch.from_numpy(observation).float()[None, None], rewards, start, start)
    lived = policy.agent.act(time_step, torch.zeros(1, 1, 2), state)[0][0, 0].clamp(-1.0, 1.0)
    for _ in range(2):
        for reader in (adapted, twice):
            read, _ = reader.predict(observation, deterministic=True)  # the last reward is that of the recording
            np.testing.assert_allclose(read, lived, atol=1e-6)
    assert np.abs(policy.predict(observation, deterministic=True)[0] - read).max() > 1e-3


@pytest.fixture(scope="module")
def report(policy, goals):
    return evaluate(policy, goals.test_tasks, ablate="memory")


def test_the_phases_of_a_trial_are_its_episodes(report):
    assert (report["adaptation_steps"], report["trial_episodes"], report["rollouts_per_task"]) == (0, 3, 2)
    for row in report["tasks"]:
        assert [len(row[field]) for field in ("returns", "success", "untrained_returns", "ablated_returns")] == [3] * 4
    returns = np.array([row["returns"] for row in report["tasks"]])
    for phase, entry in enumerate(report["phases"]):
        assert entry["return"]["mean"] == pytest.approx(returns[:, phase].mean())
    aggregate = report["aggregate"]
    assert aggregate["return_pre"]["mean"] == pytest.approx(returns[:, 0].mean())
    assert aggregate["return_post"]["mean"] == pytest.approx(returns[:, -1].mean())


def test_without_memory_the_first_episode_is_the_same_and_later_ones_are_not(report):
    assert report["ablate"] == "memory"
    for row in report["tasks"]:
        assert row["ablated_returns"][0] == row["returns"][0] and row["ablated_returns"][1:] != row["returns"][1:]
    assert {"ablated_return_gain", "ablated_success_post"} <= report["aggregate"].keys()


def test_without_reward_only_the_first_step_of_a_trial_is_the_same(policy, goals):
    report = evaluate(policy, goals.test_tasks, ablate="reward")
    returns, without = (np.array([row[f"{arm}returns"] for row in report["tasks"]]) for arm in ("", "ablated_"))
    assert (returns != without).all()
    # With the same rewards it acts as before: with one task and one trial the average is that task's own.
    alone = evaluate(policy, goals.test_tasks[:1], ablate="reward", rollouts_per_task=1)["tasks"][0]
    assert alone["ablated_returns"] == pytest.approx(alone["returns"], abs=1e-5)


def test_what_an_agent_does_not_have_cannot_be_asked_for(policy, goals):
    with pytest.raises(UserError, match="rl2 adapts in its memory, within trials of 3 episodes"):
        evaluate(policy, goals.test_tasks, adaptation_steps=2)
    config = RunConfig.model_validate({"agent": {"hidden_sizes": [8]}})
    agent = build_agent(config, policy.spaces, torch.device("cpu"))
    gradient = Policy(config, agent, policy.spaces, 0, agent.initial_state(1))
    with pytest.raises(UserError, match="maml_ppo has no memory"):
        evaluate(gradient, goals.test_tasks, ablate="memory")
