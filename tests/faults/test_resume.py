"""A run that was stopped, by whatever and wherever, goes on as if it had not been: for all agents and all methods."""

import contextlib
import os
import random
import shutil
import signal
import time

import gymnasium
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event

import metarl
import metarl.training.loop
from metarl.agents import agent_configs
from metarl.config.schema import as_config
from metarl.errors import UserError
from metarl.runs.checkpoint import load_latest, save
from metarl.runs.random_state import random_state, set_random_state
from metarl.stability import stability_configs
from metarl.training.loop import train
from metarl.training.stage_evaluation import StageEvaluation
from tests.faults import processes
from tests.faults.harness import killed_before
from tests.faults.kill_often import MARK, different, events, lines, orphans

slow = pytest.mark.slow

AGENTS = {name: {"name": name, "hidden_sizes": [8]} for name in agent_configs() if name != "rl2"}
AGENTS |= {
    f"rl2 with {memory['name']}": {
        "name": "rl2",
        "memory": {"size": 8, **memory},
        "encoder_sizes": [8],
        "critic": {"name": critic, **({} if critic == "linear" else {"sizes": [8]})},
        "epochs": 1,
        "minibatches": 2,
    }
    for memory, critic in (
        ({"name": "gru"}, "shared"),
        ({"name": "lstm"}, "separate"),
        ({"name": "transformer", "heads": 2}, "linear"),
        ({"name": "episodic", "heads": 2}, "shared"),
    )
}
for each in (
    "maml_ppo",
    "fomaml",
    "reptile",
    "meta_sgd",
    "meta_curvature",
    "imaml",
    "anil",
    "meta_dropout",
    "multi_task",
):
    AGENTS[each]["outer"] = {"epochs": 2}
AGENTS["learned values"] = {"name": "maml_ppo", "hidden_sizes": [8], "critic": "learned"}
AGENTS["a step size that falls"] = {"name": "maml_ppo", "hidden_sizes": [8], "outer": {"lr": 0.1, "max_kl": 1e-6}}
AGENTS["rl2 with lstm"] |= {"lr_decay_iterations": 5, "normalizer_iterations": 2}
AGENTS["another step size"] = {**AGENTS["maml_ppo"], "inner_lr": 0.2}
METHODS = {
    "ewc": {"fisher_states": 20},
    "replay": {"capacity": 6},
    "l2": {},
    "mas": {"states": 20},
    "mer": {"capacity": 6, "batches": 2},
}
ALL = [{"name": name, **settings} for name, settings in METHODS.items()]


def config(agent="maml_ppo", methods=(), **settings):
    """Two stages of three iterations, saved after the second one of each and at its end."""
    tasks = {"family": "navigation", "name": "rotated_wedges", "horizon": 4}
    small = {
        "num_tasks": 2,
        "rollouts_per_task": 2,
        "num_workers": 0,
        "device": "cpu",
        "checkpoint_every_iterations": 2,
        "evaluation": {"every_iterations": 0, "num_tasks": 1, "rollouts_per_task": 1},
        "agent": AGENTS[agent],
        "stability": list(methods),
        "stages": [{"name": f"{i}", "tasks": {**tasks, "wedges": [i]}, "iterations": 3} for i in range(2)],
        "seed": 3,
    }
    return as_config({**small, **settings})


class Stopped(BaseException):
    """What ends a run at once, as far as a process can go on after that."""


def stop_at(iteration, in_training=True):
    """Return a `progress` that ends the run after the iteration is tracked, or after the evaluation there."""

    def progress(position, scalars):
        if position.iteration == iteration and ("meta_train/return_pre" in scalars) == in_training:
            raise Stopped

    return progress


def assert_goes_on(tmp_path, settings, *stops):
    """Stop a run, go on with it, stop it again, …: in the end it is the one that was not stopped."""
    train(settings, run_dir=tmp_path / "whole")
    for number, stop in enumerate(stops):
        with pytest.raises(Stopped):
            train(settings, run_dir=tmp_path / "parts", resume=number > 0, progress=stop)
    assert train(settings, run_dir=tmp_path / "parts", resume=True).finished
    assert different(tmp_path / "parts", tmp_path / "whole") == []
    assert len(lines(tmp_path / "whole")) == 9  # before training, 3 iterations and their evaluation, twice


def test_there_is_an_agent_of_each_name_and_all_methods():
    assert {settings["name"] for settings in AGENTS.values()} == agent_configs().keys()
    assert METHODS.keys() == stability_configs().keys()


@pytest.mark.parametrize("agent", AGENTS)
def test_each_agent_goes_on_with_all_methods_at_once(tmp_path, agent):
    """In each stage with iterations after the last checkpoint that are lost and come again, the first ones twice."""
    assert_goes_on(tmp_path, config(agent, ALL), stop_at(2), stop_at(2), stop_at(6))


@slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("agent", AGENTS)
def test_each_agent_goes_on_with_each_method(tmp_path, agent, method):
    assert_goes_on(tmp_path, config(agent, [{"name": method, **METHODS[method]}]), stop_at(5), stop_at(6))


@pytest.mark.parametrize("method", ["replay", "mer"])
def test_trials_that_lie_on_disk_are_not_lost(tmp_path, method):
    methods = [{"name": method, **METHODS[method], "memory_gb": 0.0}]
    assert_goes_on(tmp_path, config(methods=methods), stop_at(5), stop_at(6))
    assert not list((tmp_path / "parts").glob("tmp*"))


# At the end of a stage


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("where", ["_end_stage", "_report", "_track"])
def test_a_run_stopped_between_the_end_of_a_stage_and_its_evaluation_has_each_line_once(
    tmp_path, monkeypatch, stage, where
):
    """It has saved, and is about to collect for the methods, to evaluate, or to track what it has found."""
    owner = StageEvaluation if where == "_report" else metarl.training.loop._Loop
    settings, original, calls = config(methods=ALL), getattr(owner, where), [0]
    reached = {"_end_stage": (1, 2), "_report": (3, 5), "_track": (5, 9)}[where][stage]

    def stopping(*args):
        calls[0] += 1
        if calls[0] == reached:
            raise Stopped
        return original(*args)

    train(settings, run_dir=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(owner, where, stopping)
        with pytest.raises(Stopped):
            train(settings, run_dir=tmp_path / "parts")
    position = load_latest(tmp_path / "parts" / "checkpoints").position
    assert (position.stage, position.stage_iteration) == (stage, 3)
    train(settings, run_dir=tmp_path / "parts", resume=True)
    assert different(tmp_path / "parts", tmp_path / "whole") == []


def test_a_run_stopped_after_its_last_evaluation_evaluates_again(tmp_path):
    assert_goes_on(tmp_path, config(methods=ALL), stop_at(6, in_training=False), stop_at(6, in_training=False))


@slow
def test_a_run_killed_at_any_operation_on_files_goes_on(tmp_path):
    """At every fifth; and once more at the same one after it has gone on."""
    settings, run_dir, reached = config(methods=ALL[:2]), tmp_path / "parts", 0
    train(settings, run_dir=tmp_path / "whole")

    def go():
        train(settings, run_dir=run_dir, resume=(run_dir / "config.yaml").exists())

    for number in range(1, 400, 5):
        shutil.rmtree(run_dir, ignore_errors=True)
        if not killed_before(number, go):
            break
        reached = number
        killed_before(number, go)
        go()
        assert different(run_dir, tmp_path / "whole") == [], number
        assert not list(run_dir.rglob(".*")), number
    assert 60 < reached < 390


def test_tensorboard_has_config_and_hyperparameters_once_whenever_a_run_was_stopped(tmp_path):
    settings = config()
    for number, stop in enumerate((1, 1, 3, 6)):
        with pytest.raises(Stopped):
            train(settings, run_dir=tmp_path, resume=number > 0, progress=stop_at(stop))
    train(settings, run_dir=tmp_path, resume=True)
    records = [
        Event.FromString(record)
        for path in sorted((tmp_path / "tensorboard").iterdir())
        for record in RawEventFileLoader(str(path), detect_file_replacement=False).Load()
    ]
    tags = [value.tag for event in records for value in event.summary.value]
    for tag in ("config/text_summary", "_hparams_/experiment", "_hparams_/session_start_info"):
        assert tags.count(tag) == 1
    steps = [event.step for event in records if event.summary.value]
    assert steps == sorted(steps)  # files are read in the order of their names


# Global random streams


class Drawing(gymnasium.Env):
    """Rewards are drawn from the global streams of Python, numpy and torch."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,))
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        drawn = random.gauss(0, 1) + np.random.randn() + float(torch.randn(()))
        return np.full(1, drawn, np.float32), drawn, False, False, {}


class Shaking:
    """A stability method that draws from them, too."""

    name = "shaking"

    def loss(self, agent, rng, fraction):
        value = next(iter(agent.parameters().values()))
        return {"loss": (torch.randn_like(value) * value).sum() * random.random() * np.random.rand()}

    def observe(self, agent, rollouts, before, rng):
        pass

    def end_stage(self, agent, rollouts, rng):
        pass

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.fixture
def as_before():
    state = random_state()
    yield
    set_random_state(state)


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def drawing(seed, run_dir, settings=None, **options):
    """Train in what might be another process: the global streams begin somewhere else."""
    seed_all(seed)
    tasks = metarl.envs.custom("drawing", lambda task: Drawing(), num_train=4, num_test=2, horizon=3)
    stages = [{"name": f"{i}", "tasks": {"family": "custom"}, "iterations": 3} for i in range(2)]
    with contextlib.suppress(Stopped):
        train(settings or config(stages=stages), tasks, methods=[Shaking()], run_dir=run_dir, **options)


def test_random_streams_that_cannot_go_on_are_told_before_anything_is_trained(tmp_path, capfd):
    """The file is whole, by its checksum; numpy would read far beyond its numbers."""
    run_dir, settings = tmp_path / "run", config()
    with pytest.raises(Stopped):
        train(settings, run_dir=run_dir, progress=stop_at(3))
    found = load_latest(run_dir / "checkpoints")
    forged = found.load("random") | {"numpy.position": torch.tensor([10**8, 0])}
    states, hashed = {"agent": found.state, "random": forged}, found.manifest.config_sha256
    save(found.path.parent, states, found.position, found.spaces, 3, config_sha256=hashed, logs=found.manifest.logs)
    with pytest.raises(UserError, match=r"invalid random state: ValueError: numpy.position is 1") as refused:
        train(settings, run_dir=run_dir, resume=True, progress=stop_at(0))
    assert str(found.path) in str(refused.value) and "\n" not in str(refused.value)
    shutil.rmtree(found.path)
    train(settings, run_dir=run_dir, resume=True)


def test_what_draws_from_the_global_streams_goes_on_with_them(tmp_path, as_before):
    drawing(1, tmp_path / "whole")
    drawing(1, tmp_path / "parts", progress=stop_at(1))  # before the first checkpoint but that of the start
    for seed, iteration in ((2, 3), (3, 5), (4, 6)):
        drawing(seed, tmp_path / "parts", resume=True, progress=stop_at(iteration))
    drawing(5, tmp_path / "parts", resume=True)
    assert different(tmp_path / "parts", tmp_path / "whole") == []
    drawing(2, tmp_path / "other")
    assert different(tmp_path / "other", tmp_path / "whole") != []  # the streams do matter


def test_they_go_on_after_a_change_of_settings_too(tmp_path, as_before):
    stages = [{"name": f"{i}", "tasks": {"family": "custom"}, "iterations": 3} for i in range(2)]
    changed = config("another step size", stages=stages)
    for name in ("whole", "parts"):
        drawing(1, tmp_path / name, max_iterations=2)
    drawing(2, tmp_path / "whole", changed, resume=True, allow_config_change=True)
    drawing(3, tmp_path / "parts", changed, resume=True, allow_config_change=True, progress=stop_at(3))
    drawing(4, tmp_path / "parts", changed, resume=True)
    assert different(tmp_path / "parts", tmp_path / "whole") == []


# Signals, to the real command

LONG = ["--stages.0.iterations", "400", "--agent.outer.epochs", "5", "--checkpoint-every-iterations", "1000"]


@slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_trajectory_goes_on_identically(tmp_path, navigating, cli, number, status):
    process, run_dir = navigating(*LONG)
    wait_for(lambda: (run_dir / "metrics.jsonl").exists() and len(lines_of(run_dir)) > 3, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    name = signal.Signals(number).name
    assert err == f"metarl: {name}: saving after this iteration; a second signal stops at once\n"
    done = len(lines(run_dir))
    assert 3 < done < 400 and load_latest(run_dir / "checkpoints").position.iteration == done
    assert not (run_dir / ".lock").exists()
    assert cli(*processes.NAVIGATION, *LONG, "--run-dir", run_dir, "--resume").status == 0
    assert cli(*processes.NAVIGATION, *LONG, "--run-dir", tmp_path / "whole").status == 0
    assert different(run_dir, tmp_path / "whole") == []
    assert len(events(run_dir)) > 400


@slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_a_run_at_once_with_its_workers(tmp_path, started, number, status):
    """In the midst of an iteration of minutes; what was saved before is there."""
    mark, run_dir = os.urandom(8).hex(), tmp_path / "run"
    endless = ["--rollouts-per-task", "1000", "--num-envs", "40", "--num-workers", "2"]
    process = started("train", "half_cheetah_dir_maml_ppo", *endless, "--run-dir", run_dir, **{MARK: mark})
    wait_for((run_dir / "config.yaml").exists, process)
    time.sleep(1.0)
    process.send_signal(number)
    assert "a second signal stops at once" in process.stderr.readline()
    process.send_signal(number)
    began = time.monotonic()
    process.wait(timeout=60)
    assert time.monotonic() - began < 5 and process.returncode == status
    assert orphans(mark) == []
    assert load_latest(run_dir / "checkpoints").position.iteration == 0


def wait_for(ready, process):
    deadline = time.monotonic() + 60
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def lines_of(run_dir):
    """Return the whole lines of a file that is being written."""
    return (run_dir / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
