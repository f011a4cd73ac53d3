"""Tasks that carry wrappers: rebuilt from their fields alone, with the right horizon, and strict about environments."""

import dataclasses
import pickle

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict

import metarl.envs
from metarl.envs import StageIdTasks, WrappedTasks, custom, distribution
from metarl.envs.vector.pool import env_spaces
from metarl.envs.vector.serial import SerialEnvs, make_envs
from metarl.envs.wrapped import add_wrappers, has_wrappers, without_wrappers
from metarl.envs.wrappers.checked import Checked
from metarl.errors import UserError
from metarl.spaces import CheckedEnv, env_attribute
from metarl.types import Task
from tests.envs.wrappers.counter import CENTRE, Counter, Counters, WithoutExtras
from tests.envs.wrappers.test_wrappers import EXAMPLES

REPEAT, LIMIT, FRAMES = (
    {"name": "action_repeat", "times": 3},
    {"name": "time_limit", "steps": 10},
    {"name": "frame_stack", "frames": 2},
)
NOISY = [
    {"name": "action_delay", "steps": 1},
    {"name": "action_noise", "std": 0.1},
    {"name": "action_repeat", "times": 2},
    {"name": "observation_noise", "std": 0.1},
    {"name": "hide_entries", "names": [0]},
    {"name": "frame_stack", "frames": 2},
    {"name": "reward_scale", "factor": 0.1},
    {"name": "time_limit", "steps": 9},
]
FAMILIES = [
    ("navigation", {"name": "cued_wedges", "num_train": 2, "num_test": 2}),
    ("mujoco", {"name": "HopperRandParams", "num_train": 6, "num_test": 2}),
    ("metaworld", {"name": "reach-v3", "horizon": 20}),
]


def episode(env, seed=5):
    """All that an episode of random actions returns."""
    rng, (observation, _) = np.random.default_rng(seed), env.reset(seed=seed)
    found = [observation]
    while True:
        low, high = env.action_space.low, env.action_space.high
        observation, reward, terminated, truncated, _ = env.step(rng.uniform(low, high).astype(low.dtype))
        found += [observation, reward, terminated, truncated]
        if terminated or truncated:
            return found


def assert_same(first, second):
    assert len(first) == len(second)
    for ours, theirs in zip(first, second, strict=True):
        np.testing.assert_array_equal(ours, theirs)


# Tasks


def test_tasks_carry_their_wrappers_and_can_be_had_without():
    plain, wrapped = Counters(horizon=5), WrappedTasks(Counters(horizon=5), [FRAMES])
    assert [without_wrappers(task) for task in wrapped.train_tasks] == plain.train_tasks
    assert [without_wrappers(task) for task in wrapped.test_tasks] == plain.test_tasks
    assert dict(wrapped.train_tasks[0].options) == {
        "horizon": 5,
        "unwrapped_horizon": 5,
        "wrappers": '[{"name":"frame_stack","frames":2}]',
    }
    assert has_wrappers(wrapped.train_tasks[0]) and not has_wrappers(plain.train_tasks[0])
    assert wrapped.train_tasks is wrapped.train_tasks
    assert add_wrappers(plain, []) is plain and isinstance(add_wrappers(plain, [FRAMES]), WrappedTasks)


@pytest.mark.parametrize(("family", "settings"), FAMILIES)
def test_an_environment_is_rebuilt_from_its_task_alone(family, settings):
    tasks = distribution(family, **settings, wrappers=NOISY)
    task = tasks.train_tasks[1]
    built, rebuilt = tasks.make(task), metarl.envs.make(Task.from_json(task.to_json()))
    expected = episode(built)
    assert_same(episode(rebuilt), expected)
    assert_same(episode(built), expected)  # again, from the same seed
    assert (episode(rebuilt, seed=6)[0] != expected[0]).any()
    assert rebuilt.observation_space == built.observation_space
    inner = metarl.envs.make(without_wrappers(task))
    assert rebuilt.observation_space.shape[0] == 2 * (inner.observation_space.shape[0] - 1)
    assert len(env_attribute(rebuilt, "observation_names")) == rebuilt.observation_space.shape[0]
    assert env_attribute(rebuilt, "task") == task


