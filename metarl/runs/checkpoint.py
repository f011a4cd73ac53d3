"""Saves and loads checkpoints: safetensors and a JSON manifest, no format that can execute code.

Saving is atomic: a checkpoint is written to a temporary folder, synced and renamed. The manifest, written last, lists
every file with its hash and the shapes of its tensors. Everything is verified before it is used.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import safetensors
import safetensors.torch
from pydantic import Field, StringConstraints, ValidationError
from torch import Tensor

from metarl.runs.atomic_files import open_plain, sync, write_file
from metarl.settings import Settings
from metarl.spaces import Spaces
from metarl.types import Count, Position

FORMAT = 2
_LOG = logging.getLogger(__name__)
_AGENT = "agent.safetensors"
_MANIFEST = "manifest.json"
_LIBRARIES = ("metarl", "torch", "numpy", "gymnasium", "metaworld", "mujoco")
_MOST_BYTES = 16 * 2**20
"""Size limit of a manifest and of a file's header, which have about 100 KiB; larger ones are rejected unread."""
_MOST_FILE_BYTES = 2**37


class Entry(Settings):
    """The manifest's entry of a file."""

    sha256: str
    bytes: int = Field(ge=8, le=_MOST_FILE_BYTES)
    tensors: dict[str, tuple[Count, ...]]  # shapes by name


