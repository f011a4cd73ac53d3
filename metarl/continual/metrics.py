"""The account of continual learning: what a run learned, kept and carried over, stage by stage.

Pure functions of numpy arrays and of the evaluations in metrics.jsonl. Must not import torch, environments or agents.

S stages are trained one after the other; K of them have ended. R is the score matrix: `R[k][i]` is the score on stage i
after stage k, both counted from 1 as in the papers, and R[0] the scores before training. As an array `[K + 1, S]` it
has stage i in column i − 1. Scores are success rates, or returns scaled so that 0 is an untrained agent and 1 a
reference; they may be negative or above 1.

A score that is not there (no success is defined for a stage, an evaluation is missing) is NaN. Means leave it out; what
is undefined then, or because too few stages have ended, is NaN, and `account` does not report it.

Deviation from Continual World (Wołczyk et al. 2021, arXiv 2105.10919) in all that uses R: there, a score at the end of
a stage is the mean of the last five evaluations, here the last one alone, of the tasks and episodes asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from metarl.types import FloatArray

_PREFIX, _PREFIX_PRE = "continual/score", "continual/score_pre"


class Evaluation(NamedTuple):
    """One evaluation of all stages on held-out tasks.

    Attributes:
        iteration: of the run; 0 is before training.
        env_steps: of the run.
        stage: index of the stage in training; its last evaluation is the one at its end.
        scores: of each of the S stages after adaptation, NaN where there is none.
        scores_pre: the same before adaptation.
    """

    iteration: int
    env_steps: int
    stage: int
    scores: tuple[float, ...]
    scores_pre: tuple[float, ...]


class Curve(NamedTuple):
    """A score during one stage.

    Attributes:
        iterations: `[n]`, since the stage began, increasing; the evaluation right before it has 0.
        scores: `[n]`, finite.
    """

    iterations: FloatArray
    scores: FloatArray


class Relearning(NamedTuple):
    """Iterations that a score took, when its tasks were trained first and when they came again; None: never reached."""

    first: int | None
    again: int | None


def evaluations(lines: Iterable[Mapping[str, Any]], names: Sequence[str]) -> list[Evaluation]:
    """Return the evaluations of all stages among the lines of metrics.jsonl, by iteration.

    Of several at one iteration (a resumed run evaluates again) the last counts.

    Args:
        lines: from `metarl.runs.tracking.read_metrics`; others than these evaluations are passed over.
        names: of the S stages; stages of one name share their scores.
    """
    found: dict[int, Evaluation] = {}
    for line in lines:
        after, before = (tuple(_score(line, f"{prefix}/{name}") for name in names) for prefix in (_PREFIX, _PREFIX_PRE))
        if np.isfinite([*after, *before]).any():
            found[line["iteration"]] = Evaluation(line["iteration"], line["env_steps"], line["stage"], after, before)
    return [found[iteration] for iteration in sorted(found)]


def _score(line: Mapping[str, Any], name: str) -> float:
    value = float(line.get(name, np.nan))
    return value if np.isfinite(value) else float("nan")


def finished_stages(evaluations: Sequence[Evaluation], iterations: Sequence[int]) -> int:
    """Return K, the number of stages that were trained to their end, which is where they are evaluated.

    Args:
        evaluations: of the run.
        iterations: `[S]`, the length of each stage.
    """
    last = evaluations[-1].iteration if evaluations else 0
    return int((np.cumsum(iterations) <= last).sum())


def score_matrix(evaluations: Sequence[Evaluation], num_stages: int, finished: int, *, pre: bool = False) -> FloatArray:
    """Return R `[K + 1, S]`: row 0 is before training, row k the last evaluation of the k-th stage.

    Args:
        evaluations: by iteration.
        num_stages: S.
        finished: K, how many stages have ended; those of a stage still in training are passed over.
        pre: the scores before adaptation instead of those after it.
    """
    matrix = np.full((finished + 1, num_stages), np.nan)
    for evaluation in evaluations:
        row = evaluation.stage + 1 if evaluation.iteration else 0
        if row <= finished:
            matrix[row] = evaluation.scores_pre if pre else evaluation.scores
    return matrix


def average_performance(matrix: FloatArray) -> float:
    """Mean score after the last stage that has ended, over the stages trained so far: Σ_{i≤K} R[K][i] / K.

    Continual World, P(T) = 1/N Σ p_i(T), after N = K stages. While stages are still to come, they are left out: what is
    done on tasks never trained on is transfer, and would make figures at different K incomparable.
    """
    finished = len(matrix) - 1
    return _mean(matrix[-1, :finished])


def forgetting(matrix: FloatArray) -> float:
    """Mean loss of score since the end of each stage: Σ_{i≤K} (R[i][i] − R[K][i]) / K; negative where scores rose.

    Continual World, F_i = p_i(i · Δ) − p_i(T), over all stages: the last one counts as 0, so 0.0 for one stage.
    """
    return _mean(-_changes(matrix))


def backward_transfer(matrix: FloatArray) -> float:
    """Mean change of the earlier stages' scores since their end: Σ_{i<K} (R[K][i] − R[i][i]) / (K − 1).

    GEM (Lopez-Paz and Ranzato 2017, arXiv 1706.08840, Eq. 3). Deviation: 0.0 for one stage, where there are none.
    """
    return 0.0 if len(matrix) == 2 else _mean(_changes(matrix)[:-1])


def zero_shot_transfer(matrix: FloatArray) -> float:
    """Mean gain on stages before they are trained: Σ_{i=2}^{J} (R[i−1][i] − R[0][i]) / (J − 1), J = min(K + 1, S).

    GEM, Eq. 4, with b_i = R[0][i], the agent before training. It knows the stages trained and the next one; with all
    of S ended, or all but one, it is GEM's. Deviation: 0.0 for a run of one stage, where there are none.
    """
    finished, num_stages = len(matrix) - 1, matrix.shape[1]
    if num_stages == 1:
        return 0.0
    begun = np.arange(1, min(finished + 1, num_stages))
    return _mean(matrix[begun, begun] - matrix[0, begun])


def plasticity(matrix: FloatArray) -> float:
    """Score of the last trained stage at its end, R[K][K]; an agent that never changes forgets nothing and has none."""
    finished = len(matrix) - 1
    return float(matrix[finished, finished - 1]) if finished else float("nan")


def min_acc(evaluations: Sequence[Evaluation], finished: int) -> float:
    """Mean over earlier stages of the lowest score since their end: Σ_{i<k} min_{t > end of i} p_i(t) / (k − 1).

    De Lange et al. 2023 (arXiv 2205.13452), min-ACC: k is the stage in training, and every evaluation after a stage's
    end counts, those amid later stages included; the one at its end does not. The more evaluations, the lower it gets:
    compare runs that evaluate equally often. (Their WC-ACC is p_k/k + (1 − 1/k) · min-ACC.)

    Args:
        evaluations: by iteration.
        finished: how many stages have ended; a stage with no evaluation since its end is left out.
    """
    lowest = []
    for stage in range(finished):
        later = [evaluation.scores[stage] for evaluation in evaluations if evaluation.stage > stage]
        lowest.append(min((score for score in later if np.isfinite(score)), default=float("nan")))
    return _mean(np.array(lowest))


def account(evaluations: Sequence[Evaluation], num_stages: int, finished: int) -> dict[str, float]:
    """Return the scalars as they are tracked, those that are defined.

    `continual/forward_transfer` is the zero-shot one, which a run can compute by itself; Continual World's needs
    reference runs (`forward_transfer`). All are after adaptation. Between the ends of stages they stay as they were,
    but for min_acc, which takes in every evaluation. Before the first stage has ended there are none, or for a run of
    one stage forward_transfer, which is 0.

    Args:
        evaluations: by iteration, up to now.
        num_stages: S.
        finished: how many stages have ended; with the evaluation at the end of stage k it includes k.
    """
    matrix = score_matrix(evaluations, num_stages, finished)
    metrics = {
        "average_performance": average_performance(matrix),
        "forgetting": forgetting(matrix),
        "backward_transfer": backward_transfer(matrix),
        "forward_transfer": zero_shot_transfer(matrix),
        "min_acc": min_acc(evaluations, finished),
        "plasticity": plasticity(matrix),
    }
    return {f"continual/{name}": value for name, value in metrics.items() if np.isfinite(value)}


def training_curve(
    evaluations: Sequence[Evaluation], stage: int, column: int | None = None, *, scratch: bool = False
) -> Curve:
    """Return the scores while one stage was trained, from the evaluation right before it to the one at its end.

    Args:
        evaluations: by iteration.
        stage: index of the stage in training.
        column: index of the stage whose scores they are; None for the same one.
        scratch: whether each stage began with a new agent, that of before training, instead of the one that was
            evaluated right before it.

    Returns:
        the curve; NaN scores are left out, so it may be empty.
    """
    column = stage if column is None else column
    before = [evaluation for evaluation in evaluations if evaluation.stage < stage][-1:]
    if scratch:
        before = [each._replace(scores=tuple(score_matrix(evaluations, len(each.scores), 0)[0])) for each in before]
    within = before + [evaluation for evaluation in evaluations if evaluation.stage == stage]
    scored = [evaluation for evaluation in within if np.isfinite(evaluation.scores[column])]
    iterations = np.array([evaluation.iteration - within[0].iteration for evaluation in scored], dtype=np.float64)
    return Curve(iterations, np.array([evaluation.scores[column] for evaluation in scored], dtype=np.float64))


def area_under_curve(curve: Curve, iterations: float | None = None) -> float:
    """Mean height of a curve by the trapezoid rule: 1/Δ ∫ p(t) dt over its length Δ.

    Continual World's AUC_i. Deviation: its code takes the plain mean of evaluations, the one before the stage left out.

    Args:
        curve: of one stage.
        iterations: Δ, to cut a longer curve off at; None for all of it.

    Returns:
        the mean; NaN for a curve of less than two points, which has no length.
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

    Both areas are over the iterations that the stage and its reference have in common.

    Args:
        curves: one a stage, `training_curve` of the run.
        references: one a stage, `training_curve(..., 0)` of a run that trained on that stage alone.

    Returns:
        one value a stage; NaN where a curve has no length, or where the reference leaves nothing to gain, AUC_i^b ≥ 1.

    Raises:
        ValueError: not one reference for each stage.
    """
    if len(curves) != len(references):
        raise ValueError(f"there are {len(references)} references for {len(curves)} stages; expected one for each")
    transfers = []
    for curve, reference in zip(curves, references, strict=True):
        common = min(curve.iterations.max(initial=0.0), reference.iterations.max(initial=0.0))
        area, area_alone = area_under_curve(curve, common), area_under_curve(reference, common)
        transfers.append((area - area_alone) / (1.0 - area_alone) if area_alone < 1.0 else np.nan)
    return np.array(transfers)


def relearning(evaluations: Sequence[Evaluation], first: int, again: int, fraction: float = 0.9) -> Relearning:
    """Iterations until the score is back at a fraction of what it was, for tasks that are met again (A → B → A).

    The measure is `fraction` of the score at the end of the first time, on the held-out tasks of the first stage; an
    agent that forgot less than that needs 0 iterations. It is as fine as evaluations are frequent.

    Args:
        evaluations: by iteration.
        first: index of the stage that trained on the tasks first.
        again: index of the one that trains on them again.
        fraction: of the score at the end of `first`.

    Returns:
        iterations within each of the two; None where the score was not reached, or if nothing was learned the first
        time (the score at its end is not positive, or NaN).
    """
    curves = [training_curve(evaluations, stage, first) for stage in (first, again)]
    learned = next((each.scores[first] for each in reversed(evaluations) if each.stage == first), float("nan"))
    if not learned > 0.0:
        return Relearning(None, None)
    enough = fraction * learned - 1e-9  # 0.9 · 0.8 is 0.7200000000000001
    reached = [curve.iterations[curve.scores >= enough] for curve in curves]
    return Relearning(*(int(iterations[0]) if len(iterations) else None for iterations in reached))


def dormant_fraction(activations: ArrayLike, threshold: float = 0.0) -> float:
    """Fraction of a layer's units that hardly ever respond: s_i = E|h_i| / mean_k E|h_k| ≤ τ.

    Sokar et al. 2023 (arXiv 2302.12902), Eq. 1; they use τ = 0, 0.025 and 0.1 and leave the output layer out.

    Args:
        activations: `[n, H]`, of H hidden units on n inputs, after the nonlinearity.
        threshold: τ.

    Returns:
        between 0 and 1; 1 where all activations are 0.

    Raises:
        ValueError: another shape, nothing in it, or NaN or infinity.
    """
    values = _samples("activations", activations)
    magnitudes = np.abs(values).mean(axis=0)
    return float((magnitudes <= threshold * magnitudes.mean()).mean())


def effective_rank(features: ArrayLike) -> float:
    """How many directions features use: exp(−Σ p_j ln p_j), p = σ / Σσ of their singular values σ.

    Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality". Features are not centred.

    Args:
        features: `[n, H]`, of H units on n inputs.

    Returns:
        between 1 and min(n, H); 0 where all features are 0.

    Raises:
        ValueError: another shape, nothing in it, or NaN or infinity.
    """
    singular = np.linalg.svd(_samples("features", features), compute_uv=False)
    singular = singular[singular > 0.0]
    if not len(singular):
        return 0.0
    shares = singular / singular.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _samples(name: str, values: ArrayLike) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"{name} has shape {array.shape}; expected [n, H], n inputs and H units, both at least 1")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinity; the network that gave it has diverged")
    return array


def _changes(matrix: FloatArray) -> FloatArray:
    """R[K][i] − R[i][i] of the K stages that have ended."""
    trained = np.arange(len(matrix) - 1)
    changes: FloatArray = matrix[-1, trained] - matrix[trained + 1, trained]
    return changes


def _mean(values: FloatArray) -> float:
    """Mean of those that are there; NaN if there are none."""
    there = values[np.isfinite(values)]
    return float(there.mean()) if len(there) else float("nan")
