"""What `metarl.envs.make` returns against the untouched metaworld package: equal bit for bit, in all 50 tasks.

Each official environment runs beside ours and is given the same actions. Nothing is compared with a tolerance.
"""

import copy
import math
import pickle
import re
import sys
import warnings

import metaworld
import mujoco
import numpy as np
import pytest
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP
from metaworld.sawyer_xyz_env import SawyerXYZEnv
from metaworld.utils import reward_utils

from metarl.envs.metaworld.classes import CLASSES
from metarl.envs.metaworld.env import MetaWorldConfig, MetaWorldTasks, goal_vector, make
from metarl.envs.metaworld.fast import fast_class
from metarl.envs.metaworld.fast_functions import fast_globals
from metarl.envs.metaworld.model import model_without_visuals

pytestmark = pytest.mark.filterwarnings("ignore:Constant")  # the scripted policies ask for more than ±1

SEED = 5


class Official:
    """The official environment of one task, set up as `metaworld.ML1` does; returns what our `step` returns."""

    def __init__(self, task):
        self.env = ALL_V3_ENVIRONMENTS[task.name](reward_function_version=task.option("reward_version"))
        self.set_task(task)

    def set_task(self, task):
        data = {"env_cls": type(self.env), "rand_vec": goal_vector(task).copy(), "partially_observable": True}
        self.env.set_task(metaworld.Task(task.name, pickle.dumps(data)))
        self.env.__dict__.pop("sawyer_observation_space", None)

    def reset(self):
        return self.env.reset()

    def step(self, action):
        return self.env.step(action)


def tasks_of(name, reward_version="v2"):
    config = MetaWorldConfig(name=name, seed=SEED, reward_version=reward_version)
    tasks = MetaWorldTasks(config)
    return tasks.train_tasks[3], tasks.test_tasks[8]


def assert_same(expected, found):
    """Two results of `step`; `success` is a float in ours whatever it is upstream."""
    observation, reward, terminated, truncated, info = expected
    assert found[0].dtype == observation.dtype
    assert found[0].tobytes() == observation.tobytes(), found[0] - observation
    assert found[1] == float(reward)
    assert found[2:4] == (terminated, truncated)
    assert list(found[4]) == list(info)
    for key, value in info.items():
        assert found[4][key] == value, key
        assert type(found[4][key]) is type(value) or key == "success", key


def run(official, env, choose, num_steps):
    """An episode of both, side by side; returns how often the task was solved."""
    expected, found = official.reset()[0], env.reset()[0]
    assert found.tobytes() == expected.tobytes(), found - expected
    solved = 0.0
    for step in range(num_steps):
        action = choose(expected, step)
        expected_step, found_step = official.step(action), env.step(action)
        assert_same(expected_step, found_step)
        expected = expected_step[0]
        solved += expected_step[4]["success"]
    return solved


def scripted(official, name):
    """The policy that solves the task; it is shown the goal."""
    policy = ENV_POLICY_MAP[name]()

    def choose(observation, _step):
        shown = np.concatenate([observation[:-3], official.env._target_pos])
        return np.clip(policy.get_action(shown), -1.0, 1.0)

    return choose


def noise(seed, dtype, scale):
    rng = np.random.default_rng(seed)
    return lambda *_: (scale * rng.uniform(-1.0, 1.0, size=4)).astype(dtype)


@pytest.mark.parametrize("name", CLASSES)
def test_a_sequence_of_tasks_on_one_env_is_the_official_one(name):
    train, test = tasks_of(name)
    official, env = Official(train), make(train)
    solved = run(official, env, scripted(official, name), 300)
    run(official, env, noise(0, np.float32, 1.0), 60)  # a second reset of the task
    official.set_task(test)
    env.set_task(test)
    solved += run(official, env, scripted(official, name), 300)
    run(official, env, noise(1, np.float64, 1.5), 60)
    official.set_task(train)
    env.set_task(train)
    run(official, env, noise(2, np.float32, 1.5), 60)  # from a snapshot made before the other task
    run(official, env, clumsy(scripted(official, name)), 150)
    assert solved > 0


