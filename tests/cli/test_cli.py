"""The command line: exit statuses, messages of one line, and every verb on small runs."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

import metarl
from metarl.build import distribution_of
from metarl.cli import main
from metarl.config.overrides import flag_of
from metarl.config.schema import embedded_configs, find_config, load_config
from metarl.errors import UserError
from metarl.runs.checkpoint import load_latest
from metarl.runs.directory import flatten
from metarl.runs.tracking import read_metrics


def words(text):
    return text.split()


SMALL = words(
    "--num-tasks 2 --rollouts-per-task 1 --num-workers 0 --device cpu --agent.hidden-sizes [8] --agent.outer.epochs=1 "
    "--stages.0.tasks.horizon 5 --stages.0.iterations 1 --evaluation.num-tasks 1"
)


EPOCHS = "--agent.outer.epochs=1"
RL2 = words("--agent.encoder-sizes [8] --agent.memory.size 8 --agent.epochs 1 --agent.minibatches 1")


def small(name):
    """The flags that make an embedded config small."""
    if name.endswith("_rl2"):
        return [*(word for word in SMALL if not word.startswith(("--agent", "[8]"))), *RL2]
    return [word for word in SMALL if word != EPOCHS] if name.endswith("_trpo") else SMALL


@pytest.fixture
def mistake(command):
    """Run a command that must be refused: its one line."""

    def run(*arguments):
        status, out, err = command(*arguments)
        assert status == 2, (out, err)
        assert out == "" and err.startswith("metarl: ") and len(err.splitlines()) == 1 and "Traceback" not in err
        return err

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small run."""
    run_dir = tmp_path_factory.mktemp("runs") / "small"
    with pytest.raises(SystemExit) as error:
        main(["train", "navigation_maml_ppo", "--run-dir", str(run_dir), *SMALL])
    assert error.value.code == 0
    return run_dir


# Words that are not understood


def test_no_arguments_show_help(command):
    status, out, err = command()
    assert status == 2 and err == ""
    for verb in ("train", "evaluate", "inspect", "list", "doctor"):
        assert f"\n  {verb} " in out
    assert command("--help") == (0, out, "")


