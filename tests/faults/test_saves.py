"""A save that is killed, or that fails, at any of its operations leaves a checkpoint to go on from, and no debris."""

import errno
import io
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from safetensors import SafetensorError

from metarl.config.schema import load_config
from metarl.errors import RunError
from metarl.runs.atomic_files import replace_file
from metarl.runs.checkpoint import load_latest
from metarl.training.loop import train
from tests.faults import processes
from tests.faults.harness import (
    before_operation,
    best_score,
    cut_off,
    killed_before,
    make_room,
    mounted,
    names,
    newest,
    recorded,
    save_states,
    small_disk,
)
from tests.faults.kill_often import different


def two_checkpoints(folder):
    save_states(folder, 1, score=5.0)
    save_states(folder, 2, score=1.0)


def two_checkpoints_and_a_kill(folder):
    """Of a save that was about to replace the second: it lies under another name."""
    two_checkpoints(folder)
    (folder / "000002").rename(folder / ".000002.replaced.tmp")
    shutil.copytree(folder / "000001", folder / ".000002.77.tmp")


SAVES = {
    "the first": (lambda folder: None, lambda folder: save_states(folder, 0), ["000000"]),
    "the next": (two_checkpoints, lambda folder: save_states(folder, 3), ["000001", "000002", "000003"]),
    "the same again": (two_checkpoints, lambda folder: save_states(folder, 2, seed=3), ["000001", "000002"]),
    "all others removed": (two_checkpoints, lambda folder: save_states(folder, 3, keep=1), ["000003"]),
    "the best stays": (
        two_checkpoints,
        lambda folder: save_states(folder, 3, keep=1, keep_best=1, score=2.0),
        ["000001", "000003"],
    ),
    "the next after a kill": (
        two_checkpoints_and_a_kill,
        lambda folder: save_states(folder, 3),
        ["000001", "000002", "000003"],
    ),
    "a new best": (
        two_checkpoints,
        lambda folder: save_states(folder, 2, seed=3, keep=1, keep_best=1, score=9.0),
        ["000002"],
    ),
}
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks for names of open files in /proc")
each_save = pytest.mark.parametrize("kind", SAVES)


class Case:
    """One kind of save, again and again from the same start."""

    def __init__(self, kind, folder):
        prepare, self._save, self.expected = SAVES[kind]
        self._start, self.folder = folder / "start", folder / "checkpoints"
        prepare(self._start)
        self.left = [name for name in names(self._start) if not name.isdigit()]
        self.old = newest(self._start)
        self.from_start()
        self.save()
        self.new, self.best = newest(self.folder), min(map(best_score, (self._start, self.folder)))
        self.largest = max(path.stat().st_size for path in (self.folder / f"{self.new[0]:06d}").iterdir())
        assert names(self.folder) == self.expected and self.new != self.old
        self.from_start()

    def from_start(self):
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._start.exists():
            shutil.copytree(self._start, self.folder)

    def start_from_here(self):
        """Start from what is there now; returns where it started from before, for `start_from`."""
        before, self._start = self._start, self._start.with_name("later")
        shutil.rmtree(self._start, ignore_errors=True)
        if self.folder.exists():
            shutil.copytree(self.folder, self._start)
        return before

    def start_from(self, start):
        self._start = start
        self.from_start()

    def save(self):
        self._save(self.folder)

    def assert_nothing_lost(self):
        """The newest is the old one or the new one, and the best is still there."""
        assert newest(self.folder) in (self.old, self.new)
        assert best_score(self.folder) >= self.best

    def assert_goes_on(self):
        """What comes next is saved, and nothing else is there."""
        save_states(self.folder, 7)
        assert newest(self.folder) == (7, 7) and not [name for name in names(self.folder) if not name.isdigit()]


@pytest.fixture
def case(tmp_path, kind):
    return Case(kind, tmp_path)


@linux
def test_all_of_a_checkpoint_is_on_the_disk_before_it_takes_its_place(tmp_path):
    """So that it is whole after a power cut: its files, then the manifest that vouches for them, then their names."""
    folder = tmp_path / "checkpoints"
    two_checkpoints(folder)
    with recorded() as operations:
        save_states(folder, 2, seed=3)
    temporary = f".000002.{os.getpid()}.tmp"
    assert operations == [
        "sync agent.safetensors",
        "sync stability.safetensors",
        "sync manifest.json",
        f"sync {temporary}",
        "000002 becomes .000002.replaced.tmp",
        f"{temporary} becomes 000002",
        "sync checkpoints",
    ]


@linux
def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path):
    with recorded() as operations:
        replace_file(tmp_path / "file", b"new")
    assert operations == ["sync .file.tmp", ".file.tmp becomes file", f"sync {tmp_path.name}"]


