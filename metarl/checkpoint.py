"""Saves and loads everything that training changes: safetensors and a JSON manifest, nothing that could hold code.

A checkpoint appears whole or not at all: it is written beside its place, synced, and renamed; the manifest, which
holds a hash of every file, is written last.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
from torch import Tensor

from metarl.types import FloatArray

FORMAT = 1
_LOG = logging.getLogger(__name__)
_STATE_FILE = "agent.safetensors"
_LIBRARIES = ("metarl", "torch", "gymnasium", "metaworld", "mujoco")


@dataclass(frozen=True)
class Position:
    """Where a run stands, counted after the last finished iteration.

    Attributes:
        stage: index of the stage to go on with.
        stage_iteration: iterations finished in that stage.
        iteration: iterations finished in all.
        env_steps: environment steps of training in all.
    """

    stage: int = 0
    stage_iteration: int = 0
    iteration: int = 0
    env_steps: int = 0


@dataclass(frozen=True)
class Spaces:
    """Sizes and bounds that an agent was built for.

    Attributes:
        observation_size: O.
        action_low: `[A]`.
        action_high: `[A]`.
    """

    observation_size: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]

    @property
    def action_size(self) -> int:
        """A."""
        return len(self.action_low)

    @property
    def action_bounds(self) -> tuple[FloatArray, FloatArray]:
        """Low and high, both `[A]`."""
        return np.array(self.action_low), np.array(self.action_high)

    def misfit(self, observation_space: Any, action_space: Any) -> str | None:
        """Return in a line why an environment with these spaces does not fit; None if it does."""
        if observation_space.shape != (self.observation_size,):
            return (
                f"observations of the environment are {observation_space}; the policy's are {(self.observation_size,)}"
            )
        low, high = self.action_bounds
        bounds = [*getattr(action_space, "low", ()), *getattr(action_space, "high", ())]
        if action_space.shape != low.shape or bounds != [*low, *high]:
            return f"actions of the environment are {action_space}; the policy's are bounded by {low} and {high}"
        return None


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds."""

    path: Path
    position: Position
    spaces: Spaces
    state: dict[str, Tensor]  # of the agent
    parts: frozenset[str]  # names of all states that it holds

    def load(self, name: str) -> dict[str, Tensor]:
        """Return another state, e.g. `stability`, empty if there was none; raises CorruptCheckpointError."""
        if name not in self.parts:
            return {}
        path = self.path / f"{name}.safetensors"
        try:
            return safetensors.torch.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise CorruptCheckpointError(f"{path}: {type(error).__name__}: {error}") from error


class CorruptCheckpointError(Exception):
    """A checkpoint that fails its checks; the message says which file and why."""


def save(
    folder: Path, states: Mapping[str, Mapping[str, Tensor]], position: Position, spaces: Spaces, keep: int
) -> Path:
    """Write `folder/<iteration>/` and remove all but the newest `keep` checkpoints.

    Args:
        folder: the run's `checkpoints` folder.
        states: an agent's `state_dict`, under `agent`, and others; each goes into a file of its own, empty ones do not.
        position: where the run stands.
        spaces: what the agent was built for.
        keep: how many checkpoints stay, ≥ 1.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{position.iteration:06d}"
    temporary = folder / f".{target.name}.{os.getpid()}.tmp"
    replaced = folder / f".{target.name}.replaced.tmp"
    for left_over in (temporary, replaced):
        shutil.rmtree(left_over, ignore_errors=True)
    temporary.mkdir()
    try:
        files = {}
        for name, state in states.items():
            if state:
                path = temporary / f"{name}.safetensors"
                safetensors.torch.save_file(_apart(state), path)
                _sync(path)
                files[path.name] = {"sha256": _hash(path), "bytes": path.stat().st_size}
        manifest = {
            "format": FORMAT,
            "position": asdict(position),
            "spaces": asdict(spaces),
            "files": files,
            "versions": {name: version(name) for name in _LIBRARIES},
        }
        manifest["sha256"] = _checksum(manifest)
        _write(temporary / "manifest.json", json.dumps(manifest, indent=2).encode())
        _sync(temporary)
        if target.exists():
            target.rename(replaced)
        temporary.rename(target)
        _sync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise
    for left_over in folder.glob(".*.tmp"):
        shutil.rmtree(left_over, ignore_errors=True)
    for old in _newest_first(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_latest(folder: Path) -> Checkpoint:
    """Load the newest checkpoint that passes its checks; each newer one is named in a warning, with the reason.

    Raises:
        CorruptCheckpointError: there is none; the message names each one that was rejected, and why.
    """
    rejected = []
    for path in _newest_first(folder):
        try:
            checkpoint = load(path)
        except CorruptCheckpointError as error:
            rejected.append(str(error))
        else:
            for reason in rejected:
                _LOG.warning("metarl: rejected a checkpoint, an older one is used: %s", reason)
            return checkpoint
    raise CorruptCheckpointError("; ".join(rejected) or f"no checkpoint in {folder}")


def load(path: Path) -> Checkpoint:
    """Load one checkpoint; raises CorruptCheckpointError."""
    try:
        manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CorruptCheckpointError(f"{path}: format {manifest['format']}; this metarl reads format {FORMAT}")
        if manifest.pop("sha256") != _checksum(manifest):
            raise CorruptCheckpointError(f"{path / 'manifest.json'}: its hash is not its own; the file is damaged")
        for name, entry in manifest["files"].items():
            if Path(name).name != name:
                raise CorruptCheckpointError(f"{path}: the manifest names {name!r}, which is not a file of its own")
            if _hash(path / name) != entry["sha256"]:
                raise CorruptCheckpointError(f"{path / name}: its hash is not the manifest's; the file is damaged")
        spaces = manifest["spaces"]
        if _STATE_FILE not in manifest["files"]:
            raise CorruptCheckpointError(f"{path}: the manifest does not name {_STATE_FILE}")
        return Checkpoint(
            path,
            Position(**manifest["position"]),
            Spaces(spaces["observation_size"], tuple(spaces["action_low"]), tuple(spaces["action_high"])),
            safetensors.torch.load_file(path / _STATE_FILE),
            frozenset(name.removesuffix(".safetensors") for name in manifest["files"]),
        )
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise CorruptCheckpointError(f"{path}: {type(error).__name__}: {error}") from error


def _checksum(manifest: Mapping[str, Any]) -> str:
    """Hash of a manifest's content, which damage to the file changes whatever it hits."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory with others, which safetensors refuses; large ones of their own stay."""
    shared = Counter(value.untyped_storage().data_ptr() for value in state.values())
    return {
        name: value.clone() if shared[value.untyped_storage().data_ptr()] > 1 else value.contiguous()
        for name, value in state.items()
    }


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _newest_first(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if path.name.isdigit()), key=lambda p: int(p.name), reverse=True)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Have a file or a folder written through."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
