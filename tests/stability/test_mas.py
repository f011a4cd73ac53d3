"""Memory aware synapses: the importance is the mean, over states, of how the size of the outputs moves."""

import numpy as np
import pytest
import torch

from metarl.stability import build
from metarl.stability.mas import MasConfig, importance
from tests.stability.agents import (
    KINDS,
    MEMORIES,
    copy_of,
    disturb,
    explicit_outputs,
    iteration,
    learned,
    make,
    policy_of,
)

ALL = 10**9


def generator():
    return torch.Generator().manual_seed(0)


def scaled(totals):
    mean = torch.cat([value.flatten() for value in totals.values()]).mean()
    return {name: value / mean for name, value in totals.items()}


def explicit(params, outputs):
    """Σ over states of |∂(‖μ‖² + ‖log σ‖²)/∂θ|, one state after another."""
    totals = {name: torch.zeros_like(value) for name, value in params.items()}
    for mean, log_std in outputs:
        size = mean.square().sum() + log_std.square().sum()
        slopes = torch.autograd.grad(size, list(params.values()), retain_graph=True, allow_unused=True)
        for name, slope in zip(params, slopes, strict=True):
            if slope is not None:
                totals[name] += slope.abs()
    return totals


@pytest.mark.parametrize("kind", MEMORIES)
@pytest.mark.parametrize("state_dependent_std", [False, True])
def test_the_importance_of_a_memory_is_that_of_a_loop_over_states(kind, state_dependent_std):
    agent = learned(kind, state_dependent_std=state_dependent_std)
    disturb(agent, 0.2)  # log σ is not 0
    rollouts = iteration(agent)
    outputs = [step for trial in explicit_outputs(agent, rollouts[0]) for step in trial]
    expected = scaled(explicit(policy_of(agent), outputs))
    found = importance(agent, rollouts, ALL, generator())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert expected["policy.head.log_std"].min() > 0


def test_the_importance_of_an_adapted_mlp_is_that_of_a_loop_over_states():
    agent = learned("maml", inner_lr=0.5)
    disturb(agent, 0.2)
    rollouts, totals = iteration(agent), {}
    state = agent.initial_state(3)
    for k, rollout in enumerate(rollouts):
        state = agent.adapt(state, rollouts[k - 1]) if k else state
        for task in range(3):
            own = {name: value[task].clone().requires_grad_() for name, value in state.items()}
            observations = agent.normalizer(rollout.observations)[task][rollout.valid[task]]
            outputs = [
                [part[0] for part in agent.policy.distribution(own, each[None]).parameters().values()]
                for each in observations
            ]
            for name, value in explicit(own, outputs).items():
                totals[f"policy.{name}"] = totals.get(f"policy.{name}", 0.0) + value
    expected, found = scaled(totals), importance(agent, rollouts, ALL, generator())
    assert found.keys() == expected.keys() == policy_of(agent).keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_the_importance_of_a_linear_policy_by_hand():
    """μ_d = b_d alone (W = 0): |∂/∂W_dj| = 2 |b_d| |x_j|, |∂/∂b_d| = 2 |b_d|, |∂/∂ log σ_d| = 2 |log σ_d|."""
    agent = make("maml", name="multi_task", hidden_sizes=())
    with torch.no_grad():
        for name, value in {"weight_0": 0.0, "bias_0": [3.0, -1.0], "log_std": [-0.5, 0.25]}.items():
            agent.meta.theta[name].copy_(torch.tensor(value))
    rollouts = iteration(agent)
    states = agent.normalizer(rollouts[0].observations)[rollouts[0].valid]
    bias = torch.tensor([6.0, 2.0])
    expected = scaled(
        {
            "policy.weight_0": bias[:, None] * states.abs().mean(0),
            "policy.bias_0": bias,
            "policy.log_std": torch.tensor([1.0, 0.5]),
        }
    )
    for name, value in importance(agent, rollouts, ALL, generator()).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_penalty_is_that_of_the_importance(kind):
    agent, method = learned(kind), build(MasConfig(coef=3.0, states=ALL))
    rollouts = iteration(agent)
    weights, there = importance(agent, rollouts, ALL, generator()), copy_of(policy_of(agent))
    method.end_stage(agent, rollouts, np.random.default_rng(0))
    assert method.loss(agent, None, 1.0)["loss"].item() == pytest.approx(0.0, abs=1e-8)
    disturb(agent)
    expected = 1.5 * sum((weights[n] * (v - there[n]).square()).sum() for n, v in policy_of(agent).items())
    loss = method.loss(agent, None, 1.0)["loss"]
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    other = build(MasConfig(coef=3.0, states=ALL))
    other.load_state_dict(copy_of(method.state_dict()))
    assert torch.equal(other.loss(agent, None, 1.0)["loss"], loss)
