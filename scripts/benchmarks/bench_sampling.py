#!/usr/bin/env python
"""Speed and memory of sampling with one and with several worker processes, policy included.

Speed: episodes of 20 ML10 tasks, collected as in `metarl train`, alternately with 1 worker and with `--num-workers`.
The policy acts in the main process, so the workers never have all cores. The script also prints the upper limit of the
machine: the same environments in as many processes that wait neither for each other nor for a policy, against one.

Memory: 45 ML45 tasks in flight, summed over all processes. Pages that processes share are counted once (PSS, Linux).

    .venv/bin/python scripts/benchmarks/bench_sampling.py [--num-workers 2] [--repeats 9]
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metarl import agents
from metarl.agents.maml.maml import MamlPpoConfig
from metarl.collect import collect
from metarl.envs import distribution
from metarl.envs.vector.pool import POOL
from metarl.envs.vector.workers import WorkerEnvs
from metarl.protocols import Agent
from metarl.seeding import children
from metarl.spaces import Spaces
from metarl.types import AgentSpec, Task

HORIZON = 100
ROLLOUTS = 10


def tasks_of(benchmark: str, num_tasks: int) -> list[Task]:
    """Return tasks spread evenly over the classes of a benchmark."""
    tasks = distribution("metaworld", benchmark=benchmark, horizon=HORIZON).train_tasks
    return tasks[:: len(tasks) // num_tasks][:num_tasks]


def make_agent() -> Agent:
    """Return an agent as in configs/ml10_maml_ppo.yaml."""
    return agents.build(
        MamlPpoConfig(hidden_sizes=(128, 128)), AgentSpec(Spaces.within_one(39, 4), torch.device("cpu"), seed=0)
    )


def sample(envs: WorkerEnvs, tasks: list[Task], repeat: int) -> float:
    """Return the environment steps per second of one call of `collect`."""
    agent = make_agent()
    state = agent.initial_state(len(tasks))
    seeds = children(np.random.SeedSequence(repeat), len(tasks))
    start = time.perf_counter()
    rollout = collect(envs, agent, state, tasks, envs.max_envs // len(tasks), seeds)
    return rollout.env_steps / (time.perf_counter() - start)


def step_alone(connection: Any, tasks: list[Task]) -> None:
    """Step environments with random actions whenever the parent asks, and send back the seconds that it took."""
    from metarl.envs import make

    envs = [make(task) for task in tasks]
    rng = np.random.default_rng(0)
    while connection.recv():
        for env in envs:
            env.reset()
        actions = rng.uniform(-1, 1, (HORIZON, len(envs), 4)).astype(np.float32)
        start = time.perf_counter()
        for row in actions:
            for env, action in zip(envs, row, strict=True):
                env.step(action)
        connection.send(time.perf_counter() - start)


def ceiling(num_workers: int, repeats: int) -> list[float]:
    """Return the speed-up of independent processes over a single one, measured `repeats` times."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(num_workers)]
    tasks = tasks_of("ML10", 20)
    for i, (_, theirs) in enumerate(pipes):
        context.Process(target=step_alone, args=(theirs, tasks[i::num_workers]), daemon=True).start()
        theirs.close()
    ours = [pipe for pipe, _ in pipes]
    ratios = []
    for repeat in range(repeats + 1):
        alone = []
        for pipe in ours:
            pipe.send(True)
            alone.append(pipe.recv())
        for pipe in ours:
            pipe.send(True)
        together = [pipe.recv() for pipe in ours]
        if repeat:  # the first one builds the environments
            ratios.append(sum(alone) / max(together))
    for pipe in ours:
        pipe.send(False)
    return ratios


def resident_gib(pids: list[int]) -> float:
    """Return the memory of processes in GiB; shared pages are divided among their processes."""
    kib = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                kib += int(line.split()[1])
    return kib / 2**20


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    several = arguments.num_workers

    best = ceiling(several, arguments.repeats)
    print(
        f"{several} independent processes / 1: median {statistics.median(best):.2f} ({min(best):.2f}–{max(best):.2f})"
    )

    tasks = tasks_of("ML10", 20)
    tens = distribution("metaworld", benchmark="ML10", horizon=HORIZON)
    pools = {number: WorkerEnvs(tens, len(tasks) * ROLLOUTS, number) for number in (1, several)}
    rates: dict[int, list[float]] = {number: [] for number in pools}
    for repeat in range(arguments.repeats + 1):
        for number, envs in pools.items():
            rate = sample(envs, tasks, repeat)
            if repeat:
                rates[number].append(rate)
    for envs in pools.values():
        envs.close()
    ratios = [many / one for one, many in zip(rates[1], rates[several], strict=True)]
    for number, found in rates.items():
        print(f"collect with {number} worker(s): median {statistics.median(found):,.0f} env steps/s")
    print(f"ratio: median {statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})")

    tasks = tasks_of("ML45", 45)
    all_classes = distribution("metaworld", benchmark="ML45", horizon=HORIZON)
    envs = WorkerEnvs(all_classes, len(tasks) * min(ROLLOUTS, POOL // len(tasks)), several)
    sample(envs, tasks, 0)
    workers = [process.pid for process in multiprocessing.active_children() if process.pid]
    main_gib, worker_gib = resident_gib([multiprocessing.current_process().pid or 0]), resident_gib(workers)
    print(
        f"ML45, 45 tasks, {envs.max_envs} environments in {several} workers: {main_gib + worker_gib:.2f} GiB in all "
        f"(main process {main_gib:.2f}, workers {worker_gib:.2f})"
    )
    envs.close()


if __name__ == "__main__":
    main()
