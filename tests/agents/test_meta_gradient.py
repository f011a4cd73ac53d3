"""The meta-gradient of MAML-PPO against ground truth: enumerable MDPs and finite differences, in float64.

An MDP of 2 steps, 3 states and 2 actions has 3 · (2 · 3)² = 108 trajectories; the expectation over them is a weighted
sum.
"""

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from metarl.agents import maml_ppo
from metarl.agents.maml_ppo import Batch, inner_step, meta_loss
from metarl.objectives import weighted_mean

STATES, ACTIONS, STEPS = 3, 2, 2
ALPHA = 0.7


class Mdp(NamedTuple):
    start: Tensor  # [S]
    transition: Tensor  # [S, A, S]
    reward: Tensor  # [S, A]


def make_mdp(seed: int, actions_matter: bool) -> Mdp:
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    transition = rand(STATES, ACTIONS, STATES)
    if not actions_matter:
        transition = transition[:, :1].expand(-1, ACTIONS, -1)
    start = rand(STATES)
    return Mdp(start / start.sum(), transition / transition.sum(-1, keepdim=True), rand(STATES, ACTIONS) * 2 - 1)


def log_prob(params: dict[str, Tensor], observations: Tensor, actions: Tensor) -> Tensor:
    """A softmax policy: one logit a state and action; observations are one-hot states."""
    logits = torch.tanh(observations @ params["logits"]).log_softmax(-1)
    return logits.gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)


def policy(logits: Tensor) -> Tensor:
    return torch.tanh(logits).softmax(-1)


def exact_return(mdp: Mdp, logits: Tensor) -> Tensor:
    """E[Σ_t r_t] by dynamic programming."""
    probabilities = policy(logits)
    value = torch.zeros(STATES, dtype=torch.float64)
    for _ in range(STEPS):
        value = (probabilities * (mdp.reward + mdp.transition @ value)).sum(-1)
    return mdp.start @ value


def enumerate_batch(mdp: Mdp, logits: Tensor) -> Batch:
    """All trajectories under a policy; weights are their probabilities, advantages their true returns to go."""
    rows = []
    probabilities = policy(logits).detach()
    for states in itertools.product(range(STATES), repeat=STEPS):
        for actions in itertools.product(range(ACTIONS), repeat=STEPS):
            weight = mdp.start[states[0]].clone()
            for t in range(STEPS):
                weight = weight * probabilities[states[t], actions[t]]
                if t + 1 < STEPS:
                    weight = weight * mdp.transition[states[t], actions[t], states[t + 1]]
            rewards = [mdp.reward[s, a] for s, a in zip(states, actions, strict=True)]
            for t in range(STEPS):
                log_p = probabilities[states[t], actions[t]].log()
                rows.append((states[t], actions[t], log_p, sum(rewards[t:]), weight))
    state, action, old, advantage, weight = (
        torch.tensor([float(r[i]) for r in rows], dtype=torch.float64) for i in range(5)
    )
    return Batch(torch.eye(STATES, dtype=torch.float64)[state.long()], action, old, advantage, weight)


def central_differences(function, x: Tensor, eps: float = 1e-5) -> Tensor:
    gradient = torch.zeros_like(x)
    for i in range(x.numel()):
        delta = torch.zeros_like(x).view(-1)
        delta[i] = eps
        delta = delta.view_as(x)
        gradient.view(-1)[i] = (function(x + delta) - function(x - delta)) / (2 * eps)
    return gradient


def exact_adapted(mdp: Mdp, theta: Tensor, steps: int) -> Tensor:
    """θ after K steps of exact gradient ascent; the mean over STEPS samples of a trajectory divides the sum."""
    for _ in range(steps):
        theta = theta.detach().requires_grad_() if not theta.requires_grad else theta
        (gradient,) = torch.autograd.grad(exact_return(mdp, theta) / STEPS, theta, create_graph=True)
        theta = theta + ALPHA * gradient
    return theta


