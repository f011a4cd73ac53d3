"""Figures of evaluation reports: every class of tasks and every phase of adaptation, with intervals.

Owns the schema of the reports that it reads, and validates them before plotting. Must not import torch, environments
or agents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from metarl.plots.run import COLOURS, GREY, one_line, plain
from metarl.statistics import stratified_bootstrap_ci
from metarl.types import AdaptsBy, FloatArray

_CHECKED = ConfigDict(frozen=True, allow_inf_nan=False)
_UNTRAINED = "0.45"
_ROOMY_ROWS = 12
_LABELS = {"return": "return of an episode", "success": "success rate"}


class Estimate(BaseModel):
    """A mean and its 95 % interval, which is None or has zero width if there are too few tasks to estimate it."""

    model_config = _CHECKED

    mean: float
    ci95: tuple[float, float] | None = None


class TaskRow(BaseModel):
    """One task of a report: one value per phase, None where undefined."""

    model_config = _CHECKED

    name: str
    returns: tuple[float | None, ...] = Field(min_length=1)
    success: tuple[float | None, ...]
    untrained_returns: tuple[float | None, ...] = ()
    untrained_success: tuple[float | None, ...] = ()
    ablated_returns: tuple[float | None, ...] = ()
    ablated_success: tuple[float | None, ...] = ()


class EvaluationReport(BaseModel):
    """The plotted part of a report of `metarl.evaluation.held_out.evaluate`."""

    model_config = _CHECKED

    protocol: Literal["metarl"]
    split: str
    held_out: bool
    env_steps: int
    adaptation_steps: int
    adapts_by: AdaptsBy | None = None  # missing in reports of earlier versions
    rollouts_per_task: int
    ablate: str | None = None
    tasks: tuple[TaskRow, ...] = Field(min_length=1)
    aggregate: dict[str, Estimate]
    phases: tuple[dict[str, Estimate], ...] = Field(min_length=1)

    @property
    def in_trials(self) -> bool:
        """Whether phases are episodes of a trial instead of rollouts between adaptation steps."""
        return self.adapts_by == "memory" or (self.adapts_by is None and not self.adaptation_steps)


class PerEnvironment(BaseModel):
    """Success counted per environment."""

    model_config = _CHECKED

    success_mean: float
    success_per_class: dict[str, float] = Field(min_length=1)


class OfficialReport(PerEnvironment):
    """The plotted part of a report of `metarl.evaluation.metaworld_protocol.official_report`."""

    protocol: Literal["metaworld"]
    split: str
    env_steps: int
    adaptation_episodes: int
    evaluation_episodes: int
    per_environment: PerEnvironment


_REPORT: TypeAdapter[EvaluationReport | OfficialReport] = TypeAdapter(
    Annotated[EvaluationReport | OfficialReport, Field(discriminator="protocol")]
)


class _Series(NamedTuple):
    """One marker in every row of a figure: its label and style, its mean and interval, and its single tasks."""

    label: str
    style: dict[str, Any]
    estimates: Sequence[Estimate | None]
    tasks: Sequence[Sequence[float]]


def read_report(text: bytes) -> EvaluationReport | OfficialReport:
    """Parse and validate a report.

    Args:
        text: JSON, as `metarl evaluate` writes it.

    Raises:
        ValueError: the text is not a report; the message is one line.
    """
    try:
        return _REPORT.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "union_tag_not_found":
            raise ValueError("the field protocol is missing") from error
        where = ".".join(str(key) for key in first["loc"] if key not in ("metarl", "metaworld"))
        message = first["msg"].replace("Input should be", "expected")
        raise ValueError(" ".join(f"{where}: {message}".removeprefix(": ").split())) from error


def report_figure(report: EvaluationReport | OfficialReport) -> Figure:
    """Plot a report from `read_report`."""
    return _official(report) if isinstance(report, OfficialReport) else _evaluation(report)


def _evaluation(report: EvaluationReport) -> Figure:
    """Plot every phase at the top, and each class before and after adaptation below, next to an untrained agent.

    Classes show success where it is defined, otherwise returns. Intervals over all tasks come from the report, those of
    a class from a bootstrap over its tasks. Faint dots are single tasks, if there is room for them.
    """
    measures = [name for name in ("success", "return") if f"{name}_post" in report.aggregate]
    if not measures:
        raise ValueError("aggregate: success_post and return_post are missing; all episodes were dropped")
    names = list(dict.fromkeys(row.name for row in report.tasks))
    series = [_of_classes(report, measures[0], names, *which) for which in _marks(report, measures[0])]
    counts = [len(scores) for scores in series[1].tasks[-len(names) :]]
    rows = [f"{one_line(name, 32)}, n = {count}" for name, count in zip(names, counts, strict=True)]
    rows = [f"all, n = {sum(counts)}", *rows] if len(names) > 1 else rows
    inches = _inches(len(rows), len(series))
    figure = Figure(figsize=(9.0, 3.9 + inches), layout="constrained")
    grid = figure.add_gridspec(2, len(measures), height_ratios=(2.5, inches))
    for column, measure in enumerate(measures):
        _phases(figure.add_subplot(grid[0, column]), report, measure)
    axes = figure.add_subplot(grid[1, :])
    _rows(axes, rows, series)
    _measured(axes.set_xlabel, axes.set_xlim, measures[0])
    _legend(figure, series, _title(report, max(counts) > 1, len(rows) <= _ROOMY_ROWS))
    return figure


def _official(report: OfficialReport) -> Figure:
    """Plot the success of each class by Meta-World's count and per environment."""
    ours, names = report.per_environment, list(report.success_per_class)
    counted = (
        ("per environment", ours, {"color": COLOURS[0], "marker": "o"}),
        ("as Meta-World counts", report, {"color": COLOURS[1], "marker": "D", "markerfacecolor": "white"}),
    )
    rows = ["mean of classes"] * (len(names) > 1) + [one_line(name, 32) for name in names]
    series = []
    for label, success, style in counted:
        values = [success.success_mean, *(success.success_per_class.get(name) for name in names)][-len(rows) :]
        estimates = [None if value is None else Estimate(mean=value) for value in values]
        series.append(_Series(label, style, estimates, [()] * len(rows)))
    inches = _inches(len(rows), len(series))
    figure = Figure(figsize=(9.0, 1.8 + inches), layout="constrained")
    axes = figure.subplots()
    _rows(axes, rows, series)
    _measured(axes.set_xlabel, axes.set_xlim, "success")
    _legend(
        figure,
        series,
        f"Meta-World's own evaluation on {report.split} tasks, after {_steps(report.env_steps)} env steps of training\n"
        f"{_count(report.adaptation_episodes, 'episode')} to adapt on, then {report.evaluation_episodes} are counted; "
        "Meta-World counts the first of a class to finish,\nand solved episodes finish early",
    )
    return figure


