"""Memories that attend: a causal transformer with a KV cache, and a GRU that reads an episodic memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metarl.nn.memory import History, State
from metarl.nn.recurrent import Gru, init_orthogonal

_BLOCK = 256
"""Queries answered at once, so that attention scores do not take memory in the square of T."""


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
            init_orthogonal(part, 1.0, generator)
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
            init_orthogonal(module, gain, generator)

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

    Positions enter by distance alone (ALiBi), so that a trial may be longer than in training. A chunk of
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
        init_orthogonal(self._embed, 1.0, generator)
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
    """A GRU with an episodic memory of facts: each step is stored, and read by content.

    The fact of a step is the memory's input (observation, last action and reward); key and value are linear in it. The
    GRU makes the query; the answer goes to the policy next to the GRU's state. As Ritter et al.
    2018 ("Been There, Done That"), but read by attention over all facts of the trial instead of by nearest neighbour.

    Args:
        input_size: I.
        size: of the GRU, and of what is read; H is twice that.
        heads: queries at once.
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
