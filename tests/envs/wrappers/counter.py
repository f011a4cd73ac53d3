"""An environment whose every number is known by hand, and distributions of it; workers import this module by name."""

from typing import NamedTuple

import gymnasium
import numpy as np

from metarl.types import Task

CENTRE = [0.0, 2.0]  # of the actions


class Counter(gymnasium.Env):
    """Observes the steps since the reset and the last action; the reward is the step.

    If it shares its observation, it returns one array, which it changes. Half the range of the actions is (1, 2). It is
    solved at step 2 alone.
    """

    observation_space = gymnasium.spaces.Box(-100.0, 100.0, (3,), np.float64)
    action_space = gymnasium.spaces.Box(np.float32([-1, 0]), np.float32([1, 4]))
    observation_names = ("elapsed", "first", "second")
    action_names = ("push", "turn")
    metadata = {"render_modes": ["ansi"], "render_fps": 10}  # noqa: RUF012
    dt = 0.1

    def __init__(self, task, ends_at=1000, shares=False):
        self.task, self.ends_at, self.shares, self.render_mode = task, ends_at, shares, "ansi"
        self.observation, self.closed = np.zeros(3), 0

    def observed(self):
        return self.observation if self.shares else self.observation.copy()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation[:] = 0
        return self.observed(), {"index": self.task.index}

    def step(self, action):
        self.observation += [1, 0, 0]
        self.observation[1:] = action
        elapsed = self.observation[0]
        return self.observed(), float(elapsed), bool(elapsed >= self.ends_at), False, {"success": float(elapsed == 2)}

    def render(self):
        return f"step {self.observation[0]:.0f}"

    def close(self):
        self.closed += 1


def env(**settings):
    """A counter without a family."""
    return Counter(Task("counter", "counter", "train", "counter", 0, 0, {"horizon": 1000}), **settings)


def rows(env, *actions, seed=3):
    """The observations of an episode, with the first one."""
    found = [env.reset(seed=seed)[0].copy()]
    for action in actions:
        found.append(env.step(np.array(action, np.float32))[0].copy())
    return np.array(found)


class Counters(NamedTuple):
    """A distribution of counters, which never truncate by themselves."""

    horizon: int = 5
    kind: type[gymnasium.Env] = Counter

    @property
    def train_tasks(self):
        return [Task("counter", "counter", "train", "counter", i, 0, {"horizon": self.horizon}) for i in range(4)]

    @property
    def test_tasks(self):
        return [Task("counter", "counter", "test", "counter", 9, 0, {"horizon": self.horizon})]

    def make(self, task):
        return self.kind(task)

    @staticmethod
    def retarget(env, task):
        env.task = task

    @staticmethod
    def difficulty(task):
        assert dict(task.options).keys() == {"horizon"}
        return -task.index


class WithoutExtras(NamedTuple):
    """A distribution with neither `retarget` nor `difficulty`."""

    train_tasks: list[Task]
    test_tasks: list[Task]

    def make(self, task):
        return Counter(task)
