"""Figures hold what they claim, and `metarl plot` writes them."""

import gc
import importlib
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread

from metarl.cli.plot import _method, _methods, _Run, _tasks_name
from metarl.config.schema import RunConfig, dump_config
from metarl.continual.metrics import evaluations
from metarl.plots import comparison as comparison_plots
from metarl.plots import run as plotting
from metarl.plots.run import Point, Span

NAMES = ("reach", "push", "pick-place")
NAN = float("nan")


def made_up(names=NAMES, iterations=4, seed=0, kept=0.5, steps=2):
    """The lines of a run: each stage ends at score 0.8, and the others keep a part of theirs in each later stage."""
    rng = np.random.default_rng(seed)
    scores, lines = np.full(len(names), 0.1), []

    def line(iteration, stage, **values):
        lines.append({"iteration": iteration, "stage": stage, "env_steps": 100 * iteration, **values})

    def evaluated(iteration, stage):
        noisy = scores + rng.uniform(-0.01, 0.01, len(names))
        after = {f"continual/score/{name}": float(score) for name, score in zip(names, noisy, strict=True)}
        before = {name.replace("score", "score_pre"): score / 2 for name, score in after.items()}
        line(iteration, stage, **after, **before, **{"meta_test/return_pre": 1.0, "meta_test/return_post": 2.0})

    evaluated(0, 0)
    for stage in range(len(names)):
        before = scores.copy()
        for k in range(1, iterations + 1):
            iteration = stage * iterations + k
            scores = before * (1 - k / iterations * (1 - kept))
            scores[stage] = before[stage] + (0.8 - before[stage]) * k / iterations
            returns = {f"adaptation/return_after_{n}": 10.0 * stage + n for n in range(steps + 1)}
            after = {"meta_train/return_pre": 1.0, "meta_train/return_post": float(iteration)}
            line(iteration, stage, **after, **{"meta_train/success_post": 0.5}, **returns)
            if k in (iterations // 2, iterations):
                evaluated(iteration, stage)
    return lines


def texts(artists):
    return [artist.get_text() for artist in artists]


def boundaries(axes):
    return [line.get_xdata()[0] for line in axes.lines if line.get_gid() == "stage boundary"]


def legend_of(figure):
    (legend,) = figure.legends
    return texts(legend.get_texts())


def drawn(figure):
    """Lay a figure out and draw it, as saving does."""
    figure.savefig(io.BytesIO(), dpi=50)
    return figure


LINES = made_up()
SPANS = plotting.stage_spans(LINES, NAMES)


def test_spans_of_stages():
    assert [Span("reach", 0, 400), Span("push", 400, 800), Span("pick-place", 800, 1200)] == SPANS
    begun = [line for line in LINES if line["iteration"] <= 6]
    assert plotting.stage_spans(begun, NAMES) == [Span("reach", 0, 400), Span("push", 400, 600)]
    assert plotting.stage_spans([], NAMES) == []


def test_learning_curves():
    returns, success = drawn(plotting.learning_curves(LINES, SPANS)).axes
    assert (returns.get_ylabel(), success.get_ylabel()) == ("return of an episode", "success rate")
    assert success.get_xlabel() == "env steps"
    before, after, held_out_before, held_out_after = returns.lines[:4]
    assert after.get_label() == "training tasks, after adaptation"
    np.testing.assert_array_equal(after.get_xydata()[[0, -1]], [[100, 1], [1200, 12]])
    np.testing.assert_array_equal(before.get_ydata(), np.ones(12))
    assert held_out_before.get_linestyle() == held_out_after.get_linestyle() == "None"
    np.testing.assert_array_equal(held_out_after.get_xydata(), [[200 * n, 2] for n in range(7)])
    assert boundaries(returns) == boundaries(success) == [400, 800]
    (top,) = returns.child_axes
    assert texts(top.get_xticklabels()) == list(NAMES)
    np.testing.assert_array_equal(top.get_xticks(), [200, 600, 1000])
    labels = [f"{which} tasks, {when} adaptation" for which in ("training", "held-out") for when in ("before", "after")]
    assert legend_of(returns.figure) == labels


def test_learning_curves_of_one_stage_without_success():
    lines = [{name: value for name, value in line.items() if "success" not in name} for line in made_up(["one"])]
    (axes,) = plotting.learning_curves(lines, plotting.stage_spans(lines, ["one"])).axes
    assert (boundaries(axes), axes.child_axes) == ([], [])
    with pytest.raises(ValueError, match="no meta_train/return_post"):
        plotting.learning_curves([], [])


def test_continual_curves():
    scores = evaluations(LINES, NAMES)
    figure = drawn(plotting.continual_curves(scores, SPANS, NAMES))
    (axes,) = figure.axes
    curves = [line for line in axes.lines if line.get_gid() is None]
    assert len(curves) == 3
    for stage, curve in enumerate(curves):
        np.testing.assert_array_equal(curve.get_xdata(), [0, 200, 400, 600, 800, 1000, 1200])
        np.testing.assert_array_equal(curve.get_ydata(), [each.scores[stage] for each in scores])
    own = [line for line in axes.lines if line.get_gid() == "own stage"]
    assert [list(line.get_xdata()) for line in own] == [[0, 200, 400], [400, 600, 800], [800, 1000, 1200]]
    assert boundaries(axes) == [400, 800]
    assert legend_of(figure) == list(NAMES)
    assert axes.get_xlabel() == "env steps"
    assert "after adaptation" in axes.get_ylabel()


def test_continual_curves_pass_over_scores_that_are_not_there():
    lines = [{name: value for name, value in line.items() if "score/push" not in name} for line in LINES]
    (axes,) = plotting.continual_curves(evaluations(lines, NAMES), SPANS, NAMES).axes
    assert [len(line.get_xdata()) for line in axes.lines if line.get_gid() is None] == [7, 0, 7]


def test_adaptation_curves():
    figure = drawn(plotting.adaptation_curves(LINES, NAMES))
    (axes,) = figure.axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[0, 1, 2], [10, 11, 12], [20, 21, 22]]
    assert legend_of(figure) == list(NAMES)
    assert axes.get_xlabel() == "adaptation steps"
    # The mean of the last 10 iterations: of 0 to 19 that of 10 to 19.
    long = [{"stage": 0, "adaptation/return_after_0": k, "adaptation/return_after_1": 2 * k} for k in range(20)]
    (axes,) = plotting.adaptation_curves(long, ["one"], "episodes").axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[14.5, 29.0]]
    assert axes.get_xlabel() == "episodes"


