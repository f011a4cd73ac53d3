"""Surrogate losses by hand: values, first and second derivatives."""

import math

import pytest
import torch

from metarl.nn.distributions import DiagonalGaussian
from metarl.rl.surrogates import approximate_kl, likelihood_ratio_loss, ppo_clip_loss, weighted_mean


def bernoulli(theta, actions):
    """log π(a) with π(1) = sigmoid(θ): d/dθ = a − p, d²/dθ² = −p(1 − p)."""
    return actions * theta - torch.nn.functional.softplus(theta)


@pytest.fixture
def samples():
    actions = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    advantages = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    return actions, advantages


def test_likelihood_ratio_value_and_derivatives(samples):
    actions, advantages = samples
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    log_probs = bernoulli(theta, actions)
    loss = likelihood_ratio_loss(log_probs, log_probs.detach(), advantages, torch.ones(3))
    # At ratio 1 the value is −mean A = −(2 − 1 + 0.5)/3 = −0.5.
    torch.testing.assert_close(loss, torch.tensor(-0.5, dtype=torch.float64))
    # The gradient is the policy gradient, −mean (a − p)·A.
    (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
    p = torch.sigmoid(theta.detach())
    torch.testing.assert_close(gradient.detach(), -((actions - p) * advantages).mean())
    # Second derivative: −mean (∇² log π + ∇ log π²)·A; a loss of −log π · A has the first term alone.
    (curvature,) = torch.autograd.grad(gradient, theta)
    expected = -((-p * (1 - p) + (actions - p) ** 2) * advantages).mean()
    torch.testing.assert_close(curvature, expected)
    assert (curvature - (p * (1 - p) * advantages).mean()).abs() > 0.01


def test_likelihood_ratio_away_from_the_collecting_policy():
    # π/π_old = 0.5/0.25 = 2 and 0.5/0.5 = 1, A = 3, 1: −(2·3 + 1·1)/2 = −3.5.
    log_probs, old = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.5]).log()
    loss = likelihood_ratio_loss(log_probs, old, torch.tensor([3.0, 1.0]), torch.ones(2))
    torch.testing.assert_close(loss, torch.tensor(-3.5))


def losses(log_probs, old, advantages, weights):
    yield likelihood_ratio_loss(log_probs, old, advantages, weights)
    yield ppo_clip_loss(log_probs, old, advantages, weights, 0.2)[0]
    yield ppo_clip_loss(log_probs, old, advantages, weights, 0.2)[1]
    yield approximate_kl(log_probs, old, weights)


def test_every_loss_is_a_mean_over_its_own_samples():
    """Neither another task nor padding changes a task's loss, nor its gradient."""
    generator = torch.Generator().manual_seed(0)
    log_probs, old, advantages = (torch.randn(4, generator=generator, dtype=torch.float64) for _ in range(3))
    data = (log_probs, old, advantages, torch.ones(4, dtype=torch.float64))
    filling = zip(data, (9.0, -9.0, 9.0, 0.0), strict=True)
    padded = [torch.cat([part, torch.full((3,), fill, dtype=torch.float64)]) for part, fill in filling]
    stacked = [torch.stack([part, torch.randn(7, generator=generator, dtype=torch.float64)]) for part in padded]
    stacked[3][1] = 1.0
    for alone, with_padding, among_tasks in zip(losses(*data), losses(*padded), losses(*stacked), strict=True):
        torch.testing.assert_close(with_padding, alone)
        assert among_tasks.shape == (2,)
        torch.testing.assert_close(among_tasks[0], alone)