def test_gymnasium_makes_wrapped_environments():
    wrapped = gymnasium.make("metarl/NavigationGoals-v0", wrappers=[FRAMES, LIMIT])
    assert wrapped.observation_space.shape == (4,) and len(episode(wrapped)) == 1 + 10 * 4


@pytest.mark.parametrize("render_mode", [None, "rgb_array"])
def test_rendering_passes_through(render_mode):
    task = distribution("navigation", num_train=1, wrappers=NOISY).train_tasks[0]
    env = metarl.envs.make(task, render_mode)
    env.reset(seed=0)
    assert env.render_mode == render_mode and (env.render() is None) == (render_mode is None)


# The horizon


@pytest.mark.parametrize(
    ("wrappers", "horizon"),
    [
        ([FRAMES], 100),
        ([REPEAT], 34),  # 33 · 3 + 1
        ([LIMIT], 10),
        ([{"name": "time_limit", "steps": 300}], 100),
        ([REPEAT, LIMIT], 10),
        ([LIMIT, REPEAT], 4),  # 3 · 3 + 1
        ([REPEAT, REPEAT], 12),  # 11 · 9 + 1
        ([{"name": "action_repeat", "times": 500}], 1),
    ],
)
@pytest.mark.parametrize("truncates", [True, False])
def test_the_horizon_of_the_task_is_the_length_of_the_episode(wrappers, horizon, truncates):
    plain = custom("c", Counter, num_train=1, num_test=1, horizon=100) if truncates else Counters(horizon=100)
    task = WrappedTasks(plain, wrappers).train_tasks[0]
    assert task.option("horizon") == horizon and without_wrappers(task).option("horizon") == 100
    wrapped = WrappedTasks(plain, wrappers).make(task)
    for _ in range(2):
        found = episode(wrapped)
        assert len(found) == 1 + 4 * horizon and found[-2:] == [False, True]


def test_the_last_action_has_fewer_repetitions():
    wrapped = WrappedTasks(Counters(horizon=5), [REPEAT])
    env = wrapped.make(wrapped.train_tasks[0])
    env.reset()
    assert [env.step(np.zeros(2))[1] for _ in range(2)] == [1 + 2 + 3, 4 + 5]


# What is optional


def test_retarget_gives_the_task_to_the_innermost_environment():
    wrapped = WrappedTasks(Counters(), [REPEAT, FRAMES])
    first, second = wrapped.train_tasks[:2]
    env = wrapped.make(first)
    wrapped.retarget(env, second)
    assert env.unwrapped.task == Counters().train_tasks[1] and env_attribute(env, "task") == second
    plain = distribution("mujoco", name="HalfCheetahVel", num_train=2, horizon=4)
    wrapped = WrappedTasks(plain, NOISY)
    env = wrapped.make(wrapped.train_tasks[0])
    wrapped.retarget(env, wrapped.train_tasks[1])
    assert_same(episode(env), episode(metarl.envs.make(wrapped.train_tasks[1])))


def give(env, task):
    env.task = task


def test_wrapped_custom_environments_are_used_again():
    built = []
    plain = custom(
        "c", lambda task: built.append(task) or Counter(task), num_train=4, num_test=1, horizon=5, retarget=give
    )
    tasks = WrappedTasks(plain, [REPEAT])
    envs = SerialEnvs(tasks, 2)
    for chosen in (tasks.train_tasks[:2], tasks.train_tasks[2:]):
        envs.reset(chosen, np.zeros(2, np.uint32))
        steps = []
        for _ in range(2):
            envs.step_async(slice(0, 2), np.zeros((2, 2), np.float32), np.ones(2, dtype=bool))
            step = envs.step_wait(slice(0, 2))
            steps.append((step.rewards.tolist(), step.truncated.tolist(), step.observations[:, 1:].tolist()))
        assert steps == [([6, 6], [False] * 2, [CENTRE] * 2), ([9, 9], [True] * 2, [CENTRE] * 2)]
    assert len(built) == 3  # one for the spaces, two that are stepped


