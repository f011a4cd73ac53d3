#!/usr/bin/env python
"""Time and memory of one meta-gradient (inner and outer step, second order): ours against a plain loop over tasks.

The loop is the usual implementation: for each task `torch.autograd.grad(..., create_graph=True)`, then `backward`. Both
are timed alternately in one process and their gradients are compared. The script prints the median of the ratios, and
then the peak memory of ours over the number of tasks: by default, in chunks, and with all tasks in one chunk. It also
measures a Fisher-vector product, of which TRPO makes about ten an iteration.

    .venv/bin/python scripts/benchmarks/bench_meta_update.py [--device cuda] [--repeats 7]
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from metarl.agents import build
from metarl.agents.maml import meta_objective
from metarl.agents.maml.inner import Batch
from metarl.agents.maml.maml import MamlPpoConfig
from metarl.rl.surrogates import likelihood_ratio_loss, ppo_clip_loss
from metarl.spaces import Spaces
from metarl.types import AgentSpec

SIZES = (  # tasks, samples a task, observation size, action size, hidden sizes
    (20, 500, 39, 4, (64, 64)),
    (20, 1000, 2, 2, (64, 64)),
    (4, 2000, 17, 6, (64, 64)),
    (40, 2000, 17, 6, (64, 64)),
    (20, 5000, 39, 4, (128, 128)),
)
MEMORY_TASKS = (10, 40, 160)
CLIP_EPS = 0.3


def make_agent(observation_size: int, action_size: int, hidden_sizes: tuple[int, ...], device: str) -> Any:
    """Return a MAML-PPO agent."""
    config = MamlPpoConfig(hidden_sizes=hidden_sizes)
    spaces = Spaces.within_one(observation_size, action_size)
    return build(config, AgentSpec(spaces, torch.device(device), seed=0))


def make_batch(agent: Any, tasks: int, samples: int, generator: torch.Generator) -> Batch:
    """Return random data `[M, S, ...]` with the agent's log-probs."""
    policy = agent.policy
    observations = torch.randn(tasks, samples, policy.observation_size, generator=generator)
    actions = torch.randn(tasks, samples, policy.head.action_size, generator=generator)
    advantages = torch.randn(tasks, samples, generator=generator)
    parts = [part.to(agent.device) for part in (observations, actions, advantages)]
    steps = (torch.arange(samples, device=agent.device) % 100).expand(tasks, samples)
    with torch.no_grad():
        log_probs = policy.log_prob(agent.meta.theta, parts[0].flatten(0, 1), parts[1].flatten(0, 1))
    log_probs = log_probs.view(tasks, samples)
    return Batch(parts[0], parts[1], log_probs, parts[2], torch.ones_like(log_probs), steps)


def loop_over_tasks(agent: Any, support: Batch, query: Batch) -> None:
    """Compute the reference: one task after another."""
    theta, inner_lr = agent.meta.theta, agent.config.inner_lr
    for task in range(len(query.weights)):
        s, q = support.tasks(task), query.tasks(task)
        log_probs = agent.policy.log_prob(theta, s.observations, s.actions)
        loss = likelihood_ratio_loss(log_probs, s.log_probs, s.advantages, s.weights)
        gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        adapted = {name: theta[name] - inner_lr * g for name, g in zip(theta, gradients, strict=True)}
        log_probs = agent.policy.log_prob(adapted, q.observations, q.actions)
        outer, _ = ppo_clip_loss(log_probs, q.log_probs, q.advantages, q.weights, CLIP_EPS)
        (outer / len(query.weights)).backward()


def ours(agent: Any, support: Batch, query: Batch) -> None:
    """Compute the gradient as the agent does in an epoch."""
    agent.objective([support, query]).backward(
        lambda log_probs, batch: ppo_clip_loss(log_probs, batch.log_probs, batch.advantages, batch.weights, CLIP_EPS)
    )


