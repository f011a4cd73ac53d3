"""A run's directory belongs to one process at a time. Imports neither torch nor what needs it, to fail at once."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from metarl.errors import UserError
from metarl.runs.atomic_files import plain_descriptor

NAME = ".lock"
FOLDERS = ("checkpoints", "data", "tensorboard", "evaluation", "plots")
"""Of a run's directory."""


@contextlib.contextmanager
def locked(run_dir: Path, *, resume: bool = False, overwrite: bool = False) -> Iterator[None]:
    """Have a run's directory for this process alone; a new run's is made, and removed again if it stays empty.

    The lock is the operating system's: it ends with the process, whatever ends that, so that a stale one is taken over.

    Args:
        run_dir: of the run.
        resume: there must be a run.
        overwrite: there may be one.

    Raises:
        UserError: no run to resume; a run where there should be none; another process is at work there; or the
            directory cannot be written.
    """
    check_free(run_dir, resume=resume, overwrite=overwrite)
    with _made(run_dir):
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            descriptor = _acquire(run_dir / NAME)
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"cannot write to {run_dir}: {why}; choose another with --run-dir") from error
        try:
            check_free(run_dir, resume=resume, overwrite=overwrite)  # it may have changed meanwhile
            yield
        finally:
            (run_dir / NAME).unlink(missing_ok=True)
            os.close(descriptor)


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Remove a folder and those above it again, if they were not there before and are empty in the end."""
    new = [each for each in (folder, *folder.parents) if not _exists(each)]
    try:
        yield
    finally:
        for each in new:
            with contextlib.suppress(OSError):  # there is something in it
                each.rmdir()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long: what cannot be there was not made
        return False


def check_free(run_dir: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise UserError if there is no run to resume, or a run or somebody else's work that would be removed."""
    for name in FOLDERS:
        own_folder(run_dir, name)
    holds_run = _exists(run_dir / "config.yaml")
    if resume and not holds_run:
        raise UserError(f"{run_dir} holds no run to resume; leave out --resume to start one")
    if holds_run and not resume and not overwrite:
        raise UserError(f"{run_dir} already holds a run; go on with it by --resume, or replace it by --overwrite")
    if not holds_run and not overwrite:
        # What a start that was killed leaves: logs, and the checkpoint before the first iteration.
        ours = [".tmp" in path.name or path.name == "000000" for path in (run_dir / "checkpoints").glob("*")]
        kept = [name for name in ("data", "evaluation", "plots") if (run_dir / name).exists()]
        if kept or not all(ours):
            found = kept[0] if kept else "checkpoints"
            raise UserError(
                f"{run_dir} has no config.yaml, but {found}, which a new run would remove; choose another with "
                "--run-dir, or replace all by --overwrite"
            )


def own_folder(run_dir: Path, name: str) -> Path:
    """Return a folder of a run, which may not be there; raises UserError if it is a link, which may lead anywhere."""
    folder = run_dir / name
    if folder.is_symlink():
        raise UserError(f"{folder} is a link, which is not followed; put the folder itself there")
    return folder


def _acquire(path: Path) -> int:
    """Return the descriptor of a file that is locked while it is open; raises UserError naming who has it."""
    while True:
        descriptor = plain_descriptor(path, os.O_RDWR | os.O_CREAT)
        try:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            if not _lock(descriptor, holder):
                raise UserError(
                    f"{path.parent} is in use by process {holder or 'unknown'}; wait for it, stop it, or choose "
                    "another with --run-dir"
                )
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                os.lseek(descriptor, 0, os.SEEK_SET)
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner has removed it meanwhile: it locks nothing


def _lock(descriptor: int, holder: str) -> bool:
    """Lock an open file, until it is closed; returns whether nobody else has it."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # a system, or a network's file system, without locks: who wrote the file last?
        number, _, host = holder.partition(" on ")
        return host != socket.gethostname() or not number.isdigit() or not _alive(int(number))
    return True


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
