"""Returns, advantages and the linear baseline, worked out by hand; `.` marks the last step of an episode."""

import numpy as np
import pytest
import torch

from metarl.rl.returns import discounted_returns, gae, linear_baseline, normalize_advantages, vtrace


def bools(*values):
    return torch.tensor(values, dtype=torch.bool)


def test_discounted_returns_by_hand():
    # γ = 0.5:  1 + 0.5·(2 + 0.5·4) = 3,  2 + 0.5·4 = 4,  4.
    returns = discounted_returns(torch.tensor([1.0, 2.0, 4.0]), bools(0, 0, 1), 0.5)
    torch.testing.assert_close(returns, torch.tensor([3.0, 4.0, 4.0]))


def test_an_episode_end_in_the_middle_cuts_the_returns():
    # 1 2. | 4 8.   γ = 0.5:  1 + 0.5·2 = 2,  2,  4 + 0.5·8 = 8,  8; without the cut the second would be 2 + 0.5·8 = 6.
    returns = discounted_returns(torch.tensor([1.0, 2.0, 4.0, 8.0]), bools(0, 1, 0, 1), 0.5)
    torch.testing.assert_close(returns, torch.tensor([2.0, 2.0, 8.0, 8.0]))


def test_leading_dimensions_are_apart():
    rewards = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    last = torch.tensor([[False, True], [True, True]])
    torch.testing.assert_close(discounted_returns(rewards, last, 0.5), torch.tensor([[2.0, 2.0], [10.0, 20.0]]))


REWARDS = torch.tensor([1.0, 2.0])
VALUES = torch.tensor([3.0, 4.0])
NEXT_VALUES = torch.tensor([4.0, 10.0])


@pytest.mark.parametrize(
    ("terminated", "expected"),
    [
        # γ = 0.5, λ = 0.5. δ_0 = 1 + 0.5·4 − 3 = 0.
        # Termination: δ_1 = 2 − 4 = −2;             A = [0 + 0.25·(−2), −2] = [−0.5, −2].
        (True, [-0.5, -2.0]),
        # Truncation:  δ_1 = 2 + 0.5·10 − 4 = 3;     A = [0 + 0.25·3, 3]     = [0.75, 3].
        (False, [0.75, 3.0]),
    ],
)
def test_gae_bootstraps_after_truncation_and_not_after_termination(terminated, expected):
    ends = bools(0, terminated), bools(0, not terminated)
    torch.testing.assert_close(gae(REWARDS, VALUES, NEXT_VALUES, *ends, 0.5, 0.5), torch.tensor(expected))


@pytest.mark.parametrize("cut", ["terminated", "truncated"])
def test_an_episode_end_in_the_middle_cuts_the_trace(cut):
    # 1 2. | 5.  The second episode's δ = 5 − 7 = −2 must not reach the first, whichever way that one ended.
    terminated = bools(0, cut == "terminated", 1)
    truncated = bools(0, cut == "truncated", 0)
    rewards, values, next_values = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([3.0, 4.0, 7.0]), torch.zeros(3)
    next_values[:2] = NEXT_VALUES
    expected = [-0.5, -2.0, -2.0] if cut == "terminated" else [0.75, 3.0, -2.0]
    advantages = gae(rewards, values, next_values, terminated, truncated, 0.5, 0.5)
    torch.testing.assert_close(advantages, torch.tensor(expected))


@pytest.fixture
def episodes():
    """Two episodes end to end, one terminated and one truncated, with values that fit together."""
    generator = torch.Generator().manual_seed(0)
    rewards, values, final = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (8, 8, 1))
    next_values = torch.cat([values[1:], final])
    next_values[3] = torch.randn((), generator=generator, dtype=torch.float64)
    terminated, truncated = bools(0, 0, 0, 1, 0, 0, 0, 0), bools(0, 0, 0, 0, 0, 0, 0, 1)
    return rewards, values, next_values, terminated, truncated


def test_lambda_0_gives_temporal_differences(episodes):
    rewards, values, next_values, *_ = episodes
    expected = rewards + 0.9 * next_values - values
    expected[3] = rewards[3] - values[3]
    torch.testing.assert_close(gae(*episodes, 0.9, 0.0), expected)


def test_lambda_1_gives_monte_carlo_returns(episodes):
    # Σ_l γ^l δ_{t+l} telescopes to Σ_l γ^l r_{t+l} + γ^n V(last observation) − V(s_t), without V after the termination.
    rewards, values, next_values, terminated, truncated = episodes
    bootstrapped = rewards.clone()
    bootstrapped[7] += 0.9 * next_values[7]
    expected = discounted_returns(bootstrapped, terminated | truncated, 0.9) - values
    torch.testing.assert_close(gae(*episodes, 0.9, 1.0), expected)


# V-trace


