"""The guard rails of a control loop, on a policy whose every action is known; and that a robot needs nothing else."""

import contextlib
import subprocess
import sys
import threading

import numpy as np
import pytest

from metarl.runtime import ControlLoop

MODULES = ("torch", "gymnasium", "mujoco", "metaworld", "pydantic", "stable_baselines3")


class Counting:
    """Acts by what it remembers: the sum of all that it has observed; records its rewards and starts."""

    observation_size, action_size = 2, 1
    action_low, action_high = np.array([-100.0]), np.array([100.0])

    def __init__(self, scale=1.0, action=None):
        self.scale, self.action, self.calls = scale, action, []

    def reset(self):
        return np.zeros((1, 1), np.float32)

    def predict(self, observation, state, episode_start, deterministic, reward):
        self.calls.append((bool(episode_start[0]), reward, deterministic))
        state = state + observation.sum()
        return (self.scale * state[0] if self.action is None else self.action), state


ONE = np.array([1.0, 0.0])


def test_memory_and_rewards_are_carried_from_tick_to_tick():
    policy = Counting()
    loop = ControlLoop(policy, safe_action=0.0)
    assert [float(loop.step(ONE, reward)[0]) for reward in (None, 0.5, -1.0)] == [1.0, 2.0, 3.0]
    loop.begin_episode()
    assert float(loop.step(ONE)[0]) == 4.0  # the memory lives on
    loop.begin_trial()
    assert float(loop.step(ONE)[0]) == 1.0
    assert policy.calls == [
        (True, None, True),
        (False, 0.5, True),
        (False, -1.0, True),
        (True, None, True),
        (True, None, True),
    ]
    assert (loop.counts.ticks, loop.counts.faults) == (5, 0)


@pytest.mark.parametrize(
    ("observation", "reason"),
    [
        ([np.nan, 0.0], "ValueError: entry 0 of the observation is not finite"),
        ([0.0, 7.0], "entry 1 of the observation is 7, out of its range"),
        ([0.0, -7.0], "entry 1 of the observation is -7, out of its range"),
        ([0.0, 0.0, 0.0], r"observation has shape (3,); expected (2,)"),
    ],
)
def test_a_fault_holds_the_last_action_and_leaves_the_memory_alone(observation, reason):
    loop = ControlLoop(Counting(), safe_action=-9.0, observation_low=-5.0, observation_high=5.0)
    assert float(loop.step(observation)[0]) == -9.0  # there is nothing to hold yet
    assert float(loop.step(ONE)[0]) == 1.0
    assert float(loop.step(observation)[0]) == 1.0
    assert float(loop.step(ONE)[0]) == 2.0  # not 3: what was not believed is not remembered
    assert (loop.counts.ticks, loop.counts.faults) == (4, 2) and reason in loop.last_fault


def test_a_nan_is_a_fault_without_ranges():
    policy = Counting()
    loop = ControlLoop(policy, safe_action=0.0)
    loop.step(ONE)
    loop.step([0.0, np.nan])
    assert loop.counts.faults == 1 and loop.last_fault == "ValueError: entry 1 of the observation is not finite"
    assert len(policy.calls) == 1  # it was not even asked


def test_the_last_action_is_held_for_so_many_faults_in_a_row():
    loop = ControlLoop(Counting(), safe_action=-9.0, max_held=2)
    broken = [np.nan, 0.0]
    actions = [float(loop.step(each)[0]) for each in (ONE, broken, broken, broken, ONE, broken)]
    assert actions == [1.0, 1.0, 1.0, -9.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("action_names", ["wrist"], "has 'wrist' among its action_names; the loop's has 'elbow'"),
        ("control_period_s", 0.01, "has 0.01 among its control_period_s; the loop's has 0.02"),
    ],
)
def test_a_policy_for_another_robot_does_not_take_over(field, value, message):
    same = {"action_names": ["elbow"], "control_period_s": 0.02}
    policies = [Counting() for _ in range(3)]
    all_metadata = (same, {"action_names": None, "control_period_s": None}, {**same, field: value})
    for policy, metadata in zip(policies, all_metadata, strict=True):
        policy.metadata = metadata
    loop = ControlLoop(policies[0], safe_action=0.0)
    loop.swap(policies[1])  # of which nothing else is known
    with pytest.raises(ValueError, match=message):
        loop.swap(policies[2])
    loop.swap(Counting())  # and so is nothing of one in torch, but for its bounds
    stronger = Counting()
    stronger.action_high = np.array([900.0])
    with pytest.raises(ValueError, match=r"the new policy has action_high \[900.0\]; the loop's has \[100.0\]"):
        loop.swap(stronger)