def clumsy(policy):
    """Bumps into things on its way, then goes down with the hand and stirs: many contacts, of unusual geoms."""
    rng = np.random.default_rng(4)

    def choose(observation, step):
        if step < 70:
            return np.clip(policy(observation, step) + rng.normal(0.0, 0.3, 4), -1.0, 1.0)
        return np.array([rng.uniform(-1, 1), rng.uniform(-1, 1), -1.0, rng.uniform(-1, 1)])

    return choose


@pytest.mark.parametrize("name", CLASSES)
def test_rewards_of_version_1_are_the_official_ones(name):
    train, test = tasks_of(name, "v1")
    official, env = Official(train), make(train)
    run(official, env, scripted(official, name), 150)
    official.set_task(test)
    env.set_task(test)
    run(official, env, noise(3, np.float32, 1.0), 40)
    run(official, env, scripted(official, name), 100)


def test_an_episode_ends_as_the_official_one():
    train, _ = tasks_of("reach-v3")
    official, env = Official(train), make(train)
    run(official, env, noise(4, np.float32, 1.0), 500)
    with pytest.raises(ValueError, match="reset"):
        official.step(np.zeros(4))
    with pytest.raises(ValueError, match="reset"):
        env._official.step(np.zeros(4))


@pytest.mark.parametrize("name", ["push-v3", "basketball-v3", "door-open-v3"])
def test_a_shown_goal_is_clipped_as_upstream(name):
    """Ours hides the goal; the class under it can show it, as the official one does."""
    task, _ = tasks_of(name)
    envs = ALL_V3_ENVIRONMENTS[name](), fast_class(ALL_V3_ENVIRONMENTS[name])()
    for env in envs:
        data = {"env_cls": ALL_V3_ENVIRONMENTS[name], "rand_vec": goal_vector(task), "partially_observable": False}
        env.set_task(metaworld.Task(name, pickle.dumps(data)))
        env.reset()
    for action in np.random.default_rng(0).uniform(-1, 1, (20, 4)):
        expected, found = (env.step(action)[0] for env in envs)
        assert found.tobytes() == expected.tobytes()
        assert expected[-3:].any()


def test_a_hand_out_of_bounds_is_clipped_now_and_one_step_later():
    """No task lets the hand leave the observation space, so here its limits are widened, in both."""
    task, _ = tasks_of("reach-v3")
    official, env = Official(task), make(task)
    official.env.mocap_high = np.array([0.9, 0.9, 0.9])
    env._official._sim.high = [0.9, 0.9, 0.9]
    limit = env.observation_space.high[0]
    seen = []

    def there_and_back(observation, step):
        seen.append((observation[0] == limit, observation[18] == limit))
        return np.array([1.0 if step < 100 else -1.0, 0.0, 0.0, 0.0])

    run(official, env, there_and_back, 160)
    assert {(True, True), (True, False), (False, True)} <= set(seen)


def test_snapshots_are_shared_and_views_are_live_in_each_env():
    """basketball's target is a view of where the simulator has its goal: of the env's own simulator."""
    task, other = tasks_of("basketball-v3")
    first, second = make(task), make(other)
    first.reset()
    second.reset()
    second.set_task(task)
    second.reset()  # from the snapshot that the first one made
    for env in (first, second):
        assert np.shares_memory(env._official._target_pos, env._official._sim.data.site_xpos)


def test_the_oldest_snapshot_goes_first(monkeypatch):
    monkeypatch.setattr("metarl.envs.metaworld.fast.MAX_SNAPSHOTS", 2)
    tasks = MetaWorldTasks(MetaWorldConfig(name="window-open-v3", seed=SEED)).train_tasks[:3]
    env = make(tasks[0])
    snapshots = env._official._snapshots
    snapshots.clear()
    for task in tasks:
        env.set_task(task)
        env.reset()
    assert [key[0] for key in snapshots] == [goal_vector(task).tobytes() for task in tasks[1:]]


