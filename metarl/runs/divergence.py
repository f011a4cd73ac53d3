"""Statistics of batch, parameters and gradient, written when a run diverges."""

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
    """Return the names of the tensors that hold NaN or infinity."""
    return [name for name, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]


def write_statistics(
    run_dir: Path, position: Position, error: Exception, agent: Agent, rollouts: Sequence[Rollout]
) -> Path:
    """Write `diverged.json`: why a run stops, and the statistics of the batch at which it did.

    Args:
        run_dir: of the run.
        position: after the iteration that was undone.
        error: what was raised.
        agent: its parameters as they were before that iteration; the gradient is the one that was not applied.
        rollouts: of the iteration; none if they could not be collected.
    """
    gradients = {name: value.grad for name, value in agent.parameters().items() if value.grad is not None}
    told = {
        "error": str(error),
        "position": asdict(position),
        "rollouts": [rollout_stats(rollout) for rollout in rollouts],
        "parameters": {name: tensor_stats(value) for name, value in agent.parameters().items()},
        "gradients": {name: tensor_stats(value) for name, value in gradients.items()},
    }
    path = run_dir / DIVERGED
    replace_file(path, (json.dumps(told, indent=2, allow_nan=False) + "\n").encode())
    return path


def rollout_stats(rollout: Rollout) -> dict[str, Any]:
    """Return figures of each field over the valid steps, and of each task its returns; null: not a finite number."""
    values = {field.name: getattr(rollout, field.name)[rollout.valid] for field in fields(rollout)}
    returns = rollout.episode_returns()
    tasks = [
        {"dropped_rollouts": int((~valid.any(-1)).sum()), "mean_return": _number(returns[task].nanmean())}
        for task, valid in enumerate(rollout.valid)
    ]
    told: dict[str, Any] = {name: tensor_stats(value) for name, value in values.items() if value.is_floating_point()}
    counts = {name: int(values[name].sum()) for name in ("terminated", "truncated", "episode_start")}
    return {"env_steps": rollout.env_steps, **counts, **told, "tasks": tasks}


@torch.no_grad()
def tensor_stats(tensor: Tensor) -> dict[str, float | int | None]:
    """Return how many numbers a tensor holds, how many are not finite, and what the others are like."""
    finite = tensor[tensor.isfinite()].double()
    figures = {"min": finite.min(), "max": finite.max(), "mean": finite.mean()} if len(finite) else {}
    if len(finite):
        figures["std"] = finite.std(correction=0)
    measured = {name: _number(value) for name, value in figures.items()}
    return {"count": tensor.numel(), "not_finite": tensor.numel() - len(finite), **measured}


def _number(value: Tensor) -> float | None:
    return float(value) if math.isfinite(float(value)) else None
