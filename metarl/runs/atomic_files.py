"""Files that appear whole or not at all, and are read without following where they lead. Imports nothing of metarl."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` in the place of what `path` holds: whoever reads it, whenever, finds the old or the new.

    One process at a time may write it. What one that was killed has left is removed by the next.

    Raises:
        OSError: it cannot be written; the old content stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        write_file(temporary, data)
        temporary.replace(path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_file(path: Path, data: bytes) -> None:
    """Write a new file through to the disk; raises OSError if there is something at its place, be it a link."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Have a file or a folder written through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_plain(path: Path) -> io.BufferedReader:
    """Open a file to read it; raises OSError for a link, a pipe, a device or anything else that is no plain file."""
    return os.fdopen(plain_descriptor(path, os.O_RDONLY), "rb")


def append_plain(path: Path) -> io.BufferedWriter:
    """Open a file to write at its end, or a new one; raises OSError as `open_plain` does."""
    return os.fdopen(plain_descriptor(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")


def plain_descriptor(path: Path, flags: int) -> int:
    """Open a plain file, as `os.open` does; raises OSError for anything else."""
    if path.is_symlink():
        raise OSError(f"{path} is a link, which is not followed")
    # Not blocking: a pipe in the place of a file would have us wait for ever.
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):
        flags |= getattr(os, name, 0)
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a plain file")
    return descriptor
