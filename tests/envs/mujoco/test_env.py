"""MuJoCo families against gymnasium's own environments, bit for bit, and against their definitions by hand."""

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from pydantic import ValidationError

from metarl.envs.mujoco.env import difficulty, parameters
from metarl.envs.mujoco.tasks import NAMES, SCALED_PARAMETERS, MujocoConfig, MujocoTasks, make
from metarl.types import Task

# Benchmark, gymnasium's environment, and its arguments for the same observation and costs.
REFERENCES = {
    "HalfCheetahDir": ("HalfCheetah-v5", {"ctrl_cost_weight": 0.05}),
    "HalfCheetahVel": ("HalfCheetah-v5", {"ctrl_cost_weight": 0.05}),
    "AntDir": ("Ant-v5", {}),
    "AntGoal": (
        "Ant-v5",
        {
            "exclude_current_positions_from_observation": False,
            "ctrl_cost_weight": 0.1,
            "terminate_when_unhealthy": False,
        },
    ),
    "HumanoidDir": ("Humanoid-v5", {}),
    "HopperRandParams": ("Hopper-v5", {}),
    "Walker2DRandParams": ("Walker2d-v5", {}),
}
SAME_REWARD = ("HalfCheetahDir", "AntDir", "HumanoidDir", "HopperRandParams", "Walker2DRandParams")


def first_task(name, **options):
    return MujocoTasks(MujocoConfig(name=name, **options)).train_tasks[0]


def run(env, seed, steps=60):
    """Observations, rewards, terminated of `steps` random actions, begun anew after each termination."""
    rng = np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    observations, rewards, ends = [observation], [], []
    for step in range(steps):
        action = rng.uniform(env.action_space.low, env.action_space.high)
        observation, reward, terminated, _, _ = env.step(action)
        observations.append(observation)
        rewards.append(reward)
        ends.append(terminated)
        if terminated:
            observations.append(env.reset(seed=seed + 1000 + step)[0])
    return np.array(observations), np.array(rewards), np.array(ends)


def assert_same_run(ours, theirs):
    for left, right in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.fixture
def at_zero_degrees(monkeypatch):
    """AntDir and HumanoidDir along +x, and RandParams with all multipliers 1: gymnasium's own definitions."""
    known = {"direction": np.array([1.0, 0.0])}

    def nominal(task):
        if task.benchmark in ("AntDir", "HumanoidDir"):
            return known
        return {"body_mass": 1.0} if task.benchmark.endswith("RandParams") else parameters(task)

    monkeypatch.setattr("metarl.envs.mujoco.env.parameters", nominal)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", NAMES)
def test_equals_gymnasium_to_the_bit(name, dtype, at_zero_degrees):
    gymnasium_id, arguments = REFERENCES[name]
    env = make(first_task(name, horizon=1000))
    reference = gymnasium.make(gymnasium_id, **arguments).unwrapped
    assert env.action_space == reference.action_space
    assert env.observation_space == reference.observation_space
    rng = np.random.default_rng(3)
    np.testing.assert_array_equal(env.reset(seed=5)[0], reference.reset(seed=5)[0])
    episodes = 0
    for _ in range(150):
        action = rng.uniform(1.5 * env.action_space.low, 1.5 * env.action_space.high).astype(dtype)  # beyond the bounds
        observation, reward, terminated, truncated, info = env.step(action)
        expected, expected_reward, expected_terminated, _, _ = reference.step(action)
        np.testing.assert_array_equal(observation, expected)
        assert observation.dtype == np.float64
        assert terminated is bool(expected_terminated)
        assert (truncated, info) == (False, {})
        if name in SAME_REWARD:
            assert reward == expected_reward
        if terminated:
            episodes += 1
            np.testing.assert_array_equal(env.reset(seed=episodes)[0], reference.reset(seed=episodes)[0])
    if name in ("HumanoidDir", "HopperRandParams", "Walker2DRandParams"):
        assert episodes > 0  # else `terminated` was never compared


