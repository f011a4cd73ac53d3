"""Figures of a run and of several: plain data in, matplotlib figures out.

Draws without pyplot, so no figure or backend is held globally; saving is the caller's. Must not import torch,
environments or agents.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray

from metarl.continual.metrics import Evaluation
from metarl.statistics import stratified_bootstrap_ci
from metarl.types import FloatArray

# Okabe and Ito's palette for the colour-blind, without its yellow, which is too light for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY = "0.55"
_LAST_ITERATIONS = 10
_CHARACTER_INCHES = 0.075


class Span(NamedTuple):
    """The stretch of a run in which one stage was trained, in env steps."""

    name: str
    begin: float
    end: float


class Point(NamedTuple):
    """One run in the plane of stability and plasticity; runs with the same label are seeds of one method."""

    label: str
    plasticity: float
    stability: float


def stage_spans(lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Span]:
    """Return where the stages that have begun lie, by the lines of metrics.jsonl.

    Args:
        lines: as `metarl.runs.tracking.read_metrics` returns them.
        names: of all stages.
    """
    spans: list[Span] = []
    for stage, name in enumerate(names):
        steps = [line["env_steps"] for line in lines if line["stage"] == stage]
        if steps:
            spans.append(Span(name, spans[-1].end if spans else 0.0, max(steps)))
    return spans


def learning_curves(lines: Sequence[Mapping[str, Any]], spans: Sequence[Span]) -> Figure:
    """Draw return, and success where there is one, before and after adaptation against env steps.

    Lines are training tasks, points held-out ones; where there are several stages, their boundaries are marked.

    Args:
        lines: of metrics.jsonl.
        spans: from `stage_spans`.

    Raises:
        ValueError: no return is among the lines.
    """
    measures = [name for name in ("return", "success") if any(f"meta_train/{name}_post" in line for line in lines)]
    if not measures:
        raise ValueError("the lines hold no meta_train/return_post; train at least one iteration")
    figure = Figure(figsize=(9.0, 1.3 + 2.9 * len(measures)), layout="constrained")
    panels = figure.subplots(len(measures), 1, sharex=True, squeeze=False)[:, 0]
    phases = (("pre", "before adaptation", COLOURS[4]), ("post", "after adaptation", COLOURS[0]))
    for axes, measure in zip(panels, measures, strict=True):
        for phase, label, colour in phases:
            steps, values = _series(lines, f"meta_train/{measure}_{phase}")
            dot = "." if len(steps) < 30 else ""
            axes.plot(steps, values, color=colour, linewidth=1.2, marker=dot, label=f"training tasks, {label}")
        for phase, label, _ in phases:
            steps, values = _series(lines, f"meta_test/{measure}_{phase}")
            face = COLOURS[1] if phase == "post" else "white"
            axes.plot(
                steps,
                values,
                linestyle="none",
                marker="o",
                markersize=5.5 if len(steps) < 30 else 3.5,
                color=COLOURS[1],
                markerfacecolor=face,
                label=f"held-out tasks, {label}",
            )
        axes.set_ylabel("return of an episode" if measure == "return" else "success rate")
        _over_env_steps(axes, spans)
    _name_stages(panels[0], spans)
    panels[-1].set_xlabel("env steps")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def continual_curves(evaluations: Sequence[Evaluation], spans: Sequence[Span], names: Sequence[str]) -> Figure:
    """Draw the score of each stage after adaptation against env steps, bold while the stage itself is trained.

    Args:
        evaluations: by iteration.
        spans: from `stage_spans`.
        names: of the S stages.
    """
    columns = 1 + (len(names) - 1) // 24
    figure = Figure(figsize=(9.5 + 1.5 * columns, max(4.2, 1.5 + 0.2 * min(len(names), 24))), layout="constrained")
    axes = figure.subplots()
    steps = np.array([each.env_steps for each in evaluations], dtype=np.float64)
    scores = np.array([each.scores for each in evaluations], dtype=np.float64).reshape(len(steps), len(names))
    handles = []
    for stage, column in enumerate(scores.T):
        there = np.isfinite(column)
        style: dict[str, Any] = {"color": colour_of(stage), "linestyle": DASHES[stage // len(COLOURS) % len(DASHES)]}
        dot = "." if len(steps) < 60 else ""
        handles += axes.plot(steps[there], column[there], linewidth=1.1, marker=dot, markersize=4, **style)
        if stage < len(spans):
            own = there & (steps >= spans[stage].begin) & (steps <= spans[stage].end)
            axes.plot(steps[own], column[own], linewidth=3.0, solid_capstyle="round", gid="own stage", **style)
    axes.set_ylabel("score on held-out tasks after adaptation")
    axes.set_xlabel("env steps")
    _over_env_steps(axes, spans)
    _name_stages(axes, spans, coloured=True)
    figure.legend(
        handles,
        [one_line(name, 32) for name in names],
        loc="outside right upper",
        ncols=columns,
        frameon=False,
        fontsize=9,
        handlelength=2.6,
        title="score on (bold: in training)",
        title_fontsize=9,
        alignment="left",
    )
    return figure


def adaptation_curves(
    lines: Sequence[Mapping[str, Any]], names: Sequence[str], abscissa: str = "adaptation steps"
) -> Figure | None:
    """Draw the return on training tasks by how much the agent has adapted, at the end of each stage so far.

    Each point is the mean over the last 10 iterations of a stage: one iteration alone has few episodes.

    Args:
        lines: of metrics.jsonl.
        names: of all stages.
        abscissa: what the agent adapts by, for the axis.

    Returns:
        a figure, or None if there is no adaptation to show.
    """
    curves: list[tuple[int, list[float]]] = []
    for stage in range(len(names)):
        ends = [line for line in lines if line["stage"] == stage and "adaptation/return_after_0" in line]
        ends, returns = ends[-_LAST_ITERATIONS:], list[float]()
        while values := [line[key] for line in ends if (key := f"adaptation/return_after_{len(returns)}") in line]:
            returns.append(float(np.mean(values)))
        if len(returns) > 1:
            curves.append((stage, returns))
    if not curves:
        return None
    several = len(curves) > 1
    figure = Figure(figsize=(8.5 if several else 6.0, max(4.0, 1.5 + 0.2 * len(curves))), layout="constrained")
    axes = figure.subplots()
    handles = []
    for stage, returns in curves:
        handles += axes.plot(
            range(len(returns)),
            returns,
            color=colour_of(stage),
            linestyle=DASHES[stage // len(COLOURS) % len(DASHES)],
            marker=MARKERS[stage % len(MARKERS)],
            markersize=5,
        )
    axes.set_xticks(range(max(len(returns) for _, returns in curves)))
    axes.set_xlabel(abscissa)
    axes.set_ylabel("return of an episode, training tasks")
    axes.set_title(f"last {_LAST_ITERATIONS} iterations of {'each stage' if several else 'training'}", fontsize=10)
    plain(axes)
    if several:
        labels = [one_line(names[stage], 32) for stage, _ in curves]
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9, handlelength=2.6)
    return figure


def score_matrices(pre: FloatArray, post: FloatArray, names: Sequence[str]) -> Figure:
    """Draw the score matrices before and after adaptation side by side, on one scale of colours.

    Args:
        pre: `[K + 1, S]`, from `metarl.continual.metrics.score_matrix`.
        post: `[K + 1, S]`.
        names: of the S stages.
    """
    width, height = _matrix_inches(post)
    figure = Figure(figsize=(2 * width + 2.6, height + _label_inches(names) + 0.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    scale = _scale(pre, post)
    _heat_map(left, pre, names, scale)
    image = _heat_map(right, post, names, scale)
    left.set_title("before adaptation", fontsize=11)
    right.set_title("after adaptation", fontsize=11)
    right.tick_params(labelleft=False)
    figure.colorbar(image, ax=[left, right], label="score on held-out tasks", fraction=0.05, pad=0.02)
    return figure


def score_matrix_image(matrix: FloatArray, names: Sequence[str]) -> NDArray[np.uint8]:
    """Return a score matrix as a picture, for TensorBoard.

    Rows of stages to come are drawn without numbers: all pictures of a run have one size, and none needs more memory
    than the first.

    Args:
        matrix: `[K + 1, S]`, from `metarl.continual.metrics.score_matrix`.
        names: of the S stages.

    Returns:
        `[height, width, 3]`, uint8, RGB.
    """
    whole = np.full((len(names) + 1, len(names)), np.nan)
    whole[: len(matrix)] = matrix
    width, height = _matrix_inches(whole)
    figure = Figure(figsize=(width + 1.7, height + _label_inches(names) + 0.2), dpi=100, layout="constrained")
    _heat_map(figure.subplots(), whole, names, _scale(matrix))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    image = np.array(canvas.buffer_rgba(), dtype=np.uint8)[..., :3].copy()  # type: ignore[no-untyped-call]
    del figure, canvas
    gc.collect()  # a figure is a web of cycles, some MB, which would lie about until Python comes to its oldest objects
    return image


def stability_plasticity(points: Sequence[Point]) -> Figure:
    """Draw several runs by what they keep and what they still learn; the best are at the top right.

    A method's mark is the mean over its runs, its bars the 95 % bootstrap intervals of the mean over runs (Agarwal et
    al. 2021), the faint dots its runs. One run has no interval.

    Args:
        points: one a run; at least one.
    """
    runs: dict[str, list[Point]] = {}
    for point in points:
        runs.setdefault(point.label, []).append(point)
    figure = Figure(figsize=(8.5, max(4.8, 1.5 + 0.25 * len(runs))), layout="constrained")
    axes = figure.subplots()
    handles: list[Line2D] = []
    for number, members in enumerate(runs.values()):
        across = np.array([member.plasticity for member in members])
        up = np.array([member.stability for member in members])
        several, colour = len(members) > 1, colour_of(number)
        if several:
            axes.scatter(across, up, s=16, color=colour, alpha=0.35, linewidths=0, gid="runs")
        mark = axes.errorbar(
            across.mean(),
            up.mean(),
            xerr=_interval(across) if several else None,
            yerr=_interval(up) if several else None,
            fmt=MARKERS[number % len(MARKERS)],
            color=colour,
            markersize=8,
            markeredgecolor="white",
            capsize=3,
            elinewidth=1.4,
        )
        handles.append(mark[0])
    axes.set_xlabel("plasticity: score of the last stage at its end")
    axes.set_ylabel("stability: 1 − forgetting, mean over stages")
    axes.margins(0.12)
    plain(axes)
    labels = [f"{one_line(label, 40)}, n = {len(members)}" for label, members in runs.items()]
    figure.legend(
        handles,
        labels,
        loc="outside right upper",
        frameon=False,
        fontsize=9,
        title="mean, 95 % interval over n runs",
        title_fontsize=9,
        alignment="left",
    )
    return figure


def _interval(values: FloatArray) -> FloatArray:
    """`[2, 1]`, how far the interval of the mean reaches below and above it."""
    low, high = stratified_bootstrap_ci([values], np.mean, rng=0)
    return np.maximum([[values.mean() - low], [high - values.mean()]], 0.0)


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    found = [(line["env_steps"], line[name]) for line in lines if name in line]
    return [steps for steps, _ in found], [value for _, value in found]


def colour_of(number: int) -> str:
    """A colour of the palette, which repeats."""
    return COLOURS[number % len(COLOURS)]


def one_line(name: str, longest: int) -> str:
    """A name on one line, cut to its first characters; what stands between dollars is no formula."""
    name = " ".join(name.split())
    name = name if len(name) <= longest else f"{name[: longest - 1]}…"
    return name.replace("$", r"\$")


def plain(axes: Axes) -> None:
    """Leave a faint grid and two axes."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)


