"""MDPs so small that all their trajectories can be listed: an expectation over them is a weighted sum, in float64.

2 steps, 3 states and 2 actions make 3 · (2 · 3)² = 108 trajectories.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from metarl.agents.maml.inner import Batch, MetaParams, PolicyLoss, inner_loop
from metarl.agents.maml.maml import Maml, MamlPpoConfig
from metarl.agents.maml.meta_objective import MetaObjective
from metarl.nn.distributions import Categorical
from metarl.rl.surrogates import ESTIMATORS, ppo_clip_loss

STATES, ACTIONS, STEPS = 3, 2, 2
ALPHA = 0.7
LOGITS = ("logits",)


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


def log_prob(params: dict[str, Tensor], observations: Tensor, actions: Tensor, perturb=None) -> Tensor:
    """The product's categorical policy: one logit a state and action; observations are one-hot states."""
    return Categorical(torch.tanh(observations @ params["logits"]), (ACTIONS,)).log_prob(actions.unsqueeze(-1))


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
                rows.append((states[t], actions[t], log_p, sum(rewards[t:]), weight, t))
    state, action, old, advantage, weight, step = (
        torch.tensor([float(r[i]) for r in rows], dtype=torch.float64) for i in range(6)
    )
    return Batch(torch.eye(STATES, dtype=torch.float64)[state.long()], action, old, advantage, weight, step.long())


def stack(batches: list[Batch]) -> Batch:
    return Batch(*(torch.stack(part) for part in zip(*batches, strict=True)))


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


def exact_meta_gradient(mdp: Mdp, theta: Tensor, steps: int) -> Tensor:
    """Finite differences of the exact return after K steps of exact gradient ascent."""
    return central_differences(lambda x: exact_return(mdp, exact_adapted(mdp, x, steps)).detach(), theta)


def make_objective(mdps: list[Mdp], theta: Tensor, method, estimator: str = "lvc", steps: int = 1):
    """The product's objective when the data are all trajectories, weighted by their probabilities; and its leaf."""
    params = {"logits": theta.detach().clone().requires_grad_()}
    meta, loss = MetaParams(params, method.learned(params)), PolicyLoss(log_prob, ESTIMATORS[estimator])
    phases = []
    for mdp in mdps:
        supports, adapted = [], params
        for _ in range(steps):
            supports.append(enumerate_batch(mdp, adapted["logits"]))
            adapted = inner_loop(method, loss, meta, supports)[-1]
        phases.append([*supports, enumerate_batch(mdp, adapted["logits"])])
    batches = [stack(list(phase)) for phase in zip(*phases, strict=True)]
    return MetaObjective(method, loss, log_prob, meta, batches, width=8), params["logits"]


def clipped(log_probs: Tensor, batch: Batch):
    return ppo_clip_loss(log_probs, batch.log_probs, batch.advantages, batch.weights, 0.2)


def maml(inner_lr: float = ALPHA) -> Maml:
    return Maml(MamlPpoConfig(inner_lr=inner_lr), LOGITS)


def expected_meta_gradient(mdp: Mdp, theta: Tensor, steps: int, estimator: str = "lvc", method=None) -> Tensor:
    """The product's meta-gradient of the return, an expectation over all data."""
    objective, leaf = make_objective([mdp], theta, method or maml(), estimator, steps)
    objective.backward(clipped)
    return -leaf.grad * STEPS


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def make_theta() -> Tensor:
    return torch.randn(STATES, ACTIONS, generator=torch.Generator().manual_seed(7), dtype=torch.float64) * 0.5