def test_adaptation_curves_without_adaptation():
    assert plotting.adaptation_curves(made_up(steps=0), NAMES) is None
    assert plotting.adaptation_curves([], NAMES) is None


POST = np.array([[0.1, 0.0], [0.8, -0.004], [1.25, NAN]])


def test_score_matrices():
    figure = drawn(plotting.score_matrices(POST / 2, POST, NAMES[:2]))
    left, right, _ = figure.axes
    assert (left.get_title(), right.get_title()) == ("before adaptation", "after adaptation")
    assert texts(right.texts) == ["0.10", "0.00", "0.80", "0.00", "1.25", "–"]
    assert texts(left.texts) == ["0.05", "0.00", "0.40", "0.00", "0.62", "–"]
    assert [text.get_position() for text in right.texts] == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    assert texts(left.get_yticklabels()) == ["before training", "after stage 1", "after stage 2"]
    assert texts(right.get_xticklabels()) == ["1: reach", "2: push"]
    for axes in (left, right):
        # One scale for both, wider than 0 to 1 where scores are.
        assert axes.images[0].get_clim() == (-0.004, 1.25)
        # What was just trained has a frame: column 0 in row 1, column 1 in row 2.
        assert [np.round(frame.get_center(), 6).tolist() for frame in axes.patches] == [[0, 1], [1, 2]]
    np.testing.assert_array_equal(right.images[0].get_array(), np.ma.masked_invalid(POST))


