import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from metarl.statistics import aggregate, iqm, stratified_bootstrap_ci


def test_iqm_by_hand():
    # Sorted: 0 1 2 3 4 5 6 100. n = 8, 8 // 4 = 2 left out at each end: (2 + 3 + 4 + 5) / 4 = 3.5.
    assert iqm([100, 3, 1, 4, 0, 5, 2, 6]) == 3.5
    # n = 6, 6 // 4 = 1 left out at each end: (2 + 3 + 4 + 7) / 4 = 4.
    assert iqm([-9, 2, 3, 4, 7, 50]) == 4.0
    # n = 3, 3 // 4 = 0: the plain mean.
    assert iqm([1, 2, 6]) == 3.0
    assert iqm([0.25]) == 0.25


def test_iqm_along_an_axis_by_hand():
    # Rows of 4, one left out at each end: (1 + 2) / 2 = 1.5 and (5 + 7) / 2 = 6.
    rows = np.array([[9.0, 1.0, 2.0, 0.0], [7.0, 5.0, 8.0, -1.0]])
    np.testing.assert_allclose(iqm(rows, axis=-1), [1.5, 6.0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(iqm(rows.T, axis=0), [1.5, 6.0], rtol=0, atol=1e-12)
    # All axes: -1 0 1 2 5 7 8 9, two left out at each end: (1 + 2 + 5 + 7) / 4 = 3.75.
    assert iqm(rows) == 3.75


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
def test_iqm_equals_trim_mean(scores):
    np.testing.assert_allclose(iqm(scores), stats.trim_mean(scores, 0.25), rtol=1e-9, atol=1e-6)


def test_constant_scores_give_a_point():
    assert stratified_bootstrap_ci([[0.5] * 4, [0.5] * 9], np.mean, rng=0) == (0.5, 0.5)
    # Strata of different constants: every resample is 3 · 0 and 1 · 1, so its mean is 1/4.
    assert stratified_bootstrap_ci([np.zeros(3), np.ones(1)], np.mean, rng=0) == (0.25, 0.25)


def test_two_scores_by_enumeration():
    # Resamples of {0, 1}: means 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4.
    assert stratified_bootstrap_ci([[0.0, 1.0]], np.mean, rng=0, confidence=0.95) == (0.0, 1.0)  # tails 2.5 % < 1/4
    assert stratified_bootstrap_ci([[0.0, 1.0]], np.mean, rng=0, confidence=0.4) == (0.5, 0.5)  # tails 30 % > 1/4


def test_interval_matches_all_resamples_of_a_small_sample():
    # All 4 · 4 · 27 equally likely resamples of two strata, of sizes 2, 2 and 3, enumerated.
    strata = [[0.0, 3.0], [10.0, 11.0], [-1.0, 0.5, 7.0]]
    choices = [itertools.product(stratum, repeat=len(stratum)) for stratum in strata]
    means = [np.mean(np.concatenate(parts)) for parts in itertools.product(*choices)]
    exact = np.quantile(means, (0.1, 0.9))
    found = stratified_bootstrap_ci(strata, np.mean, rng=0, num_resamples=200_000, confidence=0.8)
    np.testing.assert_allclose(found, exact, rtol=0, atol=0.05)


def test_normal_scores_give_the_t_interval():
    scores = np.random.default_rng(0).normal(2.0, 3.0, size=400)
    low, high = stratified_bootstrap_ci([scores], np.mean, rng=1, num_resamples=20_000)
    expected_low, expected_high = stats.t.interval(0.95, df=len(scores) - 1, loc=scores.mean(), scale=stats.sem(scores))
    width = expected_high - expected_low
    np.testing.assert_allclose((low, high), (expected_low, expected_high), rtol=0, atol=0.03 * width)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_coverage(confidence):
    # True mean of two classes, 40 scores each: (0 + 5) / 2. Standard error of a coverage of 95 % over 200: 1.5 %.
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        strata = [rng.normal(0.0, 1.0, size=40), rng.normal(5.0, 2.0, size=40)]
        low, high = stratified_bootstrap_ci(strata, np.mean, rng=rng, num_resamples=500, confidence=confidence)
        covered += low <= 2.5 <= high
    assert abs(covered / 200 - confidence) <= 0.04


@pytest.mark.parametrize(("classes", "tasks", "coverage"), [(1, 3, 0.75), (5, 2, 0.76), (5, 4, 0.88), (5, 10, 0.92)])
def test_with_few_scores_intervals_cover_less_as_the_pages_say(classes, tasks, coverage):
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        scores = [rng.normal(size=tasks) for _ in range(classes)]
        low, high = stratified_bootstrap_ci(scores, np.mean, rng=seed)
        covered += low <= 0 <= high
    assert abs(covered / 200 - coverage) <= 0.08  # 2.6 standard errors


def test_strata_make_the_interval_narrower():
    # Within a stratum the standard deviation is 0.1, between them 5; pooled it is √(0.1² + 5²) ≈ 5.
    rng = np.random.default_rng(0)
    strata = [rng.normal(0.0, 0.1, size=50), rng.normal(10.0, 0.1, size=50)]
    low, high = stratified_bootstrap_ci(strata, np.mean, rng=1)
    plain_low, plain_high = stratified_bootstrap_ci([np.concatenate(strata)], np.mean, rng=1)
    # Standard errors 0.1 / √100 and 5 / √100; a 95 % interval is 2 · 1.96 of them wide.
    assert high - low == pytest.approx(2 * 1.96 * 0.01, rel=0.2)
    assert plain_high - plain_low == pytest.approx(2 * 1.96 * 0.5, rel=0.2)


def test_equal_seeds_give_equal_intervals():
    scores = [np.random.default_rng(0).normal(size=30)]
    first = stratified_bootstrap_ci(scores, np.mean, rng=7)
    assert first == stratified_bootstrap_ci(scores, np.mean, rng=np.random.default_rng(7))
    assert first != stratified_bootstrap_ci(scores, np.mean, rng=8)


def test_global_random_state_is_left_alone():
    before = np.random.get_state()[1].copy()
    aggregate([0.0, 1.0, 1.0], ["a", "a", "b"], seed=0)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize(
    ("strata", "message"),
    [
        ([], "scores_by_stratum is empty"),
        ([[1.0], []], r"scores_by_stratum\[1\] is empty"),
        ([[1.0], [np.nan, np.nan]], r"scores_by_stratum\[1\] contains NaN"),
        ([[np.inf]], r"scores_by_stratum\[0\] contains NaN or infinity"),
        ([[[1.0, 2.0]]], r"scores_by_stratum\[0\] has shape \(1, 2\)"),
    ],
)
def test_unusable_strata_are_named(strata, message):
    with pytest.raises(ValueError, match=message):
        stratified_bootstrap_ci(strata, np.mean, rng=0)


def test_unusable_arguments_are_named():
    with pytest.raises(ValueError, match="confidence is 95"):
        stratified_bootstrap_ci([[1.0]], np.mean, rng=0, confidence=95)
    with pytest.raises(ValueError, match="num_resamples is 0"):
        stratified_bootstrap_ci([[1.0]], np.mean, rng=0, num_resamples=0)
    with pytest.raises(ValueError, match="statistic returned shape"):
        stratified_bootstrap_ci([[1.0]], lambda pooled, axis: np.mean(pooled), rng=0)
    with pytest.raises(ValueError, match="scores is empty"):
        iqm([])
    with pytest.raises(ValueError, match="scores contains NaN"):
        iqm([1.0, np.nan])


def test_aggregate_by_hand():
    # Sorted 0 0 0 1 1 1 1 4: mean 8/8 = 1; middle four 0 1 1 1: iqm 3/4.
    report = aggregate([1, 4, 0, 1, 0, 1, 0, 1], ["a", "b"] * 4, seed=0)
    assert report["mean"] == 1.0
    assert report["iqm"] == 0.75
    # Class b is {4, 1, 1, 1}, a {1, 0, 0, 0}: the mean of all lies between (0 + 1) / 2 and (1 + 4) / 2 in any resample.
    assert 0.5 <= report["ci95"][0] < 1.0 < report["ci95"][1] <= 2.5
    assert report["iqm_ci95"][0] <= 0.75 <= report["iqm_ci95"][1]
    assert json.loads(json.dumps(report)) == report


def test_aggregate_is_stratified_by_class():
    # Both classes are constant, so only an interval that is stratified by class is a point.
    report = aggregate([0.0, 1.0, 0.0, 1.0], ["reach", "push", "reach", "push"], seed=0)
    assert report["ci95"] == [0.5, 0.5]
    assert aggregate([0.0, 1.0, 0.0, 1.0], ["reach"] * 4, seed=0)["ci95"] == [0.0, 1.0]


def test_aggregate_intervals_belong_to_their_statistics():
    # Of 16 scores the interquartile mean leaves out 4 at each end. One outlier of 1000 comes at least 5 times into a
    # resample with probability 0.2 %, too rarely to reach the 97.5 % quantile; twice or more it comes in 26 %.
    scores = np.append(np.linspace(0.0, 1.0, 15), 1000.0)
    report = aggregate(scores, ["a"] * 16, seed=0)
    assert report["ci95"][1] > 100
    assert 0 < report["iqm_ci95"][0] < 0.5 < report["iqm_ci95"][1] < 1
    assert report == aggregate(scores, ["a"] * 16, seed=np.random.default_rng(0))


def test_aggregate_names_what_is_wrong():
    with pytest.raises(ValueError, match="expected one per score"):
        aggregate([1.0, 2.0], ["a"], seed=0)
    with pytest.raises(ValueError, match="scores contains NaN"):
        aggregate([1.0, np.nan], ["a", "a"], seed=0)
    with pytest.raises(ValueError, match="scores is empty"):
        aggregate([], [], seed=0)
