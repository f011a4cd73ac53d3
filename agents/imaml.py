"""iMAML, implicit MAML (Rajeswaran et al. 2019): the meta-gradient of where a descent ENDS, not of the way there.

    φ_i = argmin_φ L(φ; D_i) + λ/2 ‖φ − θ‖²                          the proximal inner problem (their Eq. 3)
    dφ_i/dθ = (I + ∇²L(φ_i; D_i) / λ)⁻¹                              at its solution (their Lemma 1)
    ∇_θ J = mean_i (I + ∇²L(φ_i) / λ)⁻¹ ∇ L_outer(φ_i; D_i')         solved by conjugate gradient (their Alg. 2)

The memory does not grow with the number of gradient steps. Here each of the K phases of fresh data takes
`gradient_steps` descents on the proximal problem, anchored at θ throughout; the Hessian is that of the last phase. The
surrogate's Hessian need not be positive: conjugate gradient stops where it is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from metarl.agents.conjugate_gradient import conjugate_gradient
from metarl.agents.gradient_agent import GradientAgentConfig
from metarl.agents.inner import Loss, MetaParams, OuterPhases, gradients
from metarl.policies import Params


class ImamlConfig(GradientAgentConfig):
    """iMAML: a proximal inner problem, differentiated implicitly at its solution by conjugate gradient."""

    name: Literal["imaml"] = "imaml"
    proximal: float = Field(2.0, gt=0, description="λ, how strongly a task's parameters are held near θ")
    gradient_steps: int = Field(5, ge=1, description="descents of step size inner_lr on the data of each phase")
    cg_iterations: int = Field(5, ge=1, description="steps of conjugate gradient for the meta-gradient")


@dataclass(frozen=True)
class Imaml:
    """φ near the solution of the proximal problem, with the derivative of the solution."""

    config: ImamlConfig
    adapted: tuple[str, ...]
    outer_phases: ClassVar[OuterPhases] = "last"

    def learned(self, theta: Params) -> Params:
        """Nothing beside θ."""
        return {}

    def step(self, loss: Loss, meta: MetaParams, params: Params, batch: Any, create_graph: bool) -> Params:
        """Descend from `params`; differentiated for θ as if this phase's problem were solved. See `Method.step`."""
        config = self.config
        solution = {name: params[name].detach() for name in params}
        for _ in range(config.gradient_steps):
            solution |= {name: solution[name].detach().requires_grad_() for name in self.adapted}
            gradient = gradients(loss, solution, self.adapted, batch, create_graph=False)
            for name, value in gradient.items():
                pull = config.proximal * (solution[name] - meta.theta[name])
                solution[name] = (solution[name] - config.inner_lr * (value + pull)).detach()
        if not create_graph:
            return solution
        solve = _Solve(loss, solution, self.adapted, batch, config)
        theta = [meta.theta[name] for name in self.adapted]
        attached = _Implicit.apply(  # type: ignore[no-untyped-call]
            solve, *theta, *(solution[name] for name in self.adapted)
        )
        return meta.theta | dict(zip(self.adapted, attached, strict=True))


@dataclass(frozen=True)
class _Solve:
    """v → (I + ∇²L(φ) / λ)⁻¹ v, for each task by itself."""

    loss: Loss
    solution: Params
    adapted: tuple[str, ...]
    batch: Any
    config: ImamlConfig

    @torch.enable_grad()
    def __call__(self, *vectors: Tensor) -> tuple[Tensor, ...]:
        leaves = {name: self.solution[name].detach().requires_grad_() for name in self.adapted}
        value = self.loss(self.solution | leaves, self.batch)
        gradient = torch.autograd.grad(value.sum(), list(leaves.values()), create_graph=True)

        def product(vector: Params) -> Params:
            second = torch.autograd.grad(gradient, list(leaves.values()), list(vector.values()), retain_graph=True)
            return {
                name: value + part / self.config.proximal
                for (name, value), part in zip(vector.items(), second, strict=True)
            }

        target = dict(zip(self.adapted, (vector.detach() for vector in vectors), strict=True))
        return tuple(conjugate_gradient(product, target, self.config.cg_iterations, stacked=value.ndim > 0).values())


class _Implicit(torch.autograd.Function):
    """Returns φ; hands its gradient to θ through the solver."""

    @staticmethod
    def forward(ctx: Any, solve: _Solve, *theta_and_solution: Tensor) -> tuple[Tensor, ...]:
        ctx.solve = solve
        solution = theta_and_solution[len(theta_and_solution) // 2 :]
        return tuple(value.clone() for value in solution)

    @staticmethod
    def backward(ctx: Any, *vectors: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *_Solved.apply(ctx.solve, *vectors), *[None] * len(vectors))  # type: ignore[no-untyped-call]


class _Solved(torch.autograd.Function):
    """Applies the solver; it is linear and symmetric, so that it is its own derivative (TRPO asks for it)."""

    @staticmethod
    def forward(ctx: Any, solve: _Solve, *vectors: Tensor) -> tuple[Tensor, ...]:
        ctx.solve = solve
        return solve(*vectors)

    @staticmethod
    def backward(ctx: Any, *vectors: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *_Solved.apply(ctx.solve, *vectors))  # type: ignore[no-untyped-call]
