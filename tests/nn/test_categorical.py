"""Categorical distributions against torch's own and against frequencies; Fisher information by its definition."""

import itertools

import pytest
import torch
from torch.distributions import Categorical as Reference
from torch.distributions import kl_divergence

from metarl.nn.distributions import Categorical, CategoricalHead, GaussianHead, action_head
from metarl.spaces import Spaces

CHOICES = (3, 2, 4)


def logits_of(*shape, seed=0, choices=CHOICES):
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randn(*shape, sum(choices), generator=generator, dtype=torch.float64)


def references(logits, choices=CHOICES):
    return [Reference(logits=part) for part in logits.split(list(choices), -1)]


@pytest.mark.parametrize("choices", [(5,), CHOICES])
def test_it_is_the_product_of_torch_s_own(choices):
    logits, other = logits_of(2, 7, choices=choices), logits_of(2, 7, seed=1, choices=choices)
    found, theirs = Categorical(logits, choices), Categorical(other, choices)
    parts, others = references(logits, choices), references(other, choices)
    actions = torch.stack([part.sample() for part in parts], -1)
    expected = sum(part.log_prob(action) for part, action in zip(parts, actions.unbind(-1), strict=True))
    torch.testing.assert_close(found.log_prob(actions.double()), expected)
    torch.testing.assert_close(found.entropy(), sum(part.entropy() for part in parts))
    torch.testing.assert_close(found.kl(theirs), sum(map(kl_divergence, parts, others)))
    assert torch.equal(found.mode, torch.stack([part.probs.argmax(-1) for part in parts], -1).double())
    expected = torch.stack([part.probs.amax(-1) for part in parts]).mean(0)
    torch.testing.assert_close(found.metrics()["mode_probability"], expected)
    assert found.saturation().shape == (2, 7) and not found.saturation().any()


def test_without_noise_it_draws_the_mode_and_with_noise_each_choice_as_often_as_it_is_likely():
    logits, draws = logits_of(seed=3), 40_000
    distribution = Categorical(logits.expand(draws, -1), CHOICES)
    assert torch.equal(distribution.sample(torch.zeros(draws, sum(CHOICES))), distribution.mode)
    noise = torch.randn(draws, sum(CHOICES), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for drawn, reference in zip(distribution.sample(noise).unbind(-1), references(logits), strict=True):
        counts = torch.bincount(drawn.long(), minlength=len(reference.probs)) / draws
        error = (reference.probs * (1 - reference.probs) / draws).sqrt()
        assert ((counts - reference.probs).abs() < 4.5 * error).all()


def test_extreme_noise_and_logits_stay_finite():
    distribution = Categorical(torch.tensor([[300.0, -300.0]]), (2,))
    for value in (-40.0, 40.0):
        assert distribution.sample(torch.tensor([[-value, value]])).item() == 0.0
    assert distribution.log_prob(torch.tensor([[1.0]])).isfinite().all() and distribution.entropy().isfinite().all()


def test_fisher_information_is_the_mean_squared_score():
    """E_a[(∂ log π(a|s) / ∂θ)²] over all actions, θ the weights of a linear layer of which the logits come."""
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    theta = torch.randn(sum(CHOICES), 3, generator=generator, dtype=torch.float64).requires_grad_()
    expected = torch.zeros_like(theta)
    for state in states:
        for actions in itertools.product(*map(range, CHOICES)):
            log_prob = Categorical(theta @ state, CHOICES).log_prob(torch.tensor(actions, dtype=torch.float64))
            (score,) = torch.autograd.grad(log_prob, theta)
            expected += log_prob.detach().exp() * score.square()
    slopes = torch.zeros(4, sum(CHOICES), *theta.shape, dtype=torch.float64)
    for i in range(sum(CHOICES)):
        slopes[:, i, i] = states
    found = Categorical((states @ theta.T).detach(), CHOICES).fisher_diagonal("logits", slopes)
    torch.testing.assert_close(found, expected)


def test_the_action_space_chooses_the_head():
    assert action_head(Spaces.within_one(3, 2)) == GaussianHead(2)
    spaces = Spaces(3, (0.0, -1.0), (2.0, 0.0), "multi_discrete")
    head = action_head(spaces)
    assert head == CategoricalHead((3, 2)) and (head.output_size, head.noise_size, head.feedback_size) == (5, 5, 5)
    read = head.feedback(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
    assert read.tolist() == [[0, 0, 1, 1, 0], [0, 1, 0, 0, 1]]