def test_what_the_tasks_do_not_have_wrapped_ones_do_not_have():
    plain = WithoutExtras(Counters().train_tasks, Counters().test_tasks)
    wrapped = WrappedTasks(plain, [FRAMES])
    assert wrapped.retarget is None and wrapped.difficulty is None
    assert env_spaces(wrapped).observation_size == 6


def test_difficulty_is_that_of_the_task_without_wrappers():
    wrapped = pickle.loads(pickle.dumps(WrappedTasks(Counters(), [REPEAT])))
    assert [wrapped.difficulty(task) for task in wrapped.train_tasks] == [0, -1, -2, -3]


def test_batched_families_step_one_by_one_when_wrapped():
    wrapped = distribution("navigation", num_train=3, wrappers=[FRAMES])
    assert getattr(wrapped, "make_batch", None) is None
    assert isinstance(make_envs(wrapped, 2, num_workers=0), SerialEnvs)
    assert hasattr(distribution("navigation", num_train=3, wrappers=[]), "make_batch")


def test_workers_equal_one_process_to_the_bit():
    tasks = distribution("mujoco", name="HalfCheetahVel", num_train=6, horizon=12, wrappers=NOISY)
    one, two = (make_envs(tasks, 3, num_workers=number) for number in (0, 2))
    rng, rows = np.random.default_rng(2), slice(0, 3)
    try:
        for chosen in (tasks.train_tasks[:3], tasks.train_tasks[5:2:-1]):
            seeds = rng.integers(2**31, size=3).astype(np.uint32)
            np.testing.assert_array_equal(one.reset(chosen, seeds), two.reset(chosen, seeds))
            for t in range(6):
                actions, found = rng.uniform(-1, 1, (3, 6)), []
                for envs in (one, two):
                    envs.step_async(rows, actions, np.ones(3, dtype=bool))
                    found.append(envs.step_wait(rows))
                for ours, theirs in zip(*found, strict=True):
                    np.testing.assert_array_equal(ours, theirs)
                assert found[0].truncated.tolist() == [t == 5] * 3  # 12 steps, 2 for each action
    finally:
        one.close()
        two.close()


# Stage ids


def test_the_stage_id_is_outside_of_wrappers():
    tasks = StageIdTasks(WrappedTasks(Counters(horizon=7), [EXAMPLES[1], FRAMES, REPEAT]), 1, 3)
    first, second = tasks.train_tasks[:2]
    env = tasks.make(first)
    names = [f"{name}{age}" for age in ("_t-1", "") for name in Counter.observation_names]
    assert env.observation_names == (*names, "stage_0", "stage_1", "stage_2")
    assert env.dt == pytest.approx(0.3) and first.option("horizon") == 3
    assert env.reset(seed=0)[0][-3:].tolist() == [0, 1, 0]
    observations = episode(env)[1::4]
    assert len(observations) == 3 and all(each[-3:].tolist() == [0, 1, 0] for each in observations)
    tasks.retarget(env, second)
    assert env.task == second and env.env.unwrapped.task == Counters(horizon=7).train_tasks[1]
    rebuilt = StageIdTasks(distribution("navigation", num_train=2, wrappers=NOISY), 1, 3)
    task = rebuilt.train_tasks[1]
    assert_same(episode(rebuilt.make(task)), episode(metarl.envs.make(Task.from_json(task.to_json()))))


