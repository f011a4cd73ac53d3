"""Recurrent memories: GRU and LSTM, as `Memory`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metarl.nn.memory import State


def _hold(active: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if active is None else torch.where(active[:, None], new, old)


def init_orthogonal(module: nn.Module, gain: float, generator: torch.Generator) -> None:
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
        init_orthogonal(self._cell, 1.0, generator)

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
        init_orthogonal(self._cell, 1.0, generator)
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
