"""Workers that die or hang change no number, and none outlives the process that has started it."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from metarl.agents import build
from metarl.agents.maml.maml import MamlPpoConfig
from metarl.collect import BrokenRolloutsError, collect
from metarl.envs import distribution
from metarl.envs.vector.serial import SerialEnvs
from metarl.envs.vector.workers import WorkerEnvs
from metarl.seeding import children
from tests.agents.specs import spec
from tests.faults import processes
from tests.faults.fragile import BREAK_AT, HORIZON, Exploding, Tasks, Unreadable, walks

ROOT = Path(__file__).parents[2]


class Noisy:
    """Acts with its noise, or as another agent does; before each act it runs a given function."""

    device = torch.device("cpu")
    adapts_by, adaptation_steps = "memory", 0

    def __init__(self, trial_episodes=1, before=lambda acts: None, agent=None, noise_size=2):
        self.noise_size = agent.noise_size if agent else noise_size
        self.trial_episodes, self.before, self.agent, self.acts = trial_episodes, before, agent, 0

    def initial_state(self, num_tasks):
        return self.agent.initial_state(num_tasks) if self.agent else torch.zeros(num_tasks, 1)

    def act(self, time_step, noise, state):
        self.acts += 1
        self.before(self.acts)
        if self.agent:
            return self.agent.act(time_step, noise, state)
        return noise.clone(), noise.sum(-1) + state, state + time_step.active


def rollout_of(envs, tasks, rollouts=4, agent=None):
    agent = agent or Noisy(noise_size=envs.action_space.shape[0])
    seeds = children(np.random.SeedSequence(7), len(tasks))
    return collect(envs, agent, agent.initial_state(len(tasks)), tasks, rollouts, seeds)


def assert_same(left, right):
    for name, tensor in vars(left).items():
        torch.testing.assert_close(tensor, getattr(right, name), rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Workers import the environments by the name of their module, which starts at the root of the repository."""
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def workers():
    """Builds WorkerEnvs, closes them, and makes sure that none hangs or is left over."""
    opened = []

    def too_long(*_):
        raise AssertionError("the call hangs")

    def build_envs(*arguments):
        opened.append(WorkerEnvs(*arguments))
        return opened[-1]

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(90)
    yield build_envs
    for envs in opened:
        envs.close()
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert multiprocessing.active_children() == []


# What is lost is begun again


@pytest.mark.parametrize(
    ("when", "what", "trial_episodes"),
    [("build", "SIGKILL", 1), ("reset", "SIGKILL", 2), ("step", "SIGKILL", 1), ("step", "SIGSTOP", 2)],
)
def test_a_worker_lost_anywhere_changes_no_number(when, what, trial_episodes, workers, tmp_path):
    """The second of two tasks loses its worker once, in the first of two waves of four environments."""
    tasks = walks("walk", when, signal=what, mark=str(tmp_path / "mark"))
    (tmp_path / "mark").touch()
    expected = rollout_of(SerialEnvs(Tasks(tasks), 4), tasks, agent=Noisy(trial_episodes))
    (tmp_path / "mark").unlink()
    envs = workers(Tasks(tasks), 4, 2, 1.5)
    assert_same(rollout_of(envs, tasks, agent=Noisy(trial_episodes)), expected)
    assert envs.restarts == 1 and (tmp_path / "mark").exists()
    assert_same(rollout_of(envs, tasks, agent=Noisy(trial_episodes)), expected)
    assert envs.restarts == 1


def test_a_worker_killed_from_outside_changes_no_number_of_real_physics(workers):
    """One of them in the first of three waves of six environments, and both in the third."""
    hopper = distribution("mujoco", name="HopperRandParams", horizon=30)
    tasks = hopper.train_tasks[:3]
    agent = build(MamlPpoConfig(hidden_sizes=(8,)), spec(11, 3, "cpu", 0))
    serial = Noisy(agent=agent)
    expected = rollout_of(SerialEnvs(hopper, 6), tasks, 5, serial)
    envs = workers(hopper, 6, 2)

    def kill(acts):
        for process in multiprocessing.active_children()[: {10: 1, serial.acts: 2}.get(acts, 0)]:
            process.kill()

    assert_same(rollout_of(envs, tasks, 5, Noisy(before=kill, agent=agent)), expected)
    assert envs.restarts == 3


def test_a_worker_that_dies_each_time_ends_the_run_in_one_clear_line(workers):
    tasks = walks("walk", "step", exit=3)
    envs = workers(Tasks(tasks), 4, 2)
    with pytest.raises(RuntimeError) as caught:
        rollout_of(envs, tasks)
    assert str(caught.value) == (
        "environment worker 1 ended with exit code 3, after 3 restarts in a row; look at the environment: with "
        "--num-workers 0 it runs in the main process and shows its own error"
    )
    assert envs.restarts == 3
    assert len(multiprocessing.active_children()) <= 1  # the healthy one
    envs.close()
    assert multiprocessing.active_children() == []


