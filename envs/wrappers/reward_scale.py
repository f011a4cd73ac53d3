"""Reward scaling: rewards in other units."""

from __future__ import annotations

from typing import Any, Literal

import gymnasium
from pydantic import Field

from metarl.settings import Settings


class RewardScaleConfig(Settings):
    """Rewards multiplied by a factor, and with them all returns that are reported."""

    name: Literal["reward_scale"] = "reward_scale"
    factor: float = Field(gt=0, description="what each reward is multiplied by")


class RewardScale(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Multiplies rewards by a factor.

    Args:
        env: the environment.
        factor: what each reward is multiplied by.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], factor: float) -> None:
        super().__init__(env)
        self._factor = factor

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, self._factor * float(reward), terminated, truncated, info