def _arms(report: EvaluationReport) -> list[tuple[str, str, dict[str, Any]]]:
    """Return the agents of a report: the prefix of their fields, their label and their style."""
    arms = [
        ("", "", {"color": COLOURS[0], "marker": "o"}),
        ("ablated_", f"without {report.ablate}, ", {"color": COLOURS[1], "marker": "^"}),
        ("untrained_", "untrained, ", {"color": _UNTRAINED, "marker": "s"}),
    ]
    return [arm for arm in arms if any(f"{arm[0]}{measure}_post" in report.aggregate for measure in _LABELS)]


def _marks(report: EvaluationReport, measure: str) -> list[tuple[str, str, str, dict[str, Any]]]:
    """Return the markers of each row: the label, the prefix of an arm, `pre` or `post`, and the style."""
    before, after = ("first episode", "last episode") if report.in_trials else ("before adaptation", "after adaptation")
    (_, _, own), *others = _arms(report)
    marks = [(before, "", "pre", {**own, "markerfacecolor": "white"}), (after, "", "post", own)]
    marks += [(arm + after, prefix, "post", style) for prefix, arm, style in others]
    return [mark for mark in marks if f"{mark[1]}{measure}_{mark[2]}" in report.aggregate]


def _of_classes(
    report: EvaluationReport, measure: str, names: Sequence[str], label: str, prefix: str, when: str, style: Any
) -> _Series:
    field, phase = f"{prefix}{'returns' if measure == 'return' else measure}", 0 if when == "pre" else -1
    values: dict[str, list[float]] = {name: [] for name in names}
    for row in report.tasks:
        phases = getattr(row, field)
        if phases and None not in phases:
            values[row.name].append(phases[phase])
    whole = report.aggregate[f"{prefix}{measure}_{when}"]
    if len(names) == 1:
        return _Series(label, style, [whole], list(values.values()))
    estimates = [_estimate(scores) for scores in values.values()]
    return _Series(label, style, [whole, *estimates], [(), *values.values()])


def _estimate(scores: Sequence[float]) -> Estimate | None:
    """Return the mean over tasks with its bootstrap interval; a single task has no interval."""
    if not scores:
        return None
    ci95 = stratified_bootstrap_ci([scores], np.mean, rng=0) if len(scores) > 1 else None
    return Estimate(mean=float(np.mean(scores)), ci95=ci95)


def _error_bar(estimate: Estimate) -> tuple[float, float]:
    """Return the lengths of an interval below and above the mean."""
    low, high = estimate.ci95 or (estimate.mean, estimate.mean)
    return max(estimate.mean - low, 0.0), max(high - estimate.mean, 0.0)


def _spread(scores: Sequence[float]) -> FloatArray:
    """Return an offset within ±1/2 for each score, so that equal scores do not hide each other."""
    values = np.array(scores)
    offsets = np.zeros(len(values))
    for value in np.unique(values):
        (same,) = np.nonzero(values == value)
        offsets[same] = (np.arange(len(same)) + 0.5) / len(same) - 0.5
    return offsets


