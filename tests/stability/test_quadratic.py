"""The quadratic penalty: 0 at the anchor, the sum over anchors however many, and what L2 makes of it."""

import numpy as np
import pytest
import torch

from metarl.stability import build
from metarl.stability.l2 import L2Config
from metarl.stability.quadratic import Anchors, unit_mean
from tests.stability.agents import KINDS, copy_of, disturb, gradient, iteration, make, policy_of

every_kind = pytest.mark.parametrize("kind", KINDS)


def weights_of(agent, seed=0, zeros=0.3):
    """Random weights of the policy's parameters, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(value.shape, generator=generator) * (torch.rand(value.shape, generator=generator) > zeros)
        for name, value in policy_of(agent).items()
    }


def explicit(agent, anchors):
    """½ Σ_i Σ_k w_ik (θ_k − θ_ik)², term by term."""
    params = agent.parameters()
    return sum(
        0.5 * (weights[name] * (params[name] - center[name]).square()).sum()
        for weights, center in anchors
        for name in weights
    )


class Two:
    """An agent of one parameter with two numbers."""

    def __init__(self, *values):
        self.theta = torch.tensor(values, requires_grad=True)

    def parameters(self):
        return {"policy.theta": self.theta}

    def go(self, *values):
        with torch.no_grad():
            self.theta.copy_(torch.tensor(values))


def test_two_anchors_by_hand():
    """Weights (2, 1) at (1, 0), then (4, 0) at (4, 5): at (3, 2) it is
    ½ (2 · 2² + 1 · 2²) + ½ (4 · 1² + 0) = 6 + 2 = 8; its gradient (2 · 2 + 4 · (−1), 1 · 2) = (0, 2)."""
    agent, anchors = Two(1.0, 0.0), Anchors()
    anchors.add(agent, {"policy.theta": torch.tensor([2.0, 1.0])})
    agent.go(4.0, 5.0)
    anchors.add(agent, {"policy.theta": torch.tensor([4.0, 0.0])})
    # One quadratic: W = (6, 1), C = ((2 · 1 + 4 · 4) / 6, 0) = (3, 0); at C: ½ (2 · 2² + 4 · 1²) = 6.
    torch.testing.assert_close(anchors.weights["policy.theta"], torch.tensor([6.0, 1.0]))
    torch.testing.assert_close(anchors.centers["policy.theta"], torch.tensor([3.0, 0.0]))
    torch.testing.assert_close(anchors.constant, torch.tensor(6.0))
    agent.go(3.0, 2.0)
    penalty = anchors.penalty(agent)
    torch.testing.assert_close(penalty, torch.tensor(8.0))
    torch.testing.assert_close(torch.autograd.grad(penalty, agent.theta)[0], torch.tensor([0.0, 2.0]))
    torch.testing.assert_close(anchors.loss(agent, 0.5)["loss"], torch.tensor(4.0))


def test_online_anchors_by_hand():
    """Weights 2 at 1; then decayed by ½ and 4 more, all at 3: 5 around 3, so ½ · 5 · 2² = 10 at 5."""
    agent, anchors = Two(1.0, 1.0), Anchors()
    anchors.replace(agent, {"policy.theta": torch.tensor([2.0, 2.0])}, 0.5)
    agent.go(3.0, 3.0)
    torch.testing.assert_close(anchors.penalty(agent), torch.tensor(8.0))  # ½ · 2 · 2² twice
    anchors.replace(agent, {"policy.theta": torch.tensor([4.0, 0.0])}, 0.5)
    torch.testing.assert_close(anchors.penalty(agent), torch.tensor(0.0))
    agent.go(5.0, 5.0)
    # (½ · 2 + 4) and (½ · 2 + 0): ½ · 5 · 2² + ½ · 1 · 2² = 12; slopes 5 · 2 and 1 · 2.
    penalty = anchors.penalty(agent)
    torch.testing.assert_close(penalty, torch.tensor(12.0))
    torch.testing.assert_close(torch.autograd.grad(penalty, agent.theta)[0], torch.tensor([10.0, 2.0]))


@every_kind
def test_the_penalty_is_0_at_the_anchor_and_its_gradient_that_of_the_quadratic(kind):
    agent, anchors = make(kind), Anchors()
    weights, there = weights_of(agent), copy_of(agent.parameters())
    anchors.add(agent, weights)
    assert anchors.loss(agent, 3.0)["loss"].item() == pytest.approx(0.0, abs=1e-8)
    disturb(agent)
    loss = anchors.loss(agent, 3.0)["loss"]
    assert loss.item() > 1e-3
    found = gradient(loss, agent)
    for name, value in agent.parameters().items():
        expected = 3.0 * weights[name] * (value - there[name]) if name in weights else torch.zeros_like(value)
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)
    assert kind == "maml" or any(name.startswith("value.") for name in found)  # which stay free


@every_kind
def test_several_anchors_are_the_sum_of_their_quadratics(kind):
    agent, anchors, expand_for_each = make(kind), Anchors(), []
    for seed in range(4):
        disturb(agent, 0.3, seed)
        weights = weights_of(agent, seed)
        anchors.add(agent, weights)
        expand_for_each.append((weights, copy_of(agent.parameters())))
        assert len(anchors.state_dict()) == 2 * len(weights) + 1  # it does not grow
        found, expected = anchors.penalty(agent), explicit(agent, expand_for_each)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    disturb(agent, 0.3, 9)
    found, expected = anchors.penalty(agent), explicit(agent, expand_for_each)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found, expected = gradient(found, agent), gradient(expected, agent)
    for name, part in expected.items():
        torch.testing.assert_close(found[name], part, rtol=1e-5, atol=1e-5)


def test_an_anchor_is_where_the_agent_was_not_where_it_goes():
    agent, anchors = make("maml"), Anchors()
    anchors.add(agent, weights_of(agent))
    held = copy_of(anchors.state_dict())
    disturb(agent)
    for name, value in anchors.state_dict().items():
        assert torch.equal(value, held[name]), name


def test_without_an_anchor_or_a_coefficient_there_is_no_loss():
    agent, anchors = make("maml"), Anchors()
    assert anchors.loss(agent, 1.0) == {}
    anchors.add(agent, weights_of(agent))
    assert anchors.loss(agent, 0.0) == {}
    assert list(anchors.loss(agent, 1e-9)) == ["loss"]


def test_weights_are_scaled_to_a_mean_of_1():
    """(1 + 3 + 0 + 4) / 4 = 2."""
    found = unit_mean({"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([[0.0], [4.0]])})
    torch.testing.assert_close(found["a"], torch.tensor([0.5, 1.5]))
    torch.testing.assert_close(found["b"], torch.tensor([[0.0], [2.0]]))
    assert torch.equal(unit_mean({"a": torch.zeros(3)})["a"], torch.zeros(3))
    assert unit_mean({}) == {}


@every_kind
def test_l2_is_half_the_squared_distance_to_each_anchor(kind):
    agent, method = make(kind), build(L2Config(coef=0.4))
    rollouts, centers = iteration(agent), []
    assert method.loss(agent, None, 1.0) == {}
    for seed in range(2):
        disturb(agent, 0.2, seed)
        method.end_stage(agent, rollouts, np.random.default_rng(0))
        centers.append(copy_of(policy_of(agent)))
    disturb(agent, 0.2, 5)
    expected = sum(
        0.4 * 0.5 * (value - center[name]).square().sum()
        for center in centers
        for name, value in policy_of(agent).items()
    )
    torch.testing.assert_close(method.loss(agent, None, 1.0)["loss"], expected, rtol=1e-5, atol=1e-6)


# Saving


def two_anchors(agent):
    anchors = Anchors()
    for seed in range(2):
        disturb(agent, 0.2, seed)
        anchors.add(agent, weights_of(agent, seed))
    return anchors


def test_what_is_saved_is_all_that_is_needed():
    agent, other = make("gru"), Anchors()
    anchors = two_anchors(agent)
    other.load_state_dict(copy_of(anchors.state_dict()))
    disturb(agent, 0.2, 7)
    assert torch.equal(other.penalty(agent), anchors.penalty(agent))
    for each in (anchors, other):
        each.add(agent, weights_of(agent, 7))
    disturb(agent, 0.2, 8)
    assert torch.equal(other.penalty(agent), anchors.penalty(agent))
    empty = Anchors()
    assert empty.state_dict() == {}
    empty.load_state_dict({})
    assert empty.loss(agent, 1.0) == {}


@pytest.mark.parametrize("entry", ["weight.policy.weight_0", "center.policy.weight_0", "constant"])
def test_an_entry_that_is_missing_is_named(entry):
    """A penalty must not vanish because a part of it was lost."""
    agent = make("maml")
    state = copy_of(two_anchors(agent).state_dict())
    del state[entry]
    with pytest.raises(ValueError, match=f"cannot load '{entry}'"):
        Anchors().load_state_dict(state)


@pytest.mark.parametrize(
    "device",
    [
        "meta",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")],
        ),
    ],
)
@pytest.mark.parametrize("decay", [None, 0.5])
def test_what_was_loaded_on_the_cpu_is_added_to_where_the_agent_is(device, decay):
    """A run that goes on loads its anchors on the CPU; its agent may be elsewhere, and its next stage end first."""
    anchors, agent = Anchors(), Two(1.0, 2.0)
    anchors.add(agent, {"policy.theta": torch.ones(2)})
    other = Anchors()
    other.load_state_dict(copy_of(anchors.state_dict()))
    agent.theta, weights = agent.theta.detach().to(device), {"policy.theta": torch.ones(2, device=device)}
    if decay is None:
        other.add(agent, weights)
    else:
        other.replace(agent, weights, decay)
    assert {value.device.type for value in (other.weights | other.centers).values()} == {device}
    assert other.penalty(agent).device.type == device


def test_an_entry_of_another_shape_is_named():
    state = copy_of(two_anchors(make("maml")).state_dict())
    state["center.policy.weight_0"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"cannot load 'center.policy.weight_0': expected shape \(4, 3\), found \(7,"):
        Anchors().load_state_dict(state)
