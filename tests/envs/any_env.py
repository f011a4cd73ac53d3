"""Small environments with every kind of space. Workers import this module by its name."""

import gymnasium
import numpy as np
from gymnasium import spaces

from metarl.envs import custom

BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)
OBSERVATIONS = {
    "vector": BOX,
    "dict": spaces.Dict(
        goal=BOX, arm=spaces.Dict(joint=spaces.Box(-1.0, 1.0, (2, 1), np.float64)), mode=spaces.Discrete(3)
    ),
    "tuple": spaces.Tuple((BOX, spaces.MultiDiscrete([2, 3]))),
    "discrete": spaces.Discrete(4, start=1),
    "integers": spaces.Box(0, 9, (3,), np.int64),
    "matrix": spaces.Box(-1.0, 1.0, (2, 3), np.float32),
    "image": spaces.Box(0, 255, (8, 6, 3), np.uint8),
}
ACTIONS = {
    "box": spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([4.0, 1.0], np.float32)),
    "float64": spaces.Box(np.array([-0.1, 0.3]), np.array([0.7, 1.1]), dtype=np.float64),
    "discrete": spaces.Discrete(3),
    "shifted": spaces.Discrete(3, start=-1),
    "multi_discrete": spaces.MultiDiscrete([2, 4]),
}
SIZES = {"vector": 2, "dict": 7, "tuple": 7, "discrete": 4, "integers": 3, "matrix": 6, "image": 144}


class AnyEnv(gymnasium.Env):
    """Observes what it draws; refuses actions outside of its space, and pays for one of them."""

    def __init__(self, task, observations="vector", actions="box"):
        self.task = task
        self.observation_space, self.action_space = OBSERVATIONS[observations], ACTIONS[actions]

    def _observation(self):
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        return self.observation_space.sample()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._observation(), {}

    def step(self, action):
        assert self.action_space.contains(action), (self.action_space, action)
        number = float(np.ravel(action)[0])
        return self._observation(), -abs(number - self.task.index % 2), False, False, {"success": number == 1.0}


def make(task):
    return AnyEnv(task, *task.benchmark.split("-")[1:])


def tasks_of(observations="vector", actions="box"):
    return custom(f"any-{observations}-{actions}", make, num_train=4, num_test=2, horizon=5)
