"""Stage ids: observations end in the one-hot stage id; everything else is as without it."""

import pickle
import warnings
from typing import NamedTuple

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import metarl.envs
from metarl.envs import StageIdTasks, custom, distribution
from metarl.envs.manager import Curriculum, EnvManager
from metarl.envs.stage_id import StageIdBatch, has_stage_id, one_hot, without_stage_id
from metarl.envs.vector.pool import env_spaces
from metarl.envs.vector.serial import SerialEnvs, make_envs
from metarl.types import Task

FAMILIES = [
    ("metaworld", {"name": "reach-v3", "horizon": 20}),
    ("mujoco", {"name": "HopperRandParams", "scaled": ["body_mass"], "num_train": 6, "num_test": 2}),
    ("navigation", {"name": "cued_wedges", "num_train": 2}),
]
STAGE_1_OF_3 = [0.0, 1.0, 0.0]


def seeds(count):
    return np.arange(count, dtype=np.uint32)


class Still(gymnasium.Env):
    """Observes the index of its task, in float32."""

    observation_space = gymnasium.spaces.Box(0.0, 9.0, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    render_mode = "ansi"

    def __init__(self, task):
        self.task, self.closed = task, 0

    def _observation(self):
        return np.array([self.task.index], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        return self._observation(), {"seed": seed, "options": options}

    def step(self, action):
        return self._observation(), 0.0, False, False, {"success": 1.0}

    def render(self):
        return "a picture"

    def close(self):
        self.closed += 1


class Retargetable(Still):
    built = 0

    def __init__(self, task):
        Retargetable.built += 1
        super().__init__(task)

    def set_task(self, task):
        self.task = task


class Pictures(NamedTuple):
    """A distribution whose observations have two dimensions."""

    train_tasks = (Task("a", "a", "train", "a", 0, 0),)

    def make(self, task):
        env = gymnasium.Env()
        env.observation_space = gymnasium.spaces.Box(0.0, 1.0, (2, 2))
        return env


def hardness(task):
    return -task.index


@pytest.mark.parametrize(("family", "settings"), FAMILIES)
def test_tasks_are_the_same_with_the_stage_among_their_options(family, settings):
    plain = distribution(family, **settings)
    tasks_with_id = StageIdTasks(plain, 1, 3)
    for ours, theirs in ((tasks_with_id.train_tasks, plain.train_tasks), (tasks_with_id.test_tasks, plain.test_tasks)):
        assert [without_stage_id(task) for task in ours] == theirs
        assert {(task.option("stage"), task.option("stages")) for task in ours} == {(1, 3)}
        assert all(has_stage_id(task) for task in ours) and not any(has_stage_id(task) for task in theirs)
    assert tasks_with_id.train_tasks is tasks_with_id.train_tasks
    np.testing.assert_array_equal(one_hot(tasks_with_id.train_tasks[0]), STAGE_1_OF_3)


@pytest.mark.parametrize(("family", "settings"), FAMILIES)
def test_an_environment_is_rebuilt_from_its_task_and_adds_nothing_but_the_stage_id(family, settings):
    tasks_with_id, plain = StageIdTasks(distribution(family, **settings), 1, 3), distribution(family, **settings)
    task = tasks_with_id.train_tasks[1]
    reference = plain.make(plain.train_tasks[1])
    for env in (tasks_with_id.make(task), metarl.envs.make(Task.from_json(task.to_json()))):
        size = reference.observation_space.shape[0]
        space = env.observation_space
        assert space.dtype == reference.observation_space.dtype
        np.testing.assert_array_equal(space.low, [*reference.observation_space.low, 0, 0, 0])
        np.testing.assert_array_equal(space.high, [*reference.observation_space.high, 1, 1, 1])
        assert env.action_space == reference.action_space
        rng = np.random.default_rng(0)
        observation, theirs = env.reset(seed=4)[0], reference.reset(seed=4)[0]
        for _ in range(15):
            np.testing.assert_array_equal(observation, [*theirs, *STAGE_1_OF_3])
            action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
            observation, *ours = env.step(action)
            theirs, *expected = reference.step(action)
            assert len(observation) == size + 3
            assert ours[:3] == expected[:3] and ours[3].keys() == expected[3].keys()
            if any(ours[1:3]):
                break


@pytest.mark.parametrize(("family", "settings"), FAMILIES)
def test_passes_the_environment_checker(family, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unbounded observations, no spec: as without the stage id
        tasks_with_id = StageIdTasks(distribution(family, **settings), 0, 2)
        check_env(tasks_with_id.make(tasks_with_id.train_tasks[0]), skip_render_check=True)


def test_retargeting_switches_the_inner_environment_and_the_stage_id():
    plain = distribution("mujoco", name="HalfCheetahVel", num_train=2)
    with_id = [StageIdTasks(plain, stage, 2) for stage in (0, 1)]
    first, second = (tasks.train_tasks[stage] for stage, tasks in enumerate(with_id))
    env = metarl.envs.make(first)
    with_id[0].retarget(env, second)  # as environments are used again
    assert env.unwrapped is env and env.task == second
    assert env.env.task == plain.train_tasks[1]
    fresh = metarl.envs.make(second)
    np.testing.assert_array_equal(env.reset(seed=1)[0], fresh.reset(seed=1)[0])
    assert env.reset(seed=1)[0][-2:].tolist() == [0.0, 1.0]
    assert env.step(np.ones(6))[1] == fresh.step(np.ones(6))[1]
    with pytest.raises(ValueError, match="a task with 3 stages; this environment has 2"):
        with_id[0].retarget(env, StageIdTasks(plain, 1, 3).train_tasks[0])
    assert env.env.task == plain.train_tasks[1]  # nothing has changed


def test_a_custom_environment_keeps_its_type_its_horizon_and_its_rendering():
    tasks_with_id = StageIdTasks(custom("still", Still, num_train=2, num_test=1, horizon=2), 0, 2)
    env = tasks_with_id.make(tasks_with_id.train_tasks[1])
    observation, info = env.reset(seed=3, options={"a": 1})
    assert observation.dtype == np.float32 and env.observation_space.dtype == np.float32
    assert observation.tolist() == [1.0, 1.0, 0.0]
    assert info == {"seed": 3, "options": {"a": 1}}
    assert [env.step(np.zeros(1))[3] for _ in range(2)] == [False, True]
    assert (env.render_mode, env.render()) == ("ansi", "a picture")
    assert tasks_with_id.retarget is None  # so that it is built anew for every task
    env.close()
    assert env.env.unwrapped.closed == 1
    assert env.env.unwrapped.task == custom("still", Still, num_train=2, num_test=1, horizon=2).train_tasks[1]


def test_environments_are_used_again(monkeypatch):
    monkeypatch.setattr(Retargetable, "built", 0)
    plain = custom("still", Retargetable, num_train=4, num_test=1, horizon=2, retarget=Retargetable.set_task)
    tasks_with_id = StageIdTasks(plain, 1, 2)
    envs = SerialEnvs(tasks_with_id, 2)
    for tasks in (tasks_with_id.train_tasks[:2], tasks_with_id.train_tasks[2:], tasks_with_id.train_tasks[1::-1]):
        expected = [[task.index, 0.0, 1.0] for task in tasks]
        assert envs.reset(tasks, seeds(2)).tolist() == expected
    assert Retargetable.built == 3  # one for the spaces, two that are stepped
    envs.close()


# Batches


def test_a_batch_exists_only_where_the_tasks_have_one():
    navigation = distribution("navigation", name="goals", num_train=3)
    batch = make_envs(StageIdTasks(navigation, 0, 2), 5, num_workers=0)
    assert isinstance(batch, StageIdBatch)
    assert (batch.max_envs, batch.lanes) == (5, navigation.make_batch(5).lanes)
    assert batch.spaces == env_spaces(StageIdTasks(navigation, 0, 2))
    batch.close()
    mujoco = StageIdTasks(distribution("mujoco", num_train=3), 0, 2)
    assert getattr(mujoco, "make_batch", None) is None
    assert isinstance(make_envs(mujoco, 2, num_workers=0), SerialEnvs)


def test_a_batch_equals_single_environments_row_by_row():
    """Tasks of two stages in one batch; rows step apart, some stay still; then others, fewer, in another order."""
    plain = distribution("navigation", name="rotated_wedges", num_train=2)
    tasks = [task for stage in (0, 2) for task in StageIdTasks(plain, stage, 3).train_tasks[stage::3]]
    batch = StageIdTasks(plain, 0, 3).make_batch(len(tasks))
    rng = np.random.default_rng(1)
    for chosen in (tasks, tasks[::-1][:4], tasks[1:]):
        envs = [metarl.envs.make(task) for task in chosen]
        expected = np.stack([env.reset(seed=0)[0] for env in envs])
        np.testing.assert_array_equal(batch.reset(chosen, seeds(len(chosen))), expected)
        assert len({tuple(row[-3:]) for row in expected}) == 2
        lanes = [slice(0, 2), slice(2, len(chosen))]
        for _ in range(4):
            actions, active = rng.uniform(-1, 1, (len(chosen), 2)), rng.uniform(size=len(chosen)) < 0.6
            for rows in lanes:
                batch.step_async(rows, actions[rows], active[rows])
            for rows in lanes:
                step = batch.step_wait(rows)
                for row, observation, reward in zip(
                    range(len(chosen))[rows], step.observations, step.rewards, strict=True
                ):
                    if active[row]:
                        expected[row], expected_reward, *_ = envs[row].step(actions[row])
                        assert reward == expected_reward
                    np.testing.assert_array_equal(observation, expected[row])
    with pytest.raises(ValueError, match=r"tasks have \[2, 3\] stages; expected 3"):
        batch.reset([tasks[0], StageIdTasks(plain, 0, 2).train_tasks[0]], seeds(2))


def test_the_batch_below_is_given_the_tasks_that_it_knows():
    plain = distribution("navigation", num_train=3)
    batch, given = plain.make_batch(3), []
    below, batch.reset = batch.reset, lambda tasks, seeds: given.extend(tasks) or below(tasks, seeds)
    StageIdBatch(batch, 2).reset(StageIdTasks(plain, 1, 2).train_tasks, seeds(3))
    assert given == plain.train_tasks


@pytest.mark.parametrize(("family", "settings"), FAMILIES[:2])
def test_workers_equal_one_process_to_the_bit(family, settings):
    tasks_with_id = StageIdTasks(distribution(family, **settings), 2, 4)
    assert len(tasks_with_id.train_tasks) > 2  # and they travel with it
    one, two = (make_envs(tasks_with_id, 3, num_workers=number) for number in (0, 2))
    rng = np.random.default_rng(2)
    try:
        for tasks in (tasks_with_id.train_tasks[:3], tasks_with_id.train_tasks[4:1:-1], tasks_with_id.test_tasks[:2]):
            count = len(tasks)
            np.testing.assert_array_equal(one.reset(tasks, seeds(count)), two.reset(tasks, seeds(count)))
            rows, size = slice(0, count), one.spaces.action_size
            for active in (np.ones(count, dtype=bool), np.arange(count) == 1):
                actions = rng.uniform(-1, 1, (count, size))
                found = []
                for envs in (one, two):
                    envs.step_async(rows, actions, active)
                    found.append(envs.step_wait(rows))
                for ours, theirs in zip(*found, strict=True):
                    np.testing.assert_array_equal(ours, theirs)
                assert found[1].observations[:, -4:].tolist() == [[0.0, 0.0, 1.0, 0.0]] * count
    finally:
        one.close()
        two.close()


# Difficulty, and what cannot be


@pytest.mark.parametrize(("family", "settings"), FAMILIES)
def test_a_curriculum_sees_the_difficulty_of_the_task_without_its_stage_id(family, settings):
    plain = distribution(family, **settings)
    tasks_with_id = pickle.loads(pickle.dumps(StageIdTasks(plain, 0, 2)))
    expected = [plain.difficulty(task) for task in plain.train_tasks]
    assert [tasks_with_id.difficulty(task) for task in tasks_with_id.train_tasks] == expected
    easiest = EnvManager(tasks_with_id.train_tasks, Curriculum(tasks_with_id.difficulty, 0.01, 9)).allowed(0)
    assert easiest == [tasks_with_id.train_tasks[int(np.argmin(expected))]]


def test_difficulty_exists_only_where_the_tasks_have_one():
    arguments = {"num_train": 3, "num_test": 1, "horizon": 2}
    assert getattr(StageIdTasks(custom("still", Still, **arguments), 0, 2), "difficulty", None) is None
    tasks_with_id = StageIdTasks(custom("still", Still, **arguments, difficulty=hardness), 0, 2)
    assert [tasks_with_id.difficulty(task) for task in tasks_with_id.train_tasks] == [0.0, -1.0, -2.0]


@pytest.mark.parametrize(("stage", "num_stages"), [(2, 2), (-1, 2), (0, 0)])
def test_a_stage_that_is_none_is_refused(stage, num_stages):
    with pytest.raises(ValueError, match=f"stage is {stage} with num_stages={num_stages}"):
        StageIdTasks(distribution("navigation"), stage, num_stages)


@pytest.mark.parametrize(
    "options", [{"stage": 0}, {"stages": 2}, {"stage": 2, "stages": 2}, {"stage": "0", "stages": 2}]
)
def test_an_invalid_stage_id_is_refused(options):
    with pytest.raises(ValueError, match="expected 0 ≤ stage < stages"):
        metarl.envs.make(Task("navigation", "goals", "train", "goals", 0, 0, {"horizon": 3, **options}))


def test_a_stage_id_is_not_added_twice_and_pictures_have_none():
    tasks_with_id = StageIdTasks(distribution("navigation", num_train=1), 0, 2)
    with pytest.raises(ValueError, match="already has an option stage or stages"):
        _ = StageIdTasks(tasks_with_id, 0, 2).train_tasks
    pictures = StageIdTasks(Pictures(), 0, 2)
    with pytest.raises(ValueError, match="one-dimensional Box: flatten it"):
        pictures.make(pictures.train_tasks[0])