def test_episodes_begin_by_themselves_at_the_trained_horizon():
    def starts(loop, policy, ticks):
        for _ in range(ticks):
            loop.step(ONE)
        return [number for number, call in enumerate(policy.calls) if call[0]]

    remembering = Counting()
    remembering.metadata = {"trial": {"episodes": 2, "horizon": 3}}
    assert starts(ControlLoop(remembering, safe_action=0.0), remembering, 8) == [0, 3, 6]
    asked = Counting()
    asked.metadata = remembering.metadata
    loop = ControlLoop(asked, safe_action=0.0, episode_ticks=4)
    assert starts(loop, asked, 6) == [0, 4]
    loop.begin_episode()  # by hand: the count begins anew
    assert starts(loop, asked, 6) == [0, 4, 6, 10]
    broken = Counting()
    faulty = ControlLoop(broken, safe_action=0.0, episode_ticks=3)
    for observation in (ONE, ONE, ONE, [np.nan, 0.0], ONE, ONE, ONE):  # the robot's time goes on at a fault
        faulty.step(observation)
    assert [call[0] for call in broken.calls] == [True, False, False, True, False, True]
    loud = Counting()
    raising = ControlLoop(loud, safe_action=0.0, episode_ticks=3, on_fault="raise")
    for observation in (ONE, ONE, [np.nan, 0.0], ONE):
        with contextlib.suppress(ValueError):
            raising.step(observation)
    assert [call[0] for call in loud.calls] == [True, False, True]
    for trial in (None, {"episodes": 2, "horizon": None}):
        endless = Counting()
        endless.metadata = {"trial": trial}
        assert starts(ControlLoop(endless, safe_action=0.0), endless, 8) == [0]
    loop.swap(remembering)
    remembering.calls.clear()
    assert starts(loop, remembering, 9) == [0, 4, 8]  # what was asked for holds for the next one, too


def test_faults_send_the_safe_action_or_raise():
    safe = ControlLoop(Counting(), safe_action=[0.25], on_fault="safe", observation_high=5.0)
    assert [float(safe.step(each)[0]) for each in (ONE, [9.0, 0.0])] == [1.0, 0.25]
    loud = ControlLoop(Counting(), safe_action=0.0, on_fault="raise", observation_high=5.0)
    with pytest.raises(ValueError, match="entry 0 of the observation is 9"):
        loud.step([9.0, 0.0])
    assert (loud.counts.ticks, loud.counts.faults) == (1, 1)


@pytest.mark.parametrize("action", [np.array([np.nan], np.float32), np.array([np.inf], np.float32)])
def test_an_action_that_is_not_finite_is_a_fault(action):
    loop = ControlLoop(Counting(action=action), safe_action=0.5)
    assert float(loop.step(ONE)[0]) == 0.5 and "is not finite" in loop.last_fault