class Manifest(Settings):
    """The manifest of a checkpoint.

    Attributes:
        format: the version of the format.
        position: the run's position.
        spaces: the spaces of the agent.
        score: the score of the evaluation in this iteration, higher is better; None without an evaluation.
        config_sha256: the hash of the run's config.yaml.
        logs: the size in bytes of each log at the checkpoint, by name.
        files: the entries of the checkpoint's files, by name.
        data: the entries of files in the run's `data` folder, by name without suffix; see `data_store`.
        versions: the versions of libraries.
    """

    format: int
    position: Position
    spaces: Spaces
    score: float | None
    config_sha256: str
    logs: dict[str, Count]
    files: dict[Annotated[str, StringConstraints(pattern=r"^[a-z_]+\.safetensors$")], Entry]
    data: dict[Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+$")], Entry] = Field(default_factory=dict)
    versions: dict[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    path: Path
    manifest: Manifest
    state: dict[str, Tensor]  # of the agent

    @property
    def position(self) -> Position:
        """The run's position."""
        return self.manifest.position

    @property
    def spaces(self) -> Spaces:
        """The spaces of the agent."""
        return self.manifest.spaces

    @property
    def parts(self) -> frozenset[str]:
        """The names of all states in the checkpoint."""
        return frozenset(name.removesuffix(".safetensors") for name in self.manifest.files)

    def load(self, name: str) -> dict[str, Tensor]:
        """Return another state, e.g. `stability`; empty if the checkpoint has none. Raises CorruptCheckpointError."""
        file = f"{name}.safetensors"
        return read_tensors(self.path / file) if file in self.manifest.files else {}


class CorruptCheckpointError(Exception):
    """A checkpoint that fails its checks; the message says which file and why."""


def save(
    folder: Path,
    states: Mapping[str, Mapping[str, Tensor]],
    position: Position,
    spaces: Spaces,
    keep: int,
    *,
    keep_best: int = 0,
    score: float | None = None,
    config_sha256: str = "",
    logs: Mapping[str, int] | None = None,
    data: Mapping[str, Entry] | None = None,
) -> Path:
    """Write `folder/<iteration>/`, and remove all checkpoints but the newest and the best.

    Existing checkpoints of later iterations were rejected when the run was resumed. They are renamed to
    `<iteration>.rejected`.

    Args:
        folder: the run's `checkpoints` folder.
        states: the agent's `state_dict` under `agent`, and others; each that is not empty gets a file.
        position: the run's position.
        spaces: the spaces of the agent.
        keep: the number of newest checkpoints to keep, ≥ 1.
        keep_best: the number of checkpoints with the highest score to keep, ≥ 0; the newest of equal ones.
        score: see `Manifest`.
        config_sha256: see `Manifest`.
        logs: see `Manifest`.
        data: see `Manifest`.

    Raises:
        OSError: the checkpoint cannot be written; the folder is left as it was. Also SafetensorError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{position.iteration:06d}"
    temporary, replaced = folder / f".{target.name}.{os.getpid()}.tmp", _replaced(target)
    clear(folder)
    temporary.mkdir()
    try:
        files = {}
        for name, state in states.items():
            if state:
                path = temporary / f"{name}.safetensors"
                safetensors.torch.save_file(_unshare(state), path)
                sync(path)
                files[path.name] = entry_of(path, state)
        manifest = Manifest(
            format=FORMAT,
            position=position,
            spaces=spaces,
            score=score,
            config_sha256=config_sha256,
            logs=dict(logs or {}),
            files=files,
            data=dict(data or {}),
            versions=_versions(),
        ).model_dump(mode="json")
        manifest["sha256"] = _checksum(manifest)
        write_file(temporary / _MANIFEST, json.dumps(manifest, indent=2).encode())
        sync(temporary)
        if target.exists():
            target.rename(replaced)
        temporary.rename(target)
        sync(folder)
    except BaseException:
        if not temporary.exists():
            target.rename(temporary)  # it may not be synced
        if replaced.exists():
            replaced.rename(target)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    _set_aside(folder, position.iteration)
    _prune(folder, keep, keep_best)
    return target


@functools.cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in _LIBRARIES}


def clear(folder: Path) -> None:
    """Remove the leftovers of a killed process, and restore a checkpoint that it was replacing.

    No other process may use the folder. Raises OSError if a checkpoint cannot be restored.
    """
    for path in _newest_first(folder):
        if not path.name.isdigit():
            path.rename(folder / _number(path))
    for leftover in folder.glob(".*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _set_aside(folder: Path, iteration: int) -> None:
    """Rename checkpoints of later iterations, which would collide with future ones."""
    for path in _newest_first(folder):
        if int(path.name) > iteration:
            rejected = path.with_name(f"{path.name}.rejected")
            with contextlib.suppress(OSError):
                shutil.rmtree(rejected, ignore_errors=True)
                path.rename(rejected)


def _prune(folder: Path, keep: int, keep_best: int) -> None:
    """Remove all checkpoints but the newest and the best."""
    newest_first = _newest_first(folder)
    scores = {path: score for path in newest_first if keep_best and (score := _score(path)) is not None}
    best = sorted(scores, key=lambda path: scores[path], reverse=True)[:keep_best]  # a stable sort: newest of equals
    for path in newest_first[keep:]:
        if path not in best:
            with contextlib.suppress(OSError):
                # Rename first: a process killed during removal must not leave half a checkpoint.
                shutil.rmtree(path.rename(folder / f".{path.name}.removed.tmp"))


def _score(path: Path) -> float | None:
    """Return the score of a checkpoint; None if it has none or cannot be read."""
    try:
        return _read_manifest(path).score
    except CorruptCheckpointError:
        return None


def load_latest(folder: Path) -> Checkpoint:
    """Load the newest valid checkpoint; a warning names each newer one and why it was rejected.

    Raises:
        CorruptCheckpointError: no checkpoint is valid; the message names each one and why it was rejected.
    """
    return _first_valid(_newest_first(folder), folder)


def load_best(folder: Path) -> Checkpoint:
    """Load the valid checkpoint with the highest score, as `load_latest` does."""
    scores = {path: score for path in _newest_first(folder) if (score := _score(path)) is not None}
    if not scores:
        raise CorruptCheckpointError(f"no checkpoint in {folder} has a score; evaluate during training to get one")
    return _first_valid(sorted(scores, key=lambda path: scores[path], reverse=True), folder)


def _first_valid(paths: list[Path], folder: Path) -> Checkpoint:
    rejected: list[str] = []
    for path in paths:
        try:
            checkpoint = load(path)
        except CorruptCheckpointError as error:
            rejected.append(str(error))
        else:
            for reason in rejected:
                _LOG.warning("metarl: rejected a checkpoint, using %s instead: %s", path.name, reason)
            return checkpoint
    raise CorruptCheckpointError("; ".join(rejected) or f"no checkpoint in {folder}")


def load_iteration(folder: Path, iteration: int) -> Checkpoint:
    """Load the checkpoint of an iteration; raises CorruptCheckpointError if it is missing or invalid."""
    paths = {int(_number(path)): path for path in _newest_first(folder)}
    if iteration not in paths:
        available = ", ".join(map(str, sorted(paths))) or "none"
        raise CorruptCheckpointError(f"{folder} has no checkpoint of iteration {iteration}; available: {available}")
    return load(paths[iteration])


def load(path: Path) -> Checkpoint:
    """Load one checkpoint after verifying all of its files; raises CorruptCheckpointError."""
    manifest = _read_manifest(path)
    if _AGENT not in manifest.files:
        raise CorruptCheckpointError(f"{path}: the manifest does not name {_AGENT}")
    for name, entry in manifest.files.items():
        verify(path / name, entry)
    return Checkpoint(path, manifest, read_tensors(path / _AGENT))


def _read_manifest(path: Path) -> Manifest:
    """Return the verified manifest of a checkpoint; raises CorruptCheckpointError."""
    file = path / _MANIFEST
    try:
        if path.is_symlink():
            raise CorruptCheckpointError(f"{path} is a link, which is not followed")
        with open_plain(file) as opened:
            data = opened.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise CorruptCheckpointError(f"{file}: more than {_MOST_BYTES:,} bytes, too long for a manifest")
        content = json.loads(data)
        if not isinstance(content, dict):
            raise CorruptCheckpointError(f"{file}: holds a {type(content).__name__}, not a manifest")
        if content.get("format") != FORMAT:
            file_format = f"{content.get('format')!r:.20}"
            raise CorruptCheckpointError(f"{file}: format {file_format}; this metarl reads format {FORMAT}")
        if content.pop("sha256", None) != _checksum(content):
            raise CorruptCheckpointError(f"{file}: its hash does not match its content; the file is damaged")
        return Manifest.model_validate(content, strict=False)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = _escape(".".join(map(str, first["loc"])))
        raise CorruptCheckpointError(f"{file}: {where}: {first['msg']}, found {first['input']!r:.80}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{file}: {_reason(error)}") from error


def verify(path: Path, entry: Entry) -> None:
    """Check the size, hash and tensors of a file against the manifest.

    Raises:
        CorruptCheckpointError: they differ, or the file cannot be read.
    """
    try:
        with open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry.bytes:
                raise CorruptCheckpointError(f"{path}: {size:,} bytes; the manifest says {entry.bytes:,}")
            header = int.from_bytes(file.read(8), "little")
            if header > min(_MOST_BYTES, size):
                raise CorruptCheckpointError(f"{path}: not safetensors: a header of {header:,} bytes")
            file.seek(0)
            if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                raise CorruptCheckpointError(f"{path}: its hash does not match the manifest; the file is damaged")
        with safetensors.safe_open(path, "pt") as tensors:
            shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise CorruptCheckpointError(f"{path}: {_reason(error)}") from error
    for name in shapes.keys() | entry.tensors.keys():
        if shapes.get(name) != entry.tensors.get(name):
            actual, expected = (shapes_by_name.get(name, "nothing") for shapes_by_name in (shapes, entry.tensors))
            raise CorruptCheckpointError(
                f"{path}: {_escape(name)} has shape {actual!r:.80}; the manifest says {expected!r:.80}"
            )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a verified file; raises CorruptCheckpointError if torch cannot load it."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, RuntimeError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise CorruptCheckpointError(f"{path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{type(error).__name__}: {_escape(message)}"


def _escape(text: str) -> str:
    """Return foreign text for a message, escaped to one line and cut to 200 characters."""
    return repr(text[:200])[1:-1]


def _checksum(manifest: Mapping[str, Any]) -> str:
    """Return the hash of a manifest's content."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _unshare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy only the tensors that share memory with others, which safetensors rejects."""
    shared = Counter(value.untyped_storage().data_ptr() for value in state.values())
    return {
        name: (value.clone() if shared[value.untyped_storage().data_ptr()] > 1 else value).contiguous()
        for name, value in state.items()
    }


def entry_of(path: Path, tensors: Mapping[str, Tensor]) -> Entry:
    """Return the manifest's entry of a file with these tensors."""
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    return Entry(sha256=_hash(path), bytes=path.stat().st_size, tensors=shapes)


def referenced_data(folder: Path) -> set[str]:
    """Return the names of the data files that readable checkpoints of a run refer to."""
    names: set[str] = set()
    for path in _newest_first(folder):
        with contextlib.suppress(CorruptCheckpointError):
            names |= _read_manifest(path).data.keys()
    return names


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replaced(target: Path) -> Path:
    """Return the temporary path of a checkpoint while a new one of the same iteration replaces it."""
    return target.with_name(f".{target.name}.replaced.tmp")


def _number(path: Path) -> str:
    """Return the number of a checkpoint, even of one that was being replaced; other names stay as they are."""
    return path.name.removeprefix(".").removesuffix(".replaced.tmp")


def _newest_first(folder: Path) -> list[Path]:
    """Return the paths of all checkpoints, including one under a temporary name whose replacement was interrupted."""
    if not folder.is_dir():
        return []
    numbered = {path.name: path for path in folder.iterdir()}
    for path in list(numbered.values()):
        numbered.setdefault(_number(path), path)
    numbers = [name for name in numbered if name.isascii() and name.isdigit()]
    return [numbered[name] for name in sorted(numbers, key=int, reverse=True)]
