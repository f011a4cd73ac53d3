"""Dormant units and effective rank, worked out by hand."""

import numpy as np
import pytest

from metarl.continual.network_use import dormant_fraction, effective_rank


def test_dormant_fraction_by_hand():
    # E|h| = 0, 0.1, 1.9, 2; their mean is 1, so s = 0, 0.1, 1.9, 2.
    activations = np.array([[0.0, 0.2, 1.8, -1.0], [0.0, 0.0, 2.0, 3.0]])
    assert dormant_fraction(activations) == 0.25
    assert dormant_fraction(activations, 0.025) == 0.25
    assert dormant_fraction(activations, 0.1 + 1e-9) == 0.5
    assert dormant_fraction(10 * activations, 0.11) == 0.5  # the scale does not matter
    assert dormant_fraction(np.ones((3, 5))) == 0.0
    assert dormant_fraction(np.zeros((3, 5))) == 1.0


def test_effective_rank_by_hand():
    assert effective_rank(np.eye(4)) == pytest.approx(4.0)  # four equal singular values: exp(ln 4)
    assert effective_rank(np.outer([1.0, 2.0, 3.0], [1.0, -1.0])) == pytest.approx(1.0, abs=1e-9)
    # Singular values 3 and 1: p = 3/4, 1/4; exp(−3/4 ln 3/4 − 1/4 ln 1/4) = (4/3)^(3/4) · 4^(1/4).
    skewed = np.array([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert effective_rank(skewed) == pytest.approx((4 / 3) ** 0.75 * 4**0.25)
    assert effective_rank(100 * skewed) == pytest.approx(effective_rank(skewed))
    assert effective_rank(np.zeros((3, 2))) == 0.0


@pytest.mark.parametrize("measure", [dormant_fraction, effective_rank])
def test_unusable_activations_are_named(measure):
    with pytest.raises(ValueError, match=r"has shape \(3,\); expected \[n, H\]"):
        measure(np.ones(3))
    with pytest.raises(ValueError, match=r"has shape \(0, 4\)"):
        measure(np.ones((0, 4)))
    with pytest.raises(ValueError, match="contains NaN or infinity"):
        measure([[1.0, float("nan")]])
