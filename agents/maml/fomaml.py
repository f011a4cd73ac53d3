"""FOMAML: first-order MAML (Finn et al. 2017, 5.2; Nichol et al. 2018, Sec. 2).

    θ_i^{k+1} = θ_i^k − α g_i^k,   g_i^k = ∇ L(θ_i^k; D_i^k)        the inner steps of MAML
    ∇_θ J ≈ mean_i ∇ L_outer(θ_i^K; D_i^K)                          taken AT θ_i^K, applied to θ

The inner gradients g count as constants, so that dθ_i^K / dθ = I: no second derivatives, about half the time.
"""

from __future__ import annotations

import functools
from typing import Literal

from pydantic import Field

from metarl.agents.maml.agent import GradientAgentConfig
from metarl.agents.maml.maml import Maml


class FomamlConfig(GradientAgentConfig):
    """First-order MAML: the gradient at the adapted parameters is applied to θ, without second derivatives."""

    name: Literal["fomaml"] = "fomaml"
    estimator: Literal["lvc"] = Field("lvc", description="surrogate; to first order they are all the same")


Fomaml = functools.partial(Maml, second_order=False)
"""θ' = θ − α stop_grad(∇L(θ))."""
