"""The ids that gymnasium knows metarl's environments by, and what they build."""

import subprocess
import sys
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env

import metarl
from metarl.build import family_names
from metarl.envs import FAMILIES
from metarl.envs.registration import ENVIRONMENTS, register_envs
from metarl.types import Task

MUJOCO, POINTS, REACH = "metarl/HalfCheetahDir-v0", "metarl/NavigationCuedWedges-v0", "metarl/reach-v3"


def fresh(code):
    """Run code in a process of its own; returns what it printed, and nothing else may have been."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def test_every_distribution_and_class_has_an_id():
    benchmarks = {"ML10", "ML25", "ML45"}  # many classes, whose observations do not mean the same
    named = {name: family for name, family in family_names().items() if name not in benchmarks}
    assert {name: family for family, name in ENVIRONMENTS.values()} == named
    assert len(ENVIRONMENTS) == 7 + 5 + 50 and ENVIRONMENTS.keys() <= gymnasium.registry.keys()
    assert ENVIRONMENTS[POINTS] == ("navigation", "cued_wedges") and ENVIRONMENTS[REACH] == ("metaworld", "reach-v3")


def test_registering_imports_neither_torch_nor_a_simulator():
    heavy = ("torch", "metaworld", "mujoco", "stable_baselines3")
    print_loaded = f"import sys; print([name for name in {heavy} if name in sys.modules])"
    assert fresh(f"import gymnasium, metarl; gymnasium.register_envs(metarl.envs); {print_loaded}") == "[]"


def test_registering_twice_is_silent():
    before = dict(gymnasium.registry)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register_envs(FAMILIES)
    assert gymnasium.registry == before


def test_an_id_can_say_where_it_is_registered():
    make = f"gymnasium.make('metarl.envs:{POINTS}', horizon=7)"
    assert fresh(f"import gymnasium; print({make}.unwrapped.task.option('horizon'))") == "7"


@pytest.mark.parametrize("environment", [MUJOCO, POINTS, REACH])
def test_an_environment_is_that_of_the_task(environment):
    family, name = ENVIRONMENTS[environment]
    settings = {"name": name, **({"benchmark": "ML1"} if family == "metaworld" else {})}
    tasks = metarl.envs.distribution(family, **settings, horizon=6, seed=2)
    expected = tasks.test_tasks[1]
    for choice in (
        {"split": "test", "index": 1, "horizon": 6, "seed": 2},
        {"task": expected},
        {"task": expected.to_json()},
    ):
        env = gymnasium.make(environment, **choice)
        assert env.unwrapped.task == expected
        for spec in (env.spec, EnvSpec.from_json(env.spec.to_json())):
            assert gymnasium.make(spec).unwrapped.task == expected
    assert gymnasium.make(environment).unwrapped.task == metarl.envs.distribution(family, **settings).train_tasks[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of wrappers, and of what has no bounds
        check_env(env.unwrapped, skip_render_check=True)
    env.reset(seed=0)
    truncated = [env.step(env.action_space.sample())[3] for _ in range(6)]
    assert truncated == [False] * 5 + [True]


def test_an_environment_draws_itself_if_it_is_asked_to():
    env = gymnasium.make(POINTS, render_mode="rgb_array")
    env.reset()
    assert env.render().shape == (360, 480, 3)
    assert gymnasium.make(env.spec).render_mode == "rgb_array" and gymnasium.make(POINTS).render_mode is None
    with pytest.raises(ValueError, match="render_mode is 'ascii'"):
        gymnasium.make(POINTS, render_mode="ascii")


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_many_of_them_step_together(mode):
    task = metarl.envs.distribution("mujoco", name="HalfCheetahVel", horizon=3).test_tasks[2]
    envs = gymnasium.make_vec("metarl/HalfCheetahVel-v0", 2, vectorization_mode=mode, task=task)
    alone = gymnasium.make("metarl/HalfCheetahVel-v0", task=task)
    try:
        observations, _ = envs.reset(seed=[4, 5])
        np.testing.assert_array_equal(observations[1], alone.reset(seed=5)[0])
        actions = np.full((2, 6), 0.5, np.float32)
        for step in range(3):
            observations, rewards, _, truncated, _ = envs.step(actions)
            expected, reward, *_ = alone.step(actions[1])
            np.testing.assert_array_equal(observations[1], expected)
            assert rewards[1] == reward and truncated.all() == (step == 2)
    finally:
        envs.close()


def test_what_does_not_exist_is_named():
    goals = metarl.envs.distribution("navigation", name="goals").train_tasks[0]
    for mistake, choice in (
        ("expected a task of navigation cued_wedges", {"task": goals}),
        (
            "expected a task of navigation cued_wedges",
            {"task": Task("mine", "cued_wedges", "test", "cued_wedges", 0, 0)},
        ),
        ("not a task", {"task": "{}"}),
        ("split='test'.*pass the task alone", {"task": goals, "split": "test"}),
        ("horizon.*pass the task alone", {"task": goals, "horizon": 3}),
        ("split is 'eval'", {"split": "eval"}),
        ("index is 400; the test split of cued_wedges has tasks 0 to 399", {"split": "test", "index": 400}),
        ("index is -1", {"index": -1}),
        ("horizn", {"horizn": 3}),
    ):
        with pytest.raises(ValueError, match=mistake):
            gymnasium.make(POINTS, **choice)
    with pytest.raises(gymnasium.error.NameNotFound, match="HalfCheetahDir"):
        gymnasium.make("metarl/HalfCheetaDir-v0")