def test_backward_is_forward_with_the_velocity_turned():
    forward, backward = MujocoTasks(MujocoConfig()).train_tasks
    assert (forward.name, backward.name) == ("HalfCheetahDir-forward", "HalfCheetahDir-backward")
    env, mirror = make(forward), make(backward)
    env.reset(seed=0), mirror.reset(seed=0)
    action = np.array([0.5, -1.0, 0.0, 1.0, 0.5, 0.0])  # 0.05 · (0.25 + 1 + 0 + 1 + 0.25 + 0) = 0.125
    for _ in range(10):
        before = env.data.qpos[0]
        reward, turned = env.step(action)[1], mirror.step(action)[1]
        velocity = (env.data.qpos[0] - before) / 0.05  # 5 physics steps of 0.01 s
        assert abs(velocity) > 1e-3
        np.testing.assert_allclose([reward, turned], [velocity - 0.125, -velocity - 0.125], rtol=0, atol=1e-12)


def test_velocity_reward_by_hand():
    task = first_task("HalfCheetahVel")
    env = make(task)
    env.reset(seed=0)
    before = env.data.qpos[0]
    reward = env.step(np.full(6, 0.5))[1]
    velocity = (env.data.qpos[0] - before) / 0.05
    # 0.05 · 6 · 0.25 = 0.075
    assert reward == pytest.approx(-abs(velocity - parameters(task)["velocity"]) - 0.075, abs=1e-12)


def test_goal_reward_by_hand():
    task = first_task("AntGoal")
    env = make(task)
    env.reset(seed=0)
    for _ in range(30):  # until the feet have touched the ground, so that the contact cost is not 0
        reward = env.step(np.full(8, 0.5))[1]
    goal, torso = parameters(task)["goal"], env.data.body("torso").xpos
    contact = 0.0005 * sum(min(max(force, -1.0), 1.0) ** 2 for force in env.data.cfrc_ext.ravel())
    assert contact > 1e-5
    # 0.1 · 8 · 0.25 = 0.2
    assert reward == pytest.approx(-abs(torso[0] - goal[0]) - abs(torso[1] - goal[1]) - 0.2 - contact, abs=1e-9)


@pytest.mark.parametrize(("name", "weight"), [("AntDir", 1.0), ("HumanoidDir", 1.25)])
def test_direction_reward_differs_by_the_velocity_across(name, weight):
    task = first_task(name)
    env, reference = make(task), gymnasium.make(REFERENCES[name][0])
    env.reset(seed=0), reference.reset(seed=0)
    cos, sin = parameters(task)["direction"]
    assert cos**2 + sin**2 == pytest.approx(1.0)
    for _ in range(5):
        reward = env.step(np.full(env.model.nu, 0.2))[1]
        _, at_zero, _, _, info = reference.step(np.full(env.model.nu, 0.2))
        turned = weight * (cos * info["x_velocity"] + sin * info["y_velocity"] - info["x_velocity"])
        assert reward - at_zero == pytest.approx(turned, abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_json_rebuilds_the_environment(name):
    task = MujocoTasks(MujocoConfig(name=name, seed=7, horizon=50, num_test=3)).test_tasks[-1]
    rebuilt = Task.from_json(task.to_json())
    assert rebuilt == task
    assert_same_run(run(make(rebuilt), seed=1), run(make(task), seed=1))


@pytest.mark.parametrize("name", NAMES)
def test_retargeting_equals_a_fresh_environment(name):
    tasks = MujocoTasks(MujocoConfig(name=name, num_train=3))
    task, other = (tasks.train_tasks[0], tasks.test_tasks[0]) if name == "HalfCheetahDir" else tasks.train_tasks[1:]
    fresh = run(make(task), seed=2)
    used = make(other)
    elsewhere = run(used, seed=2)
    if name != "HalfCheetahDir":
        assert not np.array_equal(elsewhere[1][:5], fresh[1][:5])  # the two tasks do differ
    for between in (task, other, task):
        used.set_task(between)
        used.reset(seed=9)
        used.step(used.action_space.high)
    assert_same_run(run(used, seed=2), fresh)


def test_multipliers_are_within_their_range_and_differ_by_element():
    for name in ("HopperRandParams", "Walker2DRandParams"):
        nominal = gymnasium.make(REFERENCES[name][0]).unwrapped.model
        env = make(first_task(name))
        for field in ("geom_size", "dof_armature", "body_pos", "actuator_gear"):
            np.testing.assert_array_equal(getattr(env.model, field), getattr(nominal, field))
        for field, base in {"body_mass": 1.5, "body_inertia": 1.5, "dof_damping": 1.3, "geom_friction": 1.5}.items():
            array, scaled = getattr(nominal, field), getattr(env.model, field)
            powers = np.log(scaled[array > 0] / array[array > 0]) / np.log(base)
            assert 1.0 < np.abs(powers).max() <= 3.0
            assert len(np.unique(powers.round(9))) == powers.size
            assert np.array_equal(scaled == 0, array == 0)


def test_set_task_refuses_another_class_or_benchmark():
    forward, backward = MujocoTasks(MujocoConfig()).train_tasks
    with pytest.raises(ValueError, match="HalfCheetahDir-backward"):
        make(forward).set_task(backward)
    with pytest.raises(ValueError, match="AntGoal"):
        make(first_task("AntDir")).set_task(first_task("AntGoal"))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "HalfCheetahDir"])
