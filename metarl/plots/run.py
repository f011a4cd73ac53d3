"""Figures of runs: plain data in, matplotlib figures out.

Uses no pyplot, hence no global figures or backend; callers save the figures. Must not import torch, environments or
agents.
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

# Okabe and Ito's colour-blind-safe palette without its yellow, which is too light for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY = "0.55"
_LAST_ITERATIONS = 10
_CHARACTER_INCHES = 0.075


class Span(NamedTuple):
    """The env steps over which a stage was trained."""

    name: str
    begin: float
    end: float


class Point(NamedTuple):
    """The stability and plasticity of one run; runs with the same label are seeds of one method."""

    label: str
    plasticity: float
    stability: float


def stage_spans(lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Span]:
    """Return the spans of the stages that have started.

    Args:
        lines: the lines of metrics.jsonl, from `metarl.runs.tracking.read_metrics`.
        names: the names of all stages.
    """
    spans: list[Span] = []
    for stage, name in enumerate(names):
        steps = [line["env_steps"] for line in lines if line["stage"] == stage]
        if steps:
            spans.append(Span(name, spans[-1].end if spans else 0.0, max(steps)))
    return spans


def learning_curves(lines: Sequence[Mapping[str, Any]], spans: Sequence[Span]) -> Figure:
    """Plot return, and success if defined, before and after adaptation over env steps.

    Lines are training tasks, points are held-out tasks. Boundaries between stages are marked.

    Args:
        lines: the lines of metrics.jsonl.
        spans: the output of `stage_spans`.

    Raises:
        ValueError: the lines have no return.
    """
    measures = [name for name in ("return", "success") if any(f"meta_train/{name}_post" in line for line in lines)]
    if not measures:
        raise ValueError("the lines have no meta_train/return_post; train at least one iteration")
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
    """Plot the score of each stage after adaptation over env steps, bold while the stage itself is in training.

    Args:
        evaluations: the run's evaluations, by iteration.
        spans: the output of `stage_spans`.
        names: the names of the S stages.
    """
    columns = 1 + (len(names) - 1) // 24
    figure = Figure(figsize=(9.5 + 1.5 * columns, max(4.2, 1.5 + 0.2 * min(len(names), 24))), layout="constrained")
    axes = figure.subplots()
    steps = np.array([item.env_steps for item in evaluations], dtype=np.float64)
    scores = np.array([item.scores for item in evaluations], dtype=np.float64).reshape(len(steps), len(names))
    handles = []
    for stage, column in enumerate(scores.T):
        defined = np.isfinite(column)
        style: dict[str, Any] = {"color": colour_of(stage), "linestyle": DASHES[stage // len(COLOURS) % len(DASHES)]}
        dot = "." if len(steps) < 60 else ""
        handles += axes.plot(steps[defined], column[defined], linewidth=1.1, marker=dot, markersize=4, **style)
        if stage < len(spans):
            own = defined & (steps >= spans[stage].begin) & (steps <= spans[stage].end)
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
    lines: Sequence[Mapping[str, Any]], names: Sequence[str], x_label: str = "adaptation steps"
) -> Figure | None:
    """Plot the return on training tasks over the phases of adaptation, at the end of each stage so far.

    Each point is the mean over the last 10 iterations of a stage, since one iteration has few episodes.

    Args:
        lines: the lines of metrics.jsonl.
        names: the names of all stages.
        x_label: the label of the x-axis, which depends on how the agent adapts.

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
    axes.set_xlabel(x_label)
    axes.set_ylabel("return of an episode, training tasks")
    axes.set_title(f"last {_LAST_ITERATIONS} iterations of {'each stage' if several else 'training'}", fontsize=10)
    plain(axes)
    if several:
        labels = [one_line(names[stage], 32) for stage, _ in curves]
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9, handlelength=2.6)
    return figure


def score_matrices(pre: FloatArray, post: FloatArray, names: Sequence[str]) -> Figure:
    """Plot the score matrices before and after adaptation side by side, with one colour scale.

    Args:
        pre: `[K + 1, S]`, from `metarl.continual.metrics.score_matrix`.
        post: `[K + 1, S]`.
        names: the names of the S stages.
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
    """Return a score matrix as an image for TensorBoard.

    Rows of future stages are empty, so that all images of a run have one size and need the same memory.

    Args:
        matrix: `[K + 1, S]`, from `metarl.continual.metrics.score_matrix`.
        names: the names of the S stages.

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
    gc.collect()  # a figure has reference cycles; several MB would stay until a full collection
    return image


