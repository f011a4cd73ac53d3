"""The global streams go on where they were."""

import random

import numpy as np
import pytest
import torch

from metarl.runs.random_state import check_random_state, random_state, set_random_state


def draw():
    return [
        random.random(),
        random.gauss(),
        np.random.rand(),
        np.random.randn(),
        float(torch.rand(())),
        float(torch.randn(())),
    ]


@pytest.fixture(autouse=True)
def as_before():
    state = random_state()
    yield
    set_random_state(state)


@pytest.mark.parametrize("drawn", [0, 1, 700])
def test_all_streams_go_on(drawn):
    """After an odd number of normal draws Python and numpy keep one; after 624 words the generator makes new ones."""
    for _ in range(drawn):
        draw()
    state = random_state()
    expected = [draw() for _ in range(3)]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    set_random_state(state)
    assert [draw() for _ in range(3)] == expected


def test_the_state_is_a_copy():
    state = random_state()
    expected = draw()
    draw()
    set_random_state(state)
    assert draw() == expected


def changed(name, change):
    """The state with an entry that `change` has written to, or returned."""
    state = random_state()
    value = state[name].clone()
    found = change(value)
    return {**state, name: value if found is None else found}


def put(place, number):
    def change(value):
        value[place] = number

    return change


FORGED = [
    *(("python.words", put(*each)) for each in ((0, 2), (0, 4), (1, -1), (624, 2**32), (625, 625), (625, -1))),
    ("python.words", lambda value: value[:-1]),
    ("python.words", lambda value: value.double()),
    ("python.words", lambda value: value[None]),
    ("python.gauss", lambda value: torch.zeros(2, dtype=torch.float64)),
    ("numpy.key", lambda value: value[:100]),
    ("numpy.key", put(5, -1)),
    ("numpy.key", put(5, 2**32)),
    *(("numpy.position", put(*each)) for each in ((0, 10**8), (0, 625), (0, -1), (1, 2), (1, -1))),
    ("numpy.position", lambda value: value[:1]),
    ("numpy.gauss", lambda value: torch.zeros(0, dtype=torch.float64)),
    ("torch.cpu", lambda value: value[:100]),
    ("torch.cpu", torch.zeros_like),
    ("torch.cpu", lambda value: value.float()),
]


@pytest.mark.parametrize(("name", "change"), FORGED)
def test_a_state_that_no_stream_can_be_in_is_named_and_nothing_is_restored(name, change):
    state, before = changed(name, change), random_state()
    with pytest.raises(ValueError, match=f"cannot load '{name}': "):
        set_random_state(state)
    assert all(torch.equal(value, before[entry]) for entry, value in random_state().items())


@pytest.mark.parametrize("name", ["python.words", "python.gauss", "numpy.key", "numpy.position", "torch.cpu"])
def test_an_entry_that_is_missing_is_named(name):
    state = random_state()
    del state[name]
    with pytest.raises(ValueError, match=f"cannot load '{name}': found nothing"):
        check_random_state(state)


@pytest.mark.parametrize(
    ("numbers", "found"), [([1, 4], None), ([1, 3], "multiple of 4, found 3"), ([1], "expected 16 of torch.uint8")]
)
def test_the_state_of_a_gpu_is_checked_where_there_is_none_too(numbers, found):
    state = random_state() | {"torch.cuda.7": torch.tensor(numbers).view(torch.uint8)}
    if found is None:
        check_random_state(state)
    else:
        with pytest.raises(ValueError, match=f"cannot load 'torch.cuda.7': .*{found}"):
            check_random_state(state)


def test_a_gpu_that_nothing_has_used_is_left_alone(monkeypatch):
    """Asking for the state of its stream would take hundreds of MB of a GPU that others may need."""

    def touched():
        raise AssertionError("a run on the CPU has touched a GPU")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", touched)
    assert not any(name.startswith("torch.cuda") for name in random_state())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_streams_of_gpus_go_on():
    torch.cuda.init()  # as a run on a GPU has
    state = random_state()
    expected = torch.rand(3, device="cuda")
    set_random_state(state)
    assert torch.equal(torch.rand(3, device="cuda"), expected)
