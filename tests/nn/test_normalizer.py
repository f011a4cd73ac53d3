"""Running statistics against those of all data at once."""

import pytest
import torch

from metarl.nn.normalizer import Normalizer


def everything(observations):
    data = observations.double()
    return data.mean(0), data.var(0, correction=0)


def test_by_hand():
    # 1, 3 → mean 2, variance 1. With 8: mean 4, variance (9 + 1 + 16)/3 = 26/3.
    normalizer = Normalizer.identity(1, floor=0.01)
    normalizer = normalizer.update(torch.tensor([[1.0], [3.0]]), torch.ones(2, dtype=torch.bool))
    assert (float(normalizer.mean), float(normalizer.variance), float(normalizer.count)) == (2.0, 1.0, 2.0)
    normalizer = normalizer.update(torch.tensor([[8.0]]), torch.ones(1, dtype=torch.bool))
    assert float(normalizer.mean) == 4.0
    assert float(normalizer.variance) == pytest.approx(26 / 3)
    torch.testing.assert_close(normalizer(torch.tensor([7.0])), torch.tensor([3.0 / (26 / 3) ** 0.5]))


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_merging_batches_equals_all_data(offset):
    """A variance of 1 on an offset of 1e4: in float32, E[x²] − E[x]² would be a difference of 1e8 ± 8."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(size, 2, 3, generator=generator) + offset + i for i, size in enumerate((5, 40, 1, 200, 17))]
    normalizer = Normalizer.identity(3, floor=0.01)
    for part in parts:
        normalizer = normalizer.update(part, torch.ones(part.shape[:-1], dtype=torch.bool))
    mean, variance = everything(torch.cat(parts).flatten(0, 1))
    torch.testing.assert_close(normalizer.mean.double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(normalizer.variance.double(), variance, rtol=1e-5, atol=0)
    assert normalizer.count == sum(part.shape[0] * 2 for part in parts)


def test_a_large_offset_is_normalised_to_mean_0_and_deviation_1():
    observations = torch.randn(5000, 2, generator=torch.Generator().manual_seed(0)) + 1e4
    valid = torch.ones(5000, dtype=torch.bool)
    normalized = Normalizer.identity(2, floor=0.01).update(observations, valid)(observations)
    torch.testing.assert_close(normalized.mean(0), torch.zeros(2), atol=2e-3, rtol=0)
    torch.testing.assert_close(normalized.std(0), torch.ones(2), atol=2e-3, rtol=0)


def test_invalid_observations_are_ignored():
    observations = torch.tensor([[1.0], [float("nan")], [3.0], [1e9]])
    valid = torch.tensor([True, False, True, False])
    normalizer = Normalizer.identity(1, floor=0.01).update(observations, valid)
    assert (float(normalizer.mean), float(normalizer.variance), float(normalizer.count)) == (2.0, 1.0, 2.0)
    unchanged = normalizer.update(observations, valid & False)
    assert (float(unchanged.mean), float(unchanged.variance), float(unchanged.count)) == (2.0, 1.0, 2.0)


def test_the_floor_bounds_the_scale():
    # A constant entry has deviation 0; it is divided by 0.5, and nothing is clipped.
    observations = torch.full((4, 1), 2.0)
    normalizer = Normalizer.identity(1, floor=0.5).update(observations, torch.ones(4, dtype=torch.bool))
    torch.testing.assert_close(normalizer(torch.tensor([3.0])), torch.tensor([2.0]))
    torch.testing.assert_close(normalizer(torch.tensor([52.0])), torch.tensor([100.0]))


def test_the_identity_changes_nothing_and_an_update_changes_no_other():
    identity = Normalizer.identity(2, floor=0.01)
    observations = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(identity(observations), observations)
    identity.update(observations, torch.ones(6, dtype=torch.bool))
    assert torch.equal(identity(observations), observations) and identity.count == 0


def test_the_state_restores_it():
    observations = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    normalizer = Normalizer.identity(2, 0.01).update(observations, torch.ones(6, dtype=torch.bool))
    again = Normalizer(**normalizer.state_dict(), floor=0.01)
    assert torch.equal(again(observations), normalizer(observations))