def test_numbers_are_readable_on_their_colours():
    (axes,) = Figure().subplots(1, 1, squeeze=False)[0]
    plotting._heat_map(axes, np.array([[0.0, 1.0], [NAN, 0.5]]), NAMES[:2], (0.0, 1.0))
    assert [to_hex(text.get_color()) for text in axes.texts] == ["#ffffff", "#000000", "#000000", "#ffffff"]


def test_score_matrix_image():
    image = plotting.score_matrix_image(POST, NAMES[:2])
    assert image.dtype == np.uint8
    assert image.shape[2] == 3
    assert image.std() > 10  # it is not blank
    np.testing.assert_array_equal(image, plotting.score_matrix_image(POST, NAMES[:2]))
    assert (image != plotting.score_matrix_image(POST + 0.2, NAMES[:2])).any()


def test_pictures_of_all_stages_have_one_size_and_leave_nothing_behind():
    gc.collect()  # those of other tests
    sizes = {plotting.score_matrix_image(POST[:rows], NAMES[:2]).shape for rows in (1, 2, 3)}
    assert len(sizes) == 1
    assert not [each for each in gc.get_objects() if type(each) is Figure]


@pytest.mark.parametrize("rows", [1, 21])
def test_twenty_stages_with_long_names_fit(rows):
    names = [f"a stage with the rather long name of number {n}" for n in range(20)]
    matrix = np.random.default_rng(0).normal(size=(rows, 20))
    figure = drawn(plotting.score_matrices(matrix, matrix, names))
    size = figure.bbox
    for axes in figure.axes[:2]:
        cell = axes.get_window_extent().width / 20
        assert max(text.get_window_extent().width for text in axes.texts) < cell
        labels = [label.get_window_extent() for label in (*axes.get_xticklabels(), *axes.get_yticklabels())]
        assert min(label.x0 for label in labels) >= 0
        assert min(label.y0 for label in labels) >= 0
        assert max(label.x1 for label in labels) <= size.width


def test_a_legend_of_twenty_stages_fits():
    names = [f"a stage with the rather long name of number {n}" for n in range(20)]
    lines = made_up(names)
    spans = plotting.stage_spans(lines, names)
    figure = drawn(plotting.continual_curves(evaluations(lines, names), spans, names))
    legend = figure.legends[0].get_window_extent()
    assert figure.bbox.height >= legend.y1
    assert legend.y0 >= 0
    assert figure.axes[0].get_window_extent().x1 < legend.x0
    assert len({(line.get_color(), line.get_linestyle()) for line in figure.legends[0].get_lines()}) == 20


def test_names_are_shown_as_they_are():
    names = ["_hidden", "from $1 to $2", "two\nlines"]
    lines = made_up(names)
    scores, spans = evaluations(lines, names), plotting.stage_spans(lines, names)
    figure = drawn(plotting.continual_curves(scores, spans, names))
    assert legend_of(figure) == ["_hidden", r"from \$1 to \$2", "two lines"]
    drawn(plotting.learning_curves(lines, spans))
    plotting.score_matrix_image(np.zeros((1, 3)), names)


def test_names_of_short_stages_are_moved_apart():
    places = plotting._spread(np.array([0.0, 50.0, 51.0, 52.0, 99.0, 100.0]), 0.0, 100.0, 5.0)
    # From the left each at least 5 further, 50 55 60; at the end pushed back from 104 to 100 and from 99 to 95.
    np.testing.assert_array_equal(places, [0, 50, 55, 60, 95, 100])
    # 6 names need 50, but there are only 10: evenly spread.
    np.testing.assert_allclose(plotting._spread(np.arange(6.0), 0.0, 10.0, 10.0), [0, 2, 4, 6, 8, 10])


