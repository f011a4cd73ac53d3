"""Environments whose every number is known by hand, and how tests step them.

Workers import this module by its name, which starts at the root of the repository.
"""

import os
import signal
import time
from typing import NamedTuple

import gymnasium
import numpy as np

from metarl.errors import PhysicsDivergedError
from metarl.types import Task

INSTANCE, GOAL, ELAPSED = range(3)  # what a toy observes


class Toy(gymnasium.Env):
    """Observes which instance of this process it is, the index of its task, and the steps since the reset.

    The name of its task says what happens at step 2, or at a reset.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    built = 0
    closed: list[int] = []  # noqa: RUF012

    def __init__(self, task):
        Toy.built += 1
        self.instance, self.task, self.elapsed = Toy.built, task, 0

    def _observation(self):
        return np.array([self.instance, self.task.index, self.elapsed], dtype=np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if self.task.name == "slow":
            time.sleep(0.5)
        self.elapsed = 0
        return self._observation(), {}

    def step(self, action):
        assert self.instance not in Toy.closed
        self.elapsed += 1
        if self.elapsed == 2:
            if self.task.name == "unplugged":
                raise KeyError("the arm is unplugged")
            if self.task.name == "diverging":
                raise PhysicsDivergedError("the arm is on Mars")
            if self.task.name == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        info = {"success": True} if self.task.name == "solved" else {}
        return self._observation(), float(action[0]), False, False, info

    def close(self):
        Toy.closed.append(self.instance)


class RetargetableToy(Toy):
    def set_task(self, task):
        self.task = task


class Toys(NamedTuple):
    """A distribution of toys."""

    train_tasks: list[Task]
    kind: type[Toy] = RetargetableToy

    def make(self, task):
        return self.kind(task)

    @property
    def retarget(self):
        return self.kind.set_task if hasattr(self.kind, "set_task") else None


def toys(*names):
    """One task a name; its index is its place."""
    return [Task("toy", "Toy", "train", name, index, 0) for index, name in enumerate(names)]


def seeds(count, first=0):
    return np.arange(first, first + count, dtype=np.uint32)


def step_rows(envs, rows, actions, active):
    envs.step_async(rows, actions, active)
    return envs.step_wait(rows)


def step_all(envs, count, active=None):
    active = np.ones(count, dtype=bool) if active is None else np.array(active)
    return step_rows(envs, slice(0, count), np.zeros((count, 1)), active)
