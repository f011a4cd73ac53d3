"""Terminal output: training progress, and reports as tables. Computes no results."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from metarl.config.schema import RunConfig
from metarl.types import Position

PLAIN_LINE_SECONDS = 10.0
"""Minimum time between progress lines if the output is not a terminal."""


class TrainingDisplay:
    """Training progress: a live line on a terminal, otherwise a new line every few seconds.

    Args:
        config: the run's config.
        last_iteration: the iteration at which training stops.
        console: where to print.
    """

    def __init__(self, config: RunConfig, last_iteration: int, console: Console) -> None:
        self._stages, self._total, self._console = config.stages, last_iteration, console
        self._held_out = ""
        self._printed = -PLAIN_LINE_SECONDS
        self._live = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=math.inf,  # the default, 30 s, is too short for long iterations
        )
        self._task = self._live.add_task("training", total=last_iteration, status="")

    def __call__(self, position: Position, metrics: Mapping[str, float]) -> None:
        """Show an iteration or an evaluation; ignores a closed output."""
        with contextlib.suppress(OSError):
            self._show(position, metrics)

    def _show(self, position: Position, metrics: Mapping[str, float]) -> None:
        if "meta_test/return_post" in metrics:
            self._held_out = f"held out {_arrow(metrics, 'meta_test')}"
            status = self._held_out
        elif "time/env_steps_per_second" not in metrics:
            status = self._held_out = "held out: no result, every task has broken episodes"
        else:
            speed = metrics["time/env_steps_per_second"]
            result = "skipped: no episodes" if "meta_train/return_pre" not in metrics else _arrow(metrics, "meta_train")
            status = f"{result}  {speed:,.0f} env steps/s  {self._held_out}"
        stage = self._stages[min(position.stage, len(self._stages) - 1)].name
        self._live.update(self._task, completed=position.iteration, description=stage, status=status)
        now = time.monotonic()
        if not self._console.is_terminal and (status == self._held_out or now - self._printed > PLAIN_LINE_SECONDS):
            self._printed = now
            line = f"{stage}  {position.iteration}/{self._total}  {position.env_steps:,} env steps  {status}"
            self._console.print(line, highlight=False, soft_wrap=True)

    def __enter__(self) -> TrainingDisplay:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._live.stop()


def _arrow(metrics: Mapping[str, float], prefix: str) -> str:
    text = f"return {metrics[f'{prefix}/return_pre']:.1f} → {metrics[f'{prefix}/return_post']:.1f}"
    before, after = (metrics.get(f"{prefix}/success_{phase}", float("nan")) for phase in ("pre", "post"))
    return text if after != after else f"{text}, success {before:.2f} → {after:.2f}"


def report_tables(report: Mapping[str, Any]) -> list[Table]:
    """Return an evaluation report as tables: over all tasks, and per class if there are several."""
    kind = "held-out tasks" if report["held_out"] else f"{report['split']} tasks (NOT held out)"
    unit = "episodes" if report["adaptation_steps"] else "trial(s)"
    title = f"{len(report['tasks'])} {kind}, {report['rollouts_per_task']} {unit} each"
    aggregate = Table(title=title, title_justify="left")
    measures = [name for name in ("return", "success") if f"{name}_post" in report["aggregate"]]
    aggregate.add_column("mean [95 % interval]")
    for measure in measures:
        aggregate.add_column(measure, justify="right")
    for prefix, agent in (("", ""), ("ablated_", f"without {report.get('ablate')}, "), ("untrained_", "untrained, ")):
        lines = [
            (label, [phase.get(prefix + name) for name in measures])
            for label, phase in zip(_phase_names(report), report["phases"], strict=True)
        ]
        lines.append(("gain", [report["aggregate"].get(f"{prefix}{name}_gain") for name in measures]))
        for label, entries in lines:
            if any(entries):
                cells = (_interval(entry, name) for entry, name in zip(entries, measures, strict=True))
                aggregate.add_row(agent + label, *cells)
    return [aggregate, *_class_table(report, measures)]


def _phase_names(report: Mapping[str, Any]) -> list[str]:
    if not report["adaptation_steps"]:
        return [f"episode {number + 1}" for number in range(report["trial_episodes"])]
    return ["before adaptation", *(f"after {k + 1} step(s)" for k in range(report["adaptation_steps"]))]


def official_table(report: Mapping[str, Any]) -> Table:
    """Return a report of `official_report` as a table: success by Meta-World's count and per environment."""
    episodes = f"{report['adaptation_episodes']} episodes to adapt, then {report['evaluation_episodes']} each"
    table = Table(title=f"Meta-World's own evaluation: {episodes}", title_justify="left")
    ours = report["per_environment"]
    for column in ("success", "as Meta-World counts", "per environment"):
        table.add_column(column, justify="left" if column == "success" else "right")
    for name, success in report["success_per_class"].items():
        table.add_row(name, f"{success:.2f}", f"{ours['success_per_class'][name]:.2f}")
    table.add_row("mean", f"{report['success_mean']:.3f}", f"{ours['success_mean']:.3f}", end_section=True)
    table.caption = (
        "Meta-World counts the first episodes of a class to finish, and solved ones finish early: it is biased, here "
        f"by {report['biased_by']:+.3f}. Per environment: the same agents, the first episodes of each goal."
    )
    return table


def baseline_progress(row: Mapping[str, Any]) -> str:
    """Return one task's entry in a report of `metarl.baseline.reference` as one line."""
    text = f"{row['name']} {row['index']}: return {row['return_untrained']:.1f} → {row['return_final']:.1f}"
    before, after = row["success_untrained"], row["success_final"]
    return text if after is None else f"{text}, success {before:.2f} → {after:.2f}"


def baseline_table(report: Mapping[str, Any]) -> Table:
    """Return a report of `metarl.baseline.reference` as a table over all tasks."""
    algorithm, aggregate = report["algorithm"].upper(), report["aggregate"]
    title = f"{algorithm} from scratch on each of {len(report['tasks'])} tasks, {report['eval_episodes']} episodes each"
    table = Table(title=title, title_justify="left")
    table.add_column("mean [95 % interval]")
    measures = [name for name in ("return", "success") if f"{name}_final" in aggregate]
    for measure in measures:
        table.add_column(measure, justify="right")
    for label, suffix in (("untrained", "untrained"), (f"after {report['env_steps']:,} env steps", "final")):
        table.add_row(label, *(_interval(aggregate.get(f"{name}_{suffix}"), name) for name in measures))
    return table


def _interval(entry: Mapping[str, Any] | None, measure: str) -> str:
    if entry is None:
        return ""
    digits = 2 if measure == "success" else 1
    low, high = entry["ci95"]
    if low == high:  # one task per class allows no interval
        return f"{entry['mean']:.{digits}f}"
    return f"{entry['mean']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _class_table(report: Mapping[str, Any], measures: Sequence[str]) -> list[Table]:
    if len(report["per_class"]) < 2:
        return []
    table = Table(title="per class", title_justify="left")
    table.add_column("class")
    columns = [f"{name}_{suffix}" for name in measures for suffix in ("pre", "post")]
    columns += [f"untrained_{name}_post" for name in measures]
    columns = [name for name in columns if any(name in row for row in report["per_class"].values())]
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for name, row in report["per_class"].items():
        table.add_row(name, *(f"{row[column]:.2f}" if column in row else "" for column in columns))
    return [table]
