"""A user's own environment: its tasks, its horizon, and its way through the stepping code."""

import gymnasium
import numpy as np
import pytest

from metarl.envs import custom
from metarl.envs.vector.serial import SerialEnvs
from metarl.types import Task


class Countdown(gymnasium.Env):
    """Observes its goal and the steps taken; terminates at step `ends_at`."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, task, ends_at=100):
        self.goal, self.ends_at, self.elapsed = np.random.default_rng([task.seed, task.index]).uniform(), ends_at, 0

    def _observation(self):
        return np.array([self.goal, self.elapsed])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.elapsed = 0
        return self._observation(), {}

    def step(self, action):
        self.elapsed += 1
        return self._observation(), float(action[0]), self.elapsed >= self.ends_at, False, {"success": self.elapsed > 1}


class Retargeted(Countdown):
    def set_task(self, task):
        Countdown.__init__(self, task)


def seeds(count):
    return np.arange(count, dtype=np.uint32)


def test_train_and_test_tasks_are_disjoint():
    tasks = custom("reacher", Countdown, num_train=3, num_test=2, horizon=7, seed=5)
    assert tasks.train_tasks == [
        Task("reacher", "reacher", "train", "reacher", i, 5, {"horizon": 7}) for i in (0, 1, 2)
    ]
    assert tasks.test_tasks == [Task("reacher", "reacher", "test", "reacher", i, 5, {"horizon": 7}) for i in (3, 4)]
    goals = {tasks.make(task).unwrapped.goal for task in tasks.train_tasks + tasks.test_tasks}
    assert len(goals) == 5
    assert custom("reacher", Countdown, num_train=1, num_test=1, horizon=7).train_tasks[0].seed == 0


def test_episodes_are_truncated_at_the_horizon():
    tasks = custom("reacher", Countdown, num_train=1, num_test=1, horizon=3)
    env = tasks.make(Task.from_json(tasks.train_tasks[0].to_json()))
    for _ in range(2):
        env.reset()
        assert [env.step(np.zeros(1))[2:4] for _ in range(3)] == [(False, False), (False, False), (False, True)]


def test_an_environment_that_ends_by_itself_terminates():
    tasks = custom("reacher", lambda task: Countdown(task, ends_at=2), num_train=1, num_test=1, horizon=3)
    env = tasks.make(tasks.train_tasks[0])
    env.reset()
    assert [env.step(np.zeros(1))[2:4] for _ in range(2)] == [(False, False), (True, False)]


@pytest.mark.parametrize("make", [Countdown, Retargeted])
def test_it_is_stepped_like_any_other_family(make):
    tasks = custom("reacher", make, num_train=4, num_test=1, horizon=2)
    envs = SerialEnvs(tasks, 2)
    for chosen in (tasks.train_tasks[:2], tasks.train_tasks[2:]):
        goals = [np.random.default_rng([0, task.index]).uniform() for task in chosen]
        np.testing.assert_array_equal(envs.reset(chosen, seeds(2)), np.stack([goals, [0.0, 0.0]], -1))
        for t, last in ((1, False), (2, True)):
            envs.step_async(slice(0, 2), np.array([[0.5], [-0.25]]), np.ones(2, dtype=bool))
            step = envs.step_wait(slice(0, 2))
            np.testing.assert_array_equal(step.observations, np.stack([goals, [t, t]], -1))
            assert step.rewards.tolist() == [0.5, -0.25]
            assert step.terminated.tolist() == [False, False]
            assert step.truncated.tolist() == [last, last]
            assert step.success.tolist() == [float(t > 1)] * 2
    envs.close()


@pytest.mark.parametrize("wrong", ["num_train", "num_test", "horizon"])
def test_numbers_below_one_are_refused(wrong):
    numbers = {"num_train": 1, "num_test": 1, "horizon": 1, wrong: 0}
    with pytest.raises(ValueError, match=f"must be ≥ 1, got {numbers['num_train']}, {numbers['num_test']} and"):
        custom("reacher", Countdown, **numbers)
