"""The loop on a small scale: reproducible, resumable bit for bit, everything written where it is looked for."""

import time

import gymnasium
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import metarl
import metarl.runs.checkpoint
import metarl.training.loop
from metarl.config.schema import dump_config, load_config
from metarl.errors import UserError
from metarl.runs.checkpoint import load_latest
from metarl.runs.tracking import read_metrics
from metarl.training.loop import flatten, train

NAVIGATION = """
    --num-tasks 4 --rollouts-per-task 2 --num-workers 0 --device cpu --agent.hidden-sizes [8] --agent.outer.epochs 2
    --stages.0.tasks.horizon 5 --stages.0.iterations 2 --evaluation.every-iterations 0 --evaluation.num-tasks 3
"""


def navigation(extra=""):
    return load_config("navigation_maml_ppo", f"{NAVIGATION} {extra}".split())


def metrics(run_dir, prefix=""):
    """The lines of metrics.jsonl without what the clock says."""
    lines = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in read_metrics(run_dir)]
    return [line for line in lines if any(key.startswith(prefix) for key in line)]


def tensors(run_dir):
    return load_latest(run_dir / "checkpoints").state


def assert_same_run(left, right):
    assert metrics(left) == metrics(right)
    assert load_latest(left / "checkpoints").position == load_latest(right / "checkpoints").position
    ours, theirs = tensors(left), tensors(right)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_same_seed_equal_other_seed_diverges(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(navigation(f"--seed {seed}"), run_dir=tmp_path / name)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert metrics(tmp_path / "a")[-1] != metrics(tmp_path / "c")[-1]
    assert not torch.equal(tensors(tmp_path / "a")["policy.weight_0"], tensors(tmp_path / "c")["policy.weight_0"])


def test_training_changes_the_agent(tmp_path):
    train(navigation("--checkpoint-every-iterations 1"), run_dir=tmp_path)
    first, second = (metarl.runs.checkpoint.load(tmp_path / "checkpoints" / f"00000{i}").state for i in (1, 2))
    assert not torch.equal(first["policy.weight_0"], second["policy.weight_0"])


def test_the_global_generators_have_no_influence(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        torch.manual_seed(seed)
        np.random.seed(seed)
        train(navigation(), run_dir=tmp_path / name)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_no_iteration_repeats_the_randomness_of_another(tmp_path, monkeypatch):
    drawn = []
    for module in (metarl.training.loop, metarl.evaluation.held_out):

        def spy(*args, collect=module.adapt_and_collect):
            drawn.extend(seeds.generate_state(2).tobytes() for seeds in args[4])
            return collect(*args)

        monkeypatch.setattr(module, "adapt_and_collect", spy)
    train(stages(*TWO_STAGES, evaluation={"num_tasks": 2, "every_iterations": 0}), run_dir=tmp_path)
    # 3 iterations of 2 tasks and 2 tasks at the end of each stage, all different; at first and then, both stages are
    # evaluated with the same seeds of 2 tasks, again others: 6 + 4 + 3 · 2 · 2, of which 6 + 4 + 2 differ.
    assert len(drawn) == 22 and len(set(drawn)) == 12


def test_every_iteration_draws_its_tasks_anew(tmp_path, monkeypatch):
    """4 of 100 goals, in two iterations of each of two stages that have the same ones."""
    drawn, collect = [], metarl.training.loop.adapt_and_collect
    monkeypatch.setattr(
        metarl.training.loop,
        "adapt_and_collect",
        lambda *a: drawn.append(frozenset(t.index for t in a[2])) or collect(*a),
    )
    goals = {"tasks": {"family": "navigation", "horizon": 3, "num_train": 100}, "iterations": 2}
    train(stages(goals | {"name": "first"}, goals | {"name": "again"}, num_tasks=4), run_dir=tmp_path)
    assert len(drawn) == len(set(drawn)) == 2 * (2 + 1)  # and at the end of each


def test_the_evaluation_at_the_end_is_on_held_out_tasks_as_the_config_says(tmp_path):
    report = train(navigation("--evaluation.rollouts-per-task 3"), run_dir=tmp_path).report
    assert (report["split"], report["held_out"]) == ("test", True)
    assert (len(report["tasks"]), report["rollouts_per_task"]) == (3, 3)  # where training has 4 and 2


def test_evaluating_does_not_change_training(tmp_path):
    often, never = tmp_path / "often", tmp_path / "never"
    train(navigation("--stages.0.iterations 4 --evaluation.every-iterations 1"), run_dir=often)
    train(navigation("--stages.0.iterations 4 --evaluation.every-iterations 0"), run_dir=never)
    assert metrics(often, "meta_train/") == metrics(never, "meta_train/")
    assert len(metrics(often, "meta_test/")) == 4 and len(metrics(never, "meta_test/")) == 1
    assert all(torch.equal(value, tensors(never)[name]) for name, value in tensors(often).items())


@pytest.mark.slow
def test_the_number_of_workers_has_no_influence(tmp_path):
    shrunk = (
        "--num-tasks 2 --rollouts-per-task 2 --device cpu --agent.hidden-sizes [8] --agent.outer.epochs 2 "
        "--stages.0.tasks.horizon 5 --stages.0.iterations 2"
    )
    for workers in (0, 1, 2):
        flags = f"{shrunk} --num-workers {workers} --num-envs 3".split()
        train(load_config("half_cheetah_dir_maml_ppo", flags), run_dir=tmp_path / str(workers))
    assert_same_run(tmp_path / "0", tmp_path / "1")
    assert_same_run(tmp_path / "1", tmp_path / "2")


# Stopping and resuming

LONGER = "--stages.0.iterations 5 --evaluation.every-iterations 2 --checkpoint-every-iterations 2"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    assert train(navigation(LONGER), run_dir=run_dir).finished
    return run_dir


@pytest.mark.parametrize("stops", [(1,), (2,), (3, 4)])
def test_stop_and_resume_equals_going_on(tmp_path, uninterrupted, stops):
    for number, stop in enumerate(stops):
        run = train(navigation(LONGER), run_dir=tmp_path, max_iterations=stop, resume=number > 0)
        assert not run.finished and load_latest(tmp_path / "checkpoints").position.iteration == stop
    assert train(navigation(LONGER), run_dir=tmp_path, resume=True).finished
    assert_same_run(tmp_path, uninterrupted)


def test_a_request_to_stop_saves_after_the_iteration(tmp_path, uninterrupted):
    answers = iter([False, False, False, True])
    run = train(navigation(LONGER), run_dir=tmp_path, should_stop=lambda: next(answers))
    assert not run.finished and load_latest(tmp_path / "checkpoints").position.iteration == 3
    train(navigation(LONGER), run_dir=tmp_path, resume=True)
    assert_same_run(tmp_path, uninterrupted)


def test_a_time_limit_of_nothing_stops_before_the_first_iteration(tmp_path, uninterrupted):
    assert not train(navigation(LONGER), run_dir=tmp_path, max_minutes=0).finished
    assert metrics(tmp_path) == []
    train(navigation(LONGER), run_dir=tmp_path, resume=True)
    assert_same_run(tmp_path, uninterrupted)


def test_a_crash_between_checkpoints_repeats_what_was_not_saved(tmp_path, uninterrupted):
    """Iteration 3 is tracked, then the run dies: it goes on from iteration 2, and what came later is written anew."""

    def crash(position, scalars):
        if position.iteration == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(navigation(LONGER), run_dir=tmp_path, progress=crash)
    assert metrics(tmp_path)[-1]["iteration"] == 3 and load_latest(tmp_path / "checkpoints").position.iteration == 2
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "meta_tr')
    train(navigation(LONGER), run_dir=tmp_path, resume=True)
    assert_same_run(tmp_path, uninterrupted)


def test_resuming_a_finished_run_trains_nothing_more(tmp_path):
    train(navigation(), run_dir=tmp_path)
    before, saved = metrics(tmp_path), tensors(tmp_path)
    run = train(navigation(), run_dir=tmp_path, resume=True)
    assert run.finished
    assert metrics(tmp_path) == before
    assert all(torch.equal(value, tensors(tmp_path)[name]) for name, value in saved.items())
    assert load_latest(tmp_path / "checkpoints").position.iteration == 2


def test_a_damaged_newest_checkpoint_resumes_from_the_one_before(tmp_path, uninterrupted):
    train(navigation(LONGER), run_dir=tmp_path, max_iterations=3)
    (tmp_path / "checkpoints" / "000003" / "manifest.json").unlink()
    train(navigation(LONGER), run_dir=tmp_path, resume=True)
    assert_same_run(tmp_path, uninterrupted)


def test_a_run_that_no_checkpoint_can_restore_is_not_started_afresh(tmp_path):
    train(navigation(), run_dir=tmp_path)
    for manifest in (tmp_path / "checkpoints").glob("*/manifest.json"):
        manifest.write_text("")
    with pytest.raises(UserError, match=r"000002.*--overwrite"):
        train(navigation(), run_dir=tmp_path, resume=True)
    assert len(metrics(tmp_path)) == 3


# The run directory


def test_a_run_is_not_written_over(tmp_path):
    train(navigation(), run_dir=tmp_path)
    before = metrics(tmp_path)
    with pytest.raises(UserError, match=r"already holds a run.*--resume.*--overwrite"):
        train(navigation(), run_dir=tmp_path)
    assert metrics(tmp_path) == before
    train(navigation("--seed 3"), run_dir=tmp_path, overwrite=True)
    assert len(metrics(tmp_path)) == len(before) and metrics(tmp_path) != before
    assert load_config(tmp_path / "config.yaml").seed == 3
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_there_must_be_a_run_to_resume(tmp_path):
    with pytest.raises(UserError, match="holds no run to resume"):
        train(navigation(), run_dir=tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()


TWO_STAGES = [
    {"name": "first", "tasks": {"family": "navigation", "name": "rotated_wedges", "wedges": [0]}, "iterations": 1},
    {"name": "second", "tasks": {"family": "navigation", "name": "rotated_wedges", "wedges": [1]}, "iterations": 2},
]


def stages(*entries, **settings):
    small = {"num_tasks": 2, "rollouts_per_task": 2, "evaluation": {"num_tasks": 2}, "agent": {"hidden_sizes": [8]}}
    return {**small, "num_workers": 0, "device": "cpu", "stages": list(entries), **settings}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (stages(*TWO_STAGES, seed=1), "seed"),
        (stages(*TWO_STAGES, agent={"hidden_sizes": [8], "inner_lr": 0.2}), r"agent\.inner_lr"),
        (stages(TWO_STAGES[0], TWO_STAGES[1] | {"iterations": 9}), r"stages\.1\.iterations"),
        (stages(*TWO_STAGES, TWO_STAGES[0]), r"stages\.2\.iterations"),
        (stages(TWO_STAGES[0]), r"stages\.1\.iterations"),
    ],
)
def test_resuming_with_another_config_names_what_differs(tmp_path, changed, named):
    train(stages(*TWO_STAGES), run_dir=tmp_path, max_iterations=1)
    with pytest.raises(UserError, match=named):
        train(changed, run_dir=tmp_path, resume=True)


def test_what_has_no_effect_on_results_may_change_on_resuming(tmp_path):
    train(navigation(), run_dir=tmp_path, max_iterations=1)
    train(navigation("--num-workers 2 --keep-checkpoints 1"), run_dir=tmp_path, resume=True)
    train(navigation(), run_dir=tmp_path / "other")
    assert_same_run(tmp_path, tmp_path / "other")


def test_a_directory_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"cannot write to .*--run-dir"):
            train(navigation(), run_dir=run_dir, progress=lambda *_: pytest.fail("trained"))