MODELS = sorted({cls.model_name.fget(None) for cls in ALL_V3_ENVIRONMENTS.values()})

PHYSICAL = re.compile(r"(body|jnt|dof|site|eq|actuator|tendon|pair|exclude|key|geom)_|qpos")
COUNTED = re.compile(r"body_(geom|bvh)(adr|num)|geom_(dataid|matid)|site_matid")
"""Numbers in lists that are shorter now."""
DRAWN = ("geom_rgba", "geom_type", "geom_size", "geom_aabb", "geom_rbound")
"""Of a geom that collides with nothing, these are read by the renderer alone."""


@pytest.mark.parametrize("path", MODELS)
def test_model_without_visuals_keeps_the_physics(path):
    full, model = mujoco.MjModel.from_xml_path(path), model_without_visuals(path)
    visual = (full.geom_contype == 0) & (full.geom_conaffinity == 0)
    kept = np.array(matching_geoms(full, model))
    assert set(kept) >= {i for i in range(full.ngeom) if not visual[i] or full.geom(i).name}
    physical = [field for field in dir(full) if PHYSICAL.match(field) and not COUNTED.match(field)]
    assert len(physical) > 100
    for field in physical:
        found, expected = getattr(model, field), getattr(full, field)
        if field.startswith("geom_"):
            expected = expected[kept]
        if field in DRAWN:
            found, expected = found[~visual[kept]], expected[~visual[kept]]
        np.testing.assert_array_equal(found, expected, err_msg=field)
    for field in (field for field in dir(full.opt) if not field.startswith("_")):
        np.testing.assert_array_equal(getattr(model.opt, field), getattr(full.opt, field), err_msg=field)
    assert model.stat.meaninertia == full.stat.meaninertia
    for i, j in enumerate(kept):
        if not visual[j] and full.geom_type[j] == mujoco.mjtGeom.mjGEOM_MESH:
            np.testing.assert_array_equal(vertices(model, i), vertices(full, j))
    assert model.nbuffer < full.nbuffer / 5


def matching_geoms(full, model):
    """The geoms of `full` that are in `model`: for each the next one of that body with that place and name."""
    found, k = [], -1
    for i in range(model.ngeom):
        k += 1
        while not (
            full.geom_bodyid[k] == model.geom_bodyid[i]
            and full.geom(k).name == model.geom(i).name
            and full.geom_contype[k] == model.geom_contype[i]
            and full.geom_conaffinity[k] == model.geom_conaffinity[i]
            and (full.geom_pos[k] == model.geom_pos[i]).all()
        ):
            k += 1
        found.append(k)
    return found


@pytest.mark.parametrize("path", MODELS)
def test_model_without_visuals_finds_the_same_contacts(path):
    """At 300 random poses, arm and objects thrown together; with one geom left a body would be collided otherwise."""
    full, model = mujoco.MjModel.from_xml_path(path), model_without_visuals(path)
    collides = np.zeros(full.nbody, bool)
    collides[full.geom_bodyid[(full.geom_contype != 0) | (full.geom_conaffinity != 0)]] = True
    np.testing.assert_array_equal((model.body_geomnum == 1)[collides], (full.body_geomnum == 1)[collides])
    rng, kept = np.random.default_rng(0), np.array(matching_geoms(full, model))
    datas = mujoco.MjData(full), mujoco.MjData(model)
    total = 0
    for _ in range(300):
        qpos = full.qpos0 + rng.normal(scale=0.3, size=full.nq)
        for each, data in zip((full, model), datas, strict=True):
            data.qpos[:] = qpos
            mujoco.mj_fwdPosition(each, data)
        expected, found = (data.contact for data in datas)
        np.testing.assert_array_equal(kept[found.geom], expected.geom)
        for field in ("dist", "pos", "frame", "friction", "solref", "includemargin"):
            assert getattr(found, field).tobytes() == getattr(expected, field).tobytes(), field
        total += datas[0].ncon
    assert total > 100


def vertices(model, geom):
    start = model.mesh_vertadr[model.geom_dataid[geom]]
    return model.mesh_vert[start : start + model.mesh_vertnum[model.geom_dataid[geom]]]


