"""Sampling of tasks: balance for any number of tasks and classes, and randomness from the generator alone."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metarl.envs.manager import EnvManager
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
    with pytest.raises(ValueError, match="no tasks to sample from"):
        EnvManager([])
