"""What tests of faults share: the real command line in subprocesses, and tiny runs to do things to."""

import contextlib
import os
import shutil
import signal

import pytest

from metarl.cli import main
from metarl.runs.checkpoint import CorruptCheckpointError, load, load_latest
from metarl.training.loop import train
from tests.faults import processes
from tests.faults.harness import names
from tests.faults.small_runs import FILES, TWO_STAGES, listing


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
        return processes.assert_one_line_error(cli(*arguments, **options), *expected)

    return run


@pytest.fixture
def refused(command, tmp_path, monkeypatch):
    """Run a command that must be refused before an environment is made, and leave nothing behind: its line."""

    def made(*args, **kwargs):
        raise AssertionError("an environment was made")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("metarl.envs.vector.pool.env_spaces", made)

    def run(*arguments, expected=()):
        before = listing(tmp_path)
        message = processes.assert_one_line_error(command(*arguments), *expected)
        assert listing(tmp_path) == before
        return message

    return run


@pytest.fixture
def config(tmp_path):
    """Write a config: its path."""

    def write(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def navigating(tmp_path, started):
    """Start the tiny navigation run: the process, and where it writes. Flags of the caller come last and win."""

    def start(*flags, run_dir=tmp_path / "run", **options):
        return started(*processes.NAVIGATION, "--run-dir", run_dir, *flags, **options), run_dir

    return start


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Train the tiny navigation run to its end, by the command line in this process: its directory."""

    def train_at(name, *flags):
        path = tmp_path_factory.mktemp("runs") / name
        with pytest.raises(SystemExit) as error:
            main([*processes.NAVIGATION, "--run-dir", str(path), *flags])
        assert error.value.code == 0
        return path

    return train_at


@pytest.fixture(scope="session")
def run_dir(trained):
    """A run of two iterations, to read."""
    return trained("navigation")


@pytest.fixture
def copied(run_dir, tmp_path):
    """A copy of it, to damage."""
    return shutil.copytree(run_dir, tmp_path / "copy")


@pytest.fixture(scope="session")
def stopped_run(tmp_path_factory):
    """A run that was stopped in its second stage, with checkpoints of iterations 4 and 5, to copy."""
    path = tmp_path_factory.mktemp("runs") / "stopped"
    train(TWO_STAGES, run_dir=path, max_iterations=5)
    assert names(path / "checkpoints") == ["000004", "000005"]
    assert names(path / "checkpoints" / "000005") == list(FILES)
    return path


@pytest.fixture
def stopped(stopped_run, tmp_path):
    """A copy of it, to damage."""
    return shutil.copytree(stopped_run, tmp_path / "run")


@pytest.fixture
def older(stopped):
    return stopped / "checkpoints" / "000004"


@pytest.fixture
def newer(stopped):
    return stopped / "checkpoints" / "000005"


@pytest.fixture
def assert_rejected(older, newer, caplog):
    """Check that the newer checkpoint is rejected by the name of its file, with a reason, and the older one used."""

    def check(name, *reasons):
        with pytest.raises(CorruptCheckpointError) as error:
            load(newer)
        message = str(error.value)
        assert message.startswith(f"{newer / name}: ") and len(message) > len(f"{newer / name}: ") + 10
        assert message.isprintable() and len(message) < 1000
        assert not reasons or any(reason in message for reason in reasons), message
        caplog.clear()
        assert load_latest(newer.parent).path == older
        assert f"rejected a checkpoint, using 000004 instead: {message}" in caplog.text

    return check
