"""Action repeat: the agent acts at a lower rate than the environment steps."""

from __future__ import annotations

import math
from typing import Any, Literal

import gymnasium
import numpy as np
from pydantic import Field

from metarl.settings import Settings
from metarl.spaces import env_attribute


class ActionRepeatConfig(Settings):
    """Each action repeated for several steps, whose rewards are summed; stops early where the episode ends."""

    name: Literal["action_repeat"] = "action_repeat"
    times: int = Field(ge=1, le=10_000, description="steps of the environment for each action")


class ActionRepeat(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Repeats each action and sums the rewards; stops early where the episode ends.

    A step is a success if any of its repetitions is.

    Args:
        env: the environment.
        times: steps of `env` for each action.

    Attributes:
        dt: if the environment has it, the time between two actions in s.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], times: int) -> None:
        super().__init__(env)
        self._times = times
        dt, fps = env_attribute(env, "dt"), env.metadata.get("render_fps")
        if dt is not None:
            self.dt = times * dt
        if fps is not None:
            self.metadata = {**env.metadata, "render_fps": fps / times}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step with the same action up to `times` times."""
        total, successes = 0.0, []
        for _ in range(self._times):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if "success" in info:
                successes.append(float(np.reshape(info["success"], ())))
            if terminated or truncated:
                break
        if successes:
            defined = [success for success in successes if not math.isnan(success)]
            info = {**info, "success": max(defined, default=math.nan)}
        return observation, total, terminated, truncated, info


def repeated_horizon(config: ActionRepeatConfig, horizon: int) -> int:
    """Return the number of actions in an episode of `horizon` steps; the last action may have fewer repetitions."""
    return -(-horizon // config.times)
