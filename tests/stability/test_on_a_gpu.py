"""Agents that learn on a GPU and act on the CPU: what stability methods ask of them, and what they remember."""

import numpy as np
import pytest
import torch

from metarl.agents.rl2.agent import Rl2
from metarl.stability import StabilityLoss, build, stability_configs
from tests.agents.specs import spec
from tests.stability.agents import ACTIONS, KINDS, OBSERVATIONS, copy_of, iteration, make

SETTINGS = {
    "ewc": {"fisher_states": 50},
    "mas": {"states": 50},
    "l2": {},
    "replay": {"capacity": 8, "policy_coef": 0.5, "min_sample_size": 0.0},
    "mer": {"capacity": 8, "batches": 1},
}


def make_on(device, kind):
    """A new agent, which makes all its steps however far they lead."""
    if kind == "maml":
        return make(kind, device=device)
    return Rl2(make(kind, max_kl=1e9).config, spec(OBSERVATIONS, ACTIONS, torch.device(device), 0))


def two_stages(agent, config, collected):
    """Learn under guard, end a stage, go on from what was saved; returns metrics and state."""
    rollouts = [[rollout.to(agent.device) for rollout in one] for one in collected]
    rng, method = np.random.default_rng, build(config)
    before = copy_of(agent.parameters())
    agent.update((), rollouts[0], StabilityLoss([method], agent, rng(0)))
    method.observe(agent, rollouts[0], before, rng(1))
    method.end_stage(agent, rollouts[1], rng(2))
    resumed, before = build(config), copy_of(agent.parameters())
    resumed.load_state_dict({name: value.cpu() for name, value in method.state_dict().items()})
    auxiliary_loss = StabilityLoss([resumed], agent, rng(3))
    metrics = agent.update((), rollouts[2], auxiliary_loss) | auxiliary_loss.metrics()
    resumed.observe(agent, rollouts[2], before, rng(4))
    resumed.end_stage(agent, rollouts[0], rng(5))
    units = agent.hidden_units(rollouts[2])
    return metrics, {name: value.cpu() for name, value in (agent.state_dict() | units).items()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_stages_are_those_of_the_cpu(kind, method, device="cuda"):
    config = stability_configs()[method](**SETTINGS[method])
    on_cpu, on_gpu = make_on("cpu", kind), make_on(device, kind)
    on_gpu.load_state_dict(on_cpu.state_dict())
    collected = [iteration(on_cpu, seed=seed) for seed in range(3)]
    metrics, expected = two_stages(on_cpu, config, collected)
    on_device, found = two_stages(on_gpu, config, collected)
    assert f"stability/{method}/loss" in metrics and on_device == pytest.approx(metrics, rel=1e-2, abs=1e-3)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-3, msg=lambda text, n=name: f"{n}: {text}")
