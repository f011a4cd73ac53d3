"""A bounded, uniform sample of the trials of a stage, in memory or on disk.

Must not import agents, environments or training.
"""

from __future__ import annotations

import errno
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarl.types import Rollout

Items = dict[str, Tensor]
"""B trials by field, `[B, N, T, ...]`; the fields of rollout k of K + 1 are named `<k>.<field>`."""

_FIELDS = tuple(field.name for field in fields(Rollout))


def items_of(rollouts: Sequence[Rollout]) -> Items:
    """Return an iteration's trials, on the CPU: a task's K + 1 rollouts are one; without adaptation each rollout is."""
    if len(rollouts) == 1:
        rollouts = [rollouts[0].map(lambda part: part.flatten(0, 1)[:, None])]
    return {f"{k}.{name}": getattr(rollout, name).cpu() for k, rollout in enumerate(rollouts) for name in _FIELDS}


def rollouts_of(items: Items, device: torch.device) -> list[Rollout]:
    """Return trials as the K + 1 rollouts that an agent learns from, task by task, without steps that none has."""
    count = len({name.split(".")[0] for name in items if "." in name})
    rollouts = []
    for k in range(count):
        length = int(items[f"{k}.valid"].flatten(0, 1).any(0).sum())
        parts = {name: items[f"{k}.{name}"] for name in _FIELDS}
        steps = {name: part[:, :, :length] for name, part in parts.items() if name != "final_observations"}
        rollouts.append(Rollout(**{name: part.to(device) for name, part in {**parts, **steps}.items()}))
    return rollouts


class Reservoir:
    """Trials of one stage, each seen so far in it with the same probability (Vitter 1985, Algorithm R).

    Args:
        capacity: trials that it holds at most.
        memory_bytes: if its trials would take more, they lie on disk.
        folder: where on disk; the files vanish with the process, even if it is killed.

    Raises:
        OSError: (by every method that writes) the disk has no room for its files, which are allocated as a whole.
    """

    def __init__(self, capacity: int, memory_bytes: float, folder: Path | None) -> None:
        self.capacity, self.seen = capacity, 0
        self._memory_bytes, self._folder = memory_bytes, folder
        self._arrays: dict[str, NDArray[Any]] = {}
        self._trial_bytes = 0

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    def add(self, items: Items, rng: np.random.Generator) -> None:
        """Show it B trials; each is kept with the probability that all trials seen so far have."""
        count = len(next(iter(items.values())))
        order = self.seen + np.arange(count)
        places = np.where(order < self.capacity, order, rng.integers(0, order + 1))
        self.seen += count
        kept = {int(place): i for i, place in enumerate(places) if place < self.capacity}  # the last one stays
        if kept:
            self._write(np.array(list(kept)), {name: value[list(kept.values())] for name, value in items.items()})

    def set(self, places: NDArray[np.int64], items: Items) -> None:
        """Write fields of trials that it holds."""
        self._write(places, items)

    def _write(self, places: NDArray[np.int64], items: Items) -> None:
        if not self._arrays:
            self._trial_bytes = sum(value[:1].nbytes for value in items.values())
        for name, value in items.items():
            array = self._room(name, value)
            array[places] = 0
            where: tuple[Any, ...] = (places, *(slice(size) for size in value.shape[1:]))
            array[where] = value.numpy()

    def _room(self, name: str, value: Tensor) -> NDArray[Any]:
        """Return the array of a field, grown if trials have become longer."""
        old = self._arrays.get(name)
        shape = tuple(value.shape[1:]) if old is None else tuple(np.maximum(value.shape[1:], old.shape[1:]).tolist())
        if old is None or old.shape[1:] != shape:
            new = self._allocate((self.capacity, *shape), value.numpy().dtype)
            if old is not None:
                new[tuple(slice(size) for size in old.shape)] = old
            self._arrays[name] = new
        return self._arrays[name]

    def _allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        if self.capacity * self._trial_bytes <= self._memory_bytes:
            return np.zeros(shape, dtype)
        with tempfile.TemporaryFile(dir=self._folder) as file:  # without a name; the map keeps it
            _allocate_on_disk(file.fileno(), max(1, math.prod(shape) * dtype.itemsize))
            return np.memmap(file, dtype, shape=shape)

    def shrink(self, capacity: int, rng: np.random.Generator) -> None:
        """Keep a uniform choice of at most `capacity` trials."""
        if capacity >= self.capacity:
            return
        kept = np.sort(rng.permutation(len(self))[:capacity])
        items = self.take(kept)
        self.capacity, self._arrays = capacity, {}
        self._write(np.arange(len(kept)), items)

    def take(self, places: NDArray[np.int64]) -> Items:
        """Return some of the trials, copied."""
        return {name: torch.from_numpy(np.array(array[places])) for name, array in self._arrays.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, flat."""
        held = {name: torch.from_numpy(np.asarray(array[: len(self)])) for name, array in self._arrays.items()}
        return {**held, "seen": torch.tensor(self.seen), "capacity": torch.tensor(self.capacity)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned; raises ValueError naming the entry that is missing or does not fit."""
        for name in ("seen", "capacity"):
            if name not in state or state[name].numel() != 1:
                raise ValueError(f"cannot load {name!r}: expected one number")
        self.seen, self.capacity, self._arrays = int(state["seen"]), int(state["capacity"]), {}
        held = {name: value for name, value in state.items() if name not in ("seen", "capacity")}
        for name, value in held.items():
            if len(value) != len(self):
                raise ValueError(f"cannot load {name!r}: expected {len(self)} trials, found {len(value)}")
        for name in [name for name in held if name.endswith(".next_observations")]:  # metarl 0.1 stored these
            k = name.split(".")[0]
            following = held.pop(name)
            held[f"{k}.final_observations"] = last_of_episodes(
                following, held[f"{k}.valid"], held[f"{k}.episode_start"]
            )
        if held:
            self._write(np.arange(len(self)), held)


def last_of_episodes(values: Tensor, valid: Tensor, episode_start: Tensor) -> Tensor:
    """Return what stands at the last step of each episode, `[B, N, L, ...]`, of values `[B, N, T, ...]`.

    Args:
        values: a number or vector for each step.
        valid: `[B, N, T]`, bool.
        episode_start: `[B, N, T]`, bool.
    """
    ends = valid.clone()
    ends[..., :-1] &= ~valid[..., 1:] | episode_start[..., 1:]
    trial, rollout, step = ends.nonzero(as_tuple=True)
    episode = (episode_start.cumsum(-1) - 1).clamp_min(0)[trial, rollout, step]
    count = int(episode.max()) + 1 if len(episode) else 1
    last = values.new_zeros(*values.shape[:2], count, *values.shape[3:])
    last[trial, rollout, episode] = values[trial, rollout, step]
    return last


def _allocate_on_disk(file: int, size: int) -> None:
    """Reserve the blocks of a file: a map of one that the disk has no room for would end the process by SIGBUS."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that cannot
            raise


def join(parts: Sequence[Items]) -> Items:
    """Put trials of several reservoirs one below the other; shorter ones are padded with zeros."""
    joined: Items = {}
    for name in parts[0]:
        shape = [max(part[name].shape[axis] for part in parts) for axis in range(1, parts[0][name].ndim)]
        whole = parts[0][name].new_zeros(sum(len(part[name]) for part in parts), *shape)
        begin = 0
        for part in parts:
            value = part[name]
            whole[(slice(begin, begin + len(value)), *(slice(size) for size in value.shape[1:]))] = value
            begin += len(value)
        joined[name] = whole
    return joined
