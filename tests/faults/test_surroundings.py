"""Environments, threads and machines as people really have them; see also tests/test_spaces.py."""

import multiprocessing
import re

import gymnasium
import numpy as np
import pytest
import torch

import metarl
from metarl.collect import collect
from metarl.envs import custom
from metarl.envs.vector.serial import SerialEnvs, make_envs, usable_cores
from metarl.errors import RunError, UserError
from metarl.seeding import children

BOX = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
SMALL = {
    "agent": {"name": "maml_ppo", "hidden_sizes": [4]},
    "stages": [{"tasks": {"family": "custom"}, "iterations": 2}],
    "num_tasks": 2,
    "rollouts_per_task": 2,
    "num_workers": 0,
}


class Plain(gymnasium.Env):
    """Observes the steps taken; ends after 3."""

    observation_space = action_space = BOX

    def __init__(self, task):
        self.task, self.seeds = task, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.elapsed = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.elapsed += 1
        return np.full(1, self.elapsed, np.float32), float(self.task.index), self.elapsed == 3, False, {}


def tasks_of(make, horizon=5, **settings):
    return custom("plain", make, num_train=3, num_test=1, horizon=horizon, **settings)


class Noise:
    """An agent that acts with its noise."""

    device, adapts_by, adaptation_steps, noise_size, trial_episodes = torch.device("cpu"), "nothing", 0, 1, 1

    def act(self, time_step, noise, state):
        return noise, noise[..., 0], state


def rollout_of(tasks, rollouts=2):
    envs = SerialEnvs(tasks, 3 * rollouts)
    return collect(envs, Noise(), None, tasks.train_tasks, rollouts, children(np.random.SeedSequence(0), 3))


def test_a_method_set_task_of_the_user_s_is_not_called():
    class Own(Plain):
        def set_task(self, task):
            raise AssertionError("it means something else")

    tasks = tasks_of(Own)
    envs = SerialEnvs(tasks, 2)
    for chosen in (tasks.train_tasks[:2], tasks.train_tasks[1:]):
        envs.reset(chosen, np.zeros(2, np.uint32))
        envs.step_async(slice(0, 2), np.zeros((2, 1), np.float32), np.ones(2, bool))
        assert envs.step_wait(slice(0, 2)).rewards.tolist() == [task.index for task in chosen]


def test_environments_are_reused_where_that_is_asked_for():
    built = []

    class Reused(Plain):
        def __init__(self, task):
            built.append(task)
            super().__init__(task)

    def give(env, task):
        env.task = task

    tasks = tasks_of(Reused, retarget=give)
    envs = SerialEnvs(tasks, 2)
    for chosen in (tasks.train_tasks[:2], tasks.train_tasks[1:]):
        envs.reset(chosen, np.zeros(2, np.uint32))
        envs.step_async(slice(0, 2), np.zeros((2, 1), np.float32), np.ones(2, bool))
        assert envs.step_wait(slice(0, 2)).rewards.tolist() == [task.index for task in chosen]
    assert len(built) == 3  # one for the spaces


def test_the_name_of_a_built_in_family_is_refused():
    with pytest.raises(ValueError, match="name is 'navigation', a built-in family; give your tasks another name"):
        custom("navigation", Plain, num_train=1, num_test=1, horizon=5)


def test_seeds_fit_into_a_signed_integer_of_32_bits():
    made = []

    def make(task):
        made.append(Plain(task))
        return made[-1]

    rollout_of(tasks_of(make), rollouts=20)
    seeds = [seed for env in made for seed in env.seeds]
    assert len(set(seeds)) == len(seeds) == 60 and min(seeds) >= 0 and max(seeds) < 2**31
    assert max(seeds) > 2**29


def test_success_that_is_said_only_where_it_is_reached_is_0_elsewhere():
    class Reaching(Plain):
        def step(self, action):
            *answer, _ = super().step(action)
            return *answer, {"success": True} if self.elapsed == 2 and self.task.index == 1 else {}

    rollout = rollout_of(tasks_of(Reaching))
    assert rollout.episode_success().squeeze(-1).tolist() == [[0, 0], [1, 1], [0, 0]]
    assert rollout_of(tasks_of(Plain)).episode_success().isnan().all()


def test_memory_grows_with_the_steps_not_with_the_horizon():
    """Of 300 million steps that the horizon allows none is held but the three of each episode."""
    rollout = rollout_of(tasks_of(Plain, horizon=50_000_000))
    assert rollout.observations.shape == (3, 2, 3, 1)
    short = rollout_of(tasks_of(Plain, horizon=5))
    assert torch.equal(rollout.actions, short.actions)


class Parent(Plain):
    """Starts a process of its own."""

    def reset(self, **arguments):
        process = multiprocessing.get_context("fork").Process(target=int)
        process.start()
        process.join()
        return super().reset(**arguments)


def test_an_environment_may_start_processes():
    tasks = tasks_of(Parent)
    envs = make_envs(tasks, 2, num_workers=1)
    assert envs.reset(tasks.train_tasks[:2], np.zeros(2, np.uint32)).tolist() == [[0], [0]]
    envs.close()


def surroundings():
    return [torch.no_grad(), torch.inference_mode()]


@pytest.mark.parametrize("agent", ["maml_ppo", "rl2"])
def test_what_is_computed_does_not_depend_on_torch_settings_of_the_process(tmp_path, agent):
    settings = {**SMALL, "agent": {"name": agent}}
    tasks = tasks_of(Plain)
    env = tasks.make(tasks.test_tasks[0])

    def everything(name):
        metarl.train(settings, tasks, run_dir=tmp_path / name)
        policy = metarl.load(tmp_path / name)
        torch.manual_seed(0)
        adapted = policy.adapt(policy.record(env, 2))
        return adapted.predict(np.full((2, 1), 0.5))[0]

    expected = everything("plain")
    for i, context in enumerate(surroundings()):
        with context:
            np.testing.assert_array_equal(everything(str(i)), expected)
    torch.set_default_dtype(torch.float64)
    try:
        np.testing.assert_array_equal(everything("double"), expected)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_run_of_which_every_iteration_was_undone_has_failed(tmp_path):
    class Broken(Plain):
        def step(self, action):
            _, reward, *rest = super().step(action)
            return np.full(1, np.nan, np.float32), reward, *rest

    with pytest.raises(RunError, match="nothing was learned: all 2 iterations were undone"):
        metarl.train(SMALL, tasks_of(Broken), run_dir=tmp_path / "run")


def test_a_run_whose_folder_is_moved_stops_at_its_next_save(tmp_path):
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"

    def move(position, metrics):
        if position.iteration == 1 and run_dir.exists():
            run_dir.rename(elsewhere)

    with pytest.raises(RunError, match=re.escape(f"{run_dir} was moved, renamed or removed while its run trained")):
        metarl.train(SMALL, tasks_of(Plain), run_dir=run_dir, progress=move)
    assert not (run_dir / "checkpoints").exists()
    assert metarl.train(SMALL, tasks_of(Plain), run_dir=elsewhere, resume=True).finished


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "10000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({}, 8),
    ],
)
def test_the_quota_of_a_container_counts(tmp_path, monkeypatch, files, cores):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cores(tmp_path) == cores


def test_a_mistake_in_an_environment_ends_a_run_in_one_line(tmp_path):
    class Wrong(Plain):
        def step(self, action):
            return super().step(action)[:4]

    with pytest.raises(UserError, match=r"task plain . of plain: step returned 4 values"):
        metarl.train(SMALL, tasks_of(Wrong), run_dir=tmp_path / "run")
