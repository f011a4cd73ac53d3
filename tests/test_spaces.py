"""The border: spaces that agents can have, actions that fit, and each irregularity of an environment in a line."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from metarl.collect import run_episode
from metarl.envs import custom
from metarl.envs.vector.serial import SerialEnvs, make_envs
from metarl.errors import PhysicsDivergedError, UserError
from metarl.spaces import CheckedEnv, Spaces

BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)
ONE = np.ones(1, bool)


class Robot(gymnasium.Env):
    """Right in everything, but for what `wrong` says."""

    observation_space, action_space = BOX, BOX

    def __init__(self, task=None, wrong="", **changes):
        self.task, self.wrong = task, wrong
        vars(self).update(changes)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.elapsed, self.buffer = 0, np.zeros(2, np.float32)
        if self.wrong == "reset":
            return self.buffer
        return (np.zeros(1, np.float32) if self.wrong == "shape at reset" else self.buffer), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.elapsed += 1
        self.buffer += 1.0
        observation, reward, ended, cut, info = self.buffer, 1.0, self.elapsed == 3, False, {}
        match self.wrong:
            case "four values":
                return observation, reward, ended, info
            case "shape":
                observation = np.zeros(1, np.float32)
            case "words":
                observation = ["a", "b"]
            case "no reward":
                reward = None
            case "two rewards":
                reward = np.zeros(2)
            case "flag":
                ended = "yes"
            case "info":
                info = None
            case "success":
                info = {"success": 37}
            case "arithmetic":
                raise FloatingPointError("divide by zero")
            case "array reward":
                reward = np.array([[1.0]])
            case "numpy flag":
                ended, info = np.array([ended]), {"success": np.array([True])}
        return observation, reward, ended, cut, info


REFUSED = {
    "reset": r"reset returned of shape \(2,\).*; expected \(observation, info\)",
    "shape at reset": r"reset returned an observation of shape \(1,\).*; its space says shape \(2,\)",
    "four values": r"step returned 4 values .*; expected \(observation, reward, terminated, truncated, info\)",
    "shape": r"step returned an observation of shape \(1,\)",
    "words": "step returned an observation",
    "no reward": "step returned reward None; expected a number",
    "two rewards": r"step returned reward of shape \(2,\)",
    "flag": "step returned terminated 'yes'; expected True or False",
    "info": "step returned info None; expected a dict",
    "success": r'step returned info\["success"\] 37; expected 0, 1, True or False',
    "arithmetic": r"step raised FloatingPointError \(divide by zero\)",
}


def tasks_of(wrong="", **changes):
    def make(task):
        return Robot(task, wrong, **changes)

    return custom("robot", make, num_train=2, num_test=1, horizon=4)


def live(envs, tasks, action=0.5):
    """One episode of one environment."""
    observations = [envs.reset(tasks, np.zeros(len(tasks), np.uint32)).copy()]
    rows, size = slice(0, len(tasks)), envs.spaces.action_size
    for _ in range(3):
        envs.step_async(rows, np.full((len(tasks), size), action, np.float32), np.ones(len(tasks), bool))
        step = envs.step_wait(rows)
        observations.append(step.observations.copy())
    return np.array(observations), step


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_an_environment_returns_wrongly_is_said_in_a_line(wrong):
    tasks = tasks_of(wrong)
    envs = SerialEnvs(tasks, 2)
    with pytest.raises(UserError, match="^task robot 0 of robot: " + REFUSED[wrong]) as caught:
        live(envs, tasks.train_tasks[:1])
    assert "\n" not in str(caught.value)


def four_values(task):
    return Robot(task, "four values")


def test_a_worker_says_it_in_the_same_line():
    tasks = custom("robot", four_values, num_train=2, num_test=1, horizon=4)
    envs = make_envs(tasks, 2, num_workers=1)
    with pytest.raises(UserError, match=r"^task robot 0 of robot: step returned 4 values"):
        live(envs, tasks.train_tasks)
    envs.close()


@pytest.mark.parametrize("wrong", ["", "array reward", "numpy flag"])
def test_arrays_of_one_element_are_numbers(wrong):
    tasks = tasks_of(wrong)
    observations, step = live(SerialEnvs(tasks, 1), tasks.train_tasks[:1])
    assert observations[:, 0].tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert step.rewards.tolist() == [1.0] and step.terminated.tolist() == [True]
    np.testing.assert_array_equal(step.success, [1.0 if wrong == "numpy flag" else np.nan])


def test_what_is_recorded_is_copied():
    """An environment may change its own arrays in place, and so may who chooses the action."""
    env, action = CheckedEnv(Robot()), np.zeros(2, np.float32)

    def choose(observation, reward, start):
        action[:] = observation[0] / 10
        return action

    steps = list(run_episode(env, choose))
    assert [step.observation.tolist() for step in steps] == [[0, 0], [1, 1], [2, 2]]
    np.testing.assert_allclose([step.action for step in steps], [[0, 0], [0.1, 0.1], [0.2, 0.2]], rtol=1e-6)


def test_an_episode_whose_physics_diverged_is_no_mistake():
    class Flying(Robot):
        def step(self, action):
            raise PhysicsDivergedError("gone")

    tasks = custom("robot", Flying, num_train=1, num_test=1, horizon=4)
    envs = SerialEnvs(tasks, 1)
    envs.reset(tasks.train_tasks, np.zeros(1, np.uint32))
    envs.step_async(slice(0, 1), np.zeros((1, 2), np.float32), ONE)
    assert np.isnan(envs.step_wait(slice(0, 1)).rewards).all()


# Spaces


@pytest.mark.parametrize(
    ("action_space", "message"),
    [
        (spaces.Box(0, 3, (2,), np.int64), "of whole numbers; use Discrete or MultiDiscrete"),
        (spaces.Box(0.0, np.inf, (2,)), "expected finite bounds"),
        (spaces.Box(np.array([0.0, 1.0]), np.array([1.0, 1.0]), dtype=np.float64), "low 1 and high 1 in entry 1"),
        (spaces.Box(0.0, 1.0, (2, 2)), "expected a one-dimensional Box, Discrete or MultiDiscrete"),
        (spaces.Dict(a=BOX), "expected a one-dimensional Box, Discrete or MultiDiscrete"),
        (spaces.MultiDiscrete([[2, 2]]), "expected one dimension: flatten it"),
    ],
)
def test_action_spaces_that_agents_cannot_have(action_space, message):
    with pytest.raises(UserError, match=message):
        Spaces.of(BOX, action_space)


def test_observation_spaces_that_agents_cannot_have():
    with pytest.raises(UserError, match="no entries; expected at least one"):
        Spaces.of(spaces.Box(-1.0, 1.0, (0,)), BOX)
    with pytest.raises(UserError, match="an image in camera, beside other parts"):
        Spaces.of(spaces.Dict(camera=spaces.Box(0, 255, (4, 4, 3), np.uint8), arm=BOX), BOX)
    with pytest.raises(UserError, match=r"observation space is Text.*expected Box, Discrete"):
        Spaces.of(spaces.Text(3), BOX)


def test_policy_units_by_hand():
    # −2..4: middle 1, half width 3. 0..1: middle 0.5, half width 0.5.
    box = Spaces(1, (-2.0, 0.0), (4.0, 1.0))
    actions = np.array([[0.0, 0.0], [1.0, -1.0], [0.5, 0.25], [-7.0, 2.0]])
    expected = [[1.0, 0.5], [4.0, 0.0], [2.5, 0.625], [-20.0, 1.5]]
    np.testing.assert_allclose(box.to_env(actions, clip=False), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(box.to_env(actions)[-1], [-2.0, 1.0])
    np.testing.assert_allclose(box.to_policy(expected), actions, rtol=0, atol=1e-12)
    choices = Spaces.of(BOX, spaces.MultiDiscrete([3, 2], start=[-1, 5]))
    assert choices.choices == (3, 2) and choices.to_env([[0, 0], [2, 1]]).tolist() == [[-1, 5], [1, 6]]
    assert choices.to_policy([[1, 6]]).tolist() == [[2, 1]]


def test_tasks_with_other_bounds_are_sent_actions_within_their_own():
    received = {}

    class Actuator(Robot):
        def __init__(self, task):
            super().__init__(task)
            limit = np.float64(0.1 + task.index)
            self.action_space = spaces.Box(-limit, limit, (2,), np.float64)

        def step(self, action):
            received[self.task.index] = action
            return super().step(action)

    tasks = custom("robot", Actuator, num_train=2, num_test=1, horizon=4)
    live(SerialEnvs(tasks, 2), tasks.train_tasks, action=7.0)
    assert received[0].tolist() == [0.1, 0.1] and received[1].tolist() == [1.1, 1.1]


def test_a_task_with_other_sizes_is_named():
    def make(task):
        return Robot(task, action_space=spaces.Box(-1.0, 1.0, (2 + task.index,), np.float32))

    tasks = custom("robot", make, num_train=2, num_test=1, horizon=4)
    with pytest.raises(UserError, match=r"^task robot 1 of robot: .*shape \(3,\); the first task has \(2,\)"):
        SerialEnvs(tasks, 2).reset(tasks.train_tasks, np.zeros(2, np.uint32))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(low=st.floats(-1e6, 1e6), width=st.floats(1e-3, 1e6), action=st.floats(-3, 3, width=32))
@settings(max_examples=60)
def test_actions_lie_in_the_space_and_have_its_dtype(dtype, low, width, action):
    space = spaces.Box(np.array([low]), np.array([low + width]), dtype=dtype)
    if not space.low < space.high:
        return
    sent = CheckedEnv(Robot(action_space=space)).env_action(np.array([action], np.float32))
    assert sent.dtype == dtype and space.contains(sent)


WRONG = st.sampled_from(["", *REFUSED])
OBSERVATIONS = st.sampled_from(
    [
        BOX,
        spaces.Discrete(3),
        spaces.Dict(a=BOX, b=spaces.Discrete(2)),
        spaces.Box(0, 9, (2,), np.int32),
        spaces.Text(2),
    ]
)
ACTIONS = st.sampled_from(
    [
        BOX,
        spaces.Discrete(3),
        spaces.MultiDiscrete([2, 3]),
        spaces.Box(0, 1, (1,), np.int8),
        spaces.Box(0, np.inf, (1,)),
    ]
)


@given(observation_space=OBSERVATIONS, action_space=ACTIONS, wrong=WRONG)
@settings(max_examples=150)
def test_an_environment_is_right_or_refused_in_words(observation_space, action_space, wrong):
    class Sampled(Robot):
        def reset(self, **arguments):
            answer = super().reset(**arguments)
            sound = isinstance(answer, tuple) and len(answer[0]) == 2
            return (self.observation_space.sample(), {}) if sound else answer

        def step(self, action):
            answer = super().step(action)
            sound = answer[0] is self.buffer
            return (self.observation_space.sample(), *answer[1:]) if sound else answer

    tasks = custom(
        "robot",
        lambda task: Sampled(task, wrong, observation_space=observation_space, action_space=action_space),
        num_train=1,
        num_test=1,
        horizon=4,
    )
    usable = not isinstance(observation_space, spaces.Text) and action_space not in (
        spaces.Box(0, 1, (1,), np.int8),
        spaces.Box(0, np.inf, (1,)),
    )
    try:
        envs = SerialEnvs(tasks, 1)
        _, step = live(envs, tasks.train_tasks, action=1.0)
    except UserError as error:
        assert ("\n" not in str(error) and "expected" in str(error)) or wrong or not usable
    else:
        assert usable and not wrong
        assert step.rewards.tolist() == [1.0]
