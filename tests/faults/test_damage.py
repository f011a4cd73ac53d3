"""Files of a run that come to harm: they are rejected by name, the checkpoint before is used."""

import contextlib
import os
import shutil

import pytest
import torch

from metarl.runs.checkpoint import CorruptCheckpointError, load, load_latest
from metarl.training.loop import train
from tests.faults.harness import names, save_states
from tests.faults.small_runs import FILES, MANIFEST, TWO_STAGES

each_file = pytest.mark.parametrize("name", FILES)


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


def test_a_run_goes_on_from_the_checkpoint_before_and_the_rejected_one_takes_no_place(stopped, newer, tmp_path, caplog):
    """With one checkpoint to keep, too: what is saved next is the newest."""
    train(TWO_STAGES, run_dir=tmp_path / "whole")
    (newer / "agent.safetensors").write_bytes(b"")
    config = TWO_STAGES.model_copy(update={"keep_checkpoints": 1})
    train(config, run_dir=stopped, resume=True)
    assert "000005" in caplog.text
    assert names(stopped / "checkpoints")[0] == "000006"
    found, expected = (load_latest(each / "checkpoints") for each in (stopped, tmp_path / "whole"))
    for part in ("agent", "stability"):
        assert all(torch.equal(value, expected.load(part)[key]) for key, value in found.load(part).items())