def test_vtrace_by_hand():
    """γ = ½, both clips at 1: ratios ½, 2 → 1, ¼, 4 → 1 and ½; step 1 terminates, step 4 is truncated at a value of 8.

    δ = ρ (r + γ V' − V), V' = 0 behind a termination:
        δ₀ = ½ (1 + ½ · 2 − 4) = −1      δ₁ = 1 (3 + 0 − 2) = 1
        δ₂ = ¼ (2 + ½ · 6 − 1) = 1       δ₃ = 1 (1 + ½ · 2 − 6) = −4      δ₄ = ½ (4 + ½ · 8 − 2) = 3
    v − V = δ + γ ρ (v' − V'), nothing beyond an end:
        4: 3    3: −4 + ½ · 3 = −2.5    2: 1 + ½ · ¼ · (−2.5) = 0.6875    1: 1    0: −1 + ½ · ½ · 1 = −0.75
    A = ρ (r + γ v' − V):
        0: ½ (1 + ½ · 3 − 4) = −0.75             1: 1 (3 − 2) = 1
        2: ¼ (2 + ½ · 3.5 − 1) = 0.6875          3: 1 (1 + ½ · 5 − 6) = −2.5     4: ½ (4 + ½ · 8 − 2) = 3
    """
    rewards = torch.tensor([1.0, 3.0, 2.0, 1.0, 4.0])
    values = torch.tensor([4.0, 2.0, 1.0, 6.0, 2.0])
    next_values = torch.tensor([2.0, 99.0, 6.0, 2.0, 8.0])
    log_ratios = torch.tensor([0.5, 2.0, 0.25, 4.0, 0.5]).log()
    ends = bools(0, 1, 0, 0, 0), bools(0, 0, 0, 0, 1)
    targets, advantages = vtrace(rewards, values, next_values, log_ratios, *ends, 0.5)
    torch.testing.assert_close(targets, values + torch.tensor([-0.75, 1.0, 0.6875, -2.5, 3.0]))
    torch.testing.assert_close(advantages, torch.tensor([-0.75, 1.0, 0.6875, -2.5, 3.0]))
    both = [torch.stack([part, part]) for part in (rewards, values, next_values, log_ratios, *ends)]
    torch.testing.assert_close(vtrace(*both, 0.5)[0], torch.stack([targets, targets]))


def test_vtrace_on_policy_gives_bootstrapped_returns():
    """ρ = 1: v_t = r_t + γ v_{t+1}, 0 behind a termination and V' behind a truncation; A = v − V.

    γ = ½: step 2 is truncated at 4: 1 + ½ · 4 = 3; 2 + ½ · 3 = 3.5; 0 + ½ · 3.5 = 1.75. Then 6 + ½ · 2 = 7; 2.
    """
    rewards = torch.tensor([0.0, 2.0, 1.0, 6.0, 2.0])
    values = torch.tensor([5.0, -1.0, 2.0, 3.0, 7.0])
    next_values = torch.tensor([-1.0, 2.0, 4.0, 7.0, 50.0])
    ends = bools(0, 0, 0, 0, 1), bools(0, 0, 1, 0, 0)
    targets, advantages = vtrace(rewards, values, next_values, torch.zeros(5), *ends, 0.5)
    torch.testing.assert_close(targets, torch.tensor([1.75, 3.5, 3.0, 7.0, 2.0]))
    torch.testing.assert_close(advantages, targets - values)
    expected = gae(rewards, values, next_values, *ends, 0.5, 1.0)
    torch.testing.assert_close(advantages, expected)


def test_vtrace_of_actions_that_are_not_taken_any_more_changes_nothing():
    """ρ = 0: the targets are the values, and no gradient comes from there; an end counts from either side."""
    rewards, values = torch.tensor([5.0, 5.0]), torch.tensor([1.0, 2.0])
    targets, advantages = vtrace(
        rewards, values, torch.tensor([2.0, 0.0]), torch.full((2,), -200.0), bools(0, 1), bools(0, 0), 0.9
    )
    torch.testing.assert_close(targets, values)
    torch.testing.assert_close(advantages, torch.zeros(2))


def baseline_data(tasks=2, samples=60):
    generator = torch.Generator().manual_seed(1)
    observations = torch.randn(tasks, samples, 2, generator=generator, dtype=torch.float64)
    time = torch.arange(samples).expand(tasks, samples) % 20
    return observations, time, torch.ones(tasks, samples, dtype=torch.bool)


def in_span(observations, time):
    """2·o₀ − 3·o₁² + 0.5·t − 0.01·t² + 0.001·t³ + 7 : every kind of feature."""
    o, t = observations, time.double()
    return 2 * o[..., 0] - 3 * o[..., 1] ** 2 + 0.5 * t - 0.01 * t**2 + 0.001 * t**3 + 7


