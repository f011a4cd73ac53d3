"""Stepping in one process: environments used again, spaces, and what `make_envs` chooses."""

import multiprocessing
from typing import NamedTuple

import gymnasium
import numpy as np
import pytest

from metarl.envs import distribution
from metarl.envs.navigation import NavigationBatch
from metarl.envs.vector import serial as vector
from metarl.envs.vector.pool import env_spaces
from metarl.envs.vector.serial import SerialEnvs, make_envs
from metarl.envs.vector.workers import WorkerEnvs
from metarl.errors import UserError
from metarl.spaces import Spaces
from tests.envs.toys import GOAL, INSTANCE, RetargetableToy, Toy, Toys, seeds, step_all, toys


class OnlySpaces(NamedTuple):
    """A distribution whose environment has the given spaces."""

    observation_space: gymnasium.Space
    action_space: gymnasium.Space
    train_tasks = (None,)

    def make(self, task):
        env = gymnasium.Env()
        env.observation_space, env.action_space = self.observation_space, self.action_space
        return env


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """Toys are numbered from 1 in each test."""
    monkeypatch.setattr(Toy, "built", 0)
    monkeypatch.setattr(Toy, "closed", [])


def test_environments_are_used_again_for_other_tasks_of_their_class():
    tasks = toys(*["a"] * 6, "b")
    envs = SerialEnvs(Toys(tasks), 3)
    assert (Toy.built, Toy.closed) == (1, [1])  # the one that was asked for its spaces
    envs.reset(tasks[:3], seeds(3))
    for chosen in (tasks[3:6], tasks[5:2:-1], tasks[:1], tasks[1:4]):
        np.testing.assert_array_equal(envs.reset(chosen, seeds(len(chosen)))[:, GOAL], [task.index for task in chosen])
        assert Toy.built == 4
    envs.reset([tasks[6], tasks[0]], seeds(2))  # another class
    assert Toy.built == 5
    assert step_all(envs, 2).observations[:, GOAL].tolist() == [6.0, 0.0]
    envs.close()
    assert sorted(Toy.closed) == [1, 2, 3, 4, 5]
    envs.close()
    assert len(Toy.closed) == 5


def test_an_environment_without_set_task_is_built_anew():
    tasks = toys("a", "a", "a")
    envs = SerialEnvs(Toys(tasks, Toy), 2)
    assert envs.reset(tasks[:2], seeds(2))[:, INSTANCE].tolist() == [2.0, 3.0]
    assert envs.reset(tasks[:2], seeds(2))[:, INSTANCE].tolist() == [2.0, 3.0]  # the same tasks: a reset is enough
    observations = envs.reset(tasks[1:], seeds(2))
    assert observations[:, INSTANCE].tolist() == [4.0, 5.0]
    assert observations[:, GOAL].tolist() == [1.0, 2.0]
    envs.close()


def test_environments_beyond_the_pool_are_closed_the_longest_unused_first(monkeypatch):
    monkeypatch.setattr(vector, "POOL", 3)
    tasks = toys(*"abcdef")
    envs = SerialEnvs(Toys(tasks), 2)
    envs.reset(tasks[:2], seeds(2))  # a is instance 2, b 3
    assert Toy.closed == [1]
    envs.reset(tasks[2:4], seeds(2))  # c 4, d 5; of a and b one may stay
    assert Toy.closed == [1, 2]
    assert envs.reset([tasks[1], tasks[3]], seeds(2))[:, INSTANCE].tolist() == [3.0, 5.0]
    envs.reset(tasks[4:], seeds(2))  # e 6, f 7; c has been unused for longer than b and d
    assert Toy.closed[:4] == [1, 2, 4, 3]
    assert Toy.built - len(Toy.closed) == 3
    step_all(envs, 2)  # none of those in use is closed
    envs.close()
    assert sorted(Toy.closed) == list(range(1, 8))


def test_the_pool_never_holds_fewer_than_max_envs(monkeypatch):
    monkeypatch.setattr(vector, "POOL", 1)
    tasks = toys(*["a"] * 8)
    envs = SerialEnvs(Toys(tasks), 4)
    envs.reset(tasks[:4], seeds(4))
    envs.reset(tasks[:1], seeds(1))
    envs.reset(tasks[4:], seeds(4))
    assert Toy.built == 5
    envs.close()


def test_success_is_nan_where_it_is_not_reported():
    tasks = toys("solved", "a")
    envs = SerialEnvs(Toys(tasks), 2)
    envs.reset(tasks, seeds(2))
    np.testing.assert_array_equal(step_all(envs, 2).success, [1.0, np.nan])


def test_make_envs_chooses_by_the_number_of_workers():
    tasks = Toys(toys("a"))
    assert isinstance(make_envs(tasks, 2, num_workers=0), SerialEnvs)
    envs = make_envs(tasks, 2, num_workers=5)  # a worker without an environment would only cost
    assert isinstance(envs, WorkerEnvs)
    assert len(multiprocessing.active_children()) == 2
    envs.close()
    assert multiprocessing.active_children() == []
    batch = make_envs(distribution("navigation"), 3, num_workers=2)
    assert isinstance(batch, NavigationBatch)
    assert batch.max_envs == 3


BOX = gymnasium.spaces.Box(-1.0, 1.0, (2,))


@pytest.mark.parametrize(
    ("observation_space", "action_space", "message"),
    [
        (gymnasium.spaces.Text(3), BOX, "observation space is Text.*expected Box, Discrete"),
        (BOX, gymnasium.spaces.Box(0, 3, (2,), np.int64), "of whole numbers; use Discrete or MultiDiscrete"),
        (BOX, gymnasium.spaces.Box(0.0, 1.0, (2, 2)), "action space is Box.*one-dimensional"),
        (BOX, gymnasium.spaces.Box(-1.0, np.inf, (2,)), "action space is Box.*finite bounds"),
        (BOX, gymnasium.spaces.Box(-np.inf, 1.0, (2,)), "action space is Box.*finite bounds"),
    ],
)
def test_spaces_that_cannot_be_used_are_refused(observation_space, action_space, message):
    with pytest.raises(UserError, match=message):
        env_spaces(OnlySpaces(observation_space, action_space))


def test_spaces_are_those_of_the_environment():
    free = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float64)
    assert env_spaces(OnlySpaces(free, BOX)) == Spaces.within_one(4, 2)


def test_a_failed_build_does_not_give_one_environment_to_two_tasks(monkeypatch):
    tasks = toys("a", "a", "a", "missing")
    envs = SerialEnvs(Toys(tasks), 2)
    envs.reset(tasks[:1], seeds(1))

    def fail(self, task):
        raise FileNotFoundError(task.name)

    with monkeypatch.context() as context, pytest.raises(FileNotFoundError, match="missing"):
        context.setattr(RetargetableToy, "__init__", fail)
        envs.reset(tasks[3:], seeds(1))
    assert envs.reset(tasks[1:3], seeds(2))[:, GOAL].tolist() == [1.0, 2.0]
    assert step_all(envs, 2).observations[:, GOAL].tolist() == [1.0, 2.0]
