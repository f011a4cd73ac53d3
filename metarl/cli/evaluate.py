"""`metarl evaluate`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metarl.cli.arguments import (
    Parser,
    add_checkpoint,
    add_task_selection,
    new_file,
    not_negative,
    positive,
    run_folder,
)
from metarl.errors import UserError
from metarl.runs.atomic_files import replace_file
from metarl.runs.lock import own_folder


def evaluate(arguments: list[str]) -> int:
    """Evaluate a run on held-out tasks."""
    parser = Parser(
        "metarl evaluate",
        description="Adapt to held-out tasks as in training, and compare the results with those of an untrained agent.",
    )
    parser.add_argument("run_dir", type=run_folder, help="a run directory of `metarl train`")
    add_checkpoint(parser)
    add_task_selection(parser, "--tasks", "a benchmark or task (default: the tasks of the run)")
    parser.add_argument("--num-tasks", type=positive, help="number of tasks, balanced over classes (default: all)")
    parser.add_argument(
        "--rollouts-per-task", type=positive, help="episodes per task and phase (default: as in training)"
    )
    parser.add_argument("--adaptation-steps", type=positive, help="adaptation steps K (default: as in training)")
    parser.add_argument(
        "--ablate",
        choices=("memory", "reward"),
        help="also evaluate without memory of earlier episodes, or with the rewards of the average task (only agents "
        "with a memory)",
    )
    parser.add_argument(
        "--official",
        action="store_true",
        help="use Meta-World's own evaluation, which is biased; see also --num-evals and --adaptation-episodes",
    )
    parser.add_argument(
        "--num-evals", type=positive, help="rounds of --official (default: enough to cover each of 40 goals)"
    )
    parser.add_argument("--adaptation-episodes", type=positive, help="episodes of --official to adapt on (default: 10)")
    parser.add_argument(
        "--seed",
        type=not_negative,
        help="seed of the episodes and confidence intervals (default: the run's; with --official: 0)",
    )
    parser.add_argument(
        "--num-workers", type=not_negative, help="processes that step environments (default: one per core)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="device to adapt on (default: auto)"
    )
    parser.add_argument(
        "--json", metavar="FILE", type=new_file, help="report file (default: RUN_DIR/evaluation/<split>.json)"
    )
    options = parser.parse_args(arguments)
    own = {"ablate", "num_tasks", "rollouts_per_task", "adaptation_steps", "num_workers"}
    for name in sorted(own if options.official else {"num_evals", "adaptation_episodes"}):
        if getattr(options, name) is not None:
            conflict = "cannot be combined with" if options.official else "requires"
            raise UserError(f"--{name.replace('_', '-')} {conflict} --official; see metarl evaluate --help")
    return _evaluate_officially(options) if options.official else _evaluate_run(options)


def _evaluate_run(options: argparse.Namespace) -> int:
    import numpy as np
    from rich.console import Console

    from metarl import evaluation
    from metarl.build import distribution_of, num_workers
    from metarl.cli.display import report_tables
    from metarl.deploy.policy import load
    from metarl.evaluation import select_tasks
    from metarl.seeding import Purpose, seeds

    policy = load(options.run_dir, options.device, options.checkpoint)
    distribution = distribution_of(policy.config, options.tasks, options.stage)
    tasks = distribution.test_tasks if options.split == "test" else distribution.train_tasks
    if options.num_tasks:
        tasks = select_tasks(tasks, options.num_tasks, np.random.default_rng(seeds(0, Purpose.EVALUATION_TASKS)))
    ablation = options.ablate and f"without_{options.ablate}"
    parts = _checkpoint_part(options), options.stage, options.tasks, options.split, ablation
    console = Console(markup=False)  # task names may have brackets
    with _report_at(options, parts) as report_file:
        with console.status(f"evaluating on {len(tasks)} tasks"):
            report = evaluation.evaluate(
                policy,
                tasks,
                rollouts_per_task=options.rollouts_per_task,
                adaptation_steps=options.adaptation_steps,
                seed=options.seed,
                ablate=options.ablate,
                num_workers=num_workers(policy.config) if options.num_workers is None else options.num_workers,
            )
        for table in report_tables(report):
            console.print(table)
        replace_file(report_file, (json.dumps(report, indent=2) + "\n").encode())
    console.print(f"report: {report_file}", highlight=False, soft_wrap=True)
    return 0


def _evaluate_officially(options: argparse.Namespace) -> int:
    from rich.console import Console

    from metarl.build import distribution_of
    from metarl.cli.display import official_table
    from metarl.deploy.policy import load
    from metarl.evaluation.metaworld_protocol import official_report

    policy = load(options.run_dir, options.device, options.checkpoint)
    if any(stage.wrappers for stage in policy.config.stages):
        raise UserError(
            "--official runs Meta-World's own environments, which have no wrappers; this run has some: omit --official"
        )
    tasks: Any = getattr(distribution_of(policy.config, options.tasks, options.stage), "config", None)
    if getattr(tasks, "family", None) != "metaworld":
        raise UserError("--official requires Meta-World tasks; select some with --tasks, e.g. --tasks reach-v3")
    parts = _checkpoint_part(options), "official", options.stage, options.tasks, options.split
    settings = {key: getattr(options, key) for key in ("num_evals", "adaptation_episodes", "seed")}
    console = Console(markup=False)  # task names may have brackets
    with _report_at(options, parts) as report_file:
        with console.status("evaluating in Meta-World's own environments; this takes a while"):
            report = official_report(
                policy,
                benchmark=tasks.benchmark,
                name=tasks.name,
                split=options.split,
                horizon=tasks.horizon,
                reward_version=tasks.reward_version,
                **{key: value for key, value in settings.items() if value is not None},
            )
        console.print(official_table(report))
        replace_file(report_file, (json.dumps(report, indent=2) + "\n").encode())
    console.print(f"report: {report_file}", highlight=False, soft_wrap=True)
    return 0


def _checkpoint_part(options: argparse.Namespace) -> str:
    """Return the checkpoint's part of a report's file name; empty for the latest."""
    return "" if options.checkpoint == "latest" else f"checkpoint_{options.checkpoint}"


@contextmanager
def _report_at(options: argparse.Namespace, parts: Iterable[str | None]) -> Iterator[Path]:
    """Yield the path of the report; on failure an earlier report is kept, and no new file is left.

    Args:
        options: the options of the command.
        parts: the parts of the file's name if --json is not given.

    Raises:
        UserError: the path cannot be written; raised before the evaluation starts.
    """
    # A stage may have any name, even `../a`; the report must stay in the run's folder.
    name = "".join(char if char.isprintable() and char not in "/\\ " else "-" for char in "_".join(filter(None, parts)))
    file: Path = options.json or own_folder(options.run_dir, "evaluation") / f"{name}.json"
    existed = file.exists()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        raise UserError(
            f"cannot write the report to {file}: {error.strerror}; choose another file with --json"
        ) from error
    try:
        yield file
    except BaseException:
        if not existed:
            file.unlink(missing_ok=True)
        raise
