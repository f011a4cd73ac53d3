"""Environments of several distributions: each task in its own, shared where they can be, closed once."""

import gymnasium
import numpy as np
import pytest

from metarl.envs import custom, distribution
from metarl.envs.stage_id import StageIdTasks
from metarl.envs.vector.union import UnionOfTasks, make_stage_envs
from metarl.errors import UserError


class Paid(gymnasium.Env):
    """Pays the same for each step."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,))
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))

    def __init__(self, task, pay):
        self.task, self.pay = task, pay

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), self.pay + self.task.index, False, False, {}


def pay_10(task):
    return Paid(task, 10.0)


def pay_20(task):
    return Paid(task, 20.0)


def distributions():
    return [custom(name, make, num_train=3, num_test=2, horizon=4) for name, make in (("a", pay_10), ("b", pay_20))]


def rewards_of(envs, tasks):
    """What one step of each task pays."""
    envs.reset(tasks, np.arange(len(tasks), dtype=np.uint32))
    rows = slice(0, len(tasks))
    envs.step_async(rows, np.zeros((len(tasks), envs.spaces.action_size)), np.ones(len(tasks), np.bool_))
    return envs.step_wait(rows).rewards.tolist()


def test_it_has_the_tasks_of_all_and_builds_each_as_its_distribution_does():
    first, second = distributions()
    both = UnionOfTasks([first, second])
    assert both.train_tasks == first.train_tasks + second.train_tasks
    assert both.test_tasks == first.test_tasks + second.test_tasks
    for tasks, pay in ((first, 10.0), (second, 20.0)):
        for task in (*tasks.train_tasks, *tasks.test_tasks):
            env = both.make(task)
            env.reset(seed=0)
            assert env.step(np.zeros(1, np.float32))[1] == pay + task.index
    with pytest.raises(KeyError):
        both.make(custom("c", pay_10, num_train=1, num_test=1, horizon=4).train_tasks[0])


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_stages_share_one_set_of_environments(num_workers):
    """As many as the largest stage needs; tasks of both may be mixed; a distribution may come again."""
    first, second = distributions()
    envs = make_stage_envs([first, second, first], [2, 5, 3], num_workers)
    try:
        assert envs[0] is envs[1] is envs[2] and envs[0].max_envs == 5
        mixed = [second.train_tasks[1], first.train_tasks[0], first.test_tasks[1], second.train_tasks[0]]
        assert rewards_of(envs[0], mixed) == [21.0, 10.0, 14.0, 20.0]  # held-out tasks are numbers 3 and 4
    finally:
        for each in envs:
            each.close()


def test_one_distribution_for_all_is_taken_as_it_is():
    (first, _) = distributions()
    envs = make_stage_envs([first, first], [2, 3], 0)
    assert envs[0] is envs[1] and envs[0].max_envs == 3
    assert rewards_of(envs[0], first.train_tasks) == [10.0, 11.0, 12.0]


def test_distributions_whose_tasks_are_equal_are_not_mixed_up():
    """Both are called `a`: their tasks are equal, their environments are not. Refused, or each in its own."""
    first, second = (custom("a", make, num_train=2, num_test=1, horizon=4) for make in (pay_10, pay_20))
    assert first.train_tasks == second.train_tasks
    try:
        envs = make_stage_envs([first, second], [2, 2], 0)
    except (UserError, ValueError) as error:
        assert "a" in str(error)
        return
    assert rewards_of(envs[0], first.train_tasks) == [10.0, 11.0]
    assert rewards_of(envs[1], second.train_tasks) == [20.0, 21.0]


def wedge(number, **settings):
    return distribution("navigation", name="rotated_wedges", wedges=[number], horizon=5, **settings)


def test_what_steps_as_one_computation_is_made_for_each_stage():
    first, second = wedge(0), wedge(1)
    envs = make_stage_envs([first, second], [2, 3], 0)
    assert envs[0] is not envs[1] and [each.max_envs for each in envs] == [2, 3]
    mixed = make_stage_envs([first, distributions()[0], second], [2, 3, 4], 0)
    assert len({id(each) for each in mixed}) == 3
    assert rewards_of(mixed[1], distributions()[0].train_tasks) == [10.0, 11.0, 12.0]


def step_of(envs, tasks, actions):
    envs.reset(tasks, np.arange(len(tasks), dtype=np.uint32))
    rows = slice(0, len(tasks))
    envs.step_async(rows, actions, np.ones(len(tasks), np.bool_))
    step = envs.step_wait(rows)
    return step.observations.copy(), step.rewards.copy()


@pytest.mark.parametrize("cued", [False, True])
def test_together_they_step_as_one_computation_if_all_can(cued):
    """Each task by the rules of its own wedge, whose actions are turned, and with the cue of its own stage."""
    stages = [wedge(0), wedge(1)]
    if cued:
        stages = [StageIdTasks(stage, number, 2) for number, stage in enumerate(stages)]
    both = UnionOfTasks(stages)
    assert both.make_batch is not None
    tasks = [stages[1].train_tasks[0], stages[0].train_tasks[0]]
    actions = np.array([[1.0, 0.0], [1.0, 0.0]])
    observations, rewards = step_of(both.make_batch(2), tasks, actions)
    for i, (stage, task) in enumerate(zip((stages[1], stages[0]), tasks, strict=True)):
        alone, reward = step_of(stage.make_batch(1), [task], actions[:1])
        np.testing.assert_array_equal(observations[i], alone[0])
        assert rewards[i] == reward[0]
    assert not np.allclose(observations[0, :2], observations[1, :2])
    if cued:
        assert observations[:, 2:].tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_together_they_do_not_if_one_cannot():
    assert UnionOfTasks([wedge(0), distributions()[0]]).make_batch is None
    assert UnionOfTasks(distributions()).make_batch is None
    goals = distribution("navigation", name="goals", horizon=5)
    assert UnionOfTasks([wedge(0), goals]).make_batch is None  # other rules
    env = UnionOfTasks([wedge(0), goals]).make(goals.train_tasks[0])
    assert env.observation_space.shape == (2,)
