"""Whatever befalls files of a run: they are rejected by name, the checkpoint before is used, nothing is executed."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings

from metarl import checkpoint
from metarl.checkpoint import CorruptCheckpointError, Position, load, load_latest, save
from metarl.config import dump_config
from metarl.training import as_config, train
from tests.faults.harness import SPACES, names, save_states

MANIFEST = "manifest.json"
FILES = ("agent.safetensors", "manifest.json", "random.safetensors", "stability.safetensors")
each_file = pytest.mark.parametrize("name", FILES)

WEDGES = {"family": "navigation", "name": "rotated_wedges", "horizon": 5}
CONFIG = as_config(
    {
        "num_tasks": 2,
        "rollouts_per_task": 2,
        "num_workers": 0,
        "device": "cpu",
        "checkpoint_every_iterations": 1,
        "keep_checkpoints": 2,
        "keep_best_checkpoints": 0,
        "evaluation": {"every_iterations": 0, "num_tasks": 1},
        "agent": {"name": "maml_ppo", "hidden_sizes": [8], "outer": {"epochs": 1}},
        "stability": [{"name": "ewc", "fisher_states": 20}, {"name": "replay", "capacity": 4}],
        "stages": [{"name": f"{i}", "tasks": {**WEDGES, "wedges": [i]}, "iterations": 3} for i in range(2)],
    }
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that was stopped in its second stage, with checkpoints of iterations 4 and 5."""
    run_dir = tmp_path_factory.mktemp("trained")
    train(CONFIG, run_dir=run_dir, max_iterations=5)
    assert names(run_dir / "checkpoints") == ["000004", "000005"]
    assert names(run_dir / "checkpoints" / "000005") == list(FILES)
    return run_dir