def test_the_config_of_a_run_is_kept_whole(tmp_path):
    config = navigation()
    train(config, run_dir=tmp_path)
    assert load_config(tmp_path / "config.yaml") == config
    assert "gae_lambda" in (tmp_path / "config.yaml").read_text()  # a default that was named nowhere


# What is tracked


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("tracked")
    reported = []
    config = navigation("--agent.adaptation-steps 2")
    run = train(config, run_dir=run_dir, progress=lambda position, scalars: reported.append((position, dict(scalars))))
    return run_dir, run, reported


def test_metrics_have_the_names_of_the_design(tracked):
    run_dir, run, reported = tracked
    first, second, evaluation = read_metrics(run_dir)
    in_training = {
        *(f"meta_train/{measure}_{phase}" for measure in ("return", "success") for phase in ("pre", "post")),
        *(f"adaptation/return_after_{k}" for k in range(3)),
        "train/loss",
        "train/kl",
        "time/env_steps_per_second",
    }
    assert in_training <= first.keys() == second.keys()
    held_out = {f"meta_test/{measure}_{phase}" for measure in ("return", "success") for phase in ("pre", "post")}
    assert held_out | {"meta_test/goals/success_post"} <= evaluation.keys()
    # 4 tasks · 2 rollouts · 5 steps · 3 phases; an evaluation counts as none.
    assert [line["env_steps"] for line in (first, second, evaluation)] == [120, 240, 240]
    assert [line["iteration"] for line in (first, second, evaluation)] == [1, 2, 2]
    assert first["meta_train/return_pre"] == first["adaptation/return_after_0"]
    assert first["meta_train/return_post"] == first["adaptation/return_after_2"]
    assert -10 < first["meta_train/return_pre"] < 0  # 5 rewards of minus a distance below √2
    aggregate = run.report["aggregate"]
    assert evaluation["meta_test/return_post"] == aggregate["return_post"]["mean"]
    assert [position.env_steps for position, _ in reported] == [120, 240, 240]
    assert reported[0][1]["train/loss"] == first["train/loss"]
    assert run.policy.env_steps == 240 and run.finished


