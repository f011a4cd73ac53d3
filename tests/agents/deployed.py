"""Policies with random weights and moved normalisers, as if they had been trained, and trials to try them on."""

from dataclasses import replace

import numpy as np
import torch

from metarl.build import build_agent
from metarl.config.schema import RunConfig
from metarl.deploy.policy import Policy
from metarl.spaces import Spaces
from metarl.types import Trajectory

SPACES = Spaces(3, (-2.0, 0.0), (1.0, 0.5))
"""Bounds that are neither ±1 nor symmetric."""

RL2 = {"name": "rl2", "encoder_sizes": [8]}
AGENTS = {
    "mlp": {"name": "maml_ppo", "hidden_sizes": [8, 8]},
    "meta_sgd": {"name": "meta_sgd", "hidden_sizes": [8], "activation": "relu"},
    "gru": {**RL2, "memory": {"name": "gru", "size": 8}, "input_time": True, "observation_entries": [0, 2]},
    "lstm": {**RL2, "memory": {"name": "lstm", "size": 8}, "skip_inputs": False, "state_dependent_std": True},
    # Fewer steps than the trials have: entries must be dropped.
    "transformer": {**RL2, "memory": {"name": "transformer", "size": 8, "heads": 2, "layers": 2, "context": 5}},
    "episodic": {**RL2, "memory": {"name": "episodic", "size": 8, "heads": 2, "context": 5}, "encoder_sizes": []},
}


def make_policy(name, spaces=SPACES, seed=0, **settings):
    """A policy whose means are of the size of the bounds."""
    stages = [{"tasks": {"family": "custom"}}]  # of nothing that comes with metarl
    whole = {"seed": seed, "num_workers": 0, "agent": AGENTS[name], "stages": stages, **settings}
    config = RunConfig.model_validate(whole)
    agent = build_agent(config, spaces, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in agent.parameters().values():
            value.copy_(value + 0.4 * torch.randn(value.shape, generator=generator))
    seen = torch.randn(50, len(agent.normalizer.mean), generator=generator)
    seen = 2.0 + 3.0 * (seen - seen.mean(0)) / seen.std(0, correction=0)
    agent._use_normalizer(agent.normalizer.update(seen, torch.ones(50, dtype=torch.bool)))
    return Policy(config, agent, spaces, 1000, agent.initial_state(1))


def make_trials(batch=4, episodes=3, steps=4, size=3, seed=0):
    """Observations `[T, B, O]`, rewards `[T, B]`, some of them not known, and where episodes start, `[T, B]`."""
    rng = np.random.default_rng(seed)
    shape = (episodes * steps, batch)
    rewards = np.where(rng.uniform(size=shape) < 0.25, np.nan, 2.0 + 3.0 * rng.standard_normal(shape))
    starts = np.repeat((np.arange(shape[0]) % steps == 0)[:, None], batch, 1)
    rewards[0] = np.nan
    return (2.0 + 3.0 * rng.standard_normal((*shape, size))).astype(np.float32), rewards.astype(np.float32), starts


def make_episodes(count=2, steps=5, seed=0, log_probs=False):
    """Recorded episodes, with actions within the bounds."""
    rng = np.random.default_rng(seed)
    low, high = SPACES.action_bounds
    ends = np.arange(steps) == steps - 1
    return [
        Trajectory(
            2.0 + 3.0 * rng.standard_normal((steps, SPACES.observation_size)),
            rng.uniform(low, high, (steps, SPACES.action_size)),
            rng.standard_normal(steps),
            np.zeros(steps, bool),
            ends,
            rng.standard_normal(steps) if log_probs else None,
        )
        for _ in range(count)
    ]


def walk(policy, trials, state=None, rows=None):
    """Act through trials; returns actions `[T, B, A]` and the last state."""
    observations, rewards, starts = trials
    rows = slice(None) if rows is None else rows
    actions = []
    for observation, reward, start in zip(observations, rewards, starts, strict=True):
        action, state = policy.predict(observation[rows], state, start[rows], deterministic=True, reward=reward[rows])
        actions.append(action)
    return np.stack(actions), state


def zero(policy):
    """The same policy with a mean of 0 everywhere, the middle of the action range, and a deviation of 1/2."""
    blank = policy.agent.state_dict()
    for name, value in blank.items():
        if name.startswith("policy."):
            blank[name] = torch.full_like(value, np.log(0.5) if name.endswith("log_std") else 0.0)
    agent = build_agent(policy.config, policy.spaces, torch.device("cpu"))
    agent.load_state_dict(blank)
    return replace(policy, agent=agent, state=agent.initial_state(1))
