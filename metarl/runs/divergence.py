"""Diagnostics of a run that diverges: statistics of the batch, the parameters and the gradient."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metarl.protocols import Agent
from metarl.runs.atomic_files import replace_file
from metarl.types import Position, Rollout

DIVERGED = "diverged.json"


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors that contain NaN or infinity."""
    return [name for name, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]


def write_statistics(
    run_dir: Path, position: Position, error: Exception, agent: Agent, rollouts: Sequence[Rollout]
) -> Path:
    """Write `diverged.json`: why the run stops, with statistics of the last iteration; returns its path.

    Args:
        run_dir: the run directory.
        position: after the iteration that diverged.
        error: raised in that iteration.
        agent: with the parameters before that iteration, and the gradient that was not applied.
        rollouts: of that iteration; empty if they could not be collected.
    """
    gradients = {name: value.grad for name, value in agent.parameters().items() if value.grad is not None}
    report = {
        "error": str(error),
        "position": asdict(position),
        "rollouts": [rollout_stats(rollout) for rollout in rollouts],
        "parameters": {name: tensor_stats(value) for name, value in agent.parameters().items()},
        "gradients": {name: tensor_stats(value) for name, value in gradients.items()},
    }
    path = run_dir / DIVERGED
    replace_file(path, (json.dumps(report, indent=2, allow_nan=False) + "\n").encode())
    return path


def rollout_stats(rollout: Rollout) -> dict[str, Any]:
    """Return statistics of each field over valid steps, and the mean return of each task; None if not finite."""
    values = {field.name: getattr(rollout, field.name)[rollout.valid] for field in fields(rollout)}
    returns = rollout.episode_returns()
    tasks = [
        {"dropped_rollouts": int((~valid.any(-1)).sum()), "mean_return": _finite_or_none(returns[task].nanmean())}
        for task, valid in enumerate(rollout.valid)
    ]
    stats: dict[str, Any] = {name: tensor_stats(value) for name, value in values.items() if value.is_floating_point()}
    counts = {name: int(values[name].sum()) for name in ("terminated", "truncated", "episode_start")}
    return {"env_steps": rollout.env_steps, **counts, **stats, "tasks": tasks}


@torch.no_grad()
def tensor_stats(tensor: Tensor) -> dict[str, float | int | None]:
    """Return the numbers of entries and of non-finite ones, and min, max, mean and std of the finite ones."""
    finite = tensor[tensor.isfinite()].double()
    stats = {"min": finite.min(), "max": finite.max(), "mean": finite.mean()} if len(finite) else {}
    if len(finite):
        stats["std"] = finite.std(correction=0)
    finite_stats = {name: _finite_or_none(value) for name, value in stats.items()}
    return {"count": tensor.numel(), "not_finite": tensor.numel() - len(finite), **finite_stats}


def _finite_or_none(value: Tensor) -> float | None:
    return float(value) if math.isfinite(float(value)) else None
