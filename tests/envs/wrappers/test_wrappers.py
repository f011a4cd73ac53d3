"""Each wrapper by numbers worked out by hand, its spaces, and what it refuses."""

import warnings
import zlib

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
from gymnasium.utils.env_checker import check_env
from pydantic import ValidationError

from metarl.envs.wrappers import WRAPPERS, describe_wrappers, parse_wrappers, wrap
from metarl.envs.wrappers.action_delay import ActionDelay
from metarl.envs.wrappers.action_noise import ActionNoise
from metarl.envs.wrappers.action_repeat import ActionRepeat
from metarl.envs.wrappers.frame_stack import FrameStack
from metarl.envs.wrappers.hide_entries import HideEntries
from metarl.envs.wrappers.observation_noise import ObservationNoise
from metarl.envs.wrappers.reward_scale import RewardScale
from metarl.envs.wrappers.time_limit import TimeLimit
from metarl.errors import UserError
from metarl.spaces import CheckedEnv, env_attribute
from tests.envs.wrappers.counter import CENTRE, Counter, env, rows

EXAMPLES = [
    {"name": "frame_stack", "frames": 3},
    {"name": "observation_noise", "std": 0.5},
    {"name": "action_noise", "std": 0.25},
    {"name": "action_delay", "steps": 2},
    {"name": "action_repeat", "times": 3},
    {"name": "hide_entries", "names": ["first"]},
    {"name": "reward_scale", "factor": 0.5},
    {"name": "time_limit", "steps": 2},
]


class Bare(gymnasium.Env):
    """Has the given spaces, and returns the given observation."""

    def __init__(self, observation_space=None, action_space=None, observation=None):
        self.observation_space = observation_space or Box(-1.0, 1.0, (2,))
        self.action_space, self.observation = action_space or Box(-1.0, 1.0, (1,)), observation

    def reset(self, *, seed=None, options=None):
        return self.observation, {}

    def step(self, action):
        return self.observation, 1.0, False, False, {}


def stream(name, position, seed):
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(zlib.crc32(name.encode()), position)))


def test_there_is_an_example_of_each():
    assert [example["name"] for example in EXAMPLES] == list(WRAPPERS)


