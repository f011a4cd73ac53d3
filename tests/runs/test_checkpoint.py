"""Checkpoints: what was saved comes back, or the one before it, and never code."""

import hashlib
import json
import os
import pickle
from dataclasses import asdict

import pytest
import torch

from metarl.runs import checkpoint
from metarl.runs.checkpoint import CorruptCheckpointError, load, load_best, load_latest, save
from metarl.spaces import Spaces
from metarl.types import Position

SPACES = Spaces(3, (-1.0, -0.5), (1.0, 2.0))


def state(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(4, 3, generator=generator),
        "count": torch.tensor(1e9 + seed, dtype=torch.float64),
        "flags": torch.tensor([True, False]),
        "steps": torch.tensor([seed], dtype=torch.int64),
    }


def both(seed):
    """The states of an agent and of what guards it."""
    return {"agent": state(seed), "stability": {"0.ewc:weight": torch.full((5,), float(seed))}}


def saved(folder, *iterations, keep=5):
    return [save(folder, both(i), Position(0, i, i, 100 * i), SPACES, keep) for i in iterations]


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    position = Position(stage=1, stage_iteration=2, iteration=7, env_steps=10**12)
    path = save(folder, {"agent": state(3)}, position, SPACES, keep=1)
    found = load_latest(folder)
    assert (found.path, found.position, found.spaces) == (path, position, SPACES)
    assert path.name == "000007"
    assert found.state.keys() == state(3).keys()
    for name, value in state(3).items():
        assert found.state[name].dtype == value.dtype and torch.equal(found.state[name], value)


def test_each_part_of_the_state_is_a_file_of_its_own_with_its_hash(tmp_path):
    """An empty part is none."""
    path = save(tmp_path, {**both(2), "empty": {}}, Position(iteration=2), SPACES, 1)
    assert sorted(file.name for file in path.iterdir()) == [
        "agent.safetensors",
        "manifest.json",
        "stability.safetensors",
    ]
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert files.keys() == {"agent.safetensors", "stability.safetensors"}
    for name, entry in files.items():
        data = (path / name).read_bytes()
        shapes = {key: list(value.shape) for key, value in both(2)[name.split(".")[0]].items()}
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "tensors": shapes}
    found = load(path)
    assert found.state.keys() == state(2).keys()
    assert torch.equal(found.load("stability")["0.ewc:weight"], torch.full((5,), 2.0))
    assert found.parts == {"agent", "stability"} and found.load("other") == {}


def test_tensors_that_share_memory_are_saved(tmp_path):
    shared = torch.arange(6.0)
    agent = {"all": shared, "part": shared[2:4], "again": shared}
    save(tmp_path, {"agent": agent}, Position(iteration=1), SPACES, 1)
    found = load_latest(tmp_path).state
    assert torch.equal(found["part"], torch.tensor([2.0, 3.0])) and torch.equal(found["again"], shared)


def test_the_newest_by_number_is_loaded_and_the_oldest_are_removed(tmp_path):
    saved(tmp_path, 2, 10, 999_999, 1_000_000, keep=3)
    assert load_latest(tmp_path).position.iteration == 1_000_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000010", "1000000", "999999"]


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def rewrite(path, **changes):
    manifest = json.loads((path / "manifest.json").read_text())
    manifest |= changes
    del manifest["sha256"]
    (path / "manifest.json").write_text(json.dumps(manifest | {"sha256": checkpoint._checksum(manifest)}))


