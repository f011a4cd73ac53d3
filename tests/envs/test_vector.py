"""Stepping in this process and in workers: the same arrays, environments used again, and failures that are told."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import NamedTuple

import gymnasium
import numpy as np
import pytest

from metarl.envs import distribution, vector
from metarl.envs.navigation import NavigationBatch
from metarl.envs.vector import SerialEnvs, WorkerEnvs, env_spaces, make_envs
from metarl.types import EpisodesLostError, Task

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
                raise FloatingPointError("the arm is on Mars")
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
    """A distribution that a spawned worker can unpickle: it lies at the top of this module."""

    train_tasks: list[Task]
    kind: type[Toy] = RetargetableToy

    def make(self, task):
        return self.kind(task)


class Spaces(NamedTuple):
    """A distribution whose environment has the given spaces."""

    observation_space: gymnasium.Space
    action_space: gymnasium.Space
    train_tasks = (None,)

    def make(self, task):
        env = gymnasium.Env()
        env.observation_space, env.action_space = self.observation_space, self.action_space
        return env


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


@pytest.fixture(autouse=True)
def importable_and_counted(monkeypatch):
    """Workers import this module by its name, which starts at the root of the repository."""
    depth = __name__.count(".")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[depth]))
    monkeypatch.setattr(Toy, "built", 0)
    monkeypatch.setattr(Toy, "closed", [])


@pytest.fixture
def workers():
    """Builds WorkerEnvs, closes them, and makes sure that nothing hangs or is left over."""

    def too_long(*_):
        raise AssertionError("the call hangs")

    opened = []

    def build(*arguments):
        opened.append(WorkerEnvs(*arguments))
        return opened[-1]

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    yield build
    for envs in opened:
        envs.close()
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert multiprocessing.active_children() == []


def record(envs, schedule):
    """Every array that `envs` returns over one episode of each list of tasks, with random actions."""
    rng = np.random.default_rng(0)
    arrays, lengths = [], []
    for episode, tasks in enumerate(schedule):
        arrays.append(envs.reset(tasks, seeds(len(tasks), 10 * episode)).copy())
        active = np.ones(len(tasks), dtype=bool)
        steps = np.zeros(len(tasks), dtype=int)
        while active.any():
            actions = rng.uniform(envs.action_space.low, envs.action_space.high, (len(tasks), *envs.action_space.shape))
            step = step_rows(envs, slice(0, len(tasks)), actions, active)
            arrays += [array.copy() for array in step]
            steps += active
            active = active & ~step.terminated & ~step.truncated
        lengths.append(steps.tolist())
    return arrays, lengths


@pytest.mark.parametrize("name", ["HalfCheetahDir", "HopperRandParams"])
def test_workers_equal_one_process_to_the_bit(name, workers):
    tasks = distribution("mujoco", name=name, horizon=30, num_train=8)
    all_tasks = tasks.train_tasks * (4 if name == "HalfCheetahDir" else 1)
    # Other tasks, fewer than max_envs (then also fewer than workers), the same again, and all in another order.
    schedule = [all_tasks[:5], all_tasks[3:8], all_tasks[6:8], all_tasks[6:8], all_tasks[4::-1]]
    serial = SerialEnvs(tasks, 5)
    expected, lengths = record(serial, schedule)
    serial.close()
    if name == "HopperRandParams":
        assert any(min(episode) < max(episode) for episode in lengths)  # some fell early: the mask mattered
        assert min(min(episode) for episode in lengths) < 30
    assert not np.array_equal(expected[0][0], expected[0][2])  # same task in HalfCheetahDir: the seeds mattered
    for number in (1, 2, 3):
        envs = workers(tasks, 5, number)
        found, found_lengths = record(envs, schedule)
        assert found_lengths == lengths
        for left, right in zip(found, expected, strict=True):
            np.testing.assert_array_equal(left, right)
        envs.close()


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


def test_workers_use_environments_again_too(workers):
    tasks = toys(*["a"] * 8)
    envs = workers(Toys(tasks), 4, 2)
    assert envs.reset(tasks[:4], seeds(4))[:, INSTANCE].tolist() == [1.0, 1.0, 2.0, 2.0]  # one after the other
    observations = envs.reset(tasks[4:], seeds(4))
    assert observations[:, GOAL].tolist() == [4.0, 5.0, 6.0, 7.0]
    assert sorted(observations[:, INSTANCE]) == [1.0, 1.0, 2.0, 2.0]


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


def test_inactive_environments_are_not_stepped(workers):
    tasks = toys("a", "a", "a")
    for envs in (SerialEnvs(Toys(tasks), 3), workers(Toys(tasks), 3, 2)):
        envs.reset(tasks, seeds(3))
        step_all(envs, 3, [True, False, True])
        assert step_all(envs, 3, [False, False, True]).observations[:, ELAPSED].tolist() == [1.0, 0.0, 2.0]


def test_success_is_nan_where_it_is_not_reported():
    tasks = toys("solved", "a")
    envs = SerialEnvs(Toys(tasks), 2)
    envs.reset(tasks, seeds(2))
    np.testing.assert_array_equal(step_all(envs, 2).success, [1.0, np.nan])


def test_diverged_physics_gives_a_nan_reward_and_the_others_go_on(workers):
    tasks = toys("a", "diverging", "a")
    for envs in (SerialEnvs(Toys(tasks), 3), workers(Toys(tasks), 3, 2)):
        envs.reset(tasks, seeds(3))
        assert step_all(envs, 3).rewards.tolist() == [0.0, 0.0, 0.0]
        step = step_all(envs, 3)
        np.testing.assert_array_equal(step.rewards, [0.0, np.nan, 0.0])
        assert step.observations[[0, 2], ELAPSED].tolist() == [2.0, 2.0]
        envs.reset(tasks, seeds(3))
        assert step_all(envs, 3).rewards.tolist() == [0.0, 0.0, 0.0]


def test_an_exception_in_a_worker_comes_with_its_traceback(workers):
    tasks = toys("a", "unplugged")
    envs = workers(Toys(tasks), 2, 2)
    envs.reset(tasks, seeds(2))
    step_all(envs, 2)
    with pytest.raises(RuntimeError, match=r"failed in worker 1:\n(?s:.*)test_vector.py(?s:.*)the arm is unplugged"):
        step_all(envs, 2)


def test_after_an_exception_a_reset_waits_for_every_worker(workers):
    tasks = toys("unplugged", "a", "a", "slow")
    envs = workers(Toys(tasks), 2, 2)
    envs.reset(tasks[:2], seeds(2))
    step_all(envs, 2)
    with pytest.raises(RuntimeError, match="unplugged"):
        step_all(envs, 2)
    observations = envs.reset(tasks[2:], seeds(2))
    np.testing.assert_array_equal(observations[:, [GOAL, ELAPSED]], [[2.0, 0.0], [3.0, 0.0]])


def test_rows_are_stepped_apart_while_others_are_under_way(workers):
    """Five environments in lanes of 2 and 3, over 1 to 6 workers: more than there are environments in a lane."""
    tasks = toys(*["a"] * 5)
    for number in (1, 2, 3, 6):
        envs = workers(Toys(tasks), 5, number)
        envs.reset(tasks, seeds(5))
        first, second = slice(0, 2), slice(2, 5)
        envs.step_async(first, np.full((2, 1), 0.25), np.ones(2, dtype=bool))
        envs.step_async(second, np.full((3, 1), 0.5), np.array([True, False, True]))
        assert envs.step_wait(first).rewards.tolist() == [0.25, 0.25]
        envs.step_async(first, np.full((2, 1), 0.75), np.ones(2, dtype=bool))
        assert envs.step_wait(second).rewards[[0, 2]].tolist() == [0.5, 0.5]
        step = envs.step_wait(first)
        assert step.rewards.tolist() == [0.75, 0.75]
        assert step.observations[:, ELAPSED].tolist() == [2.0, 2.0]
        envs.close()


def test_answers_of_an_episode_that_was_given_up_are_not_taken_for_new_ones(workers):
    tasks = toys("unplugged", "a", "a", "slow")
    envs = workers(Toys(tasks), 2, 2)
    envs.reset(tasks[:2], seeds(2))
    both = [slice(0, 1), slice(1, 2)]
    for _ in range(2):
        for rows in both:
            envs.step_async(rows, np.zeros((1, 1)), np.ones(1, dtype=bool))
    for rows in both:
        envs.step_wait(rows)
    with pytest.raises(RuntimeError, match="unplugged"):
        envs.step_wait(both[0])  # of the other one, the answer is outstanding
    observations = envs.reset(tasks[2:], seeds(2))
    np.testing.assert_array_equal(observations[:, [GOAL, ELAPSED]], [[2.0, 0.0], [3.0, 0.0]])
    np.testing.assert_array_equal(step_all(envs, 2).observations[:, ELAPSED], [1.0, 1.0])


def test_an_interruption_while_waiting_closes_the_environments(workers, capfd):
    """Otherwise an answer from before would be taken for that of a later step."""
    tasks = toys("slow", "a")
    envs = workers(Toys(tasks), 2, 2)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    with pytest.raises(KeyboardInterrupt):
        while True:
            envs.reset(tasks, seeds(2))
    signal.signal(signal.SIGUSR1, before)
    for call in (lambda: envs.reset(tasks, seeds(2)), lambda: envs.step_wait(slice(0, 2))):
        with pytest.raises(RuntimeError, match="closed; make new ones"):
            call()
    assert capfd.readouterr().err == ""


def test_closing_while_steps_are_under_way_is_quiet(workers, capfd):
    tasks = toys("slow", "a")
    envs = workers(Toys(tasks), 2, 2)
    envs.reset(tasks, seeds(2))
    processes = multiprocessing.active_children()
    for _ in range(3):
        envs.step_async(slice(0, 2), np.zeros((2, 1)), np.ones(2, dtype=bool))
    envs.close()
    assert [process.exitcode for process in processes] == [0, 0]
    assert capfd.readouterr().err == ""


def test_waiting_for_nothing_is_refused(workers):
    envs = workers(Toys(toys("a")), 1, 1)
    with pytest.raises(RuntimeError, match="without step_async"):
        envs.step_wait(slice(0, 1))


def test_a_worker_killed_at_work_is_told_and_started_again(workers):
    tasks = toys("a", "killed", "a")
    envs = workers(Toys(tasks), 2, 2)
    envs.reset(tasks[:2], seeds(2))
    step_all(envs, 2)
    for _ in range(2):  # it stays lost until the next reset
        with pytest.raises(EpisodesLostError, match="worker 1 was killed by SIGKILL"):
            step_all(envs, 2)
    assert envs.restarts == 0
    observations = envs.reset([tasks[0], tasks[2]], seeds(2))
    assert envs.restarts == 1
    assert observations[:, [GOAL, ELAPSED]].tolist() == [[0.0, 0.0], [2.0, 0.0]]
    assert step_all(envs, 2).observations[:, ELAPSED].tolist() == [1.0, 1.0]


def test_a_worker_killed_between_two_calls_loses_no_episode_that_begins_later(workers):
    tasks = toys("a", "a")
    envs = workers(Toys(tasks), 2, 1)
    envs.reset(tasks, seeds(2))
    for restarts, stepping in ((1, True), (2, False)):
        (process,) = multiprocessing.active_children()
        process.kill()
        process.join()
        if stepping:
            with pytest.raises(EpisodesLostError, match="worker 0 was killed by SIGKILL"):
                step_all(envs, 2)
        assert envs.reset(tasks, seeds(2))[:, GOAL].tolist() == [0.0, 1.0]
        assert envs.restarts == restarts


def test_close_ends_all_workers_and_may_be_called_twice(workers):
    tasks = toys("a", "a")
    envs = workers(Toys(tasks), 2, 2)
    envs.reset(tasks, seeds(2))
    processes = multiprocessing.active_children()
    assert len(processes) == 2
    envs.close()
    envs.close()
    assert [process.exitcode for process in processes] == [0, 0]


def test_environments_closed_with_a_step_under_way_are_told_to_be_closed(workers):
    """The answer of that step will never come: a reset must not wait for it."""
    tasks = toys("a", "a")
    envs = workers(Toys(tasks), 2, 1)
    envs.reset(tasks, seeds(2))
    envs.step_async(slice(0, 2), np.zeros((2, envs.action_space.shape[0])), np.ones(2, bool))
    envs.close()
    with pytest.raises(RuntimeError, match="closed; make new ones"):
        envs.reset(tasks, seeds(2))


def test_make_envs_chooses_by_the_number_of_workers(workers):
    tasks = Toys(toys("a"))
    assert isinstance(make_envs(tasks, 2, num_workers=0), SerialEnvs)
    envs = make_envs(tasks, 2, num_workers=5)  # a worker without an environment would only cost
    assert isinstance(envs, WorkerEnvs)
    assert len(multiprocessing.active_children()) == 2
    envs.close()
    batch = make_envs(distribution("navigation"), 3, num_workers=2)
    assert isinstance(batch, NavigationBatch)
    assert batch.max_envs == 3


BOX = gymnasium.spaces.Box(-1.0, 1.0, (2,))


@pytest.mark.parametrize(
    ("observation_space", "action_space", "message"),
    [
        (gymnasium.spaces.Discrete(3), BOX, "observation space is Discrete"),
        (gymnasium.spaces.Dict(x=BOX), BOX, "observation space is Dict.*flatten it"),
        (gymnasium.spaces.Box(0.0, 1.0, (2, 2)), BOX, "observation space is Box.*one dimension"),
        (BOX, gymnasium.spaces.Discrete(3), "action space is Discrete"),
        (BOX, gymnasium.spaces.Box(0.0, 1.0, (2, 2)), "action space is Box.*one dimension"),
        (BOX, gymnasium.spaces.Box(-1.0, np.inf, (2,)), "action space is Box.*finite bounds"),
        (BOX, gymnasium.spaces.Box(-np.inf, 1.0, (2,)), "action space is Box.*finite bounds"),
    ],
)
def test_spaces_that_cannot_be_used_are_refused(observation_space, action_space, message):
    with pytest.raises(ValueError, match=message):
        env_spaces(Spaces(observation_space, action_space))


def test_spaces_are_those_of_the_environment():
    free = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float64)
    assert env_spaces(Spaces(free, BOX)) == (free, BOX)


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
