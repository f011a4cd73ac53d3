"""Locks a run directory for one process. Imports neither torch nor anything that does, so that mistakes fail fast."""

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
"""Folders in a run directory."""


def default_run_dir(config: object) -> Path:
    """Return `runs/<name>` for the name or path of a config; `runs/run` for a config without either."""
    return Path("runs") / (Path(config).stem if isinstance(config, str | Path) else "run")


@contextlib.contextmanager
def locked(run_dir: Path, *, resume: bool = False, overwrite: bool = False) -> Iterator[None]:
    """Lock a run directory for this process; creates it, and removes it again if it stays empty.

    The operating system holds the lock and releases it when the process ends, so that no lock goes stale.

    Args:
        run_dir: the run directory.
        resume: it must hold a run.
        overwrite: it may hold a run.

    Raises:
        UserError: there is no run to resume, a run would be overwritten, another process uses the directory, or it
            cannot be written.
    """
    check_free(run_dir, resume=resume, overwrite=overwrite)
    with _created(run_dir):
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            descriptor = _acquire(run_dir / NAME)
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"cannot write to {run_dir}: {why}; choose another with --run-dir") from error
        try:
            check_free(run_dir, resume=resume, overwrite=overwrite)  # it may have changed since
            yield
        finally:
            (run_dir / NAME).unlink(missing_ok=True)
            os.close(descriptor)


@contextlib.contextmanager
def _created(folder: Path) -> Iterator[None]:
    """On exit remove a folder and its parents, where they did not exist before and are empty."""
    missing = [path for path in (folder, *folder.parents) if not _exists(path)]
    try:
        yield
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long
        return False


def check_free(run_dir: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise UserError if there is no run to resume, or if a new run would remove a run or other files."""
    for name in FOLDERS:
        own_folder(run_dir, name)
    holds_run = _exists(run_dir / "config.yaml")
    if resume and not holds_run:
        raise UserError(f"{run_dir} holds no run to resume; drop --resume to start one")
    if holds_run and not resume and not overwrite:
        raise UserError(f"{run_dir} already holds a run; add --resume to resume it, or --overwrite to replace it")
    if not holds_run and not overwrite:
        # A run that was killed at its start leaves logs and the checkpoint of iteration 0.
        ours = [".tmp" in path.name or path.name == "000000" for path in (run_dir / "checkpoints").glob("*")]
        kept = [name for name in ("data", "evaluation", "plots") if (run_dir / name).exists()]
        if kept or not all(ours):
            found = kept[0] if kept else "checkpoints"
            raise UserError(
                f"{run_dir} has no config.yaml, but {found}, which a new run would remove; choose another with "
                "--run-dir, or add --overwrite to replace everything"
            )


def own_folder(run_dir: Path, name: str) -> Path:
    """Return the path of a folder in a run directory, which may be missing; raises UserError if it is a link."""
    folder = run_dir / name
    if folder.is_symlink():
        raise UserError(f"{folder} is a link, which is not followed; move the folder itself there")
    return folder


def _acquire(path: Path) -> int:
    """Return the descriptor of the lock file, locked while it is open; raises UserError that names the holder."""
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
        os.close(descriptor)  # its owner has removed the file since: try again


def _lock(descriptor: int, holder: str) -> bool:
    """Lock an open file until it is closed; returns False if another process holds the lock."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # no locks on this system or file system: check who wrote the file
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
