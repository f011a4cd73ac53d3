"""The global random streams are saved and restored."""

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
def restored():
    state = random_state()
    yield
    set_random_state(state)


@pytest.mark.parametrize("drawn", [0, 1, 700])
def test_all_streams_resume(drawn):
    """After an odd number of normal draws Python and numpy keep one; after 624 words the generator makes new ones."""
    for _ in range(drawn):
        draw()
    state = random_state()
    expected = [draw() for _ in range(3)]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    set_random_state(state)
    assert [draw() for _ in range(3)] == expected


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("python.words", lambda words: words[:-1]),
        ("python.words", lambda words: words[None]),
        ("python.words", lambda words: torch.cat((words[:-1], torch.tensor([625])))),
        ("numpy.key", lambda key: key[:100]),
        ("numpy.position", lambda position: torch.tensor([625, 0])),  # numpy would crash
        ("numpy.position", lambda position: torch.tensor([-1, 0])),
        ("numpy.gauss", lambda gauss: gauss[:0]),
        ("torch.cpu", lambda state: state[:100]),
        ("torch.cpu", torch.zeros_like),
        ("torch.cuda.7", lambda _: torch.tensor([1, 3]).view(torch.uint8)),
        ("torch.cuda.7", lambda _: torch.zeros(8, dtype=torch.uint8)),
    ],
)
def test_a_damaged_state_is_one_line_and_restores_nothing(name, change):
    before = random_state()
    state = before | {name: change(before.get(name))}
    with pytest.raises(ValueError, match=r"^invalid random state: ") as error:
        set_random_state(state)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 300
    assert all(torch.equal(value, before[entry]) for entry, value in random_state().items())


@pytest.mark.parametrize("name", random_state())
def test_a_missing_entry_is_named(name):
    state = random_state()
    del state[name]
    with pytest.raises(ValueError, match=f"invalid random state: KeyError: '{name}'"):
        check_random_state(state)


def test_the_state_of_a_gpu_that_is_not_here_is_passed_over():
    set_random_state(random_state() | {"torch.cuda.7": torch.tensor([1, 4]).view(torch.uint8)})


def test_a_gpu_that_nothing_has_used_is_left_alone(monkeypatch):
    """Reading the state of its stream would take hundreds of MB of a GPU that others may need."""

    def touched():
        raise AssertionError("a run on the CPU has touched a GPU")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", touched)
    assert not any(name.startswith("torch.cuda") for name in random_state())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_streams_of_gpus_resume():
    torch.cuda.init()  # as a run on a GPU has
    state = random_state()
    expected = torch.rand(3, device="cuda")
    set_random_state(state)
    assert torch.equal(torch.rand(3, device="cuda"), expected)