def test_train_and_test_are_disjoint_and_do_not_depend_on_their_number(name):
    def drawn(tasks):
        return [np.concatenate([np.ravel(value) for value in parameters(task).values()]).tobytes() for task in tasks]

    tasks = MujocoTasks(MujocoConfig(name=name, num_train=30, num_test=20))
    train, test = drawn(tasks.train_tasks), drawn(tasks.test_tasks)
    assert (len(train), len(test)) == (30, 20)
    assert len(set(train + test)) == 50
    assert drawn(MujocoTasks(MujocoConfig(name=name, num_train=5)).train_tasks) == train[:5]
    assert not set(train) & set(drawn(MujocoTasks(MujocoConfig(name=name, seed=1)).train_tasks))


def test_half_cheetah_has_two_directions_in_both_splits():
    tasks = MujocoTasks(MujocoConfig(num_train=30, num_test=20))
    assert [parameters(task)["direction"] for task in tasks.train_tasks] == [1.0, -1.0]
    assert [parameters(task)["direction"] for task in tasks.test_tasks] == [1.0, -1.0]
    assert {task.split for task in tasks.test_tasks} == {"test"}
    assert tasks.train_tasks is tasks.train_tasks


def test_parameters_cover_their_ranges():
    def drawn(name, parameter):
        tasks = MujocoTasks(MujocoConfig(name=name, num_train=400)).train_tasks
        return np.array([parameters(task)[parameter] for task in tasks])

    velocities = drawn("HalfCheetahVel", "velocity")
    assert 0.0 <= velocities.min() < 0.05
    assert 1.95 < velocities.max() <= 2.0
    radii = np.linalg.norm(drawn("AntGoal", "goal"), axis=1)
    assert 2.95 < radii.max() <= 3.0
    # Uniform in area: half of the goals lie beyond 3 / √2; binomial σ of 400 draws = 0.025.
    assert np.mean(radii > 3.0 / np.sqrt(2.0)) == pytest.approx(0.5, abs=0.1)
    for name in ("AntDir", "HumanoidDir"):
        assert np.abs(drawn(name, "direction").mean(0)).max() < 0.15  # σ of each mean = √(1/2 / 400) = 0.035


def test_horizon_truncates():
    env = make(first_task("HalfCheetahDir", horizon=3))
    for seed in (0, 1):
        env.reset(seed=seed)
        ends = [env.step(np.zeros(6))[2:4] for _ in range(3)]
        assert ends == [(False, False), (False, False), (False, True)]


def test_a_falling_hopper_terminates():
    env = make(first_task("HopperRandParams"))
    env.reset(seed=0)
    for _ in range(200):
        _, _, terminated, truncated, _ = env.step(np.ones(3))
        assert not truncated
        if terminated:
            break
    assert terminated
    assert abs(env.data.qpos[2]) >= 0.2 or env.data.qpos[1] <= 0.7


@pytest.mark.parametrize("name", NAMES)
def test_passes_the_environment_checker(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unbounded observations, no spec: as in gymnasium's own
        check_env(make(first_task(name)), skip_render_check=True)


def test_wrong_names_are_named():
    with pytest.raises(ValueError, match="unknown MuJoCo family 'HalfCheetaDir': did you mean 'HalfCheetahDir'"):
        MujocoConfig(name="HalfCheetaDir")
    with pytest.raises(ValueError, match="did you mean 'AntGoal'"):
        make(Task("mujoco", "AntGoals", "train", "AntGoals", 0, 0))
    with pytest.raises(ValueError, match="did you mean 'HalfCheetahDir-forward'"):
        make(Task("mujoco", "HalfCheetahDir", "train", "HalfCheetahDir-forwards", 0, 0))
    with pytest.raises(ValueError, match=r"task\.split is 'valid'"):
        make(Task("mujoco", "AntDir", "valid", "AntDir", 0, 0))
    with pytest.raises(ValueError, match=r"shape \(1,\); expected \(8,\)"):
        make(first_task("AntDir")).step(np.zeros(1))


@pytest.mark.parametrize(("name", "expected"), [("AntDir", True), ("AntGoal", False)])
@pytest.mark.parametrize("height", [-3.0, 1.5])
def test_an_ant_terminates_by_its_height_only_where_that_is_defined(name, expected, height):
    env = make(first_task(name))
    env.reset(seed=0)
    env.data.qpos[2] = height
    assert env.step(np.zeros(8))[2:4] == (expected, False)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_an_action_that_is_not_finite_is_refused(broken):
    env = make(first_task("HalfCheetahDir"))
    env.reset(seed=0)
    with pytest.raises(FloatingPointError, match="not finite"):
        env.step(np.full(6, broken))


@pytest.mark.parametrize("velocity", [np.nan, 1e20])
@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("name", ["HalfCheetahDir", "AntDir", "HopperRandParams", "HumanoidDir"])
def test_diverging_physics_is_an_error_and_leaves_no_log(name, steps, velocity, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT
    env = make(first_task(name))
    expected, _ = env.reset(seed=0)
    for _ in range(steps):
        env.step(env.action_space.high)
    env.data.qvel[0] = velocity
    with pytest.raises(FloatingPointError, match="diverged"):
        env.step(env.action_space.high)
    assert not list(tmp_path.iterdir())
    np.testing.assert_array_equal(env.reset(seed=0)[0], expected)


# Stages of a sequence: bands of velocities, and some of the scaled arrays

SUMS = {"body_mass": 7.854478802099231, "body_inertia": 18.582485342340174, "dof_damping": 5.50899356406293}
SUMS |= {"geom_friction": 20.41433816808982}


def test_default_tasks_are_what_they_have_always_been():
    """Numbers of the first release with these families: runs of then can be repeated."""
    velocities = MujocoTasks(MujocoConfig(name="HalfCheetahVel", seed=3, num_train=3)).train_tasks[2]
    assert velocities == Task("mujoco", "HalfCheetahVel", "train", "HalfCheetahVel", 2, 3, {"horizon": 200})
    assert parameters(velocities) == {"velocity": 0.43829900829161517}
    hopper = MujocoTasks(MujocoConfig(name="HopperRandParams", seed=3, num_train=3)).train_tasks[2]
    assert hopper == Task("mujoco", "HopperRandParams", "train", "HopperRandParams", 2, 3, {"horizon": 200})
    assert {field: value.sum() for field, value in parameters(hopper).items()} == SUMS
    assert difficulty(hopper) == 0.7222372592426403
    same = MujocoConfig(name="HalfCheetahVel", seed=3, num_train=3, velocity=(0, 2), scaled=list(SCALED_PARAMETERS))
    assert MujocoTasks(same).train_tasks[2] == velocities


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0), (-1.5, -0.1)])
def test_velocities_are_drawn_from_their_band(low, high):
    config = MujocoConfig(name="HalfCheetahVel", num_train=200, num_test=200, velocity=(low, high))
    tasks = MujocoTasks(config)
    for split in (tasks.train_tasks, tasks.test_tasks):
        drawn = [parameters(task)["velocity"] for task in split]
        assert low <= min(drawn) < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < max(drawn) <= high
    task = tasks.test_tasks[-1]
    rebuilt = Task.from_json(task.to_json())
    assert rebuilt == task and parameters(rebuilt) == parameters(task)
    assert tasks.difficulty(task) == abs(parameters(task)["velocity"])
    # The same share of the band as of the default range: 0 + 2 u and low + (high - low) u.
    default = parameters(MujocoTasks(MujocoConfig(name="HalfCheetahVel", num_test=200)).test_tasks[-1])["velocity"]
    assert parameters(task)["velocity"] == pytest.approx(low + (high - low) * default / 2.0, rel=1e-12)


def test_the_reward_is_of_the_band():
    env = make(first_task("HalfCheetahVel", velocity=(7.0, 8.0)))
    env.reset(seed=0)
    before = env.data.qpos[0]
    reward = env.step(np.zeros(6))[1]
    velocity = (env.data.qpos[0] - before) / 0.05
    assert 7.0 <= velocity - reward <= 8.0  # reward = velocity - target, for a target ahead


@pytest.mark.parametrize("name", ["HopperRandParams", "Walker2DRandParams"])
@pytest.mark.parametrize("scaled", [["body_mass"], ["dof_damping", "body_inertia"], ["geom_friction"]])
def test_arrays_that_are_scaled_keep_their_numbers_and_the_others_are_nominal(name, scaled):
    with_all, task = first_task(name, seed=5), first_task(name, seed=5, scaled=scaled)
    nominal = gymnasium.make(REFERENCES[name][0]).unwrapped.model
    rebuilt = Task.from_json(task.to_json())
    assert rebuilt == task
    env, full = make(rebuilt), make(with_all)
    for field in SCALED_PARAMETERS:
        found, expected = parameters(task)[field], parameters(with_all)[field]
        if field in scaled:
            np.testing.assert_array_equal(found, expected)
        else:
            np.testing.assert_array_equal(found, np.ones_like(expected))
        np.testing.assert_array_equal(
            getattr(env.model, field), getattr(full.model if field in scaled else nominal, field)
        )
    env.set_task(with_all)
    env.set_task(task)  # leaves nothing of the other
    for field in SCALED_PARAMETERS.keys() - set(scaled):
        np.testing.assert_array_equal(getattr(env.model, field), getattr(nominal, field))
    logs = [np.log(parameters(with_all)[field][getattr(nominal, field) != 0]) for field in scaled]
    assert difficulty(task) == pytest.approx(np.sqrt(np.mean(np.square(np.concatenate(logs)))), rel=1e-12)
    assert difficulty(task) != difficulty(with_all)


def test_the_order_of_scaled_arrays_has_no_effect():
    left, right = ["geom_friction", "body_mass"], ["body_mass", "geom_friction"]
    first, second = (MujocoConfig(name="HopperRandParams", scaled=scaled) for scaled in (left, right))
    assert first == second and MujocoTasks(first).train_tasks == MujocoTasks(second).train_tasks
    assert MujocoConfig(name="HopperRandParams", scaled="body_mass").scaled == ("body_mass",)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"name": "HalfCheetahVel", "velocity": (2, 1)}, "expected the lower bound, then the upper one"),
        ({"name": "HalfCheetahVel", "velocity": (1, 1)}, "expected the lower bound"),
        ({"name": "HalfCheetahVel", "velocity": (0, np.inf)}, "finite"),
        ({"name": "HalfCheetahVel", "velocity": (np.nan, 1)}, "finite"),
        ({"name": "HalfCheetahVel", "velocity": (1,)}, "velocity"),
        ({"name": "HalfCheetahDir", "velocity": (0, 1)}, "only HalfCheetahVel has targets"),
        ({"name": "HopperRandParams", "velocity": (0, 2)}, "only HalfCheetahVel has targets"),
        ({"name": "AntDir", "scaled": ["body_mass"]}, "only RandParams families scale arrays"),
        ({"name": "HopperRandParams", "scaled": []}, "at least 1 item"),
        ({"name": "HopperRandParams", "scaled": ["body_mas"]}, "expected|should be"),
        ({"name": "HopperRandParams", "scaled": ["body_mass", "body_mass"]}, "lists an array twice"),
    ],
)
def test_settings_without_a_use_or_sense_are_refused(settings, expected):
    with pytest.raises(ValidationError, match=expected):
        MujocoConfig(**settings)
