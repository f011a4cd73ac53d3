"""Run directories: checks whether a run can resume with a config, clears a directory, writes its config."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from metarl.config.schema import OPERATIONAL_SETTINGS, RunConfig, hash_of, load_config
from metarl.errors import UserError
from metarl.runs.atomic_files import replace_file
from metarl.runs.checkpoint import Checkpoint, CorruptCheckpointError, clear, load_latest
from metarl.runs.divergence import DIVERGED
from metarl.runs.lock import FOLDERS
from metarl.types import Position


def folder_id(path: Path) -> tuple[int, int] | None:
    """Return what tells a folder from any other, whatever its name: device and inode; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def load_to_resume(run_dir: Path, config: RunConfig, *, allow_config_change: bool) -> tuple[Checkpoint, Position]:
    """Return the checkpoint to resume from and its position; a finished run may resume with more iterations.

    Args:
        run_dir: the run directory.
        config: the config to resume with.
        allow_config_change: whether settings may differ from the run's.

    Raises:
        UserError: the config does not fit the run, or no checkpoint can be loaded.
    """
    before = load_config(run_dir / "config.yaml")
    with contextlib.suppress(OSError):  # the next save reports it
        clear(run_dir / "checkpoints")
    try:
        checkpoint = load_latest(run_dir / "checkpoints")
    except CorruptCheckpointError as error:
        raise UserError(f"cannot resume {run_dir}: {error}; start over with --overwrite") from error
    position = checkpoint.position
    if not position.iteration and position.env_steps:
        raise UserError(f"{run_dir} holds a saved policy, not a run; to train from it, set stages.0.init_from")
    differing = differences(before, config)
    if checkpoint.manifest.config_sha256 != hash_of((run_dir / "config.yaml").read_bytes()):
        differing.append(f"config.yaml (not the one that checkpoint {checkpoint.path.name} was trained with)")
    if differing and not allow_config_change:
        raise UserError(
            f"{run_dir} was trained with different settings: {', '.join(differing)}; resume with the same ones, or "
            "add --allow-config-change"
        )
    if len(config.stages) != len(before.stages):
        raise UserError(
            f"{run_dir} has {len(before.stages)} stages, the config {len(config.stages)}; a run keeps its number of "
            f"stages; start a new run with --stages.0.init-from {run_dir}"
        )
    _check_names(before, config)
    _check_iterations(before, config, position)
    last, iterations = len(before.stages) - 1, before.stages[-1].iterations
    if position.stage > last and config.stages[-1].iterations > iterations:
        position = replace(position, stage=last, stage_iteration=iterations)
    return checkpoint, position


def _check_names(before: RunConfig, config: RunConfig) -> None:
    """Raise UserError if stages of a sequence are renamed: scores are keyed by stage name."""
    for stage, (was, now) in enumerate(zip(before.stages, config.stages, strict=True)):
        if was.name != now.name and len(before.stages) > 1:
            raise UserError(f"stages.{stage}.name: got {now.name!r}, expected {was.name!r}, the name of its scores")


def _check_iterations(before: RunConfig, config: RunConfig, position: Position) -> None:
    """Raise UserError if a finished stage changes its length, or a stage gets fewer iterations than it has run."""
    for stage, (was, now) in enumerate(zip(before.stages, config.stages, strict=True)):
        finished = stage < position.stage
        done = was.iterations if finished else position.stage_iteration if stage == position.stage else 0
        others_follow = stage + 1 < len(before.stages)
        if now.iterations < done or (finished and others_follow and now.iterations != done):
            expected = f"{'' if finished and others_follow else 'at least '}{done}, the number that it has run"
            raise UserError(f"stages.{stage}.iterations: got {now.iterations}, expected {expected}")


def differences(before: RunConfig, now: RunConfig) -> list[str]:
    """Return the settings that differ and affect results, e.g. `seed (0, now 1)`."""
    old, new = comparable(before), comparable(now)
    return [
        f"{key} ({old.get(key, 'nothing')}, now {new.get(key, 'nothing')})"
        for key in old | new
        if old.get(key) != new.get(key)
    ]


def clear_run_dir(run_dir: Path) -> None:
    """Delete the run in a directory; raises UserError if that fails."""
    try:
        (run_dir / "config.yaml").unlink(missing_ok=True)  # first: without it the directory holds no run
        for name in FOLDERS:
            shutil.rmtree(run_dir / name, ignore_errors=True)
        for path in (run_dir / "metrics.jsonl", run_dir / DIVERGED, *run_dir.glob("config.before_*.yaml")):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {run_dir}: {error.strerror}; choose another with --run-dir") from error


def write_config(run_dir: Path, text: str, position: Position) -> None:
    """Write a run's config.yaml; a different one is kept as `config.before_<iteration>.yaml`."""
    path = run_dir / "config.yaml"
    before = path.read_bytes() if path.is_file() else None
    if before == text.encode():
        return
    if before is not None:
        replace_file(path.with_name(f"config.before_{position.iteration:06d}.yaml"), before)
    replace_file(path, text.encode())


def comparable(config: RunConfig) -> dict[str, Any]:
    """Return the settings that affect results, flat."""
    return flatten(config.model_dump(exclude=set(OPERATIONAL_SETTINGS)))


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
