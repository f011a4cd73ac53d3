"""Actuator delay: an action takes effect some steps later."""

from __future__ import annotations

from collections import deque
from typing import Any, Literal

import gymnasium
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from metarl.envs.wrappers.requirements import require_bounded_box
from metarl.settings import Settings


class ActionDelayConfig(Settings):
    """Actions that take effect some steps later; before the first one, the centre of the action space."""

    name: Literal["action_delay"] = "action_delay"
    steps: int = Field(ge=0, le=10_000, description="steps between an action and its effect")


class ActionDelay(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Delays actions: the environment steps with the action chosen `steps` steps before.

    Until the first action of an episode takes effect, the environment steps with the centre of the action space.

    Args:
        env: the environment; its actions are a Box of floats with finite bounds. (Discrete actions have no neutral
            choice to begin with.)
        steps: between an action and its effect, in steps of `env`.

    Raises:
        UserError: the action space is another one.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], steps: int) -> None:
        super().__init__(env)
        low, high = require_bounded_box(env.action_space, "action_delay")
        self._centre = ((low.astype(np.float64) + high.astype(np.float64)) / 2).astype(low.dtype)
        self._steps = steps
        self._pending: deque[NDArray[Any]] = deque()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; actions of the episode before are forgotten."""
        self._pending = deque([self._centre] * self._steps)
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step with an earlier action."""
        self._pending.append(np.array(action))
        return self.env.step(self._pending.popleft().copy())
