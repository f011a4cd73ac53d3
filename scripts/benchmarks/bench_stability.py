"""Cost of stability methods: the time of an iteration relative to the same iteration without any.

    scripts/benchmarks/bench_stability.py                                    two sequences, EWC, replay and both
    scripts/benchmarks/bench_stability.py --configs cw10_rl2 --rounds 3 --set="--stages.0.tasks.horizon 100"

Each method trains in the second stage of a sequence, where it has an earlier stage to protect. Rounds of a few
iterations alternate between the methods, in one process and one thread. The figure is the ratio of medians.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import tempfile
from pathlib import Path

import torch

from metarl.config.schema import load_config
from metarl.training.loop import train

FIRST = 3
"""Iterations of the first stage."""

QUIET = shlex.split(
    "--num-workers 0 --evaluation.every-iterations 0 --evaluation.num-tasks 4 --checkpoint-every-iterations 1000000"
)
METHODS = {"none": "[]", "ewc": "ewc", "replay": "replay", "ewc + replay": "ewc replay"}


class Arm:
    """A run that trains a few iterations at a time."""

    def __init__(self, config: str, flags: list[str], methods: str, folder: Path) -> None:
        loaded = load_config(config, [*QUIET, *flags, "--stability", *methods.split()])
        first, second, *_ = loaded.stages
        stages = [first.model_copy(update={"iterations": FIRST}), second.model_copy(update={"iterations": 10**6})]
        self._config = loaded.model_copy(update={"stages": tuple(stages)})
        self._run_dir, self._iterations = folder, 0
        self.seconds: list[float] = []

    def go_on(self, iterations: int, measured: bool) -> None:
        """Train some more iterations; the first of each round is a warm-up."""
        seconds: list[float] = []
        train(
            self._config,
            run_dir=self._run_dir,
            resume=self._iterations > 0,
            max_iterations=self._iterations + iterations,
            progress=lambda position, metrics: seconds.append(metrics.get("time/iteration_seconds", float("nan"))),
        )
        self._iterations += iterations
        if measured:
            self.seconds += [value for value in seconds if value == value][1:]


def main() -> None:
    """Print one line for each config and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--configs", nargs="+", default=["continual_cued_wedges_rl2", "continual_rotated_cued_wedges_maml_ppo"]
    )
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--iterations", type=int, default=5, help="iterations in a round; the first is not measured")
    parser.add_argument("--set", default="", help="flags of `metarl train`")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.configs:
        with tempfile.TemporaryDirectory() as folder:
            arms = {
                method: Arm(name, shlex.split(options.set), methods, Path(folder) / str(number))
                for number, (method, methods) in enumerate(METHODS.items())
            }
            for arm in arms.values():
                arm.go_on(FIRST + 1, measured=False)
            for _ in range(options.rounds):
                for arm in arms.values():
                    arm.go_on(options.iterations, measured=True)
            reference = statistics.median(arms["none"].seconds)
            for method, arm in arms.items():
                median = statistics.median(arm.seconds)
                print(
                    f"{name:<42}{method:<14}{1000 * median:8.1f} ms an iteration   {median / reference:.2f} ×",
                    flush=True,
                )


if __name__ == "__main__":
    main()