def test_tensorboard_holds_the_same_scalars_against_env_steps(tracked):
    run_dir, _, _ = tracked
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    expected = {}
    for line in read_metrics(run_dir):
        for name, value in line.items():
            if "/" in name:
                expected.setdefault(name, []).append((line["env_steps"], pytest.approx(value, rel=1e-6)))
    found = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert found == expected


def test_tensorboard_holds_config_and_hyperparameters(tracked):
    run_dir, run, _ = tracked
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("config/text_summary")
    assert dump_config(run.policy.config) in text.tensor_proto.string_val[0].decode()
    session = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content.decode(errors="replace")
    assert {key for key in flatten(run.policy.config.model_dump()) if key not in session} == set()


def test_resuming_leaves_no_scalar_twice_in_tensorboard(tmp_path):
    def crash(position, scalars):
        if position.iteration == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(navigation(LONGER), run_dir=tmp_path, progress=crash)
    time.sleep(1.1)  # TensorBoard orders event files by the second of their making
    train(navigation(LONGER), run_dir=tmp_path, resume=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [80, 160, 240, 320, 400]


# Custom stages and tasks


def test_stages_are_trained_one_after_another(tmp_path):
    run = train(stages(*TWO_STAGES), run_dir=tmp_path)
    assert run.finished
    lines = metrics(tmp_path)
    places = [(line["stage"], line["iteration"]) for line in lines]
    assert places == [(0, 0), (0, 1), (0, 1), (1, 2), (1, 3), (1, 3)]
    assert "meta_test/wedge-0/success_post" in lines[2] and "meta_test/wedge-1/success_post" in lines[5]
    position = load_latest(tmp_path / "checkpoints").position
    assert (position.stage, position.stage_iteration, position.iteration) == (2, 0, 3)


@pytest.mark.parametrize("stop", [1, 2])
def test_stages_are_resumed_where_they_stopped(tmp_path, stop):
    train(stages(*TWO_STAGES), run_dir=tmp_path / "whole")
    assert not train(stages(*TWO_STAGES), run_dir=tmp_path / "parts", max_iterations=stop).finished
    train(stages(*TWO_STAGES), run_dir=tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_stages_of_other_spaces_are_refused(tmp_path):
    cued = {"name": "cued", "tasks": {"family": "navigation", "name": "rotated_cued_wedges"}, "iterations": 1}
    with pytest.raises(UserError, match=r"(?s)2.*6|6.*2"):
        train(stages(TWO_STAGES[0], cued), run_dir=tmp_path)


class Line(gymnasium.Env):
    """A point on a line that is rewarded for going left or right, by the parity of its task's index."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,))
    action_space = gymnasium.spaces.Box(-2.0, 4.0, (1,))

    def __init__(self, task):
        self.sign = 1.0 if task.index % 2 else -1.0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = np.zeros(1, dtype=np.float32)
        return self.position.copy(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.position = self.position + action
        return self.position.copy(), float(self.sign * action[0]), False, False, {}


def test_tasks_of_ones_own_are_trained_and_evaluated_from_python(tmp_path):
    tasks = metarl.envs.custom("line", Line, num_train=4, num_test=2, horizon=5)
    config = stages({"tasks": {"family": "custom", "name": "line"}, "iterations": 2})
    run = train(config, tasks, run_dir=tmp_path)
    assert run.finished and run.policy.spaces.action_low == (-2.0,)
    lines = metrics(tmp_path)
    assert lines[0]["env_steps"] == 2 * 2 * 5 * 2
    assert "meta_train/return_post" in lines[0] and "meta_train/success_post" not in lines[0]
    assert train(config, tasks, run_dir=tmp_path / "again").report == run.report
    report = metarl.evaluate(metarl.load(tmp_path), tasks.test_tasks, make=tasks.make)
    assert report["held_out"] and len(report["tasks"]) == 2 and report["tasks"][0]["success"] == [None, None]
    with pytest.raises(UserError, match=r"metarl\.train"):
        train(config, run_dir=tmp_path / "other")


def test_a_config_may_be_a_mapping_a_file_or_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = stages(TWO_STAGES[0])
    assert train(settings).run_dir == tmp_path / "runs" / "run"
    (tmp_path / "mine.yaml").write_text(dump_config(metarl.config.schema.as_config(settings)))
    run = train(tmp_path / "mine.yaml")
    assert run.run_dir == tmp_path / "runs" / "mine"
    assert_same_run(tmp_path / "runs" / "run", tmp_path / "runs" / "mine")
    with pytest.raises(UserError, match=r"^num_taks: unknown setting; did you mean 'num_tasks'\?"):
        train(settings | {"num_taks": 3}, run_dir=tmp_path / "other")


def test_too_few_environments_are_refused(tmp_path):
    with pytest.raises(UserError, match="num_envs is 3; expected at least num_tasks, 4"):
        train(navigation("--num-envs 3"), run_dir=tmp_path)