@pytest.mark.parametrize("answer", [(np.zeros(1), {}), np.zeros(3), (np.zeros(3), {}, {})])
def test_what_an_environment_with_a_stage_id_returns_is_checked(answer):
    tasks = StageIdTasks(Counters(), 0, 2)
    env = tasks.make(tasks.train_tasks[0])
    env.env.reset = lambda **options: answer
    with pytest.raises(UserError, match=r"^task counter 0 of counter: reset returned"):
        CheckedEnv(env, tasks.train_tasks[0]).reset()


# Environments that misbehave


def _answer(*changes):
    answer = [np.zeros(3), 1.0, False, False, {"success": 0.0}]
    for place, value in changes:
        answer[place] = value
    return tuple(answer)


WRONG_STEPS = {
    "four values": _answer()[:4],
    "an observation alone": np.zeros(3),
    "None": None,
    "a list": list(_answer()),
    "a number as observation": _answer((0, 1.0)),
    "one entry, which would be broadcast": _answer((0, np.zeros(1))),
    "too many entries": _answer((0, np.zeros(4))),
    "a column": _answer((0, np.zeros((3, 1)))),
    "text": _answer((0, "state")),
    "a reward for each": _answer((1, np.zeros(2))),
    "no reward": _answer((1, None)),
    "a flag for each": _answer((2, np.zeros(2, bool))),
    "no flag": _answer((3, None)),
    "no info": _answer((4, None)),
    "a success that is none": _answer((4, {"success": "yes"})),
}
WRONG_RESETS = {
    "an observation alone": np.zeros(3),
    "None": None,
    "five values": _answer(),
    "no info": (np.zeros(3), None),
    "a number": (0.0, {}),
    "one entry": (np.zeros(1), {}),
    "too many entries": (np.zeros(4), {}),
    "words": (np.array(["a", "b", "c"]), {}),
}


def checked(wrappers):
    tasks = WrappedTasks(Counters(), wrappers)
    env = tasks.make(tasks.train_tasks[2])
    return env.unwrapped, CheckedEnv(env, tasks.train_tasks[2])


def one_line(error):
    text = str(error.value)
    return "\n" not in text and text.startswith("task counter 2 of counter: ")


@pytest.mark.parametrize("wrappers", [*([each] for each in EXAMPLES), NOISY], ids=lambda each: each[-1]["name"])
def test_wrong_answers_behind_each_wrapper_are_refused_in_one_line(wrappers):
    for what, answer in WRONG_RESETS.items():
        inner, env = checked(wrappers)
        inner.reset = lambda answer=answer, **options: answer
        with pytest.raises(UserError, match="reset returned") as error:
            env.reset(0)
        assert one_line(error), what
    for what, answer in WRONG_STEPS.items():
        inner, env = checked(wrappers)
        for _ in range(2):  # not in the first episode alone
            env.reset(0)
            env.step(np.zeros(2))
        inner.step = lambda action, answer=answer: answer
        with pytest.raises(UserError, match="step returned") as error:
            env.step(np.zeros(2))
        assert one_line(error), what


def test_lists_are_observations_behind_wrappers_too():
    inner, env = checked([EXAMPLES[1], EXAMPLES[5]])
    inner.reset = lambda **options: ([1, 2, 3], {})
    assert env.reset(0).shape == (2,)


class GoalEnv(gymnasium.Env):
    observation_space = Dict({"state": Box(-1.0, 1.0, (2,)), "desired_goal": Box(-1.0, 1.0, (1,))})
    action_space = Box(-1.0, 1.0, (1,))

    def __init__(self, task):
        self.observation = {"state": np.ones(2), "desired_goal": np.ones(1)}

    def reset(self, *, seed=None, options=None):
        return self.observation, {}

    def step(self, action):
        return self.observation, 1.0, False, False, {}


