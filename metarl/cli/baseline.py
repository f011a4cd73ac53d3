"""`metarl baseline`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from metarl.cli.arguments import Parser, any_path, new_file, not_negative, positive
from metarl.errors import UserError
from metarl.runs.atomic_files import replace_file


def baseline(arguments: list[str]) -> int:
    """Train a standard single-task agent from scratch on tasks of a config."""
    parser = Parser(
        "metarl baseline",
        usage="metarl baseline CONFIG [options] [--SETTING VALUE ...]",
        description="Train stable-baselines3's PPO or SAC on the CPU, from scratch on each of several tasks of a "
        "config: a reference for single-task learning. Every setting of the config is a flag, too (see metarl train "
        "CONFIG --help): --seed sets networks and episodes, --stages.0.tasks... the tasks.",
        epilog="Finished tasks are cached: the same command resumes an interrupted one, or shows the result at once.",
        allow_abbrev=False,
    )
    parser.add_argument("--algorithm", choices=("ppo", "sac"), default="ppo", help="learning algorithm (default: ppo)")
    parser.add_argument(
        "--env-steps", type=positive, default=100_000, metavar="N", help="training steps per task (default: 100000)"
    )
    parser.add_argument(
        "--num-tasks", type=positive, default=5, metavar="N", help="number of tasks, balanced over classes (default: 5)"
    )
    parser.add_argument(
        "--split", choices=("test", "train"), default="test", help="split to take tasks from (default: test)"
    )
    parser.add_argument(
        "--eval-episodes", type=positive, default=10, metavar="N", help="episodes per evaluation (default: 10)"
    )
    parser.add_argument(
        "--stage", type=not_negative, metavar="I", help="index of the config's stage, from 0 (default: the last)"
    )
    parser.add_argument(
        "--cache",
        type=any_path,
        default=Path("runs/baselines"),
        metavar="DIR",
        help="folder for finished tasks (default: runs/baselines)",
    )
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also write the report to this file")
    config_name = arguments[0] if arguments and not arguments[0].startswith("-") else None
    options, flags = parser.parse_known_args(arguments[1:] if config_name else arguments)
    if config_name is None:
        raise UserError(
            "name a config before the flags: a YAML file or one of `metarl list configs`, "
            "e.g. metarl baseline quickstart"
        )
    return _run_baseline(config_name, flags, options)


def _run_baseline(config_name: str, flags: list[str], options: argparse.Namespace) -> int:
    from metarl.config.schema import load_config

    config = load_config(config_name, flags)
    if options.stage is not None and options.stage >= len(config.stages):
        raise UserError(f"--stage is {options.stage}; {config_name} has {len(config.stages)} stage(s), counted from 0")
    stage = config.stages[-1 if options.stage is None else options.stage]

    import numpy as np
    from rich.console import Console

    from metarl.build import task_distribution
    from metarl.cli.display import baseline_progress, baseline_table
    from metarl.envs import FAMILIES
    from metarl.evaluation.held_out import select_tasks
    from metarl.evaluation.single_task import reference
    from metarl.seeding import Purpose, seeds

    if stage.tasks.family not in FAMILIES:
        raise UserError("the config has custom tasks; call metarl.baseline.reference(tasks, make=...) from Python")
    distribution = task_distribution(stage)
    tasks = distribution.test_tasks if options.split == "test" else distribution.train_tasks
    # The same draw as in `metarl evaluate --num-tasks`, so that both score the same tasks.
    tasks = select_tasks(tasks, options.num_tasks, np.random.default_rng(seeds(0, Purpose.EVALUATION_TASKS)))
    existed = options.json is not None and options.json.exists()
    try:
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.touch()
    except OSError as error:
        raise UserError(f"cannot write the report to {options.json}: {error.strerror}; choose another file") from error
    console = Console(markup=False)  # task names may have brackets
    try:
        with console.status(f"training {options.algorithm} on each of {len(tasks)} tasks"):
            report = reference(
                tasks,
                options.algorithm,
                options.env_steps,
                eval_episodes=options.eval_episodes,
                seed=config.seed,
                cache=options.cache,
                progress=lambda finished, row: console.print(
                    f"{finished}/{len(tasks)}  {baseline_progress(row)}", highlight=False, soft_wrap=True
                ),
            )
    except KeyboardInterrupt:
        print(f"metarl: stopped; finished tasks are in {options.cache}: repeat the command to resume", file=sys.stderr)
        return 130
    finally:
        if options.json and not existed:
            options.json.unlink(missing_ok=True)  # an empty file, rewritten below on success
    console.print(baseline_table(report))
    if options.json:
        replace_file(options.json, (json.dumps(report, indent=2) + "\n").encode())
        console.print(f"report: {options.json}", highlight=False, soft_wrap=True)
    return 0