def stability_plasticity(points: Sequence[Point]) -> Figure:
    """Plot the stability of several runs over their plasticity; the best are at the top right.

    A method's marker is the mean over its runs, with 95 % bootstrap intervals of the mean (Agarwal et al. 2021). Faint
    dots are its runs. A single run has no interval.

    Args:
        points: one per run; at least one.
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
    """Return the lengths `[2, 1]` of the mean's interval below and above it."""
    low, high = stratified_bootstrap_ci([values], np.mean, rng=0)
    return np.maximum([[values.mean() - low], [high - values.mean()]], 0.0)


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    points = [(line["env_steps"], line[name]) for line in lines if name in line]
    return [steps for steps, _ in points], [value for _, value in points]


def colour_of(number: int) -> str:
    """Return a colour of the palette, which repeats."""
    return COLOURS[number % len(COLOURS)]


def one_line(name: str, longest: int) -> str:
    """Return a name on one line, cut to `longest` characters; dollar signs are escaped, not read as mathtext."""
    name = " ".join(name.split())
    name = name if len(name) <= longest else f"{name[: longest - 1]}…"
    return name.replace("$", r"\$")


def plain(axes: Axes) -> None:
    """Reduce the axes to a faint grid and two spines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)


def _over_env_steps(axes: Axes, spans: Sequence[Span]) -> None:
    """Set up the x-axis for env steps and mark where stages start."""
    plain(axes)
    begin, end = spans[0].begin, max(spans[-1].end, spans[0].begin + 1.0)
    axes.set_xlim(begin - 0.015 * (end - begin), end + 0.015 * (end - begin))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    for span in spans[1:]:
        axes.axvline(span.begin, color=GREY, linewidth=0.9, linestyle="--", zorder=1, gid="stage boundary")


def _name_stages(axes: Axes, spans: Sequence[Span], *, coloured: bool = False) -> None:
    """Write the names of several stages above their centres, rotated if they are too long to fit side by side."""
    if len(spans) < 2:
        return
    begin, end = spans[0].begin, spans[-1].end
    steps_per_inch = (end - begin) / (axes.get_window_extent().width / axes.figure.dpi)
    centres = np.array([(span.begin + span.end) / 2 for span in spans])
    labels = [one_line(span.name, 26) for span in spans]
    level = max(map(len, labels)) * _CHARACTER_INCHES * steps_per_inch < np.diff(centres).min()
    top = axes.secondary_xaxis("top")
    top.set_xticks(centres if level else _spread(centres, begin, end, 0.25 * steps_per_inch), labels, fontsize=8.5)
    top.tick_params(length=0, pad=2)
    top.spines["top"].set_visible(False)
    for stage, label in enumerate(top.get_xticklabels()):
        label.set(rotation=0 if level else 40, ha="center" if level else "left", rotation_mode="anchor")
        if coloured:
            label.set_color(colour_of(stage))


def _spread(positions: FloatArray, low: float, high: float, gap: float) -> FloatArray:
    """Move ascending positions within [low, high] so that neighbours are `gap` apart, as far as there is room."""
    steps = np.arange(len(positions)) * min(gap, (high - low) / max(len(positions) - 1, 1))
    moved: FloatArray = np.maximum.accumulate(np.maximum(positions, low) - steps) + steps
    moved = np.minimum(moved, high - steps[::-1])
    return moved


def _scale(*matrices: FloatArray) -> tuple[float, float]:
    """Return the range of colours: [0, 1], extended to scores outside it."""
    values = np.concatenate([matrix[np.isfinite(matrix)] for matrix in matrices])
    return float(values.min(initial=0.0)), float(values.max(initial=1.0))


def _matrix_inches(matrix: FloatArray) -> tuple[float, float]:
    rows, columns = matrix.shape
    return max(1.6, columns * (0.62 if columns <= 10 else 0.44)), max(0.8, rows * (0.42 if rows <= 11 else 0.32))


def _label_inches(names: Sequence[str]) -> float:
    return 0.5 + min(max(len(name) for name in names), 26) * 0.055


def _heat_map(axes: Axes, matrix: FloatArray, names: Sequence[str], scale: tuple[float, float]) -> AxesImage:
    """Plot a score matrix with its numbers; a frame marks the stage that each row has just trained."""
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