def test_stability_plasticity_by_hand():
    points = [Point("ewc", 0.4, 0.9), Point("fine-tuning", 0.8, 0.3), Point("ewc", 0.6, 1.0)]
    figure = drawn(plotting.stability_plasticity(points))
    (axes,) = figure.axes
    assert axes.get_xlabel().startswith("plasticity: ")
    assert axes.get_ylabel().startswith("stability: 1 − forgetting")
    assert legend_of(figure) == ["ewc, n = 2", "fine-tuning, n = 1"]
    ewc, tuned = axes.containers
    np.testing.assert_allclose(ewc[0].get_xydata(), [[0.5, 0.95]])
    np.testing.assert_allclose(tuned[0].get_xydata(), [[0.8, 0.3]])
    # Of two runs a resample is both times the same in half of all cases: the interval of the mean ends at the runs.
    across, up = (bars.get_segments()[0] for bars in ewc[2])
    np.testing.assert_allclose(across, [[0.4, 0.95], [0.6, 0.95]])
    np.testing.assert_allclose(up, [[0.5, 0.9], [0.5, 1.0]])
    assert tuned[2] == ()
    (dots,) = [each for each in axes.collections if each.get_gid() == "runs"]
    np.testing.assert_allclose(dots.get_offsets(), [[0.4, 0.9], [0.6, 1.0]])


def write_run(path, lines, names=NAMES, iterations=4, **settings):
    config = RunConfig(stages=[{"name": name, "iterations": iterations} for name in names], **settings)
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(dump_config(config))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def four_runs(tmp_path):
    """Two seeds of two methods."""
    return [
        write_run(tmp_path / f"{name}_seed{seed}", made_up(seed=seed, kept=kept), seed=seed, agent={"inner_lr": rate})
        for name, kept, rate in (("keeps", 0.9, 0.05), ("forgets", 0.2, 0.1))
        for seed in (0, 1)
    ]


def test_plot_of_several_runs(command, four_runs, monkeypatch):
    seen = []
    draw = plotting.stability_plasticity
    monkeypatch.setattr(plotting, "stability_plasticity", lambda points: seen.extend(points) or draw(points))
    status, out, err = command("plot", *four_runs)
    assert (status, err) == (0, "")
    files = ("learning.png", "adaptation.png", "continual.png", "matrix.png")
    expected = [run / "plots" / name for run in four_runs for name in files]
    expected += [four_runs[0] / "plots" / name for name in ("comparison.png", "stability_plasticity.png")]
    assert out.split() == list(map(str, expected))
    for path in expected:
        image = imread(path)
        assert image.shape[0] > 300
        assert image.std() > 0.01
    labels = [point.label for point in seen]
    assert labels[0] == labels[1] != labels[2] == labels[3]
    assert ["keeps" in label for label in labels] == [True, True, False, False]
    # Stages end at 0.8; forgetting is the mean of 0.8 (1 − kept²), 0.8 (1 − kept) and 0, up to the noise of 0.01.
    for point, kept in zip(seen, (0.9, 0.9, 0.2, 0.2), strict=True):
        assert point.plasticity == pytest.approx(0.8, abs=0.01)
        assert point.stability == pytest.approx(1 - 0.8 * (2 - kept - kept**2) / 3, abs=0.02)


def test_plot_out(command, four_runs, tmp_path):
    assert command("plot", *four_runs[1:3], "--out", tmp_path / "new" / "figures")[0] == 0
    compared = sorted(path.name for path in (tmp_path / "new" / "figures").iterdir())
    assert compared == ["comparison.png", "stability_plasticity.png"]
    assert (four_runs[1] / "plots" / "matrix.png").exists()
    _, out, _ = command("plot", four_runs[0], f"{four_runs[0]}/", "--out", tmp_path / "one")  # the same run twice
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "adaptation.png",
        "continual.png",
        "learning.png",
        "matrix.png",
    ]
    assert len(out.split()) == 4


def test_plot_tells_the_matrices_apart(command, tmp_path, monkeypatch):
    seen = []
    draw = plotting.score_matrices

    def spy(pre, post, names):
        seen.append((pre, post))
        return draw(pre, post, names)

    monkeypatch.setattr(plotting, "score_matrices", spy)
    assert command("plot", write_run(tmp_path / "run", LINES))[0] == 0
    ((pre, post),) = seen
    np.testing.assert_allclose(post[[1, 2, 3], [0, 1, 2]], 0.8, rtol=0, atol=0.011)
    np.testing.assert_allclose(pre, post / 2, rtol=0, atol=1e-12)