@linux
def test_logs_are_on_the_disk_before_the_checkpoint_that_counts_on_them(tmp_path):
    with recorded() as operations:
        train(load_config("navigation_maml_ppo", processes.SMALL.split()), run_dir=tmp_path / "run")
    (events,) = (path.name for path in (tmp_path / "run" / "tensorboard").iterdir())
    places = [place for place, each in enumerate(operations) if each == "sync manifest.json"]
    assert len(places) == 3  # at the start, at the end of the stage and after its evaluation
    for place in places:
        assert operations[place - 4 : place - 2] == ["sync metrics.jsonl", f"sync {events}"]


@each_save
def test_a_save_killed_at_any_operation_loses_nothing(case):
    number = 1
    while killed_before(number, case.save):
        case.assert_nothing_lost()
        case.assert_goes_on()
        case.from_start()
        number += 1
    assert newest(case.folder) == case.new and names(case.folder) == case.expected
    assert number > 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["the next", "a new best"])
def test_a_save_killed_while_it_mends_what_another_kill_has_left_loses_nothing(case):
    first = 1
    while killed_before(first, case.save):
        start, second = case.start_from_here(), 1
        while killed_before(second, case.save):
            case.assert_nothing_lost()
            case.from_start()
            second += 1
        assert newest(case.folder) == case.new and names(case.folder) == case.expected
        case.start_from(start)
        first += 1
    assert first > 10


@each_save
@pytest.mark.parametrize("kill", [True, False], ids=["killed", "error"])
def test_a_save_that_ends_within_a_file_loses_nothing(case, kill):
    """At every few bytes, also of the writer that is no Python; killed there, or without room."""

    def refused():
        with pytest.raises((OSError, SafetensorError)):
            case.save()
        assert not [name for name in names(case.folder) if not name.isdigit()]

    assert case.largest > 1000  # the manifest
    for size in range(0, case.largest, 80):
        assert cut_off(size, case.save if kill else refused, kill=kill) == kill
        assert newest(case.folder) == case.old
        case.assert_goes_on()
        case.from_start()


@each_save
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_operation_that_fails_loses_nothing_and_leaves_nothing(case, code):
    def fail():
        raise OSError(code, os.strerror(code))

    struck, number = True, 0
    while struck:
        number, struck, failed = number + 1, False, False

        def strike():
            nonlocal struck
            struck = True
            fail()

        try:
            with before_operation(number, strike):
                case.save()
        except OSError as error:
            assert error.errno == code
            failed = True
        case.assert_nothing_lost()
        if failed:
            assert newest(case.folder) == case.old
            assert not [name for name in names(case.folder) if not (name.isdigit() or name in case.left)]
        else:
            assert newest(case.folder) == case.new
        case.assert_goes_on()
        case.from_start()
    assert number > 10


def test_a_file_replaced_and_killed_at_any_operation_is_the_old_or_the_new_one(tmp_path):
    path = tmp_path / "file"
    number = 1
    while True:
        replace_file(path, b"old")
        assert names(tmp_path) == ["file"]  # a temporary file of the killed process is none for long
        if not killed_before(number, lambda: replace_file(path, b"new")):
            break
        assert path.read_bytes() in (b"old", b"new")
        number += 1
    assert path.read_bytes() == b"new" and number > 3


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(tmp_path):
    precious, path = tmp_path / "precious", tmp_path / "file"
    precious.write_bytes(b"precious")
    (tmp_path / ".file.tmp").symlink_to(precious)
    replace_file(path, b"new")
    assert precious.read_bytes() == b"precious" and path.read_bytes() == b"new" and not path.is_symlink()
    assert names(tmp_path) == ["file", "precious"]


