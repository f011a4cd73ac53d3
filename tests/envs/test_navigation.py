"""2D navigation against its definition by hand, and both of its forms, batch and gymnasium, against each other."""

import warnings

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from metarl.envs import distribution, make, navigation
from metarl.envs.navigation import NavigationBatch, NavigationConfig, NavigationEnv, NavigationTasks, goal
from metarl.types import Task

NAMES = ("goals", "semicircle", "cued_wedges", "rotated_wedges", "rotated_cued_wedges")
WEDGES = NAMES[2:]
ALL = np.ones(1, dtype=bool)


def tasks_of(name, **options):
    return NavigationTasks(NavigationConfig(name=name, **options))


def step_all(batch, actions, active):
    batch.step_async(slice(0, len(actions)), actions, active)
    return batch.step_wait(slice(0, len(actions)))


def batch_of(tasks):
    batch = NavigationBatch(tasks[0].benchmark, len(tasks))
    batch.reset(tasks, np.zeros(len(tasks), dtype=np.uint32))
    return batch


@pytest.fixture
def goals_at(monkeypatch):
    """Puts the goal of task i at the i-th point given."""

    def put(*points):
        monkeypatch.setattr(navigation, "goal", lambda task: np.array(points[task.index]))

    return put


def test_moves_and_rewards_by_hand(goals_at):
    goals_at((0.3, 0.4))
    env = NavigationEnv(tasks_of("goals").train_tasks[0])
    np.testing.assert_array_equal(env.reset()[0], [0.0, 0.0])
    # 0.1 · (1, 0.5) = (0.1, 0.05); to the goal (0.2, 0.35): √(0.04 + 0.1225) = 0.403113
    observation, reward, terminated, truncated, info = env.step(np.array([1.0, 0.5]))
    np.testing.assert_allclose(observation, [0.1, 0.05], rtol=0, atol=1e-12)
    assert reward == pytest.approx(-0.403113, abs=1e-6)
    assert (terminated, truncated, info) == (False, False, {"success": 0.0})
    # (3, 7) is clipped to (1, 1): to (0.2, 0.15); to the goal (0.1, 0.25): √(0.01 + 0.0625) = 0.269258
    observation, reward, *_ = env.step(np.array([3.0, 7.0]))
    np.testing.assert_allclose(observation, [0.2, 0.15], rtol=0, atol=1e-12)
    assert reward == pytest.approx(-0.269258, abs=1e-6)
    # To (0.3, 0.25), 0.15 from the goal, then to (0.3, 0.35), 0.05 from it: solved within 0.1, and the episode goes on.
    assert env.step(np.array([1.0, 1.0]))[4] == {"success": 0.0}
    _, reward, terminated, _, info = env.step(np.array([0.0, 1.0]))
    assert reward == pytest.approx(-0.05, abs=1e-12)
    assert (terminated, info) == (False, {"success": 1.0})


@pytest.mark.parametrize("name", NAMES)
def test_the_reward_is_about_the_goal_of_the_task(name):
    for task in tasks_of(name, num_train=3).train_tasks:
        step = step_all(batch_of([task]), np.zeros((1, 2)), ALL)
        x, y = goal(task)
        assert step.rewards[0] == pytest.approx(0.0 if name == "semicircle" else -np.sqrt(x * x + y * y), abs=1e-12)