def test_plot_of_one_stage(command, tmp_path):
    run = write_run(tmp_path / "run", made_up(["one"], steps=0), ["one"])
    _, out, _ = command("plot", run)
    assert out.split() == [str(run / "plots" / "learning.png")]


def test_plot_amid_training(command, four_runs, tmp_path):
    halfway = write_run(tmp_path / "halfway", [line for line in made_up() if line["iteration"] < 6])
    status, out, _ = command("plot", halfway, *four_runs[:1])
    assert status == 0
    assert f"{halfway} is not in stability_plasticity.png: " in out
    assert (halfway / "plots" / "matrix.png").exists()
    assert not (halfway / "plots" / "stability_plasticity.png").exists()
    begun = write_run(tmp_path / "begun", made_up()[:2])  # one iteration
    assert command("plot", begun)[0] == 0


def test_plot_of_an_old_run_without_scores(command, tmp_path):
    lines = [{key: value for key, value in line.items() if "continual" not in key} for line in made_up()]
    _, out, _ = command("plot", write_run(tmp_path / "old", lines))
    assert [path.rpartition("/")[2] for path in out.split()] == ["learning.png", "adaptation.png"]


def test_mistakes_are_told_in_one_line(command, tmp_path, four_runs):
    empty = write_run(tmp_path / "empty", [])
    saved = write_run(tmp_path / "saved", [])  # as Policy.save leaves it
    (saved / "metrics.jsonl").unlink()
    (saved / "checkpoints").mkdir()
    blocked = tmp_path / "file"
    blocked.write_text("")
    for arguments, message in (
        ((saved,), "saved is a saved policy, which has no metrics; plot the run"),
        ((tmp_path / "nowhere",), "nowhere holds no run: there is no config.yaml"),
        ((empty,), "empty has no metrics yet"),
        ((four_runs[0], "--out", blocked), "cannot write "),
        ((four_runs[0], "--out", blocked / "below"), "choose another folder with --out"),
        ((), "metarl plot --help"),
    ):
        status, out, err = command("plot", *arguments)
        assert (status, out) == (2, "")
        assert message in err
        assert err.startswith("metarl: ")
        assert err.count("\n") == 1


REPORT = {
    "protocol": "metarl", "split": "test", "held_out": True, "env_steps": 100, "adaptation_steps": 1,
    "rollouts_per_task": 2, "tasks": [{"name": "goals", "returns": [1.0, 2.0], "success": [None, None]}],
    "aggregate": {"return_pre": {"mean": 1.0}, "return_post": {"mean": 2.0}},
    "phases": [{"return": {"mean": 1.0}}, {"return": {"mean": 2.0}}],
}  # fmt: skip


def test_plot_draws_the_reports_of_evaluations(command, tmp_path):
    run = write_run(tmp_path / "run", made_up(["one"]), ["one"])
    folder = run / "evaluation"
    folder.mkdir()
    (folder / "test.json").write_text(json.dumps(REPORT))
    (folder / "train.json").write_text(json.dumps({**REPORT, "split": "train"}))
    (folder / "continual.json").write_text('{"stages": []}')
    (folder / "notes.txt").write_text("")
    status, out, err = command("plot", run, "--out", tmp_path / "figures")
    assert (status, err) == (0, "")
    expected = ["learning.png", "adaptation.png", "evaluation_test.png", "evaluation_train.png"]
    assert out.split() == [str(tmp_path / "figures" / name) for name in expected]
    assert imread(tmp_path / "figures" / "evaluation_test.png").std() > 0.01


