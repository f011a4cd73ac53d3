"""Saves and loads everything that training changes: safetensors and a JSON manifest, nothing that could hold code.

A checkpoint appears whole or not at all: it is written beside its place, synced, and renamed; the manifest, which
says what every file holds and its hash, is written last. Whatever is loaded passes all checks before it is used.
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
from metarl.types import Count, Position, Spaces

FORMAT = 2
_LOG = logging.getLogger(__name__)
_AGENT = "agent.safetensors"
_MANIFEST = "manifest.json"
_LIBRARIES = ("metarl", "torch", "numpy", "gymnasium", "metaworld", "mujoco")
_MOST_BYTES = 16 * 2**20
"""Of a manifest and of a file's header, which have some 100 KiB; what is larger is refused unread."""
_MOST_FILE_BYTES = 2**37


class Entry(Settings):
    """What the manifest says of a file."""

    sha256: str
    bytes: int = Field(ge=8, le=_MOST_FILE_BYTES)
    tensors: dict[str, tuple[Count, ...]]  # shapes by name


class Manifest(Settings):
    """What a checkpoint says of itself.

    Attributes:
        format: of the checkpoint.
        position: where the run stands.
        spaces: what the agent was built for.
        score: of the evaluation in this iteration, higher is better; None if there was none.
        config_sha256: of the run's config.yaml.
        logs: how many bytes of each log, by name, belong to what came before the checkpoint.
        files: by name.
        data: files of stored data in the run's `data` folder, by name without suffix; see `data_store`.
        versions: of libraries.
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
    """What a checkpoint holds, all of it verified."""

    path: Path
    manifest: Manifest
    state: dict[str, Tensor]  # of the agent

    @property
    def position(self) -> Position:
        """Where the run stands."""
        return self.manifest.position

    @property
    def spaces(self) -> Spaces:
        """What the agent was built for."""
        return self.manifest.spaces

    @property
    def parts(self) -> frozenset[str]:
        """Names of all states that it holds."""
        return frozenset(name.removesuffix(".safetensors") for name in self.manifest.files)

    def load(self, name: str) -> dict[str, Tensor]:
        """Return another state, e.g. `stability`, empty if there was none; raises CorruptCheckpointError."""
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

    Whoever saves this iteration has none that comes later: those that are there were rejected, when the run was gone on
    with. They are kept under another name, `<iteration>.rejected`.

    Args:
        folder: the run's `checkpoints` folder.
        states: an agent's `state_dict`, under `agent`, and others; each goes into a file of its own, empty ones do not.
        position: where the run stands.
        spaces: what the agent was built for.
        keep: how many of the newest stay, ≥ 1.
        keep_best: how many of those with the highest score stay, ≥ 0; of equal ones the newest.
        score: see `Manifest`, as the rest.
        config_sha256: likewise.
        logs: likewise.
        data: likewise.

    Raises:
        OSError: (also SafetensorError) it cannot be written; all is as it was.
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
                safetensors.torch.save_file(_apart(state), path)
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
            target.rename(temporary)  # it may not have come through to the disk
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
    """Remove what a killed process has left; a checkpoint that it was about to replace is put back.

    Nobody else may be at work there. Raises OSError: it cannot be put back.
    """
    for path in _newest_first(folder):
        if not path.name.isdigit():
            path.rename(folder / _number(path))
    for left_over in folder.glob(".*.tmp"):
        shutil.rmtree(left_over, ignore_errors=True)


def _set_aside(folder: Path, iteration: int) -> None:
    """Give checkpoints of later iterations another name: they would take the place of those that are still to come."""
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
    best = sorted(scores, key=lambda path: scores[path], reverse=True)[:keep_best]  # sorting keeps the order of equals
    for path in newest_first[keep:]:
        if path not in best:
            with contextlib.suppress(OSError):
                # A process may be killed in the midst of it: half a checkpoint must not look like one.
                shutil.rmtree(path.rename(folder / f".{path.name}.removed.tmp"))


def _score(path: Path) -> float | None:
    """Return the score of a checkpoint; None for one that has none or cannot be read."""
    try:
        return _read_manifest(path).score
    except CorruptCheckpointError:
        return None


def load_latest(folder: Path) -> Checkpoint:
    """Load the newest checkpoint that passes its checks; each newer one is named in a warning, with the reason.

    Raises:
        CorruptCheckpointError: there is none; the message names each one that was rejected, and why.
    """
    return _first_sound(_newest_first(folder), folder)


def load_best(folder: Path) -> Checkpoint:
    """Load the checkpoint with the highest score, as `load_latest` does; without scores there is none."""
    scores = {path: score for path in _newest_first(folder) if (score := _score(path)) is not None}
    if not scores:
        raise CorruptCheckpointError(f"no checkpoint in {folder} was made at an evaluation")
    return _first_sound(sorted(scores, key=lambda path: scores[path], reverse=True), folder)


def _first_sound(paths: list[Path], folder: Path) -> Checkpoint:
    rejected: list[str] = []
    for path in paths:
        try:
            checkpoint = load(path)
        except CorruptCheckpointError as error:
            rejected.append(str(error))
        else:
            for reason in rejected:
                _LOG.warning("metarl: rejected a checkpoint, %s is used: %s", path.name, reason)
            return checkpoint
    raise CorruptCheckpointError("; ".join(rejected) or f"no checkpoint in {folder}")


def load_iteration(folder: Path, iteration: int) -> Checkpoint:
    """Load the checkpoint of an iteration; raises CorruptCheckpointError, also if there is none."""
    paths = {int(_number(path)): path for path in _newest_first(folder)}
    if iteration not in paths:
        there = ", ".join(map(str, sorted(paths))) or "none"
        raise CorruptCheckpointError(f"{folder} has no checkpoint of iteration {iteration}; there are: {there}")
    return load(paths[iteration])


def load(path: Path) -> Checkpoint:
    """Load one checkpoint, once all of its files have passed their checks; raises CorruptCheckpointError."""
    manifest = _read_manifest(path)
    if _AGENT not in manifest.files:
        raise CorruptCheckpointError(f"{path}: the manifest does not name {_AGENT}")
    for name, entry in manifest.files.items():
        verify(path / name, entry)
    return Checkpoint(path, manifest, read_tensors(path / _AGENT))


def _read_manifest(path: Path) -> Manifest:
    """Return a checkpoint's manifest if it is what was once written; raises CorruptCheckpointError."""
    file = path / _MANIFEST
    try:
        if path.is_symlink():
            raise CorruptCheckpointError(f"{path} is a link, which is not followed")
        with open_plain(file) as opened:
            data = opened.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise CorruptCheckpointError(f"{file}: more than {_MOST_BYTES:,} bytes; no manifest is that long")
        content = json.loads(data)
        if not isinstance(content, dict):
            raise CorruptCheckpointError(f"{file}: holds a {type(content).__name__}, not a manifest")
        if content.get("format") != FORMAT:
            found = f"{content.get('format')!r:.20}"
            raise CorruptCheckpointError(f"{file}: format {found}; this metarl reads format {FORMAT}")
        if content.pop("sha256", None) != _checksum(content):
            raise CorruptCheckpointError(f"{file}: its hash is not its own; the file is damaged")
        return Manifest.model_validate(content, strict=False)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = _shown(".".join(map(str, first["loc"])))
        raise CorruptCheckpointError(f"{file}: {where}: {first['msg']}, found {first['input']!r:.80}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{file}: {_reason(error)}") from error


