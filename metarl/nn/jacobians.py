"""How the outputs of a policy depend on its parameters, state by state: what Fisher information and MAS are made of.

Pure functions. Must not import environments, training or tracking.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from metarl.nn.mlp import GaussianMlp, Params
from metarl.types import PolicyJacobian

ROWS = 64
"""Rows of a Jacobian that are computed at once; each holds as many numbers as there are parameters."""


def choose_steps(valid: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw up to `count` of the valid steps `[S]` without replacement; returns their places, in order."""
    places = valid.nonzero().squeeze(-1).cpu()
    chosen = torch.randperm(len(places), generator=generator)[:count]
    return places[chosen].sort().values.to(valid.device)


def mlp_jacobian(policy: GaussianMlp, params: Params, observations: Tensor, prefix: str = "policy.") -> PolicyJacobian:
    """Differentiate a Gaussian MLP at each of S observations by itself.

    Args:
        policy: the network.
        params: its parameters.
        observations: `[S, O]`, normalised.
        prefix: of the parameters' names in the result.
    """
    params = {name: value.detach() for name, value in params.items()}
    moving = {name: value for name, value in params.items() if name != "log_std"}

    def mean_of(moving: Params, observation: Tensor) -> Tensor:
        return policy.distribution({**params, **moving}, observation[None])[0][0]

    of_mean = torch.func.vmap(torch.func.jacrev(mean_of), in_dims=(None, 0), chunk_size=ROWS)(moving, observations)
    mean, log_std = policy.distribution(params, observations)
    bound = torch.func.jacrev(lambda log_std: policy.distribution({**params, "log_std": log_std}, observations[:1])[1])
    of_log_std = bound(params["log_std"])[0].expand(len(observations), -1, -1)
    return PolicyJacobian(
        mean,
        log_std.expand_as(mean),
        {prefix + name: value for name, value in of_mean.items()},
        {prefix + "log_std": of_log_std},
    )


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
