"""Sensor noise: white Gaussian noise on every entry of an observation."""

from __future__ import annotations

from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray
from pydantic import Field

from metarl.envs.wrappers.random_stream import episode_rng
from metarl.envs.wrappers.requirements import space_name
from metarl.errors import UserError
from metarl.settings import Settings


class ObservationNoiseConfig(Settings):
    """White Gaussian noise on every entry of an observation."""

    name: Literal["observation_noise"] = "observation_noise"
    std: float = Field(ge=0, description="standard deviation, in units of the observation")


class ObservationNoise(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Adds white Gaussian noise to every entry of an observation, also to the first of an episode.

    The observation space has no bounds, since noise may lead out of them. The noise of an episode is a function of the
    seed of its reset.

    Args:
        env: the environment; its observations are a Box of floats.
        std: standard deviation, in units of the observation.
        position: index in the list of wrappers; another one gives other noise.

    Raises:
        UserError: observations are no Box of floats.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], std: float, position: int = 0) -> None:
        super().__init__(env)
        space = env.observation_space
        if not isinstance(space, Box) or space.dtype is None or space.dtype.kind != "f":
            raise UserError(f"observation_noise: observation space is {space_name(space)}; expected a Box of floats")
        self._std, self._position = std, position
        self._dtype: Any = space.dtype
        self._rng: np.random.Generator | None = None
        self.observation_space = Box(-np.inf, np.inf, space.shape, dtype=self._dtype)

    def _add_noise(self, observation: NDArray[Any]) -> NDArray[Any]:
        assert self._rng is not None, "reset comes first"
        noise = self._std * self._rng.standard_normal(observation.shape)
        noisy: NDArray[Any] = (observation + noise).astype(self._dtype)
        return noisy

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; without a seed the noise goes on in its stream."""
        observation, info = self.env.reset(seed=seed, options=options)
        if seed is not None or self._rng is None:
            self._rng = episode_rng(seed, "observation_noise", self._position)
        return self._add_noise(observation), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._add_noise(observation), reward, terminated, truncated, info
