"""The innermost layer of a wrapped environment: checks what the environment returns before wrappers transform it."""

from __future__ import annotations

from typing import Any

import gymnasium

from metarl.spaces import Answers
from metarl.types import Task


class Checked(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Checks what an environment returns, as `CheckedEnv` does, and changes none of it.

    Wrappers around it see five values, observations of the environment's space (of a Box as arrays), a number as
    reward, and truth values.

    Args:
        env: the environment without wrappers.
        task: the task with its wrappers.

    Raises:
        UserError: from `reset` and `step`: the environment returned something else.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], task: Task) -> None:
        super().__init__(env)
        self._answers = Answers(env.observation_space, task, every_step=True)
        self._task = task

    @property
    def task(self) -> Task:
        """The current task, with its wrappers."""
        return self._task

    def retarget(self, task: Task) -> None:
        """Name another task from now on: the environment was given it."""
        self._task = self._answers.task = task

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        return self._answers.reset(self.env.reset(seed=seed, options=options))

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step."""
        answer = self._answers.step(self.env.step(action))
        if "success" in answer[4]:
            self._answers.success(answer[4])
        return answer
