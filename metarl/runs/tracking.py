"""The only module that writes TensorBoard and metrics.jsonl: the same scalars in both, against environment steps."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
from torch.utils.tensorboard import summary

from metarl.errors import UserError
from metarl.runs.atomic_files import append_plain, open_plain, sync
from metarl.types import Position

_LOG = logging.getLogger(__name__)
_HPARAM_METRICS = ("meta_train/return_post", "meta_test/return_post", "meta_test/success_post")


class Tracker:
    """Writes one line of metrics.jsonl and one set of scalars for each iteration and each evaluation.

    Args:
        run_dir: gets `metrics.jsonl` and `tensorboard/`.
        config: the whole config as YAML, shown as text; None if it was shown before.
        hyperparameters: flat, for the HParams tab.
        position: where the run goes on.
        logs: what `sync` returned there, so that nothing is there twice: what was written later is dropped; None for a
            new run.
    """

    def __init__(
        self,
        run_dir: Path,
        config: str | None,
        hyperparameters: Mapping[str, Any],
        position: Position,
        logs: Mapping[str, int] | None,
    ) -> None:
        self._run_dir = run_dir
        if logs is not None:
            _cut(run_dir, logs)
        purge = position.env_steps + 1 if logs is not None else None  # from the memory of a TensorBoard that is looking
        with contextlib.ExitStack() as opened:
            self._file = opened.enter_context(append_plain(run_dir / "metrics.jsonl"))
            self._events = opened.enter_context(contextlib.closing(_Events(run_dir / "tensorboard", purge)))
            self._events.flush()
            self._opened = opened.pop_all()
        if config is not None:
            text = summary.text("config", f"```yaml\n{config}\n```")  # type: ignore[no-untyped-call]
            self._events.add(text, position.env_steps)
        if logs is None:
            shown = {key: v if isinstance(v, bool | int | float) else str(v) for key, v in hyperparameters.items()}
            for each in summary.hparams(shown, dict.fromkeys(_HPARAM_METRICS, 0.0)):  # type: ignore[no-untyped-call]
                self._events.add(each)

    def write(self, position: Position, metrics: Mapping[str, float]) -> None:
        """Write scalars at a position; those that are not finite are left out."""
        scalars = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        line = {"iteration": position.iteration, "stage": position.stage, "env_steps": position.env_steps, **scalars}
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        for name, value in scalars.items():
            scalar = summary.scalar(name, value)  # type: ignore[no-untyped-call]
            self._events.add(scalar, position.env_steps)
        self._events.flush()

    def write_image(self, position: Position, name: str, image: NDArray[np.uint8]) -> None:
        """Show an image `[H, W, 3]` in TensorBoard."""
        shown = summary.image(name, image, dataformats="HWC")  # type: ignore[no-untyped-call]
        self._events.add(shown, position.env_steps)

    def sync(self) -> dict[str, int]:
        """Write everything through to the disk; returns how many bytes each log has now, by its name."""
        self._events.flush()
        sizes = {}
        for name, path in _logs(self._run_dir).items():
            sync(path)
            sizes[name] = path.stat().st_size
        return sizes

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # of what could not be written, which has been told then
            self._opened.close()


class _Events:
    """An event file of TensorBoard. No thread writes it, as elsewhere: an error comes to whoever has something to say.

    Args:
        folder: where it is made.
        purge: whoever reads the folder forgets what was told of this step and of later ones.
    """

    def __init__(self, folder: Path, purge: int | None) -> None:
        folder.mkdir(exist_ok=True)
        names = [re.match(r"events\.out\.tfevents\.(\d+)\.", path.name) for path in folder.iterdir()]
        # They are read in the order of their names.
        number = max(int(time.time()), *(int(name[1]) + 1 for name in names if name), 0)
        self._file = (folder / f"events.out.tfevents.{number:010d}.{socket.gethostname()}.{os.getpid()}.0").open("xb")
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        if purge is not None:
            self._write(Event(step=purge, session_log=SessionLog(status=SessionLog.START)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())

    def add(self, what: Any, env_steps: int = 0) -> None:
        """Write a summary, as `torch.utils.tensorboard.summary` makes it."""
        self._write(Event(summary=what, step=env_steps))

    def flush(self) -> None:
        """Have what was added written to the file."""
        self._file.flush()

    def close(self) -> None:
        """Close the file, also if the last of it cannot be written."""
        self._file.close()


def _logs(run_dir: Path) -> dict[str, Path]:
    """Return the files that grow with a run, by their names within it; links are none of ours."""
    paths = [run_dir / "metrics.jsonl", *sorted((run_dir / "tensorboard").glob("events.out.tfevents.*"))]
    return {str(path.relative_to(run_dir)): path for path in paths if path.is_file() and not path.is_symlink()}


def _cut(run_dir: Path, sizes: Mapping[str, int]) -> None:
    """Drop what was written to the logs when they had more than so many bytes."""
    logs = _logs(run_dir)
    for name, size in sizes.items():
        found = logs[name].stat().st_size if name in logs else 0
        if found < size:
            _LOG.warning("metarl: %s has %d of %d bytes: part of it is lost", run_dir / name, found, size)
    for name, path in logs.items():
        if path.stat().st_size > sizes.get(name, 0):
            os.truncate(path, sizes[name]) if name in sizes else path.unlink()


def read_metrics(run_dir: Path, num_stages: int | None = None) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl; none if there is no such file.

    A last line that was cut off in writing is passed over.

    Args:
        run_dir: of the run.
        num_stages: how many stages it has; not checked if None.

    Raises:
        UserError: the file cannot be read, or a line holds something else than scalars at a position of the run.
    """
    path = run_dir / "metrics.jsonl"
    try:
        with open_plain(path) as file:
            texts = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    found = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            if number == len(texts):  # behind the last line feed: nothing, or what was cut off
                break
            line = None
        if (problem := _problem(line, num_stages)) is not None:
            raise UserError(f"{path}:{number}: damaged, {problem}; remove the line, or move the file away")
        found.append(line)
    return found


def _problem(line: Any, num_stages: int | None) -> str | None:
    """Return why a line is none of metrics.jsonl; None if it is one."""
    if not isinstance(line, dict):
        return "it is no JSON object"
    for key in ("iteration", "stage", "env_steps"):
        value = line.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
            return f"{key} is not a whole number of at least 0"
    if num_stages is not None and line["stage"] >= num_stages:
        return f"stage is {line['stage']}, the run has {num_stages}"
    for key, value in line.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not _is_finite(value):
            return f"{key} is not a finite number"
    return None


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond what a float can hold
        return False
