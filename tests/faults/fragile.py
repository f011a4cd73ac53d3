"""Environments that die, hang, crawl or fly apart where their task says so. Without torch: workers start sooner."""

import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

import gymnasium
import numpy as np

from metarl.envs import distribution
from metarl.types import Task

HORIZON = 6
BREAK_AT = 3  # the step at which something happens


class Fragile(gymnasium.Env):
    """Walks: what it observes follows from its seed and its actions.

    The name of its task says when something happens to its process (`build`, `reset`, `step`), and the task's options
    say what: a signal (once: `mark` is the file that tells whether it has happened), or `exit` or `sleep`, each time.
    Others are `crawl` and `raise`, which is what their steps do, and `walk`.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, task):
        self.task = task
        self._happens("build")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._happens("reset")
        self.elapsed, self.place = 0, self.np_random.standard_normal(3)
        return self.place.copy(), {}

    def step(self, action):
        self.elapsed += 1
        if self.task.name == "crawl":
            time.sleep(0.3)
        if self.elapsed == BREAK_AT:
            self._happens("step")
            if self.task.name == "raise":
                raise KeyError("the arm is unplugged")
        self.place = 0.9 * self.place + self.np_random.standard_normal(3)
        self.place[:2] += action
        return self.place.copy(), float(self.place.sum()), self.place[0] > 2.5, False, {"success": self.place[1] > 1}

    def _happens(self, when):
        if self.task.name != when:
            return
        what = dict(self.task.options)
        time.sleep(what.get("sleep", 0.0))
        if "exit" in what:
            os._exit(what["exit"])
        if "mark" not in what:
            return
        try:
            Path(what["mark"]).touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.Signals[what["signal"]])
        time.sleep(0.2)  # a stop is not carried out at once


class Tasks(NamedTuple):
    """Tasks of these environments, or of what `kind` names; a class of this module, which workers can import."""

    train_tasks: list[Task]
    kind: type = Fragile

    def make(self, task):
        return self.kind(task)


class Exploding(NamedTuple):
    """A family of metarl whose task 0 flies apart at step `BREAK_AT`: its velocities are out of all bounds."""

    family: str
    settings: dict

    @property
    def train_tasks(self):
        return distribution(self.family, **self.settings).train_tasks

    def make(self, task):
        env = distribution(self.family, **self.settings).make(task)
        return Explosion(env) if task.index == 0 else env


class Explosion(gymnasium.Wrapper):
    def reset(self, **arguments):
        self.elapsed = 0
        return super().reset(**arguments)

    def step(self, action):
        self.elapsed += 1
        if self.elapsed == BREAK_AT:
            inner = self.unwrapped
            getattr(inner, "_official", inner).data.qvel[:] = 1e20
        return super().step(action)


class Unreadable(Tasks):
    """Tasks that no worker can unpickle."""

    def __reduce__(self):
        return _refuse, ()


def _refuse():
    raise KeyError("these tasks stay here")


def walks(*names, **options):
    """Return a task for each name; its index is its place."""
    options = {"horizon": HORIZON, **options}
    return [Task("fragile", "Fragile", "train", name, index, 0, options) for index, name in enumerate(names)]
