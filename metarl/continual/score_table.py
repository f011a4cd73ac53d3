"""The account of a sequence of stages: what is evaluated and when, the matrix of scores, and the state of the network.

`metarl.continual.metrics` has the formulas.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metarl.config.schema import StageConfig
from metarl.continual import metrics as continual
from metarl.protocols import ProtectedAgent
from metarl.runs.atomic_files import replace_file
from metarl.types import FloatArray, Rollout

DORMANT = 0.025
"""τ: a unit below this part of its layer's mean activation counts as dormant (Sokar et al. 2023)."""

Report = dict[str, Any]


class ScoreTable:
    """What became of each stage, so far.

    Args:
        stages: of the run.
        lines: of its metrics.jsonl, if it goes on.
    """

    def __init__(self, stages: Sequence[StageConfig], lines: Sequence[Mapping[str, Any]]) -> None:
        self._stages, self.names = stages, [stage.name for stage in stages]
        self._evaluations = continual.evaluations(lines, self.names)

    @property
    def empty(self) -> bool:
        """Whether nothing has been evaluated yet."""
        return not self._evaluations

    def add(self, place: Mapping[str, int], reports: Sequence[Report], finished: int) -> dict[str, float]:
        """Enter the evaluation of all stages.

        Args:
            place: `iteration`, `stage` and `env_steps`, as in metrics.jsonl.
            reports: of each stage.
            finished: stages that have been trained to their end.

        Returns:
            The scores of each stage and what follows from all of them, as they are tracked.
        """
        metrics: dict[str, float] = {}
        for stage, report in zip(self._stages, reports, strict=True):
            for phase, key in (("post", _key(stage.name)), ("pre", _key(stage.name, "pre"))):
                metrics[key] = score(report, stage, phase)
        earlier = [each for each in self._evaluations if each.iteration != place["iteration"]]
        self._evaluations = earlier + continual.evaluations([{**place, **metrics}], self.names)
        return metrics | continual.account(self._evaluations, len(self.names), finished)

    def report(self, finished: int) -> Report:
        """Return the account as JSON: names, both matrices (first row: before training) and the figures.

        A score that is not there is null.
        """
        figures = continual.account(self._evaluations, len(self.names), finished)
        matrices = {f"scores_{phase}": self.matrix(finished, phase) for phase in ("pre", "post")}
        rows = {
            name: [[None if np.isnan(score) else score for score in row] for row in matrix.tolist()]
            for name, matrix in matrices.items()
        }
        return {"stages": self.names, **rows, **figures}

    def matrix(self, finished: int, phase: str) -> FloatArray:
        """Return the matrix of scores before (`pre`) or after adaptation (`post`); see `continual.score_matrix`."""
        return continual.score_matrix(self._evaluations, len(self.names), finished, pre=phase == "pre")

    def write(self, path: Path, finished: int) -> Report:
        """Write the report to a file, and return it."""
        report = self.report(finished)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, (json.dumps(report, indent=2) + "\n").encode())
        return report


def _key(name: str, phase: str = "post") -> str:
    return f"continual/score/{name}" if phase == "post" else f"continual/score_{phase}/{name}"


def score(report: Report, stage: StageConfig, phase: str) -> float:
    """Return the score of a stage, before (`pre`) or after adaptation (`post`).

    It is the return on the scale of `score_range`; without one success where the tasks define it, else the return; NaN
    if all episodes had to be dropped.
    """
    aggregate = report["aggregate"]
    measure = "success" if f"success_{phase}" in aggregate and stage.score_range is None else "return"
    if f"{measure}_{phase}" not in aggregate:
        return float("nan")
    mean = float(aggregate[f"{measure}_{phase}"]["mean"])
    low, high = stage.score_range or (0.0, 1.0)
    return (mean - low) / (high - low)


def plasticity(agent: ProtectedAgent, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return how much of the policy's hidden layers is in use: dormant units and effective rank, layer by layer."""
    metrics = {}
    for name, activations in agent.hidden_units(rollouts).items():
        values = activations.detach().cpu().double().numpy()
        metrics[f"plasticity/{name}/dormant_fraction"] = continual.dormant_fraction(values, DORMANT)
        metrics[f"plasticity/{name}/effective_rank"] = continual.effective_rank(values)
    return metrics
