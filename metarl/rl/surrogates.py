"""Surrogate losses (PPO clip, LVC, DiCE): pure functions of log-probabilities and advantages.

Every loss is a weighted mean over its own samples, so that the step it causes does not depend on how many tasks or
samples are processed together. Weights are 1 for a valid sample and 0 for padding; any non-negative weights work, for
instance the probabilities of enumerated trajectories.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Return Σ w·v / Σ w over the last dimension; 0 if all weights are 0."""
    return (values * weights).sum(-1) / weights.sum(-1).clamp_min(1e-12)


def _log_ratio(log_probs: Tensor, old_log_probs: Tensor, weights: Tensor) -> Tensor:
    """Return log π − log π_old, 0 for samples without weight: in padding it is meaningless and could overflow."""
    return torch.where(weights > 0, log_probs - old_log_probs, 0.0)


def likelihood_ratio_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, weights: Tensor, steps: Tensor | None = None
) -> Tensor:
    """Minus the likelihood-ratio (LVC) surrogate, −E[π_θ(a|s)/π_old(a|s) · A] (Rothfuss et al. 2019, "LVC").

    `old_log_probs` are those recorded when the data was collected. In the first epoch θ is the parameter that
    collected, the ratio is 1 and the surrogate is LVC itself; in later epochs the ratio also corrects for the data
    being older than θ, as in ProMP. Unlike −log π · A, its second derivative is right: it holds ∇²log π + ∇log π ∇log
    πᵀ. What LVC leaves out, by design, is how the advantages of earlier steps depend on θ through later actions.

    Args:
        log_probs: `[..., S]`, under the parameters to differentiate.
        old_log_probs: `[..., S]`, constants.
        advantages: `[..., S]`, constants.
        weights: `[..., S]`, constants.
        steps: not used: the loss takes every sample by itself.

    Returns:
        The loss, `[...]`.
    """
    return -weighted_mean(_log_ratio(log_probs, old_log_probs, weights).exp() * advantages, weights)


def dice_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, weights: Tensor, steps: Tensor) -> Tensor:
    """Minus the Loaded DiCE surrogate, −E[Σ_t A_t (□_{≤t} − □_{<t})] (Farquhar et al. 2019).

    □_{≤t} = exp(w − stop_grad(w)) with w the sum of log π over the episode's steps up to t, so that the value is 0 and
    every derivative is that of the expectation. With A the returns to go, the sum telescopes to DiCE, Σ_t r_t □_{≤t}
    (Foerster et al. 2018). Unlike LVC it holds how later states and rewards depend on earlier actions; the price is
    variance, which grows with the horizon. For data older than θ each term is multiplied by the constant ratio
    stop_grad(π_θ/π_old) of its step, so that the first derivative is that of the likelihood-ratio surrogate.

    Args:
        log_probs: `[..., S]`, under the parameters to differentiate; episodes end to end.
        old_log_probs: `[..., S]`, constants.
        advantages: `[..., S]`, constants.
        weights: `[..., S]`, constants.
        steps: `[..., S]`, integers: the step of each sample within its episode.

    Returns:
        The loss, `[...]`.
    """
    ratio = _log_ratio(log_probs.detach(), old_log_probs, weights).exp()
    change = _log_ratio(log_probs, log_probs.detach(), weights)  # 0, with the gradient of log π
    through = change.cumsum(-1)
    before = through - change
    start = torch.arange(steps.shape[-1], device=steps.device) - steps
    earlier_episodes = before.gather(-1, start)
    boxes = (through - earlier_episodes).exp() - (before - earlier_episodes).exp()
    return -weighted_mean(ratio * boxes * advantages, weights)


def score_function_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, weights: Tensor, steps: Tensor | None = None
) -> Tensor:
    """Minus the plain score-function surrogate, −E[log π · A] (Williams 1992): BIASED to second order.

    Its gradient is right, its Hessian lacks ∇log π ∇log πᵀ: the mistake of the first published MAML code, here to be
    compared with. Data older than θ is not corrected for.

    Args:
        log_probs: `[..., S]`, under the parameters to differentiate.
        old_log_probs: not used.
        advantages: `[..., S]`, constants.
        weights: `[..., S]`, constants.
        steps: not used.

    Returns:
        The loss, `[...]`.
    """
    return -weighted_mean(torch.where(weights > 0, log_probs, 0.0) * advantages, weights)


Estimator = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""An inner loss: (log_probs, old_log_probs, advantages, weights, steps) → `[...]`."""

ESTIMATORS: dict[str, Estimator] = {
    "lvc": likelihood_ratio_loss,
    "dice": dice_loss,
    "score_function": score_function_loss,
}


def ppo_clip_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, weights: Tensor, clip_eps: float
) -> tuple[Tensor, Tensor]:
    """Minus the clipped surrogate of PPO (Schulman et al. 2017, Eq. 7).

    Args:
        log_probs: `[..., S]`, under the parameters to differentiate.
        old_log_probs: `[..., S]`, constants.
        advantages: `[..., S]`, constants.
        weights: `[..., S]`, constants.
        clip_eps: ratios beyond 1 ± clip_eps bring no further gain.

    Returns:
        The loss `[...]`, and the fraction of samples whose ratio lies beyond the clip range `[...]` (no gradient).
    """
    ratio = _log_ratio(log_probs, old_log_probs, weights).exp()
    clipped = ratio.clamp(1.0 - clip_eps, 1.0 + clip_eps)
    surrogate = (ratio * advantages).minimum(clipped * advantages)
    beyond = ((ratio.detach() - 1.0).abs() > clip_eps).to(ratio.dtype)
    return -weighted_mean(surrogate, weights), weighted_mean(beyond, weights)


def approximate_kl(log_probs: Tensor, old_log_probs: Tensor, weights: Tensor) -> Tensor:
    """Estimate KL(π_old‖π) from samples, never negative: E_old[r − 1 − log r] (Schulman 2020, "Approximating KL").

    Args:
        log_probs: `[..., S]`.
        old_log_probs: `[..., S]`, of the policy that drew the samples.
        weights: `[..., S]`.

    Returns:
        `[...]`; differentiable with respect to `log_probs`.
    """
    log_ratio = _log_ratio(log_probs, old_log_probs, weights)
    return weighted_mean(log_ratio.exp() - 1.0 - log_ratio, weights)