def _inches(rows: int, marks: int) -> float:
    """Return the height of rows with their markers stacked."""
    height = (0.4, 0.24) if rows == 1 else (0.1, 0.17) if rows <= _ROOMY_ROWS else (0.05, 0.08)
    return 0.55 + rows * (height[0] + height[1] * marks)


def _rows(axes: Axes, names: Sequence[str], series: Sequence[_Series]) -> None:
    """Plot one row per name with its markers stacked; the first of several rows is the summary."""
    plain(axes)
    axes.grid(visible=False, axis="y")
    roomy = len(names) <= _ROOMY_ROWS
    for row in range(1, len(names), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="0.965", zorder=0, linewidth=0)
    for number, one in enumerate(series):
        offset = 0.8 * ((number + 0.5) / len(series) - 0.5)
        points = [(row + offset, estimate) for row, estimate in enumerate(one.estimates) if estimate]
        for row, scores in enumerate(one.tasks):
            if roomy and len(scores) > 1:
                heights = row + offset + 0.6 / len(series) * _spread(scores)
                axes.scatter(scores, heights, s=9, color=one.style["color"], alpha=0.35, linewidths=0, gid="tasks")
        axes.errorbar(
            [estimate.mean for _, estimate in points],
            [height for height, _ in points],
            xerr=np.array([_error_bar(estimate) for _, estimate in points]).reshape(-1, 2).T,
            linestyle="none",
            markersize=6.5 if roomy else 4.5,
            elinewidth=1.4 if roomy else 1.1,
            label=one.label,
            **one.style,
        )
    for row in range(len(names)):
        if not any(one.estimates[row] for one in series):
            axes.text(0.5, row, "not defined", transform=axes.get_yaxis_transform(), ha="center", va="center")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labeltop=not roomy)
    if len(names) > 1:
        axes.get_yticklabels()[0].set_fontweight("bold")
        axes.axhline(0.5, color=GREY, linewidth=0.9)


def _phases(axes: Axes, report: EvaluationReport, measure: str) -> None:
    """Plot a measure over the phases; the first one, before adaptation, has a hollow marker."""
    plain(axes)
    arms, first = _arms(report), 1 if report.in_trials else 0
    size = 6.5 if len(report.phases) <= 6 else 4.5
    spacing = min(0.12, 0.025 * (len(report.phases) - 0.5))
    for number, (prefix, _, style) in enumerate(arms):
        offset = spacing * (number - (len(arms) - 1) / 2)
        points = [
            (phase + offset, estimates[prefix + measure])
            for phase, estimates in enumerate(report.phases, first)
            if prefix + measure in estimates
        ]
        if not points:
            continue
        x, means = [position for position, _ in points], [estimate.mean for _, estimate in points]
        axes.errorbar(
            x,
            means,
            yerr=np.array([_error_bar(estimate) for _, estimate in points]).T,
            linestyle="--" if prefix else "-",
            markersize=size,
            elinewidth=1.4,
            linewidth=1.2,
            **style,
        )
        axes.plot(x[:1], means[:1], **style, markersize=size, markerfacecolor="white", zorder=3, gid="first phase")
    axes.set_xticks(range(first, first + len(report.phases)))
    axes.set_xlim(first - 0.25, first + len(report.phases) - 0.75)
    axes.set_xlabel("episode of the trial" if report.in_trials else "adaptation steps")
    _measured(axes.set_ylabel, axes.set_ylim, measure)


def _measured(set_label: Any, set_limits: Any, measure: str) -> None:
    set_label(_LABELS[measure])
    if measure == "success":
        set_limits(-0.04, 1.04)


def _legend(figure: Figure, series: Sequence[_Series], title: str) -> None:
    handles = [Line2D([], [], linestyle="none", markersize=6.5, **one.style) for one in series]
    legend = figure.legend(
        handles,
        [one.label for one in series],
        loc="outside upper center",
        ncols=2 if len(series) in (2, 4) else 3,
        frameon=False,
        fontsize=9,
        title=title,
        title_fontsize=9.5,
    )
    legend.get_title().set_multialignment("center")


def _title(report: EvaluationReport, several: bool, roomy: bool) -> str:
    kind, note = ("held-out task", "") if report.held_out else (f"{report.split} task", " (NOT held out)")
    tasks = f"{_count(len(report.tasks), kind)}{note}"
    count = _count(report.rollouts_per_task, "trial" if report.in_trials else "episode") + " each"
    marks = "means, 95 % bootstrap intervals over tasks" if several else "means; one task per class has no interval"
    if several and roomy:
        marks += "; faint dots: tasks"
    return f"{tasks}, {count}, after {_steps(report.env_steps)} env steps of training\n{marks}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _steps(env_steps: int) -> str:
    return EngFormatter(sep="")(float(f"{env_steps:.3g}"))