@pytest.fixture
def run_dir(trained, tmp_path):
    """A copy of it, to damage."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def older(run_dir):
    return run_dir / "checkpoints" / "000004"


@pytest.fixture
def newer(run_dir):
    return run_dir / "checkpoints" / "000005"


@pytest.fixture
def assert_rejected(older, newer, caplog):
    """Check that the newer checkpoint is rejected by the name of its file, with a reason, and the older one used."""

    def check(name, *reasons):
        with pytest.raises(CorruptCheckpointError) as error:
            load(newer)
        told = str(error.value)
        assert told.startswith(f"{newer / name}: ") and len(told) > len(f"{newer / name}: ") + 10
        assert told.isprintable() and len(told) < 1000
        assert not reasons or any(reason in told for reason in reasons), told
        caplog.clear()
        assert load_latest(newer.parent).path == older
        assert f"rejected a checkpoint, 000004 is used: {told}" in caplog.text

    return check


def places(size):
    """Return some forty places in a file: its ends, the header of a safetensors file, and all over it."""
    return sorted({*range(10), *(size * i // 24 for i in range(24)), *range(size - 8, size)})


@each_file
def test_a_flipped_byte_anywhere_is_found(newer, assert_rejected, name):
    data, loaded = (newer / name).read_bytes(), []
    for place in places(len(data)):
        for mask in (0x01, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[place] ^= mask
            (newer / name).write_bytes(damaged)
            with contextlib.suppress(CorruptCheckpointError):
                load(newer)
                loaded.append((place, mask))
    assert loaded == []
    assert_rejected(name)
    assert len(places(len(data))) > 36


@pytest.mark.slow
@pytest.mark.parametrize("name", ["agent.safetensors", MANIFEST])
def test_any_flipped_bit_is_found(tmp_path, name):
    path = save_states(tmp_path, 1)
    data, loaded = (path / name).read_bytes(), []
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        (path / name).write_bytes(damaged)
        with contextlib.suppress(CorruptCheckpointError):
            load(path)
            loaded.append(bit)
    assert loaded == [] and len(data) > 150


@each_file
def test_a_file_of_another_length_is_found(newer, assert_rejected, name):
    data = (newer / name).read_bytes()
    for size in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        (newer / name).write_bytes(data[:size])
        assert_rejected(name)
    (newer / name).write_bytes(data + b"x")
    assert_rejected(name)


@each_file
def test_a_file_of_another_checkpoint_is_found(newer, older, assert_rejected, name):
    """All files together are that other checkpoint."""
    shutil.copy(older / name, newer / name)
    if name == "random.safetensors":  # nothing has drawn from these streams: both are the same
        assert load_latest(newer.parent).path == newer
        return
    with pytest.raises(CorruptCheckpointError, match=r"agent\.safetensors|stability\.safetensors"):
        load(newer)
    assert_rejected("agent.safetensors" if name == MANIFEST else name)


@each_file
@pytest.mark.parametrize("other", FILES)
def test_another_file_of_the_same_checkpoint_is_found(newer, assert_rejected, name, other):
    if name == other:
        (newer / name).write_text("a checkpoint\n" * 300)
    else:
        shutil.copy(newer / other, newer / name)
    assert_rejected(name)


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def replace_by_link(path):
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


def replace_by_device(path):
    path.unlink()
    try:
        os.mknod(path, 0o20666, os.makedev(1, 5))  # /dev/zero
    except OSError as error:
        pytest.skip(f"no device can be made: {error}")


KINDS = {
    "missing": (os.unlink, "No such file"),
    "a folder": (replace_by_folder, "not a plain file", "Is a directory"),
    "a link to the right content": (replace_by_link, "is a link"),
    "a pipe": (replace_by_pipe, "not a plain file"),
    "a device": (replace_by_device, "not a plain file"),
}


@each_file
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_plain_file_is_not_read(newer, assert_rejected, name, kind):
    change, *reasons = KINDS[kind]
    change(newer / name)
    assert_rejected(name, *reasons)


def test_a_checkpoint_that_is_a_link_is_not_followed(newer, older, tmp_path):
    moved = newer.rename(tmp_path / "moved")
    newer.symlink_to(moved)
    with pytest.raises(CorruptCheckpointError, match="000005 is a link, which is not followed"):
        load(newer)
    assert load_latest(newer.parent).path == older


def test_a_run_goes_on_from_the_checkpoint_before_and_the_rejected_one_takes_no_place(run_dir, newer, tmp_path, caplog):
    """With one checkpoint to keep, too: what is saved next is the newest."""
    train(CONFIG, run_dir=tmp_path / "whole")
    (newer / "agent.safetensors").write_bytes(b"")
    config = CONFIG.model_copy(update={"keep_checkpoints": 1})
    train(config, run_dir=run_dir, resume=True)
    assert "000005" in caplog.text
    assert names(run_dir / "checkpoints")[0] == "000006"
    found, expected = (load_latest(each / "checkpoints") for each in (run_dir, tmp_path / "whole"))
    for part in ("agent", "stability"):
        assert all(torch.equal(value, expected.load(part)[key]) for key, value in found.load(part).items())


# Forgeries: the hashes are right


def forge(path, change):
    """Have `change` do something to a manifest and return it, or None for the same; its hash is made anew."""
    content = json.loads((path / MANIFEST).read_text())
    del content["sha256"]
    content = change(content) or content
    (path / MANIFEST).write_text(json.dumps(content | {"sha256": checkpoint._checksum(content)}))


def forge_file(path, name, data):
    (path / name).write_bytes(data)
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    forge(path, lambda content: content["files"][name].update(entry))


def set_at(keys, value):
    def change(content):
        *above, last = keys
        for key in above:
            content = content[key]
        content[last] = value

    return change


AGENT = ("files", "agent.safetensors")
FORGERIES = {
    "an empty one": lambda content: {"format": checkpoint.FORMAT},
    "a name below": lambda content: content["files"].update({"a/b.safetensors": content["files"][AGENT[1]]}),
    "a name above": lambda content: content["files"].update({"../x.safetensors": content["files"][AGENT[1]]}),
    "an absolute name": lambda content: content["files"].update({"/x.safetensors": content["files"][AGENT[1]]}),
    "no agent": lambda content: content["files"].pop("agent.safetensors") and None,
    "an older format": set_at(["format"], 1),
    "a newer format": set_at(["format"], 99),
    "a format that is long": set_at(["format"], "x\n" * 1000),
    "no format": lambda content: content.pop("format") and None,
    "huge numbers": set_at(["position", "iteration"], 10**400),
    "negative numbers": set_at(["position", "stage"], -1),
    "fractions": set_at(["position", "stage"], 0.5),
    "NaN": set_at(["score"], float("nan")),
    "infinity": set_at(["score"], float("inf")),
    "a NaN of steps": set_at(["position", "env_steps"], float("nan")),
    "text for numbers": set_at(["position", "stage"], "x"),
    "a list for a mapping": set_at(["files"], []),
    "a mapping for text": set_at([*AGENT, "sha256"], {}),
    "a key too many": set_at(["command"], "rm"),
    "a wrong size": set_at([*AGENT, "bytes"], 100),
    "a size beyond all": set_at([*AGENT, "bytes"], 2**60),
    "a negative size": set_at([*AGENT, "bytes"], -8),
    "a negative shape": set_at([*AGENT, "tensors", "iteration"], [-1]),
    "another shape": set_at([*AGENT, "tensors", "iteration"], [1]),
    "a tensor too many": set_at([*AGENT, "tensors", "other"], [1]),
    "bounds of a space that are none": set_at(["spaces", "action_low"], ["x"]),
    "an unprintable key": set_at(["versions"], {"a\nb\x1b[31m": 1}),
    "unprintable text": set_at(["spaces", "observation_size"], "\ud800\x1b[31m\n"),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_a_forged_manifest_is_rejected(newer, older, kind):
    forge(newer, FORGERIES[kind])
    with pytest.raises(CorruptCheckpointError) as error:
        load(newer)
    told = str(error.value)
    assert told.startswith(str(newer)) and told.isprintable() and len(told) < 1000
    if "format" in kind:
        assert f"this metarl reads format {checkpoint.FORMAT}" in told
    assert load_latest(newer.parent).path == older


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"[" * 100_000, "RecursionError"),
        (b'{"a":' * 100_000, "RecursionError"),
        (b" " * 50 * 2**20, "no manifest is that long"),
        (b'"' + b"x" * 2**20 + b'"', "holds a str, not a manifest"),
        (b"9" * 10_000, "ValueError"),
        (b"NaN", "holds a float"),
        (b"\xc3\x28", "UnicodeDecodeError"),
        (b"", "JSONDecodeError"),
    ],
    ids=["deep", "deeper", "large", "text", "digits", "nan", "bytes", "empty"],
)
def test_what_is_no_manifest_is_rejected(newer, assert_rejected, data, reason):
    (newer / MANIFEST).write_bytes(data)
    assert_rejected(MANIFEST, reason)


def framed(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS = {
    "a header beyond all": (2**60).to_bytes(8, "little") + bytes(100),
    "the longest header": bytes([255] * 8) + bytes(100),
    "a header that is none": framed(b"not JSON"),
    "a deep header": framed(b'{"x":' + b"[" * 10_000),
    "tensors that overlap": framed({"a": tensor(), "b": tensor(offsets=(2, 6))}, bytes(6)),
    "a tensor that is too short": framed({"a": tensor(shape=(2,))}, bytes(4)),
    "data that are no tensor's": framed({"a": tensor()}, bytes(8)),
    "data that are not there": framed({"a": tensor(offsets=(0, 4))}, b""),
    "a dtype that is none": framed({"a": tensor("Q128")}, bytes(4)),
    "a dtype that torch has not": framed({"a": tensor("F6_E2M3", (4,), (0, 3))}, bytes(3)),
    "a shape that overflows": framed({"a": tensor(shape=(2**62, 2**62))}, bytes(4)),
    "an empty shape that overflows": framed({"a": tensor(shape=(0, 2**62, 2**62), offsets=(0, 0))}),
    "a negative shape": framed({"a": tensor(shape=(-1,))}, bytes(4)),
    "offsets in the wrong order": framed({"a": tensor(offsets=(4, 0))}, bytes(4)),
    "a fraction": framed({"a": tensor(shape=(0.5,))}, bytes(4)),
}


@pytest.mark.parametrize("kind", HEADERS)
@pytest.mark.parametrize("name", FILES[2:] + FILES[:1])
def test_a_forged_safetensors_file_is_rejected(newer, assert_rejected, name, kind):
    forge_file(newer, name, HEADERS[kind])
    assert_rejected(name)


def test_a_header_that_is_too_long_is_not_read(newer, assert_rejected):
    """Though all else of the file is as it was."""
    data, added = (newer / "agent.safetensors").read_bytes(), 20 * 2**20
    size = int.from_bytes(data[:8], "little")
    longer = (size + added).to_bytes(8, "little") + data[8 : 8 + size] + b" " * added + data[8 + size :]
    forge_file(newer, "agent.safetensors", longer)
    assert_rejected("agent.safetensors", f"a header of {size + added:,} bytes")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**63, 2**64, 10**30, -1, 0])
    | st.floats()
    | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def paths_in(content, above=()):
    """Return the keys that lead to each part of a JSON document."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*above, key)
        yield from paths_in(value, (*above, key))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_manifest_changed_anywhere_is_rejected_or_as_good(newer, data):
    """Its hash is right. Whatever is read from it, there is no other exception, and it is told in a line."""
    original = (newer / MANIFEST).read_bytes()
    places = sorted(paths_in(json.loads(original)), key=str)
    keys, value = data.draw(st.sampled_from(places)), data.draw(JSON)
    try:
        forge(newer, set_at(keys, value))
        found = load(newer)
        assert {*found.load("stability"), *found.load("random")}
    except CorruptCheckpointError as error:
        assert str(error).startswith(str(newer)) and str(error).isprintable() and len(str(error)) < 1000
    finally:
        (newer / MANIFEST).write_bytes(original)


