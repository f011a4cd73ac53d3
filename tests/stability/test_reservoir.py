"""The reservoir: a uniform sample however trials arrive, shrunk, grown, on disk or in memory."""

import errno
import os

import numpy as np
import pytest
import torch
from scipy import stats

from metarl.stability.reservoir import Reservoir, items_of, join, rollouts_of
from tests.stability.agents import iteration, make

IN_MEMORY = 2.0**30


def trials(first, count, length=2):
    """Trials `first`, `first + 1`, … that hold their number, in fields of several types."""
    numbers = torch.arange(first, first + count)
    return {
        "number": numbers,
        "0.rewards": numbers[:, None, None].expand(count, 1, length).float(),
        "0.valid": torch.ones(count, 1, length, dtype=torch.bool),
        "0.observations": numbers[:, None, None, None].expand(count, 1, length, 3).double(),
    }


def fill(batches, capacity, rng, shrunk=None, make=trials):
    reservoir, first = Reservoir(capacity, IN_MEMORY, None), 0
    for count in batches:
        reservoir.add(make(first, count), rng)
        first += count
    if shrunk is not None:
        reservoir.shrink(shrunk, rng)
    return reservoir


def numbers_of(first, count):
    """Trials that hold nothing but their number."""
    return {"number": torch.arange(first, first + count)}


def held(reservoir):
    return reservoir.take(np.arange(len(reservoir)))["number"].tolist()


@pytest.mark.parametrize(
    ("batches", "shrunk"),
    [
        ([1] * 20, None),
        ([20], None),
        ([3, 7, 1, 9], None),
        ([5, 15], None),
        ([4, 0, 16], None),
        ([3, 7, 1, 9], 2),
        ([20], 3),
    ],
)
def test_every_trial_is_kept_with_the_same_probability(batches, shrunk):
    """20 trials, 5 places: each stays with probability 1/4, whichever batch it came in."""
    rng, counts, runs = np.random.default_rng(0), np.zeros(20), 1000
    kept = shrunk or 5
    for _ in range(runs):
        numbers = held(fill(batches, 5, rng, shrunk, numbers_of))
        assert len(set(numbers)) == kept
        counts[numbers] += 1
    # Places without replacement vary less than in χ²'s model by (20 − kept) / 19: the statistic is scaled up for it.
    statistic = ((counts - runs * kept / 20) ** 2 / (runs * kept / 20)).sum() * 19 / (20 - kept)
    assert 0.001 < stats.chi2.sf(statistic, 19) < 0.999


def test_pairs_of_neighbours_are_kept_independently():
    """In one batch or in many, 2 given trials stay together with probability 5 · 4 / (20 · 19) = 1/19."""
    rng, runs = np.random.default_rng(1), 2000
    for batches in ([20], [12, 8], [1, 18, 1]):
        together = sum({18, 19} <= set(held(fill(batches, 5, rng, make=numbers_of))) for _ in range(runs))
        assert stats.binomtest(together, runs, 1 / 19).pvalue > 0.001


def test_after_shrinking_a_reservoir_goes_on_uniformly():
    rng, counts, runs = np.random.default_rng(2), np.zeros(20), 1000
    for _ in range(runs):
        reservoir = fill([10], 6, rng, 4, numbers_of)
        reservoir.add(numbers_of(10, 10), rng)
        numbers = held(reservoir)
        assert len(reservoir) == len(set(numbers)) == 4
        counts[numbers] += 1
    statistic = ((counts - runs / 5) ** 2 / (runs / 5)).sum() * 19 / 16
    assert stats.chi2.sf(statistic, 19) > 0.001


def test_below_its_capacity_it_holds_all():
    reservoir = fill([2, 0, 3], 9, np.random.default_rng(0))
    assert len(reservoir) == 5 and held(reservoir) == [0, 1, 2, 3, 4]
    reservoir.shrink(7, np.random.default_rng(0))
    assert held(reservoir) == [0, 1, 2, 3, 4] and reservoir.capacity == 7
    reservoir.shrink(8, np.random.default_rng(0))
    assert reservoir.capacity == 7
    assert len(Reservoir(3, IN_MEMORY, None)) == 0