class TestAssumptions:
    """What the shortcut of the first substep rests upon; a new version of the package that breaks it is noticed."""

    @pytest.mark.parametrize("path", MODELS)
    def test_the_target_of_the_hand_enters_the_dynamics_through_the_weld_alone(self, path):
        model = model_without_visuals(path)
        target = model.body("mocap").id
        assert model.nmocap == 1
        assert model.body_mocapid[target] == 0
        on_it = model.geom_bodyid == target
        assert not model.geom_contype[on_it].any()
        assert not model.geom_conaffinity[on_it].any()
        assert target not in model.body_parentid[np.arange(model.nbody) != target]
        assert (model.nsensor, model.ntendon, model.nplugin, model.nflex) == (0, 0, 0, 0)
        assert model.opt.integrator == mujoco.mjtIntegrator.mjINT_EULER
        assert model.opt.solver == mujoco.mjtSolver.mjSOL_NEWTON  # mj_projectConstraint is for dual solvers
        assert set(model.actuator_trntype) == {mujoco.mjtTrn.mjTRN_JOINT}

    def test_official_resets_move_body_and_site_positions_alone(self):
        """Every other field of a model is the same after resets and steps with two goals, in all 50 classes."""
        for name in CLASSES:
            train, test = tasks_of(name)
            official = Official(train)
            before = {field: value.copy() for field, value in fields(official.env.model)}
            for task in (train, test):
                official.set_task(task)
                official.reset()
                official.step(np.zeros(4))
            changed = {
                field for field, value in fields(official.env.model) if value.tobytes() != before[field].tobytes()
            }
            assert changed <= {"body_pos", "site_pos"}, name


def fields(model):
    heavy = ("mesh_", "bvh_", "tex_", "hfield_")
    for field in dir(model):
        if not field.startswith(("_", *heavy)) and isinstance(value := getattr(model, field), np.ndarray):
            yield field, value


class TestHelpers:
    """The helpers that replace upstream's, on numbers that no episode may bring."""

    HELPERS = fast_globals(fast_class(ALL_V3_ENVIRONMENTS["push-v3"]).__mro__[2].__module__)

    @pytest.mark.parametrize("sigmoid", ["long_tail", "gaussian", "linear", "tanh_squared"])
    def test_tolerance(self, sigmoid):
        tolerance = self.HELPERS["reward_utils"].tolerance
        rng = np.random.default_rng(0)
        for _ in range(2000):
            x, low, width, margin = rng.normal(), rng.normal(), rng.exponential(), rng.exponential()
            for kind in (float, np.float64):
                found = tolerance(kind(x), bounds=(low, low + width), margin=margin, sigmoid=sigmoid)
                expected = reward_utils.tolerance(kind(x), bounds=(low, low + width), margin=margin, sigmoid=sigmoid)
                assert found == expected
                assert type(found) is type(expected)

    def test_tolerance_at_its_edges(self):
        tolerance = self.HELPERS["reward_utils"].tolerance
        for arguments in (
            {"x": 0.0},
            {"x": 1.0},
            {"x": 0.5, "margin": 1.0},
            {"x": 0.5, "margin": 1.0, "sigmoid": "long_tail", "value_at_margin": 0.2},
            {"x": np.linspace(-1, 1, 7), "margin": 0.5, "sigmoid": "long_tail"},
            {"x": np.float64("nan"), "margin": 0.5, "sigmoid": "long_tail"},
        ):
            np.testing.assert_array_equal(tolerance(**arguments), reward_utils.tolerance(**arguments))
        for arguments in ({"bounds": (1.0, 0.0)}, {"margin": -1.0}, {"margin": 1.0, "sigmoid": "none"}):
            with pytest.raises(ValueError, match=r"bound|margin|Unknown"):
                tolerance(2.0, **arguments)

    def test_rotation(self):
        from scipy.spatial.transform import Rotation

        fast = self.HELPERS["Rotation"]
        matrix = np.empty(9)
        for quaternion in np.vstack([np.random.default_rng(0).normal(size=(5000, 4)), np.eye(4), np.ones((1, 4))]):
            mujoco.mju_quat2Mat(matrix, quaternion / np.linalg.norm(quaternion))
            expected = Rotation.from_matrix(matrix.reshape(3, 3)).as_quat()
            assert fast.from_matrix(matrix.reshape(3, 3)).as_quat().tobytes() == expected.tobytes()

    def test_norm_clip_hstack_copy(self):
        fast, rng = self.HELPERS["np"], np.random.default_rng(0)
        for vector in (*(rng.normal(size=size) for size in (2, 3, (2, 3))), rng.normal(size=6)[::2], [3, 4]):
            for order in (None, 1, 2, np.inf):
                found, expected = fast.linalg.norm(vector, ord=order), np.linalg.norm(vector, ord=order)
                assert found == expected
                assert type(found) is type(expected)
        for value in (np.float32(0.3), np.float32(2.0), np.float64(-3.0), 0.5, np.array([2.0, 0.1])):
            found, expected = fast.clip(value, -1, 1), np.clip(value, -1, 1)
            np.testing.assert_array_equal(found, expected)
            assert type(found) is type(expected)
        for arrays in ((np.ones(2), np.zeros(3)), (1.0, 2.0), (np.float64(1.0), np.ones(2))):
            np.testing.assert_array_equal(fast.hstack(arrays), np.hstack(arrays))
        original = np.ones(3)
        assert not np.shares_memory(fast.copy(original), original)


