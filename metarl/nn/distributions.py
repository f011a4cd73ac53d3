"""Distributions of actions."""

from __future__ import annotations

import math

from torch import Tensor


def gaussian_log_prob(mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
    """Log-density of a diagonal Gaussian, summed over the last dimension: `[..., A]` → `[...]`."""
    squares = ((actions - mean) * (-log_std).exp()).square()
    return -(0.5 * squares + log_std + 0.5 * math.log(2.0 * math.pi)).sum(-1)


def gaussian_kl(mean: Tensor, log_std: Tensor, other_mean: Tensor, other_log_std: Tensor) -> Tensor:
    """KL divergence of one diagonal Gaussian from another, KL(first‖other), summed over `[..., A]` → `[...]`."""
    squares = (2.0 * (log_std - other_log_std)).exp() + ((mean - other_mean) * (-other_log_std).exp()).square()
    return (other_log_std - log_std + 0.5 * (squares - 1.0)).sum(-1)