def test_semicircle_pays_one_within_its_radius(goals_at):
    goals_at((0.0, 0.499), (0.0, 0.501))
    batch = batch_of(tasks_of("semicircle").train_tasks[:2])
    rewards = []
    for _ in range(4):
        step = step_all(batch, np.array([[0.0, 1.0], [0.0, 1.0]]), np.ones(2, dtype=bool))
        np.testing.assert_array_equal(step.success, step.rewards)
        rewards.append(step.rewards.tolist())
    # y = 0.1, 0.2, 0.3, 0.4. Radius 0.2: 0.499 − 0.3 = 0.199 is within it, 0.501 − 0.3 = 0.201 is not.
    assert rewards == [[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]


def test_goals_fill_their_square():
    goals = np.array([goal(task) for task in tasks_of("goals", num_train=400).train_tasks])
    assert -0.5 <= goals.min() < -0.49
    assert 0.49 < goals.max() <= 0.5
    assert np.abs(goals.mean(0)).max() < 0.06  # σ of a mean of 400 = 1 / √(12 · 400) = 0.0144


def test_semicircle_goals_lie_on_the_upper_unit_half_circle():
    goals = np.array([goal(task) for task in tasks_of("semicircle", num_train=400).train_tasks])
    np.testing.assert_allclose(np.linalg.norm(goals, axis=1), 1.0, rtol=0, atol=1e-12)
    assert goals[:, 1].min() >= 0.0
    assert goals[:, 0].min() < -0.99 and goals[:, 0].max() > 0.99


@pytest.mark.parametrize("name", WEDGES)
def test_wedge_goals_lie_in_their_wedge(name):
    tasks = tasks_of(name, num_train=300).train_tasks
    assert list(dict.fromkeys(task.name for task in tasks)) == ["wedge-0", "wedge-1", "wedge-2", "wedge-3"]
    for wedge, axis in enumerate(([1, 0], [0, 1], [-1, 0], [0, -1])):  # k · 90° as a unit vector
        goals = np.array([goal(task) for task in tasks if task.name == f"wedge-{wedge}"])
        radii = np.linalg.norm(goals, axis=1)
        offsets = np.rad2deg(np.arccos(goals @ axis / radii))
        assert 0.5 <= radii.min() < 0.51 and 0.99 < radii.max() <= 1.0
        assert 38.0 < offsets.max() <= 40.0
        sideways = goals @ [-axis[1], axis[0]]
        assert sideways.min() < -0.3 and sideways.max() > 0.3  # both sides of the axis


@pytest.mark.parametrize("name", NAMES)
def test_train_and_test_goals_are_disjoint_and_do_not_depend_on_their_number(name):
    def drawn(tasks):
        return [goal(task).tobytes() for task in tasks]

    tasks = tasks_of(name, num_train=30, num_test=20)
    train, test = drawn(tasks.train_tasks), drawn(tasks.test_tasks)
    classes = 4 if name in WEDGES else 1
    assert (len(train), len(test)) == (30 * classes, 20 * classes)
    assert len(set(train + test)) == 50 * classes
    assert drawn(tasks_of(name, num_train=5).train_tasks)[:5] == train[:5]
    assert not set(train) & set(drawn(tasks_of(name, num_train=30, seed=1).train_tasks))


def test_wedges_choose_the_families():
    assert [task.name for task in tasks_of("cued_wedges", wedges=(2, 0), num_test=1).test_tasks] == [
        "wedge-2",
        "wedge-0",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_json_rebuilds_goal_and_environment(name):
    task = tasks_of(name, num_test=3, seed=7, horizon=9).test_tasks[-1]
    rebuilt = Task.from_json(task.to_json())
    assert rebuilt == task
    np.testing.assert_array_equal(goal(rebuilt), goal(task))
    ours, theirs = make(rebuilt), NavigationEnv(task)
    ours.reset(), theirs.reset()
    for _ in range(9):
        (observation, *rest), (expected, *expected_rest) = ours.step(np.ones(2)), theirs.step(np.ones(2))
        np.testing.assert_array_equal(observation, expected)
        assert rest == expected_rest
    assert rest[2] is True  # truncated at its own horizon


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_equals_single_environments_to_the_bit(name):
    rng = np.random.default_rng(0)
    tasks = tasks_of(name, num_train=2, horizon=12).train_tasks
    singles = [NavigationEnv(task) for task in tasks]
    batch = NavigationBatch(name, len(tasks) + 3)
    seeds = np.zeros(len(tasks), dtype=np.uint32)
    for _ in range(2):
        last = np.array([env.reset()[0] for env in singles])
        np.testing.assert_array_equal(batch.reset(tasks, seeds), last)
        going = np.ones(len(tasks), dtype=bool)
        while going.any():
            active = going & (rng.uniform(size=len(tasks)) < 0.7)
            actions = rng.uniform(-1.5, 1.5, size=(len(tasks), 2))
            step = step_all(batch, actions, active)
            for i in np.flatnonzero(active):
                last[i], reward, terminated, truncated, info = singles[i].step(actions[i])
                assert (reward, terminated, truncated) == (step.rewards[i], step.terminated[i], step.truncated[i])
                assert info["success"] == step.success[i]
                going[i] = not truncated
            np.testing.assert_array_equal(step.observations, last)  # an inactive point stays where it is


@pytest.mark.parametrize(("name", "horizon"), [("goals", 100), ("semicircle", 60), *((name, 20) for name in WEDGES)])
def test_the_horizon_truncates_and_nothing_terminates(name, horizon):
    tasks = [tasks_of(name).train_tasks[0], tasks_of(name, horizon=3).train_tasks[0]]
    batch = batch_of(tasks)
    steps = [step_all(batch, np.ones((2, 2)), np.ones(2, dtype=bool)) for _ in range(horizon)]
    assert not any(step.terminated.any() for step in steps)
    assert [step.truncated[0] for step in steps] == [False] * (horizon - 1) + [True]
    assert [step.truncated[1] for step in steps[:3]] == [False, False, True]


@pytest.mark.parametrize(
    ("wedge", "move"),
    # (1, 0.5) turned by −90° is (0.5, −1), by −180° (−1, −0.5), by −270° (−0.5, 1); then times 0.1.
    [(0, (0.1, 0.05)), (1, (0.05, -0.1)), (2, (-0.1, -0.05)), (3, (-0.05, 0.1))],
)
def test_rotation_and_cue_by_hand(wedge, move):
    for name in WEDGES:
        env = NavigationEnv(tasks_of(name, wedges=(wedge,)).train_tasks[0])
        start = env.reset()[0]
        observation = env.step(np.array([1.0, 0.5]))[0]
        np.testing.assert_allclose(observation[:2], move if "rotated" in name else (0.1, 0.05), rtol=0, atol=1e-12)
        cue = [float(k == wedge) for k in range(4)] if "cued" in name else []
        assert observation[2:].tolist() == start[2:].tolist() == cue
        assert env.observation_space.shape == observation.shape


def test_only_wedges_have_a_wall_at_1_2():
    for name in NAMES:
        batch = batch_of([tasks_of(name).train_tasks[0]])
        for _ in range(15):
            step = step_all(batch, np.array([[1.0, -1.0]]), ALL)  # 15 · 0.1 = 1.5
        wall = 1.2 if name in WEDGES else 1.5
        np.testing.assert_allclose(step.observations[0, :2], [wall, -wall], rtol=0, atol=1e-12)


def test_set_task_moves_the_goal_at_the_next_reset():
    first, second = tasks_of("goals").train_tasks[:2]
    env = NavigationEnv(first)
    env.reset()
    env.set_task(second)
    assert env.step(np.zeros(2))[1] == -np.linalg.norm(goal(first))
    env.reset()
    assert env.step(np.zeros(2))[1] == -np.linalg.norm(goal(second))


@pytest.mark.parametrize("name", NAMES)
def test_passes_the_environment_checker(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unbounded observations, no spec
        check_env(NavigationEnv(tasks_of(name).train_tasks[0]), skip_render_check=True)


def test_wrong_names_and_numbers_are_named():
    with pytest.raises(ValueError, match=r"name\n.*'goals'.*'goalz'"):
        distribution("navigation", name="goalz")
    with pytest.raises(ValueError, match="horizons"):
        distribution("navigation", horizons=3)
    with pytest.raises(ValueError, match="horizon"):
        distribution("navigation", horizon=0)
    with pytest.raises(ValueError, match="did you mean 'navigation'"):
        distribution("navigatoin")


@pytest.mark.parametrize("wedges", [(4,), (-1,), ()])
def test_a_wedge_that_does_not_exist_is_refused(wedges):
    with pytest.raises(ValueError, match="wedges"):
        distribution("navigation", name="rotated_cued_wedges", wedges=wedges)
