"""The outer objective as a function of the meta-parameters: its value, its gradient, its Fisher information.

For tasks i = 1..M, with θ_i^0 = θ and θ_i^{k+1} the inner step of the method from θ_i^k on the support data D_i^k:

    J(θ) = mean_i [ L_outer(θ_i^K; D_i^K) + η Σ_k KL(collecting ‖ θ_i^k) ] + auxiliary loss

The adaptation is recomputed from the CURRENT θ each time. All tasks of a chunk are one batched computation; chunks
bound the memory for any number of tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from metarl.agents.maml.inner import Batch, InnerMethod, LogProb, Loss, MetaParams, inner_loop
from metarl.nn.conjugate_gradient import dot
from metarl.nn.mlp import Params
from metarl.protocols import AuxiliaryLoss
from metarl.rl.surrogates import approximate_kl

CPU_CHUNK_BYTES = 2_500_000
"""Bytes of one layer's activations in a chunk of tasks on a CPU: it should stay in the cache (measured with
`scripts/benchmarks/bench_meta_update.py`)."""

GPU_CHUNK_FRACTION = 0.01
"""The same on a GPU, as a fraction of the memory that counts: an update holds about forty times as much."""

FISHER_SHARE = 3
"""A Fisher-vector product holds about this many times the memory of a gradient."""


def chunk_bytes(device: torch.device) -> int:
    """Return how large one layer's activations may be in a chunk of tasks.

    Half of a GPU's memory counts if as much is free, else a quarter, and so on. What an earlier iteration has
    left in PyTorch's cache counts as free, so that a resumed run cuts the same chunks as an uninterrupted one and adds
    up in the same order.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(GPU_CHUNK_FRACTION * total / 2 ** math.ceil(math.log2(total / max(free, 1))))
    return CPU_CHUNK_BYTES


