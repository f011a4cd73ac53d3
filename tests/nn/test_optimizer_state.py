"""Clipping a gradient: by hand, and of what is not finite."""

import pytest
import torch

from metarl.nn.optimizer_state import clip_gradients


def params(*gradients):
    found = {f"{i}": torch.zeros(len(values), requires_grad=True) for i, values in enumerate(gradients)}
    for value, gradient in zip(found.values(), gradients, strict=True):
        value.grad = torch.tensor(gradient)
    return found


@pytest.mark.parametrize(("max_norm", "factor"), [(2.6, 0.2), (13.0, 1.0), (99.0, 1.0)])
def test_the_norm_of_all_gradients_together_is_bounded(max_norm, factor):
    """√(3² + 4² + 12²) = 13."""
    found = params([3.0, 4.0], [12.0])
    assert clip_gradients(found, max_norm, 0.5, "") == 13.0
    torch.testing.assert_close(found["0"].grad, factor * torch.tensor([3.0, 4.0]), rtol=1e-5, atol=0)
    torch.testing.assert_close(found["1"].grad, factor * torch.tensor([12.0]), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("gradient", "loss"), [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan")), (1.0, float("-inf"))]
)
def test_what_is_not_finite_is_told_and_left_to_be_looked_at(gradient, loss):
    found = params([3.0, 4.0], [gradient])
    with pytest.raises(FloatingPointError, match=r"gradient is not finite \(norm .*, loss .*\); lower the rate"):
        clip_gradients(found, 1.0, loss, "lower the rate")
    assert found["0"].grad.tolist() == [3.0, 4.0]  # not scaled by NaN
