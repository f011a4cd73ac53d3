"""Meta-World against the official package: the same goals, the same physics, none of its traps."""

import itertools
import os
import pickle
import subprocess
import sys
import warnings
from functools import cache

import gymnasium
import metaworld
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from metaworld.policies import SawyerReachV3Policy
from metaworld.sawyer_xyz_env import SawyerXYZEnv

import metarl.envs.metaworld.env as ours
from metarl.envs.metaworld.classes import CLASSES
from metarl.envs.metaworld.env import MetaWorldConfig, MetaWorldTasks, goal_vector, make
from metarl.types import Task

SEED = 7

# Between them: rejection sampling (all but bin-picking and door-lock), the fixed goal of sweep-into, live views of
# simulator data that rewards read (door-lock, basketball, bin-picking), state set in mid-episode (bin-picking).
TRICKY_CLASSES = ("pick-place-v3", "door-lock-v3", "basketball-v3", "bin-picking-v3", "sweep-into-v3")


@cache
def official_ml1(name):
    return metaworld.ML1(name, seed=SEED)


def tasks_of(name="reach-v3", **config):
    return MetaWorldTasks(MetaWorldConfig(name=name, **{"seed": SEED, **config}))


def actions(num_steps, seed=0):
    return np.random.default_rng(seed).uniform(-1.0, 1.0, size=(num_steps, 4)).astype(np.float32)


def trajectory(env, num_steps=60):
    """Everything that an episode of fixed actions returns, as one array `[T + 1, 40]`."""
    observation, _ = env.reset()
    rows = [[*observation, 0.0]]
    for action in actions(num_steps):
        observation, reward, *_ = env.step(action)
        rows.append([*observation, reward])
    return np.array(rows)


def assert_same_goals(tasks, official_tasks):
    assert [task.name for task in tasks] == [official.env_name for official in official_tasks]
    for task, official in zip(tasks, official_tasks, strict=True):
        expected = pickle.loads(official.data)["rand_vec"]
        assert goal_vector(task).dtype == expected.dtype
        assert goal_vector(task).tobytes() == expected.tobytes(), task


class TestGoals:
    @pytest.mark.parametrize("name", TRICKY_CLASSES)
    def test_ml1_goals_and_held_out_goals_are_the_official_ones(self, name):
        assert_same_goals(tasks_of(name).train_tasks, official_ml1(name).train_tasks)
        assert_same_goals(tasks_of(name).test_tasks, official_ml1(name).test_tasks)

    def test_sweep_into_draws_again_by_the_distance_to_its_fixed_goal(self):
        """The drawn goal lies within 1 mm of the fixed one: seed 10 is the first where the two rules differ."""
        assert_same_goals(
            tasks_of("sweep-into-v3", seed=10).train_tasks, metaworld.ML1("sweep-into-v3", seed=10).train_tasks
        )

    def test_ml10_is_the_official_benchmark(self):
        mine, official = MetaWorldTasks(MetaWorldConfig(benchmark="ML10", seed=SEED)), metaworld.ML10(seed=SEED)
        assert_same_goals(mine.train_tasks, official.train_tasks)
        assert_same_goals(mine.test_tasks, official.test_tasks)

    @pytest.mark.slow
    def test_drawing_rules_of_all_classes_are_the_official_ones(self):
        """ML45 holds all 50 classes, each split in one stream: a rule that is wrong shifts all that follow."""
        mine, official = MetaWorldTasks(MetaWorldConfig(benchmark="ML45", seed=SEED)), metaworld.ML45(seed=SEED)
        assert_same_goals(mine.train_tasks, official.train_tasks)
        assert_same_goals(mine.test_tasks, official.test_tasks)
        assert {task.name for task in mine.train_tasks + mine.test_tasks} == set(CLASSES)

    def test_the_list_of_classes_is_the_official_one(self):
        assert tuple(metaworld.env_dict.ALL_V3_ENVIRONMENTS) == CLASSES

    def test_another_seed_gives_other_goals(self):
        first, second = (goal_vector(tasks_of(seed=seed).train_tasks[0]) for seed in (0, 1))
        assert not np.array_equal(first, second)

    def test_a_goal_cannot_be_changed_in_place(self):
        with pytest.raises(ValueError, match="read-only"):
            goal_vector(tasks_of().train_tasks[0])[0] = 0.0

    def test_global_stream_and_package_stay_untouched(self):
        ours._goals.cache_clear()
        ours._reset_box.cache_clear()
        np.random.seed(123)
        members = dict(vars(SawyerXYZEnv))
        expected = np.random.RandomState(123).uniform()
        env = make(tasks_of().train_tasks[0])
        trajectory(env, num_steps=3)
        assert np.random.uniform() == expected
        assert dict(vars(SawyerXYZEnv)) == members


