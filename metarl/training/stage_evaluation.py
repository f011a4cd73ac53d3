"""Evaluation during training: on held-out tasks of the stage, or of all stages, which makes the score table.

Environments are those of training; random streams are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from metarl.config.schema import RunConfig
from metarl.continual.score_table import ScoreTable
from metarl.evaluation import Report, evaluate_agent, held_out_metrics, select_tasks
from metarl.plots.run import score_matrix_image
from metarl.protocols import Agent, Collector, TaskDistribution
from metarl.seeding import Purpose, seeds
from metarl.types import Position


class Evaluated(NamedTuple):
    """The outcome of one evaluation."""

    report: Report
    """Of the stage in training."""
    score: float | None
    """By which checkpoints are compared."""
    metrics: dict[str, float]
    """As they are tracked."""
    images: dict[str, NDArray[np.uint8]]
    """By name, `[H, W, 3]`."""


class StageEvaluation:
    """Evaluates an agent during a run, and keeps the score table of a sequence.

    Args:
        config: of the run.
        distributions: the tasks of each stage.
        collectors: of each stage.
        lines: of the metrics.jsonl of a sequence that is resumed.
    """

    def __init__(
        self,
        config: RunConfig,
        distributions: Sequence[TaskDistribution],
        collectors: Sequence[Collector],
        lines: Sequence[Mapping[str, Any]],
    ) -> None:
        self._config, self._distributions, self._collectors = config, distributions, collectors
        self._scores = ScoreTable(config.stages, lines) if len(config.stages) > 1 else None

    def wanted_before_training(self, position: Position) -> bool:
        """Return whether the scores of a sequence before training are still missing."""
        return self._scores is not None and self._scores.empty and not position.iteration

    def evaluate(self, agent: Agent, position: Position, stage: int, finished: bool) -> Evaluated:
        """Evaluate the stage in training, or all stages of a sequence.

        Args:
            agent: as it is now.
            position: of the run.
            stage: in training.
            finished: whether that stage has been trained to its end.

        Raises:
            FloatingPointError: too many episodes broke.
        """
        if self._scores is None:
            report = self._report(agent, position, stage)
            return Evaluated(report, checkpoint_score([report]), held_out_metrics(report), {})
        reports = self._reports(agent, position)
        place = {"iteration": position.iteration, "stage": stage, "env_steps": position.env_steps}
        metrics = held_out_metrics(reports[stage]) | self._scores.add(place, reports, stage + finished)
        images = {}
        for phase, name in (("post", "continual/score_matrix"), ("pre", "continual/score_matrix_pre")):
            if finished:
                images[name] = score_matrix_image(self._scores.matrix(stage + 1, phase), self._scores.names)
        return Evaluated(reports[stage], checkpoint_score(reports), metrics, images)

    def write(self, run_dir: Path, report: Report, finished: int) -> Report:
        """Write the score table of a sequence; return the report with it, or as it is where there is one stage."""
        if self._scores is None:
            return report
        return {**report, "continual": self._scores.write(run_dir / "evaluation" / "continual.json", finished)}

    def _reports(self, agent: Agent, position: Position) -> list[Report]:
        """Evaluate all stages; stages with the same tasks once."""
        found: dict[int, Report] = {}
        for stage, distribution in enumerate(self._distributions):
            if id(distribution) not in found:
                found[id(distribution)] = self._report(agent, position, stage)
        return [found[id(distribution)] for distribution in self._distributions]

    def _report(self, agent: Agent, position: Position, stage: int) -> Report:
        config = self._config
        rng = np.random.default_rng(seeds(config.seed, Purpose.EVALUATION_TASKS, stage))
        tasks = select_tasks(self._distributions[stage].test_tasks, config.evaluation.num_tasks, rng)
        return evaluate_agent(
            agent,
            self._collectors[stage],
            tasks,
            config.evaluation.rollouts_per_task or config.rollouts_per_task,
            seed=config.seed,
            env_steps=position.env_steps,
        )


def checkpoint_score(reports: Sequence[Report]) -> float | None:
    """Return by what checkpoints are compared: success after adaptation, or return without it; the mean over stages.

    None: episodes of an evaluation broke, so that there is neither.
    """
    for kind in ("success_post", "return_post"):
        if all(kind in report["aggregate"] for report in reports):
            return float(np.mean([report["aggregate"][kind]["mean"] for report in reports]))
    return None
