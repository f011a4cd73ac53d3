"""Metrics of continual learning: average performance, forgetting, transfer and relearning over a sequence of stages.

Pure functions of numpy arrays and of the evaluations in metrics.jsonl. Must not import torch, environments or agents.

S stages are trained one after the other; K of them have finished. R is the score matrix: `R[k][i]` is the score on
stage i after stage k, both counted from 1 as in the papers, and R[0] holds the scores before training. The array is
`[K + 1, S]`, with stage i in column i − 1. Scores are success rates, or returns scaled so that 0 is an untrained agent
and 1 a reference; they may be negative or above 1.

A missing score (a stage that defines no success, a missing evaluation) is NaN. Means skip NaN. A metric without any
score, or with too few finished stages, is NaN, and `continual_metrics` leaves it out.

Deviation from Continual World (Wołczyk et al. 2021, arXiv 2105.10919) in every metric of R: their score at the end of a
stage is the mean of the last five evaluations, ours is the last evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from metarl.types import FloatArray

_PREFIX, _PREFIX_PRE = "continual/score", "continual/score_pre"


class Evaluation(NamedTuple):
    """One evaluation of all stages on held-out tasks.

    Attributes:
        iteration: the run's iteration; 0 is before training.
        env_steps: the run's environment steps so far.
        stage: index of the stage in training; its last evaluation is the one at its end.
        scores: the scores of the S stages after adaptation, NaN where missing.
        scores_pre: the same before adaptation.
    """

    iteration: int
    env_steps: int
    stage: int
    scores: tuple[float, ...]
    scores_pre: tuple[float, ...]


class Curve(NamedTuple):
    """Learning curve of one score during one stage.

    Attributes:
        iterations: `[n]`, since the start of the stage, increasing; 0 is the evaluation right before it.
        scores: `[n]`, finite.
    """

    iterations: FloatArray
    scores: FloatArray


class Relearning(NamedTuple):
    """Iterations to reach a score when its tasks are first trained and when they return; None: never reached."""

    first: int | None
    again: int | None


def evaluations(lines: Iterable[Mapping[str, Any]], names: Sequence[str]) -> list[Evaluation]:
    """Return the evaluations of all stages from the lines of metrics.jsonl, by iteration.

    The last of several at one iteration counts: a resumed run evaluates again.

    Args:
        lines: the output of `metarl.runs.tracking.read_metrics`; lines without stage scores are skipped.
        names: the names of the S stages; stages with the same name share their scores.
    """
    by_iteration: dict[int, Evaluation] = {}
    for line in lines:
        iteration = line["iteration"]
        after, before = (tuple(_score(line, f"{prefix}/{name}") for name in names) for prefix in (_PREFIX, _PREFIX_PRE))
        if np.isfinite([*after, *before]).any():
            by_iteration[iteration] = Evaluation(iteration, line["env_steps"], line["stage"], after, before)
    return [by_iteration[iteration] for iteration in sorted(by_iteration)]


def _score(line: Mapping[str, Any], name: str) -> float:
    value = float(line.get(name, np.nan))
    return value if np.isfinite(value) else float("nan")


def finished_stages(evaluations: Sequence[Evaluation], iterations: Sequence[int]) -> int:
    """Return K, the number of finished stages: those evaluated at their end.

    Args:
        evaluations: the run's evaluations, by iteration.
        iterations: `[S]`, the length of each stage.
    """
    last = evaluations[-1].iteration if evaluations else 0
    return int((np.cumsum(iterations) <= last).sum())


def score_matrix(evaluations: Sequence[Evaluation], num_stages: int, finished: int, *, pre: bool = False) -> FloatArray:
    """Return R `[K + 1, S]`: row 0 is before training, row k the last evaluation of the k-th stage.

    Args:
        evaluations: the run's evaluations, by iteration; those of an unfinished stage are skipped.
        num_stages: S.
        finished: K, the number of finished stages.
        pre: whether to return the scores before adaptation instead of those after it.
    """
    matrix = np.full((finished + 1, num_stages), np.nan)
    for evaluation in evaluations:
        row = evaluation.stage + 1 if evaluation.iteration else 0
        if row <= finished:
            matrix[row] = evaluation.scores_pre if pre else evaluation.scores
    return matrix


def average_performance(matrix: FloatArray) -> float:
    """Mean score over the finished stages, after the last of them: Σ_{i≤K} R[K][i] / K.

    Continual World, P(T) = 1/N Σ p_i(T), after N = K stages. Future stages are left out: scores on tasks that were
    never trained on are transfer, and would make values at different K incomparable.
    """
    finished = len(matrix) - 1
    return _mean(matrix[-1, :finished])


def forgetting(matrix: FloatArray) -> float:
    """Mean drop in score since the end of each stage: Σ_{i≤K} (R[i][i] − R[K][i]) / K; negative if scores rose.

    Continual World, F_i = p_i(i · Δ) − p_i(T), over all stages. The last one contributes 0, so that one stage has 0.0.
    """
    return _mean(-_changes(matrix))


def backward_transfer(matrix: FloatArray) -> float:
    """Mean change in the earlier stages' scores since their end: Σ_{i<K} (R[K][i] − R[i][i]) / (K − 1).

    GEM (Lopez-Paz and Ranzato 2017, arXiv 1706.08840, Eq. 3). Deviation: 0.0 for one stage, which has no earlier ones.
    """
    return 0.0 if len(matrix) == 2 else _mean(_changes(matrix)[:-1])


def zero_shot_transfer(matrix: FloatArray) -> float:
    """Mean gain on stages before they are trained: Σ_{i=2}^{J} (R[i−1][i] − R[0][i]) / (J − 1), J = min(K + 1, S).

    GEM, Eq. 4, with b_i = R[0][i], the agent before training. The mean is over the finished stages and the next one,
    and equals GEM's from K = S − 1 on. Deviation: 0.0 for a run of one stage.
    """
    finished, num_stages = len(matrix) - 1, matrix.shape[1]
    if num_stages == 1:
        return 0.0
    begun = np.arange(1, min(finished + 1, num_stages))
    return _mean(matrix[begun, begun] - matrix[0, begun])


def final_stage_performance(matrix: FloatArray) -> float:
    """Score of the last finished stage at its end, R[K][K], tracked as `continual/plasticity`.

    It complements forgetting: an agent that never changes forgets nothing and learns nothing.
    """
    finished = len(matrix) - 1
    return float(matrix[finished, finished - 1]) if finished else float("nan")


def min_acc(evaluations: Sequence[Evaluation], finished: int) -> float:
    """Mean over earlier stages of the lowest score since their end: Σ_{i<k} min_{t > end of i} p_i(t) / (k − 1).

    De Lange et al. 2023 (arXiv 2205.13452), min-ACC: k is the stage in training. Every evaluation after a stage's end
    counts, including those in the middle of later stages, but not the one at its end. More evaluations make it lower:
    compare runs that evaluate equally often. (Their WC-ACC is p_k/k + (1 − 1/k) · min-ACC.)

    Args:
        evaluations: the run's evaluations, by iteration.
        finished: the number of finished stages; a stage without an evaluation since its end is left out.
    """
    lowest = []
    for stage in range(finished):
        later = [evaluation.scores[stage] for evaluation in evaluations if evaluation.stage > stage]
        lowest.append(min((score for score in later if np.isfinite(score)), default=float("nan")))
    return _mean(np.array(lowest))


def continual_metrics(evaluations: Sequence[Evaluation], num_stages: int, finished: int) -> dict[str, float]:
    """Return the metrics after adaptation under the names that are tracked, undefined ones left out.

    `continual/forward_transfer` is the zero-shot one, which a run can compute by itself; Continual World's needs
    reference runs (`forward_transfer`). Only min_acc changes before a stage ends, since it uses every evaluation.
    Before the end of the first stage nothing is defined, except forward_transfer of a one-stage run, which is 0.

    Args:
        evaluations: the run's evaluations so far, by iteration.
        num_stages: S.
        finished: the number of finished stages; the evaluation at the end of stage k counts stage k.
    """
    matrix = score_matrix(evaluations, num_stages, finished)
    metrics = {
        "average_performance": average_performance(matrix),
        "forgetting": forgetting(matrix),
        "backward_transfer": backward_transfer(matrix),
        "forward_transfer": zero_shot_transfer(matrix),
        "min_acc": min_acc(evaluations, finished),
        "plasticity": final_stage_performance(matrix),
    }
    return {f"continual/{name}": value for name, value in metrics.items() if np.isfinite(value)}


def training_curve(
    evaluations: Sequence[Evaluation], stage: int, column: int | None = None, *, scratch: bool = False
) -> Curve:
    """Return the learning curve of one stage, from the evaluation right before it to the one at its end.

    Args:
        evaluations: the run's evaluations, by iteration.
        stage: index of the stage in training.
        column: index of the stage whose scores to return; None for the same one.
        scratch: whether the stage started with a new agent, so that the curve starts at the scores before training.

    Returns:
        the curve; NaN scores are left out, so it may be empty.
    """
    column = stage if column is None else column
    before = [evaluation for evaluation in evaluations if evaluation.stage < stage][-1:]
    if scratch:
        before = [last._replace(scores=tuple(score_matrix(evaluations, len(last.scores), 0)[0])) for last in before]
    within = before + [evaluation for evaluation in evaluations if evaluation.stage == stage]
    scored = [evaluation for evaluation in within if np.isfinite(evaluation.scores[column])]
    iterations = np.array([evaluation.iteration - within[0].iteration for evaluation in scored], dtype=np.float64)
    return Curve(iterations, np.array([evaluation.scores[column] for evaluation in scored], dtype=np.float64))


def area_under_curve(curve: Curve, iterations: float | None = None) -> float:
    """Mean height of a curve by the trapezoidal rule: 1/Δ ∫ p(t) dt over its length Δ.

    Continual World's AUC_i. Deviation: its code averages the evaluations, without the one before the stage.

    Args:
        curve: the learning curve of one stage.
        iterations: Δ, at which a longer curve is cut off; None for the whole curve.

    Returns:
        the mean; NaN for a curve of fewer than two points.
    """
    if len(curve.iterations) < 2:
        return float("nan")
    begin = curve.iterations[0]
    end = curve.iterations[-1] if iterations is None else min(curve.iterations[-1], iterations)
    if end <= begin:
        return float("nan")
    inside = curve.iterations < end
    times = np.append(curve.iterations[inside], end)
    heights = np.append(curve.scores[inside], np.interp(end, curve.iterations, curve.scores))
    return float(np.trapezoid(heights, times) / (end - begin))


def forward_transfer(curves: Sequence[Curve], references: Sequence[Curve]) -> FloatArray:
    """Forward transfer of each stage, FT_i = (AUC_i − AUC_i^b) / (1 − AUC_i^b); its mean is Continual World's FT.

    Both areas cover the iterations that the stage and its reference have in common.

    Args:
        curves: one per stage, `training_curve` of the run.
        references: one per stage, `training_curve(..., 0)` of a run that trained on that stage alone.

    Returns:
        one value per stage; NaN if a curve has no length, or if the reference leaves nothing to gain, AUC_i^b ≥ 1.

    Raises:
        ValueError: the number of references differs from the number of curves.
    """
    if len(curves) != len(references):
        raise ValueError(f"got {len(references)} references for {len(curves)} stages; pass one reference per stage")
    transfers = []
    for curve, reference in zip(curves, references, strict=True):
        common = min(curve.iterations.max(initial=0.0), reference.iterations.max(initial=0.0))
        area, area_alone = area_under_curve(curve, common), area_under_curve(reference, common)
        transfers.append((area - area_alone) / (1.0 - area_alone) if area_alone < 1.0 else np.nan)
    return np.array(transfers)


def relearning(evaluations: Sequence[Evaluation], first: int, again: int, fraction: float = 0.9) -> Relearning:
    """Iterations until a score is back near its earlier value, for tasks that return (A → B → A).

    The target is `fraction` of the score at the end of the stage `first`, on its held-out tasks; an agent that still
    scores that much needs 0 iterations. The resolution is the interval between evaluations.

    Args:
        evaluations: the run's evaluations, by iteration.
        first: index of the stage that trains on the tasks first.
        again: index of the stage that trains on them again.
        fraction: the target, relative to the score at the end of `first`.

    Returns:
        iterations within each of the two stages; None if the target was not reached, or if nothing was learned in
        `first` (the score at its end is not positive, or NaN).
    """
    curves = [training_curve(evaluations, stage, first) for stage in (first, again)]
    learned = next((past.scores[first] for past in reversed(evaluations) if past.stage == first), float("nan"))
    if not learned > 0.0:
        return Relearning(None, None)
    target = fraction * learned - 1e-9  # 0.9 · 0.8 is 0.7200000000000001
    reached = [curve.iterations[curve.scores >= target] for curve in curves]
    return Relearning(*(int(iterations[0]) if len(iterations) else None for iterations in reached))


def _changes(matrix: FloatArray) -> FloatArray:
    """Return R[K][i] − R[i][i] of the K finished stages."""
    trained = np.arange(len(matrix) - 1)
    changes: FloatArray = matrix[-1, trained] - matrix[trained + 1, trained]
    return changes


def _mean(values: FloatArray) -> float:
    """Return the mean of the finite values; NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")