def test_the_fields_of_a_trial_stay_together_and_their_types_as_they_were():
    reservoir = fill([4, 30, 6], 5, np.random.default_rng(0))
    found = reservoir.take(np.array([3, 0, 3]))
    assert {name: value.dtype for name, value in found.items()} == {
        name: value.dtype for name, value in trials(0, 1).items()
    }
    for name, value in trials(0, 1).items():
        assert found[name].shape == (3, *value.shape[1:])
    for number, rewards, observations in zip(found["number"], found["0.rewards"], found["0.observations"], strict=True):
        assert (rewards == number).all() and (observations == number).all()
    assert torch.equal(found["number"][0], found["number"][2])


def test_what_is_taken_is_a_copy():
    reservoir = fill([5], 5, np.random.default_rng(0))
    reservoir.take(np.array([0]))["number"].fill_(99)
    assert held(reservoir) == [0, 1, 2, 3, 4]


def test_longer_and_shorter_trials_come_later():
    """Trial 1 is longer than what there was, trial 2 shorter again and in a place that was longer: zeros behind it."""
    reservoir = Reservoir(3, IN_MEMORY, None)
    reservoir.add(trials(1, 1, length=2), np.random.default_rng(0))
    reservoir.add(trials(2, 1, length=4), np.random.default_rng(0))
    rewards = reservoir.take(np.arange(2))["0.rewards"][:, 0]
    torch.testing.assert_close(rewards, torch.tensor([[1.0, 1.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]]))
    reservoir.set(np.array([1]), trials(3, 1, length=1))
    found = reservoir.take(np.arange(2))
    torch.testing.assert_close(found["0.rewards"][1, 0], torch.tensor([3.0, 0.0, 0.0, 0.0]))
    assert found["0.valid"][1, 0].tolist() == [True, False, False, False]


def on_disk(folder):
    return Reservoir(6, 0.0, folder)


def test_on_disk_it_holds_the_same_bits_and_leaves_no_file(tmp_path):
    found = []
    for reservoir in (Reservoir(6, IN_MEMORY, None), on_disk(tmp_path)):
        rng = np.random.default_rng(3)
        for first, count, length in ((0, 4, 2), (4, 9, 5), (13, 3, 1)):
            reservoir.add(trials(first, count, length), rng)
        reservoir.set(np.array([2]), {"mean": torch.full((1, 1, 5, 2), 0.1)})
        found.append((reservoir.state_dict(), reservoir.take(np.array([5, 1]))))
        reservoir.shrink(4, rng)
        found[-1] += (reservoir.state_dict(),)
        assert list(tmp_path.iterdir()) == []  # no name, so nothing is left whatever ends the process
        assert isinstance(reservoir._arrays["number"], np.memmap) == (reservoir._memory_bytes == 0)
    for ours, theirs in zip(*found, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("memory_bytes", "disk"), [(660.0, False), (659.0, True)])
def test_trials_lie_on_disk_if_all_together_are_too_large(tmp_path, memory_bytes, disk):
    """10 places of 8 + 2 · 4 + 2 · 1 + 2 · 3 · 8 = 66 bytes."""
    reservoir = Reservoir(10, memory_bytes, tmp_path)
    reservoir.add(trials(0, 1), np.random.default_rng(0))
    assert {isinstance(array, np.memmap) for array in reservoir._arrays.values()} == {disk}


allocates = pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot reserve blocks")


def refuse(number):
    def allocate(*_):
        raise OSError(number, os.strerror(number))

    return allocate


@allocates
def test_a_disk_without_room_is_an_error_and_nothing_is_mapped(tmp_path, monkeypatch):
    """A page of a map that finds no block when it is written ends the process, whatever it would have caught."""
    reservoir = on_disk(tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", refuse(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left on device"):
        reservoir.add(trials(0, 1), np.random.default_rng(0))
    assert reservoir._arrays == {} and list(tmp_path.iterdir()) == []