class TestTasks:
    def test_tasks_are_plain_lists_of_fifty_a_class(self):
        tasks = MetaWorldTasks(MetaWorldConfig(benchmark="ML10", seed=3, horizon=100, reward_version="v1"))
        assert (len(tasks.train_tasks), len(tasks.test_tasks)) == (500, 250)
        options = {"horizon": 100, "reward_version": "v1"}
        assert tasks.train_tasks[51] == Task("metaworld", "ML10", "train", "push-v3", 1, 3, options)
        assert tasks.test_tasks[249] == Task("metaworld", "ML10", "test", "lever-pull-v3", 49, 3, options)

    @pytest.mark.parametrize(("benchmark", "counts"), [("ML10", (10, 5)), ("ML25", (25, 4)), ("ML45", (45, 5))])
    def test_held_out_classes_are_unseen(self, benchmark, counts):
        tasks = MetaWorldTasks(MetaWorldConfig(benchmark=benchmark))
        train, test = ({task.name for task in split} for split in (tasks.train_tasks, tasks.test_tasks))
        assert (len(train), len(test)) == counts
        assert not train & test
        assert {task.split for task in tasks.test_tasks} == {"test"}

    def test_ml25_holds_out_what_upstream_does_but_for_the_class_in_both_splits(self):
        mine, official = MetaWorldTasks(MetaWorldConfig(benchmark="ML25")), metaworld.env_dict.ML25_V3
        assert set(official["test"]) - {task.name for task in mine.test_tasks} == {"basketball-v3"}
        assert list(dict.fromkeys(task.name for task in mine.train_tasks)) == list(official["train"])
        with pytest.raises(ValueError, match="not in the test split of ML25"):
            make(Task("metaworld", "ML25", "test", "basketball-v3", 0, 0, mine.test_tasks[0].options))

    def test_ml25_held_out_goals_keep_their_place_in_the_official_stream(self):
        box = ours._reset_box("door-close-v3")
        rng = np.random.RandomState(SEED)
        for _ in range(100):  # basketball-v3 comes first upstream: two draws for each of its 50 goals
            ours._draw("basketball-v3", ours._reset_box("basketball-v3"), rng)
        rng.uniform(box.low, box.high)
        task = MetaWorldTasks(MetaWorldConfig(benchmark="ML25", seed=SEED)).test_tasks[0]
        assert task.name == "door-close-v3"
        np.testing.assert_array_equal(goal_vector(task), rng.uniform(box.low, box.high))

    @pytest.mark.parametrize("name", CLASSES)
    def test_held_out_goals_of_one_class_are_unseen(self, name):
        train, test = (
            {goal_vector(t).tobytes() for t in s} for s in (tasks_of(name).train_tasks, tasks_of(name).test_tasks)
        )
        assert len(train) == len(test) == 50
        assert not train & test

    def test_custom_list_holds_out_other_goals(self):
        tasks = MetaWorldTasks(MetaWorldConfig(benchmark="custom", names=("reach-v3", "door-open-v3"), seed=SEED))
        assert tasks.train_tasks == tasks_of("reach-v3").train_tasks + tasks_of("door-open-v3").train_tasks
        assert tasks.test_tasks == tasks_of("reach-v3").test_tasks + tasks_of("door-open-v3").test_tasks

    def test_custom_list_holds_out_other_classes(self):
        config = MetaWorldConfig(benchmark="custom", names=("reach-v3",), test_names=("push-v3",), seed=SEED)
        tasks = MetaWorldTasks(config)
        assert tasks.train_tasks == tasks_of("reach-v3").train_tasks
        assert tasks.test_tasks == tasks_of("push-v3").test_tasks

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"name": "reach-v2"}, "did you mean 'reach-v3'.*metarl list envs"),
            ({"benchmark": "custom", "names": ("reach-v3", "dor-open-v3")}, "did you mean 'door-open-v3'"),
            ({"benchmark": "ML1"}, "ML1 needs a name"),
            ({"benchmark": "ML10", "name": "reach-v3"}, "the others have none"),
            ({"benchmark": "custom"}, "needs names"),
            ({"benchmark": "ML10", "names": ("reach-v3",)}, "needs names"),
            ({"name": "reach-v3", "test_names": ("push-v3",)}, "needs names"),
            ({"benchmark": "custom", "names": ("reach-v3",), "test_names": ("reach-v3",)}, "reach-v3 listed twice"),
            ({"name": "reach-v3", "horizon": 501}, "horizon"),
        ],
    )
    def test_wrong_config_says_what_to_do(self, config, message):
        with pytest.raises(ValueError, match=message):
            MetaWorldConfig(**config)

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("family", "mujoco", "family"),
            ("benchmark", "ML2", "benchmark"),
            ("split", "val", "split"),
            ("name", "reach-v9", "did you mean 'reach-v3'"),
            ("index", 50, "index"),
            ("index", -1, "index"),
            ("options", (("horizon", 501), ("reward_version", "v2")), "horizon"),
            ("options", (("horizon", 500),), "reward_version"),
        ],
    )
    def test_wrong_task_names_its_field(self, field, value, message):
        fields = {
            "family": "metaworld",
            "benchmark": "ML1",
            "split": "train",
            "name": "reach-v3",
            "index": 0,
            "seed": 0,
        }
        task = Task(**{**fields, "options": {"horizon": 500, "reward_version": "v2"}, field: value})
        with pytest.raises(ValueError, match=message):
            make(task)


