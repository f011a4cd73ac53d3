#!/usr/bin/env python
"""Time of one meta-gradient (inner and outer step, second order): ours against a plain loop over tasks.

The loop is what is usually written: for each task `torch.autograd.grad(..., create_graph=True)`, then `backward`.
Both are timed alternately in one process and their gradients are compared; the median of the ratios is printed.

    .venv/bin/python scripts/bench_meta_update.py [--device cuda] [--repeats 7]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from metarl.agents.maml_ppo import Batch, MamlPpo, MamlPpoConfig
from metarl.objectives import likelihood_ratio_loss, ppo_clip_loss

SIZES = (  # tasks, samples a task, observation size, action size, hidden sizes
    (20, 500, 39, 4, (64, 64)),
    (20, 1000, 2, 2, (64, 64)),
    (4, 2000, 17, 6, (64, 64)),
    (40, 2000, 17, 6, (64, 64)),
    (20, 5000, 39, 4, (128, 128)),
)


def make_batch(agent: MamlPpo, tasks: int, samples: int, generator: torch.Generator) -> Batch:
    """Return random data `[M, S, ...]` whose log-probs are those of the agent."""
    policy = agent.policy
    observations = torch.randn(tasks, samples, policy.observation_size, generator=generator)
    actions = torch.randn(tasks, samples, policy.action_size, generator=generator)
    advantages = torch.randn(tasks, samples, generator=generator)
    parts = [part.to(agent.device) for part in (observations, actions, advantages)]
    with torch.no_grad():
        log_probs = policy.log_prob(agent.params, parts[0].flatten(0, 1), parts[1].flatten(0, 1)).view(tasks, samples)
    return Batch(parts[0], parts[1], log_probs, parts[2], torch.ones_like(log_probs))


def loop_over_tasks(agent: MamlPpo, support: Batch, query: Batch) -> None:
    """The reference: one task after another."""
    config, names = agent.config, list(agent.params)
    for task in range(len(query.weights)):
        s, q = support.tasks(task), query.tasks(task)
        log_probs = agent.policy.log_prob(agent.params, s.observations, s.actions)
        loss = likelihood_ratio_loss(log_probs, s.log_probs, s.advantages, s.weights)
        gradients = torch.autograd.grad(loss, [agent.params[name] for name in names], create_graph=True)
        adapted = {n: agent.params[n] - config.inner_lr * g for n, g in zip(names, gradients, strict=True)}
        log_probs = agent.policy.log_prob(adapted, q.observations, q.actions)
        outer, _ = ppo_clip_loss(log_probs, q.log_probs, q.advantages, q.weights, config.clip_eps)
        (outer / len(query.weights)).backward()


def batched(agent: MamlPpo, support: Batch, query: Batch) -> None:
    """What the agent does."""
    agent.accumulate_gradient([support], query)


MetaGradient = Callable[[MamlPpo, Batch, Batch], None]


def timed(function: MetaGradient, agent: MamlPpo, support: Batch, query: Batch) -> tuple[float, list[torch.Tensor]]:
    """Return seconds and the gradient."""
    for value in agent.params.values():
        value.grad = None
    if agent.device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function(agent, support, query)
    if agent.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return seconds, [value.grad.clone() for value in agent.params.values() if value.grad is not None]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads")
    print(f"{'tasks × samples':>16} {'net':>12} {'loop ms':>9} {'ours ms':>9} {'loop / ours':>12}")
    for tasks, samples, observation_size, action_size, hidden_sizes in SIZES:
        config = MamlPpoConfig(hidden_sizes=hidden_sizes)
        agent = MamlPpo(config, observation_size, action_size, torch.device(options.device), seed=0)
        generator = torch.Generator().manual_seed(0)
        support, query = (make_batch(agent, tasks, samples, generator) for _ in range(2))
        loops, ours = [], []
        for _ in range(options.repeats + 1):
            seconds, expected = timed(loop_over_tasks, agent, support, query)
            loops.append(seconds)
            seconds, found = timed(batched, agent, support, query)
            ours.append(seconds)
            for a, b in zip(expected, found, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        ratio = statistics.median(a / b for a, b in zip(loops[1:], ours[1:], strict=True))
        times = [1e3 * statistics.median(values[1:]) for values in (loops, ours)]
        print(f"{f'{tasks} × {samples}':>16} {hidden_sizes!s:>12} {times[0]:9.1f} {times[1]:9.1f} {ratio:12.2f}")


if __name__ == "__main__":
    main()