def test_damaged_reports_are_named_and_the_rest_is_drawn(command, tmp_path):
    run = write_run(tmp_path / "run", made_up(["one"]), ["one"])
    folder = run / "evaluation"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps(REPORT)[:100])
    (folder / "b.json").write_text('{"algorithm": "sac"}')
    (folder / "c.json").write_bytes(b"\xff\xfe")
    (folder / "d.json").mkdir()
    (folder / "e.json").write_text(json.dumps({**REPORT, "aggregate": {}}))
    (folder / "f.json").write_text(json.dumps(REPORT))
    status, out, err = command("plot", run)
    assert status == 0
    assert [path.rpartition("/")[2] for path in out.split()] == ["learning.png", "adaptation.png", "evaluation_f.png"]
    lines = err.splitlines()
    assert len(lines) == 5
    for line, name in zip(lines, "abcde", strict=True):
        assert line.startswith(f"metarl: skipped {folder / name}.json: ")


def single(path, tasks, agent="maml_ppo", seed=0, iterations=4, evaluate_until=4, success=True):
    """A run of one stage; held-out returns are ten times the iteration plus the seed."""
    lines = []
    for k in range(1, iterations + 1):
        place = {"iteration": k, "stage": 0, "env_steps": 100 * k}
        lines.append({**place, "meta_train/return_pre": 0.0, "meta_train/return_post": -float(k)})
        if k <= evaluate_until:
            solved = {"meta_test/success_post": k / 4} if success else {}
            lines.append({**place, "meta_test/return_post": 10.0 * k + seed, **solved})
    path.mkdir(parents=True)
    config = RunConfig(seed=seed, agent={"name": agent}, stages=[{"iterations": 4, "tasks": tasks}])
    (path / "config.yaml").write_text(dump_config(config))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


GOALS = {"family": "navigation", "name": "goals"}
REACH = {"family": "metaworld", "benchmark": "ML1", "name": "reach-v3", "horizon": 100}


@pytest.fixture
def compared(monkeypatch):
    """What comparison.png is drawn of; the figures of each run are left out, to be fast."""
    seen = {}
    monkeypatch.setattr(importlib.import_module("metarl.cli.plot"), "_figures", lambda run: [])
    draw = comparison_plots.comparison
    monkeypatch.setattr(comparison_plots, "comparison", lambda groups: seen.update(groups) or draw(groups))
    return seen


def test_runs_on_the_same_tasks_are_compared(command, tmp_path, compared):
    runs = [
        single(tmp_path / "maml_0", GOALS, seed=0),
        single(tmp_path / "maml_1", GOALS, seed=1),
        single(tmp_path / "rl2", GOALS, "rl2"),
        single(tmp_path / "reach_0", REACH, success=False),
        single(tmp_path / "reach_1", REACH, evaluate_until=0, agent="rl2"),
        single(tmp_path / "alone", {**REACH, "horizon": 50}),
    ]
    status, out, err = command("plot", *runs, "--out", tmp_path / "figures")
    assert (status, err) == (0, "")
    assert f"not in comparison.png, since no other run has their tasks: {tmp_path / 'alone'}\n" in out
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["comparison.png"]
    assert list(compared) == ["navigation goals", "metaworld ML1 reach-v3, horizon 100"]
    returns, success = compared["navigation goals"]
    assert (returns.measure, success.measure) == ("return after adaptation", "success after adaptation")
    maml, rl2 = returns.curves
    assert (maml.label, maml.held_out, rl2.label) == ("maml_ppo", True, "rl2")
    np.testing.assert_array_equal(maml.env_steps, [100, 200, 300, 400])
    np.testing.assert_array_equal(maml.values, [[10, 20, 30, 40], [11, 21, 31, 41]])
    np.testing.assert_array_equal(success.curves[1].values, [[0.25, 0.5, 0.75, 1]])
    (returns,) = compared["metaworld ML1 reach-v3, horizon 100"]  # no success there
    # Without evaluations there is the training curve.
    assert [(curve.label, curve.held_out) for curve in returns.curves] == [("maml_ppo", True), ("rl2", False)]
    np.testing.assert_array_equal(returns.curves[1].values, [[-1, -2, -3, -4]])


