"""Statistics over the scores of tasks: interquartile mean, bootstrap interval of a mean, stratified by class of task.

Pure functions of numpy arrays; randomness is passed in as a generator or a seed. Must not import torch, environments
or agents.

The estimators are those of Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice",
arXiv 2108.13264, section 4. Deviation: their strata are the runs of one task; ours are the tasks of one class, for one
trained agent. The intervals reflect the choice of tasks, not of the training seed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypedDict, overload

import numpy as np
from numpy.typing import ArrayLike

from metarl.types import FloatArray


class Aggregate(TypedDict):
    """The output of `aggregate`, as it appears in reports.

    Attributes:
        mean: mean of all scores.
        iqm: interquartile mean of all scores.
        ci95: `[low, high]`, 95 % interval of the MEAN.
        iqm_ci95: `[low, high]`, 95 % interval of the interquartile mean.
    """

    mean: float
    iqm: float
    ci95: list[float]
    iqm_ci95: list[float]


@overload
def iqm(scores: ArrayLike, axis: None = None) -> float: ...
@overload
def iqm(scores: ArrayLike, axis: int) -> FloatArray: ...
def iqm(scores: ArrayLike, axis: int | None = None) -> float | FloatArray:
    """Interquartile mean: the mean of the middle 50 % (Agarwal et al. 2021, 4.3).

    Of n sorted scores, ⌊n/4⌋ are left out at each end, as in rliable and `scipy.stats.trim_mean(scores, 0.25)`.

    Args:
        scores: an array of any shape, not empty.
        axis: the axis to reduce; None for all axes.

    Returns:
        a float, or an array with the shape of `scores` without `axis`.

    Raises:
        ValueError: no scores, NaN or infinity.
    """
    values = _finite("scores", scores)
    ordered = np.sort(values, axis=axis)  # flattened when axis is None
    ordered = ordered if axis is None else np.moveaxis(ordered, axis, -1)
    num_scores = ordered.shape[-1]
    cut = num_scores // 4
    middle: FloatArray = ordered[..., cut : num_scores - cut]
    return float(middle.mean()) if axis is None else np.asarray(middle.mean(axis=-1), dtype=np.float64)


def stratified_bootstrap_ci(
    scores_by_stratum: Sequence[ArrayLike],
    statistic: Callable[..., Any],
    *,
    rng: np.random.Generator | int,
    num_resamples: int = 2000,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval, resampled within each stratum (Agarwal et al. 2021, 4.1).

    Each resample draws n_i scores with replacement from every stratum of n_i scores, pools them, and computes the
    statistic. The interval covers the middle `confidence` of the resampled values. A stratum of one score does not
    vary and adds nothing to the width; with one score in every stratum the interval is a point.

    Args:
        scores_by_stratum: one `[n_i]` array per stratum (the task scores of one class), n_i ≥ 1.
        statistic: reduces an axis, as `np.mean` and `iqm` do; called as `statistic(pooled, axis=-1)` on
            `[num_resamples, Σ n_i]`, must return `[num_resamples]`.
        rng: a generator or seed; the same seed gives the same interval.
        num_resamples: the number of bootstrap resamples, ≥ 1.
        confidence: the confidence level, in (0, 1).

    Returns:
        the lower and the upper limit.

    Raises:
        ValueError: no strata; a stratum that is empty, not 1-d, or has NaN or infinity; or an argument out of range.
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence}; expected a number between 0 and 1, e.g. 0.95")
    if num_resamples < 1:
        raise ValueError(f"num_resamples is {num_resamples}; expected at least 1, e.g. 2000")
    if len(scores_by_stratum) == 0:
        raise ValueError("scores_by_stratum is empty; expected at least one array of scores")
    generator = np.random.default_rng(rng)
    resampled: list[FloatArray] = []
    for position, scores in enumerate(scores_by_stratum):
        stratum = _finite(f"scores_by_stratum[{position}]", scores)
        if stratum.ndim != 1:
            raise ValueError(f"scores_by_stratum[{position}] has shape {stratum.shape}; expected one dimension")
        resampled.append(stratum[generator.integers(len(stratum), size=(num_resamples, len(stratum)))])
    values = np.asarray(statistic(np.concatenate(resampled, axis=-1), axis=-1), dtype=np.float64)
    if values.shape != (num_resamples,):
        raise ValueError(f"statistic returned shape {values.shape}; expected ({num_resamples},): it must reduce `axis`")
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(values, (tail, 1.0 - tail))
    return float(low), float(high)


def aggregate(scores: ArrayLike, strata: Sequence[Hashable], seed: np.random.Generator | int) -> Aggregate:
    """Summarise the scores of tasks of several classes.

    Args:
        scores: `[n]`, one score per task.
        strata: `[n]`, the class of each task (`Task.name`), by which the intervals are stratified.
        seed: the seed of the bootstrap, or a generator.

    Returns:
        mean and interquartile mean of all scores, each with its 95 % interval: `ci95` is that of the MEAN, `iqm_ci95`
        that of the interquartile mean.

    Raises:
        ValueError: no scores, NaN or infinity, or a number of classes other than n.
    """
    values = _finite("scores", scores)
    if values.shape != (len(strata),):
        raise ValueError(f"scores has shape {values.shape} and strata {len(strata)} labels; expected one per score")
    positions: dict[Hashable, list[int]] = {}
    for position, label in enumerate(strata):
        positions.setdefault(label, []).append(position)
    by_stratum = [values[members] for members in positions.values()]
    generator = np.random.default_rng(seed)
    return {
        "mean": float(values.mean()),
        "iqm": iqm(values),
        "ci95": list(stratified_bootstrap_ci(by_stratum, np.mean, rng=generator)),
        "iqm_ci95": list(stratified_bootstrap_ci(by_stratum, iqm, rng=generator)),
    }


def _finite(name: str, scores: ArrayLike) -> FloatArray:
    values = np.asarray(scores, dtype=np.float64)
    if values.size == 0:
        raise ValueError(f"{name} is empty; expected at least one score")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} contains NaN or infinity; drop the tasks without a score first")
    return values
