"""Several runs in one figure: what is compared with what, means and intervals by hand."""

import numpy as np
import pytest

from metarl.continual.metrics import Evaluation
from metarl.plots.comparison import MethodCurve, Panel, average_scores, comparison, method_curve, tracked

NAN = float("nan")


def drawn(groups):
    figure = comparison(groups)
    figure.draw_without_rendering()
    return figure


def legend_of(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def curve(label="maml_ppo", values=((1.0, 2.0),), env_steps=(100.0, 200.0), held_out=True):
    return MethodCurve(label, np.array(env_steps), np.array(values), held_out)


def interval(collection):
    """The lower and upper end of a band at each of its places, `[n, 3]`."""
    vertices = collection.get_paths()[0].vertices
    return [[x, *(edge(vertices[vertices[:, 0] == x, 1]) for edge in (min, max))] for x in np.unique(vertices[:, 0])]


def test_a_scalar_by_iteration():
    lines = [
        {"iteration": 1, "env_steps": 10, "meta_test/return_post": 1.0},
        {"iteration": 1, "env_steps": 10, "meta_train/return_post": 5.0},
        {"iteration": 2, "env_steps": 20, "meta_test/return_post": 2.0},
        {"iteration": 2, "env_steps": 20, "meta_test/return_post": 3.0},  # a resumed run evaluates again
    ]
    assert tracked(lines, "meta_test/return_post") == {1: (10, 1.0), 2: (20, 3.0)}


def test_the_score_of_a_sequence_is_the_mean_over_its_stages():
    evaluations = [
        Evaluation(0, 0, 0, (0.0, 0.5), (0.0, 0.0)),
        Evaluation(5, 50, 0, (1.0, NAN), (0.0, 0.0)),  # one stage has no score: no mean of both
        Evaluation(9, 90, 1, (0.5, 1.0), (0.0, 0.0)),
    ]
    assert average_scores(evaluations) == {0: (0, 0.25), 9: (90, 0.75)}


def test_runs_meet_at_the_iterations_that_all_have():
    first = {1: (100, 1.0), 2: (200, 2.0), 3: (300, 3.0)}
    second = {1: (80, 3.0), 3: (260, 7.0), 4: (350, 9.0)}  # episodes that end early take fewer steps
    found = method_curve("rl2", [first, second], held_out=True)
    np.testing.assert_array_equal(found.env_steps, [90, 280])
    np.testing.assert_array_equal(found.values, [[1, 3], [3, 7]])
    assert (found.label, found.held_out) == ("rl2", True)
    assert method_curve("rl2", [first, {}], held_out=True) is None


def test_mean_and_band_over_runs_by_hand():
    # Of three runs 1/27 = 3.7 % of all resamples are the least one three times: the interval of the mean ends there.
    three, one = curve("rl2", [[1.0, 4.0], [5.0, 9.0], [3.0, 8.0]]), curve("maml_ppo", [[2.0, 2.5]], [150.0, 300.0])
    figure = drawn({"navigation goals": [Panel("return after adaptation", [three, one])]})
    (axes,) = figure.axes
    assert (axes.get_title(loc="left"), axes.get_xlabel()) == ("navigation goals", "env steps")
    assert axes.get_ylabel() == "return after adaptation"
    rl2, maml = axes.lines
    np.testing.assert_array_equal(rl2.get_xydata(), [[100, 3], [200, 7]])
    np.testing.assert_array_equal(maml.get_xydata(), [[150, 2], [300, 2.5]])
    (band,) = axes.collections
    np.testing.assert_allclose(interval(band), [[100, 1, 5], [200, 4, 9]])
    assert legend_of(figure) == ["rl2, n = 3", "maml_ppo, n = 1"]
    assert figure.legends[0].get_title().get_text().startswith("held-out tasks; mean, and 95 % bootstrap interval")


def test_one_evaluation_has_a_bar_and_no_band():
    (axes,) = drawn({"x": [Panel("return", [curve(values=[[1.0], [3.0]], env_steps=[100.0])])]}).axes
    (bar,) = axes.collections
    np.testing.assert_allclose(bar.get_segments(), [[[100, 1], [100, 3]]])


def test_training_tasks_are_told_apart_from_held_out_ones():
    figure = drawn({"x": [Panel("return", [curve("a"), curve("b", held_out=False)])]})
    assert legend_of(figure) == ["a, n = 1", "b, n = 1 (training tasks)"]
    assert "held-out tasks unless stated otherwise" in figure.legends[0].get_title().get_text()
    a, b = figure.axes[0].lines
    assert (a.get_markerfacecolor(), b.get_markerfacecolor()) == (a.get_color(), "white")


def test_a_method_looks_the_same_on_all_tasks():
    figure = drawn(
        {
            "ML1": [Panel("return", [curve("a"), curve("b")]), Panel("success after adaptation", [curve("b")])],
            "ML10": [Panel("return", [curve("c"), curve("b")])],
        }
    )
    assert len(figure.axes) == 3
    returns, success, others = figure.axes
    looks = {line.get_color() for line in (returns.lines[1], success.lines[0], others.lines[1])}
    assert looks == {returns.lines[1].get_color()}
    assert legend_of(figure) == ["a, n = 1", "b, n = 1", "c, n = 1"]  # b once
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["ML1", "", "ML10"]
    assert success.get_ylim() == (-0.04, 1.04)


@pytest.mark.parametrize(
    "label", ["method {}", "a method of which the name is longer than a legend is wide, as directories' can be, {}"]
)
def test_a_legend_of_twelve_methods_stands_below_the_data(label):
    rng = np.random.default_rng(0)
    steps = np.arange(1.0, 101.0)
    curves = [curve(label.format(n), rng.normal(size=(3, 100)), steps) for n in range(12)]
    figure = drawn({"x": [Panel("return", curves), Panel("success after adaptation", curves[:2])]})
    legend = figure.legends[0].get_window_extent()
    assert min(axes.get_tightbbox().y0 for axes in figure.axes) > legend.y1
    assert (legend.x0 >= 0, legend.y0 >= 0, figure.bbox.width >= legend.x1) == (True, True, True)
    lines = figure.legends[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}) == 12
    # Neighbours differ in more than colour.
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines[:8]}) == 8
    assert figure.axes[0].get_window_extent().height > 0.3 * figure.bbox.height
