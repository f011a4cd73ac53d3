"""The Gaussian policy against torch.distributions, and its parameters stacked, mapped and differentiated."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal

from metarl.nn.distributions import GaussianHead
from metarl.nn.mlp import MlpPolicy, apply_mlp, init_mlp

POLICY = MlpPolicy(3, GaussianHead(2), hidden_sizes=(5, 4))


def drawn(policy=POLICY, seed=0):
    """Parameters that are all away from their starting values."""
    generator = torch.Generator().manual_seed(seed)
    params = policy.init(generator)
    return {name: value + 0.3 * torch.randn(value.shape, generator=generator) for name, value in params.items()}


def data(*leading, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*leading, 3, generator=generator), torch.randn(*leading, 2, generator=generator)


def test_log_prob_by_hand():
    # N(0, 1)² at (1, 2): −½(1 + 4) − log 2π: the SUM over dimensions; the mean would be half of it.
    params = {name: torch.zeros_like(value) for name, value in drawn().items()}
    log_prob = POLICY.log_prob(params, torch.zeros(1, 3), torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(log_prob, torch.tensor([-2.5 - math.log(2 * math.pi)]))


def test_log_prob_equals_torch_distributions():
    params, (observations, actions) = drawn(), data(7)
    mean, log_std = POLICY.distribution(params, observations).parameters().values()
    expected = Independent(Normal(mean, log_std.exp()), 1).log_prob(actions)
    assert expected.shape == (7,)
    torch.testing.assert_close(POLICY.log_prob(params, observations, actions), expected)


def test_mlp_by_hand():
    # tanh(2·0.5 + 0.1) = tanh 1.1, times 3, minus 1; relu: 3·1.1 − 1 = 2.3.
    params = {
        "weight_0": torch.tensor([[2.0]]),
        "bias_0": torch.tensor([0.1]),
        "weight_1": torch.tensor([[3.0]]),
        "bias_1": torch.tensor([-1.0]),
        "log_std": torch.tensor([9.0]),
    }
    inputs = torch.tensor([[0.5]])
    torch.testing.assert_close(apply_mlp(params, inputs, "tanh"), torch.tensor([[3 * math.tanh(1.1) - 1]]))
    torch.testing.assert_close(apply_mlp(params, inputs, "relu"), torch.tensor([[2.3]]))


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_stacked_parameters_equal_one_task_at_a_time(activation):
    policy = MlpPolicy(3, GaussianHead(2), (5, 4), activation)
    tasks = [drawn(policy, seed) for seed in range(3)]
    observations, actions = data(3, 6)
    stacked = {name: torch.stack([task[name] for task in tasks]).requires_grad_() for name in tasks[0]}
    together = policy.log_prob(stacked, observations, actions)
    assert together.shape == (3, 6)
    gradients = torch.autograd.grad(together.square().sum(), list(stacked.values()))
    for i, task in enumerate(tasks):
        leaves = {name: value.clone().requires_grad_() for name, value in task.items()}
        alone = policy.log_prob(leaves, observations[i], actions[i])
        torch.testing.assert_close(together[i], alone)
        expected = torch.autograd.grad(alone.square().sum(), list(leaves.values()))
        for found, gradient in zip(gradients, expected, strict=True):
            torch.testing.assert_close(found[i], gradient, atol=1e-5, rtol=1e-5)


def test_vmap_over_tasks_equals_stacking():
    tasks, (observations, actions) = [drawn(seed=seed) for seed in range(3)], data(3, 6)
    stacked = {name: torch.stack([task[name] for task in tasks]) for name in tasks[0]}
    mapped = torch.func.vmap(POLICY.log_prob)(stacked, observations, actions)
    torch.testing.assert_close(mapped, POLICY.log_prob(stacked, observations, actions))
    gradient = torch.func.grad(lambda params, o, a: POLICY.log_prob(params, o, a).sum())
    per_task = torch.func.vmap(gradient)(stacked, observations, actions)
    for i, task in enumerate(tasks):
        alone = gradient(task, observations[i], actions[i])
        for name in task:
            torch.testing.assert_close(per_task[name][i], alone[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("log_std", "std"), [(-9.0, 0.05), (9.0, 2.0), (math.log(0.7), 0.7)])
def test_the_standard_deviation_stays_within_its_bounds(log_std, std):
    params = drawn() | {"log_std": torch.full((2,), log_std, requires_grad=True)}
    observations, actions = data(4)
    found = POLICY.distribution(params, observations)
    torch.testing.assert_close(found.log_std.exp(), torch.full((1, 2), std))
    (gradient,) = torch.autograd.grad(POLICY.log_prob(params, observations, actions).sum(), params["log_std"])
    assert bool((gradient == 0).all()) == (std in (0.05, 2.0))


def test_init_is_a_function_of_the_generator():
    first, again, other = (POLICY.init(torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    torch.manual_seed(0)
    global_state = torch.get_rng_state()
    POLICY.init(torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), global_state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["weight_0"], other["weight_0"])


def test_init_is_orthogonal_with_the_mean_near_0():
    params = MlpPolicy(3, GaussianHead(2, init_std=0.6), (5,)).init(torch.Generator().manual_seed(0))
    weight = params["weight_0"]  # [5, 3], gain √2: WᵀW = 2 I
    torch.testing.assert_close(weight.T @ weight, 2 * torch.eye(3), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(params["weight_1"] @ params["weight_1"].T, 1e-4 * torch.eye(2), atol=1e-8, rtol=1e-5)
    assert (params["bias_0"] == 0).all() and (params["bias_1"] == 0).all()
    torch.testing.assert_close(params["log_std"].exp(), torch.tensor([0.6, 0.6]))


def test_a_policy_without_hidden_layers_is_linear():
    params = init_mlp((3, 2), 1.0, torch.Generator().manual_seed(0))
    observations, _ = data(4)
    torch.testing.assert_close(apply_mlp(params, observations, "tanh"), observations @ params["weight_0"].T)