def fisher(agent: Any, support: Batch, query: Batch) -> None:
    """Compute a Fisher-vector product."""
    vector = {name: torch.ones_like(value) for name, value in agent.meta.named().items()}
    agent.objective([support, query]).fisher_product(vector)


MetaGradient = Callable[[Any, Batch, Batch], None]


def timed(function: MetaGradient, agent: Any, support: Batch, query: Batch) -> tuple[float, list[torch.Tensor]]:
    """Return the seconds that a call takes, and the gradient."""
    for value in agent.meta.theta.values():
        value.grad = None
    if agent.device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function(agent, support, query)
    if agent.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return seconds, [value.grad.clone() for value in agent.meta.theta.values() if value.grad is not None]


def time_table(device: str, repeats: int) -> None:
    """Print the times for each size."""
    print(f"{'tasks × samples':>16} {'net':>12} {'loop ms':>9} {'ours ms':>9} {'loop / ours':>12} {'Fisher ms':>10}")
    for tasks, samples, observation_size, action_size, hidden_sizes in SIZES:
        agent = make_agent(observation_size, action_size, hidden_sizes, device)
        generator = torch.Generator().manual_seed(0)
        support, query = (make_batch(agent, tasks, samples, generator) for _ in range(2))
        loops, batched, products = [], [], []
        for _ in range(repeats + 1):
            seconds, expected = timed(loop_over_tasks, agent, support, query)
            loops.append(seconds)
            seconds, found = timed(ours, agent, support, query)
            batched.append(seconds)
            products.append(timed(fisher, agent, support, query)[0])
            for a, b in zip(expected, found, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        ratio = statistics.median(a / b for a, b in zip(loops[1:], batched[1:], strict=True))
        times = [1e3 * statistics.median(values[1:]) for values in (loops, batched, products)]
        print(
            f"{f'{tasks} × {samples}':>16} {hidden_sizes!s:>12} {times[0]:9.1f} {times[1]:9.1f} {ratio:12.2f} "
            f"{times[2]:10.1f}",
            flush=True,
        )


def peak_megabytes(function: MetaGradient, device: str, tasks: int, whole: bool) -> float:
    """Return the peak memory in MB of a meta-update of `tasks` × 2000 samples, beyond its data."""
    if whole:
        meta_objective.CPU_CHUNK_BYTES, meta_objective.GPU_CHUNK_FRACTION = 1 << 60, 1e6
        meta_objective.FISHER_SHARE = 1
    agent = make_agent(17, 6, (64, 64), device)
    generator = torch.Generator().manual_seed(0)
    timed(function, agent, *(make_batch(agent, 1, 100, generator) for _ in range(2)))
    support, query = (make_batch(agent, tasks, 2000, generator) for _ in range(2))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        timed(function, agent, support, query)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    ctypes.CDLL(None).malloc_trim(0)  # freed memory of the data must not hide that of the update
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again from what is resident now
    before = resident("VmRSS")
    timed(function, agent, support, query)
    return resident("VmHWM") - before


def resident(entry: str) -> float:
    """Return this process's memory in MB: VmRSS is the current, VmHWM the peak (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return float(status.partition(f"{entry}:")[2].split()[0]) / 1e3


def memory_table(device: str) -> None:
    """Print the peaks, each measured in a separate process."""
    print(f"\n{'peak MB beyond the data':>24} {'in chunks':>10} {'whole':>10}")
    for name, function in (("gradient", ours), ("Fisher product", fisher)):
        for tasks in MEMORY_TASKS:
            peaks = []
            for whole in (False, True):
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    peaks.append(pool.apply(peak_megabytes, (function, device, tasks, whole)))
            print(f"{f'{name}, {tasks} × 2000':>24} {peaks[0]:10.0f} {peaks[1]:10.0f}", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads")
    time_table(options.device, options.repeats)
    memory_table(options.device)


if __name__ == "__main__":
    main()