@pytest.mark.parametrize(
    "observation",
    [
        {"desired_goal": np.ones(1)},
        {"state": np.ones(2)},
        {"state": np.ones(1), "desired_goal": np.ones(1)},
        np.ones(3),
    ],
)
def test_wrong_dictionaries_are_refused_in_every_episode(observation):
    tasks = WrappedTasks(Counters(kind=GoalEnv), [{"name": "hide_entries", "names": ["desired_goal"]}])
    env = tasks.make(tasks.train_tasks[2])
    border = CheckedEnv(env, tasks.train_tasks[2])
    for _ in range(3):
        assert border.reset(0).tolist() == [1, 1]
    env.unwrapped.observation = observation
    for move in (border.reset, lambda: border.step(np.zeros(1))):
        with pytest.raises(UserError, match=r"returned observation .*; expected one of Dict") as error:
            move()
        assert one_line(error)


class NoSpaces(gymnasium.Env):
    def __init__(self, task):
        pass


@pytest.mark.parametrize("kind", [NoSpaces, lambda task: {}, lambda task: None])
def test_what_is_no_environment_is_refused(kind):
    tasks = WrappedTasks(Counters(kind=kind), [FRAMES])
    with pytest.raises(UserError, match=r"^task counter 0 of counter: make returned .*; expected a gymnasium.Env with"):
        tasks.make(tasks.train_tasks[0])


def test_spaces_that_a_wrapper_does_not_support_name_the_task():
    with pytest.raises(UserError, match=r"^task counter 0 of counter: frame_stack: observation space is Dict"):
        env_spaces(WrappedTasks(Counters(kind=GoalEnv), [FRAMES]))


def test_a_task_that_was_given_to_an_environment_is_named_in_messages():
    tasks = WrappedTasks(Counters(), [FRAMES])
    env = tasks.make(tasks.train_tasks[0])
    tasks.retarget(env, tasks.train_tasks[3])
    env.unwrapped.reset = lambda **options: None
    with pytest.raises(UserError, match=r"^task counter 3 of counter: reset returned None"):
        env.reset()
    assert isinstance(env.env.env, Checked)


# Mistakes with tasks


def test_wrappers_are_not_added_twice_nor_outside_of_a_stage_id():
    wrapped = WrappedTasks(Counters(), [FRAMES])
    with pytest.raises(ValueError, match="already has an option wrappers or unwrapped_horizon; list all wrappers once"):
        _ = WrappedTasks(wrapped, [REPEAT]).train_tasks
    with pytest.raises(ValueError, match="has a stage id, which is outside of wrappers; add it last"):
        _ = WrappedTasks(StageIdTasks(Counters(), 0, 2), [REPEAT]).test_tasks
    unlimited = dataclasses.replace(Counters().train_tasks[0], options=())
    with pytest.raises(ValueError, match="task option horizon is None; expected a number of steps"):
        _ = WrappedTasks(WithoutExtras([unlimited], []), [REPEAT]).train_tasks
    with pytest.raises(ValueError, match="unknown wrapper 'frames': did you mean 'frame_stack'"):
        distribution("navigation", wrappers=[{"name": "frames"}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wrappers": "[]"}, "task option unwrapped_horizon is None"),
        ({"wrappers": "[]", "unwrapped_horizon": 0}, "task option unwrapped_horizon is 0"),
        ({"unwrapped_horizon": 3}, "task option wrappers is 'None'"),
        ({"unwrapped_horizon": 3, "wrappers": "["}, r"task option wrappers is '\[': Invalid JSON"),
        ({"unwrapped_horizon": 3, "wrappers": '[{"name":"x"}]'}, "task option wrappers is .*expected a JSON list"),
        ({"unwrapped_horizon": 3, "wrappers": '[{"name":"frame_stack"}]'}, "Field required; expected a JSON list"),
    ],
)
def test_invalid_wrappers_of_a_task_are_refused(options, message):
    task = Task("navigation", "goals", "train", "goals", 0, 0, {"horizon": 3, **options})
    with pytest.raises(ValueError, match=message) as error:
        metarl.envs.make(task)
    assert "\n" not in str(error.value)