def verify(path: Path, entry: Entry) -> None:
    """Check that a file is the one that was written, with the tensors that the manifest names.

    Raises:
        CorruptCheckpointError: it is not.
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
                raise CorruptCheckpointError(f"{path}: its hash is not the manifest's; the file is damaged")
        with safetensors.safe_open(path, "pt") as tensors:
            shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise CorruptCheckpointError(f"{path}: {_reason(error)}") from error
    for name in shapes.keys() | entry.tensors.keys():
        if shapes.get(name) != entry.tensors.get(name):
            found, expected = (each.get(name, "nothing") for each in (shapes, entry.tensors))
            raise CorruptCheckpointError(
                f"{path}: {_shown(name)} has shape {found!r:.80}; the manifest says {expected!r:.80}"
            )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file that is verified; raises CorruptCheckpointError for what torch cannot hold."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, RuntimeError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise CorruptCheckpointError(f"{path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{type(error).__name__}: {_shown(told)}"


def _shown(text: str) -> str:
    """Return somebody else's words for a message: in one line, and not too long."""
    return repr(text[:200])[1:-1]


def _checksum(manifest: Mapping[str, Any]) -> str:
    """Hash of a manifest's content, which damage to the file changes whatever it hits."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory with others, which safetensors refuses; large ones of their own stay."""
    shared = Counter(value.untyped_storage().data_ptr() for value in state.values())
    return {
        name: (value.clone() if shared[value.untyped_storage().data_ptr()] > 1 else value).contiguous()
        for name, value in state.items()
    }


def entry_of(path: Path, tensors: Mapping[str, Tensor]) -> Entry:
    """Return what a manifest says of a file that holds these tensors."""
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    return Entry(sha256=_hash(path), bytes=path.stat().st_size, tensors=shapes)


def referenced_data(folder: Path) -> set[str]:
    """Return the names of the data files that any readable checkpoint of a run needs."""
    names: set[str] = set()
    for path in _newest_first(folder):
        with contextlib.suppress(CorruptCheckpointError):
            names |= _read_manifest(path).data.keys()
    return names


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replaced(target: Path) -> Path:
    """Where a checkpoint lies while the new one of the same iteration takes its place."""
    return target.with_name(f".{target.name}.replaced.tmp")


def _number(path: Path) -> str:
    """Return the number of a checkpoint, also of one that was being replaced; of anything else what is no number."""
    return path.name.removeprefix(".").removesuffix(".replaced.tmp")


def _newest_first(folder: Path) -> list[Path]:
    """Return the paths of all checkpoints; one whose replacement was cut short is still there under another name."""
    if not folder.is_dir():
        return []
    numbered = {path.name: path for path in folder.iterdir()}
    for path in list(numbered.values()):
        numbered.setdefault(_number(path), path)
    numbers = [name for name in numbered if name.isascii() and name.isdigit()]
    return [numbered[name] for name in sorted(numbers, key=int, reverse=True)]
