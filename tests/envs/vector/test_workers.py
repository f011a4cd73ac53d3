"""Worker processes: the same arrays as in one process, and failures that are reported."""

import multiprocessing
import os
import signal
import threading

import numpy as np
import pytest

from metarl.envs import distribution
from metarl.envs.vector.serial import SerialEnvs
from metarl.envs.vector.workers import WorkerEnvs
from metarl.protocols import EpisodesLostError
from tests.envs.toys import ELAPSED, GOAL, INSTANCE, Toys, seeds, step_all, step_rows, toys


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
            actions = rng.uniform(-1.0, 1.0, (len(tasks), envs.spaces.action_size))
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


def test_workers_use_environments_again_too(workers):
    tasks = toys(*["a"] * 8)
    envs = workers(Toys(tasks), 4, 2)
    assert envs.reset(tasks[:4], seeds(4))[:, INSTANCE].tolist() == [1.0, 1.0, 2.0, 2.0]  # one after the other
    observations = envs.reset(tasks[4:], seeds(4))
    assert observations[:, GOAL].tolist() == [4.0, 5.0, 6.0, 7.0]
    assert sorted(observations[:, INSTANCE]) == [1.0, 1.0, 2.0, 2.0]


def test_inactive_environments_are_not_stepped(workers):
    tasks = toys("a", "a", "a")
    for envs in (SerialEnvs(Toys(tasks), 3), workers(Toys(tasks), 3, 2)):
        envs.reset(tasks, seeds(3))
        step_all(envs, 3, [True, False, True])
        assert step_all(envs, 3, [False, False, True]).observations[:, ELAPSED].tolist() == [1.0, 0.0, 2.0]


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
    with pytest.raises(RuntimeError, match=r"failed in worker 1:\n(?s:.*)toys.py(?s:.*)the arm is unplugged"):
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
    envs.step_async(slice(0, 2), np.zeros((2, envs.spaces.action_size)), np.ones(2, bool))
    envs.close()
    with pytest.raises(RuntimeError, match="closed; make new ones"):
        envs.reset(tasks, seeds(2))
