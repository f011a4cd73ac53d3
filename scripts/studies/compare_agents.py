#!/usr/bin/env python
"""Compare meta-learners and controls with equal environment steps: returns on held-out tasks, over seeds.

Every agent trains with the settings of the embedded MAML-PPO config of its tasks; only the settings that make it that
agent differ. So no agent is tuned, and MAML-PPO has the advantage that the settings were chosen for it.

`pretrained` trains one policy on all tasks and adapts at evaluation like the others. `from scratch` is PPO on ONE
held-out task with the whole budget for that task alone: the reference for adaptation in a few episodes, not its equal.

The score of a seed is its mean over tasks. Intervals are 95 % t-intervals over seeds, wide if there are few. Runs that
exist are not trained again. Results go to `table.md` and `curves.png`.

    .venv/bin/python scripts/studies/compare_agents.py [half_cheetah_dir] [navigation] [--seeds 3] [--processes 2]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

AGENTS: dict[str, dict[str, Any]] = {
    "MAML-PPO": {"name": "maml_ppo"},
    "ProMP": {"name": "maml_ppo", "outer": {"inner_kl_coef": 5e-4}},
    "FOMAML": {"name": "fomaml"},
    "Reptile": {"name": "reptile"},
    "Meta-SGD": {"name": "meta_sgd"},
    "ANIL": {"name": "anil"},
    "MAML-TRPO": {"name": "maml_trpo", "outer": None},
    "Meta-Curvature": {"name": "meta_curvature"},
    "iMAML": {"name": "imaml"},
    "Meta-Dropout": {"name": "meta_dropout"},
    "pretrained": {"name": "multi_task"},
    "from scratch": {"name": "multi_task"},
}
"""The changes of each agent to the config; `outer: None` drops the config's outer step."""

BUDGETS = {"half_cheetah_dir": 1_000_000, "navigation": 1_000_000}
"""Environment steps of a training run."""

EVALUATED_STEPS = 3
"""Gradient steps at evaluation, each on fresh episodes."""

EVALUATED_TASKS = 40
"""Largest number of held-out tasks in an evaluation."""

SCRATCH_TASKS = 4
"""Largest number of held-out tasks that `from scratch` trains on, one by one."""


RETURNS = ("returns", "untrained_returns")
"""Keys in the rows of a report."""

T_QUANTILES = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""97.5 % quantiles of Student's t distribution, by the number of seeds."""


class Job(NamedTuple):
    """One training run and its evaluation."""

    tasks: str
    agent: str
    seed: int
    env_steps: int
    folder: Path
    held_out: int | None = None  # index of the only task, from scratch

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        suffix = "" if self.held_out is None else f"_task{self.held_out}"
        return self.folder / self.tasks / f"{self.agent.replace(' ', '_')}_seed{self.seed}_{self.env_steps}{suffix}"


class Only(NamedTuple):
    """A distribution of one task."""

    train_tasks: list[Any]
    test_tasks: list[Any]
    make: Any


def settings(job: Job) -> dict[str, Any]:
    """Return the config of a run as a mapping; its iterations spend the budget."""
    from metarl.config.schema import load_config

    config = load_config(f"{job.tasks}_maml_ppo").model_dump(mode="json")
    changes = AGENTS[job.agent]
    outer = config["agent"].pop("outer")
    if changes.get("outer", {}) is not None:
        config["agent"]["outer"] = outer | changes.get("outer", {})
    config["agent"] |= {key: value for key, value in changes.items() if key != "outer"}
    if job.agent == "ANIL":
        del config["agent"]["adapted_modules"]  # its own default: the head
    phases = 1 if config["agent"]["name"] == "multi_task" else 1 + config["agent"]["adaptation_steps"]
    horizon = config["stages"][0]["tasks"]["horizon"] or 100
    steps = config["num_tasks"] * config["rollouts_per_task"] * horizon * phases
    config["stages"][0]["iterations"] = max(1, round(job.env_steps / steps))
    config["evaluation"]["every_iterations"] = 0
    return config | {"seed": job.seed, "device": "cpu", "num_workers": 0}


