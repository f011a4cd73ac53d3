"""Stored experience on disk: files of tensors that a run writes once, next to its checkpoints.

A checkpoint's manifest names the files that belong to it, with their hashes; a file costs its hash once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from metarl.runs.atomic_files import sync
from metarl.runs.checkpoint import CorruptCheckpointError, Entry, entry_of, read_tensors, referenced_data, verify

DATA = "data"
"""The folder in a run directory."""


class DataStore:
    """A `TensorStore` in a folder.

    Args:
        folder: `<run_dir>/data`; made when something is written.
        entries: what the checkpoint that a run resumes from says of its files.
    """

    def __init__(self, folder: Path, entries: Mapping[str, Entry] | None = None) -> None:
        self._folder, self._entries = folder, dict(entries or {})

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """See `TensorStore.write`; raises OSError if the disk cannot take it."""
        if not re.fullmatch(r"[a-z0-9_]+", name) or name in self._entries:
            raise ValueError(f"data file {name!r}: expected a new name of a-z, 0-9 and _")
        self._folder.mkdir(parents=True, exist_ok=True)
        path, temporary = self._path(name), self._folder / f".{name}.{os.getpid()}.tmp"
        try:
            safetensors.torch.save_file({key: value.contiguous() for key, value in tensors.items()}, temporary)
            sync(temporary)
            entry = entry_of(temporary, tensors)
            temporary.replace(path)
            sync(self._folder)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._entries[name] = entry

    def read(self, name: str) -> dict[str, Tensor]:
        """See `TensorStore.read`."""
        if name not in self._entries:
            raise ValueError(f"data file {name!r}: the checkpoint does not name it")
        try:
            verify(self._path(name), self._entries[name])
            return read_tensors(self._path(name))
        except CorruptCheckpointError as error:
            raise ValueError(str(error)) from error

    def entries(self, names: Collection[str]) -> dict[str, Entry]:
        """Return what a manifest says of some files."""
        return {name: self._entries[name] for name in names}

    def remove_unused(self, checkpoints: Path) -> None:
        """Remove files that no checkpoint names: leftovers of a killed process, and data that an agent dropped."""
        used = referenced_data(checkpoints)
        for path in self._folder.glob("*"):
            if path.suffix == ".tmp" or path.stem not in used:
                path.unlink(missing_ok=True)
        self._entries = {name: entry for name, entry in self._entries.items() if name in used}

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"
