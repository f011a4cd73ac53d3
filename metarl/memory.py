"""Memories of an agent that adapts by remembering: GRU, LSTM, a causal transformer, and facts read by attention.

A `Memory` reads a sequence at once (`scan`, to learn from) or one step after another (`step`, to act); both are the
same function. What it remembers is a `State` that the caller owns: reading returns another one and leaves it as it was.

Shapes: B sequences, T steps, I inputs, H outputs, D width, S entries of a history.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class History:
    """Keys and values of earlier steps, the oldest first: what attention reads.

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
    """What reads a sequence and remembers it."""

    output_size: int

    def initial(self, batch: int) -> State:
        """The state of `batch` sequences that have not begun."""

    def step(self, inputs: Tensor, state: State, active: Tensor | None = None) -> tuple[Tensor, State]:
        """Read one step `[B, I]` where `active` `[B]` (None: everywhere); returns `[B, H]` and the next state."""

    def scan(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """Read T steps `[B, T, I]`; returns `[B, T, H]` and the state after them. No gradient reaches `state`."""


def _hold(active: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if active is None else torch.where(active[:, None], new, old)


def _orthogonal(module: nn.Module, gain: float, generator: torch.Generator) -> None:
    """Draw weights, those between hidden units gate by gate, and set biases to 0."""
    with torch.no_grad():
        for name, value in module.named_parameters():
            if value.ndim == 1:
                value.zero_()
                continue
            size = value.shape[0] if "_hh_" not in name else value.shape[1]
            for block in value.split(size):  # type: ignore[no-untyped-call]
                nn.init.orthogonal_(block, gain, generator=generator)


class Gru(nn.Module):
    """Gated recurrent units (Cho et al. 2014), the memory of RL² (Duan et al. 2016).

    Args:
        input_size: I.
        size: H.
        generator: draws the initial weights, orthogonal.
    """

    def __init__(self, input_size: int, size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.output_size = size
        self._cell = nn.GRU(input_size, size, batch_first=True)
        _orthogonal(self._cell, 1.0, generator)

    def initial(self, batch: int) -> State:
        """See `Memory.initial`."""
        return (self._cell.all_weights[0][1].new_zeros(batch, self.output_size),)

    def step(self, inputs: Tensor, state: State, active: Tensor | None = None) -> tuple[Tensor, State]:
        """See `Memory.step`."""
        (before,) = state
        assert isinstance(before, Tensor)
        hidden = torch.gru_cell(inputs, before, *self._cell.all_weights[0])
        return hidden, (_hold(active, hidden, before),)

    def scan(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Memory.scan`."""
        (before,) = state
        assert isinstance(before, Tensor)
        outputs, last = self._cell(inputs, before.detach()[None])
        return outputs, (last[0],)


class Lstm(nn.Module):
    """Long short-term memory (Hochreiter and Schmidhuber 1997); forget gates are open at first (Gers et al. 2000).

    Args:
        input_size: I.
        size: H.
        generator: draws the initial weights, orthogonal.
    """

    def __init__(self, input_size: int, size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.output_size = size
        self._cell = nn.LSTM(input_size, size, batch_first=True)
        _orthogonal(self._cell, 1.0, generator)
        with torch.no_grad():
            self._cell.all_weights[0][2][size : 2 * size] = 1.0

    def initial(self, batch: int) -> State:
        """See `Memory.initial`."""
        nothing = self._cell.all_weights[0][1].new_zeros(batch, self.output_size)
        return nothing, nothing

    def step(self, inputs: Tensor, state: State, active: Tensor | None = None) -> tuple[Tensor, State]:
        """See `Memory.step`."""
        before = [part for part in state if isinstance(part, Tensor)]
        after = torch.lstm_cell(inputs, before, *self._cell.all_weights[0])
        return after[0], tuple(_hold(active, new, old) for new, old in zip(after, before, strict=True))

    def scan(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Memory.scan`."""
        before = tuple(part.detach()[None] for part in state if isinstance(part, Tensor))
        outputs, after = self._cell(inputs, before)
        return outputs, tuple(part[0] for part in after)


_BLOCK = 256
"""Questions answered at once: what attention needs beside the steps themselves does not grow with the square of T."""


class _Attention(nn.Module):
    """Attention of every step to itself and the `context` − 1 before it, several heads.

    Args:
        query_size: of what asks.
        input_size: of what is remembered.
        width: D, of keys, values and the output; a multiple of `heads`.
        heads: how many.
        context: steps that a step attends to.
        recency: whether nearer steps weigh more: ALiBi (Press et al. 2022), −2^(−8h/heads) · distance in head h.
        generator: draws the initial weights, orthogonal.
    """

    def __init__(
        self,
        query_size: int,
        input_size: int,
        width: int,
        heads: int,
        context: int,
        recency: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.width, self.heads, self.context = width, heads, context
        self._query = nn.Linear(query_size, width, bias=False)
        self._key_value = nn.Linear(input_size, 2 * width, bias=False)
        for part in (self._query, self._key_value):
            _orthogonal(part, 1.0, generator)
        slopes = [2.0 ** (-8.0 * (head + 1) / heads) if recency else 0.0 for head in range(heads)]
        self._slopes: Tensor
        self.register_buffer("_slopes", torch.tensor(slopes)[:, None, None], persistent=False)

    def initial(self, batch: int) -> History:
        return History.empty(batch, self.width, self.context, self._query.weight)

    def step(self, asking: Tensor, inputs: Tensor, history: History, active: Tensor | None) -> tuple[Tensor, History]:
        """`[B, query_size]` and `[B, input_size]` → `[B, D]`; the step itself is remembered first."""
        keys, values = self._key_value(inputs).chunk(2, -1)
        history = history.append(keys, values, active)
        where = torch.arange(history.longest, device=asking.device)
        last = history.lengths if active is None else history.lengths + (~active).long()
        distance = (last[:, None] - 1 - where)[:, None]
        keys, values = history.keys[:, : history.longest], history.values[:, : history.longest]
        return self._attend(asking[:, None], keys, values, distance)[:, 0], history

    def scan(self, asking: Tensor, inputs: Tensor, history: History) -> tuple[Tensor, History]:
        """`[B, T, query_size]` and `[B, T, input_size]` → `[B, T, D]`."""
        keys, values = self._key_value(inputs).chunk(2, -1)
        earlier, steps = history.window(), inputs.shape[1]
        time = torch.arange(steps, device=inputs.device)
        behind = earlier.lengths[:, None, None] - torch.arange(earlier.longest, device=inputs.device)
        answers = []
        for begin in range(0, steps, _BLOCK):
            asked, first = slice(begin, begin + _BLOCK), max(0, begin - self.context + 1)
            now, new = time[asked, None], slice(first, begin + _BLOCK)
            since = torch.where(behind > 0, behind + now, -1)  # beyond its length a row holds nothing
            distance = torch.cat([since, (now - time[new]).expand(len(inputs), -1, -1)], -1)
            seen = [
                torch.cat([old.detach(), part[:, new]], 1)
                for old, part in ((earlier.keys, keys), (earlier.values, values))
            ]
            answers.append(self._attend(asking[:, asked], seen[0], seen[1], distance))
        return torch.cat(answers, 1), earlier.extend(keys.detach(), values.detach())

    def _attend(self, asking: Tensor, keys: Tensor, values: Tensor, distance: Tensor) -> Tensor:
        """Queries of `[B, T, ...]` read S keys and values `[B, S, D]` at distances `[B, T, S]`; < 0 are not read."""
        hidden = (distance < 0) | (distance >= self.context)
        bias = (-self._slopes * distance[:, None]).masked_fill(hidden[:, None], -math.inf)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self._query(asking), keys, values)
        )
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)


class _Block(nn.Module):
    """One layer of a transformer, normalised first; at first it hardly changes what goes through (Parisotto 2020)."""

    def __init__(self, width: int, heads: int, context: int, generator: torch.Generator) -> None:
        super().__init__()
        self.attention = _Attention(width, width, width, heads, context, True, generator)
        self._norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self._out = nn.Linear(width, width)
        self._up, self._down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for module, gain in ((self._out, 0.1), (self._up, math.sqrt(2.0)), (self._down, 0.1)):
            _orthogonal(module, gain, generator)

    def forward(
        self, inputs: Tensor, history: History, one_step: bool, active: Tensor | None = None
    ) -> tuple[Tensor, History]:
        normed = self._norms[0](inputs)
        if one_step:
            read, history = self.attention.step(normed, normed, history, active)
        else:
            read, history = self.attention.scan(normed, normed, history)
        hidden = inputs + self._out(read)
        return hidden + self._down(F.relu(self._up(self._norms[1](hidden)))), history


class Transformer(nn.Module):
    """A causal transformer over the last `context` steps, with the keys and values of acting kept (a cache).

    Positions are told by distance alone (ALiBi), so that a trial may be longer than what was trained on. A chunk of
    back-propagation attends to the steps before it, without gradient (Dai et al. 2019, "Transformer-XL").

    Args:
        input_size: I.
        size: H, the width of the layers.
        layers: how many.
        heads: attention heads of each layer.
        context: steps that a layer attends to.
        generator: draws the initial weights.
    """

    def __init__(
        self, input_size: int, size: int, layers: int, heads: int, context: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.output_size = size
        self._embed = nn.Linear(input_size, size)
        _orthogonal(self._embed, 1.0, generator)
        self._blocks = nn.ModuleList([_Block(size, heads, context, generator) for _ in range(layers)])
        self._norm = nn.LayerNorm(size)

    def initial(self, batch: int) -> State:
        """See `Memory.initial`."""
        return tuple(block.attention.initial(batch) for block in self._blocks)  # type: ignore[operator, union-attr]

    def step(self, inputs: Tensor, state: State, active: Tensor | None = None) -> tuple[Tensor, State]:
        """See `Memory.step`."""
        return self._through(inputs, state, True, active)

    def scan(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Memory.scan`."""
        return self._through(inputs, state, False, None)

    def _through(self, inputs: Tensor, state: State, one_step: bool, active: Tensor | None) -> tuple[Tensor, State]:
        hidden, after = self._embed(inputs), []
        for block, history in zip(self._blocks, state, strict=True):
            hidden, history = block(hidden, history, one_step, active)
            after.append(history)
        return self._norm(hidden), tuple(after)


class Episodic(nn.Module):
    """A GRU with an episodic memory of facts beside it: each step is written down, and read by content.

    The fact of a step is what was told before it (observation, last action and reward), as the memory's input holds it;
    key and value are linear in it. The GRU asks; the answer goes to the policy beside the GRU's state. As Ritter et al.
    2018 ("Been There, Done That"), but read by attention over all facts of the trial instead of by nearest neighbour.

    Args:
        input_size: I.
        size: of the GRU, and of what is read; H is twice that.
        heads: questions asked at once.
        context: facts that are kept, the newest.
        generator: draws the initial weights.
    """

    def __init__(self, input_size: int, size: int, heads: int, context: int, generator: torch.Generator) -> None:
        super().__init__()
        self.output_size = 2 * size
        self._gru = Gru(input_size, size, generator)
        self._facts = _Attention(size, input_size, size, heads, context, False, generator)

    def initial(self, batch: int) -> State:
        """See `Memory.initial`."""
        return (*self._gru.initial(batch), self._facts.initial(batch))

    def step(self, inputs: Tensor, state: State, active: Tensor | None = None) -> tuple[Tensor, State]:
        """See `Memory.step`."""
        *recurrent, facts = state
        assert isinstance(facts, History)
        hidden, after = self._gru.step(inputs, tuple(recurrent), active)
        read, facts = self._facts.step(hidden, inputs, facts, active)
        return torch.cat([hidden, read], -1), (*after, facts)

    def scan(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Memory.scan`."""
        *recurrent, facts = state
        assert isinstance(facts, History)
        hidden, after = self._gru.scan(inputs, tuple(recurrent))
        read, facts = self._facts.scan(hidden, inputs, facts)
        return torch.cat([hidden, read], -1), (*after, facts)