def run(job: Job) -> None:
    """Train and evaluate, unless the report exists."""
    import torch

    import metarl
    from metarl.build import task_distribution
    from metarl.config.schema import RunConfig
    from metarl.evaluation.held_out import select_tasks

    report_file = job.run_dir / "report.json"
    if report_file.exists():
        return
    torch.set_num_threads(1)
    config = RunConfig.model_validate(settings(job))
    distribution = task_distribution(config.stages[0])
    tasks = select_tasks(distribution.test_tasks, EVALUATED_TASKS, np.random.default_rng(0))
    if job.held_out is not None:
        tasks = [distribution.test_tasks[job.held_out]]
        distribution = Only(tasks, tasks, distribution.make)
    trained = metarl.train(config, distribution, run_dir=job.run_dir, overwrite=True)
    report = metarl.evaluate(trained.policy, tasks, adaptation_steps=EVALUATED_STEPS)
    report_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(
        f"{job.tasks} {job.agent} seed {job.seed}: {report['env_steps']:,} env steps, returns "
        f"{[round(float(value), 1) for value in np.mean([row['returns'] for row in report['tasks']], axis=0)]}",
        flush=True,
    )


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Yield the runs, one seed after another."""
    from metarl.build import task_distribution
    from metarl.config.schema import RunConfig

    for seed in range(options.seeds):
        for tasks in options.tasks:
            for agent in options.agents:
                job = Job(tasks, agent, seed, options.env_steps or BUDGETS[tasks], options.out)
                if agent == "from scratch":
                    stage = RunConfig.model_validate(settings(job)).stages[0]
                    number = min(SCRATCH_TASKS, len(task_distribution(stage).test_tasks))
                    yield from (job._replace(held_out=index) for index in range(number))
                else:
                    yield job


class Scores(NamedTuple):
    """Mean returns of one agent over its tasks: a row for each seed, a column for each adaptation step."""

    by_step: np.ndarray  # [seeds, 1 + EVALUATED_STEPS]
    untrained: np.ndarray  # the same for an untrained agent
    env_steps: int


def scores(finished: Sequence[Job]) -> Scores:
    """Read the reports of one agent."""
    by_seed: dict[int, list[dict[str, Any]]] = {}
    env_steps = 0
    for job in finished:
        report = json.loads((job.run_dir / "report.json").read_text(encoding="utf-8"))
        by_seed.setdefault(job.seed, []).extend(report["tasks"])
        env_steps = max(env_steps, report["env_steps"])
    means = [[np.mean([row[key] for row in rows], axis=0) for rows in by_seed.values()] for key in RETURNS]
    return Scores(np.array(means[0]), np.array(means[1]), env_steps)


def cell(values: np.ndarray) -> str:
    """Return a mean over seeds with its interval."""
    if len(values) < 2:
        return f"{values.mean():.1f}"
    half = T_QUANTILES.get(len(values), 2.0) * values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean():.1f} ± {half:.1f}"


def table(tasks: str, by_agent: dict[str, list[Job]]) -> str:
    """Return the results on one family of tasks as a Markdown table."""
    lines = [
        f"### {tasks}",
        "",
        "| agent | env steps | before | after 1 step | after 3 steps |",
        "|---|---|---|---|---|",
    ]
    untrained = None
    for agent, finished in by_agent.items():
        found = scores(finished)
        if agent == "from scratch":
            cells = [cell(found.untrained[:, 0]), cell(found.by_step[:, 0]), ""]
            agent = "from scratch, on one task alone: before and after all its env steps"
        else:
            untrained = untrained or found
            cells = [cell(found.by_step[:, k]) for k in (0, 1, EVALUATED_STEPS)]
        lines.append(f"| {agent} | {found.env_steps / 1e6:.2f}M | {' | '.join(cells)} |")
    if untrained is not None:
        cells = [cell(untrained.untrained[:, k]) for k in (0, 1, EVALUATED_STEPS)]
        lines.append(f"| untrained (random initialisation) | 0 | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: dict[str, dict[str, list[Job]]], path: Path) -> None:
    """Draw training returns after adaptation against environment steps, mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from metarl.runs.tracking import read_metrics

    figure, axes = plt.subplots(1, len(results), figsize=(7 * len(results), 4.5), squeeze=False)
    for axis, (tasks, by_agent) in zip(axes[0], results.items(), strict=True):
        for agent, finished in by_agent.items():
            if agent == "from scratch":
                continue
            key, curves = "meta_train/return_post", []
            for job in finished:
                lines = [line for line in read_metrics(job.run_dir) if key in line]
                curves.append(([line["env_steps"] for line in lines], [line[key] for line in lines]))
            grid = np.linspace(0, min(steps[-1] for steps, _ in curves), 60)
            mean = np.mean([np.interp(grid, *curve) for curve in curves], axis=0)
            axis.plot(grid / 1e6, mean, label=agent, linestyle="--" if agent == "pretrained" else "-")
        axis.set(
            title=tasks,
            xlabel="environment steps (millions)",
            ylabel="training return (after adaptation, if any)",
        )
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train the missing runs and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(BUDGETS), help=f"any of {', '.join(BUDGETS)}")
    parser.add_argument("--agents", nargs="+", default=list(AGENTS), choices=list(AGENTS), metavar="AGENT")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--env-steps", type=int, help="of every run (1M)")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    options = parser.parse_args()
    if unknown := set(options.tasks) - set(BUDGETS):
        parser.error(f"unknown tasks {', '.join(unknown)}; expected any of {', '.join(BUDGETS)}")
    all_jobs = list(jobs(options))
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for _ in pool.imap_unordered(run, all_jobs):
            pass
    results: dict[str, dict[str, list[Job]]] = {}
    for job in all_jobs:
        results.setdefault(job.tasks, {}).setdefault(job.agent, []).append(job)
    tables = "\n\n".join(table(tasks, by_agent) for tasks, by_agent in results.items())
    (options.out / "table.md").write_text(tables + "\n", encoding="utf-8")
    plot(results, options.out / "curves.png")
    print(f"\n{tables}\n\nin {options.out}: table.md, curves.png")


if __name__ == "__main__":
    main()
