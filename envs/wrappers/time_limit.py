"""Time limit: shorter episodes."""

from __future__ import annotations

from typing import Any, Literal

import gymnasium
from pydantic import Field

from metarl.settings import Settings


class TimeLimitConfig(Settings):
    """Episodes that are truncated after some steps, unless they end earlier."""

    name: Literal["time_limit"] = "time_limit"
    steps: int = Field(ge=1, description="steps after which an episode is truncated")


class TimeLimit(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Truncates episodes after some steps, unless they terminate in the last of them.

    Args:
        env: the environment.
        steps: of `env`, after which an episode is truncated.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], steps: int) -> None:
        super().__init__(env)
        self._steps, self._elapsed = steps, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        self._elapsed = 0
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._elapsed += 1
        ends = self._elapsed >= self._steps and not terminated
        return observation, reward, terminated, truncated or ends, info


def limited_horizon(config: TimeLimitConfig, horizon: int) -> int:
    """Return the number of steps in an episode whose environment has `horizon`."""
    return min(horizon, config.steps)
