"""Going on with a run whose settings changed, that was made longer, or that is none; and logs that are cut to fit."""

import contextlib
import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import metarl
from metarl.config.schema import load_config
from metarl.errors import RunError, UserError
from metarl.runs.checkpoint import load_latest
from metarl.runs.tracking import Tracker, read_metrics
from metarl.training.loop import train
from metarl.training.stage_evaluation import checkpoint_score
from metarl.types import Position

SMALL = """
    --num-tasks 2 --rollouts-per-task 2 --num-workers 0 --device cpu --agent.hidden-sizes [8] --agent.outer.epochs 1
    --stages.0.tasks.horizon 5 --evaluation.num-tasks 2 --checkpoint-every-iterations 1
"""


def config(extra=""):
    return load_config("navigation_maml_ppo", f"{SMALL} {extra}".split())


def metrics(run_dir):
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in read_metrics(run_dir)]


def scalars(run_dir, tag):
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


# Settings


def test_other_settings_are_listed_with_both_values_and_need_to_be_allowed(tmp_path):
    train(config("--stages.0.iterations 4"), run_dir=tmp_path, max_iterations=2)
    before = (tmp_path / "config.yaml").read_bytes()
    changed = config("--stages.0.iterations 4 --agent.inner-lr 0.02 --seed 5")
    with pytest.raises(UserError) as error:
        train(changed, run_dir=tmp_path, resume=True)
    message = str(error.value)
    assert (
        "seed (0, now 5)" in message
        and "agent.inner_lr (0.1, now 0.02)" in message
        and "--allow-config-change" in message
    )
    assert message.count("now") == 2 and "\n" not in message
    assert (tmp_path / "config.yaml").read_bytes() == before and len(read_metrics(tmp_path)) == 2
    run = train(changed, run_dir=tmp_path, resume=True, allow_config_change=True)
    assert run.finished and [line["iteration"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 4]
    assert load_config(tmp_path / "config.yaml").agent.inner_lr == 0.02
    assert (tmp_path / "config.before_000002.yaml").read_bytes() == before  # nothing is lost
    assert train(changed, run_dir=tmp_path, resume=True).finished  # it is the run's own now


def test_other_settings_have_their_effect(tmp_path):
    for name, change in (("same", ""), ("other", "--agent.inner-lr 0.9")):
        train(config("--stages.0.iterations 3"), run_dir=tmp_path / name, max_iterations=1)
        changed = config(f"--stages.0.iterations 3 {change}")
        train(changed, run_dir=tmp_path / name, resume=True, allow_config_change=True)
    same, other = metrics(tmp_path / "same"), metrics(tmp_path / "other")
    assert same[0] == other[0] and same[1] != other[1]
    assert not (tmp_path / "same" / "config.before_000001.yaml").exists()  # to allow a change makes none


def test_a_config_file_that_was_edited_is_noticed(tmp_path):
    train(config("--stages.0.iterations 3"), run_dir=tmp_path, max_iterations=1)
    path = tmp_path / "config.yaml"
    path.write_text(path.read_text().replace("inner_lr: 0.1", "inner_lr: 0.3"))
    edited = load_config(path)
    assert edited.agent.inner_lr == 0.3
    with pytest.raises(UserError, match=r"config\.yaml \(not the one that checkpoint 000001 was trained with\)"):
        train(edited, run_dir=tmp_path, resume=True)
    assert train(edited, run_dir=tmp_path, resume=True, allow_config_change=True).finished
    assert train(edited, run_dir=tmp_path, resume=True).finished


def test_an_edited_config_file_is_warned_of_where_the_policy_is_loaded(tmp_path, caplog):
    train(config("--stages.0.iterations 1"), run_dir=tmp_path)
    metarl.load(tmp_path)
    assert not caplog.text
    with (tmp_path / "config.yaml").open("a") as file:
        file.write("# a note\n")
    metarl.load(tmp_path)
    assert "config.yaml is not what 000001 was trained with" in caplog.text


def test_sizes_that_do_not_fit_are_told_whatever_is_allowed(tmp_path):
    train(config("--stages.0.iterations 3"), run_dir=tmp_path, max_iterations=1)
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=r"policy\.weight_0.*expected shape \(16, 2\), found \(8, 2\)"):
        changed = config("--stages.0.iterations 3 --agent.hidden-sizes [16]")
        train(changed, run_dir=tmp_path, resume=True, allow_config_change=True)
    assert (tmp_path / "config.yaml").read_bytes() == before
    assert train(config("--stages.0.iterations 3"), run_dir=tmp_path, resume=True).finished


