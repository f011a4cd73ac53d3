"""A run's directory belongs to one process at a time, whatever became of the one before."""

import os
import signal
import subprocess
import sys

import pytest

from metarl.errors import UserError
from metarl.runs import lock
from metarl.runs.lock import locked

HOLD = """
import sys, time
from pathlib import Path
from metarl.runs.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the lock of `tmp_path / "run"`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_told_who_has_the_directory(tmp_path, holder):
    with (
        pytest.raises(UserError, match=rf"run is in use by process {holder.pid} on .*--run-dir"),
        locked(tmp_path / "run"),
    ):
        pytest.fail("both have it")
    assert str(holder.pid) in (tmp_path / "run" / lock.NAME).read_text()  # asking took nothing away


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_whose_process_was_killed_is_taken_over(tmp_path, holder, number):
    holder.send_signal(number)
    holder.wait()
    assert (tmp_path / "run" / lock.NAME).exists()
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / lock.NAME).read_text().startswith(f"{os.getpid()} on ")
    assert not (tmp_path / "run" / lock.NAME).exists()


def test_a_lock_file_of_a_process_that_lives_but_holds_it_no_more_is_taken_over(tmp_path):
    """The number of a dead process may have gone to another one meanwhile."""
    (tmp_path / lock.NAME).write_text(f"{os.getppid()} on elsewhere\n")
    with locked(tmp_path):
        pass


def test_the_same_process_cannot_have_it_twice(tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match=f"in use by process {os.getpid()}"), locked(tmp_path):
        pytest.fail("twice")


def test_a_lock_that_its_owner_removed_while_we_opened_it_locks_nothing(tmp_path, monkeypatch):
    """Else two processes would have one each: the removed file, and the one that was made anew."""
    real, calls = lock._lock, []

    def owner_leaves(descriptor, holder):
        if not calls:
            (tmp_path / lock.NAME).unlink()
        calls.append(descriptor)
        return real(descriptor, holder)

    monkeypatch.setattr(lock, "_lock", owner_leaves)
    with locked(tmp_path):
        assert len(calls) == 2 and (tmp_path / lock.NAME).exists()


@pytest.mark.parametrize(("holder", "free"), [("", True), ("me", False), ("dead", True), ("1 on elsewhere", True)])
def test_without_locks_of_the_system_the_process_that_wrote_the_file_counts(tmp_path, monkeypatch, holder, free):
    import fcntl
    import socket

    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    names = {"me": os.getpid(), "dead": process.pid}
    content = f"{names[holder]} on {socket.gethostname()}\n" if holder in names else holder
    monkeypatch.setattr(fcntl, "flock", no_locks)
    (tmp_path / lock.NAME).write_text(content)
    if free:
        with locked(tmp_path):
            return
    with pytest.raises(UserError, match="in use"), locked(tmp_path):
        pytest.fail("it is mine already")


def test_what_speaks_against_a_run_is_told_before_anything_is_made(tmp_path):
    with pytest.raises(UserError, match="holds no run to resume"), locked(tmp_path / "none", resume=True):
        pytest.fail("nothing to resume")
    assert not (tmp_path / "none").exists()
    (tmp_path / "config.yaml").write_text("seed: 1")
    with pytest.raises(UserError, match="already holds a run"), locked(tmp_path):
        pytest.fail("written over")
    for options in ({"resume": True}, {"overwrite": True}):
        with locked(tmp_path, **options):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_run_that_came_about_while_the_lock_was_fetched_is_not_written_over(tmp_path, monkeypatch):
    acquire = lock._acquire

    def another_was_faster(path):
        (tmp_path / "config.yaml").touch()
        return acquire(path)

    monkeypatch.setattr(lock, "_acquire", another_was_faster)
    with pytest.raises(UserError, match="already holds a run"), locked(tmp_path):
        pytest.fail("written over")


def test_a_directory_in_which_nothing_was_made_is_removed_again(tmp_path):
    with locked(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").touch()
    assert (tmp_path / "run" / "config.yaml").exists()


def test_folders_above_that_were_made_for_nothing_are_removed_too(tmp_path):
    with locked(tmp_path / "runs" / "a" / "b"):
        pass
    assert not list(tmp_path.iterdir())
    (tmp_path / "runs").mkdir()
    with locked(tmp_path / "runs" / "a"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize(
    "work", ["plots/thesis.pdf", "evaluation/mine.json", "checkpoints/theirs.pt", "checkpoints/000200/x"]
)
def test_what_a_new_run_would_remove_is_not_taken_for_nothing(tmp_path, work):
    """A run whose config is lost, or somebody else's folder."""
    (tmp_path / work).parent.mkdir(parents=True)
    (tmp_path / work).touch()
    with pytest.raises(UserError, match=r"has no config\.yaml, but .*--overwrite"), locked(tmp_path):
        pytest.fail("taken")
    with locked(tmp_path, overwrite=True):
        pass


def test_what_a_start_that_was_killed_has_left_is_nothing(tmp_path):
    for name in ("checkpoints/000000", "checkpoints/.000000.7.tmp", "tensorboard"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "metrics.jsonl").touch()
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("name", lock.FOLDERS)
@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_folders_that_are_links_are_refused(tmp_path, name, options):
    """What lies there would be cut, renamed and removed."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path, target_is_directory=True)
    if options:
        (tmp_path / "run" / "config.yaml").touch()
    with (
        pytest.raises(UserError, match=rf"{name} is a link, which is not followed"),
        locked(tmp_path / "run", **options),
    ):
        pytest.fail("followed")


def test_a_pipe_in_the_place_of_the_lock_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / lock.NAME)
    with pytest.raises(UserError, match=r"cannot write to .*not a plain file"), locked(tmp_path):
        pytest.fail("locked")


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / lock.NAME).symlink_to(victim)
    with pytest.raises(UserError, match="cannot write to"), locked(tmp_path / "run"):
        pytest.fail("followed")
    assert victim.read_text() == "precious"


def test_a_place_that_cannot_be_written_is_told_at_once(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"cannot write to .*--run-dir"), locked(place):
            pytest.fail("written")


def test_locking_needs_no_torch():
    code = "import sys, metarl.runs.lock; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
