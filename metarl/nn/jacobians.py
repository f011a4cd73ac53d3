"""How the outputs of a policy depend on its parameters, state by state: what Fisher information and MAS are made of.

Pure functions. Must not import environments, training or tracking.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from metarl.nn.mlp import MlpPolicy, Params
from metarl.types import PolicyJacobian

ROWS = 64
"""Rows of a Jacobian that are computed at once; each holds as many numbers as there are parameters."""


def choose_steps(valid: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw up to `count` of the valid steps `[S]` without replacement; returns their places, in order."""
    places = valid.nonzero().squeeze(-1).cpu()
    chosen = torch.randperm(len(places), generator=generator)[:count]
    return places[chosen].sort().values.to(valid.device)


def mlp_jacobian(policy: MlpPolicy, params: Params, observations: Tensor, prefix: str = "policy.") -> PolicyJacobian:
    """Differentiate the policy of an MLP at each of S observations separately.

    Args:
        policy: the network.
        params: its parameters.
        observations: `[S, O]`, normalised.
        prefix: of the parameters' names in the result.
    """
    params = {name: value.detach() for name, value in params.items()}
    free = {name: params[name] for name in policy.head.free_parameters}
    weights = {name: value for name, value in params.items() if name not in free}
    distribution = policy.distribution(params, observations).expanded()
    output, *others = distribution.parameters()

    def output_at(weights: Params, observation: Tensor) -> Tensor:
        return policy.distribution({**params, **weights}, observation[None]).parameters()[output][0]

    def others_at(free: Params) -> dict[str, Tensor]:
        found = policy.distribution({**params, **free}, observations[:1]).parameters()
        return {name: found[name] for name in others}

    of_output = torch.func.vmap(torch.func.jacrev(output_at), in_dims=(None, 0), chunk_size=ROWS)(weights, observations)
    slopes = {output: {prefix + name: value for name, value in of_output.items()}}
    of_others = torch.func.jacrev(others_at)(free) if free else {}
    for other, of_other in of_others.items():  # equal at all observations
        slopes[other] = {
            prefix + name: value[0].expand(len(observations), *value.shape[1:]) for name, value in of_other.items()
        }
    return PolicyJacobian(distribution, slopes)


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Compute recurrent networks by operations whose gradients can be batched, not by fused kernels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one on TF32, which these flags leave as it is
        with torch.backends.cudnn.flags(enabled=False), torch.backends.mkldnn.flags(enabled=False):
            yield


def jacobian(outputs: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Differentiate outputs `[S, A]` for parameters that they were computed from, however deep the computation.

    Returns:
        `[S, A, ...]` by name, without the parameters that no output depends on.
    """
    if not outputs.requires_grad:
        return {}
    flat = outputs.flatten()
    cotangents = torch.eye(len(flat), dtype=flat.dtype, device=flat.device)
    parts = [
        torch.autograd.grad(
            flat, list(params.values()), rows, retain_graph=True, is_grads_batched=True, allow_unused=True
        )
        for rows in torch.split(cotangents, ROWS)
    ]
    return {
        name: torch.cat(found).view(*outputs.shape, *params[name].shape)
        for name, found in zip(params, zip(*parts, strict=True), strict=True)
        if found[0] is not None
    }