@pytest.mark.parametrize("stop", [None, 1])
def test_a_run_is_made_longer(tmp_path, stop):
    """Finished or not, it goes on to the new end as if that had been its end from the first."""
    train(config("--stages.0.iterations 2"), run_dir=tmp_path / "run", max_iterations=stop)
    longer = config("--stages.0.iterations 4")
    run = train(longer, run_dir=tmp_path / "run", resume=True, allow_config_change=True)
    assert run.finished and load_latest(tmp_path / "run" / "checkpoints").position.iteration == 4
    whole = train(longer, run_dir=tmp_path / "whole")
    ours, theirs = (load_latest(each.run_dir / "checkpoints").state for each in (run, whole))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    trained = [line for line in metrics(tmp_path / "run") if "train/loss" in line]
    assert trained == [line for line in metrics(tmp_path / "whole") if "train/loss" in line]


@pytest.mark.parametrize(
    ("stop", "iterations", "message"),
    [
        (3, (3, 4), r"stages\.0\.iterations: got 3, expected 2, the number that it has run"),
        (3, (1, 4), r"stages\.0\.iterations: got 1, expected 2, the number that it has run"),
        (4, (2, 1), r"stages\.1\.iterations: got 1, expected at least 2, the number"),
        (None, (2, 3), r"stages\.1\.iterations: got 3, expected at least 4, the number"),
        (3, (2, 1), None),
        (None, (2, 5), None),
    ],
)
def test_what_is_over_keeps_its_length(tmp_path, stop, iterations, message):
    """The ends of stages, and their parts of figures, follow from their lengths."""

    def settings(*iterations):
        stages = [{"tasks": {"family": "navigation", "horizon": 5}, "iterations": each} for each in iterations]
        return {**config().model_dump(), "stages": stages}

    train(settings(2, 4), run_dir=tmp_path, max_iterations=stop)
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        assert train(settings(*iterations), run_dir=tmp_path, resume=True, allow_config_change=True).finished


def test_stages_of_a_sequence_keep_their_names(tmp_path):
    """Their scores are keyed by name; a single stage has none."""

    def settings(*names):
        stages = [{"name": name, "tasks": {"family": "navigation", "horizon": 5}, "iterations": 2} for name in names]
        return {**config().model_dump(), "stages": stages}

    for names, others in ((["a", "b"], ["z", "b"]), (["a"], ["z"])):
        run_dir = tmp_path / str(len(names))
        train(settings(*names), run_dir=run_dir, max_iterations=1)
        error = pytest.raises(UserError, match=r"stages\.0\.name: got 'z', expected 'a', the name of its scores")
        with error if len(names) > 1 else contextlib.nullcontext():
            assert train(settings(*others), run_dir=run_dir, resume=True, allow_config_change=True).finished


def test_the_number_of_stages_stays(tmp_path):
    """What is kept at a stage's end depends on whether others follow."""
    train(config("--stages.0.iterations 2"), run_dir=tmp_path)
    two = config("--stages.0.iterations 2").model_copy(update={"stages": config("--stages.0.iterations 2").stages * 2})
    with pytest.raises(UserError, match=r"has 1 stages, the config 2; .*init-from"):
        train(two, run_dir=tmp_path, resume=True, allow_config_change=True)


# What is no run


def test_a_saved_policy_is_no_run_to_go_on_with(tmp_path):
    run = train(config("--stages.0.iterations 1"), run_dir=tmp_path / "run")
    run.policy.save(tmp_path / "policy")
    with pytest.raises(UserError, match=r"holds a saved policy, not a run; .*init_from"):
        train(config("--stages.0.iterations 1"), run_dir=tmp_path / "policy", resume=True)
    assert metarl.load(tmp_path / "policy").env_steps == run.policy.env_steps


