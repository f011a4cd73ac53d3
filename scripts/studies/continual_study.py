"""Show forgetting and its cure: sequences of stages with and without stability methods, over several seeds.

    scripts/studies/continual_study.py cued_rl2                  every arm, seeds 0 1 2; some minutes on 2 cores
    scripts/studies/continual_study.py cued_rl2 --sweep          EWC's coefficient: stability against plasticity
    scripts/studies/continual_study.py rotated_rl2 --arms fine_tuning replay --seeds 5 6
    scripts/studies/continual_study.py cued_rl2 --set="--stages.0.iterations 10"      flags for all arms

An arm is `metarl train CONFIG` with some flags. The script prints the command of each run, and does not repeat a run
that has finished. It writes study.json, study.md and study.png (or sweep.…) next to the runs. Scores are those of the
run's score table: 0 is an untrained agent, 1 one that was just trained on the first stage. Intervals are 95 % bootstrap
intervals of the mean over seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metarl.config.schema import load_config
from metarl.continual.metrics import (
    Curve,
    average_performance,
    evaluations,
    forgetting,
    forward_transfer,
    relearning,
    training_curve,
)
from metarl.plots.run import Point, stability_plasticity
from metarl.runs.tracking import read_metrics
from metarl.statistics import stratified_bootstrap_ci

CONTROLS = {"joint": "--control joint", "scratch": "--control scratch"}


class Study(NamedTuple):
    """An embedded config, the flags of each arm except the controls, and the coefficients of EWC in a sweep."""

    config: str
    arms: dict[str, str]
    sweep: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0, 10000.0)


CLONE_LESS = "--stability.{}.cloning-coef 0.1"
MEASURES = "average", "forgetting", "lost", "last"
BEFORE = "average", "forgetting"

STUDIES = {
    "cued_rl2": Study(
        "continual_cued_wedges_rl2",
        {
            "fine_tuning": "",
            "ewc": "--stability ewc",
            "replay": "--stability replay",
            "ewc_replay": "--stability ewc replay --stability.0.coef 0.01",
        },
    ),
    "rotated_rl2": Study(
        "continual_rotated_wedges_rl2",
        {
            "fine_tuning": "",
            "ewc": "--stability ewc",
            "replay": "--stability replay",
            "ewc_replay": "--stability ewc replay --stability.0.coef 0.01",
        },
    ),
    "rotated_cued_maml": Study(
        "continual_rotated_cued_wedges_maml_ppo",
        {
            "fine_tuning": "",
            "ewc": "--stability ewc --stability.0.coef 3",
            "replay": f"--stability replay {CLONE_LESS.format(0)}",
            "ewc_replay": f"--stability ewc replay --stability.0.coef 0.01 {CLONE_LESS.format(1)}",
        },
    ),
    "returning": Study(  # A → B → A
        "continual_rotated_wedges_rl2",
        {
            "fine_tuning": "--stages.0.for-each.wedges [0] [2] [0]",
            "replay": "--stages.0.for-each.wedges [0] [2] [0] --stability replay",
        },
    ),
    "negative": Study(  # no cue, no adaptation, one head, contradictory dynamics
        "continual_rotated_cued_wedges_maml_ppo",
        {
            arm: f"--agent.name multi_task --stages.0.tasks.name rotated_wedges {flags}"
            for arm, flags in (("fine_tuning", ""), ("ewc", "--stability ewc --stability.0.coef 3"))
        },
    ),
    "reach_drawer_rl2": Study(
        "continual_reach_drawer_rl2",
        {"fine_tuning": "", "ewc": "--stability ewc", "replay": "--stability replay"},
    ),
    "quick": Study(  # two opposite families, about a minute: what CI runs
        "continual_cued_wedges_rl2",
        {
            arm: f"--stages.0.for-each.wedges 0 2 --stages.0.iterations 40 {flags}"
            for arm, flags in (("fine_tuning", ""), ("ewc", "--stability ewc"), ("replay", "--stability replay"))
        },
    ),
}


class Result(NamedTuple):
    """Scores of one run."""

    average: float
    forgetting: float  # mean over all stages; the last counts as 0
    lost: float  # mean over the earlier stages: minus the backward transfer
    last: float
    average_before: float  # the same before adaptation
    forgetting_before: float
    minutes: float
    curves: list[Curve]  # of each stage during its training
    again: list[tuple[int, int | None, int | None]]  # stage, iterations to learn it at first and again


def run(command: list[str], folder: Path) -> None:
    """Train one arm with one seed, unless the same command has finished before."""
    marker = folder / "finished.json"
    if marker.exists() and json.loads(marker.read_text(encoding="utf-8"))["command"] == command:
        return
    print(shlex.join(command), flush=True)
    began = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "from metarl.cli import main; main()", *command[1:]],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr}")
    minutes = (time.perf_counter() - began) / 60.0
    marker.write_text(json.dumps({"command": command, "minutes": minutes}, indent=2) + "\n", encoding="utf-8")


def read(folder: Path) -> Result:
    """Return the scores of a run."""
    report = json.loads((folder / "evaluation" / "continual.json").read_text(encoding="utf-8"))
    config = load_config(folder / "config.yaml")
    stages, scratch = config.stages, config.control == "scratch"
    found = evaluations(read_metrics(folder), report["stages"])
    tasks = [stage.tasks for stage in stages]
    before = np.array(report["scores_pre"], dtype=np.float64)
    again = [(i, *relearning(found, tasks.index(task), i)) for i, task in enumerate(tasks) if tasks.index(task) < i]
    return Result(
        report["continual/average_performance"],
        report["continual/forgetting"],
        -report["continual/backward_transfer"],
        report["continual/plasticity"],
        average_performance(before),
        forgetting(before),
        json.loads((folder / "finished.json").read_text(encoding="utf-8"))["minutes"],
        [training_curve(found, stage, scratch=scratch) for stage in range(len(stages))],
        again,
    )


def interval(values: Sequence[float]) -> str:
    """Return the mean and its interval over seeds as text."""
    mean = f"{np.mean(values):.2f}"
    if len(values) < 2:
        return mean
    low, high = stratified_bootstrap_ci([np.array(values)], np.mean, rng=0)
    return f"{mean} [{low:.2f}, {high:.2f}]"


def table(results: dict[str, list[Result]]) -> str:
    """Return a Markdown table with one row an arm."""
    columns = "arm", "average performance", "forgetting", "lost by earlier stages", "last stage", "forward transfer"
    rows = [f"| {' | '.join(columns)} | average, forgetting before adaptation | minutes |"]
    rows.append("|" + "---|" * 8)
    scratch = results.get("scratch")
    for arm, runs in results.items():
        transfer = ""
        if scratch and arm != "scratch" and len(scratch) == len(runs):
            pairs = zip(runs, scratch, strict=True)
            each = [value[np.isfinite(value)] for value in (forward_transfer(a.curves, b.curves) for a, b in pairs)]
            defined = [float(value.mean()) for value in each if len(value)]
            transfer = interval(defined) if defined else ""
        figures = [interval([getattr(each, name) for each in runs]) for name in MEASURES]
        before = ", ".join(f"{np.mean([getattr(each, f'{name}_before') for each in runs]):.2f}" for name in BEFORE)
        minutes = f"{np.mean([each.minutes for each in runs]):.1f}"
        rows.append(f"| {arm} | {' | '.join(figures)} | {transfer} | {before} | {minutes} |")
    for arm, runs in results.items():
        for place in range(len(runs[0].again)):
            steps = [each.again[place] for each in runs]
            took = ", ".join(f"{first} at first and {second} again" for _, first, second in steps)
            rows.append(
                f"\n{arm}: stage {steps[0][0] + 1} repeats one; iterations to 90 % of what that had reached: {took}"
            )
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run a study. Return its figures by arm, as a list over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--arms", nargs="+", help="arms to run (all)")
    parser.add_argument("--sweep", action="store_true", help="sweep EWC's coefficient instead of running the arms")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", default="", help="flags of `metarl train` for all runs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one core each")
    parser.add_argument("--out", type=Path, default=Path("runs/continual"))
    options = parser.parse_args(arguments)
    study = STUDIES[options.study]
    arms = {**study.arms, **CONTROLS}
    if options.sweep:
        arms = {f"ewc_{coef:g}": f"--stability ewc --stability.0.coef {coef:g}" for coef in study.sweep}
        arms = {"fine_tuning": "", **arms, "frozen": "--stability l2 --stability.0.coef 10000"}
    for arm in options.arms or ():
        if arm not in arms:
            parser.error(f"no arm {arm!r}; choose from {', '.join(arms)}")
    arms = {arm: flags for arm, flags in arms.items() if arm in (options.arms or arms)}
    folder: Path = options.out / options.study
    began = time.perf_counter()
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = []
        for arm, flags in arms.items():
            for seed in options.seeds:
                where = folder / arm / str(seed)
                own = ["--run-dir", str(where), "--seed", str(seed), "--num-workers", "0", "--overwrite"]
                command = ["metarl", "train", study.config, *own, *shlex.split(options.set), *shlex.split(flags)]
                jobs.append(pool.submit(run, command, where))
        for job in jobs:
            job.result()
    results = {arm: [read(folder / arm / str(seed)) for seed in options.seeds] for arm in arms}
    text = table(results)
    print(f"\n{text}\n\n{(time.perf_counter() - began) / 60.0:.1f} minutes with {options.jobs} job(s)")
    name = "sweep" if options.sweep else "study"
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    points = [Point(arm, each.last, 1.0 - each.forgetting) for arm, runs in results.items() for each in runs]
    stability_plasticity(points).savefig(folder / f"{name}.png", dpi=150)
    shown = [name for name in Result._fields if name != "curves"]
    figures = {arm: [{name: getattr(each, name) for name in shown} for each in runs] for arm, runs in results.items()}
    (folder / f"{name}.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


if __name__ == "__main__":
    main()
