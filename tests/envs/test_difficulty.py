"""How hard the tasks of each family are, which is what a curriculum goes by."""

import gymnasium
import numpy as np
import pytest

import metarl
from metarl.envs.metaworld.env import goal_vector
from metarl.envs.mujoco import env as mujoco
from metarl.envs.navigation import goal


@pytest.mark.parametrize("name", ["goals", "semicircle", "rotated_wedges"])
def test_navigation_is_as_hard_as_its_goal_is_far(name):
    tasks = metarl.envs.distribution("navigation", name=name, num_train=2)
    for task in tasks.train_tasks:
        distance = np.hypot(*goal(task))
        assert tasks.difficulty(task) == pytest.approx(distance, rel=1e-12)
        if name == "semicircle":
            assert tasks.difficulty(task) == pytest.approx(1.0, rel=1e-12)
        else:  # the reward of staying where one starts is minus the distance
            env = tasks.make(task)
            env.reset(seed=0)
            assert env.step(np.zeros(2))[1] == pytest.approx(-tasks.difficulty(task), rel=1e-12)


def test_a_half_cheetah_runs_backward_with_more_difficulty():
    tasks = metarl.envs.distribution("mujoco", name="HalfCheetahDir")
    assert {task.name: tasks.difficulty(task) for task in tasks.train_tasks} == {
        "HalfCheetahDir-forward": 0.0,
        "HalfCheetahDir-backward": np.pi,
    }


@pytest.mark.parametrize(
    ("name", "aim", "expected"),
    [
        ("HalfCheetahVel", {"velocity": 1.25}, 1.25),
        ("AntGoal", {"goal": np.array([-0.6, 0.8])}, 1.0),
        ("AntDir", {"direction": np.array([0.0, -1.0])}, np.pi / 2),  # a quarter turn, left or right
        ("HumanoidDir", {"direction": np.array([np.cos(3.0), np.sin(3.0)])}, 3.0),
        ("HumanoidDir", {"direction": np.array([np.cos(-3.0), np.sin(-3.0)])}, 3.0),
    ],
)
def test_locomotion_is_as_hard_as_what_it_aims_at(name, aim, expected, monkeypatch):
    tasks = metarl.envs.distribution("mujoco", name=name, num_train=2)
    monkeypatch.setattr(mujoco, "parameters", lambda task: aim)
    assert tasks.difficulty(tasks.train_tasks[0]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "nominal"), [("HopperRandParams", "Hopper-v5"), ("Walker2DRandParams", "Walker2d-v5")]
)
def test_random_parameters_are_as_hard_as_they_are_far_from_nominal(name, nominal):
    tasks = metarl.envs.distribution("mujoco", name=name, num_train=2)
    nominal = gymnasium.make(nominal).unwrapped.model
    found = []
    for task in tasks.train_tasks:
        model = tasks.make(task).model
        logs = []
        for field in ("body_mass", "body_inertia", "dof_damping", "geom_friction"):
            ours, theirs = getattr(model, field).ravel(), getattr(nominal, field).ravel()
            logs += [np.log(a / b) for a, b in zip(ours, theirs, strict=True) if b != 0]
        found.append(np.sqrt(np.mean(np.square(logs))))
        assert tasks.difficulty(task) == pytest.approx(found[-1], rel=1e-9)
    assert found[0] != found[1]


HAND = np.array([0.0, 0.6, 0.2])
"""Where the hand starts in the classes below (`hand_init_pos` upstream)."""


@pytest.mark.parametrize("name", ["reach-v3", "reach-wall-v3", "push-v3", "pick-place-v3", "sweep-v3"])
def test_one_class_of_meta_world_is_as_hard_as_the_path_of_the_hand_is_long(name):
    tasks = metarl.envs.distribution("metaworld", benchmark="ML1", name=name, seed=3)
    for task in tasks.train_tasks[:2]:
        vector = goal_vector(task)
        if name.startswith("reach"):
            expected = np.linalg.norm(vector[3:] - HAND)
        elif name == "sweep-v3":  # it draws its object alone
            expected = np.linalg.norm(vector - HAND)
        else:
            expected = np.linalg.norm(vector[:3] - HAND) + np.linalg.norm(vector[3:] - vector[:3])
        assert tasks.difficulty(task) == pytest.approx(expected, rel=1e-6)
    listed = metarl.envs.distribution("metaworld", benchmark="custom", names=[name], seed=3)
    assert listed.difficulty(task) == tasks.difficulty(task)


def test_classes_of_meta_world_are_as_hard_as_they_come_late_in_the_list():
    names = ["push-v3", "reach-v3", "door-open-v3"]
    tasks = metarl.envs.distribution("metaworld", benchmark="custom", names=names)
    assert [tasks.difficulty(task) for task in tasks.train_tasks[::50]] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("benchmark", ["ML10", "ML25", "ML45"])
def test_the_classes_of_an_official_benchmark_have_no_order(benchmark):
    tasks = metarl.envs.distribution("metaworld", benchmark=benchmark)
    with pytest.raises(ValueError, match=f"the classes of {benchmark} have no order of difficulty"):
        tasks.difficulty(tasks.train_tasks[0])