def test_weighted_mean():
    # (1·1 + 3·3)/4 = 2.5; no weight at all gives 0, not NaN.
    values = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    weights = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    torch.testing.assert_close(weighted_mean(values, weights), torch.tensor([2.5, 0.0]))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "beyond"),
    [
        # d(−ratio·A)/d log π = −ratio·A where not clipped, else 0.
        (1.5, 2.0, -1.2 * 2.0, 0.0, 1.0),  # gained enough: min(1.5·2, 1.2·2)
        (0.5, 2.0, -0.5 * 2.0, -1.0, 1.0),  # lost: min(0.5·2, 0.8·2), still pushed back up
        (1.5, -2.0, 1.5 * 2.0, 3.0, 1.0),  # a bad action more likely: min(−3, −2.4), still pushed down
        (0.5, -2.0, 0.8 * 2.0, 0.0, 1.0),  # less likely enough: min(−1, −1.6)
        (1.1, 2.0, -2.2, -2.2, 0.0),  # within the range
    ],
)
def test_ppo_clip_by_hand(ratio, advantage, loss, gradient, beyond):
    log_probs = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, dtype=torch.float64)
    found, fraction = ppo_clip_loss(log_probs, 0 * one, advantage * one, one, 0.2)
    found.backward()
    torch.testing.assert_close(found.detach(), loss * one[0])
    torch.testing.assert_close(log_probs.grad, gradient * one)
    assert fraction == beyond


def test_clip_fraction_is_a_weighted_mean():
    log_probs = torch.tensor([1.5, 1.0, 0.5, 1.5]).log()
    _, fraction = ppo_clip_loss(log_probs, torch.zeros(4), torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 0.0]), 0.2)
    torch.testing.assert_close(fraction, torch.tensor(2 / 3))


def test_approximate_kl_is_that_of_gaussians():
    # KL(N(0,1) ‖ N(0.3, 1.2²)) = log 1.2 + (1 + 0.3²)/(2·1.2²) − 1/2 = 0.06079...
    exact = math.log(1.2) + (1 + 0.09) / (2 * 1.44) - 0.5
    draws = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    old = torch.distributions.Normal(0.0, 1.0).log_prob(draws)
    new = torch.distributions.Normal(0.3, 1.2).log_prob(draws)
    assert float(approximate_kl(new, old, torch.ones_like(draws))) == pytest.approx(exact, abs=1e-3)
    reverse = math.log(1 / 1.2) + (1.44 + 0.09) / 2 - 0.5  # KL the other way round is another number
    assert abs(reverse - exact) > 0.01
    assert (approximate_kl(new[:, None], old[:, None], torch.ones(len(draws), 1)) >= 0).all()
    assert approximate_kl(old, old, torch.ones_like(draws)) == 0


def test_gaussian_kl_by_hand():
    """KL(N(0, 1) ‖ N(0.3, 1.2²)) = 0.06079… as above, plus KL(N(1, 2²) ‖ N(1, 1)) = −log 2 + (4 − 1)/2 = 0.80685…"""
    mean, log_std = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]).log()
    other_mean, other_log_std = torch.tensor([0.3, 1.0]), torch.tensor([1.2, 1.0]).log()
    first = math.log(1.2) + (1 + 0.09) / (2 * 1.44) - 0.5
    found = DiagonalGaussian(mean, log_std).kl(DiagonalGaussian(other_mean, other_log_std))
    torch.testing.assert_close(found, torch.tensor(first - math.log(2.0) + 1.5))
    assert DiagonalGaussian(other_mean, other_log_std).kl(DiagonalGaussian(mean, log_std)).item() != pytest.approx(
        found.item(), abs=0.01
    )
    assert DiagonalGaussian(mean, log_std).kl(DiagonalGaussian(mean, log_std)).item() == 0.0


def test_gaussian_kl_is_that_of_torch_s_distributions():
    generator = torch.Generator().manual_seed(0)
    mean, log_std, other_mean, other_log_std = (torch.randn(3, 4, 2, generator=generator) for _ in range(4))
    normals = (torch.distributions.Normal(m, s.exp()) for m, s in ((mean, log_std), (other_mean, other_log_std)))
    expected = torch.distributions.kl_divergence(*normals).sum(-1)
    found = DiagonalGaussian(mean, log_std).kl(DiagonalGaussian(other_mean, other_log_std))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.shape == (3, 4) and (found > 0).all()