def test_an_env_is_built_again_and_not_copied():
    with pytest.raises(TypeError, match=r"metarl\.envs\.make"):
        copy.deepcopy(make(tasks_of("reach-v3")[0]))


class TestBrokenSimulations:
    def test_an_action_of_another_length_is_refused(self):
        env = make(tasks_of("reach-v3")[0])
        env.reset()
        with pytest.raises(ValueError, match=r"shape \(5,\).*\(4,\)"):
            env.step(np.zeros(5, np.float32))

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("entry", [0, 3])
    def test_an_action_that_is_not_finite_is_refused(self, value, entry, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        env = make(tasks_of("reach-v3")[0])
        env.reset()
        action = np.zeros(4, np.float32)
        action[entry] = value
        with pytest.raises(FloatingPointError, match="not finite"):
            env.step(action)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("steps_before", [0, 1, 2])
    @pytest.mark.parametrize("value", [np.nan, 1e12])
    def test_diverging_physics_is_an_error_and_leaves_no_log(self, value, steps_before, tmp_path, monkeypatch, capfd):
        monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT
        env = make(tasks_of("reach-v3")[0])
        expected = env.reset()[0]
        for _ in range(steps_before):
            env.step(np.zeros(4, np.float32))
        env._official.data.qvel[0] = value
        with pytest.raises(FloatingPointError, match=r"diverged(?s:.*)task.*reach-v3"):
            env.step(np.zeros(4, np.float32))
        assert not list(tmp_path.iterdir())
        assert capfd.readouterr().out == ""
        np.testing.assert_array_equal(env.reset()[0], expected)  # the next episode is as ever


def test_the_package_is_not_changed():
    """Of the package, all modules, and all classes with their members, are the same objects before and after."""
    modules = {name: dict(vars(module)) for name, module in sys.modules.items() if name.startswith("metaworld")}
    classes = [SawyerXYZEnv, *ALL_V3_ENVIRONMENTS.values()]
    members = [dict(vars(cls)) for cls in classes]
    fast_class.cache_clear()
    fast_globals.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("push-v3", "hammer-v3"):
            env = make(tasks_of(name)[0])
            env.reset()
            env.step(np.zeros(4, np.float32))
    assert [dict(vars(cls)) for cls in classes] == members
    for name, content in modules.items():
        assert dict(vars(sys.modules[name])) == content, name
    assert type(ALL_V3_ENVIRONMENTS["push-v3"]()).__mro__[1] is SawyerXYZEnv