def test_losses_are_counted_anew_for_each_wave(workers):
    """Four, of which the first wave has three, each in its first step, and the second one."""
    tasks = walks("walk", "walk")
    expected = rollout_of(SerialEnvs(Tasks(tasks), 2), tasks, rollouts=2)
    envs = workers(Tasks(tasks), 2, 1)

    def kill(acts):
        if acts in (1, 2, 3, 4 + HORIZON):
            multiprocessing.active_children()[0].kill()

    assert_same(rollout_of(envs, tasks, rollouts=2, agent=Noisy(before=kill)), expected)
    assert envs.restarts == 4


def test_an_environment_that_raises_is_not_tried_again(workers):
    tasks = walks("raise", "walk")
    envs = workers(Tasks(tasks), 2, 2)
    agent = Noisy()
    with pytest.raises(RuntimeError, match=r"failed in worker 0:\n(?s:.*)the arm is unplugged"):
        rollout_of(envs, tasks, rollouts=1, agent=agent)
    assert (envs.restarts, agent.acts) == (0, BREAK_AT)


def test_a_worker_that_cannot_start_is_not_tried_again(workers, capfd):
    tasks = walks("walk")
    envs = workers(Unreadable(tasks), 2, 1)
    time.sleep(0.1)
    with pytest.raises(RuntimeError, match="worker 0 ended with exit code 1\nit could not start: see its traceback"):
        rollout_of(envs, tasks, rollouts=1)
    assert envs.restarts <= 1  # where it had died before it was asked for anything
    assert "these tasks stay here" in capfd.readouterr().err


def test_a_worker_that_is_starting_leaves_ctrl_c_to_the_main_process(workers):
    tasks = walks("walk", "walk")
    envs = workers(Tasks(tasks), 2, 2)
    for process in multiprocessing.active_children():
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(process.pid, number)
    assert rollout_of(envs, tasks, rollouts=1).env_steps > 0
    assert envs.restarts == 0


def test_a_slow_worker_that_makes_progress_is_not_hung(workers):
    """A step of all takes 6 · 0.3 s, more than the 1 s in which one of them must be stepped."""
    tasks = walks(*["crawl"] * 6, horizon=2)
    envs = workers(Tasks(tasks), 6, 1, 1.0)
    rollout = rollout_of(envs, tasks, rollouts=1)
    assert rollout.valid.any(-1).all() and envs.restarts == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the death of a thread ends its workers on Linux alone")
def test_workers_of_a_thread_that_has_ended_are_started_again(workers):
    tasks = walks("walk", "walk")
    made, found = [], []

    def make_and_use():
        made.append(workers(Tasks(tasks), 4, 2))
        found.append(rollout_of(made[0], tasks))

    thread = threading.Thread(target=make_and_use)
    thread.start()
    thread.join()
    assert_same(rollout_of(made[0], tasks), found[0])
    assert made[0].restarts == 2


# Numbers that are not finite


class Failing(Noisy):
    """Its actions in the first rollouts of some tasks are not finite at the second step."""

    def __init__(self, value, failing_tasks, trial_episodes):
        super().__init__(trial_episodes)
        self.value, self.failing_tasks = value, failing_tasks

    def act(self, time_step, noise, state):
        actions, log_probs, state = super().act(time_step, noise, state)
        if self.acts == 3:  # the second one of the first of two lanes
            actions[self.failing_tasks, 0, 1] = self.value
        return actions, log_probs, state


@pytest.mark.parametrize("trial_episodes", [1, 2])
@pytest.mark.parametrize(
    ("value", "failing_tasks"),
    [(float("nan"), [1]), (float("inf"), [1]), (float("nan"), [0, 1])],
    ids=["nan", "inf", "a whole lane"],
)
def test_an_action_that_is_not_finite_is_never_taken(value, failing_tasks, trial_episodes, workers):
    tasks = walks("walk", "walk")
    found = []
    for envs in (SerialEnvs(Tasks(tasks), 4), workers(Tasks(tasks), 4, 2)):
        agent = Failing(value, failing_tasks, trial_episodes)
        found.append(rollout_of(envs, tasks, rollouts=2, agent=agent))
    assert_same(found[0], found[1])
    kept = torch.tensor([[0 not in failing_tasks, True], [False, True]])
    assert torch.equal(found[0].valid.any(-1), kept)
    clean = rollout_of(SerialEnvs(Tasks(tasks), 4), tasks, rollouts=2, agent=Noisy(trial_episodes))
    for name, tensor in vars(found[0]).items():
        assert not tensor[~kept].any(), name
        expected = getattr(clean, name)[:, :, : tensor.shape[2]]
        torch.testing.assert_close(tensor[kept], expected[kept], rtol=0, atol=0, msg=name)


def test_an_agent_without_a_finite_action_is_told(workers):
    class Lost(Noisy):
        def act(self, time_step, noise, state):
            return noise * float("nan"), noise.sum(-1), state

    tasks = walks("walk", "walk")
    for envs in (SerialEnvs(Tasks(tasks), 4), workers(Tasks(tasks), 4, 2)):
        with pytest.raises(BrokenRolloutsError, match=r"8 of 8 rollouts had a NaN .*action") as caught:
            rollout_of(envs, tasks, agent=Lost())
        assert caught.value.rollout.env_steps == 0
        assert rollout_of(envs, tasks).env_steps > 0  # the environments are as good as before


