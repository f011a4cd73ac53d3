"""Partial observability: entries of an observation that the agent does not see."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict
from pydantic import BeforeValidator, Field

from metarl.envs.wrappers.requirements import space_name
from metarl.errors import UserError
from metarl.settings import Settings, as_tuple
from metarl.spaces import env_attribute


class HideEntriesConfig(Settings):
    """Entries of an observation that the agent does not see."""

    name: Literal["hide_entries"] = "hide_entries"
    names: Annotated[tuple[int | str, ...], BeforeValidator(as_tuple)] = Field(
        min_length=1,
        description="keys of a dictionary, e.g. desired_goal; or names or indices, from 0, of the entries of a vector",
    )


class HideEntries(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Removes entries from observations: keys of a dictionary, or entries of a vector `[O]`.

    Args:
        env: the environment.
        names: keys of a Dict; or, of a Box `[O]`, names among the `observation_names` of the environment, or indices.

    Attributes:
        observation_names: if the environment has them, those of the entries that are left.

    Raises:
        UserError: there is no such entry, none would be left, or observations are neither a Dict nor a vector.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], names: Sequence[int | str]) -> None:
        super().__init__(env)
        space = env.observation_space
        self._kept: Any
        if isinstance(space, Dict):
            hidden = {_find(name, list(space.spaces)) for name in names}
            self._kept = [key for i, key in enumerate(space.spaces) if i not in hidden]
            self.observation_space = Dict([(key, space.spaces[key]) for key in self._kept])
        elif isinstance(space, Box) and len(space.shape) == 1:
            listed = env_attribute(env, "observation_names")
            if listed is not None and len(listed) != space.shape[0]:
                raise UserError(
                    f"hide_entries: the environment names {len(listed)} entries of its observations, which have "
                    f"{space.shape[0]}"
                )
            hidden = {_find(name, listed, space.shape[0]) for name in names}
            self._kept = np.array([i for i in range(space.shape[0]) if i not in hidden], np.intp)
            dtype: Any = space.dtype
            if len(self._kept):
                self.observation_space = Box(space.low[self._kept], space.high[self._kept], dtype=dtype)
            if listed is not None:
                self.observation_names = tuple(listed[i] for i in self._kept)
        else:
            raise UserError(f"hide_entries: observation space is {space_name(space)}; expected a Dict or a vector [O]")
        if len(self._kept) == 0:
            raise UserError("hide_entries: names hides every entry of the observation; leave at least one")
        self._of_dict = isinstance(space, Dict)

    def _hide(self, observation: Any) -> Any:
        return {key: observation[key] for key in self._kept} if self._of_dict else observation[self._kept]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self._hide(observation), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._hide(observation), reward, terminated, truncated, info


def _find(name: int | str, known: Sequence[str] | None, size: int = 0) -> int:
    """Return the index of an entry; raises UserError.

    Args:
        name: or index.
        known: the names of all entries; None if they have none.
        size: of a vector; 0 for a dictionary, whose keys have no index.
    """
    if isinstance(name, int):
        if 0 <= name < size:
            return name
        expected = f"0 to {size - 1}" if size else f"one of {', '.join(known or ())}"
        raise UserError(f"hide_entries: there is no entry {name}; expected {expected}")
    if known is None:
        raise UserError(f"hide_entries: the environment does not name its entries; give the index of {name!r}")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
        expected = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
        raise UserError(f"hide_entries: there is no entry {name!r}; {expected}")
    return list(known).index(name)
