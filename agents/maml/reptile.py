"""Reptile (Nichol et al. 2018, Alg. 2): move θ towards where each task's descent leads.

    θ_i^{k+1} = θ_i^k − α g_i^k,   g_i^k = ∇ L(θ_i^k; D_i^k),   k = 0..K
    θ ← θ + ε mean_i (θ_i^{K+1} − θ)

The displacement is −α Σ_k g_i^k: the sum of the gradients at ALL points of the descent, where FOMAML takes the last one
alone. So it is computed as that: the outer loss sums over all K + 1 phases, the query data being the last of them, and
the inner gradients count as constants. With a likelihood-ratio surrogate (`outer: {name: gradient}`) the meta-gradient
is (θ − θ_i^{K+1}) / α exactly, and SGD makes the paper's step with ε = lr / α where max_grad_norm does not bind. With
PPO the first epoch follows the same direction; later ones recompute the descent from the current θ.

Without the query phase, K = 1 would be training on all tasks at once (their Sec. 3): with it, K = 1 is not.
"""

from __future__ import annotations

import functools
from typing import Literal

from pydantic import Field

from metarl.agents.maml.agent import GradientAgentConfig
from metarl.agents.maml.maml import Maml


class ReptileConfig(GradientAgentConfig):
    """Reptile: θ moves towards the parameters that K + 1 steps of descent lead to; first order."""

    name: Literal["reptile"] = "reptile"
    estimator: Literal["lvc"] = Field("lvc", description="surrogate; to first order they are all the same")


Reptile = functools.partial(Maml, second_order=False, outer_phases="all")
"""The steps of FOMAML, the outer loss of all phases."""
