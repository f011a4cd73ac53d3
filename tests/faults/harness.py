"""Kills a process, or fails what it does to files, at any chosen point of a piece of work."""

import contextlib
import io
import os
import resource
import shutil
import signal
import subprocess
import warnings
from unittest import mock

import pytest
import safetensors.torch
import torch

from metarl.runs.checkpoint import CorruptCheckpointError, load, load_best, load_latest, save
from metarl.spaces import Spaces
from metarl.types import Position

SPACES = Spaces(3, (-1.0, -0.5), (1.0, 2.0))
OPERATIONS = [
    (os, "fsync"),
    (os, "mkdir"),
    (os, "rename"),
    (os, "replace"),
    (os, "rmdir"),
    (os, "truncate"),
    (os, "unlink"),
    (io, "open"),
    (safetensors.torch, "save_file"),
]
"""What metarl, pathlib and shutil do to files comes down to these, and to the writing of bytes (see `cut_off`)."""


def states(seed):
    """What a checkpoint may hold: an agent and what guards it."""
    generator = torch.Generator().manual_seed(seed)
    agent = {"weight": torch.randn(4, 3, generator=generator), "steps": torch.tensor([seed])}
    return {"agent": agent, "stability": {"0.ewc:weight": torch.full((5,), float(seed))}}


def save_states(folder, iteration, seed=None, keep=5, **options):
    """Save `states(seed)`; the seed is the iteration if there is none."""
    place = Position(0, iteration, iteration, 100 * iteration)
    return save(folder, states(iteration if seed is None else seed), place, SPACES, keep, **options)


def seed_of(checkpoint):
    """Return the seed of the states that a checkpoint holds; all of them must be its own."""
    seed = int(checkpoint.state["steps"])
    for part, state in states(seed).items():
        found = checkpoint.load(part)
        assert found.keys() == state.keys()
        assert all(torch.equal(value, found[name]) for name, value in state.items())
    return seed


@contextlib.contextmanager
def before_operation(number, strike):
    """Have `strike()` called before operation `number` on files, from 1 on; it may raise, or end the process."""
    count = [0]

    def struck(original):
        def call(*args, **kwargs):
            if original is open and "r" in args[1]:
                return original(*args, **kwargs)  # reading changes nothing
            count[0] += 1
            if count[0] == number:
                strike()
            return original(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for module, name in OPERATIONS:
            stack.enter_context(mock.patch.object(module, name, struck(getattr(module, name))))
        yield


@contextlib.contextmanager
def recorded():
    """Record the names of synced and renamed files in a list."""
    operations, fsync, rename, replace = [], os.fsync, os.rename, os.replace

    def recording_fsync(descriptor):
        operations.append(f"sync {os.path.basename(os.readlink(f'/proc/self/fd/{descriptor}'))}")
        fsync(descriptor)

    def recording(move):
        def call(source, target):
            operations.append(f"{os.path.basename(source)} becomes {os.path.basename(target)}")
            move(source, target)

        return call

    with contextlib.ExitStack() as stack:
        for name, call in (("fsync", recording_fsync), ("rename", recording(rename)), ("replace", recording(replace))):
            stack.enter_context(mock.patch.object(os, name, call))
        yield operations


def in_child(work):
    """Do a piece of work in a process of its own, forked from this one; returns the signal that ended it, 0 if none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking where there are threads: they hold no lock
        pid = os.fork()
    if pid == 0:
        status = 70
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) in (0, 1), "the work raised"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def killed_before(number, work):
    """Do a piece of work in a child that is killed before operation `number`; returns whether it came to that."""

    def until_killed():
        with before_operation(number, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            work()

    return in_child(until_killed) == signal.SIGKILL


def cut_off(size, work, *, kill):
    """Do a piece of work in a child that cannot make any file larger than `size` bytes.

    The write that would is carried out up to there. Then the process is killed, or the write fails with EFBIG, much
    like on a full disk; returns whether it was killed.
    """

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kill else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        work()

    return in_child(limited) == signal.SIGXFSZ


def names(folder):
    """Return the names of all that is in a folder."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def newest(folder):
    """Return the iteration and the seed of the latest checkpoint; (-1, None) if there is none. All must be sound."""
    for name in filter(str.isdigit, names(folder)):
        load(folder / name)
    try:
        checkpoint = load_latest(folder)
    except CorruptCheckpointError:
        return -1, None
    return checkpoint.position.iteration, seed_of(checkpoint)


def best_score(folder):
    """Return the score of the best checkpoint; minus infinity if there is none."""
    try:
        return load_best(folder).manifest.score
    except CorruptCheckpointError:
        return -float("inf")


@contextlib.contextmanager
def mounted(folder, *options):
    """Have something mounted at a folder; skips the test where that is not allowed."""
    folder.mkdir(exist_ok=True)
    command = [shutil.which("mount") or "mount", *options, str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"cannot mount: {error}")
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def small_disk(folder, kib):
    """Mount a disk of the given size in KiB at a folder."""
    return mounted(folder, "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs")


def make_room(disk):
    """Give such a disk 64 MiB."""
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
