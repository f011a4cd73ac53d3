"""The hidden state of a memory: recurrent states and the KV cache of attention; and the Protocol of memories.

A `Memory` reads a sequence at once (`scan`, for learning) or step by step (`step`, for acting); both are the same
function. Its hidden state is a `State` that the caller owns: reading returns a new one and leaves the old as it was.

Shapes: B sequences, T steps, I inputs, H outputs, D width, S entries of a history.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class History:
    """A KV cache: keys and values of earlier steps, the oldest first.

    Appending writes behind the entries, into memory that histories share, unless another one has been there before; so
    that a step costs no copy, and earlier histories stay as they were.

    Attributes:
        keys: `[B, S, D]`.
        values: `[B, S, D]`.
        lengths: `[B]`, integers: how many entries of each row count.
        context: how many of the last ones are read.
        newest: the lengths that were last appended to in this memory.
        longest: no row is longer.
        fixed: whether it keeps its size, `context`, so that a new entry drops the oldest: what a graph without growing
            memory can carry from step to step.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    context: int
    longest: int = 0
    newest: list[Tensor] = field(default_factory=list)
    fixed: bool = False

    @staticmethod
    def empty(batch: int, width: int, context: int, like: Tensor) -> History:
        """Return one without entries, in the device and dtype of `like`."""
        nothing = like.new_zeros(batch, 0, width)
        return History(nothing, nothing, torch.zeros(batch, dtype=torch.long, device=like.device), context)

    def append(self, keys: Tensor, values: Tensor, active: Tensor | None) -> History:
        """Return the history with one more entry, `[B, D]`, in the rows that are active (`[B]`, bool; None: all)."""
        if self.fixed:
            assert active is None, "a history of fixed size is for one step of all rows"
            return self._shift_in(keys, values)
        room = self.longest < self.keys.shape[1]
        history = self if room and self.newest and self.newest[0] is self.lengths else self.window().with_room()
        rows = torch.arange(len(keys), device=keys.device)
        history.keys[rows, history.lengths], history.values[rows, history.lengths] = keys, values
        lengths = history.lengths + (1 if active is None else active.long())
        history.newest[:] = [lengths]
        return History(history.keys, history.values, lengths, self.context, history.longest + 1, history.newest)

    def _shift_in(self, keys: Tensor, values: Tensor) -> History:
        """Return a history of the same size with one more entry `[B, D]`."""
        full = (self.lengths == self.context)[:, None, None]
        place = self.lengths.clamp_max(self.context - 1)[:, None]
        here = (torch.arange(self.context, device=keys.device) == place)[..., None]
        keys, values = (
            torch.where(here, new[:, None], torch.where(full, old.roll(-1, 1), old))
            for old, new in ((self.keys, keys), (self.values, values))
        )
        return History(keys, values, (self.lengths + 1).clamp_max(self.context), self.context, self.context, fixed=True)

    def extend(self, keys: Tensor, values: Tensor) -> History:
        """Return the history with T more entries `[B, T, D]`, of which the context is kept."""
        steps = torch.arange(keys.shape[1], device=keys.device)
        where = (self.lengths[:, None] + steps)[..., None].expand_as(keys)
        room = (0, 0, 0, keys.shape[1])
        keys, values = (
            F.pad(old, room).scatter(1, where, new) for old, new in ((self.keys, keys), (self.values, values))
        )
        return History(keys, values, self.lengths + len(steps), self.context, self.longest + len(steps)).window()

    def window(self) -> History:
        """Return a history of the last `context` entries, in memory of its own."""
        count = min(self.longest, self.context)
        first = (self.lengths - count).clamp_min(0)
        where = (first[:, None] + torch.arange(count, device=first.device))[..., None].expand(-1, -1, self.width)
        keys, values = self.keys.gather(1, where), self.values.gather(1, where)
        return History(keys, values, self.lengths - first, self.context, count)

    def with_room(self) -> History:
        """Return a history with room to append to: as much again as it holds, at least 16 entries."""
        room = (0, 0, 0, max(16, self.longest))
        keys, values = F.pad(self.keys, room), F.pad(self.values, room)
        return History(keys, values, self.lengths, self.context, self.longest, [self.lengths])

    @property
    def width(self) -> int:
        """D."""
        return self.keys.shape[-1]

    def rows(self, index: Tensor) -> History:
        """Return the history of some rows, in memory of its own."""
        return History(self.keys[index], self.values[index], self.lengths[index], self.context, self.longest)

    @staticmethod
    def join(parts: Sequence[History]) -> History:
        """Put the rows of several histories one below the other."""
        size = max(part.longest for part in parts)
        keys, values = (
            torch.cat(
                [F.pad(getattr(part, name)[:, :size], (0, 0, 0, max(0, size - part.keys.shape[1]))) for part in parts]
            )
            for name in ("keys", "values")
        )
        return History(keys, values, torch.cat([part.lengths for part in parts]), parts[0].context, size)


State: TypeAlias = tuple[Tensor | History, ...]
"""What a memory holds of B sequences: hidden states `[B, H]` and histories."""


def rows(state: State, index: Tensor) -> State:
    """Return the state of some sequences, in the order of `index` `[B']`; one may be named several times."""
    return tuple(part.rows(index) if isinstance(part, History) else part[index] for part in state)


def join(states: Sequence[State]) -> State:
    """Return one state of all sequences of several states."""
    parts = zip(*states, strict=True)
    return tuple(History.join(part) if isinstance(part[0], History) else torch.cat(part) for part in parts)


def pack(state: State) -> Tensor:
    """Return all that a state holds as one float tensor `[B, S]`; histories take the room of their whole context."""
    parts = []
    for part in state:
        if isinstance(part, History):
            history = part if part.fixed else part.window()
            room = (0, 0, 0, part.context - history.longest)
            parts += [F.pad(kept, room).flatten(1) for kept in (history.keys, history.values)]
            parts.append(history.lengths.to(history.keys.dtype)[:, None])
        else:
            parts.append(part)
    return torch.cat(parts, -1)


def unpack(packed: Tensor, like: State, fixed: bool = False) -> State:
    """Return the state that was packed.

    Args:
        packed: `[B, S]`.
        like: a state of the same memory, of any number of sequences.
        fixed: whether histories keep their size; see `History`.
    """
    parts: list[Tensor | History] = []
    begin = 0

    def take(size: int) -> Tensor:
        nonlocal begin
        begin += size
        return packed[:, begin - size : begin]

    for part in like:
        if isinstance(part, History):
            keys, values = (take(part.context * part.width).view(-1, part.context, part.width) for _ in range(2))
            lengths = take(1)[:, 0].long()
            parts.append(History(keys, values, lengths, part.context, part.context, fixed=fixed))
        else:
            parts.append(take(part.shape[-1]))
    return tuple(parts)


class Memory(Protocol):
    """A network that reads a sequence and keeps a hidden state."""

    output_size: int

    def initial(self, batch: int) -> State:
        """The state of `batch` sequences that have not begun."""

    def step(self, inputs: Tensor, state: State, active: Tensor | None = None) -> tuple[Tensor, State]:
        """Read one step `[B, I]` where `active` `[B]` (None: everywhere); returns `[B, H]` and the next state."""

    def scan(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """Read T steps `[B, T, I]`; returns `[B, T, H]` and the state after them. No gradient reaches `state`."""