def test_logs_of_a_forged_manifest_cut_nothing_but_logs(run_dir, newer):
    outside = run_dir.parent / "precious"
    for path in (outside, run_dir / "precious"):
        path.write_text("precious")
    config = (run_dir / "config.yaml").read_bytes()
    others = ("config.yaml", "precious", "../precious", str(outside), "tensorboard/../precious", "checkpoints", "", ".")
    forge(newer, lambda content: content["logs"].update(dict.fromkeys(others, 0)))
    train(CONFIG, run_dir=run_dir, resume=True)
    assert outside.read_text() == (run_dir / "precious").read_text() == "precious"
    assert (run_dir / "config.yaml").read_bytes() == config


# Code in the place of data


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


PICKLES = {
    "a pickle": lambda evil: pickle.dumps(evil),
    "a pickle in text": lambda evil: pickle.dumps(evil, protocol=0),
    "a file of torch": lambda evil: torch_file({"weight": evil}),
    "YAML": lambda evil: f"!!python/object/apply:os.mkdir [{evil.marker}]\n".encode(),
    "YAML in a setting": lambda evil: f"seed: !!python/object/apply:os.mkdir [{evil.marker}]\n".encode(),
}


def torch_file(content):
    with io.BytesIO() as file:
        torch.save(content, file)
        return file.getvalue()


