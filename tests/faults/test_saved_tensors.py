"""What is saved comes back bit for bit, whatever tensors it is made of."""

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, given, settings

from metarl.runs.checkpoint import load, save
from metarl.types import Position
from tests.faults.harness import SPACES

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


@st.composite
def tensors(draw):
    """A tensor of any kind, size and layout, whose bytes may be any: NaN and infinity among them."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 3), max_size=4))
    whole = torch.Size(shape).numel()
    if dtype == torch.bool:
        numbers = torch.tensor(draw(st.lists(st.booleans(), min_size=whole, max_size=whole)), dtype=dtype)
    else:
        size = whole * torch.tensor([], dtype=dtype).element_size()
        numbers = torch.tensor(list(draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8).view(dtype)
    made = numbers.reshape(shape)
    layout = draw(st.sampled_from(["plain", "transposed", "strided", "expanded", "part"]))
    if layout == "transposed" and made.ndim > 1:
        return made.transpose(0, -1)
    if layout == "strided" and made.ndim:
        return made[::2]
    if layout == "expanded":
        return made[None].expand(3, *made.shape)
    if layout == "part" and made.ndim:
        return made[1:]
    return made


def same(left, right):
    """Bit for bit: NaNs are equal if they are the same ones."""
    left, right = (torch.empty(each.shape, dtype=each.dtype).copy_(each).reshape(-1) for each in (left, right))
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    state=st.dictionaries(st.text(max_size=20), tensors(), max_size=5),
    again=st.booleans(),
    steps=st.integers(0, 2**62 - 1),
    score=st.none() | st.floats(allow_nan=False, allow_infinity=False),
)
def test_what_is_saved_comes_back_bit_for_bit(tmp_path, state, again, steps, score):
    if again:  # several names for one memory
        state |= {f"{name}, again": value for name, value in state.items()}
        state |= {f"{name}, in part": value[1:] for name, value in state.items() if value.ndim}
    states, place = {"agent": {"iteration": torch.tensor(0)}, "other": state}, Position(env_steps=steps)
    path = save(tmp_path, states, place, SPACES, 1, score=score, logs={"metrics.jsonl": steps})
    found = load(path)
    assert (found.position, found.spaces, found.manifest.score) == (place, SPACES, score)
    loaded = found.load("other")
    assert loaded.keys() == state.keys()
    for name, value in state.items():
        assert loaded[name].shape == value.shape and same(loaded[name], value), name


def test_memory_that_is_shared_and_read_in_another_order_is_saved(tmp_path):
    whole = torch.arange(6.0).reshape(2, 3)
    state = {"whole": whole, "transposed": whole.T, "column": whole[:, 1], "twice": whole[:1].expand(2, 3)}
    found = load(save(tmp_path, {"agent": state}, Position(), SPACES, 1)).state
    assert all(torch.equal(found[name], value) for name, value in state.items())
