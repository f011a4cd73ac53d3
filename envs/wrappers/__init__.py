"""Environment wrappers, one file each: any of them combine, for every task family.

This file is their registry: a new wrapper is one file, one member of `WrapperConfig` and one entry of `WRAPPERS`. A
wrapper is a `gymnasium.Wrapper` whose arguments are the settings of its config. It raises UserError for spaces that it
cannot wrap, and its randomness is a function of the seed of the reset (`random_stream`).

`metarl.envs.wrapped` stores wrappers in tasks. Imports numpy and gymnasium; of metarl `settings`, `spaces`, `errors`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import gymnasium
from pydantic import BaseModel, Field, TypeAdapter

from metarl.envs.wrappers.action_delay import ActionDelay, ActionDelayConfig
from metarl.envs.wrappers.action_noise import ActionNoise, ActionNoiseConfig
from metarl.envs.wrappers.action_repeat import ActionRepeat, ActionRepeatConfig, repeated_horizon
from metarl.envs.wrappers.frame_stack import FrameStack, FrameStackConfig
from metarl.envs.wrappers.hide_entries import HideEntries, HideEntriesConfig
from metarl.envs.wrappers.observation_noise import ObservationNoise, ObservationNoiseConfig
from metarl.envs.wrappers.reward_scale import RewardScale, RewardScaleConfig
from metarl.envs.wrappers.time_limit import TimeLimit, TimeLimitConfig, limited_horizon
from metarl.errors import unknown_name

WrapperConfig = Annotated[
    FrameStackConfig
    | ObservationNoiseConfig
    | ActionNoiseConfig
    | ActionDelayConfig
    | ActionRepeatConfig
    | HideEntriesConfig
    | RewardScaleConfig
    | TimeLimitConfig,
    Field(discriminator="name"),
]
"""Settings of one wrapper, distinguished by the field `name`."""


def _unchanged(config: Any, horizon: int) -> int:
    return horizon


class Entry(NamedTuple):
    """A wrapper, as the rest of metarl uses it.

    Attributes:
        config: its settings.
        wrapper: builds it, given the environment and its settings as keyword arguments.
        horizon: returns the number of steps of an episode, given the settings and that of the environment.
        is_random: whether it draws random numbers, and takes its `position` in the list of wrappers.
    """

    config: type[BaseModel]
    wrapper: Callable[..., gymnasium.Env[Any, Any]]
    horizon: Callable[[Any, int], int] = _unchanged
    is_random: bool = False


WRAPPERS: Mapping[str, Entry] = {
    "frame_stack": Entry(FrameStackConfig, FrameStack),
    "observation_noise": Entry(ObservationNoiseConfig, ObservationNoise, is_random=True),
    "action_noise": Entry(ActionNoiseConfig, ActionNoise, is_random=True),
    "action_delay": Entry(ActionDelayConfig, ActionDelay),
    "action_repeat": Entry(ActionRepeatConfig, ActionRepeat, repeated_horizon),
    "hide_entries": Entry(HideEntriesConfig, HideEntries),
    "reward_scale": Entry(RewardScaleConfig, RewardScale),
    "time_limit": Entry(TimeLimitConfig, TimeLimit, limited_horizon),
}
"""The wrappers by name."""

WRAPPER_LIST: TypeAdapter[tuple[Any, ...]] = TypeAdapter(tuple[WrapperConfig, ...])
"""Validates a list of wrappers and writes it as JSON."""


def parse_wrappers(wrappers: Iterable[Mapping[str, Any] | BaseModel]) -> tuple[Any, ...]:
    """Return the configs of wrappers, given as such or as mappings, e.g. `{"name": "frame_stack", "frames": 4}`.

    Raises:
        ValueError: an unknown wrapper (the message names the nearest) or setting; pydantic's ValidationError is one.
    """
    wrappers = list(wrappers)
    for each in wrappers:
        name = each.get("name") if isinstance(each, Mapping) else None
        if isinstance(name, str) and name not in WRAPPERS:
            raise unknown_name("wrapper", name, WRAPPERS, "metarl list wrappers")
    return WRAPPER_LIST.validate_python(wrappers)


def wrap(env: gymnasium.Env[Any, Any], wrappers: Sequence[Any]) -> gymnasium.Env[Any, Any]:
    """Return an environment in wrappers.

    Args:
        env: the environment.
        wrappers: members of `WrapperConfig`, from the innermost to the outermost: observations and rewards pass through
            the list in this order, actions in the opposite one.

    Raises:
        UserError: a wrapper does not support the spaces.
    """
    for position, config in enumerate(wrappers):
        entry = WRAPPERS[config.name]
        settings = config.model_dump(exclude={"name"})
        if entry.is_random:
            settings["position"] = position
        env = entry.wrapper(env, **settings)
    return env


def wrapped_horizon(horizon: int, wrappers: Sequence[Any]) -> int:
    """Return the number of steps of an episode in wrappers, given that of the environment."""
    for config in wrappers:
        horizon = WRAPPERS[config.name].horizon(config, horizon)
    return horizon


def describe_wrappers(wrappers: Sequence[Any]) -> str:
    """Return wrappers in words, e.g. `action_repeat times 2, frame_stack frames 4`."""
    parts = []
    for config in wrappers:
        settings = config.model_dump(exclude={"name"})
        values = {
            key: " ".join(map(str, value)) if isinstance(value, tuple) else value for key, value in settings.items()
        }
        parts.append(" ".join([config.name, *(f"{key} {value}" for key, value in values.items())]))
    return ", ".join(parts)