def test_unknown_words_are_answered_with_the_nearest(mistake, tmp_path):
    assert "did you mean 'train'?" in mistake("trian", "quickstart")
    assert "expected one of train, evaluate, export, play, inspect, list, doctor" in mistake("xyzzy")
    assert "did you mean 'quickstart'?" in mistake("train", "quickstrat")
    misspelt = mistake("train", "quickstart", "--agent.inner-lrr", "0.1", "--run-dir", tmp_path / "run")
    assert misspelt == "metarl: --agent.inner-lrr: unknown setting; did you mean --agent.inner-lr?\n"
    assert not (tmp_path / "run").exists()
    assert "name a config" in mistake("train")
    assert "--nonsense" in mistake("evaluate", "somewhere", "--nonsense")
    assert "metarl evaluate --help" in mistake("evaluate")
    assert "envs" in mistake("list", "everything")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--num-tasks 0", "--num-tasks: got 0"),
        ("--agent.outer.lr -1", "--agent.outer.lr: got -1"),
        ("--agent.gamma 1.5", "--agent.gamma: got 1.5"),
        ("--seed", "--seed has no value"),
        ("--run-dir", "--run-dir"),
        ("--max-iterations 0", "--max-iterations is 0; expected more than 0"),
        ("--max-iterations some", "--max-iterations"),
        ("--max-minutes nan", "--max-minutes is nan"),
        ("--resume --overwrite", "--resume and --overwrite are mutually exclusive"),
        ("--resume --run-dir /nowhere/at/all", "/nowhere/at/all holds no run to resume"),
        ("--stages.0.tasks.name reach-v9", "did you mean 'reach-v3'?"),
        ("stray", "unexpected argument 'stray'"),
    ],
)
def test_mistakes_are_told_in_one_line(mistake, tmp_path, monkeypatch, flags, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in mistake("train", "quickstart", *flags.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(mistake, trained, tmp_path):
    run_dir = tmp_path / "run"
    arguments = ["train", "navigation_maml_ppo", *SMALL, "--device", "cuda", "--run-dir", run_dir]
    assert "--device cpu or auto" in mistake(*arguments)
    assert not run_dir.exists()
    assert "--device cpu or auto" in mistake("evaluate", trained, "--device", "cuda")


def test_debug_shows_where(capsys):
    with pytest.raises(UserError, match="did you mean"):
        main(["train", "quickstrat", "--debug"])
    assert capsys.readouterr().err == ""


def test_a_failure_that_is_not_the_users_has_status_1(command, monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise RuntimeError("the first line:\n  and a second\n  and the cause\n")

    monkeypatch.setattr("metarl.training.loop.train", broken)
    status, _, err = command("train", "navigation_maml_ppo", *SMALL, "--run-dir", tmp_path)
    assert (status, err) == (1, "metarl: RuntimeError: the first line: and the cause (--debug shows where)\n")
    with pytest.raises(RuntimeError, match="second"):
        main(["train", "navigation_maml_ppo", *SMALL, "--run-dir", str(tmp_path), "--debug"])


# train


@pytest.mark.parametrize("name", embedded_configs())
def test_every_embedded_config_trains(command, tmp_path, name):
    run_dir = tmp_path / name
    stages, written = len(load_config(name).stages), len(yaml.safe_load(find_config(name).read_text())["stages"])
    later = [f"--stages.{i}.{setting}" for i in range(1, written) for setting in ("tasks.horizon=5", "iterations=1")]
    if name.startswith("cw"):  # all ten are trained in test_continual_world.py
        later, stages = ["--stages.0.for-each", "{name: [reach-v3, push-v3]}"], 2
    status, out, err = command("train", name, *small(name), *later, "--run-dir", run_dir)
    assert status == 0, err
    assert "finished: " in out and str(run_dir) in out
    first, evaluation, *_ = [line for line in read_metrics(run_dir) if line["iteration"]]
    agent = load_config(name).agent
    phases = agent.trial_episodes if agent.name == "rl2" else agent.adaptation_steps + 1
    assert first["env_steps"] == 2 * 1 * 5 * phases
    assert f"adaptation/return_after_{phases - 1}" in first
    assert "meta_train/return_post" in first and "meta_test/return_post" in evaluation
    assert load_latest(run_dir / "checkpoints").position.iteration == stages


def test_flags_reach_the_run(command, tmp_path):
    flags = words("--num-workers 1 --seed=5 --agent.inner-lr 0.25 --agent.hidden-sizes 6 4 --max-minutes 5")
    status, _, err = command("train", "navigation_maml_ppo", *SMALL, *flags, "--run-dir", tmp_path)
    assert status == 0, err
    config = load_config(tmp_path / "config.yaml")
    assert (config.num_workers, config.seed, config.agent.inner_lr) == (1, 5, 0.25)
    assert config.agent.hidden_sizes == (6, 4) and config.stages[0].tasks.horizon == 5


def test_a_run_goes_to_runs_by_the_name_of_its_config(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("stages: [{tasks: {family: navigation}}]")
    assert command("train", "mine.yaml", *SMALL)[0] == 0
    assert (tmp_path / "runs" / "mine" / "metrics.jsonl").is_file()


def test_stopping_and_going_on(command, mistake, tmp_path):
    arguments = ["train", "navigation_maml_ppo", *SMALL, "--stages.0.iterations", 3, "--run-dir", tmp_path / "run"]
    status, out, _ = command(*arguments, "--max-iterations", 2)
    assert status == 0 and "stopped; continue with --resume" in out
    refused = mistake(*arguments)
    assert "already holds a run" in refused and "--resume" in refused and "--overwrite" in refused
    assert "agent.gamma" in mistake(*arguments, "--resume", "--agent.gamma", "0.5")
    status, out, _ = command(*arguments, "--resume")
    assert status == 0 and "finished" in out
    assert [line["iteration"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 3]
    assert command(*arguments, "--overwrite", "--max-iterations", 1)[0] == 0
    assert [line["iteration"] for line in read_metrics(tmp_path / "run")] == [1]


def test_a_directory_that_cannot_be_written(mistake, tmp_path):
    (tmp_path / "file").write_text("")
    refused = mistake("train", "navigation_maml_ppo", *SMALL, "--run-dir", tmp_path / "file" / "run")
    assert "cannot write to" in refused and "--run-dir" in refused


@pytest.mark.parametrize("name", [[], ["navigation_maml_ppo"]])
def test_help_shows_settings_with_their_defaults(command, name):
    status, out, _ = command("train", *name, "--help")
    assert status == 0
    for flag in ("--run-dir", "--resume", "--overwrite", "--max-iterations", "--seed", "--agent.inner-lr"):
        assert flag in out
    for flag in ("--num-workers", "--stages.0.iterations", "--evaluation.num-tasks", "--agent.adaptation-steps"):
        assert flag in out
    assert "root of all random seeds" in out
    iterations = load_config(*(name or ["quickstart"])).stages[0].iterations
    assert str(iterations) in out.partition("--stages.0.iterations")[2][:200]


def test_help_shows_the_settings_of_the_agent_that_a_flag_names(command):
    flags = ["--agent.name", "imaml", "--agent.outer.name", "trpo"]
    status, out, _ = command("train", "navigation_maml_ppo", *flags, "--help")
    assert status == 0
    for flag in ("--agent.proximal", "--agent.outer.cg-iterations"):
        assert flag in out
    assert "--agent.outer.clip-eps" not in out


def test_help_shows_a_flag_for_every_setting(command):
    for flags, methods in (([], "[]"), (["--agent.name", "rl2", "--stability", "ewc", "replay"], "ewc replay")):
        status, out, _ = command("train", "navigation_maml_ppo", *flags, "--help")
        settings = flatten(load_config("navigation_maml_ppo", flags).model_dump(exclude={"stability"}))
        missing = [setting for setting in settings if f"{flag_of(setting.split('.'))} " not in out]
        assert status == 0 and missing == []
        (row,) = re.findall(r"^  --stability {ewc,replay,l2,mas,mer} \.\.\.\n((?: {30}.*\n)+)", out, re.MULTILINE)
        assert row.endswith(f"(default: {methods})\n")
    assert "--stability.1.capacity " in out


def test_a_setting_without_a_value_is_written_as_help_shows_it(command, trained, tmp_path):
    """`INT|None … (default: None)`, says help."""
    run_dir, flags = tmp_path / "run", ["--num-envs", "--stages.0.init-from", "--stages.0.score-range"]
    none = [word for flag in (*flags, "--agent.normalizer-iterations") for word in (flag, "None")]
    assert command("train", trained / "config.yaml", *none, "--run-dir", run_dir)[0] == 0
    config = load_config(run_dir / "config.yaml")
    (stage,) = config.stages
    assert {config.num_envs, stage.init_from, stage.score_range, config.agent.normalizer_iterations} == {None}


# The other verbs


def test_evaluate_writes_the_report_and_shows_it(command, trained, tmp_path):
    path = tmp_path / "below" / "report.json"
    arguments = ["evaluate", trained, "--num-tasks", 3, "--adaptation-steps", 2, "--num-workers", 0, "--json", path]
    status, out, err = command(*arguments)
    assert status == 0, err
    report = json.loads(path.read_text())
    assert report.keys() >= {
        *("protocol", "split", "held_out", "env_steps", "seed", "adaptation_steps", "rollouts_per_task"),
        *("tasks", "aggregate", "per_class"),
    }
    assert len(report["tasks"]) == 3
    for row in report["tasks"]:
        assert len(row["returns"]) == len(row["success"]) == 3
    assert len(report["aggregate"]["success_post"]["ci95"]) == 2
    for text in ("3 held-out tasks", "before adaptation", "after 2 step(s)", "gain", "untrained, after", str(path)):
        assert text in out
    mean = report["aggregate"]["return_pre"]["mean"]
    assert f"{mean:.1f} [" in out
    again = tmp_path / "again.json"
    command(*arguments[:-1], again)
    assert again.read_text() == path.read_text()


@pytest.fixture(scope="module")
def remembering(tmp_path_factory):
    """A small run of an agent with a memory, on Meta-World."""
    run_dir = tmp_path_factory.mktemp("runs") / "memory"
    with pytest.raises(SystemExit):
        main(["train", "ml1_reach_rl2", *small("ml1_reach_rl2"), "--run-dir", str(run_dir)])
    return run_dir


def test_evaluate_shows_the_episodes_of_a_trial_and_an_ablation(command, remembering):
    status, out, err = command("evaluate", remembering, "--num-tasks", 2, "--num-workers", 0, "--ablate", "reward")
    assert status == 0, err
    for row in ("episode 1", "episode 3", "without reward, episode 3", "without reward, gain", "untrained, episode 1"):
        assert row in out
    report = json.loads((remembering / "evaluation" / "test_without_reward.json").read_text())
    assert len(report["phases"]) == 3 and report["ablate"] == "reward" and "ablated_success_post" in report["aggregate"]


@pytest.mark.slow
def test_evaluate_by_the_official_protocol(command, remembering):
    flags = ("--official", "--num-evals", 1, "--adaptation-episodes", 2)
    status, out, err = command("evaluate", remembering, *flags)
    assert status == 0, err
    assert "as Meta-World counts" in out and "biased" in out
    report = json.loads((remembering / "evaluation" / "official_test.json").read_text())
    assert (report["protocol"], report["adaptation_episodes"], report["horizon"]) == ("metaworld", 2, 5)
    assert report["biased_by"] == report["success_mean"] - report["per_environment"]["success_mean"]


def test_evaluations_that_do_not_go_together_are_refused(mistake, trained, remembering):
    assert "--ablate cannot be combined with --official" in mistake(
        "evaluate", remembering, "--official", "--ablate", "memory"
    )
    assert "--num-evals requires --official" in mistake("evaluate", remembering, "--num-evals", 3)
    assert "--official requires Meta-World tasks" in mistake("evaluate", trained, "--official")
    assert "maml_ppo has no memory" in mistake("evaluate", trained, "--ablate", "memory", "--num-workers", 0)
    assert "adapts in its memory" in mistake("evaluate", remembering, "--adaptation-steps", 2, "--num-workers", 0)
    refused = mistake("train", "navigation_rl2", "--agent.observation-entries", "7", "--run-dir", remembering / "new")
    assert "agent.observation_entries holds 7; observations have entries 0 to 1" in refused


def test_evaluate_on_other_tasks(command, mistake, trained):
    small = ["--num-tasks", 2, "--rollouts-per-task", 1, "--num-workers", 0]
    status, out, _ = command("evaluate", trained, "--split", "train", *small)
    assert status == 0 and "train tasks (NOT held out)" in out
    assert json.loads((trained / "evaluation" / "train.json").read_text())["held_out"] is False
    status, out, _ = command("evaluate", trained, "--tasks", "semicircle", *small)
    report = json.loads((trained / "evaluation" / "semicircle_test.json").read_text())
    assert status == 0 and {row["name"] for row in report["tasks"]} == {"semicircle"}
    assert "did you mean 'semicircle'?" in mistake("evaluate", trained, "--tasks", "semicircel")
    assert "report " in command("inspect", trained)[1]


def test_evaluate_on_tasks_of_other_spaces_is_refused(mistake, trained):
    refused = mistake("evaluate", trained, "--tasks", "HalfCheetahVel", "--num-tasks", 1, "--num-workers", 0)
    assert "17" in refused and "2" in refused


def test_a_report_takes_the_place_of_plain_files_alone(mistake, trained, tmp_path):
    """Whoever may do all would put a file where /dev/null was."""
    os.mkfifo(tmp_path / "pipe")
    assert "is not a plain file" in mistake("evaluate", trained, "--num-tasks", 1, "--json", tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("flags", ["--seed -1", "--num-workers -1", "--num-tasks 0", "--num-tasks x", "--split both"])
def test_evaluate_refuses_numbers_out_of_range(mistake, trained, flags):
    assert flags.split()[0] in mistake("evaluate", trained, *flags.split())


def test_what_is_no_run_is_refused(mistake, tmp_path):
    for verb in ("evaluate", "inspect"):
        assert "holds no run" in mistake(verb, tmp_path)
        assert "holds no run" in mistake(verb, tmp_path / "missing")


@pytest.fixture
def two_checkpoints(command, tmp_path):
    flags = ["--stages.0.iterations", "3", "--checkpoint-every-iterations", "1"]
    arguments = ["train", "navigation_maml_ppo", *SMALL, *flags, "--run-dir", tmp_path / "run"]
    assert command(*arguments, "--max-iterations", 2)[0] == 0
    return arguments, tmp_path / "run" / "checkpoints"


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(command, two_checkpoints, caplog):
    arguments, checkpoints = two_checkpoints
    (checkpoints / "000002" / "agent.safetensors").write_bytes(b"text")
    status, out, _ = command("inspect", checkpoints.parent)
    assert status == 0 and "trained      1 iterations, 20 env steps" in out  # not the 2 that the log has
    assert "000002" in caplog.text  # never silently
    caplog.clear()
    status, _, _ = command(*arguments, "--resume")
    assert status == 0 and [line["iteration"] for line in read_metrics(checkpoints.parent)] == [1, 2, 3, 3]
    assert "000002" in caplog.text


def test_a_run_without_a_valid_checkpoint_is_refused_with_reasons(mistake, two_checkpoints):
    arguments, checkpoints = two_checkpoints
    for path in checkpoints.glob("*/agent.safetensors"):
        path.write_bytes(b"")
    for refused in (mistake("inspect", checkpoints.parent), mistake(*arguments, "--resume")):
        assert "000001" in refused and "000002" in refused and "0 bytes" in refused


def test_inspect_shows_what_a_run_holds(command, trained):
    status, out, _ = command("inspect", trained)
    assert status == 0
    for text in ("maml_ppo, K = 1", "observations 2, actions 2", "1 iterations", "20 env steps", "return_post"):
        assert text in out


def test_list_shows_names_with_their_purpose(command):
    for what, names in (
        ("configs", embedded_configs()),
        ("agents", ["maml_ppo", "fomaml", "multi_task"]),
        ("wrappers", ["frame_stack", "observation_noise", "time_limit"]),
        ("stability", ["ewc", "replay", "l2", "mas", "mer"]),
        ("envs", ["ML10", "ML45", "reach-v3", "HalfCheetahVel", "goals"]),
    ):
        status, out, _ = command("list", what)
        words = [line.split(maxsplit=1) for line in out.splitlines()]
        assert status == 0 and {word[0] for word in words} >= set(names)
        assert all(len(word) == 2 for word in words)
    assert command("list", "methods") == command("list", "stability")  # the earlier name


def test_doctor_looks_at_every_library_and_family(command, monkeypatch):
    status, out, _ = command("doctor")
    assert status == 0 and "BAD" not in out
    for name in ("python", "torch", "gpu", "navigation", "mujoco", "metaworld"):
        assert f"ok  {name} " in out
    monkeypatch.setattr("metarl.cli.doctor._steps_per_second", lambda family, options: 1 / 0)
    status, out, _ = command("doctor")
    assert status == 1 and "BAD mujoco              ZeroDivisionError" in out


@pytest.mark.parametrize("verb", ["evaluate", "play", "inspect", "list", "doctor"])
def test_every_verb_has_help(command, verb):
    status, out, _ = command(verb, "--help")
    assert status == 0 and f"usage: metarl {verb}" in out


@pytest.fixture(scope="module")
def adapted(trained, tmp_path_factory):
    """A policy that was adapted and saved."""
    policy = metarl.load(trained)
    env = metarl.envs.make(distribution_of(policy.config).test_tasks[0])
    folder = tmp_path_factory.mktemp("saved") / "adapted"
    policy.adapt(policy.record(env, 1)).save(folder)
    return folder


def test_inspect_says_that_a_policy_is_adapted(command, trained, adapted, tmp_path):
    status, out, _ = command("inspect", adapted)
    assert status == 0 and "\nadapted      to one task" in out
    assert "\ntrained      20 env steps\n" in out  # and no word of 0 iterations
    metarl.load(trained).save(tmp_path / "as it was")
    for other in (trained, tmp_path / "as it was"):
        assert "adapted  " not in command("inspect", other)[1]


def test_evaluating_an_adapted_policy_is_refused_and_leaves_nothing(mistake, adapted):
    assert "already adapted" in mistake("evaluate", adapted, "--num-tasks", 1, "--num-workers", 0)
    assert not (adapted / "evaluation" / "test.json").exists()


@pytest.mark.parametrize("flags", [(), ("--official",)])
def test_an_evaluation_that_fails_leaves_what_there_was(command, remembering, tmp_path, monkeypatch, flags):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt if flags else RuntimeError

    monkeypatch.setattr("metarl.evaluation.evaluate", fail)
    monkeypatch.setattr("metarl.evaluation.metaworld_protocol.official_report", fail)
    path = tmp_path / "report.json"
    assert command("evaluate", remembering, *flags, "--json", path)[0] == (130 if flags else 1)
    assert list(tmp_path.iterdir()) == []
    path.write_text("the one before")
    command("evaluate", remembering, *flags, "--json", path)
    assert path.read_text() == "the one before"


# As a process of its own

COMMAND = [sys.executable, "-c", "from metarl.cli import main; main()"]


def test_a_mistake_as_a_process():
    done = subprocess.run([*COMMAND, "train", "quickstart", "--sede", "1"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "metarl: --sede: unknown setting; did you mean --seed?\n"


def test_output_that_nobody_reads_is_no_traceback():
    with subprocess.Popen([*COMMAND, "list", "envs"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
        assert process.wait(timeout=60) in (0, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_resume_goes_on_as_if_nothing_had_been(command, tmp_path, number, status):
    def arguments(name):
        flags = ["--stages.0.iterations", "100000", "--run-dir", str(tmp_path / name)]
        return ["train", "navigation_maml_ppo", *SMALL, *flags]

    stopped = tmp_path / "stopped"
    process = subprocess.Popen(
        [*COMMAND, *arguments("stopped")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        while len(read_metrics(stopped)) < 2:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status and "saving after this iteration" in err and "Traceback" not in err
    done = load_latest(stopped / "checkpoints").position.iteration
    assert done >= 2 and read_metrics(stopped)[-1]["iteration"] == done
    for resumed in ([*arguments("stopped"), "--resume"], arguments("whole")):
        code, _, err = command(*resumed, "--max-iterations", done + 2)
        assert code == 0, err
    assert [line["iteration"] for line in read_metrics(stopped)] == list(range(1, done + 3))
    ours, theirs = (load_latest(tmp_path / name / "checkpoints").state for name in ("stopped", "whole"))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