def test_a_run_that_was_killed_before_it_had_made_a_checkpoint_is_none(tmp_path):
    """What makes a directory a run is written last."""
    (tmp_path / "checkpoints" / ".000000.77.tmp").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n')
    with pytest.raises(UserError, match="holds no run to resume"):
        train(config("--stages.0.iterations 1"), run_dir=tmp_path, resume=True)
    train(config("--stages.0.iterations 1"), run_dir=tmp_path)
    assert [line["iteration"] for line in read_metrics(tmp_path)] == [1, 1]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["000000", "000001"]


def test_a_run_goes_on_from_before_its_first_iteration(tmp_path):
    def die(position, scalars):
        raise KeyboardInterrupt

    settings = config("--stages.0.iterations 2 --checkpoint-every-iterations 25")
    with pytest.raises(KeyboardInterrupt):
        train(settings, run_dir=tmp_path / "run", progress=die)
    assert len(read_metrics(tmp_path / "run")) == 1
    train(settings, run_dir=tmp_path / "run", resume=True)
    train(settings, run_dir=tmp_path / "whole")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    for name in ("train/loss", "meta_test/return_post"):
        assert scalars(tmp_path / "run", name) == scalars(tmp_path / "whole", name)


# The best


def test_the_best_evaluation_is_kept_and_loaded(tmp_path, monkeypatch):
    scores = iter([0.2, 0.9, 0.1, 0.3])
    monkeypatch.setattr(metarl.training.stage_evaluation, "checkpoint_score", lambda reports: next(scores))
    settings = config("--stages.0.iterations 4 --evaluation.every-iterations 1 --keep-checkpoints 1")
    train(settings, run_dir=tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["000002", "000004"]
    assert metarl.load(tmp_path, checkpoint="best").env_steps == 80
    assert metarl.load(tmp_path).env_steps == metarl.load(tmp_path, checkpoint=4).env_steps == 160
    with pytest.raises(UserError, match="has no checkpoint of iteration 3; available: 2, 4"):
        metarl.load(tmp_path, checkpoint=3)
    with pytest.raises(UserError, match="expected latest, best or"):
        metarl.load(tmp_path, checkpoint="newest")


def test_an_evaluation_between_checkpoints_makes_one_only_to_keep_the_best(tmp_path):
    for best, expected in ((1, ["000000", "000002", "000003"]), (0, ["000000", "000003"])):
        flags = "--stages.0.iterations 3 --evaluation.every-iterations 2 --checkpoint-every-iterations 25"
        train(config(f"{flags} --keep-best-checkpoints {best}"), run_dir=tmp_path / str(best))
        assert sorted(path.name for path in (tmp_path / str(best) / "checkpoints").iterdir()) == expected


def test_a_checkpoint_has_the_score_of_an_evaluation_in_its_own_iteration(tmp_path):
    train(config("--stages.0.iterations 4 --evaluation.every-iterations 2 --keep-checkpoints 9"), run_dir=tmp_path)
    manifests = sorted((tmp_path / "checkpoints").glob("*/manifest.json"))
    scores = [json.loads(path.read_text())["score"] is not None for path in manifests]
    assert scores == [False, False, True, False, True]


def test_the_best_of_several_stages_has_the_best_mean_over_all_of_them():
    reports = [{"aggregate": {"return_post": {"mean": r}, "success_post": {"mean": s}}} for r, s in ((5, 1), (1, 0))]
    assert checkpoint_score(reports) == 0.5
    del reports[0]["aggregate"]["success_post"]
    assert checkpoint_score(reports) == 3
    assert checkpoint_score([{"aggregate": {}}]) is None


# When things around it go wrong


@pytest.mark.parametrize("at", [1, 3])
def test_an_evaluation_that_breaks_costs_no_training(tmp_path, monkeypatch, caplog, at):
    """Mid-run or at the end: there is a warning, and training continues without the evaluation."""
    evaluate, calls = metarl.training.stage_evaluation.evaluate_agent, []

    def broken(*args, **kwargs):
        calls.append(None)
        if len(calls) == at:
            raise FloatingPointError("8 of 8 rollouts")
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(metarl.training.stage_evaluation, "evaluate_agent", broken)
    run = train(config("--stages.0.iterations 3 --evaluation.every-iterations 1"), run_dir=tmp_path)
    assert run.finished and f"no evaluation after iteration {at}: 8 of 8" in caplog.text
    assert len([line for line in read_metrics(tmp_path) if "meta_test/return_post" in line]) == 2


def test_a_run_stays_where_it_began_wherever_the_process_goes(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    go = lambda *_: monkeypatch.chdir(tmp_path / "elsewhere")  # noqa: E731
    train(config("--stages.0.iterations 2"), run_dir="run", progress=go)
    assert not list((tmp_path / "elsewhere").iterdir())
    assert load_latest(tmp_path / "run" / "checkpoints").position.iteration == 2
    assert not (tmp_path / "run" / ".lock").exists()


# Logs


@pytest.fixture
def track(tmp_path):
    def track(*iterations, logs=None, sync_at=None):
        """Track some iterations; returns what `sync` said after that one."""
        first = iterations[0]
        with Tracker(tmp_path, None, {}, Position(iteration=first - 1, env_steps=10 * (first - 1)), logs) as tracker:
            for i in iterations:
                tracker.write(Position(iteration=i, env_steps=10 * i), {"x": float(i)})
                if i == sync_at:
                    sizes = tracker.sync()
            return sizes

    return track


def test_what_was_written_after_the_checkpoint_is_cut_off(tmp_path, track):
    sizes = track(1, 2, 3, 4, sync_at=2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "env')
    (tmp_path / "tensorboard" / "events.out.tfevents.9.unknown").write_bytes(b"written by a process that was killed")
    sizes = track(3, 4, logs=sizes, sync_at=4)
    assert [line["iteration"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert scalars(tmp_path, "x") == [(10, 1), (20, 2), (30, 3), (40, 4)]
    assert not (tmp_path / "tensorboard" / "events.out.tfevents.9.unknown").exists()
    assert set(sizes) == {"metrics.jsonl", *(f"tensorboard/{p.name}" for p in (tmp_path / "tensorboard").iterdir())}


def test_what_a_log_has_lost_is_told(tmp_path, track, caplog):
    sizes = track(1, 2, sync_at=2)
    (tmp_path / "metrics.jsonl").write_text("")
    track(3, logs=sizes, sync_at=3)
    assert "metrics.jsonl has 0 of" in caplog.text and "part of it is lost" in caplog.text


def test_nothing_else_is_cut_whatever_a_checkpoint_says(tmp_path, track):
    sizes = track(1, sync_at=1)
    run = tmp_path / "config.yaml"
    run.write_text("precious")
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.write_text("precious")
    (tmp_path / "tensorboard" / "events.out.tfevents.9.link").symlink_to(outside)
    track(
        2,
        logs={**sizes, "config.yaml": 2, f"../{outside.name}": 2, "tensorboard/events.out.tfevents.9.link": 2},
        sync_at=2,
    )
    assert run.read_text() == outside.read_text() == "precious"


def test_a_disk_that_cannot_be_written_ends_the_run_in_one_line(tmp_path, monkeypatch):
    settings = config("--stages.0.iterations 4")
    save, calls = metarl.training.loop.save, []

    def full(*args, **kwargs):
        calls.append(None)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return save(*args, **kwargs)

    monkeypatch.setattr(metarl.training.loop, "save", full)
    with pytest.raises(RunError, match=r"cannot write to .*No space left on device.*--resume") as error:
        train(settings, run_dir=tmp_path / "run")
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    train(settings, run_dir=tmp_path / "run", resume=True)
    train(settings, run_dir=tmp_path / "whole")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_the_manifest_names_the_config_and_the_logs(tmp_path):
    train(config("--stages.0.iterations 1"), run_dir=tmp_path)
    path = load_latest(tmp_path / "checkpoints").path
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["logs"]["metrics.jsonl"] == (tmp_path / "metrics.jsonl").stat().st_size
    assert manifest["score"] == read_metrics(tmp_path)[-1]["meta_test/success_post"]
    assert {"agent.safetensors", "random.safetensors"} == manifest["files"].keys()


def test_a_disk_without_room_for_replayed_trials_ends_the_run_in_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    two = config("--stages.0.iterations 2 --stability replay --stability.0.memory-gb 1e-9")
    with pytest.raises(RunError, match=r"cannot write to .*No space left on device.*--resume"):
        train(two, run_dir=tmp_path)
