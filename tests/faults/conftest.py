"""What tests of faults share: the real command line in subprocesses, and a tiny run to do things to."""

import contextlib
import os
import signal

import pytest

from tests.faults import processes


@pytest.fixture
def cli(tmp_path):
    """Run a command as a process of its own, in a folder of its own: its exit status, stdout, stderr and seconds."""

    def run(*arguments, **options):
        return processes.run_cli(*arguments, **{"cwd": tmp_path, **options})

    return run


@pytest.fixture
def started():
    """Start commands that are killed, with all processes of their group, at the end of the test if not before."""
    running = []

    def start(*arguments, **options):
        running.append(processes.start_cli(*arguments, **options))
        return running[-1]

    yield start
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def mistake(cli):
    """Run a command that must be refused, as a process: its one line."""

    def run(*arguments, expected=(), **options):
        return processes.assert_told_in_one_line(cli(*arguments, **options), *expected)

    return run


@pytest.fixture
def navigating(tmp_path, started):
    """Start the tiny navigation run: the process, and where it writes. Flags of the caller come last and win."""

    def start(*flags, run_dir=tmp_path / "run", **options):
        return started(*processes.NAVIGATION, "--run-dir", run_dir, *flags, **options), run_dir

    return start
