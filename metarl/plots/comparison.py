"""Comparison of several runs: learning curves of methods over env steps, with bootstrap intervals over seeds.

Must not import torch, environments or agents.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from metarl.continual.metrics import Evaluation
from metarl.plots.run import DASHES, MARKERS, colour_of, one_line, plain
from metarl.statistics import stratified_bootstrap_ci
from metarl.types import FloatArray

Points = Mapping[int, tuple[float, float]]
"""The values of one run: iteration → env steps and value."""

_Key = tuple[str, int, bool]
_MANY_POINTS = 30


class MethodCurve(NamedTuple):
    """Learning curves of the runs of one method, at the iterations that all of them share.

    Attributes:
        label: the name of the method.
        env_steps: `[n]`, mean over runs, which may differ where episodes end early.
        values: `[R, n]`, one row per run.
        held_out: whether the values are on held-out tasks instead of training tasks.
    """

    label: str
    env_steps: FloatArray
    values: FloatArray
    held_out: bool


class Panel(NamedTuple):
    """Curves of one measure on the same tasks."""

    measure: str
    curves: Sequence[MethodCurve]


def tracked(lines: Iterable[Mapping[str, Any]], name: str) -> Points:
    """Return the values of a scalar in metrics.jsonl; the last of several at one iteration counts."""
    return {line["iteration"]: (line["env_steps"], line[name]) for line in lines if name in line}


def average_scores(evaluations: Iterable[Evaluation]) -> Points:
    """Return the mean score over all stages after adaptation, at evaluations where every stage has one."""
    means = {item.iteration: (item.env_steps, float(np.mean(item.scores))) for item in evaluations}
    return {iteration: point for iteration, point in means.items() if np.isfinite(point[1])}


def method_curve(label: str, runs: Sequence[Points], *, held_out: bool) -> MethodCurve | None:
    """Return the curve of a method's runs, or None if they share no iteration."""
    shared = sorted(set.intersection(*(set(points) for points in runs)))
    if not shared:
        return None
    table = np.array([[points[iteration] for iteration in shared] for points in runs], dtype=np.float64)
    return MethodCurve(label, table[..., 0].mean(axis=0), table[..., 1], held_out)


def comparison(groups: Mapping[str, Sequence[Panel]]) -> Figure:
    """Plot methods over env steps: the mean over runs, with its 95 % bootstrap interval as a band.

    Each row shows one set of tasks; a method has the same style in every row.

    Args:
        groups: the panels of each set of tasks, by its title; at least one with a curve.
    """
    columns = max(len(panels) for panels in groups.values())
    curves = [curve for panels in groups.values() for panel in panels for curve in panel.curves]
    labels = list(dict.fromkeys(curve.label for curve in curves))
    entries = {_key(curve): _entry(curve) for curve in curves}
    longest = max(map(len, entries.values()))
    in_legend = 1 if longest > 44 else 2 if longest > 22 else 3
    legend_inches = 0.35 + 0.2 * math.ceil(len(entries) / in_legend)
    figure = Figure(figsize=(9.0 if columns > 1 else 8.0, 3.3 * len(groups) + legend_inches), layout="constrained")
    grid = figure.add_gridspec(len(groups), columns)
    lines: dict[_Key, Line2D] = {}
    for row, (tasks, panels) in enumerate(groups.items()):
        for column, panel in enumerate(panels):
            axes = figure.add_subplot(grid[row, column])
            for curve in panel.curves:
                lines[_key(curve)] = _draw(axes, curve, labels.index(curve.label))
            plain(axes)
            axes.set_ylabel(panel.measure)
            axes.set_xlabel("env steps")
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            end = max(1.0, *(curve.env_steps[-1] for curve in panel.curves))
            axes.set_xlim(-0.02 * end, 1.02 * end)
            if panel.measure.startswith("success"):
                axes.set_ylim(-0.04, 1.04)
            if column == 0:
                axes.set_title(one_line(tasks, 90), loc="left", fontsize=10.5)
    which = "held-out tasks" + ("" if all(curve.held_out for curve in curves) else " unless stated otherwise")
    figure.legend(
        list(lines.values()),
        [entries[key] for key in lines],
        loc="outside lower center",
        ncols=in_legend,
        frameon=False,
        fontsize=9,
        handlelength=3.2,
        title=f"{which}; mean, and 95 % bootstrap interval over n runs",
        title_fontsize=9.5,
    )
    return figure


def _key(curve: MethodCurve) -> _Key:
    """Return the key under which curves share an entry of the legend."""
    return curve.label, len(curve.values), curve.held_out


def _entry(curve: MethodCurve) -> str:
    """Return the legend text of a curve."""
    name = f"{one_line(curve.label, 70)}, n = {len(curve.values)}"
    return name if curve.held_out else f"{name} (training tasks)"


def _draw(axes: Axes, curve: MethodCurve, number: int) -> Line2D:
    """Plot a curve and return its line."""
    steps, mean = curve.env_steps, curve.values.mean(axis=0)
    every = max(1, len(steps) // 10) if len(steps) > _MANY_POINTS else 1
    (line,) = axes.plot(
        steps,
        mean,
        color=colour_of(number),
        linestyle=DASHES[number % len(DASHES)],
        linewidth=1.5,
        marker=MARKERS[number % len(MARKERS)],
        markersize=5.5,
        markerfacecolor=None if curve.held_out else "white",
        markevery=every,
    )
    if len(curve.values) > 1:
        low, high = np.array([stratified_bootstrap_ci([column], np.mean, rng=0) for column in curve.values.T]).T
        if len(steps) > 1:
            axes.fill_between(steps, low, high, color=colour_of(number), alpha=0.18, linewidth=0, gid="interval")
        else:
            axes.vlines(steps, low, high, color=colour_of(number), linewidth=1.4, gid="interval")
    return line
