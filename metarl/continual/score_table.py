"""The score table of a sequence: every stage's scores over the run, the score matrices, the report.

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
from metarl.runs.atomic_files import replace_file
from metarl.types import FloatArray

Report = dict[str, Any]


class ScoreTable:
    """Scores of every stage over the run.

    Args:
        stages: the stages of the run.
        lines: the lines of metrics.jsonl if the run is resumed.
    """

    def __init__(self, stages: Sequence[StageConfig], lines: Sequence[Mapping[str, Any]]) -> None:
        self._stages, self.names = stages, [stage.name for stage in stages]
        self._evaluations = continual.evaluations(lines, self.names)

    @property
    def empty(self) -> bool:
        """Whether there are no scores yet."""
        return not self._evaluations

    def add(self, place: Mapping[str, int], reports: Sequence[Report], finished: int) -> dict[str, float]:
        """Add an evaluation of all stages.

        Args:
            place: `iteration`, `stage` and `env_steps`, as in metrics.jsonl.
            reports: one evaluation report per stage.
            finished: the number of finished stages.

        Returns:
            the scores and the continual metrics under the names that are tracked.
        """
        metrics: dict[str, float] = {}
        for stage, report in zip(self._stages, reports, strict=True):
            for phase, key in (("post", _key(stage.name)), ("pre", _key(stage.name, "pre"))):
                metrics[key] = score(report, stage, phase)
        earlier = [evaluation for evaluation in self._evaluations if evaluation.iteration != place["iteration"]]
        self._evaluations = earlier + continual.evaluations([{**place, **metrics}], self.names)
        return metrics | continual.continual_metrics(self._evaluations, len(self.names), finished)

    def report(self, finished: int) -> Report:
        """Return names, both score matrices (first row: before training) and metrics, for JSON.

        A missing score is null.
        """
        metrics = continual.continual_metrics(self._evaluations, len(self.names), finished)
        matrices = {f"scores_{phase}": self.matrix(finished, phase) for phase in ("pre", "post")}
        rows = {
            name: [[None if np.isnan(score) else score for score in row] for row in matrix.tolist()]
            for name, matrix in matrices.items()
        }
        return {"stages": self.names, **rows, **metrics}

    def matrix(self, finished: int, phase: str) -> FloatArray:
        """Return the score matrix before (`pre`) or after adaptation (`post`); see `metrics.score_matrix`."""
        return continual.score_matrix(self._evaluations, len(self.names), finished, pre=phase == "pre")

    def write(self, path: Path, finished: int) -> Report:
        """Write the report to a file and return it."""
        report = self.report(finished)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, (json.dumps(report, indent=2) + "\n").encode())
        return report


def _key(name: str, phase: str = "post") -> str:
    return f"continual/score/{name}" if phase == "post" else f"continual/score_{phase}/{name}"


def score(report: Report, stage: StageConfig, phase: str) -> float:
    """Return the score of a stage before (`pre`) or after adaptation (`post`).

    With a `score_range`, the score is the return on that scale. Otherwise it is the success rate, or the return where
    tasks define no success. It is NaN if all episodes were dropped.
    """
    aggregate = report["aggregate"]
    measure = "success" if f"success_{phase}" in aggregate and stage.score_range is None else "return"
    if f"{measure}_{phase}" not in aggregate:
        return float("nan")
    mean = float(aggregate[f"{measure}_{phase}"]["mean"])
    low, high = stage.score_range or (0.0, 1.0)
    return (mean - low) / (high - low)