def _numbers(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """Return scalars as numbers, all at once: each transfer would wait for the GPU."""
    return dict(zip(scalars, torch.stack(list(scalars.values())).tolist(), strict=True))


Surrogate = Callable[[Tensor, Batch], tuple[Tensor, Tensor]]
"""An outer loss: (log-probs of the adapted policy, data) → loss and fraction of clipped samples, scalars or `[M]`."""


class MetaObjective:
    """The outer objective of one iteration.

    Args:
        method: how a task adapts.
        loss: what the inner steps descend.
        log_prob: of the policy.
        meta: the meta-parameters; those that require a gradient are trained.
        batches: K support batches and the query batch, all `[M, S, ...]`.
        width: numbers of the widest layer a sample, which sets how many tasks a chunk holds.
        auxiliary_loss: adds to the objective what protects earlier stages.
        penalty: adds to a task's outer loss, (adapted parameters, data) → scalar or `[M]`.
    """

    def __init__(
        self,
        method: InnerMethod,
        loss: Loss,
        log_prob: LogProb,
        meta: MetaParams,
        batches: Sequence[Batch],
        width: int,
        auxiliary_loss: AuxiliaryLoss | None = None,
        penalty: Callable[[Params, Batch], Tensor] | None = None,
    ) -> None:
        self._method, self._loss, self._log_prob, self._meta, self._batches = method, loss, log_prob, meta, batches
        self._guard, self._penalty = auxiliary_loss, penalty
        self.num_tasks, samples = batches[-1].weights.shape
        self._chunk = max(1, chunk_bytes(batches[-1].weights.device) // (4 * samples * width))
        self._outer_phases = range(0 if method.outer_phases == "all" else len(batches) - 1, len(batches))

    def _chunks(self, create_graph: bool = True, share: int = 1) -> Iterator[tuple[list[Params], list[Batch]]]:
        """Adapt chunk by chunk; yields θ⁰..θᴷ and the K + 1 batches. A task by itself has no task dimension."""
        chunk = max(1, self._chunk // share)
        for start in range(0, self.num_tasks, chunk):
            count = min(chunk, self.num_tasks - start)
            which = slice(start, start + count) if count > 1 else start
            batches, meta = [batch.tasks(which) for batch in self._batches], self._meta
            if count > 1:
                stacked = {name: value.expand(count, *value.shape) for name, value in meta.theta.items()}
                meta = meta._replace(theta=stacked)
            yield inner_loop(self._method, self._loss, meta, batches[:-1], create_graph), batches

    def backward(self, surrogate: Surrogate, inner_kl_coef: float = 0.0) -> dict[str, float]:
        """Add the gradient of J to that of the meta-parameters.

        Args:
            surrogate: the outer loss.
            inner_kl_coef: η.

        Returns:
            Means over tasks: `loss`, `kl` of the collecting policies from the current ones, `clip_fraction`.
        """
        totals: dict[str, Tensor] = {}
        for path, batches in self._chunks():
            loss = torch.zeros((), device=batches[-1].weights.device)
            for k, (params, batch) in enumerate(zip(path, batches, strict=True)):
                penalised = inner_kl_coef > 0 and k < len(path) - 1
                if k not in self._outer_phases and not penalised:
                    continue
                log_probs = self._log_prob(params, batch.observations, batch.actions)
                kl = approximate_kl(log_probs, batch.log_probs, batch.weights)
                if penalised:
                    loss = loss + inner_kl_coef * kl
                if k in self._outer_phases:
                    outer, clip_fraction = surrogate(log_probs, batch)
                    loss = loss + outer + self._penalised(params, batch)
                    self._add(totals, kl=kl, clip_fraction=clip_fraction)
            (loss.sum() / self.num_tasks).backward()  # type: ignore[no-untyped-call]
            self._add(totals, loss=loss * len(self._outer_phases))
        kept = self._guard(1.0) if self._guard is not None else None
        if kept is not None:
            kept.backward()  # type: ignore[no-untyped-call]
            totals["loss"] = totals["loss"] + kept.detach()
        return _numbers(totals)

    def measure(self, surrogate: Surrogate) -> dict[str, float]:
        """Return `loss` without η, `kl` and `clip_fraction` as `backward` did, and leave all gradients alone."""
        totals: dict[str, Tensor] = {}
        for path, batches in self._chunks(create_graph=False):
            with torch.no_grad():
                for k in self._outer_phases:
                    log_probs = self._log_prob(path[k], batches[k].observations, batches[k].actions)
                    loss, clip_fraction = surrogate(log_probs, batches[k])
                    loss = loss + self._penalised(path[k], batches[k])
                    kl = approximate_kl(log_probs, batches[k].log_probs, batches[k].weights)
                    self._add(totals, loss=loss * len(self._outer_phases), kl=kl, clip_fraction=clip_fraction)
        kept = self._guard(1.0, again=True) if self._guard is not None else None
        if kept is not None:
            totals["loss"] = totals["loss"] + kept.detach()
        return _numbers(totals)

    def _penalised(self, params: Params, batch: Batch) -> Tensor | float:
        return 0.0 if self._penalty is None else self._penalty(params, batch)

    def _add(self, totals: dict[str, Tensor], **values: Tensor) -> None:
        """Add a chunk's part of means over tasks and phases."""
        for name, value in values.items():
            part = value.detach().sum() / (self.num_tasks * len(self._outer_phases))
            totals[name] = totals[name] + part if name in totals else part

    def fisher_product(self, vector: Params) -> Params:
        """Multiply the Fisher information of the adapted policies, as a function of the meta-parameters, by a vector.

        F = mean over tasks of Jᵀ E[∇log π ∇log πᵀ] J with J the derivative of θ_i^K: the Hessian of the mean KL where
        the policies are those that collected. The expectation is that over the samples.

        Args:
            vector: by the names of `MetaParams.named`, only what is trained.

        Returns:
            F v, by the same names.
        """
        trained = self._meta.named()
        leaves = [trained[name] for name in vector]
        product = {name: torch.zeros_like(value) for name, value in vector.items()}
        for path, batches in self._chunks(share=FISHER_SHARE):
            phases = [(path[k], batches[k]) for k in self._outer_phases]
            outputs = [self._log_prob(params, batch.observations, batch.actions) for params, batch in phases]
            # J v by differentiating wᵀJ, which is linear in w: two passes backward make one forward.
            cotangents = [torch.zeros_like(output, requires_grad=True) for output in outputs]
            pulled = torch.autograd.grad(outputs, leaves, cotangents, create_graph=True, materialize_grads=True)
            along = dot(dict(zip(vector, pulled, strict=True)), vector)
            pushed = torch.autograd.grad(along, cotangents, retain_graph=True)
            scaled = [
                part * batch.weights / batch.weights.sum(-1, keepdim=True).clamp_min(1e-12)
                for part, (_, batch) in zip(pushed, phases, strict=True)
            ]
            parts = torch.autograd.grad(outputs, leaves, scaled, materialize_grads=True)
            for name, part in zip(vector, parts, strict=True):
                product[name] += part / (self.num_tasks * len(phases))
        return product