def _over_env_steps(axes: Axes, spans: Sequence[Span]) -> None:
    """Make env steps the abscissa and mark where stages begin."""
    plain(axes)
    begin, end = spans[0].begin, max(spans[-1].end, spans[0].begin + 1.0)
    axes.set_xlim(begin - 0.015 * (end - begin), end + 0.015 * (end - begin))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    for span in spans[1:]:
        axes.axvline(span.begin, color=GREY, linewidth=0.9, linestyle="--", zorder=1, gid="stage boundary")


def _name_stages(axes: Axes, spans: Sequence[Span], *, coloured: bool = False) -> None:
    """Write the names of several stages above their middles, slanted where they are too long to stand side by side."""
    if len(spans) < 2:
        return
    begin, end = spans[0].begin, spans[-1].end
    steps_per_inch = (end - begin) / (axes.get_window_extent().width / axes.figure.dpi)
    middles = np.array([(span.begin + span.end) / 2 for span in spans])
    labels = [one_line(span.name, 26) for span in spans]
    level = max(map(len, labels)) * _CHARACTER_INCHES * steps_per_inch < np.diff(middles).min()
    top = axes.secondary_xaxis("top")
    top.set_xticks(middles if level else _apart(middles, begin, end, 0.25 * steps_per_inch), labels, fontsize=8.5)
    top.tick_params(length=0, pad=2)
    top.spines["top"].set_visible(False)
    for stage, label in enumerate(top.get_xticklabels()):
        label.set(rotation=0 if level else 40, ha="center" if level else "left", rotation_mode="anchor")
        if coloured:
            label.set_color(colour_of(stage))