def test_the_baseline_recovers_what_its_features_span():
    observations, time, valid = baseline_data()
    returns = in_span(observations, time)
    values = linear_baseline(observations, returns, time, valid, ridge=0.0)
    torch.testing.assert_close(values, returns, atol=1e-5, rtol=1e-5)
    outside = linear_baseline(observations, torch.sin(9 * observations[..., 0]), time, valid, ridge=0.0)
    assert (outside - torch.sin(9 * observations[..., 0])).abs().max() > 0.1


@pytest.mark.parametrize("length", [100, 1000, 5000])
def test_the_baseline_of_a_long_trial_still_sees_the_observations(length):
    # t³ of a trial of 5,000 steps must not make the ridge so large that it shrinks the other coefficients to nothing.
    generator = torch.Generator().manual_seed(0)
    observations = torch.randn(1, length, 3, generator=generator)
    targets = 3.0 + observations @ torch.tensor([1.0, -2.0, 0.5])
    valid = torch.ones(1, length, dtype=torch.bool)
    values = linear_baseline(observations, targets, torch.arange(length)[None], valid)
    torch.testing.assert_close(values, targets, rtol=0, atol=2e-3)


def test_the_baseline_ignores_invalid_samples():
    observations, time, valid = baseline_data()
    returns = in_span(observations, time)
    valid[:, 40:] = False
    clean = linear_baseline(observations, returns, time, valid)
    returns[:, 40:], observations[:, 40:] = 1e3, -5.0
    torch.testing.assert_close(linear_baseline(observations, returns, time, valid), clean, rtol=0, atol=0)
    assert (clean[:, 40:] == 0).all()
    alone = linear_baseline(observations[:, :40], returns[:, :40], time[:, :40], valid[:, :40])
    torch.testing.assert_close(clean[:, :40], alone)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_the_baseline_of_a_large_observation_in_several_threads(threads):
    """214 features, as of Ant: batched LU failed there, in several threads. numpy solves the same equations."""
    generator = torch.Generator().manual_seed(0)
    observations, returns = torch.randn(4, 60, 105, generator=generator), torch.randn(4, 60, generator=generator)
    time = torch.arange(60).expand(4, 60)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        values = linear_baseline(observations, returns, time, torch.ones(4, 60, dtype=torch.bool))
    finally:
        torch.set_num_threads(before)
    for task in range(4):
        o, t = observations[task].double().numpy(), time[task].double().numpy()[:, None] / 100.0
        features = np.concatenate([o, o * o, t, t**2, t**3, np.ones_like(t)], -1)
        gram = features.T @ features
        gram += (1e-5 * gram.diagonal().mean() + 1e-12) * np.eye(len(gram))
        expected = features @ np.linalg.solve(gram, features.T @ returns[task].double().numpy())
        np.testing.assert_allclose(values[task].numpy(), expected, atol=1e-5)


def test_the_baseline_fits_each_task_by_itself():
    observations, time, valid = baseline_data()
    returns = in_span(observations, time)
    before = linear_baseline(observations, returns, time, valid)
    returns[1] = -100.0 * returns[1]
    after = linear_baseline(observations, returns, time, valid)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    torch.testing.assert_close(after[1], -100.0 * before[1], rtol=1e-8, atol=1e-8)


def test_the_baseline_has_a_solution_without_data():
    observations, time, valid = baseline_data()
    values = linear_baseline(observations, in_span(observations, time), time, valid & False)
    assert (values == 0).all()


def test_advantages_are_divided_by_the_standard_deviation():
    # [1, 3, 8]: mean 4, deviations −3 −1 4, variance (9 + 1 + 16)/3 = 26/3, not the divisor.
    normalized = normalize_advantages(torch.tensor([[1.0, 3.0, 8.0]]), torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(normalized, torch.tensor([[-3.0, -1.0, 4.0]]) / (26 / 3) ** 0.5, rtol=1e-4, atol=0)


def test_advantages_are_normalised_within_a_task_over_valid_samples():
    # Task 0: [0, 2] → ∓1. Task 1: [10, 30, 50] → ∓20 / √(800/3), which task 0 alone would not give.
    advantages = torch.tensor([[0.0, 2.0, 99.0], [10.0, 30.0, 50.0]])
    valid = torch.tensor([[True, True, False], [True, True, True]])
    scale = 20 / (800 / 3) ** 0.5
    expected = torch.tensor([[-1.0, 1.0, 0.0], [-scale, 0.0, scale]])
    torch.testing.assert_close(normalize_advantages(advantages, valid), expected, rtol=1e-4, atol=0)


def test_constant_advantages_become_0():
    valid = torch.tensor([[True, True, True, False], [False] * 4])
    normalized = normalize_advantages(torch.full((2, 4), 5.0), valid)
    torch.testing.assert_close(normalized, torch.zeros(2, 4))
