"""Stability methods, one file each; any of them combine, for every agent.

A new one is one file, one member of `StabilityConfig` and one entry in `METHODS`. Must not import agents, environments
or training: it knows them by their Protocols.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
from pydantic import Field
from torch import Tensor

from metarl.protocols import ProtectedAgent, StabilityMethod
from metarl.settings import as_tuple
from metarl.stability import ewc, l2, mas
from metarl.stability.ewc import EwcConfig
from metarl.stability.l2 import L2Config
from metarl.stability.mas import MasConfig
from metarl.stability.mer import Mer, MerConfig
from metarl.stability.replay import Replay, ReplayConfig

StabilityConfig = Annotated[EwcConfig | ReplayConfig | L2Config | MasConfig | MerConfig, Field(discriminator="name")]
"""One member for each method, discriminated by `name`."""


def expand_names(value: object) -> object:
    """Replace the name of a stability method by its default settings."""
    value = as_tuple(value)
    if not isinstance(value, list | tuple):
        return value
    return [{"name": item} if isinstance(item, str) else item for item in value]


def stability_configs() -> dict[str, type[Any]]:
    """Return the config class of each method by its name."""
    return {config.model_fields["name"].default: config for config in get_args(get_args(StabilityConfig)[0])}


METHODS: dict[str, Callable[[Any, Path | None], StabilityMethod]] = {
    "ewc": lambda config, folder: ewc.method(config),
    "replay": Replay,
    "l2": lambda config, folder: l2.method(config),
    "mas": lambda config, folder: mas.method(config),
    "mer": Mer,
}
"""By name: (config, folder) → the method."""


def build(config: Any, folder: Path | None = None) -> StabilityMethod:
    """Return a fresh method.

    Args:
        config: a member of `StabilityConfig`.
        folder: for data that does not fit into memory.
    """
    return METHODS[config.name](config, folder)


class StabilityLoss:
    """The auxiliary loss of one update: the sum of the losses of all methods, and their values.

    Args:
        methods: one after another.
        agent: about to be updated.
        rng: of the iteration.
    """

    def __init__(self, methods: Sequence[StabilityMethod], agent: ProtectedAgent, rng: np.random.Generator) -> None:
        self._methods, self._agent = methods, agent
        self._rngs = rng.spawn(len(methods))
        self._drawn = [own.bit_generator.state for own in self._rngs]
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def __call__(self, fraction: float, again: bool = False) -> Tensor | None:
        """See `metarl.protocols.AuxiliaryLoss`."""
        total: Tensor | None = None
        if again:
            for own, state in zip(self._rngs, self._drawn, strict=True):
                own.bit_generator.state = state
        self._drawn = [own.bit_generator.state for own in self._rngs]
        for method, rng in zip(self._methods, self._rngs, strict=True):
            for name, value in method.loss(self._agent, rng, fraction).items():
                if name == "loss":
                    total = value if total is None else total + value
                key, seen = f"stability/{method.name}/{name}", value.detach()
                self._sums[key] = self._sums[key] + seen if key in self._sums else seen
                self._counts[key] = self._counts.get(key, 0) + 1
        return total

    def metrics(self) -> dict[str, float]:
        """Return the mean of each loss, and of what was measured with it, over the steps of the update."""
        return {name: float(value) / self._counts[name] for name, value in self._sums.items()}


def state_dict(methods: Sequence[StabilityMethod]) -> dict[str, Tensor]:
    """Return the state of all methods, flat."""
    return {
        f"{number}.{method.name}:{key}": value.detach().cpu().contiguous()
        for number, method in enumerate(methods)
        for key, value in method.state_dict().items()
    }


def load_state_dict(methods: Sequence[StabilityMethod], state: Mapping[str, Tensor]) -> None:
    """Restore what `state_dict` returned; raises ValueError naming the method and the entry that does not fit."""
    for number, method in enumerate(methods):
        prefix = f"{number}.{method.name}:"
        try:
            method.load_state_dict(
                {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            )
        except ValueError as error:
            raise ValueError(f"{method.name}: {error}") from error