def test_a_folder_that_cannot_be_written_is_told_and_stays_as_it_is(tmp_path):
    """Whoever the user is: root passes over permissions, not over a disk that is mounted to be read."""
    folder = tmp_path / "checkpoints"
    two_checkpoints(folder)
    with mounted(folder, "--bind", str(folder)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        with pytest.raises(OSError, match="Read-only file system"):
            save_states(folder, 3)
        assert newest(folder) == (2, 2)
    save_states(folder, 3)
    assert names(folder) == ["000001", "000002", "000003"]


def test_a_full_disk_is_told_and_what_was_there_stays(tmp_path):
    with small_disk(tmp_path / "disk", 128) as disk:
        folder = disk / "checkpoints"
        two_checkpoints(folder)
        for left in range(20, -1, -1):  # KiB: from too little for the last file to nothing at all
            filler = disk / "filler"
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            filler.write_bytes(bytes(max(0, free - left * 1024)))
            try:
                save_states(folder, 3)
            except (OSError, SafetensorError) as error:
                assert "No space left" in str(error)
                assert newest(folder) == (2, 2) and names(folder) == ["000001", "000002"]
            else:
                assert left > 8
                shutil.rmtree(folder / "000003")
            filler.unlink()
        save_states(folder, 3)
        assert newest(folder) == (3, 3)


def test_a_checkpoint_that_was_rejected_does_not_take_the_place_of_those_that_follow(tmp_path):
    """It is kept, as no checkpoint: the one that is saved then is the newest, and stays."""
    two_checkpoints(tmp_path)
    (tmp_path / "000002" / "manifest.json").write_text("damaged")
    assert load_latest(tmp_path).position.iteration == 1
    (tmp_path / "000002.rejected").mkdir()  # of an earlier time
    save_states(tmp_path, 1, seed=8, keep=1)
    assert newest(tmp_path) == (1, 8) and names(tmp_path) == ["000001", "000002.rejected"]
    assert (tmp_path / "000002.rejected" / "manifest.json").read_text() == "damaged"
    save_states(tmp_path, 2, keep=1)
    assert newest(tmp_path) == (2, 2) and names(tmp_path) == ["000002", "000002.rejected"]


# A run on a disk that fills up

LONG = ["--stages.0.iterations", "12", "--checkpoint-every-iterations", "1", "--keep-checkpoints", "1000"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed")
    train(load_config("navigation_maml_ppo", [*processes.SMALL.split(), *LONG]), run_dir=run_dir)
    return run_dir


MORE = [pytest.param(kib, marks=pytest.mark.slow) for kib in (8, *range(16, 36, 4), 40, 200, 252)]


@pytest.mark.parametrize("kib", [4, 12, 36, 100, *MORE])
def test_a_disk_that_fills_up_ends_a_run_in_one_line_and_with_room_it_goes_on(tmp_path, undisturbed, kib):
    """Whatever finds it full first: the logs, the config or a file of a checkpoint."""
    config = load_config("navigation_maml_ppo", [*processes.SMALL.split(), *LONG])
    threads = threading.active_count()
    with small_disk(tmp_path / "disk", kib) as disk:
        run_dir = disk / "run"
        with pytest.raises(RunError, match=r"cannot write to .*No space left on device.*make room") as error:
            train(config, run_dir=run_dir)
        assert "\n" not in str(error.value)
        assert threading.active_count() == threads
        assert not [path for path in run_dir.rglob(".*") if path.name.endswith(".tmp")]
        make_room(disk)
        assert train(config, run_dir=run_dir, resume=(run_dir / "config.yaml").exists()).finished
        assert different(run_dir, undisturbed) == []


class Small(io.FileIO):
    """A file for which there is only so much room."""

    def write(self, data):
        if self.tell() + len(data) > 30_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@linux
@pytest.mark.parametrize("log", ["metrics.jsonl", "events.out.tfevents"])
def test_a_log_for_which_there_is_no_room_ends_a_run_in_one_line(tmp_path, monkeypatch, log):
    """In the midst of training. It ends, no thread waits, and with room it goes on as if nothing had been."""
    flags = ["--stages.0.iterations", "60", "--checkpoint-every-iterations", "7"]
    config, run_dir = load_config("navigation_maml_ppo", [*processes.SMALL.split(), *flags]), tmp_path / "run"
    threads, original = threading.active_count(), io.open

    def small_if_it_is_the_log(file, mode="r", *args, **kwargs):
        path = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else file
        if Path(path).name.startswith(log) and mode in ("ab", "xb"):
            return io.BufferedWriter(Small(file, mode))
        return original(file, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(io, "open", small_if_it_is_the_log)
        with pytest.raises(RunError, match=r"cannot write to .*No space left on device.*make room"):
            train(config, run_dir=run_dir)
    assert threading.active_count() == threads
    assert load_latest(run_dir / "checkpoints").position.iteration >= 7
    train(config, run_dir=run_dir, resume=True)
    train(config, run_dir=tmp_path / "whole")
    assert different(run_dir, tmp_path / "whole") == []


@pytest.mark.slow
def test_the_command_on_a_disk_that_fills_up(tmp_path, undisturbed, cli):
    with small_disk(tmp_path / "disk", 200) as disk:
        command = [*processes.NAVIGATION, *LONG, "--run-dir", disk / "run"]
        status, _, err, _ = cli(*command)
        assert status == 1 and len(err.splitlines()) == 1
        assert err.startswith(f"metarl: cannot write to {disk / 'run'}: ") and err.endswith("use --resume\n")
        make_room(disk)
        assert cli(*command, "--resume").status == 0
        assert different(disk / "run", undisturbed) == []
