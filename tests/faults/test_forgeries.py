"""Files of a run that somebody has made up: they are rejected by name, nothing in them is executed or followed."""

import hashlib
import io
import json
import os
import pickle

import hypothesis.strategies as st
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings

from metarl.config.schema import dump_config
from metarl.runs import checkpoint
from metarl.runs.checkpoint import CorruptCheckpointError, load, load_latest
from metarl.training.loop import train
from tests.faults.small_runs import FILES, MANIFEST, TWO_STAGES

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
    message = str(error.value)
    assert message.startswith(str(newer)) and message.isprintable() and len(message) < 1000
    if "format" in kind:
        assert f"this metarl reads format {checkpoint.FORMAT}" in message
    assert load_latest(newer.parent).path == older


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"[" * 100_000, "RecursionError"),
        (b'{"a":' * 100_000, "RecursionError"),
        (b" " * 50 * 2**20, "too long for a manifest"),
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


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_manifest_changed_anywhere_is_rejected_or_as_good(newer, data):
    """Its hash is right. Whatever is read from it, there is no other exception, and the error is one line."""
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


def test_logs_of_a_forged_manifest_cut_nothing_but_logs(stopped, newer):
    outside = stopped.parent / "precious"
    for path in (outside, stopped / "precious"):
        path.write_text("precious")
    config = (stopped / "config.yaml").read_bytes()
    others = ("config.yaml", "precious", "../precious", str(outside), "tensorboard/../precious", "checkpoints", "", ".")
    forge(newer, lambda content: content["logs"].update(dict.fromkeys(others, 0)))
    train(TWO_STAGES, run_dir=stopped, resume=True)
    assert outside.read_text() == (stopped / "precious").read_text() == "precious"
    assert (stopped / "config.yaml").read_bytes() == config


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
def test_nothing_is_executed_whatever_lies_in_a_run_directory(stopped, newer, evil, command, kind, name):
    """The commands go on with what is sound, or end in one line."""
    path = {"config.yaml": stopped / name, "metrics.jsonl": stopped / name}.get(name, newer / name)
    if name == EVENTS:
        (path,) = (stopped / "tensorboard").iterdir()
    (stopped.parent / "given.yaml").write_text(dump_config(TWO_STAGES))
    path.write_bytes(PICKLES[kind](evil))
    for verb in (
        ["inspect", stopped],
        ["evaluate", stopped, "--num-tasks", "1", "--num-workers", "0"],
        ["plot", stopped],
        ["train", stopped.parent / "given.yaml", "--run-dir", stopped, "--resume"],
    ):
        status, _, message = command(*verb)
        assert not evil.marker.exists()
        assert status in (0, 2), message
        assert "Traceback" not in message
        assert status == 0 or (message.startswith("metarl: ") and len(message.splitlines()) == 1), message
        if name == "config.yaml":
            assert status == 2 and "config.yaml" in message
    if name in FILES or name == EVENTS:
        assert status == 0  # the run has gone on
