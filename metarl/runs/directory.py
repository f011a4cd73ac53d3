"""What lies in a run's directory at its start: made anew, or gone on with if its settings are the same."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from metarl.config.schema import NO_EFFECT, RunConfig, hash_of, load_config
from metarl.errors import UserError
from metarl.runs.atomic_files import replace_file
from metarl.runs.checkpoint import Checkpoint, CorruptCheckpointError, clear, load_latest
from metarl.runs.divergence import DIVERGED
from metarl.runs.lock import FOLDERS
from metarl.types import Position


def checkpoint_to_resume(run_dir: Path, config: RunConfig, *, allow_config_change: bool) -> tuple[Checkpoint, Position]:
    """Return the checkpoint of a run to go on from, and where: a run that was at its end may have been made longer.

    Raises:
        UserError: its config differs, and that was not allowed; or none of its checkpoints can be loaded.
    """
    before = load_config(run_dir / "config.yaml")
    with contextlib.suppress(OSError):  # the next one to be saved will tell
        clear(run_dir / "checkpoints")
    try:
        checkpoint = load_latest(run_dir / "checkpoints")
    except CorruptCheckpointError as error:
        raise UserError(f"cannot resume {run_dir}: {error}; start anew with --overwrite") from error
    position = checkpoint.position
    if not position.iteration and position.env_steps:
        raise UserError(f"{run_dir} holds a policy that was saved, not a run; train from it by `stages.0.init_from`")
    differing = differences(before, config)
    if checkpoint.manifest.config_sha256 != hash_of((run_dir / "config.yaml").read_bytes()):
        differing.append(f"config.yaml (it is not the one that {checkpoint.path.name} was trained with)")
    if differing and not allow_config_change:
        raise UserError(
            f"{run_dir} was trained with other settings of {', '.join(differing)}; resume with the same ones, or add "
            "--allow-config-change"
        )
    if len(config.stages) != len(before.stages):
        raise UserError(
            f"{run_dir} has {len(before.stages)} stages, the config {len(config.stages)}: what a stage leaves behind "
            f"depends on those that follow; start a run with stages.0.init_from {run_dir}"
        )
    _check_names(before, config)
    _check_iterations(before, config, position)
    last, iterations = len(before.stages) - 1, before.stages[-1].iterations
    if position.stage > last and config.stages[-1].iterations > iterations:
        position = replace(position, stage=last, stage_iteration=iterations)
    return checkpoint, position


def _check_names(before: RunConfig, config: RunConfig) -> None:
    """Raise UserError if stages of a sequence are renamed: their scores so far would be nobody's."""
    for stage, (was, now) in enumerate(zip(before.stages, config.stages, strict=True)):
        if was.name != now.name and len(before.stages) > 1:
            raise UserError(
                f"stages.{stage}.name: got {now.name!r}, expected {was.name!r}, by which its scores are tracked"
            )


def _check_iterations(before: RunConfig, config: RunConfig, position: Position) -> None:
    """Raise UserError if stages get another length that had their end, or less than they have had: it is over."""
    for stage, (was, now) in enumerate(zip(before.stages, config.stages, strict=True)):
        over = stage < position.stage
        done = was.iterations if over else position.stage_iteration if stage == position.stage else 0
        others_follow = stage + 1 < len(before.stages)
        if now.iterations < done or (over and others_follow and now.iterations != done):
            expected = f"{done}, which it has had" if over and others_follow else f"at least the {done} that it has had"
            raise UserError(f"stages.{stage}.iterations: got {now.iterations}, expected {expected}")


def differences(before: RunConfig, now: RunConfig) -> list[str]:
    """Return the settings that results depend on and that differ, e.g. `seed (0, now 1)`."""
    was, is_now = comparable(before), comparable(now)
    return [
        f"{key} ({was.get(key, 'nothing')}, now {is_now.get(key, 'nothing')})"
        for key in was | is_now
        if was.get(key) != is_now.get(key)
    ]


def clear_run_dir(run_dir: Path) -> None:
    """Remove the run that a directory holds; raises UserError if that cannot be done."""
    try:
        (run_dir / "config.yaml").unlink(missing_ok=True)  # first: without it there is no run
        for name in FOLDERS:
            shutil.rmtree(run_dir / name, ignore_errors=True)
        for path in (run_dir / "metrics.jsonl", run_dir / DIVERGED, *run_dir.glob("config.before_*.yaml")):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {run_dir}: {error.strerror}; choose another with --run-dir") from error


def write_config(run_dir: Path, text: str, position: Position) -> None:
    """Write a run's config; another one that it had is kept under the iteration that it was used up to."""
    path = run_dir / "config.yaml"
    before = path.read_bytes() if path.is_file() else None
    if before == text.encode():
        return
    if before is not None:
        replace_file(path.with_name(f"config.before_{position.iteration:06d}.yaml"), before)
    replace_file(path, text.encode())


def comparable(config: RunConfig) -> dict[str, Any]:
    """Return the settings that results depend on, flat."""
    return flatten(config.model_dump(exclude=set(NO_EFFECT)))


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