DAMAGES = {
    "a byte of the data flipped": (lambda path: flip(path / "agent.safetensors", -1), "hash"),
    "a byte of the header flipped": (lambda path: flip(path / "agent.safetensors", 12), "hash"),
    "truncated": (lambda path: os.truncate(path / "agent.safetensors", 40), "40 bytes; the manifest says 314"),
    "emptied": (lambda path: os.truncate(path / "agent.safetensors", 0), "0 bytes; the manifest says 314"),
    "without its data": (lambda path: (path / "agent.safetensors").unlink(), "agent.safetensors"),
    "a byte of another part flipped": (lambda path: flip(path / "stability.safetensors", -1), "stability.safetensors"),
    "without another part": (lambda path: (path / "stability.safetensors").unlink(), "stability.safetensors"),
    "without a manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json"),
    "with half a manifest": (lambda path: os.truncate(path / "manifest.json", 30), "000002"),
    "with a manifest of another kind": (lambda path: (path / "manifest.json").write_text("[1]"), "000002"),
    "with a manifest of bytes": (lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe\x00"), "000002"),
    "of a newer format": (
        lambda path: rewrite(path, format=99),
        f"format 99; this metarl reads format {checkpoint.FORMAT}",
    ),
    "without a position": (lambda path: rewrite(path, position={"stage": "?", "colour": 1}), "position.stage"),
    "a byte of the manifest flipped": (
        lambda path: flip(path / "manifest.json", (path / "manifest.json").read_bytes().index(b"200")),  # env_steps
        "manifest.json",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, damage):
    first, second = saved(tmp_path, 1, 2)
    harm, reason = DAMAGES[damage]
    harm(second)
    with pytest.raises(CorruptCheckpointError) as error:
        load(second)
    assert str(second) in str(error.value) and reason in str(error.value)
    found = load_latest(tmp_path)
    assert found.path == first and torch.equal(found.state["weight"], state(1)["weight"])


def test_every_rejected_checkpoint_is_named(tmp_path):
    first, second = saved(tmp_path, 1, 2)
    flip(first / "agent.safetensors", -1)
    (second / "manifest.json").unlink()
    with pytest.raises(CorruptCheckpointError) as error:
        load_latest(tmp_path)
    assert str(first) in str(error.value) and str(second) in str(error.value)


def test_nothing_saved(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CorruptCheckpointError, match=f"no checkpoint in {folder}"):
            load_latest(folder)


def fail_at(monkeypatch, target, name, call):
    """Have the call number `call` of `target.name` find the disk full."""
    original, calls = getattr(target, name), []

    def failing(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, failing)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_failure_while_writing_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch, call):
    saved(tmp_path, 1)
    fail_at(monkeypatch, os, "fsync", call)  # of the agent, of the other part, of the manifest
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["000001"]
    assert torch.equal(load_latest(tmp_path).state["weight"], state(1)["weight"])


def test_a_failure_while_saving_an_iteration_again_leaves_it_loadable(tmp_path, monkeypatch):
    """The last checkpoint of a run is often that of an iteration which has one already."""
    saved(tmp_path, 1)
    fail_at(monkeypatch, type(tmp_path), "rename", 1)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, both(5), Position(1, 0, 1, 100), SPACES, 5)
    assert load_latest(tmp_path).position.iteration == 1


def test_saving_an_iteration_again_replaces_it(tmp_path):
    saved(tmp_path, 1)
    save(tmp_path, both(5), Position(1, 0, 1, 100), SPACES, 5)
    found = load_latest(tmp_path)
    assert found.position.stage == 1 and torch.equal(found.state["weight"], state(5)["weight"])


def test_what_a_killed_process_left_behind_does_no_harm(tmp_path):
    (tmp_path / ".000009.123.tmp").mkdir(parents=True)
    (tmp_path / ".000009.123.tmp" / "agent.safetensors").write_bytes(b"half")
    (tmp_path / "notes").mkdir()
    saved(tmp_path, 1)
    assert load_latest(tmp_path).position.iteration == 1