def expected_meta_gradient(mdp: Mdp, theta: Tensor, steps: int) -> Tensor:
    """The product's meta-gradient when the data are all trajectories, weighted by their probabilities."""
    params = {"logits": theta.detach().clone().requires_grad_()}
    rates = {"logits": torch.tensor(ALPHA, dtype=torch.float64)}
    supports, adapted = [], params
    for _ in range(steps):
        supports.append(enumerate_batch(mdp, adapted["logits"]))
        adapted, _ = inner_step(log_prob, adapted, rates, supports[-1])
    query = enumerate_batch(mdp, adapted["logits"])
    outcome = meta_loss(log_prob, params, rates, supports, query, clip_eps=0.2, inner_kl_coef=0.0)
    (gradient,) = torch.autograd.grad(outcome.loss, params["logits"])
    return -gradient * STEPS


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture
def theta() -> Tensor:
    return torch.randn(STATES, ACTIONS, generator=torch.Generator().manual_seed(7), dtype=torch.float64) * 0.5


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("actions_matter", [False, True])
def test_exact_post_adaptation_gradient_matches_finite_differences(theta, steps, actions_matter):
    mdp = make_mdp(0, actions_matter)
    leaf = theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(exact_return(mdp, exact_adapted(mdp, leaf, steps)), leaf)
    numeric = central_differences(lambda x: exact_return(mdp, exact_adapted(mdp, x, steps)).detach(), theta)
    assert relative_error(gradient, numeric) < 1e-4


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_expected_estimate_matches_finite_differences_of_the_exact_return(theta, steps):
    """States that follow by chance alone: no action changes a later advantage, and LVC leaves nothing out."""
    mdp = make_mdp(0, actions_matter=False)
    numeric = central_differences(lambda x: exact_return(mdp, exact_adapted(mdp, x, steps)).detach(), theta)
    assert relative_error(expected_meta_gradient(mdp, theta, steps), numeric) < 1e-4


def test_what_lvc_leaves_out_where_actions_change_the_future(theta):
    """With consequences the inner Hessian is E[(∇²log π + ∇log π ∇log πᵀ) Q], Q held fixed (Rothfuss et al. 2019).

    So the meta-gradient equals that of an inner step whose Q does not depend on θ, and differs from the exact one.
    """
    mdp = make_mdp(0, actions_matter=True)

    def lvc_return(x: Tensor) -> Tensor:
        fixed = x.detach()
        visited, value = [mdp.start], torch.zeros(STATES, dtype=torch.float64)
        for _ in range(STEPS - 1):
            visited.append(torch.einsum("s,sa,sax->x", visited[-1], policy(fixed), mdp.transition))
        objective = torch.zeros((), dtype=torch.float64)
        for t in reversed(range(STEPS)):
            q = mdp.reward + mdp.transition @ value
            objective = objective + torch.einsum("s,sa,sa->", visited[t], policy(x), q)
            value = (policy(fixed) * q).sum(-1)
        return objective

    leaf = theta.clone().requires_grad_()
    (inner,) = torch.autograd.grad(lvc_return(leaf) / STEPS, leaf, create_graph=True)
    (expected,) = torch.autograd.grad(exact_return(mdp, leaf + ALPHA * inner), leaf)
    found = expected_meta_gradient(mdp, theta, 1)
    assert relative_error(found, expected) < 1e-6
    numeric = central_differences(lambda x: exact_return(mdp, exact_adapted(mdp, x, 1)).detach(), theta)
    assert relative_error(found, numeric) > 1e-3


@pytest.mark.parametrize("broken", ["first order", "score function"])
def test_a_missing_second_order_term_or_likelihood_ratio_is_seen(theta, broken, monkeypatch):
    mdp = make_mdp(0, actions_matter=False)
    numeric = central_differences(lambda x: exact_return(mdp, exact_adapted(mdp, x, 1)).detach(), theta)
    if broken == "first order":
        grad = torch.autograd.grad

        def first_order(outputs, inputs, **kwargs):
            return (
                tuple(g.detach() for g in grad(outputs, inputs, **kwargs))
                if "create_graph" in kwargs
                else grad(outputs, inputs)
            )

        monkeypatch.setattr(torch.autograd, "grad", first_order)
    else:

        def score(log_probs, old_log_probs, advantages, weights):
            return -weighted_mean(log_probs * advantages, weights)

        monkeypatch.setattr(maml_ppo, "likelihood_ratio_loss", score)
    found = expected_meta_gradient(mdp, theta, 1)
    assert relative_error(found, numeric) > 1e-2


def test_stacked_tasks_give_the_gradients_of_tasks_alone(theta):
    """The batched form, three tasks on parameters stacked [M, ...], against one task at a time."""
    mdps = [make_mdp(seed, actions_matter=True) for seed in range(3)]
    rates = {"logits": torch.tensor(ALPHA, dtype=torch.float64)}
    alone = sum(expected_meta_gradient(mdp, theta, 1) for mdp in mdps)
    supports = [enumerate_batch(mdp, theta) for mdp in mdps]
    queries = []
    for support in supports:
        adapted, _ = inner_step(log_prob, {"logits": theta.clone().requires_grad_()}, rates, support)
        queries.append(enumerate_batch(mdps[len(queries)], adapted["logits"]))
    leaf = theta.clone().requires_grad_()
    stack = lambda batches: Batch(*(torch.stack(part) for part in zip(*batches, strict=True)))  # noqa: E731
    outcome = meta_loss(
        log_prob, {"logits": leaf.expand(3, -1, -1)}, rates, [stack(supports)], stack(queries), 0.2, 0.0
    )
    assert outcome.loss.shape == (3,)
    (gradient,) = torch.autograd.grad(outcome.loss.sum(), leaf)
    torch.testing.assert_close(-gradient * STEPS, alone)
