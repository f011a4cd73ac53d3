"""The only module that writes TensorBoard and metrics.jsonl: the same scalars in both, against environment steps."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from metarl.checkpoint import Position
from metarl.files import sync

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
        self._file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        purge = position.env_steps + 1 if logs is not None else None  # from the memory of a TensorBoard that is looking
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)
        if config is not None:
            self._writer.add_text("config", f"```yaml\n{config}\n```", position.env_steps)
        if logs is None:
            for summary in hparams(  # type: ignore[no-untyped-call]
                {
                    key: value if isinstance(value, bool | int | float) else str(value)
                    for key, value in hyperparameters.items()
                },
                dict.fromkeys(_HPARAM_METRICS, 0.0),
            ):
                self._writer._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]

    def write(self, position: Position, metrics: Mapping[str, float]) -> None:
        """Write scalars at a position; those that are not finite are left out."""
        scalars = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        line = {"iteration": position.iteration, "stage": position.stage, "env_steps": position.env_steps, **scalars}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, position.env_steps)

    def write_image(self, position: Position, name: str, image: NDArray[np.uint8]) -> None:
        """Show an image `[H, W, 3]` in TensorBoard."""
        self._writer.add_image(name, image, position.env_steps, dataformats="HWC")

    def sync(self) -> dict[str, int]:
        """Write everything through to the disk; returns how many bytes each log has now, by its name."""
        self._file.flush()
        self._writer.flush()
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
        self._file.close()
        self._writer.close()


def _logs(run_dir: Path) -> dict[str, Path]:
    """Return the files that grow with a run, by their names within it; links are none of ours."""
    paths = [run_dir / "metrics.jsonl", *sorted((run_dir / "tensorboard").glob("*"))]
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


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl; a last line that was cut off in writing is passed over."""
    path = run_dir / "metrics.jsonl"
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
