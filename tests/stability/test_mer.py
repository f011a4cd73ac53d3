"""MER: the arithmetic of both steps of Reptile, and replay where neither goes part of the way."""

import numpy as np
import pytest
import torch

from metarl.stability import StabilityLoss
from metarl.stability.mer import Mer, MerConfig
from metarl.stability.replay import Replay, ReplayConfig
from tests.stability.agents import copy_of, iteration, make


class Point:
    """An agent with one parameter, which its update sets to a given value."""

    def __init__(self, value):
        self.theta = torch.tensor([value], requires_grad=True)

    def parameters(self):
        return {"policy.theta": self.theta}

    def update(self, method, to):
        """An update to `to`, and what the method makes of it."""
        before = copy_of(self.parameters())
        with torch.no_grad():
            self.theta.fill_(to)
        method.observe(self, ROLLOUTS, before, np.random.default_rng(0))
        return float(self.theta.detach())


ROLLOUTS = iteration(make("gru"), tasks=2, rollouts=1)


def test_within_and_across_by_hand():
    """β = ½, γ = ¼, s = 2, Θ = 0.

    1: 0 → 8, half of the way: 4.                    2: 4 → 12, half: 8; then across: 0 + ¼ · 8 = 2, Θ = 2.
    3: 2 → 10, half: 6.                              4: 6 → −2, half: 2; then across: 2 + ¼ · 0 = 2, Θ = 2.
    5: 2 → 4, half: 3.                               6: 3 → 17, half: 10; then across: 2 + ¼ · 8 = 4.
    """
    agent, method = Point(0.0), Mer(MerConfig(within=0.5, across=0.25, batches=2))
    found = [agent.update(method, to) for to in (8.0, 12.0, 10.0, -2.0, 4.0, 17.0)]
    assert found == pytest.approx([4.0, 2.0, 6.0, 2.0, 3.0, 4.0])


def test_each_step_alone_by_hand():
    agent, method = Point(1.0), Mer(MerConfig(within=1.0, across=0.5, batches=3))
    assert [agent.update(method, to) for to in (2.0, 3.0, 7.0)] == [2.0, 3.0, 4.0]  # 1 + ½ · (7 − 1)
    agent, method = Point(1.0), Mer(MerConfig(within=0.25, across=1.0, batches=1))
    assert [agent.update(method, to) for to in (5.0, 10.0)] == [2.0, 4.0]  # 1 + ¼ · 4, 2 + ¼ · 8


def test_a_loaded_method_goes_on_exactly():
    config = MerConfig(within=0.5, across=0.25, batches=3)
    agents, methods = (Point(0.0), Point(0.0)), (Mer(config), Mer(config))
    for to in (8.0, 12.0, 5.0, 3.0):
        before = agents[0].update(methods[0], to)
    methods[1].load_state_dict(copy_of(methods[0].state_dict()))
    with torch.no_grad():
        agents[1].theta.fill_(before)
    for to in (9.0, -4.0, 6.0):
        assert agents[0].update(methods[0], to) == agents[1].update(methods[1], to)
    ours, theirs = (method.state_dict() for method in methods)
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("entry", ["iterations", "start.policy.theta", "ended", "0/seen"])
def test_an_entry_that_is_missing_is_named(entry):
    agent, method = Point(0.0), Mer(MerConfig(batches=3))
    agent.update(method, 8.0)
    state = copy_of(method.state_dict())
    del state[entry]
    with pytest.raises(ValueError, match=entry.removeprefix("0/").split(".")[0]):
        Mer(MerConfig()).load_state_dict(state)


@pytest.mark.parametrize("kind", ["maml", "gru"])
def test_going_the_whole_way_is_replay(kind):
    """Bit for bit, over a stage's end."""
    agents = [make(kind) for _ in range(3)]
    methods = [
        Replay(ReplayConfig(capacity=9)),
        Mer(MerConfig(capacity=9, within=1.0, across=1.0, batches=2)),
        Mer(MerConfig(capacity=9)),
    ]
    for agent, method in zip(agents, methods, strict=True):
        for number in range(4):
            rollouts, before = iteration(agent, seed=number), copy_of(agent.parameters())
            auxiliary_loss = StabilityLoss([method], agent, np.random.default_rng([number, 0]))
            agent.update((), rollouts, auxiliary_loss)
            method.observe(agent, rollouts, before, np.random.default_rng([number, 1]))
            if number == 1:
                method.end_stage(agent, iteration(agent, seed=50), np.random.default_rng(2))
        assert set(auxiliary_loss.metrics()) == {f"stability/{method.name}/loss", f"stability/{method.name}/kl"}
    replay, whole, part = (copy_of(agent.state_dict()) for agent in agents)
    assert all(torch.equal(value, whole[name]) for name, value in replay.items())
    assert not all(torch.equal(value, part[name]) for name, value in replay.items())
