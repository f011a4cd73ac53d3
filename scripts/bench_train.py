#!/usr/bin/env python
"""Environment steps a second of a whole training run, update included, against the official `env.step`.

Trains with an embedded config as `metarl train` does. Before the first and after each iteration the official
environment of its first task is stepped alone in this process with random actions, so that both rates are taken under
the same conditions.

    .venv/bin/python scripts/bench_train.py [CONFIG] [--iterations 3] [--num-workers 2]
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

import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS

import metarl
from metarl.checkpoint import Position
from metarl.envs.metaworld import goal_vector
from metarl.training import as_config, task_distribution


class Official:
    """The official environment of a task, stepped with random actions, as long as its episodes last."""

    def __init__(self, task: Any) -> None:
        self.env = ALL_V3_ENVIRONMENTS[task.name]()
        self.env._last_rand_vec, self.env._freeze_rand_vec = goal_vector(task).copy(), True
        self.env._set_task_called = True
        self.actions = np.random.default_rng(0).uniform(-1, 1, (500, 4)).astype(np.float32)

    def steps_per_second(self, episodes: int = 4) -> float:
        """Rate of `env.step` alone: resets are not counted."""
        seconds = 0.0
        for _ in range(episodes):
            self.env.reset()
            start = time.perf_counter()
            for action in self.actions:
                self.env.step(action)
            seconds += time.perf_counter() - start
        return episodes * len(self.actions) / seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "config", nargs="?", default="ml1_reach_meta_sgd", help="an embedded config of Meta-World tasks"
    )
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--num-workers", type=int, help="as in `metarl train`; all cores if left out")
    arguments = parser.parse_args()
    config = as_config(arguments.config).model_copy(update={"num_workers": arguments.num_workers})
    task = task_distribution(config.stages[0]).train_tasks[0]
    official = Official(task)
    ours, theirs, updates = [], [official.steps_per_second()], []

    def report(position: Position, metrics: Mapping[str, float]) -> None:
        if "time/env_steps_per_second" not in metrics:
            return
        ours.append(metrics["time/env_steps_per_second"])
        updates.append(metrics["time/update_fraction"])
        theirs.append(official.steps_per_second())
        print(
            f"iteration {position.iteration}: {ours[-1]:,.0f} env steps/s, {updates[-1]:.0%} of it in the update; "
            f"official env.step of {task.name} in one process: {theirs[-1]:,.0f}",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as folder:
        metarl.train(config, run_dir=Path(folder) / "run", max_iterations=arguments.iterations, progress=report)
    ratios = [rate / statistics.mean(around) for rate, around in zip(ours, itertools.pairwise(theirs), strict=True)]
    print(
        f"\nwhole loop / official env.step: {', '.join(f'{ratio:.2f}' for ratio in ratios)}; "
        f"median {statistics.median(ratios):.2f}"
    )


if __name__ == "__main__":
    main()
