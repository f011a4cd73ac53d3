"""What a deployed policy does is what the agent does: step by step, at every memory, from any state."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from metarl.nn.memory import History, pack, unpack
from metarl.spaces import Spaces
from metarl.types import TimeStep
from tests.agents.deployed import AGENTS, SPACES, make_episodes, make_policy, make_trials, walk, zero

every_agent = pytest.mark.parametrize("name", AGENTS)
every_memory = pytest.mark.parametrize("name", ["gru", "lstm", "transformer", "episodic"])


def acted(policy, trials):
    """What `Agent.act` does in the same trials, in the units of the action space, clipped: `[T, B, A]`."""
    low, high = SPACES.action_bounds
    state, actions = policy.state, []
    for observation, reward, start in zip(*map(torch.from_numpy, trials), strict=True):
        shape = (1, len(observation))
        time_step = TimeStep(observation[None], reward[None], start[None], torch.ones(shape, dtype=torch.bool))
        drawn, _, state = policy.agent.act(time_step, torch.zeros(*shape, SPACES.action_size), state)
        actions.append((high + low) / 2 + (high - low) / 2 * np.clip(drawn[0].numpy(), -1.0, 1.0))
    return np.stack(actions)


@every_agent
def test_predicting_is_acting(name):
    policy, trials = make_policy(name), make_trials()
    actions, state = walk(policy, trials)
    low, high = SPACES.action_bounds
    np.testing.assert_allclose(actions, acted(policy, trials), atol=2e-6)
    assert actions.dtype == np.float32 and (actions >= low).all() and (actions <= high).all()
    assert np.ptp(actions, 0).max() > 0.1, "actions that hardly differ would agree in any case"
    assert (state is None) == (not policy.has_memory)


@every_agent
def test_predicting_is_acting_after_adapting(name):
    policy, trials = make_policy(name), make_trials(seed=1)
    adapted = policy.adapt(make_episodes())
    actions, _ = walk(adapted, trials)
    np.testing.assert_allclose(actions, acted(adapted, trials), atol=2e-6)
    assert np.abs(actions - walk(policy, trials)[0]).max() > 1e-3


@every_memory
def test_zeros_begin_a_trial_and_rows_are_on_their_own(name):
    policy, trials = make_policy(name), make_trials()
    whole, state = walk(policy, trials)
    assert state.shape == policy.reset(4).shape == (4, policy.controller.state_size) and not policy.reset(4).any()
    again, _ = walk(policy, trials, policy.reset(4))
    np.testing.assert_array_equal(again, whole)
    # Two rows begin anew while two live on; what a row does depends on its own state alone.
    mixed = np.where(np.array([True, False, True, False])[:, None], policy.reset(4), state)
    both, _ = walk(policy, trials, mixed)
    lived_on, _ = walk(policy, trials, state)
    np.testing.assert_allclose(both[:, [0, 2]], whole[:, [0, 2]], atol=1e-6)
    np.testing.assert_allclose(both[:, [1, 3]], lived_on[:, [1, 3]], atol=1e-6)
    assert np.abs(lived_on - whole)[:, [1, 3]].max() > 1e-3
    single, _ = walk(policy, trials, None, rows=slice(2, 3))
    np.testing.assert_allclose(single, whole[:, 2:3], atol=1e-5)


@every_memory
def test_where_a_trial_begins_an_episode_does(name):
    policy, (observations, rewards, starts) = make_policy(name), make_trials()
    actions, _ = walk(policy, (observations, rewards, starts))
    starts = starts.copy()
    starts[0] = False
    np.testing.assert_array_equal(walk(policy, (observations, rewards, starts))[0], actions)
    starts[4] = False  # but the start of the second episode is an input
    assert np.abs(walk(policy, (observations, rewards, starts))[0] - actions)[4:].max() > 1e-4


@every_memory
def test_a_reward_is_not_read_where_a_trial_begins(name):
    policy, (observations, rewards, starts) = make_policy(name), make_trials()
    expected, _ = walk(policy, (observations, rewards, starts))
    rewards = rewards.copy()
    rewards[0] = 7.0  # of another trial
    np.testing.assert_array_equal(walk(policy, (observations, rewards, starts))[0], expected)
    rewards[1] = 7.0
    assert np.abs(walk(policy, (observations, rewards, starts))[0] - expected)[1:].max() > 1e-4


@every_agent
def test_actions_lie_within_bounds_of_double_precision(name):
    low, high = (-0.1, 0.3), (0.1, 0.7)  # float32 rounds 0.1 up, and 0.7 down
    policy = make_policy(name, Spaces(3, low, high))
    torch.manual_seed(0)  # of the draws, enough of them to reach the bounds
    actions = np.concatenate([policy.predict(make_trials(seed=seed)[0][0])[0] for seed in range(200)])
    actions = actions.astype(np.float64)
    assert (actions >= low).all() and (actions <= high).all()
    np.testing.assert_allclose(actions.max(0), high, rtol=1e-6)  # and reach them


@every_agent
def test_a_mean_of_zero_is_the_middle_of_the_range_and_noise_is_in_units_of_its_deviation(name):
    policy = zero(make_policy(name))
    observations = make_trials()[0][0]
    actions, _ = policy.predict(observations, deterministic=True)
    np.testing.assert_array_equal(actions, np.float32([[-0.5, 0.25]] * 4))  # ((-2 + 1) / 2, (0 + 0.5) / 2)
    torch.manual_seed(0)
    drawn, _ = policy.predict(observations)
    torch.manual_seed(0)
    # σ is 1/2: a quarter of the range a unit of noise, clipped at the bounds
    expected = np.float32([-0.5, 0.25]) + np.float32([0.75, 0.125]) * torch.randn(4, 2).numpy()
    np.testing.assert_allclose(drawn, np.clip(expected, [-2, 0], [1, 0.5]), atol=1e-6)


@every_agent
def test_a_controller_is_a_snapshot(name):
    policy, trials = make_policy(name), make_trials()
    before, _ = walk(policy, trials)
    with torch.no_grad():
        for value in policy.agent.parameters().values():
            value.zero_()
    np.testing.assert_array_equal(walk(policy, trials)[0], before)
    assert np.abs(walk(replace(policy), trials)[0] - before).max() > 1e-2


@every_memory
def test_an_action_that_is_no_number_is_not_returned(name):
    policy = make_policy(name)
    _, state = policy.predict(np.zeros(3))
    state[:, :-1] = np.nan
    with pytest.raises(ValueError, match="the action is not finite"):
        policy.predict(np.zeros(3), state)


@every_memory
def test_a_packed_state_is_the_same_memory(name):
    agent = make_policy(name).agent
    trunk, generator = agent.policy.trunk, torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 9, agent.inputs.size, generator=generator)
    state = trunk.initial(3)
    with torch.no_grad():
        for t in range(7):
            _, state = trunk.step(inputs[:, t], state)
        packed = pack(state)
        expected, _ = trunk.step(inputs[:, 7], state)
        for fixed in (False, True):
            restored = unpack(packed, trunk.initial(1), fixed)
            torch.testing.assert_close(pack(restored), packed, rtol=0, atol=0)
            features, after = trunk.step(inputs[:, 7], restored)
            torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)
            torch.testing.assert_close(trunk.step(inputs[:, 8], after)[0].shape, expected.shape)
            for part in after:
                assert not isinstance(part, History) or not fixed or part.keys.shape[1] == part.context


@every_memory
def test_the_scale_of_rewards_is_told(name):
    policy = make_policy(name)
    scale, entries = policy.controller.reward_scale, len(policy.agent.inputs.entries)
    where = entries + SPACES.action_size
    assert scale["mean"] == pytest.approx(float(policy.agent.normalizer.mean[where]), rel=1e-6)
    assert scale["std"] == pytest.approx(float(policy.agent.normalizer.variance[where].sqrt()), rel=1e-6)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"observation": {"x": 1.0}}, r"observation has the parts \['x'\]; expected an array"),
        ({"observation": ["0", "1", "2"]}, "observation has dtype <U1; expected numbers"),
        ({"observation": np.zeros(4)}, r"observation has shape \(4,\); expected \(3,\) or \(batch, 3\)"),
        ({"observation": np.zeros((1, 2, 3))}, r"observation has shape \(1, 2, 3\)"),
        ({"observation": np.array([0.0, np.nan, 0.0])}, "observation contains NaN or infinity"),
        ({"observation": np.array([0.0, 1e300, 0.0])}, "observation contains NaN or infinity"),  # beyond float32
        ({"reward": np.inf}, "reward is infinite"),
        ({"reward": np.zeros(2)}, r"reward has shape \(2,\); expected one value for each of 1 observation"),
        ({"episode_start": np.zeros(2, bool)}, r"episode_start has shape \(2,\)"),
        ({"state": np.zeros((1, 3), np.float32)}, r"state has shape \(1, 3\); expected \(1, "),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_bad_input_is_told_in_a_line(inputs, message):
    with pytest.raises(ValueError, match=message):
        make_policy("gru").predict(**{"observation": np.zeros(3), **inputs})