@allocates
def test_the_blocks_of_all_places_are_reserved_at_once(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(os, "posix_fallocate", lambda file, offset, size: sizes.append((offset, size)))
    on_disk(tmp_path).add(trials(0, 1), np.random.default_rng(0))
    assert sorted(sizes) == [(0, 6 * size) for size in (2, 8, 8, 48)]


@allocates
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_reserve_blocks_is_used_all_the_same(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "posix_fallocate", refuse(number))
    reservoir = on_disk(tmp_path)
    reservoir.add(trials(0, 3), np.random.default_rng(0))
    assert held(reservoir) == [0, 1, 2] and isinstance(reservoir._arrays["number"], np.memmap)


@pytest.mark.parametrize("memory_bytes", [IN_MEMORY, 0.0])
def test_a_loaded_reservoir_goes_on_exactly(memory_bytes):
    ours = fill([3, 8], 5, np.random.default_rng(0))
    theirs = Reservoir(1, memory_bytes, None)
    theirs.load_state_dict({name: value.clone() for name, value in ours.state_dict().items()})
    assert (theirs.seen, theirs.capacity, len(theirs)) == (11, 5, 5)
    for reservoir in (ours, theirs):
        reservoir.add(trials(11, 4, length=3), np.random.default_rng(1))
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name
    few = fill([2], 5, np.random.default_rng(0))  # not full
    theirs.load_state_dict(few.state_dict())
    theirs.add(trials(2, 1), np.random.default_rng(0))
    assert held(theirs) == [0, 1, 2]


@pytest.mark.parametrize("entry", ["seen", "capacity"])
def test_an_entry_that_is_missing_or_of_another_size_is_named(entry):
    state = fill([3, 8], 5, np.random.default_rng(0)).state_dict()
    wrong = {**state, entry: torch.zeros(3)}
    for bad in ({name: value for name, value in state.items() if name != entry}, wrong):
        with pytest.raises(ValueError, match=f"cannot load '{entry}'"):
            Reservoir(1, IN_MEMORY, None).load_state_dict(bad)
    with pytest.raises(ValueError, match="cannot load 'number': expected 5 trials, found 4"):
        Reservoir(1, IN_MEMORY, None).load_state_dict({**state, "number": state["number"][:4]})


def test_trials_of_several_reservoirs_are_padded_to_the_longest():
    joined = join([trials(1, 2, length=1), trials(7, 1, length=3)])
    torch.testing.assert_close(
        joined["0.rewards"][:, 0], torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [7.0, 7.0, 7.0]])
    )
    assert joined["0.valid"][:, 0].sum(-1).tolist() == [1, 1, 3]
    assert joined["number"].tolist() == [1, 2, 7] and joined["0.observations"].dtype == torch.float64


# Rollouts as trials


def test_with_a_memory_each_rollout_is_a_trial_of_its_own():
    agent = make("gru")
    (rollout,) = iteration(agent, tasks=3, rollouts=2)
    items = items_of([rollout])
    assert items["0.actions"].shape == (6, 1, 5, 2)
    (back,) = rollouts_of(items, torch.device("cpu"))
    for name, value in vars(rollout).items():
        torch.testing.assert_close(getattr(back, name), value.flatten(0, 1)[:, None], rtol=0, atol=0)
    (short,) = rollouts_of({name: value[[1, 3]] for name, value in items.items()}, torch.device("cpu"))
    assert short.valid.shape == (2, 1, 4) and short.valid.all()  # the odd ones have 4 of 5 steps


def test_with_adaptation_a_task_is_a_trial():
    agent = make("maml", adaptation_steps=2)
    rollouts = iteration(agent, tasks=3, rollouts=2)
    items = items_of(rollouts)
    assert len(items) == 30 and items["2.rewards"].shape == (3, 2, 4)
    for before, back in zip(rollouts, rollouts_of(items, torch.device("cpu")), strict=True):
        for name, value in vars(before).items():
            assert torch.equal(getattr(back, name), value), name
