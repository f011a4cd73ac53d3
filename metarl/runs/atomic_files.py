"""Safe file access: the atomic write of a file, and opening of plain files only. Imports nothing of metarl."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """Replace the content of a file atomically: a reader sees the old or the new content, never part of it.

    Only one process at a time may write a file. The next write removes the temporary file of a killed process.

    Raises:
        OSError: the file cannot be written; it keeps its old content.
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
    """Write a new file and sync it to disk; raises OSError if the path exists, even as a link."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Sync a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_plain(path: Path) -> io.BufferedReader:
    """Open a file for reading; raises OSError for anything but a plain file, e.g. a link, pipe or device."""
    return os.fdopen(plain_descriptor(path, os.O_RDONLY), "rb")


def append_plain(path: Path) -> io.BufferedWriter:
    """Open a file for appending, and create it if missing; raises OSError as `open_plain` does."""
    return os.fdopen(plain_descriptor(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")


def plain_descriptor(path: Path, flags: int) -> int:
    """Open a plain file as `os.open` does; raises OSError for anything else."""
    if path.is_symlink():
        raise OSError(f"{path} is a link, which is not followed")
    # O_NONBLOCK: opening a pipe would otherwise block.
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):
        flags |= getattr(os, name, 0)
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a plain file")
    return descriptor
