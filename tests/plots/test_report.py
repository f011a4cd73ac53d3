"""Figures of evaluation reports hold the report's numbers, and what is no report is refused in one line."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch

import metarl
from metarl.build import build_agent
from metarl.config.schema import RunConfig
from metarl.deploy.policy import Policy
from metarl.evaluation.held_out import evaluate
from metarl.plots.report import _spread, read_report, report_figure
from metarl.spaces import Spaces


def estimate(mean, low=None, high=None):
    ci95 = [mean if low is None else low, mean if high is None else high]
    return {"mean": mean, "iqm": mean, "ci95": ci95, "iqm_ci95": ci95}


def task(name, success, untrained=0.0, ablated=None):
    """Returns are ten times the success."""
    row = {"name": name, "index": 0, "untrained_success": [untrained] * len(success)}
    row |= {} if ablated is None else {"ablated_success": [ablated] * len(success)}
    row |= {"success": success}
    returns = {
        key.replace("success", "returns"): [10 * value for value in values]
        for key, values in row.items()
        if "success" in key
    }
    return {**row, **returns}


# The mean and its interval are of no tasks: those of the report must be drawn, not others.
REPORT = {
    "protocol": "metarl", "split": "test", "held_out": True, "env_steps": 1_600_000, "seed": 0,
    "adaptation_steps": 1, "trial_episodes": 1, "rollouts_per_task": 10,
    "tasks": [task("push-v3", [0.0, 0.5]), task("reach-v3", [0.25, 0.75], 0.5), task("push-v3", [0.5, 1.0])],
    "aggregate": {
        "success_pre": estimate(0.3, 0.1, 0.6), "success_post": estimate(0.7, 0.2, 0.9),
        "return_pre": estimate(3.0, 1.0, 6.0), "return_post": estimate(7.0, 2.0, 9.0),
        "untrained_success_pre": estimate(0.1), "untrained_success_post": estimate(0.2, 0.1, 0.25),
        "untrained_return_pre": estimate(1.0), "untrained_return_post": estimate(2.0, 1.0, 2.5),
    },
    "phases": [
        {"success": estimate(0.3, 0.1, 0.6), "return": estimate(3.0, 1.0, 6.0), "untrained_success": estimate(0.1)},
        {"success": estimate(0.7, 0.2, 0.9), "return": estimate(7.0, 2.0, 9.0), "untrained_success": estimate(0.2)},
    ],
    "per_class": {},
}  # fmt: skip


def drawn(report):
    """Read a report as from its file, draw it, and lay it out."""
    figure = report_figure(read_report(json.dumps(report).encode()))
    figure.draw_without_rendering()
    return figure


def changed(**fields):
    return {**copy.deepcopy(REPORT), **fields}


def texts(artists):
    return [artist.get_text() for artist in artists]


def legend_of(figure):
    (legend,) = figure.legends
    return texts(legend.get_texts())


def marks(container):
    """Where the marks of a series are and where their intervals reach, `[n, 2]` and `[n, 2, 2]`."""
    return container[0].get_xydata(), np.array(container[2][0].get_segments())


def test_classes_before_and_after_adaptation_beside_an_untrained_agent():
    figure = drawn(REPORT)
    *_, classes = figure.axes
    assert classes.get_xlabel() == "success rate"
    assert texts(classes.get_yticklabels()) == ["all, n = 3", "push-v3, n = 2", "reach-v3, n = 1"]
    assert classes.get_ylim() == (2.5, -0.5)  # the first row is at the top
    assert legend_of(figure) == ["before adaptation", "after adaptation", "untrained, after adaptation"]
    before, after, untrained = map(marks, classes.containers)
    # Three marks share 0.8 of a row: the middle one is on it, the others 0.8/3 above and below.
    np.testing.assert_allclose(before[0], [[0.3, -0.8 / 3], [0.25, 1 - 0.8 / 3], [0.25, 2 - 0.8 / 3]])
    np.testing.assert_allclose(after[0], [[0.7, 0], [0.75, 1], [0.75, 2]])
    np.testing.assert_allclose(untrained[0], [[0.2, 0.8 / 3], [0, 1 + 0.8 / 3], [0.5, 2 + 0.8 / 3]])
    # All: the report's interval. Two tasks: half of all resamples hold one of them twice, so the ends are the tasks.
    # One task: none.
    np.testing.assert_allclose(before[1][..., 0], [[0.1, 0.6], [0.0, 0.5], [0.25, 0.25]])
    np.testing.assert_allclose(after[1][..., 0], [[0.2, 0.9], [0.5, 1.0], [0.75, 0.75]])
    np.testing.assert_allclose(untrained[1][..., 0], [[0.1, 0.25], [0.0, 0.0], [0.5, 0.5]])
    # Single tasks of the class that has several; the two untrained ones are equal and stand beside each other.
    dots = [each.get_offsets() for each in classes.collections if each.get_gid() == "tasks"]
    np.testing.assert_allclose(dots[0], [[0.0, 1 - 0.8 / 3], [0.5, 1 - 0.8 / 3]])
    np.testing.assert_allclose(dots[1], [[0.5, 1], [1.0, 1]])
    np.testing.assert_allclose(dots[2], [[0, 1 + 0.8 / 3 - 0.05], [0, 1 + 0.8 / 3 + 0.05]])


def test_the_mark_before_adaptation_is_hollow_and_others_are_filled():
    figure = drawn(REPORT)
    success, _, classes = figure.axes
    assert [container[0].get_markerfacecolor() for container in classes.containers] == ["white", "#0072B2", "0.45"]
    assert [line.get_markerfacecolor() for line in figure.legends[0].get_lines()] == ["white", "#0072B2", "0.45"]
    assert [container[0].get_marker() for container in classes.containers] == ["o", "o", "s"]
    first = [line for line in success.lines if line.get_gid() == "first phase"]
    assert [line.get_markerfacecolor() for line in first] == ["white", "white"]
    np.testing.assert_allclose([line.get_ydata()[0] for line in first], [0.3, 0.1])


def test_every_phase_with_its_interval():
    success, returns, _ = drawn(REPORT).axes
    assert (success.get_ylabel(), returns.get_ylabel()) == ("success rate", "return of an episode")
    assert success.get_xlabel() == returns.get_xlabel() == "adaptation steps"
    assert list(success.get_xticks()) == [0, 1]
    agent, untrained = map(marks, success.containers)
    # Two agents, 0.025 · 1.5 apart, so that intervals do not cover each other.
    np.testing.assert_allclose(agent[0], [[-0.01875, 0.3], [0.98125, 0.7]])
    np.testing.assert_allclose(untrained[0], [[0.01875, 0.1], [1.01875, 0.2]])
    np.testing.assert_allclose(agent[1][..., 1], [[0.1, 0.6], [0.2, 0.9]])
    (agent,) = map(marks, returns.containers)  # these phases have no return of the untrained agent
    np.testing.assert_allclose(agent[0][:, 1], [3, 7])
    np.testing.assert_allclose(agent[1][..., 1], [[1, 6], [2, 9]])


def test_an_agent_with_a_memory_and_without_it():
    report = changed(adaptation_steps=0, trial_episodes=2, ablate="memory", rollouts_per_task=2)
    report["tasks"] = [task("reach-v3", [0.2, 0.8], 0.0, 0.4), task("reach-v3", [0.4, 0.6], 0.0, 0.6)]
    report["aggregate"]["ablated_success_post"] = estimate(0.5, 0.4, 0.6)
    report["phases"][1]["ablated_success"] = estimate(0.5, 0.4, 0.6)
    figure = drawn(report)
    success, _, classes = figure.axes
    assert legend_of(figure) == [
        "first episode",
        "last episode",
        "without memory, last episode",
        "untrained, last episode",
    ]
    assert success.get_xlabel() == "episode of the trial"
    assert list(success.get_xticks()) == [1, 2]
    agent, ablated, untrained = success.containers
    np.testing.assert_allclose(ablated[0].get_xydata(), [[2, 0.5]])
    assert len({each[0].get_color() for each in (agent, ablated, untrained)}) == 3
    assert len({each[0].get_marker() for each in (agent, ablated, untrained)}) == 3
    # One class: its row is that of all tasks, with the report's interval.
    assert texts(classes.get_yticklabels()) == ["reach-v3, n = 2"]
    xy, reach = marks(classes.containers[2])
    np.testing.assert_allclose(xy, [[0.5, 0.1]])  # the third of four: 0.8 · (2.5/4 − 1/2) below
    np.testing.assert_allclose(reach[..., 0], [[0.4, 0.6]])
    assert "2 held-out tasks, 2 trials each, after 1.6M env steps" in figure.legends[0].get_title().get_text()


def test_returns_where_success_is_not_defined():
    report = changed(held_out=False, split="train")
    report["aggregate"] = {name: value for name, value in report["aggregate"].items() if "success" not in name}
    report["tasks"] = [{**row, "success": [None, None], "untrained_success": [None, None]} for row in report["tasks"]]
    figure = drawn(report)
    phases, classes = figure.axes
    assert phases.get_ylabel() == classes.get_xlabel() == "return of an episode"
    np.testing.assert_allclose(marks(classes.containers[1])[0][:, 0], [7, 7.5, 7.5])
    assert "3 train tasks (NOT held out)" in figure.legends[0].get_title().get_text()


def test_a_class_without_success_says_so():
    report = changed()
    report["tasks"][1]["success"] = report["tasks"][1]["untrained_success"] = [0.5, None]
    *_, classes = drawn(report).axes
    assert texts(classes.get_yticklabels())[2] == "reach-v3, n = 0"
    assert [(text.get_text(), text.get_position()) for text in classes.texts] == [("not defined", (0.5, 2))]
    assert [len(container[0].get_xdata()) for container in classes.containers] == [2, 2, 2]


def test_one_task_a_class_has_no_interval():
    report = changed(tasks=[task("a", [0.0, 0.5]), task("b", [0.5, 1.0])])
    assert "one task per class has no interval" in drawn(report).legends[0].get_title().get_text()
    assert "faint dots: tasks" in drawn(REPORT).legends[0].get_title().get_text()


@pytest.mark.parametrize("per_class", [1, 3])
def test_forty_five_classes_are_legible(per_class):
    names = [f"a-class-of-tasks-with-a-long-name-{number}" for number in range(45)]
    report = changed(
        tasks=[task(name, [0.1, 0.9], 0.0, 0.3) for name in names for _ in range(per_class)], ablate="reward"
    )
    report["aggregate"]["ablated_success_post"] = estimate(0.5, 0.4, 0.6)
    figure = drawn(report)
    *phases, classes = figure.axes
    labels = [label.get_window_extent() for label in classes.get_yticklabels()]
    assert len(labels) == 46
    assert all(lower.y1 < upper.y0 for upper, lower in itertools.pairwise(labels))
    assert min(label.x0 for label in labels) >= 0
    # Marks of a row and its neighbours: the nearest are at least their size in points apart.
    heights = np.sort(np.concatenate([container[0].get_xydata()[:, 1] for container in classes.containers]))
    points_per_row = classes.get_window_extent().height / figure.dpi * 72 / 46
    assert np.diff(heights).min() * points_per_row > classes.containers[0][0].get_markersize()
    assert not [each for each in classes.collections if each.get_gid() == "tasks"]
    legend = figure.legends[0].get_window_extent()
    assert legend.y0 > max(axes.get_window_extent().y1 for axes in phases)
    assert figure.bbox.height >= legend.y1
    assert figure.get_figheight() > 2 * drawn(REPORT).get_figheight()


@pytest.mark.parametrize("report", [REPORT, changed(tasks=REPORT["tasks"][:1])])
def test_the_legend_stands_above_the_data(report):
    figure = drawn(report)
    legend = figure.legends[0].get_window_extent()
    assert legend.y0 > max(axes.get_window_extent().y1 for axes in figure.axes)
    assert (legend.x0 >= 0, figure.bbox.width >= legend.x1, figure.bbox.height >= legend.y1) == (True, True, True)


def test_equal_scores_stand_beside_each_other():
    # Three equal ones at −1/3, 0 and 1/3, the lone one on the line.
    np.testing.assert_allclose(_spread([1.0, 0.5, 1.0, 1.0]), [-1 / 3, 0, 0, 1 / 3])


OFFICIAL = {
    "protocol": "metaworld", "benchmark": "ML10", "split": "test", "env_steps": 2_000_000, "adaptation_episodes": 10,
    "evaluation_episodes": 3, "success_mean": 0.75, "success_per_class": {"push-v3": 1.0, "reach-v3": 0.5},
    "per_environment": {"success_mean": 0.5, "success_per_class": {"push-v3": 0.75, "reach-v3": 0.25}},
}  # fmt: skip


def test_an_official_report_shows_both_counts():
    figure = drawn(OFFICIAL)
    (axes,) = figure.axes
    assert legend_of(figure) == ["per environment", "as Meta-World counts"]
    assert texts(axes.get_yticklabels()) == ["mean of classes", "push-v3", "reach-v3"]
    ours, official = axes.containers
    # Two marks share 0.8 of a row: 0.2 above it and 0.2 below.
    np.testing.assert_allclose(ours[0].get_xydata(), [[0.5, -0.2], [0.75, 0.8], [0.25, 1.8]])
    np.testing.assert_allclose(official[0].get_xydata(), [[0.75, 0.2], [1.0, 1.2], [0.5, 2.2]])
    title = figure.legends[0].get_title().get_text()
    assert "10 episodes to adapt on, then 3 are counted" in title
    assert "after 2M env steps" in title
    one_class = drawn({**OFFICIAL, "success_per_class": {"reach-v3": 0.5}})
    assert texts(one_class.axes[0].get_yticklabels()) == ["reach-v3"]
    np.testing.assert_allclose([each[0].get_xydata()[:, 0] for each in one_class.axes[0].containers], [[0.25], [0.5]])


def test_what_evaluate_writes_is_drawn():
    config = RunConfig.model_validate({"rollouts_per_task": 2, "agent": {"hidden_sizes": [8], "adaptation_steps": 2}})
    spaces = Spaces(2, (-1.0, -1.0), (1.0, 1.0))
    agent = build_agent(config, spaces, torch.device("cpu"))
    policy = Policy(config, agent, spaces, 1234, agent.initial_state(1))
    goals = metarl.envs.distribution("navigation", name="goals", horizon=5, num_train=7, num_test=3)
    report = evaluate(policy, goals.test_tasks)
    success, returns, classes = drawn(report).axes
    assert texts(classes.get_yticklabels()) == ["goals, n = 3"]
    for axes, measure in ((success, "success"), (returns, "return")):
        assert [container[0].get_xydata()[:, 1].tolist() for container in axes.containers] == [
            [phase[prefix + measure]["mean"] for phase in report["phases"]] for prefix in ("", "untrained_")
        ]


def without(key):
    return json.dumps({name: value for name, value in REPORT.items() if name != key})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Invalid JSON: EOF"),
        ('{"protocol": "metarl", "spl', "Invalid JSON: EOF"),
        ("[1, 2]", "expected an object"),
        ('{"stages": []}', "the field protocol is missing"),
        ('{"protocol": "other"}', "'other'"),
        (without("phases"), "phases: Field required"),
        (json.dumps(changed(phases=[])), "phases: Tuple should have at least 1 item"),
        (json.dumps(changed(tasks=[{"name": "a", "returns": ["x"], "success": [1]}])), "tasks.0.returns.0: "),
        (json.dumps(changed(aggregate={"success_post": {"mean": float("nan")}})), "aggregate.success_post.mean: "),
        (json.dumps({**OFFICIAL, "per_environment": {}}), "per_environment.success_mean: Field required"),
    ],
)
def test_what_is_no_report_is_told_in_one_line(text, message):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        read_report(text.encode())
    assert message in str(error.value)


def test_a_report_of_dropped_episodes_alone_has_nothing_to_draw():
    with pytest.raises(ValueError, match="all episodes were dropped"):
        report_figure(read_report(json.dumps(changed(aggregate={})).encode()))