def _apart(places: FloatArray, low: float, high: float, gap: float) -> FloatArray:
    """Move ascending places within [low, high] so that neighbours are `gap` apart, as far as there is room."""
    steps = np.arange(len(places)) * min(gap, (high - low) / max(len(places) - 1, 1))
    moved: FloatArray = np.maximum.accumulate(np.maximum(places, low) - steps) + steps
    moved = np.minimum(moved, high - steps[::-1])
    return moved


def _scale(*matrices: FloatArray) -> tuple[float, float]:
    """Colours span 0 to 1, and further where scores do."""
    values = np.concatenate([matrix[np.isfinite(matrix)] for matrix in matrices])
    return float(values.min(initial=0.0)), float(values.max(initial=1.0))


def _matrix_inches(matrix: FloatArray) -> tuple[float, float]:
    rows, columns = matrix.shape
    return max(1.6, columns * (0.62 if columns <= 10 else 0.44)), max(0.8, rows * (0.42 if rows <= 11 else 0.32))


def _label_inches(names: Sequence[str]) -> float:
    return 0.5 + min(max(len(name) for name in names), 26) * 0.055


def _heat_map(axes: Axes, matrix: FloatArray, names: Sequence[str], scale: tuple[float, float]) -> AxesImage:
    """Draw a score matrix with its numbers; the stage that was just trained has a frame."""
    low, high = scale
    rows, columns = matrix.shape
    axes.set_facecolor("0.88")
    image = axes.imshow(np.ma.masked_invalid(matrix), cmap="cividis", vmin=low, vmax=high, aspect="auto")
    axes.set_xticks(range(columns), [f"{number}: {one_line(name, 26)}" for number, name in enumerate(names, 1)])
    axes.set_yticks(range(rows), ["before training", *(f"after stage {number}" for number in range(1, rows))])
    axes.tick_params(length=0, labelsize=8.5)
    for label in axes.get_xticklabels():
        label.set(rotation=40, ha="right", rotation_mode="anchor")
    axes.spines[:].set_visible(False)
    for (row, column), value in np.ndenumerate(matrix):
        light = np.isfinite(value) and (value - low) / (high - low) < 0.55
        axes.text(
            column,
            row,
            _number(value),
            ha="center",
            va="center",
            fontsize=9 if columns <= 10 else 7.5,
            color="white" if light else "black",
        )
        if row == column + 1:
            frame = Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False, edgecolor="#D55E00", linewidth=1.8)
            axes.add_patch(frame)
    return image


def _number(value: float) -> str:
    if not np.isfinite(value):
        return "–"
    text = f"{value:.2f}" if abs(value) < 99.995 else f"{value:.0f}"
    return text.removeprefix("-") if not float(text) else text
