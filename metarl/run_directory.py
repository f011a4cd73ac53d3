"""What lies in a run's directory at its start: made anew, or gone on with if its settings are the same."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metarl.checkpoint import Checkpoint, CorruptCheckpointError, load_latest
from metarl.config import RunConfig, dump_config, load_config
from metarl.errors import UserError


def checkpoint_to_resume(run_dir: Path, config: RunConfig) -> Checkpoint:
    """Return the checkpoint of a run to go on from.

    Raises:
        UserError: there is no run; its config differs; none of its checkpoints can be loaded.
    """
    config_file = run_dir / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"{run_dir} holds no run to resume; leave out --resume to start one")
    before, now = comparable(load_config(config_file)), comparable(config)
    differing = [key for key in before | now if before.get(key) != now.get(key)]
    if differing:
        raise UserError(f"{run_dir} was trained with other settings of {', '.join(differing)}; resume with the same")
    try:
        return load_latest(run_dir / "checkpoints")
    except CorruptCheckpointError as error:
        raise UserError(f"cannot resume {run_dir}: {error}; start anew with --overwrite") from error


def open_run_dir(run_dir: Path, config: RunConfig, *, overwrite: bool) -> None:
    """Make the directory of a new run and write its config.

    Raises:
        UserError: there is a run already and overwrite was not asked for; the directory cannot be written.
    """
    config_file = run_dir / "config.yaml"
    holds_run = config_file.exists()
    if holds_run and not overwrite:
        raise UserError(f"{run_dir} already holds a run; go on with it by --resume, or replace it by --overwrite")
    try:
        if holds_run:
            for name in ("checkpoints", "tensorboard", "evaluation", "plots"):
                shutil.rmtree(run_dir / name, ignore_errors=True)
            (run_dir / "metrics.jsonl").unlink(missing_ok=True)
        run_dir.mkdir(parents=True, exist_ok=True)
        config_file.write_text(dump_config(config), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {run_dir}: {error.strerror}; choose another with --run-dir") from error


def comparable(config: RunConfig) -> dict[str, Any]:
    """Return the settings that results depend on, flat: a run may go on elsewhere with other workers."""
    return flatten(config.model_dump(exclude={"device", "num_workers", "keep_checkpoints"}))


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings as `{"agent.inner_lr": 0.1, …}`."""
    if isinstance(tree, Mapping):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list | tuple) and any(isinstance(item, Mapping) for item in tree):
        items = [(str(index), value) for index, value in enumerate(tree)]
    else:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat
