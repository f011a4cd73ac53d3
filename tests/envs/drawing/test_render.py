"""Pictures of environments show their state and their goal; what they observe has the names that it is given."""

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from metaworld.env_dict import ALL_V3_ENVIRONMENTS

from metarl.envs import StageIdTasks, distribution, make
from metarl.envs.drawing.camera import HEIGHT, SHADOW_PIXELS, WIDTH
from metarl.envs.drawing.rendering import choose_gl
from metarl.envs.metaworld.env import goal_vector
from metarl.envs.metaworld.scene import LOOKAT, VIEW
from metarl.envs.mujoco.tasks import NAMES
from metarl.envs.navigation import goal
from metarl.errors import UserError

NAVIGATION = ("goals", "semicircle", "cued_wedges")
CLOCKS = [("mujoco", "AntDir"), ("mujoco", "HumanoidDir"), ("metaworld", "reach-v3")]
CLASSES = ("reach-v3", "drawer-open-v3", "door-unlock-v3", "bin-picking-v3")


@pytest.fixture(scope="module")
def opengl():
    """Skips what must be drawn by OpenGL where there is none."""
    try:
        choose_gl()
    except UserError as error:
        pytest.skip(str(error))


def tasks_of(family, name):
    return distribution(family, name=name).train_tasks


def drawn(family, name, index=0, **options):
    return make(tasks_of(family, name)[index], render_mode="rgb_array", **options)


def action_of(env, seed=0):
    space = env.action_space
    return np.random.default_rng(seed).uniform(space.low, space.high).astype(np.float32)


def differing(a, b):
    """The rows and columns of the pixels in which two pictures differ, `[pixels, 2]`."""
    return np.argwhere((a != b).any(-1))


# Names and clocks


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(("mujoco", name) for name in NAMES),
        *(("navigation", name) for name in NAVIGATION),
        *(("metaworld", name) for name in CLASSES),
    ],
)
def test_every_entry_has_a_name_of_its_own(family, name):
    task = tasks_of(family, name)[0]
    cued = StageIdTasks(distribution(family, name=name), stage=1, num_stages=3)
    for env, cues in ((make(task), 0), (make(cued.train_tasks[0]), 3)):
        assert len(env.observation_names) == len(set(env.observation_names)) == env.observation_space.shape[0]
        assert len(env.action_names) == len(set(env.action_names)) == env.action_space.shape[0]
        assert env.observation_names[len(env.observation_names) - cues :] == ("stage_0", "stage_1", "stage_2")[:cues]
        assert hasattr(env, "dt") == (family != "navigation")


@pytest.mark.parametrize("name", NAMES)
def test_names_of_mujoco_are_those_of_its_joints(name):
    env = make(tasks_of("mujoco", name)[0])
    observation, _ = env.reset(seed=0)
    found = dict(zip(env.observation_names, observation, strict=True))
    for i in range(env.model.njnt):
        joint = env.data.joint(i)
        if len(joint.qpos) > 1:  # the free joint of the torso
            assert [found[f"root_quaternion_{part}"] for part in "wxyz"] == joint.qpos[3:].tolist()
            assert found["root_z"] == joint.qpos[2]
            assert found["root_velocity_y"] == joint.qvel[1] and found["root_velocity_angular_z"] == joint.qvel[5]
        else:
            assert joint.name == "rootx" or found[joint.name] == joint.qpos[0]
            assert found[f"{joint.name}_velocity"] == joint.qvel[0]
    for i, joint in enumerate(env.action_names):
        env.reset(seed=0)
        env.step(np.eye(len(env.action_names))[i] * 0.1)
        forces = env.data.qfrc_actuator
        assert np.flatnonzero(forces).tolist() == [env.model.joint(joint).dofadr[0]]


def test_names_of_the_humanoid_s_blocks():
    env = make(tasks_of("mujoco", "HumanoidDir")[0])
    env.reset(seed=0)
    observation, *_ = env.step(action_of(env))
    found = dict(zip(env.observation_names, observation, strict=True))
    foot = env.data.body("left_foot").id
    assert found["left_foot_inertia_9"] == env.data.cinert[foot, 9] != 0
    assert found["left_foot_velocity_4"] == env.data.cvel[foot, 4] != 0
    assert found["left_knee_velocity_force"] == env.data.qfrc_actuator[env.model.joint("left_knee").dofadr[0]] != 0
    assert found["left_foot_contact_5"] == env.data.cfrc_ext[foot, 5]


def test_names_of_metaworld():
    env = make(tasks_of("metaworld", "drawer-open-v3")[0])
    before, _ = env.reset()
    after, *_ = env.step(np.array([1.0, -0.5, 0.2, 1.0], dtype=np.float32))
    names = env.observation_names
    found = dict(zip(names, after, strict=True))
    official = env._official
    assert [found[f"hand_{axis}"] for axis in "xyz"] == official.get_endeff_pos().tolist()
    assert [found[f"object1_{axis}"] for axis in "xyz"] == official._get_pos_objects().tolist()
    was = {name.removeprefix("previous_"): found[name] for name in names if name.startswith("previous_")}
    assert was == {name: value for name, value in zip(names, before, strict=True) if name in was}
    assert [found[f"goal_{axis}"] for axis in "xyz"] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("family", "name"), [("mujoco", "AntDir"), ("mujoco", "HumanoidDir"), ("metaworld", "reach-v3")]
)
def test_dt_is_the_time_of_a_step(family, name):
    env = make(tasks_of(family, name)[0])
    env.reset(seed=0)
    data = env.data if family == "mujoco" else env._official._sim.data
    before = data.time
    env.step(action_of(env))
    assert data.time - before == pytest.approx(env.dt, abs=1e-9)
    assert env.metadata["render_fps"] == round(1 / env.dt)


# Pictures

DRAWN = [("mujoco", "HalfCheetahDir"), ("mujoco", "AntGoal"), ("navigation", "goals"), ("metaworld", "reach-v3")]


@pytest.mark.usefixtures("opengl")
@pytest.mark.parametrize(("family", "name"), DRAWN)
def test_a_picture_shows_the_state(family, name):
    env = drawn(family, name)
    env.reset(seed=0)
    first = env.render()
    assert (first.shape, first.dtype) == ((HEIGHT, WIDTH, 3), np.uint8)
    assert first.std() > 5 and first.mean() > 50  # something is to be seen, and it is not dark
    np.testing.assert_array_equal(env.render(), first)
    for seed in range(8):
        env.step(action_of(env, seed))
    assert len(differing(env.render(), first)) > 50
    env.reset(seed=0)
    np.testing.assert_array_equal(env.render(), first)
    env.close()
    env.close()


@pytest.mark.usefixtures("opengl")
@pytest.mark.parametrize(("family", "name"), DRAWN)
def test_drawing_changes_nothing(family, name):
    watched, plain = drawn(family, name), make(tasks_of(family, name)[0])
    assert plain.render_mode is None
    for env in (watched, plain):
        env.reset(seed=0)
    for seed in range(4):
        watched.render()
        for a, b in zip(watched.step(action_of(plain, seed)), plain.step(action_of(plain, seed)), strict=True):
            np.testing.assert_equal(a, b)
    assert plain.render() is None


GOALS = [*DRAWN, ("mujoco", "HumanoidDir"), ("mujoco", "HalfCheetahVel"), ("metaworld", "window-open-v3")]


@pytest.mark.usefixtures("opengl")
@pytest.mark.parametrize(("family", "name"), GOALS)
def test_the_goal_is_to_be_seen(family, name):
    """It is yellow, or orange in the plane, and elsewhere in the picture of another task."""
    places = []
    for task in tasks_of(family, name)[:2]:
        env = make(task, render_mode="rgb_array")
        env.reset(seed=0)
        env.step(np.zeros(env.action_space.shape, dtype=np.float32))
        red, green, blue = np.moveaxis(env.render().astype(int), -1, 0)
        yellow = np.argwhere((red > 140) & (green > 110) & (blue < 0.55 * green))
        assert len(yellow) > 20
        places.append({tuple(place) for place in yellow})
    assert len(places[0] ^ places[1]) > 20


@pytest.mark.usefixtures("opengl")
@pytest.mark.parametrize(("family", "name"), DRAWN[1:])
def test_set_task_moves_the_goal(family, name):
    tasks = tasks_of(family, name)
    moved, made = make(tasks[0], render_mode="rgb_array"), make(tasks[1], render_mode="rgb_array")
    moved.reset(seed=0)
    before = moved.render()
    moved.set_task(tasks[1])
    for env in (moved, made):
        env.reset(seed=0)
    np.testing.assert_array_equal(moved.render(), made.render())
    assert len(differing(moved.render(), before)) > 20


def test_the_point_and_the_goal_are_where_they_are():
    env = drawn("navigation", "goals", index=3)
    env.reset()
    env.step(np.array([1.0, 0.5], dtype=np.float32))  # to (0.1, 0.05)
    picture = env.render().astype(int)

    def pixel(x, y):  # the origin is in the middle; 0.7 is the half height of 180 pixels
        return picture[round(180 - y / 0.7 * 180), round(240 + x / 0.7 * 180)].tolist()

    assert pixel(0.1, 0.05) == [0x00, 0x72, 0xB2]
    assert pixel(*goal(env.task)) == [0xE6, 0x9F, 0x00]
    x, y = goal(env.task)
    assert pixel(x + 0.09, y) == [0xF9, 0xE5, 0xBA]  # success is within 0.1
    assert pixel(x + 0.11, y) != [0xF9, 0xE5, 0xBA]
    assert pixel(0.05, 0.025) == [0x56, 0xB4, 0xE9]  # the trail, half way


def test_a_point_beyond_the_edge_is_drawn_at_the_edge():
    env = drawn("navigation", "goals")
    env.reset()
    for _ in range(20):
        env.step(np.array([0.0, 1.0], dtype=np.float32))
    picture = env.render()
    assert (picture[:12, 235:245] == [0x00, 0x72, 0xB2]).all(-1).any()


@pytest.mark.usefixtures("opengl")
@pytest.mark.parametrize("name", ["reach-v3", "drawer-open-v3", "button-press-v3"])
def test_metaworld_looks_as_the_official_environment_does(name):
    """Every pixel is that of the untouched package, but for the goal's mark."""
    task = tasks_of("metaworld", name)[5]
    env = make(task, render_mode="rgb_array")
    official = ALL_V3_ENVIRONMENTS[name](render_mode="rgb_array", width=WIDTH, height=HEIGHT)
    official.model.vis.quality.shadowsize = SHADOW_PIXELS
    official.mujoco_renderer.default_cam_config = {**VIEW._asdict(), "lookat": LOOKAT}
    official._last_rand_vec, official._freeze_rand_vec, official._set_task_called = goal_vector(task), True, True
    env.reset()
    official.reset()
    for seed in range(12):
        env.step(action_of(env, seed))
        official.step(action_of(env, seed))
    ours = env.render()
    official.mujoco_renderer._get_viewer("rgb_array").make_context_current()
    theirs = official.render()
    places = differing(ours, theirs)
    height, width = np.ptp(places, axis=0)
    assert height < 60 and width < 60, places
    assert len(places) < 0.01 * HEIGHT * WIDTH
    official.close()


@pytest.mark.usefixtures("opengl")
def test_every_camera_keeps_its_model():
    """One that draws, is closed or goes away must not change what another one draws."""
    first, second, third = drawn("mujoco", "AntDir"), drawn("metaworld", "reach-v3"), drawn("mujoco", "HalfCheetahDir")
    pictures = []
    for env in (first, second, third):
        env.reset(seed=0)
        pictures.append(env.render())
    first.close()
    del third, env
    np.testing.assert_array_equal(second.render(), pictures[1])
    np.testing.assert_array_equal(first.render(), pictures[0])  # it draws again after it was closed


@pytest.mark.usefixtures("opengl")
@pytest.mark.parametrize(("family", "name"), DRAWN)
def test_gymnasium_s_checker_draws(family, name):
    env = drawn(family, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of infinite bounds and of other render modes
        check_env(env)


@pytest.mark.parametrize(("family", "name"), DRAWN)
def test_unknown_modes_are_refused(family, name):
    with pytest.raises(ValueError, match="render_mode is 'human'; expected None or 'rgb_array'"):
        make(tasks_of(family, name)[0], render_mode="human")


@pytest.mark.parametrize(("family", "name"), [("navigation", "goals"), ("metaworld", "reach-v3")])
def test_there_is_no_picture_before_an_episode(family, name):
    with pytest.raises(gymnasium.error.ResetNeeded, match=r"call reset\(\) before render\(\)"):
        drawn(family, name).render()


def test_a_stage_id_is_not_drawn():
    tasks = distribution("navigation", name="goals")
    plain, cued = drawn("navigation", "goals"), make(StageIdTasks(tasks, 0, 2).train_tasks[0], render_mode="rgb_array")
    plain.reset()
    cued.reset()
    assert cued.render_mode == "rgb_array"
    np.testing.assert_array_equal(cued.render(), plain.render())
