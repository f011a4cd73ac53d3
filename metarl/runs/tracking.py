"""Writes and reads the logs of a run: TensorBoard and metrics.jsonl hold the same scalars, by environment steps.

No other module writes them.
"""

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
    """Writes a line of metrics.jsonl and the same scalars to TensorBoard for each iteration and evaluation.

    Args:
        run_dir: holds `metrics.jsonl` and `tensorboard/`.
        config: the config as YAML, for TensorBoard's text tab; None if it is already there.
        hyperparameters: flat, for the HParams tab.
        position: where the run starts or resumes.
        logs: returned by `sync` at that position; later entries are cut off, so that none occurs twice. None for a new
            run.
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
        purge = (
            position.env_steps + 1 if logs is not None else None
        )  # tells a running TensorBoard to forget later steps
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(append_plain(run_dir / "metrics.jsonl"))
            self._events = stack.enter_context(contextlib.closing(_Events(run_dir / "tensorboard", purge)))
            self._events.flush()
            self._stack = stack.pop_all()
        if config is not None:
            text = summary.text("config", f"```yaml\n{config}\n```")  # type: ignore[no-untyped-call]
            self._events.add(text, position.env_steps)
        if logs is None:
            hparams = {key: v if isinstance(v, bool | int | float) else str(v) for key, v in hyperparameters.items()}
            for event in summary.hparams(hparams, dict.fromkeys(_HPARAM_METRICS, 0.0)):  # type: ignore[no-untyped-call]
                self._events.add(event)

    def write(self, position: Position, metrics: Mapping[str, float]) -> None:
        """Write scalars at a position; non-finite ones are left out."""
        scalars = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        line = {"iteration": position.iteration, "stage": position.stage, "env_steps": position.env_steps, **scalars}
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        for name, value in scalars.items():
            scalar = summary.scalar(name, value)  # type: ignore[no-untyped-call]
            self._events.add(scalar, position.env_steps)
        self._events.flush()

    def write_image(self, position: Position, name: str, image: NDArray[np.uint8]) -> None:
        """Write an image `[H, W, 3]`, uint8, to TensorBoard."""
        event = summary.image(name, image, dataformats="HWC")  # type: ignore[no-untyped-call]
        self._events.add(event, position.env_steps)

    def sync(self) -> dict[str, int]:
        """Sync all logs to disk; returns the size of each in bytes, by its name."""
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
        with contextlib.suppress(OSError):  # of an earlier write, which has raised it already
            self._stack.close()


class _Events:
    """A TensorBoard event file. It is written without a thread, so that `add` and `flush` raise their errors.

    Args:
        folder: of the file.
        purge: a running TensorBoard forgets this step and later ones; None to keep all.
    """

    def __init__(self, folder: Path, purge: int | None) -> None:
        folder.mkdir(exist_ok=True)
        names = [re.match(r"events\.out\.tfevents\.(\d+)\.", path.name) for path in folder.iterdir()]
        # TensorBoard reads files in the order of their names.
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
        """Flush to the file."""
        self._file.flush()

    def close(self) -> None:
        """Close the file, even if its last bytes cannot be written."""
        self._file.close()


def _logs(run_dir: Path) -> dict[str, Path]:
    """Return the log files of a run by their path in the run directory, without links."""
    paths = [run_dir / "metrics.jsonl", *sorted((run_dir / "tensorboard").glob("events.out.tfevents.*"))]
    return {str(path.relative_to(run_dir)): path for path in paths if path.is_file() and not path.is_symlink()}


def _cut(run_dir: Path, sizes: Mapping[str, int]) -> None:
    """Cut the logs to their sizes at a checkpoint, and remove later ones."""
    logs = _logs(run_dir)
    for name, size in sizes.items():
        actual = logs[name].stat().st_size if name in logs else 0
        if actual < size:
            _LOG.warning("metarl: %s has %d of %d bytes: part of it is lost", run_dir / name, actual, size)
    for name, path in logs.items():
        if path.stat().st_size > sizes.get(name, 0):
            os.truncate(path, sizes[name]) if name in sizes else path.unlink()


def read_metrics(run_dir: Path, num_stages: int | None = None) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl; an empty list if there is no such file.

    An incomplete last line is skipped.

    Args:
        run_dir: the run directory.
        num_stages: the number of stages of the run; not checked if None.

    Raises:
        UserError: the file cannot be read, or a line is not a set of scalars at a position of the run.
    """
    path = run_dir / "metrics.jsonl"
    try:
        with open_plain(path) as file:
            texts = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            if number == len(texts):  # after the last line feed: empty, or incomplete
                break
            line = None
        if (problem := _problem(line, num_stages)) is not None:
            raise UserError(f"{path}:{number}: damaged, {problem}; remove the line, or move the file away")
        lines.append(line)
    return lines


def _problem(line: Any, num_stages: int | None) -> str | None:
    """Return what is wrong with a line of metrics.jsonl; None if it is valid."""
    if not isinstance(line, dict):
        return "not a JSON object"
    for key in ("iteration", "stage", "env_steps"):
        value = line.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
            return f"{key} is not an integer ≥ 0"
    if num_stages is not None and line["stage"] >= num_stages:
        return f"stage is {line['stage']}, the run has {num_stages}"
    for key, value in line.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not _is_finite(value):
            return f"{key} is not a finite number"
    return None


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False
