"""Discounted returns, GAE, V-trace, the linear feature baseline, advantage normalisation: pure functions on tensors.

All of them take `[..., T]` tensors of complete episodes laid end to end; an episode ends where it terminated or was
truncated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metarl.types import Rollout


def discounted_returns(rewards: Tensor, last: Tensor, gamma: float) -> Tensor:
    """Sum of discounted rewards to the end of the episode, nothing after it.

    Args:
        rewards: `[..., T]`.
        last: `[..., T]`, bool: the last step of an episode, terminated or truncated.
        gamma: discount.

    Returns:
        `[..., T]`: R_t = r_t + gamma · R_{t+1}, with R_{t+1} = 0 after a last step.
    """
    going_on = gamma * (~last).to(rewards.dtype)
    returns, following = torch.empty_like(rewards), torch.zeros_like(rewards[..., 0])
    for t in range(rewards.shape[-1] - 1, -1, -1):
        following = rewards[..., t] + going_on[..., t] * following
        returns[..., t] = following
    return returns


def return_scale(rollout: Rollout, gamma: float) -> Tensor:
    """Return the standard deviation of the discounted returns of all steps of a rollout, a scalar, at least 1e-6."""
    returns = discounted_returns(rollout.rewards, rollout.terminated | rollout.truncated, gamma)
    return returns[rollout.valid].std(correction=0).clamp_min(1e-6)


def time_in_episode(episode_start: Tensor) -> Tensor:
    """Return the step of the episode that each step is, from 0, `[..., T]`.

    Args:
        episode_start: `[..., T]`, bool: the first step of an episode.
    """
    steps = torch.arange(episode_start.shape[-1], device=episode_start.device).expand(episode_start.shape)
    return steps - torch.where(episode_start, steps, 0).cummax(-1).values


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016, Eq. 16).

    A termination is followed by nothing; a truncation is followed by `next_values`, the value of the true last
    observation.

    Args:
        rewards: `[..., T]`.
        values: `[..., T]`, V(s_t).
        next_values: `[..., T]`, V of the observation after step t.
        terminated: `[..., T]`, bool.
        truncated: `[..., T]`, bool.
        gamma: discount.
        gae_lambda: 0 gives one-step temporal differences, 1 Monte-Carlo returns.

    Returns:
        Advantages `[..., T]`.
    """
    deltas = rewards + gamma * next_values * (~terminated).to(rewards.dtype) - values
    return discounted_returns(deltas, terminated | truncated, gamma * gae_lambda)


def vtrace(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    log_ratios: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    """V-trace with both clips at 1 (Espeholt et al. 2018, Eq. 1): what data of an older policy says of the present one.

    Where the policies agree, the targets are the returns of the data, bootstrapped where an episode was truncated.

    Args:
        rewards: `[..., T]`.
        values: `[..., T]`, V(s_t).
        next_values: `[..., T]`, V of the observation after step t.
        log_ratios: `[..., T]`, log π − log π_old of the actions.
        terminated: `[..., T]`, bool.
        truncated: `[..., T]`, bool.
        gamma: discount.

    Returns:
        Targets of the value function and advantages for the policy gradient ρ_t (r_t + γ v_{t+1} − V_t), `[..., T]`.
    """
    ratios = log_ratios.exp().clamp(max=1.0)
    last = terminated | truncated
    following = next_values * ~terminated
    deltas = ratios * (rewards + gamma * following - values)
    going_on = gamma * ratios * ~last
    corrections, correction = torch.empty_like(deltas), torch.zeros_like(deltas[..., 0])
    for t in range(deltas.shape[-1] - 1, -1, -1):
        correction = deltas[..., t] + going_on[..., t] * correction
        corrections[..., t] = correction
    targets = values + corrections
    later = torch.nn.functional.pad(targets[..., 1:], (0, 1))
    return targets, ratios * (rewards + gamma * torch.where(last, following, later) - values)


def linear_baseline(observations: Tensor, returns: Tensor, time: Tensor, valid: Tensor, ridge: float = 1e-5) -> Tensor:
    """Fit returns by a linear function of [o, o², t, t², t³, 1], one fit a task (Duan et al. 2016).

    Solved in float64. The features grow with the time left, so that the fit is the value in a FINITE horizon: what it
    says after the last step is 0, and nothing is bootstrapped.

    Args:
        observations: `[M, S, O]`, normalised; clipped to ±10 here.
        returns: `[M, S]`.
        time: `[M, S]`, step within the episode.
        valid: `[M, S]`, bool; other samples carry no weight.
        ridge: penalty on the coefficients, a fraction of the mean diagonal of the normal equations.

    Returns:
        Fitted values `[M, S]` in the dtype of `returns`; 0 where not valid.
    """
    o = observations.double().clamp(-10.0, 10.0)
    # At most 1: the powers of a longer time would dominate the diagonal, and the ridge shrink all else away.
    longest = (time * valid).amax(-1, keepdim=True).clamp_min(100)
    t = (time.double() / longest).unsqueeze(-1)
    features = torch.cat([o, o * o, t, t * t, t * t * t, torch.ones_like(t)], dim=-1) * valid.unsqueeze(-1)
    gram = features.mT @ features
    diagonal = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    targets = features.mT @ returns.double().unsqueeze(-1)
    # Not by LU: batched, from about 200 features on, it fails in several threads of some builds of PyTorch.
    coefficients = torch.cholesky_solve(targets, torch.linalg.cholesky(gram + (ridge * diagonal + 1e-12) * eye))
    values: Tensor = (features @ coefficients).squeeze(-1)
    return values.to(returns.dtype)


def normalize_advantages(advantages: Tensor, valid: Tensor, eps: float = 1e-6) -> Tensor:
    """Shift and scale advantages to mean 0 and STANDARD DEVIATION 1 within each task.

    Args:
        advantages: `[M, S]`.
        valid: `[M, S]`, bool.
        eps: eps · (1 + |mean|) is added to the deviation, so that rounding in equal advantages is not blown up.

    Returns:
        `[M, S]`, 0 where not valid.
    """
    weights = valid.to(advantages.dtype)
    count = weights.sum(-1, keepdim=True).clamp_min(1.0)
    mean = (advantages * weights).sum(-1, keepdim=True) / count
    centred = (advantages - mean) * weights
    std = (centred.square().sum(-1, keepdim=True) / count).sqrt()
    return centred / (std + eps * (1.0 + mean.abs()))
