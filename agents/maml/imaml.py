"""iMAML, implicit MAML (Rajeswaran et al. 2019): the meta-gradient of where a descent ENDS, not of the way there.

    φ_i = argmin_φ L(φ; D_i) + λ/2 ‖φ − θ‖²                          the proximal inner problem
    dφ_i/dθ = (I + ∇²L(φ_i; D_i) / λ)⁻¹                              at its solution (their Lemma 1)
    ∇_θ J = mean_i (I + ∇²L(φ_i) / λ)⁻¹ ∇ L_outer(φ_i; D_i')         solved by conjugate gradient (their Alg. 2)

The memory does not grow with the number of gradient steps. Here each of the K phases of fresh data takes
`gradient_steps` descents on the proximal problem, anchored at θ throughout; the Hessian is that of the last phase. The
surrogate's Hessian need not be positive: conjugate gradient stops where it is not. Of parameters b that do not adapt
the solution depends by dφ/dθ_b = −(λI + ∇²_aa L)⁻¹ ∇²_ab L. With too few `cg_iterations` all of this is approximate,
the Fisher information that TRPO sees included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from metarl.agents.maml.agent import GradientAgentConfig
from metarl.agents.maml.inner import Loss, MetaParams, OuterPhases, gradients
from metarl.nn.conjugate_gradient import conjugate_gradient
from metarl.nn.mlp import Params


class ImamlConfig(GradientAgentConfig):
    """iMAML: a proximal inner problem, differentiated implicitly at its solution by conjugate gradient."""

    name: Literal["imaml"] = "imaml"
    proximal: float = Field(2.0, gt=0, description="λ, how strongly a task's parameters are held near θ")
    gradient_steps: int = Field(5, ge=1, description="descents of step size inner_lr on the data of each phase")
    cg_iterations: int = Field(10, ge=1, description="steps of conjugate gradient for the meta-gradient")


@dataclass(frozen=True)
class Imaml:
    """φ near the solution of the proximal problem, with the derivative of the solution."""

    config: ImamlConfig
    adapted: tuple[str, ...]
    outer_phases: ClassVar[OuterPhases] = "last"

    def learned(self, theta: Params) -> Params:
        """Return nothing: θ is all that is learned."""
        return {}

    def step(self, loss: Loss, meta: MetaParams, params: Params, batch: Any, create_graph: bool) -> Params:
        """Descend from `params`; differentiated for θ as if this phase were solved. See `InnerMethod.step`."""
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
        shared = tuple(name for name in meta.theta if name not in self.adapted)
        problem = _Problem(loss, solution, self.adapted, shared, batch, config)
        attached = _Implicit.apply(  # type: ignore[no-untyped-call]
            problem, *(meta.theta[name] for name in (*self.adapted, *shared))
        )
        return meta.theta | dict(zip(self.adapted, attached, strict=True))


@dataclass(frozen=True)
class _Problem:
    """A solved proximal problem: φ of the adapted parameters a, given the shared ones b."""

    loss: Loss
    solution: Params
    adapted: tuple[str, ...]
    shared: tuple[str, ...]
    batch: Any
    config: ImamlConfig

    @torch.enable_grad()
    def _gradient(self) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, ...], bool]:
        """Return the adapted and the shared parameters, ∇_a L at the solution, and whether tasks are stacked."""
        leaves = {name: value.detach().requires_grad_() for name, value in self.solution.items()}
        value = self.loss(leaves, self.batch)
        adapted, shared = ([leaves[name] for name in names] for names in (self.adapted, self.shared))
        return adapted, shared, torch.autograd.grad(value.sum(), adapted, create_graph=True), value.ndim > 0

    def solve(self, vectors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return (I + ∇²_aa L / λ)⁻¹ v, for each task by itself."""
        adapted, _, gradient, stacked = self._gradient()

        def product(vector: Params) -> Params:
            second = torch.autograd.grad(gradient, adapted, list(vector.values()), retain_graph=True)
            return {
                name: value + part / self.config.proximal
                for (name, value), part in zip(vector.items(), second, strict=True)
            }

        target = dict(zip(self.adapted, (vector.detach() for vector in vectors), strict=True))
        return tuple(conjugate_gradient(product, target, self.config.cg_iterations, stacked).values())

    def through_shared(self, solved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return −∇²_ba L x / λ for x = `solve(v)`: how the solution moves with the parameters that do not adapt."""
        if not self.shared:
            return ()
        _, shared, gradient, _ = self._gradient()
        with torch.enable_grad():
            cross = torch.autograd.grad(gradient, shared, solved, create_graph=True, materialize_grads=True)
        return tuple(-part / self.config.proximal for part in cross)


class _Implicit(torch.autograd.Function):
    """Returns φ; hands its gradient to θ as Lemma 1 says, for adapted and shared parameters."""

    @staticmethod
    def forward(ctx: Any, problem: _Problem, *theta: Tensor) -> tuple[Tensor, ...]:
        ctx.problem = problem
        return tuple(problem.solution[name].clone() for name in problem.adapted)

    @staticmethod
    def backward(ctx: Any, *vectors: Tensor) -> tuple[Tensor | None, ...]:
        solved = _Solved.apply(ctx.problem, *vectors)  # type: ignore[no-untyped-call]
        return (None, *solved, *ctx.problem.through_shared(solved))


class _Solved(torch.autograd.Function):
    """Solves the linear system; the solver is symmetric, so that it is its own derivative (TRPO asks for it)."""

    @staticmethod
    def forward(ctx: Any, problem: _Problem, *vectors: Tensor) -> tuple[Tensor, ...]:
        ctx.problem = problem
        return problem.solve(vectors)

    @staticmethod
    def backward(ctx: Any, *vectors: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *_Solved.apply(ctx.problem, *vectors))  # type: ignore[no-untyped-call]