class _Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_renamed_pickle_is_rejected_and_not_executed(tmp_path):
    (path,) = saved(tmp_path / "checkpoints", 1)
    marker = tmp_path / "executed"
    for data in (pickle.dumps(_Evil(marker)), pickle.dumps({"weight": _Evil(marker)}, protocol=0)):
        (path / "agent.safetensors").write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()  # the hash is right: it is the format that is refused
        rewrite(path, files={"agent.safetensors": {"sha256": digest, "bytes": len(data), "tensors": {}}})
        with pytest.raises(CorruptCheckpointError, match=r"agent\.safetensors: not safetensors"):
            load(path)
        assert not marker.exists()
    pickle.loads(data)
    assert marker.exists()  # it would have done its work


@pytest.mark.parametrize("absolute", [False, True])
def test_a_manifest_points_nowhere_else(tmp_path, absolute):
    """A file that is not beside the manifest is not even read, though its hash is right and the agent is there."""
    (path,) = saved(tmp_path / "checkpoints", 1)
    secret = tmp_path / "secret"
    secret.write_bytes(b"x")
    name = str(secret) if absolute else "../../secret"
    files = json.loads((path / "manifest.json").read_text())["files"]
    rewrite(path, files=files | {name: {"sha256": hashlib.sha256(b"x").hexdigest(), "bytes": 1, "tensors": {}}})
    with pytest.raises(CorruptCheckpointError, match="should match pattern"):
        load(path)


@pytest.mark.parametrize("name", ["agent.safetensors", "stability.safetensors"])
def test_a_part_that_the_manifest_does_not_vouch_for_is_not_loaded(tmp_path, name):
    """A file beside those of the manifest is none of the checkpoint's; the agent's must be."""
    (path,) = saved(tmp_path, 1)
    files = json.loads((path / "manifest.json").read_text())["files"]
    del files[name]
    rewrite(path, files=files)
    if name.startswith("stability"):
        assert load(path).load("stability") == {}
        return
    with pytest.raises(CorruptCheckpointError, match=name):
        load(path)


def test_the_manifest_records_versions_and_position(tmp_path):
    """Libraries' versions are recorded for whoever has to find out why a run does not go on alike."""
    (path,) = saved(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format"] == checkpoint.FORMAT
    assert manifest["versions"]["torch"] and manifest["versions"]["metarl"]
    assert manifest["position"] == asdict(Position(0, 1, 1, 100))


# Which ones stay


def scored(folder, *scores, keep=1, keep_best=1):
    for i, score in enumerate(scores, 1):
        save(folder, both(i), Position(iteration=i), SPACES, keep, keep_best=keep_best, score=score)
    return sorted(int(path.name) for path in folder.iterdir())


def test_the_best_stays_beside_the_newest(tmp_path):
    assert scored(tmp_path, 0.1, 0.9, None, 0.5) == [2, 4]
    assert load_best(tmp_path).position.iteration == 2
    assert load_latest(tmp_path).position.iteration == 4


@pytest.mark.parametrize(
    ("scores", "keep_best", "kept"),
    [
        ((0.5, 0.5, 0.5, 0.1), 1, [3, 4]),  # of equal ones the newest
        ((0.2, 0.9, 0.5, 0.1), 2, [2, 3, 4]),
        ((0.9, 0.1, 0.5, 0.3), 0, [4]),
        ((None, None, None), 3, [3]),
        ((-3.0, -1.0, -2.0), 1, [2, 3]),
    ],
)
def test_how_many_of_the_best_stay(tmp_path, scores, keep_best, kept):
    assert scored(tmp_path, *scores, keep_best=keep_best) == kept


def test_the_best_that_is_damaged_gives_way_to_the_next(tmp_path, caplog):
    scored(tmp_path, 0.9, 0.5, 0.1, keep=3)
    flip(tmp_path / "000001" / "agent.safetensors", -1)
    assert load_best(tmp_path).position.iteration == 2
    assert "000001" in caplog.text


def test_without_an_evaluation_there_is_no_best(tmp_path):
    saved(tmp_path, 1)
    with pytest.raises(CorruptCheckpointError, match="has a score"):
        load_best(tmp_path)
