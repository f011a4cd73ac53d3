"""Conjugate gradient on named tensors: for TRPO's natural gradient and iMAML's implicit one. Imports no agent."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metarl.nn.mlp import Params

TOLERANCE = 1e-10
"""A residual whose square has fallen to this fraction is solved: further steps would only add rounding."""


def dot(left: Params, right: Params, stacked: bool = False) -> Tensor:
    """Inner product over all entries: scalar, or `[M]` if every tensor is stacked `[M, ...]`."""
    parts = [left[name] * right[name] for name in left]
    if stacked:
        return torch.stack([part.flatten(1).sum(-1) for part in parts]).sum(0)
    return torch.stack([part.sum() for part in parts]).sum()


def conjugate_gradient(
    product: Callable[[Params], Params], target: Params, iterations: int, stacked: bool = False
) -> Params:
    """Solve A x = b for a symmetric A that is given by its products (Hestenes & Stiefel 1952).

    Where A turns out not to be positive along a direction, the solution so far is kept; b itself, if that is the first
    direction (truncated Newton, Nocedal & Wright 2006, Alg. 7.1).

    Args:
        product: v → A v.
        target: b.
        iterations: at most; as many as there are dimensions give the exact solution.
        stacked: whether there are M independent systems, one for each entry of the tensors' first dimension.

    Returns:
        x, by the names of `target`.
    """

    def along(factor: Tensor, value: Tensor) -> Tensor:
        return factor.view(-1, *[1] * (value.ndim - 1)) * value if stacked else factor * value

    solution = {name: torch.zeros_like(value) for name, value in target.items()}
    residual, direction = dict(target), dict(target)
    squared = first = dot(residual, residual, stacked)
    positive = torch.ones_like(squared)
    for iteration in range(iterations):
        image = product(direction)
        curvature = dot(direction, image, stacked)
        convex = (curvature > 0).to(squared.dtype)
        if iteration == 0:
            solution = {name: along(1.0 - convex, value) for name, value in target.items()}
        positive = positive * convex
        length = positive * squared / torch.where(curvature > 0, curvature, 1.0)
        solution = {name: value + along(length, direction[name]) for name, value in solution.items()}
        residual = {name: value - along(length, image[name]) for name, value in residual.items()}
        before, squared = squared, dot(residual, residual, stacked)
        open_ = positive * (squared > TOLERANCE * first)
        if not bool(open_.any()):
            break
        ratio = squared / torch.where(before > 0, before, 1.0)
        direction = {name: along(open_, value + along(ratio, direction[name])) for name, value in residual.items()}
    return solution