@pytest.mark.parametrize("settings", EXAMPLES, ids=lambda settings: settings["name"])
def test_each_passes_the_environment_checker_and_passes_the_rest_through(settings):
    inner = env()
    wrapped = wrap(inner, parse_wrappers([settings]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is wrapped, has no spec, and observes a space without bounds
        check_env(wrapped, skip_render_check=True)
    assert wrapped.unwrapped is inner and wrapped.action_space == inner.action_space
    assert wrapped.reset(options={})[1] == {"index": 0}
    assert wrapped.render() == "step 0" and wrapped.render_mode == "ansi"
    wrapped.close()
    assert inner.closed == 1
    names = env_attribute(wrapped, "observation_names")
    assert len(names) == wrapped.observation_space.shape[0] == CheckedEnv(wrapped).spaces.observation_size


@pytest.mark.parametrize("settings", EXAMPLES, ids=lambda settings: settings["name"])
def test_each_is_a_function_of_the_seed_of_the_reset(settings):
    first, second = (wrap(env(), parse_wrappers([settings])) for _ in range(2))
    rows(second, [0.5, 1.0], seed=1)  # earlier episodes have no effect
    actions = [[0.5, 1.0], [-0.5, 3.0], [0.0, 0.0]]
    np.testing.assert_array_equal(rows(first, *actions), rows(second, *actions))


# Observations


def test_frames_are_the_last_observations_oldest_first():
    wrapped = FrameStack(env(shares=True), frames=3)
    assert rows(wrapped, [0.5, 1.0], [-0.5, 3.0], [0.0, 4.0]).tolist() == [
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 0.5, 1],
        [0, 0, 0, 1, 0.5, 1, 2, -0.5, 3],
        [1, 0.5, 1, 2, -0.5, 3, 3, 0, 4],
    ]
    assert rows(wrapped).tolist() == [[0] * 9]  # the episode before is forgotten
    assert wrapped.observation_space == Box(-100.0, 100.0, (9,), np.float64)
    assert wrapped.observation_names[:4] == ("elapsed_t-2", "first_t-2", "second_t-2", "elapsed_t-1")
    assert wrapped.observation_names[6:] == Counter.observation_names


def test_images_are_stacked_along_their_channels():
    image = np.array([[[1, 2], [3, 4]]], np.uint8)  # [1, 2, 2]
    inner = Bare(Box(0, 255, (1, 2, 2), np.uint8), observation=image)
    wrapped = FrameStack(inner, frames=2)
    assert wrapped.observation_space == Box(0, 255, (1, 2, 4), np.uint8)
    assert wrapped.reset()[0].tolist() == [[[1, 2, 1, 2], [3, 4, 3, 4]]]
    inner.observation = image + np.uint8(4)
    observation = wrapped.step(0)[0]
    assert observation.tolist() == [[[1, 2, 5, 6], [3, 4, 7, 8]]] and observation.dtype == np.uint8
    assert CheckedEnv(wrapped).spaces.image == (1, 2, 4)


def test_observation_noise_is_white_with_the_given_standard_deviation():
    wrapped = ObservationNoise(env(), std=0.5, position=2)
    noise = 0.5 * stream("observation_noise", 2, seed=3).standard_normal((3, 3))
    exact = np.array([[0, 0, 0], [1, 0.5, 1], [2, -0.5, 3]])
    np.testing.assert_array_equal(rows(wrapped, [0.5, 1], [-0.5, 3]), exact + noise)
    many = np.concatenate([rows(wrapped, *[[0, 0]] * 99, seed=seed)[:, 1:] for seed in range(20)])  # 4000 numbers
    assert abs(many.mean()) < 0.03 and abs(many.std() - 0.5) < 0.02  # standard errors 0.008 and 0.006
    assert wrapped.observation_space == Box(-np.inf, np.inf, (3,), np.float64)


def test_observation_noise_keeps_the_dtype():
    wrapped = ObservationNoise(Bare(observation=np.zeros(2, np.float32)), std=1.0)
    assert wrapped.observation_space == Box(-np.inf, np.inf, (2,), np.float32)
    assert wrapped.reset(seed=0)[0].dtype == wrapped.step(0)[0].dtype == np.float32


def test_noise_differs_between_seeds_positions_wrappers_and_episodes_without_a_seed():
    first, second = (ObservationNoise(env(), std=1.0, position=position) for position in (0, 1))
    acted = ActionNoise(env(), std=1.0)
    acted.reset(seed=3)
    drawn = [rows(first), rows(first, seed=4), rows(second), first.reset()[0], first.reset()[0]]
    drawn.append(acted.step(np.zeros(2))[0][1:])
    assert len({float(np.ravel(each)[0]) for each in drawn}) == len(drawn)
    noisy = wrap(env(), parse_wrappers([EXAMPLES[1], EXAMPLES[1]]))
    expected = sum(0.5 * stream("observation_noise", position, 3).standard_normal(3) for position in (0, 1))
    np.testing.assert_allclose(rows(noisy)[0], expected, rtol=1e-15)


def test_hidden_entries_of_a_vector_are_removed():
    for names in (["first"], [1], [1, "first"]):
        wrapped = HideEntries(env(), names=names)
        assert rows(wrapped, [0.5, 1.0]).tolist() == [[0, 0], [1, 1]]
        assert wrapped.observation_space == Box(-100.0, 100.0, (2,), np.float64)
        assert wrapped.observation_names == ("elapsed", "second")
    space = Box(np.float32([-1, -2]), np.float32([1, 2]))
    wrapped = HideEntries(Bare(space, observation=np.float32([5, 6])), names=[0])
    assert wrapped.observation_space == Box(-2.0, 2.0, (1,)) and wrapped.step(0)[0].tolist() == [6]
    assert env_attribute(wrapped, "observation_names") is None


def test_hidden_keys_of_a_dictionary_are_removed():
    space = Dict(
        {"observation": Box(-1.0, 1.0, (2,)), "desired_goal": Box(-1.0, 1.0, (3,)), "pixels": Box(0, 1, (9, 9))}
    )
    goal_env = Bare(space, observation={"observation": np.ones(2), "desired_goal": np.ones(3), "pixels": np.ones(81)})
    wrapped = HideEntries(goal_env, names=["desired_goal", "pixels"])
    assert wrapped.observation_space == Dict({"observation": Box(-1.0, 1.0, (2,))})
    assert list(wrapped.reset()[0]) == list(wrapped.step(0)[0]) == ["observation"]
    assert CheckedEnv(wrapped).reset().tolist() == [1.0, 1.0]


# Actions


def test_action_noise_is_a_fraction_of_half_the_range_and_is_clipped():
    wrapped = ActionNoise(env(), std=0.25, position=1)
    noise = 0.25 * stream("action_noise", 1, seed=3).standard_normal((3, 2)) * [1, 2]
    expected = np.clip(np.array([[0, 2], [-1, 4], [1, 0]]) + noise, [-1, 0], [1, 4])
    taken = rows(wrapped, [0, 2], [-1, 4], [1, 0])[1:, 1:]
    np.testing.assert_allclose(taken, expected, atol=1e-6)
    assert (noise[1] * [-1, 1] > 0).any() and (taken[0] != [0, 2]).all()  # one was clipped, others moved
    quiet = ActionNoise(env(), std=0.0)
    assert rows(quiet, [0.5, 1.0])[1].tolist() == [1, 0.5, 1]
    received = []
    inner = Bare()
    inner.step = lambda action: received.append(action) or (None, 0.0, False, False, {})
    loud = ActionNoise(inner, std=100.0)
    loud.reset(seed=0)
    for _ in range(20):
        loud.step(np.zeros(1, np.float32))
    assert all(action.dtype == np.float32 and inner.action_space.contains(action) for action in received)


def test_actions_take_effect_later_and_the_centre_comes_first():
    wrapped = ActionDelay(env(), steps=2)
    chosen = [[0.5, 1.0], [-0.5, 3.0], [0.0, 4.0], [1.0, 0.0]]
    assert rows(wrapped, *chosen)[1:, 1:].tolist() == [CENTRE, CENTRE, [0.5, 1.0], [-0.5, 3.0]]
    assert rows(wrapped, *chosen)[1:, 1:].tolist()[:2] == [CENTRE, CENTRE]  # the episode before is forgotten
    assert rows(ActionDelay(env(), steps=0), [0.5, 1.0])[1].tolist() == [1, 0.5, 1]


def test_a_delayed_action_is_a_copy():
    wrapped, action = ActionDelay(env(), steps=1), np.array([0.5, 1.0], np.float32)
    wrapped.reset()
    wrapped.step(action)
    action[:] = 0
    assert wrapped.step(action)[0].tolist() == [2, 0.5, 1]


def test_actions_are_repeated_and_rewards_are_summed():
    wrapped = ActionRepeat(env(), times=3)
    wrapped.reset()
    observation, reward, terminated, truncated, info = wrapped.step(np.array([0.5, 1.0]))
    assert observation.tolist() == [3, 0.5, 1] and reward == 1 + 2 + 3
    assert (terminated, truncated, info) == (False, False, {"success": 1.0})  # solved at step 2, not at step 3
    assert wrapped.step(np.zeros(2))[1] == 4 + 5 + 6
    assert wrapped.step(np.zeros(2))[4] == {"success": 0.0}
    assert wrapped.dt == pytest.approx(0.3) and wrapped.metadata["render_fps"] == pytest.approx(10 / 3)


def test_repeating_stops_where_the_episode_ends():
    wrapped = ActionRepeat(env(ends_at=5), times=3)
    wrapped.reset()
    wrapped.step(np.zeros(2))
    assert wrapped.step(np.zeros(2))[1:4] == (4 + 5, True, False)
    wrapped = ActionRepeat(TimeLimit(env(), steps=4), times=3)
    wrapped.reset()
    wrapped.step(np.zeros(2))
    assert wrapped.step(np.zeros(2))[1:4] == (4, False, True)


def test_success_that_is_not_defined_stays_so_when_actions_are_repeated():
    inner = Bare()
    for answers, expected in (
        ([{"success": np.nan}, {"success": np.array([1])}], 1.0),
        ([{"success": 1}, {}], 1.0),
        ([{"success": np.nan}, {"success": np.nan}], None),
    ):
        infos = iter(answers)
        inner.step = lambda action, infos=infos: (None, 0.0, False, False, next(infos))
        success = ActionRepeat(inner, times=2).step(0)[4]["success"]
        assert success == expected or (expected is None and np.isnan(success))
    assert ActionRepeat(Bare(), times=2).step(0)[4] == {}


# Rewards and ends


def test_rewards_are_scaled():
    wrapped = RewardScale(env(), factor=0.5)
    wrapped.reset()
    assert [wrapped.step(np.zeros(2))[1] for _ in range(3)] == [0.5, 1.0, 1.5]


def test_episodes_are_truncated_after_some_steps():
    wrapped = TimeLimit(env(), steps=2)
    for _ in range(2):
        wrapped.reset()
        assert [wrapped.step(np.zeros(2))[2:4] for _ in range(2)] == [(False, False), (False, True)]
    wrapped = TimeLimit(env(ends_at=2), steps=2)
    wrapped.reset()
    assert [wrapped.step(np.zeros(2))[2:4] for _ in range(2)] == [(False, False), (True, False)]


def test_the_first_of_the_list_is_the_innermost():
    stacked, noisy = EXAMPLES[0], EXAMPLES[1]
    frames_of_noise = rows(wrap(env(), parse_wrappers([noisy, stacked])), [0, 0])
    np.testing.assert_array_equal(frames_of_noise[1][3:6], frames_of_noise[0][6:9])  # the noisy observation comes again
    noise_on_frames = rows(wrap(env(), parse_wrappers([stacked, noisy])), [0, 0])
    assert (noise_on_frames[1][3:6] != noise_on_frames[0][6:9]).all()


# Mistakes


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FrameStack(Bare(Dict({"a": Box(0, 1, (2,))})), 2), "observation space is Dict with a; expected a vec"),
        (
            lambda: FrameStack(Bare(Box(0, 1, (2, 2))), 2),
            r"observation space is Box \(2, 2\) of float32; expected a vec",
        ),
        (lambda: FrameStack(Bare(Discrete(3)), 2), "observation space is Discrete; expected a vector"),
        (lambda: ObservationNoise(Bare(Box(0, 255, (2, 2, 3), np.uint8)), 1.0), "of uint8; expected a Box of floats"),
        (lambda: ObservationNoise(Bare(Discrete(3)), 1.0), "observation space is Discrete; expected a Box of floats"),
        (lambda: ActionNoise(Bare(None, Discrete(3)), 1.0), "action_noise: action space is Discrete; expected a Box"),
        (lambda: ActionNoise(Bare(None, Box(-np.inf, 1, (2,))), 1.0), "with infinite bounds; expected finite ones"),
        (
            lambda: ActionDelay(Bare(None, MultiDiscrete([2])), 1),
            "action_delay: action space is MultiDiscrete; expected",
        ),
        (lambda: ActionDelay(Bare(None, Box(-1, 1, (2,), np.int64)), 1), "of int64; expected a Box of floats"),
        (lambda: HideEntries(env(), ["elapsd"]), "there is no entry 'elapsd'; did you mean 'elapsed'?"),
        (lambda: HideEntries(env(), ["xyz"]), "there is no entry 'xyz'; expected one of elapsed, first, second"),
        (lambda: HideEntries(env(), [3]), "there is no entry 3; expected 0 to 2"),
        (lambda: HideEntries(env(), [-1]), "there is no entry -1; expected 0 to 2"),
        (lambda: HideEntries(env(), [0, 1, "second"]), "names hides every entry"),
        (lambda: HideEntries(Bare(), ["x"]), "does not name its entries; give the index of 'x'"),
        (lambda: HideEntries(Bare(Dict({"a": Box(0, 1, (2,))})), ["a"]), "names hides every entry"),
        (lambda: HideEntries(Bare(Dict({"a": Box(0, 1, (2,))})), [0]), "there is no entry 0; expected one of a"),
        (lambda: HideEntries(Bare(Box(0, 255, (2, 2, 3), np.uint8)), [0]), "expected a Dict or a vector"),
    ],
)
def test_spaces_that_a_wrapper_does_not_support_are_refused_in_one_line(build, message):
    with pytest.raises(UserError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


def test_names_that_do_not_fit_the_observation_are_refused():
    inner = env()
    inner.observation_names = ("a", "b")
    with pytest.raises(UserError, match="names 2 entries of its observations, which have 3"):
        HideEntries(inner, [0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "frame_stak", "frames": 2}, "unknown wrapper 'frame_stak': did you mean 'frame_stack'?"),
        ({"name": "frame_stack"}, "frames\n  Field required"),
        ({"name": "frame_stack", "frames": 0}, "greater than or equal to 1"),
        ({"name": "observation_noise", "std": -0.1}, "greater than or equal to 0"),
        ({"name": "action_noise", "std": float("nan")}, "finite"),
        ({"name": "action_delay", "steps": -1}, "greater than or equal to 0"),
        ({"name": "action_repeat", "times": 0}, "greater than or equal to 1"),
        ({"name": "hide_entries", "names": []}, "at least 1 item"),
        ({"name": "reward_scale", "factor": 0}, "greater than 0"),
        ({"name": "time_limit", "steps": 0}, "greater than or equal to 1"),
        ({"name": "time_limit", "horizon": 5}, "horizon\n  Extra inputs"),
        ({"frames": 2}, "Unable to extract tag"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        parse_wrappers([settings])


def test_settings_are_frozen_and_described():
    wrappers = parse_wrappers([EXAMPLES[0], {"name": "hide_entries", "names": [0, "first"]}])
    assert describe_wrappers(wrappers) == "frame_stack frames 3, hide_entries names 0 first"
    with pytest.raises(ValidationError):
        wrappers[0].frames = 2
    assert parse_wrappers(wrappers) == wrappers
