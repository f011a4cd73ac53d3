"""Sampling of tasks: balance for any number of tasks and classes, and randomness from the generator alone."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metarl.envs.manager import Curriculum, EnvManager, JointManager
from metarl.types import Task


def tasks_of(*goals):
    """Class i has `goals[i]` goals."""
    return [Task("toy", "Toy", "train", f"class-{i}", j, 0) for i, count in enumerate(goals) for j in range(count)]


@given(
    goals=st.lists(st.integers(1, 7), min_size=1, max_size=12), num_tasks=st.integers(1, 60), seed=st.integers(0, 2**32)
)
def test_any_number_is_balanced_over_classes_and_goals(goals, num_tasks, seed):
    tasks = tasks_of(*goals)
    drawn = EnvManager(tasks).sample(num_tasks, np.random.default_rng(seed))
    assert len(drawn) == num_tasks
    assert set(drawn) <= set(tasks)
    per_class, per_goal = Counter(task.name for task in drawn), Counter(drawn)
    counts = [per_class[f"class-{i}"] for i in range(len(goals))]
    assert max(counts) - min(counts) <= 1
    for i in range(len(goals)):  # no goal comes again before the class is exhausted
        counts = [per_goal[task] for task in tasks if task.name == f"class-{i}"]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    ("classes", "expected"),
    # 20 = 1 · 20 = 10 · 2 = 45 · 0 + 20, with the 50 goals a class that Meta-World has.
    [(1, {20: 1}), (10, {2: 10}), (45, {1: 20})],
)
def test_the_default_meta_batch_of_20_fits_every_benchmark(classes, expected):
    drawn = EnvManager(tasks_of(*[50] * classes)).sample(20, np.random.default_rng(0))
    assert Counter(Counter(task.name for task in drawn).values()) == expected
    assert len(set(drawn)) == 20


def test_every_class_and_every_goal_gets_its_turn():
    manager = EnvManager(tasks_of(3, 3))
    seen = {manager.sample(1, np.random.default_rng(seed))[0] for seed in range(100)}
    assert seen == set(tasks_of(3, 3))  # one of six is missed with probability 6 · (5/6)^100 ≈ 7e-8
    rng = np.random.default_rng(0)
    assert {manager.sample(1, rng)[0] for _ in range(100)} == set(tasks_of(3, 3))


def test_equal_generators_give_equal_tasks_and_others_differ():
    def drawn(seed):
        return EnvManager(tasks_of(50, 50, 50)).sample(20, np.random.default_rng(seed))

    np.random.seed(1)  # has no effect
    first = drawn(3)
    np.random.seed(2)
    assert drawn(3) == first
    assert drawn(4) != first


def test_it_keeps_no_state_and_leaves_the_global_generator_alone():
    manager = EnvManager(tasks_of(5, 2))
    np.random.seed(0)
    expected = np.random.get_state()
    first = manager.sample(9, np.random.default_rng(0))
    assert manager.sample(9, np.random.default_rng(0)) == first
    for left, right in zip(np.random.get_state(), expected, strict=True):
        np.testing.assert_array_equal(left, right)


def test_no_tasks_is_an_error():
    with pytest.raises(ValueError, match="tasks is empty; expected at least one"):
        EnvManager([])


# Curricula


def graded(difficulties, start_fraction=0.2, iterations=4, names=None):
    """One task a difficulty, all of one class or of the classes `names`, with a curriculum."""
    names = names or ["toy"] * len(difficulties)
    tasks = [Task("toy", "Toy", "train", name, i, 0) for i, name in enumerate(names)]
    return tasks, EnvManager(tasks, Curriculum(lambda task: difficulties[task.index], start_fraction, iterations))


def test_the_fraction_grows_linearly_until_it_is_all():
    curriculum = Curriculum(lambda task: 0.0, start_fraction=0.2, iterations=4)
    # 0.2 + 0.8 · i / 4
    assert [curriculum.fraction(i) for i in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert curriculum.fraction(4) == 1.0
    assert Curriculum(lambda task: 0.0, 1.0, 3).fraction(0) == 1.0
    assert Curriculum(lambda task: 0.0, 0.5, 1).fraction(1) == 1.0


def test_the_easiest_tasks_come_first_in_the_order_of_the_list():
    tasks, manager = graded([3.0, -1.0, 5.0, 2.0, 4.0])
    # One more of the five each iteration: -1, then 2, 3, 4, 5.
    expected = [[1], [1, 3], [0, 1, 3], [0, 1, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    for iteration, indices in enumerate(expected):
        assert manager.allowed(iteration) == [tasks[i] for i in indices]
        assert manager.fraction(iteration) == len(indices) / 5
        seen = {task for seed in range(60) for task in manager.sample(1, np.random.default_rng(seed), iteration)}
        assert seen == {tasks[i] for i in indices}  # one of five is missed with probability 5 · (4/5)^60 ≈ 8e-6


@pytest.mark.parametrize(
    ("count", "fraction", "allowed"),
    # 0.3 · 10 = 3 and not 4, though floating point makes it a little more; 0.4 · 3 = 1.2 is rounded up; one at least.
    [(10, 0.3, 3), (3, 0.4, 2), (3, 0.2, 1), (3, 1e-15, 1), (3, 1.0, 3)],
)
def test_a_fraction_of_the_tasks_is_rounded_up(count, fraction, allowed):
    _, manager = graded(list(range(count)), fraction)
    assert len(manager.allowed(0)) == allowed


def test_equally_hard_tasks_come_in_together():
    tasks, manager = graded([1.0, 0.0, 1.0, 0.0, 0.0])
    # 1 of 5 is one of the three easy ones, so all of them; 4 of 5 is one of the two hard ones.
    assert [len(manager.allowed(i)) for i in range(5)] == [3, 3, 3, 5, 5]
    assert manager.allowed(0) == [tasks[1], tasks[3], tasks[4]] and manager.fraction(0) == 0.6


@given(
    difficulties=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30).filter(lambda all: max(all) - min(all) > 1),
    percent=st.integers(1, 100),
    iterations=st.integers(1, 9),
    iteration=st.integers(0, 12),
    num_tasks=st.integers(1, 30),
    seed=st.integers(0, 2**32),
)
def test_no_task_is_harder_than_allowed_and_the_allowed_classes_are_balanced(
    difficulties, percent, iterations, iteration, num_tasks, seed
):
    names = [f"class-{i % 3}" for i in range(len(difficulties))]
    tasks, manager = graded(difficulties, percent / 100, iterations, names)
    drawn = manager.sample(num_tasks, np.random.default_rng(seed), iteration)
    start = Fraction(percent, 100)
    fraction = min(Fraction(1), start + (1 - start) * Fraction(iteration, iterations))
    hardest = sorted(difficulties)[math.ceil(fraction * len(tasks)) - 1]
    allowed = [task for task in tasks if difficulties[task.index] <= hardest]
    assert len(drawn) == num_tasks and set(drawn) <= set(allowed)
    per_class = Counter(task.name for task in drawn)
    counts = [per_class[name] for name in {task.name for task in allowed}]
    assert max(counts) - min(counts) <= 1
    assert manager.sample(num_tasks, np.random.default_rng(seed), iteration) == drawn


def test_without_a_curriculum_and_after_its_end_the_draws_are_the_same():
    tasks, manager = graded([float(i * 7 % 12) for i in range(12)], names=[f"class-{i % 5}" for i in range(12)])
    for seed in range(20):
        plain = EnvManager(tasks).sample(7, np.random.default_rng(seed))
        assert EnvManager(tasks).sample(7, np.random.default_rng(seed), iteration=3) == plain
        assert manager.sample(7, np.random.default_rng(seed), iteration=4) == plain
    assert manager.sample(7, np.random.default_rng(0), 0) != EnvManager(tasks).sample(7, np.random.default_rng(0))


def test_draws_without_a_curriculum_are_those_of_before():
    """Old runs can be reproduced: these were drawn before there were curricula."""
    drawn = EnvManager(tasks_of(3, 2, 4)).sample(8, np.random.default_rng(5))
    assert [(task.name[-1], task.index) for task in drawn] == [
        *(("0", 0), ("0", 2)),
        *(("1", 1), ("1", 0), ("1", 0)),
        *(("2", 3), ("2", 1), ("2", 0)),
    ]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_difficulty_that_is_no_number_is_named(wrong):
    with pytest.raises(ValueError, match=rf'the difficulty of .*"index": 1.* is {wrong}; expected a finite number'):
        graded([0.0, wrong])


@pytest.mark.parametrize("difficulties", [[2.0], [0.0, 0.0], [1.0, 1.0 + 1e-15, 1.0 - 1e-16]])
def test_tasks_without_an_order_are_refused(difficulties):
    with pytest.raises(ValueError, match=rf"the {len(difficulties)} training task\(s\) of Toy are all equally hard"):
        graded(difficulties)


# Tasks of several managers


def stages_of(count, goals=5):
    """Managers of tasks of one class each."""
    return [EnvManager([Task("toy", "Toy", "train", f"class-{i}", j, 0) for j in range(goals)]) for i in range(count)]


@pytest.mark.parametrize(("managers", "num_tasks"), [(3, 12), (3, 10), (3, 2), (1, 4), (4, 1)])
def test_several_managers_give_as_many_tasks_each(managers, num_tasks):
    drawn = JointManager(stages_of(managers)).sample(num_tasks, np.random.default_rng(0))
    counts = Counter(task.name for task in drawn)
    assert len(drawn) == num_tasks
    assert sorted(counts.values(), reverse=True) == sorted(
        (count for i in range(managers) if (count := num_tasks // managers + (i < num_tasks % managers))), reverse=True
    )


def test_which_managers_give_one_more_is_drawn():
    manager = JointManager(stages_of(3))
    more = [
        Counter(task.name for task in manager.sample(4, np.random.default_rng(seed))).most_common(1)[0][0]
        for seed in range(300)
    ]
    for count in Counter(more).values():  # 100 each; ± 5 standard deviations of √(300 · ⅓ · ⅔) = 8.2
        assert 59 < count < 141
    assert len(set(more)) == 3
    equal = [manager.sample(4, np.random.default_rng(7)) for _ in range(2)]
    assert equal[0] == equal[1]


def test_one_manager_gives_its_tasks_and_each_has_its_curriculum():
    """Half of 10 tasks at first and all from iteration 4 on; the other has no curriculum: ½ (0.5 + 1) = 0.75."""
    tasks = [Task("toy", "Toy", "train", "graded", j, 0) for j in range(10)]
    graded_manager = EnvManager(tasks, Curriculum(lambda task: float(task.index), 0.5, 4))
    joint = JointManager([graded_manager, *stages_of(1)])
    assert joint.fraction(0) == pytest.approx(0.75) and joint.fraction(4) == 1.0
    for iteration, most in ((0, 5), (4, 10)):
        seen = {
            task.index
            for seed in range(60)
            for task in joint.sample(4, np.random.default_rng(seed), iteration)
            if task.name == "graded"
        }
        assert seen == set(range(most))