def test_seeds_are_compared_as_far_as_all_have_come(command, tmp_path, compared):
    runs = [single(tmp_path / f"run_{seed}", GOALS, seed=seed, iterations=4 - 2 * seed) for seed in (0, 1)]
    _, out, _ = command("plot", *runs)
    assert f"maml_ppo is compared up to iteration 2, where {runs[1]} ends\n" in out
    (curve,) = compared["navigation goals"][0].curves
    np.testing.assert_array_equal(curve.values, [[10, 20], [11, 21]])


def test_runs_on_other_tasks_each_are_not_compared(command, tmp_path):
    runs = [single(tmp_path / "a", GOALS), single(tmp_path / "b", REACH)]
    status, out, _ = command("plot", *runs)
    assert status == 0
    assert f"no other run has their tasks: {runs[0]}, {runs[1]}\n" in out
    assert not (runs[0] / "plots" / "comparison.png").exists()


def test_sequences_are_compared_by_the_mean_of_their_scores(command, four_runs, compared):
    command("plot", *four_runs)
    ((title, panels),) = compared.items()
    assert title == "3 stages, reach to pick-place"
    (panel,) = panels
    assert panel.measure == "score after adaptation, mean over stages"
    assert [curve.values.shape for curve in panel.curves] == [(2, 7), (2, 7)]  # 7 evaluations of 2 seeds
    # Before training all are 0.1. At the end the last is at 0.8, the others have kept a part once and twice.
    for curve, kept in zip(panel.curves, (0.9, 0.2), strict=True):
        np.testing.assert_allclose(curve.values[:, 0], 0.1, rtol=0, atol=0.01)
        np.testing.assert_allclose(curve.values[:, -1], 0.8 * (1 + kept + kept**2) / 3, rtol=0, atol=0.01)


def test_methods_have_names():
    ewc, replay, one = SimpleNamespace(name="ewc", coef=10.0), SimpleNamespace(name="replay"), SimpleNamespace()

    def named(stability=(), control="none", stages=(one, one)):
        agent = SimpleNamespace(name="rl2")
        return _method(SimpleNamespace(stability=stability, control=control, stages=stages, agent=agent))

    assert named((ewc, replay)) == "ewc 10 + replay"
    assert named() == "fine-tuning"
    assert named(control="joint") == "joint training"
    assert named((replay,), control="scratch") == "from scratch + replay"
    assert named(stages=(one,)) == "rl2"


def test_methods_of_one_name_are_told_apart_by_their_directories(tmp_path):
    def run(folder, lr, seed, agent="maml_ppo"):
        config = RunConfig(seed=seed, agent={"name": agent, "inner_lr": lr})
        return _Run(tmp_path / folder, config, [], [], 0)

    runs = [run("fast_0", 0.2, 0), run("fast_1", 0.2, 1), run("slow/seed3", 0.1, 3), run("anil", 0.1, 0, "anil")]
    methods = _methods(runs)
    assert {label: [seed.path.name for seed in seeds] for label, seeds in methods.items()} == {
        "maml_ppo, fast": ["fast_0", "fast_1"],
        "maml_ppo, slow": ["seed3"],
        "anil": ["anil"],
    }
    assert list(_methods([run("a/maml_0", 0.1, 0), run("b/maml_0", 0.2, 0)])) == [
        "maml_ppo, a/maml",
        "maml_ppo, b/maml",
    ]
    assert list(_methods([run("a/0", 0.1, 0), run("a/1", 0.2, 1)])) == [
        f"maml_ppo, {tmp_path.name}/a #1",
        f"maml_ppo, {tmp_path.name}/a #2",
    ]


def test_tasks_have_names():
    def named(**tasks):
        return _tasks_name(RunConfig(stages=[{"tasks": tasks}]))

    assert named(**GOALS) == "navigation goals"
    assert named(**REACH) == "metaworld ML1 reach-v3, horizon 100"
    assert named(family="mujoco", name="HalfCheetahVel", velocity=[0, 1]) == "mujoco HalfCheetahVel, velocity 0.0 1.0"
    assert named(family="metaworld", benchmark="custom", names=["reach-v3", "push-v3"]) == (
        "metaworld custom, names reach-v3 push-v3"
    )
    assert named(family="custom") == "custom"