@pytest.fixture
def evil(tmp_path):
    return Evil(tmp_path / "executed")


def test_these_would_be_executed(tmp_path):
    for number, kind in enumerate(PICKLES):
        marker = tmp_path / f"executed{number}"
        data = PICKLES[kind](Evil(marker))
        if kind.startswith("YAML"):
            yaml.unsafe_load(data)
        elif kind == "a file of torch":
            torch.load(io.BytesIO(data), weights_only=False)
        else:
            pickle.loads(data)
        assert marker.is_dir(), kind


EVENTS = "an event file"
FAST = {"config.yaml": "YAML in a setting"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[] if kind == FAST.get(name, "a file of torch") else pytest.mark.slow)
        for name in (*FILES, "config.yaml", "metrics.jsonl", EVENTS)
        for kind in PICKLES
    ],
)
def test_nothing_is_executed_whatever_lies_in_a_run_directory(run_dir, newer, evil, command, kind, name):
    """The commands go on with what is sound, or end in one line."""
    path = {"config.yaml": run_dir / name, "metrics.jsonl": run_dir / name}.get(name, newer / name)
    if name == EVENTS:
        (path,) = (run_dir / "tensorboard").iterdir()
    (run_dir.parent / "given.yaml").write_text(dump_config(CONFIG))
    path.write_bytes(PICKLES[kind](evil))
    for verb in (
        ["inspect", run_dir],
        ["evaluate", run_dir, "--num-tasks", "1", "--num-workers", "0"],
        ["plot", run_dir],
        ["train", run_dir.parent / "given.yaml", "--run-dir", run_dir, "--resume"],
    ):
        status, _, told = command(*verb)
        assert not evil.marker.exists()
        assert status in (0, 2), told
        assert "Traceback" not in told
        assert status == 0 or (told.startswith("metarl: ") and len(told.splitlines()) == 1), told
        if name == "config.yaml":
            assert status == 2 and "config.yaml" in told
    if name in FILES or name == EVENTS:
        assert status == 0  # the run has gone on


# What is saved comes back

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


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