@pytest.mark.parametrize(
    ("family", "settings", "count"),
    [
        ("mujoco", {"name": "AntDir", "horizon": 6, "num_train": 3}, 0),
        ("mujoco", {"name": "HopperRandParams", "horizon": 6, "num_train": 3}, 2),
        ("metaworld", {"benchmark": "ML1", "name": "reach-v3", "horizon": 6}, 0),
    ],
    ids=["mujoco", "mujoco in workers", "metaworld"],
)
def test_a_simulation_that_flies_apart_drops_its_episode(family, settings, count, workers):
    exploding = Exploding(family, settings)
    tasks = exploding.train_tasks[:3]
    envs = workers(exploding, 3, count) if count else SerialEnvs(exploding, 3)
    rollout = rollout_of(envs, tasks, rollouts=1)
    assert rollout.valid.any(-1).flatten().tolist() == [False, True, True]
    for name, tensor in vars(rollout).items():
        assert not tensor[0].any(), name
        assert name == "success" or tensor.isfinite().all(), name


# No process outlives the one that has started it


def state_of(pid):
    """The parent of a process, and a letter for its state; none if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None, "none"
    return int(fields[1]), fields[0]


def children_of(parent):
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if state_of(path.name)[0] == parent]


def workers_of(parent):
    return [
        pid for pid in children_of(parent) if b"--multiprocessing-fork" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def alive(pids):
    return [pid for pid in pids if state_of(pid)[1] not in ("none", "Z", "X")]


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

AT_ANY_TIME = [("SIGKILL", doing) for doing in ("starting", "idle", "stepping", "asleep", "stopped")]
IN_ANY_WAY = [(ending, "stepping") for ending in ("exit", "raise", "os._exit", "SIGTERM", "SIGINT")]


@linux
@pytest.mark.parametrize(("ending", "doing"), AT_ANY_TIME + IN_ANY_WAY)
def test_nothing_is_left_of_workers_whose_parent_ends(ending, doing, tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.parent", ending, doing, str(tmp_path / "mark")],
        cwd=ROOT,
        env=processes.environment(TMPDIR=tmp_path),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert parent.stdout.readline() == b"ready\n", parent.stderr.read()
        wait_until(lambda: len(workers_of(parent.pid)) == 2, 5.0)  # one that was just made has its parent's name
        found = children_of(parent.pid)
        assert len(found) == 3  # and the resource tracker
        if doing == "starting":
            time.sleep(0.2)  # it has sent them what to do
        if doing == "stopped":
            wait_until(lambda: "T" in [state_of(pid)[1] for pid in found], 5.0)
        if ending.startswith("SIG"):
            parent.send_signal(signal.Signals[ending])
        else:
            parent.stdin.close()  # it has waited for that
        own = {"exit": 7, "raise": 1, "os._exit": 8}
        assert parent.wait(timeout=10.0) == (own[ending] if ending in own else -signal.Signals[ending])
        wait_until(lambda: not alive(found), 10.0 if doing == "starting" else 2.0)  # it looks when it has started
        pids = [str(pid) for pid in (parent.pid, *found)]
        assert [name for name in os.listdir("/dev/shm") if any(pid in name for pid in pids)] == []
        assert list(tmp_path.glob("pymp-*")) == []
    finally:
        parent.kill()
        for stream in (parent.stdin, parent.stdout, parent.stderr):
            stream.close()
        parent.wait()


@linux
@pytest.mark.slow
def test_a_run_whose_worker_is_killed_ends_with_the_numbers_of_one_undisturbed(tmp_path, cli, started):
    command = ["train", "half_cheetah_dir_maml_ppo", "--device", "cpu", "--agent.hidden-sizes", "[8]"]
    command += ["--num-tasks", 2, "--rollouts-per-task", 2, "--stages.0.tasks.horizon", 20]
    command += ["--stages.0.iterations", 15, "--evaluation.every-iterations", 0]
    assert cli(*command, "--num-workers", 0, "--run-dir", tmp_path / "serial").status == 0
    run = started(*command, "--num-workers", 2, "--run-dir", tmp_path / "killed")
    wait_until(lambda: metrics_of(tmp_path / "killed"), 60.0)
    os.kill(workers_of(run.pid)[1], signal.SIGKILL)
    _, err = run.communicate(timeout=60.0)
    assert (run.returncode, err) == (0, "")
    expected, found = metrics_of(tmp_path / "serial"), metrics_of(tmp_path / "killed")
    assert sum(line.get("time/worker_restarts", 0) for line in found) == 1
    assert len(found) == 16  # and the evaluation
    for left, right in zip(found, expected, strict=True):
        without_time = [{key: value for key, value in line.items() if "time" not in key} for line in (left, right)]
        assert without_time[0] == without_time[1]


def metrics_of(run_dir):
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
