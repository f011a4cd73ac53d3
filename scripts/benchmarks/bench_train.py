#!/usr/bin/env python
"""Environment steps per second of a whole training run, update included, against the official `env.step`.

The script trains with an embedded config as `metarl train` does; every setting of the config is a flag here, too.
Before the first and after each iteration it steps the official environment of the first task alone in this process,
with random actions, so that both rates are measured under the same conditions.

Then it prints where the time of the last iteration went: the update as measured in the iteration; acting, and stepping
the environments, each repeated alone as often as in the iteration; and of the latter the share of physics, as measured
on one environment alone. The rest is waiting and recording.

    .venv/bin/python scripts/benchmarks/bench_train.py [CONFIG] [--iterations 3] [--SETTING=VALUE ...]
    .venv/bin/python scripts/benchmarks/bench_train.py --reference-rl2     # the published setting of RL² on ML1 reach
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import torch
from metaworld.env_dict import ALL_V3_ENVIRONMENTS

import metarl
from metarl.build import max_envs, num_workers, task_distribution
from metarl.config.schema import RunConfig, load_config
from metarl.envs.metaworld.env import goal_vector
from metarl.envs.vector.serial import make_envs
from metarl.types import Position, TimeStep

REFERENCE_RL2 = [
    *("--num-tasks=10", "--rollouts-per-task=1", "--stages.0.tasks.horizon=500", "--agent.trial-episodes=10"),
    *("--agent.memory.size=256", "--agent.encoder-sizes=[256, 256]", "--agent.state-dependent-std=true"),
    *("--agent.observation-entries=null", "--agent.input-differences=false", "--agent.input-time=false"),
    *("--agent.critic.name=linear", "--agent.bptt-steps=250", "--agent.epochs=10", "--agent.minibatches=1"),
    *("--agent.max-kl=1000", "--evaluation.num-tasks=1"),
]
"""Meta-World+ (2505.11289) on ML1: 10 tasks × 10 episodes × 500 steps, encoder 256², GRU 256, deviation by state,
linear baseline, chunks of 250 steps, 10 epochs; here none of them ends early."""


class Official:
    """The official environment of a task, stepped with random actions for whole episodes."""

    def __init__(self, task: Any) -> None:
        self.env = ALL_V3_ENVIRONMENTS[task.name]()
        self.env._last_rand_vec, self.env._freeze_rand_vec = goal_vector(task).copy(), True
        self.env._set_task_called = True
        self.actions = np.random.default_rng(0).uniform(-1, 1, (500, 4)).astype(np.float32)

    def steps_per_second(self, episodes: int = 4) -> float:
        """Return the rate of `env.step`, without resets."""
        return episodes * len(self.actions) / self._seconds(self.env.step, episodes)

    def physics_steps_per_second(self, episodes: int = 4) -> float:
        """Return the rate of the MuJoCo part of a step."""
        env = self.env

        def step(action: Any) -> None:
            moved = env.data.mocap_pos[0] + action[:3] * env.action_scale
            env.data.mocap_pos[0] = np.clip(moved, env.mocap_low, env.mocap_high)
            env.data.ctrl[:] = action[3], -action[3]
            mujoco.mj_step(env.model, env.data, 5)
            mujoco.mj_forward(env.model, env.data)

        return episodes * len(self.actions) / self._seconds(step, episodes)

    def _seconds(self, step: Any, episodes: int) -> float:
        seconds = 0.0
        for _ in range(episodes):
            self.env.reset()
            start = time.perf_counter()
            for action in self.actions:
                step(action)
            seconds += time.perf_counter() - start
        return seconds


def acting_seconds(config: RunConfig, agent: Any, steps: int) -> float:
    """Return the seconds that the agent takes for `steps` steps of all environments, on one thread as in training."""
    shape = (config.num_tasks, config.rollouts_per_task)
    task = task_distribution(config.stages[0]).train_tasks[0]
    env = metarl.envs.make(task)
    observation = torch.tensor(env.reset()[0], dtype=torch.float32).expand(*shape, -1)
    noise = torch.zeros(*shape, env.action_space.shape[0])
    nothing = torch.zeros(shape)
    going_on = TimeStep(observation, nothing, nothing.bool(), ~nothing.bool())
    begins = going_on._replace(episode_start=~nothing.bool())
    state, threads = agent.initial_state(shape[0]), torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.perf_counter()
    for step in range(steps):
        _, _, state = agent.act(begins if step == 0 else going_on, noise, state)
    seconds = time.perf_counter() - start
    torch.set_num_threads(threads)
    return seconds


def stepping_seconds(config: RunConfig, steps: int) -> float:
    """Return the seconds that the environments of an iteration take for `steps` steps without an agent, with resets."""
    distribution = task_distribution(config.stages[0])
    envs = make_envs(distribution, max_envs(config, 0), num_workers(config))
    parallel = envs.max_envs // config.num_tasks
    tasks = [task for task in distribution.train_tasks[: config.num_tasks] for _ in range(parallel)]
    horizon, rng = int(tasks[0].option("horizon")), np.random.default_rng(0)
    everything, active = slice(0, len(tasks)), np.ones(len(tasks), np.bool_)
    seeds = np.zeros(len(tasks), np.uint32)
    envs.reset(tasks, seeds)
    start = time.perf_counter()
    for step in range(steps):
        if step % horizon == 0:
            envs.reset(tasks, seeds)
        envs.step_async(everything, rng.uniform(-1, 1, (len(tasks), 4)), active)
        envs.step_wait(everything)
    seconds = time.perf_counter() - start
    envs.close()
    return seconds * config.rollouts_per_task / parallel


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="an embedded config of Meta-World tasks (ml1_reach_meta_sgd)")
    parser.add_argument("--reference-rl2", action="store_true", help="use ml1_reach_rl2 with the published settings")
    parser.add_argument("--iterations", type=int, default=3)
    arguments, flags = parser.parse_known_args()
    name = arguments.config or ("ml1_reach_rl2" if arguments.reference_rl2 else "ml1_reach_meta_sgd")
    config = load_config(name, [*(REFERENCE_RL2 if arguments.reference_rl2 else []), *flags])
    official = Official(task_distribution(config.stages[0]).train_tasks[0])
    ours, theirs, updates = [], [official.steps_per_second()], []
    last: dict[str, float] = {}

    def report(position: Position, metrics: Mapping[str, float]) -> None:
        if "time/env_steps_per_second" not in metrics:
            return
        last.update(metrics, env_steps=position.env_steps / position.iteration)
        ours.append(metrics["time/env_steps_per_second"])
        updates.append(metrics["time/update_fraction"])
        theirs.append(official.steps_per_second())
        print(
            f"iteration {position.iteration}: {ours[-1]:,.0f} env steps/s, {updates[-1]:.0%} of it in the update; "
            f"official env.step in one process: {theirs[-1]:,.0f}",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as folder:
        run = metarl.train(config, run_dir=Path(folder) / "run", max_iterations=arguments.iterations, progress=report)
    ratios = [rate / statistics.mean(around) for rate, around in zip(ours, itertools.pairwise(theirs), strict=True)]
    print(
        f"\nwhole loop / official env.step: {', '.join(f'{ratio:.2f}' for ratio in ratios)}; "
        f"median {statistics.median(ratios):.2f}"
    )
    agent, envs_steps = run.policy.agent, last["env_steps"]
    steps = round(envs_steps / config.num_tasks / config.rollouts_per_task)
    acting, stepping = acting_seconds(config, agent, steps), stepping_seconds(config, steps)
    single = metarl.envs.make(task_distribution(config.stages[0]).train_tasks[0])
    single.reset()
    count = min(400, int(single.task.option("horizon")))
    begin = time.perf_counter()
    for action in official.actions[:count]:
        single.step(action)
    physics = (time.perf_counter() - begin) * official.physics_steps_per_second() / count
    total, update = last["time/iteration_seconds"], last["time/iteration_seconds"] * last["time/update_fraction"]
    parts = {
        "update": update,
        "acting": acting,
        "environments, physics": stepping / physics,
        "environments, Python and processes": stepping * (1.0 - 1.0 / physics),
        "waiting, recording": total - update - acting - stepping,
    }
    print(f"the last iteration, {envs_steps:,.0f} env steps in {total:.1f} s:")
    for part, seconds in parts.items():
        print(f"  {part:<36}{seconds:6.1f} s {seconds / total:5.0%}")


if __name__ == "__main__":
    main()
