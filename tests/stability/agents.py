"""Small agents of each kind, and rollouts that they have made up, for stability methods to work on."""

import itertools

import torch

from metarl.agents.rl2.agent import Rl2, Rl2Config
from metarl.agents.rl2.networks import EpisodicConfig, GruConfig, LearnedCriticConfig, LstmConfig, TransformerConfig
from metarl.nn.memory import rows
from metarl.types import Rollout, TimeStep
from tests.agents import rollouts as gradient_agents
from tests.agents.specs import spec

MEMORIES = {
    "gru": GruConfig(size=4),
    "lstm": LstmConfig(size=4),
    "transformer": TransformerConfig(size=4, layers=1, heads=2, context=16),
    "episodic": EpisodicConfig(size=4, heads=2, context=16),
}
KINDS = ("maml", *MEMORIES)
OBSERVATIONS, ACTIONS = 3, 2


def make(kind, seed=0, **settings):
    """A new agent whose actions depend on what it sees, not only just."""
    if kind == "maml":
        agent = gradient_agents.make_agent(seed, **{"hidden_sizes": (4,), **settings})
        head = agent.meta.theta[f"weight_{len(agent.config.hidden_sizes)}"]
    else:
        small = {"encoder_sizes": (4,), "critic": LearnedCriticConfig(sizes=(4,)), "epochs": 2, "minibatches": 2}
        config = Rl2Config(memory=MEMORIES[kind], **{**small, **settings})
        agent = Rl2(config, spec(OBSERVATIONS, ACTIONS, torch.device("cpu"), seed))
        head = agent.policy.head.mean[0].weight
    with torch.no_grad():
        head.mul_(50.0)
    return agent


def learned(kind, seed=0, **settings):
    """An agent that has learned once: its inputs are scaled, its log σ differ."""
    agent = make(kind, seed, **settings)
    agent.update((), iteration(agent, seed=99))
    return agent


def iteration(agent, tasks=3, rollouts=2, seed=0):
    """The K + 1 rollouts that an agent learns from."""
    if isinstance(agent, Rl2):
        return [trials(agent, tasks, rollouts, seed)]
    state, collected = agent.initial_state(tasks), []
    for k in range(agent.training_adaptation_steps + 1):
        state = agent.adapt(state, collected[-1]) if collected else state
        collected.append(gradient_agents.collect(agent, state, tasks, rollouts, 4, 10 * seed + k))
    return collected


def trials(agent, tasks=3, rollouts=2, seed=0):
    """Trials of two episodes, made step by step: the first of 3 steps terminates, the second, of 2 or 1, is cut off."""
    generator = torch.Generator().manual_seed(seed)
    shape, size = (tasks, rollouts), (tasks, rollouts, 5)
    observations = torch.randn(*size, OBSERVATIONS, generator=generator)
    final = torch.randn(*shape, 2, OBSERVATIONS, generator=generator)
    noise = torch.randn(*size, ACTIONS, generator=generator)
    steps, lengths = torch.arange(5), 5 - torch.arange(rollouts) % 2
    valid = (steps < lengths[:, None]).expand(size)
    start = ((steps == 0) | (steps == 3)).expand(size) & valid
    rewards, log_probs, actions = torch.zeros(size), torch.zeros(size), torch.zeros(*size, ACTIONS)
    last_rewards, state = torch.full(shape, torch.nan), agent.initial_state(tasks)
    for t in range(5):
        time_step = TimeStep(observations[:, :, t], last_rewards, start[..., t], valid[..., t])
        actions[:, :, t], log_probs[..., t], state = agent.act(time_step, noise[:, :, t], state)
        rewards[..., t] = last_rewards = -(actions[:, :, t] - observations[:, :, t, :ACTIONS]).square().sum(-1)
    last = valid & (steps == lengths[:, None] - 1)
    rollout = Rollout(
        observations=observations,
        final_observations=final,
        actions=actions,
        rewards=rewards,
        log_probs=log_probs,
        terminated=(steps == 2).expand(size) & valid,
        truncated=last,
        episode_start=start,
        valid=valid,
        success=torch.zeros(size),
    )
    masked = rollout.map(lambda part: part if part is final else part * (valid[..., None] if part.ndim == 4 else valid))
    return masked


def policy_of(agent):
    """The parameters of the policy: the tensors themselves."""
    return {name: value for name, value in agent.parameters().items() if name.startswith("policy.")}


def copy_of(params):
    return {name: value.detach().clone() for name, value in params.items()}


@torch.no_grad()
def disturb(agent, amount=0.1, seed=0):
    """Move all parameters a little."""
    generator = torch.Generator().manual_seed(seed)
    for value in agent.parameters().values():
        value.add_(amount * torch.randn(value.shape, generator=generator))


def gradient(loss, agent):
    """The gradient for all parameters, zeros where there is none."""
    params = agent.parameters()
    found = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    pairs = zip(params.items(), found, strict=True)
    return {name: torch.zeros_like(value) if part is None else part for (name, value), part in pairs}


def explicit_outputs(agent, rollout):
    """Mean and log σ of an agent with a memory, by a loop over steps: a list of `[A]` for each trial."""
    policy, (M, N, T) = agent.policy, rollout.valid.shape  # noqa: N806
    flat = rollout.map(lambda part: part.flatten(0, 1))
    inputs = agent.normalize(agent._read(rollout).inputs)
    outputs = []
    for trial in range(M * N):
        state, steps = policy.trunk.initial(1), []
        for t in itertools.takewhile(lambda t, trial=trial: flat.valid[trial, t], range(T)):
            state = rows(state, torch.arange(1))  # in memory of its own, for the gradient
            features, state = policy.trunk.step(inputs[trial, t][None], state)
            mean, log_std = policy.head(features).parameters().values()
            steps.append((mean[0], log_std[0]))
        outputs.append(steps)
    return outputs
