"""Files appear whole or not at all, and nothing but plain files is read."""

import os

import pytest

from metarl.runs.atomic_files import open_plain, replace_file


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "file"
    for data in (b"first", b"", b"second" * 1000):
        replace_file(path, data)
        assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failure_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch, failing):
    path = tmp_path / "file"
    replace_file(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if failing == "fsync" else (type(path), "replace")), full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_only_plain_files_are_read(tmp_path):
    plain = tmp_path / "plain"
    plain.write_bytes(b"data")
    with open_plain(plain) as file:
        assert file.read() == b"data"
    (tmp_path / "link").symlink_to(plain)
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for a writer
    for name in ("link", "pipe", "missing", "."):
        with pytest.raises(OSError, match=r"not a plain file|is a link|No such file|Is a directory"):
            open_plain(tmp_path / name)
