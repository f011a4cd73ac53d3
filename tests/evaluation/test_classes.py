"""Reports and metrics of tasks of several classes, whose outcomes are given: everything here is known by hand."""

import numpy as np
import pytest
import torch

from metarl.evaluation.held_out import evaluate_agent, held_out_metrics
from metarl.training.loop import rollout_metrics
from metarl.types import Rollout, Task

CLASSES = {"easy": (1.0, 1.0, 1.0), "learned": (0.0, 1.0, 1.0), "hard": (0.0, 0.0, 0.0), "lost": (1.0, 0.0, 0.0)}
"""Success of every task of a class before adaptation, after one step, and after two."""

TASKS = [Task("toy", "Toy", "test", name, index, 0) for name in CLASSES for index in range(3)]


class Agent:
    """Counts its adaptation steps."""

    device, adapts_by, adaptation_steps, trial_episodes, noise_size = torch.device("cpu"), "gradient", 2, 1, 1

    def initial_state(self, num_tasks):
        return 0

    def adapt(self, state, rollout):
        return state + 1


class Untrained(Agent):
    """Solves nothing."""

    def initial_state(self, num_tasks):
        return -9


class Collector:
    """Returns rollouts of two steps; the reward of each step is 1 + success, and a success is seen at the first."""

    max_tasks = 5  # tasks of one class are collected in different parts

    def collect(self, agent, state, tasks, rollouts_per_task, seeds):
        outcome = torch.tensor([CLASSES[task.name][state] if state >= 0 else 0.0 for task in tasks])
        shape = (len(tasks), rollouts_per_task, 2)
        outcome = outcome[:, None, None].expand(shape)
        first = torch.tensor([True, False]).expand(shape)
        zeros, no = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
        return Rollout(
            observations=zeros[..., None],
            final_observations=zeros[..., None],
            actions=zeros[..., None],
            rewards=1.0 + outcome,
            log_probs=zeros,
            terminated=no,
            truncated=~first,
            episode_start=first,
            valid=~no,
            success=outcome * first,
        )


@pytest.fixture(scope="module")
def report():
    return evaluate_agent(Agent(), Collector(), TASKS, 2, seed=0, env_steps=7, untrained=Untrained())


def test_means_are_over_all_tasks_and_each_class_has_its_own(report):
    means = {name: entry["mean"] for name, entry in report["aggregate"].items()}
    assert means == {
        "success_pre": 0.5,
        "success_post": 0.5,
        "success_gain": 0.0,
        "return_pre": 3.0,
        "return_post": 3.0,
        "return_gain": 0.0,
        "untrained_success_pre": 0.0,
        "untrained_success_post": 0.0,
        "untrained_return_pre": 2.0,
        "untrained_return_post": 2.0,
    }
    for name, phases in CLASSES.items():
        row = report["per_class"][name]
        assert (row["success_pre"], row["success_post"]) == (phases[0], phases[-1])
        assert row["success_gain"] == phases[-1] - phases[0] and row["untrained_success_post"] == 0.0


def test_intervals_are_bootstrapped_within_classes(report):
    """Within a class all tasks are alike, so that no interval has a width; over all tasks 0.5 ± 0.25 would be found."""
    for name, entry in report["aggregate"].items():
        assert entry["ci95"] == [entry["mean"]] * 2, name
        assert entry["iqm_ci95"] == [entry["iqm"]] * 2, name
    for phase in report["phases"]:
        assert phase.keys() == {"return", "success", "untrained_return", "untrained_success"}
        assert all(entry["ci95"] == [entry["mean"]] * 2 for entry in phase.values())
    assert [phase["success"]["mean"] for phase in report["phases"]] == [0.5, 0.5, 0.5]


def test_tracked_scalars_name_the_phase_and_the_class(report):
    metrics = held_out_metrics(report)
    assert metrics["meta_test/success_pre"] == metrics["meta_test/success_post"] == 0.5
    assert {name: metrics[f"meta_test/{name}/success_post"] for name in CLASSES} == {
        name: phases[-1] for name, phases in CLASSES.items()
    }


@pytest.mark.parametrize("names", [["learned"], ["lost"], ["easy", "learned", "hard"]])
def test_metrics_of_training_tell_success_before_adaptation_from_success_after(names):
    tasks = [task for task in TASKS if task.name in names]
    metrics = rollout_metrics([Collector().collect(Agent(), phase, tasks, 2, None) for phase in range(3)])
    before, after = (np.mean([CLASSES[name][phase] for name in names]) for phase in (0, 2))
    assert (metrics["meta_train/success_pre"], metrics["meta_train/success_post"]) == pytest.approx((before, after))
    assert metrics["meta_train/return_pre"] == pytest.approx(2 + 2 * before)
    assert metrics["adaptation/return_after_1"] == pytest.approx(2 + 2 * np.mean([CLASSES[name][1] for name in names]))
