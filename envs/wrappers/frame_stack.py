"""Frame stacking: an observation consists of the last k ones."""

from __future__ import annotations

from collections import deque
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray
from pydantic import Field

from metarl.envs.wrappers.requirements import is_image, space_name
from metarl.errors import UserError
from metarl.settings import Settings
from metarl.spaces import env_attribute


class FrameStackConfig(Settings):
    """The last observations, concatenated along the last axis, oldest first."""

    name: Literal["frame_stack"] = "frame_stack"
    frames: int = Field(ge=1, le=1000, description="number of observations, with the current one")


class FrameStack(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Concatenates the last k observations along the last axis, oldest first.

    Vectors `[O]` become `[k · O]`; images `[H, W, C]` of uint8 become `[H, W, k · C]`. The first observation of an
    episode fills all k places.

    Args:
        env: the environment.
        frames: k.

    Attributes:
        observation_names: if the environment has them: `name_t-2`, `name_t-1`, and `name` for the current observation.

    Raises:
        UserError: observations are neither vectors nor images.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], frames: int) -> None:
        super().__init__(env)
        space = env.observation_space
        if not isinstance(space, Box) or not (len(space.shape) == 1 or is_image(space)):
            raise UserError(
                f"frame_stack: observation space is {space_name(space)}; expected a vector [O], or an image [H, W, C] "
                "of uint8"
            )
        low, high = (np.concatenate([bound] * frames, axis=-1) for bound in (space.low, space.high))
        dtype: Any = space.dtype
        self.observation_space = Box(low, high, dtype=dtype)
        if (names := env_attribute(env, "observation_names")) is not None:
            past = [f"{name}_t-{age}" for age in range(frames - 1, 0, -1) for name in names]
            self.observation_names = (*past, *names)
        self._frames: deque[NDArray[Any]] = deque(maxlen=frames)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        for _ in range(self._frames.maxlen or 0):
            self._frames.append(np.array(observation))
        return np.concatenate(self._frames, axis=-1), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step; the oldest observation is dropped."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._frames.append(np.array(observation))
        return np.concatenate(self._frames, axis=-1), reward, terminated, truncated, info
