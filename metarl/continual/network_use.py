"""How much of a policy network is in use: dormant units and effective rank, layer by layer.

Units die and representations lose rank as a network trains on one stage after another, and it learns less: the loss of
plasticity. These measures read the state of the network; `metarl.continual.metrics` reads scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from metarl.protocols import ProtectedAgent
from metarl.types import FloatArray, Rollout

DORMANT_THRESHOLD = 0.025
"""τ: a unit at or below this share of its layer's mean activation is dormant (Sokar et al. 2023)."""


def network_use(agent: ProtectedAgent, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return the dormant fraction and effective rank of the policy's hidden layers, as tracked: `plasticity/<layer>/…`.

    Raises:
        ValueError: activations are NaN or infinite.
    """
    metrics = {}
    for name, activations in agent.hidden_units(rollouts).items():
        values = activations.detach().cpu().double().numpy()
        metrics[f"plasticity/{name}/dormant_fraction"] = dormant_fraction(values, DORMANT_THRESHOLD)
        metrics[f"plasticity/{name}/effective_rank"] = effective_rank(values)
    return metrics


def dormant_fraction(activations: ArrayLike, threshold: float = 0.0) -> float:
    """Fraction of a layer's units that hardly respond to any input: s_i = E|h_i| / mean_k E|h_k| ≤ τ.

    Sokar et al. 2023 (arXiv 2302.12902), Eq. 1; they use τ = 0, 0.025 and 0.1 and leave out the output layer.

    Args:
        activations: `[n, H]`, of H hidden units on n inputs, after the nonlinearity.
        threshold: τ.

    Returns:
        a fraction in [0, 1]; 1 if all activations are 0.

    Raises:
        ValueError: another shape, an empty array, NaN or infinity.
    """
    values = _samples("activations", activations)
    magnitudes = np.abs(values).mean(axis=0)
    return float((magnitudes <= threshold * magnitudes.mean()).mean())


def effective_rank(features: ArrayLike) -> float:
    """Effective number of directions that features span: exp(−Σ p_j ln p_j), p = σ / Σσ of their singular values σ.

    Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality". Features are not centred.

    Args:
        features: `[n, H]`, of H units on n inputs.

    Returns:
        a number in [1, min(n, H)]; 0 if all features are 0.

    Raises:
        ValueError: another shape, an empty array, NaN or infinity.
    """
    singular = np.linalg.svd(_samples("features", features), compute_uv=False)
    singular = singular[singular > 0.0]
    if not len(singular):
        return 0.0
    shares = singular / singular.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _samples(name: str, values: ArrayLike) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"{name} has shape {array.shape}; expected [n, H], n inputs and H units, both at least 1")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} contains NaN or infinity; the network has diverged")
    return array
