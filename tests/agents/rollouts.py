"""Agents with small layers, and made-up rollouts for them to learn from."""

from dataclasses import replace

import torch

from metarl.agents import agent_configs, build
from metarl.agents.maml import outer
from metarl.types import Rollout, TimeStep
from tests.agents.specs import spec

OBSERVATIONS, ACTIONS = 3, 2


def make_agent(seed=0, name="maml_ppo", device="cpu", **settings):
    """An agent with small layers; settings of the outer step are recognised by their names."""
    ppo = {key: settings.pop(key) for key in list(settings) if key in outer.PpoConfig.model_fields}
    plain = {} if name in ("maml_trpo", "maml_vpg") else {"epochs": 1, "max_kl": 1e9}
    config = agent_configs()[name](**{"hidden_sizes": (8, 8), "outer": plain | ppo, **settings})
    return build(config, spec(OBSERVATIONS, ACTIONS, device, seed))


def collect(agent, state, tasks=3, rollouts=4, steps=6, seed=0):
    """A rollout of `agent` in `state` on random observations: task i is rewarded for the action (i, −i).

    Episode j of a task has `steps − j % 3` valid steps; the odd ones end by termination.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (tasks, rollouts, steps)
    observations = torch.randn(*shape, OBSERVATIONS, generator=generator)
    noise = torch.randn(tasks, rollouts * steps, ACTIONS, generator=generator)
    flat = (tasks, rollouts * steps)
    time_step = TimeStep(
        observations.flatten(1, 2), torch.zeros(flat), torch.zeros(flat, dtype=bool), torch.ones(flat, dtype=bool)
    )
    actions, log_probs, _ = agent.act(time_step, noise, state)
    actions, log_probs = actions.view(*shape, ACTIONS), log_probs.view(shape)
    final = torch.randn(tasks, rollouts, 1, OBSERVATIONS, generator=generator)
    targets = torch.arange(tasks)[:, None] * torch.tensor([0.3, -0.3])
    lengths = steps - torch.arange(rollouts) % 3
    valid = (torch.arange(steps) < lengths[:, None]).expand(shape)
    last = (torch.arange(steps) == lengths[:, None] - 1).expand(shape)
    ends_itself = (torch.arange(rollouts) % 2 == 1)[:, None].expand(shape)
    rollout = Rollout(
        observations=observations,
        final_observations=final,
        actions=actions,
        rewards=-(actions - targets[:, None, None]).square().sum(-1),
        log_probs=log_probs,
        terminated=last & ends_itself,
        truncated=last & ~ends_itself,
        episode_start=(torch.arange(steps) == 0).expand(shape),
        valid=valid,
        success=torch.zeros(shape),
    )
    padded = {"log_probs": log_probs, "rewards": rollout.rewards, "observations": observations, "actions": actions}
    zeroed = {name: v * (valid[..., None] if v.ndim == 4 else valid) for name, v in padded.items()}
    return replace(rollout, **zeroed)


def iteration(agent, tasks=3, seed=0, **shape):
    """The K + 1 rollouts of an iteration."""
    state, rollouts = agent.initial_state(tasks), []
    for k in range(agent.adaptation_steps + 1):
        state = agent.adapt(state, rollouts[-1]) if rollouts else state
        rollouts.append(collect(agent, state, tasks, seed=10 * seed + k, **shape))
    return rollouts


def of_task(rollout, i):
    return rollout.map(lambda value: value[i : i + 1])


def snapshot(agent):
    return {name: value.clone() for name, value in agent.state_dict().items()}


def assert_same(left, right, **tolerance):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], msg=lambda text, n=name: f"{n}: {text}", **tolerance)
