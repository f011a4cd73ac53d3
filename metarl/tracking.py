"""The only module that writes TensorBoard and metrics.jsonl: the same scalars in both, against environment steps."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from metarl.checkpoint import Position

_HPARAM_METRICS = ("meta_train/return_post", "meta_test/return_post", "meta_test/success_post")


class Tracker:
    """Writes one line of metrics.jsonl and one set of scalars for each iteration and each evaluation.

    Args:
        run_dir: gets `metrics.jsonl` and `tensorboard/`.
        config: the whole config as YAML, shown as text.
        hyperparameters: flat, for the HParams tab.
        position: where the run goes on; what was written beyond it is dropped, so that nothing is there twice.
    """

    def __init__(self, run_dir: Path, config: str, hyperparameters: Mapping[str, Any], position: Position) -> None:
        self._path = run_dir / "metrics.jsonl"
        kept = [line for line in read_metrics(run_dir) if line["iteration"] <= position.iteration > 0]
        self._path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._file = self._path.open("a", encoding="utf-8")
        purge = position.env_steps + 1 if position.iteration else None
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)
        if not position.iteration:
            self._writer.add_text("config", f"```yaml\n{config}\n```")
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

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._writer.close()


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
