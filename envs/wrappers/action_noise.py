"""Actuator noise: white Gaussian noise on every entry of an action."""

from __future__ import annotations

from typing import Any, Literal

import gymnasium
import numpy as np
from pydantic import Field

from metarl.envs.wrappers.random_stream import episode_rng
from metarl.envs.wrappers.requirements import require_bounded_box
from metarl.settings import Settings


class ActionNoiseConfig(Settings):
    """White Gaussian noise on every entry of an action; the sum is clipped to the action space."""

    name: Literal["action_noise"] = "action_noise"
    std: float = Field(ge=0, description="standard deviation, as a fraction of half the range of the action")


class ActionNoise(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Adds white Gaussian noise to every entry of an action and clips the sum to the action space.

    The noise of an episode is a function of the seed of its reset.

    Args:
        env: the environment; its actions are a Box of floats with finite bounds.
        std: standard deviation, as a fraction of half the range (high − low) of each entry.
        position: index in the list of wrappers; another one gives other noise.

    Raises:
        UserError: the action space is another one.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], std: float, position: int = 0) -> None:
        super().__init__(env)
        self._low, self._high = require_bounded_box(env.action_space, "action_noise")
        self._std = std * (self._high.astype(np.float64) - self._low.astype(np.float64)) / 2
        self._position = position
        self._rng: np.random.Generator | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; without a seed the noise goes on in its stream."""
        if seed is not None or self._rng is None:
            self._rng = episode_rng(seed, "action_noise", self._position)
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step with a noisy action."""
        assert self._rng is not None, "reset comes first"
        noisy = np.asarray(action, np.float64) + self._std * self._rng.standard_normal(self._std.shape)
        return self.env.step(np.clip(noisy.astype(self._low.dtype), self._low, self._high))
