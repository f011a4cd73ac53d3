"""The global streams go on where they were."""

import random

import numpy as np
import pytest
import torch

from metarl.random_state import random_state, set_random_state


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_streams_of_gpus_go_on():
    state = random_state()
    expected = torch.rand(3, device="cuda")
    set_random_state(state)
    assert torch.equal(torch.rand(3, device="cuda"), expected)