def test_actions_change_by_no_more_than_the_limit():
    policy = Counting()
    loop = ControlLoop(policy, safe_action=0.0, max_change=0.75, on_fault="safe", observation_high=50.0)
    # wanted 1, 1, 1, safe 0; the first one starts from the safe one
    actions = [float(loop.step(each)[0]) for each in ([1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [99.0, 0.0])]
    assert actions == [0.75, 1.0, 1.0, 0.25] and loop.counts.limited == 2


def test_ticks_beyond_the_deadline_are_counted():
    ticks = iter([0.0, 0.010, 1.0, 1.030, 2.0, 2.0201])
    loop = ControlLoop(Counting(), safe_action=0.0, deadline_s=0.020, clock=lambda: next(ticks))
    for _ in range(3):
        loop.step(ONE)
    assert loop.counts.deadline_misses == 2


def test_a_new_policy_takes_over_at_the_next_tick_with_a_memory_of_its_own():
    loop = ControlLoop(Counting(), safe_action=0.0)
    loop.step(ONE)
    new = Counting(scale=10.0)
    loop.swap(Counting(scale=99.0))
    loop.swap(new)  # the last one counts
    assert [float(loop.step(ONE)[0]) for _ in range(2)] == [10.0, 20.0]
    assert new.calls[0] == (True, None, True) and loop.counts.swaps == 1
    other = Counting()
    other.observation_size = 3
    with pytest.raises(ValueError, match=r"sizes \(3, 1\); the loop's has \(2, 1\)"):
        loop.swap(other)


def test_swapping_from_another_thread_never_mixes_two_policies():
    """Policy k acts k, k, …: an action of one with the memory of another would be neither."""

    class Constant(Counting):
        def __init__(self, number):
            super().__init__()
            self.number = number

        def reset(self):
            return np.full((1, 1), self.number, np.float32)

        def predict(self, observation, state, *rest):
            assert state[0, 0] == self.number
            return np.array([self.number], np.float32), state

    loop = ControlLoop(Constant(0), safe_action=-1.0, on_fault="raise")
    enough, swapped = threading.Event(), []

    def swapping():
        while not enough.is_set():
            swapped.append(len(swapped) + 1)
            loop.swap(Constant(swapped[-1]))

    thread = threading.Thread(target=swapping)
    thread.start()
    actions = []
    while len(actions) < 2000 or loop.counts.swaps < 10:
        actions.append(float(loop.step(ONE)[0]))
    enough.set()
    thread.join()
    assert actions == sorted(actions) and float(loop.step(ONE)[0]) == swapped[-1]  # none is lost, none comes back
    assert loop.counts.faults == 0


def test_a_bound_is_a_safe_action():
    policy = Counting()
    policy.action_low, policy.action_high = np.array([-0.1]), np.array([0.1])  # float32 is a little further out
    for bound in (-0.1, 0.1):
        ControlLoop(policy, safe_action=bound)


def test_an_action_is_the_callers_own():
    buffer = np.array([0.5], np.float32)
    loop = ControlLoop(Counting(action=buffer), safe_action=0.0, observation_high=5.0)
    loop.step(ONE)[:] = 77.0
    buffer[:] = 88.0  # a policy may write all its actions to one place
    assert float(loop.step([9.0, 0.0])[0]) == 0.5
    safe = ControlLoop(Counting(), safe_action=0.25, on_fault="safe", observation_high=5.0)
    safe.step([9.0, 0.0])[:] = 77.0
    assert float(safe.step([9.0, 0.0])[0]) == 0.25


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"safe_action": [0.0, 0.0]}, r"safe_action is \[0.0, 0.0\]; expected a number or 1 numbers"),
        ({"safe_action": np.nan}, "safe_action is nan"),
        ({"observation_low": [0.0]}, r"observation_low is \[0.0\]; expected a number or 2 numbers"),
        ({"safe_action": np.inf}, "safe_action is inf; expected within"),
        ({"safe_action": 101.0}, "safe_action is 101.0; expected within"),
        ({"episode_ticks": 0}, "episode_ticks is 0; expected at least 1"),
        (
            {"observation_low": 1.0, "observation_high": [2.0, 0.5]},
            "observation_low is 1.0, above",
        ),
        ({"max_held": -1}, "max_held is -1; expected at least 0"),
        ({"max_change": 0.0}, "max_change is 0.0; expected more than 0"),
        ({"deadline_s": 0.0}, "deadline_s is 0.0; expected more than 0"),
        ({"on_fault": "stop"}, "on_fault is 'stop'; expected hold, safe or raise"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ControlLoop(Counting(), **{"safe_action": 0.0, **settings})


def test_importing_it_imports_nothing_heavy():
    code = f"import sys, metarl.runtime; print([name for name in {MODULES!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