class TestEnv:
    @pytest.mark.parametrize(("name", "reward_version"), list(itertools.product(TRICKY_CLASSES, ("v1", "v2"))))
    def test_trajectory_is_the_official_one(self, name, reward_version):
        official = official_ml1(name).train_classes[name](reward_function_version=reward_version)
        official.set_task(official_ml1(name).train_tasks[3])
        env = make(tasks_of(name, reward_version=reward_version).train_tasks[3])
        np.testing.assert_array_equal(trajectory(env), trajectory(official))

    def test_a_sparse_reward_is_success_and_nothing_else_differs(self):
        sparse, dense = (make(tasks_of("reach-v3", reward_version=v).train_tasks[3]) for v in ("sparse", "v2"))
        way = goal_vector(sparse.task)[-3:] - sparse.reset()[0][:3]
        dense.reset()
        rewards = []
        for _ in range(60):  # to the goal, and on in the same direction
            action = np.append(way / np.abs(way).max(), 0.0).astype(np.float32)
            (seen, reward, *_, info), (expected, *_) = sparse.step(action), dense.step(action)
            np.testing.assert_array_equal(seen, expected)
            assert reward == info["success"]
            rewards.append(reward)
        assert set(rewards) == {0.0, 1.0} and rewards[0] == 0.0
        sparse.set_task(dense.task)  # an environment of the pool may get either
        sparse.reset()
        assert sparse.step(np.zeros(4, np.float32))[1] > 1.0

    @pytest.mark.parametrize("name", ["door-lock-v3", "pick-place-v3", "drawer-open-v3"])
    def test_a_used_env_equals_a_fresh_one(self, name):
        used = make(tasks_of(name, reward_version="v1").train_tasks[0])
        trajectory(used, num_steps=40)
        task = tasks_of(name).test_tasks[1]
        used.set_task(task)
        np.testing.assert_array_equal(trajectory(used), trajectory(make(task)))
        np.testing.assert_array_equal(trajectory(used), trajectory(used))

    def test_a_task_from_json_rebuilds_the_env_without_pickle(self, monkeypatch):
        task = tasks_of("push-v3").train_tasks[5]
        expected = trajectory(make(task))

        def refuse(*_args, **_kwargs):
            raise AssertionError("unpickled")

        for function in ("load", "loads", "Unpickler"):
            monkeypatch.setattr(pickle, function, refuse)
        ours._goals.cache_clear()
        env = make(tasks_of("push-v3").train_tasks[0])
        env.set_task(Task.from_json(task.to_json()))
        np.testing.assert_array_equal(trajectory(env), expected)

    def test_nothing_depends_on_seeds_or_on_the_global_stream(self):
        env = make(tasks_of().train_tasks[0])
        first = []
        for seed in (0, 1):
            np.random.seed(seed)
            first.append(env.reset(seed=seed)[0])
        np.testing.assert_array_equal(*first)
        np.random.seed(2)
        expected = trajectory(env)
        np.random.seed(3)
        np.testing.assert_array_equal(trajectory(env), expected)

    @pytest.mark.parametrize("horizon", [100, 500])
    def test_truncates_at_the_horizon_and_only_there(self, horizon):
        env = make(tasks_of(horizon=horizon).train_tasks[0])
        env.reset()
        flags = [env.step(action)[2:4] for action in actions(horizon)]
        assert flags == [(False, False)] * (horizon - 1) + [(False, True)]
        with pytest.raises(gymnasium.error.ResetNeeded, match="call reset"):
            env.step(actions(1)[0])

    @pytest.mark.filterwarnings("ignore:Constant")  # the scripted policy asks for more than ±1
    def test_success_does_not_end_the_episode_of_a_held_out_task(self):
        env, policy = make(tasks_of(horizon=150).test_tasks[0]), SawyerReachV3Policy()
        observation, _ = env.reset()
        successes = []
        for step in range(150):
            with_goal = np.concatenate([observation[:-3], env._official._target_pos])
            observation, _, terminated, truncated, info = env.step(np.clip(policy.get_action(with_goal), -1.0, 1.0))
            successes.append(info["success"])
            assert type(info["success"]) is float
            assert (terminated, truncated) == (False, step == 149)
        assert successes[0] == 0.0
        assert successes[-1] == 1.0

    def test_step_before_reset_and_after_set_task_is_refused(self):
        env = make(tasks_of().train_tasks[0])
        with pytest.raises(gymnasium.error.ResetNeeded):
            env.step(actions(1)[0])
        env.reset()
        env.set_task(tasks_of().train_tasks[1])
        with pytest.raises(gymnasium.error.ResetNeeded):
            env.step(actions(1)[0])

    def test_another_class_is_refused(self):
        env = make(tasks_of().train_tasks[0])
        with pytest.raises(ValueError, match=r"'push-v3'.*'reach-v3'"):
            env.set_task(tasks_of("push-v3").train_tasks[0])

    def test_diverging_physics_is_an_error(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT
        env = make(tasks_of().train_tasks[0])
        env.reset()
        env.step(actions(1)[0])
        env._official.data.qvel[0] = np.nan
        with pytest.raises(FloatingPointError, match="diverged"):
            env.step(actions(1)[0])

    def test_gymnasium_accepts_it(self):
        env = make(tasks_of("door-lock-v3", horizon=20).train_tasks[0])
        assert env.unwrapped is env
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "(?s).*A Box observation space"
            )  # upstream's bounds: three zeros, infinity
            check_env(env, skip_render_check=True)

    @pytest.mark.slow
    def test_goal_is_hidden_and_spaces_hold_for_every_class(self):
        for name in CLASSES:
            env = make(tasks_of(name, horizon=5).train_tasks[0])
            rows = trajectory(env, num_steps=5)[:, :39]
            assert not rows[:, -3:].any(), name
            assert all(env.observation_space.contains(row) for row in rows), name
            assert not env.observation_space.low[-3:].any(), name
            assert not env.observation_space.high[-3:].any(), name
            assert env._official._target_pos.any(), name  # there is a goal to hide


def test_importing_the_family_does_not_import_metaworld():
    code = "import sys, metarl.envs.metaworld.env; sys.exit('metaworld' in sys.modules or 'torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
