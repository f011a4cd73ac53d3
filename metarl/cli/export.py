"""`metarl export`."""

from __future__ import annotations

import argparse

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


def export(arguments: list[str]) -> int:
    """Export a run's policy to an ONNX file."""
    parser = Parser(
        "metarl export",
        description="Export the policy of a run, before or after adaptation, to an ONNX file for "
        "metarl.runtime.OnnxPolicy (numpy and onnxruntime) or another runtime. The export is verified against torch.",
    )
    parser.add_argument("run_dir", type=run_folder, help="a run directory of `metarl train`")
    add_checkpoint(parser)
    parser.add_argument(
        "file", type=new_file, metavar="FILE.onnx", help="path of the model; an existing file is replaced"
    )
    text = "adapt to a task first, as in training, e.g. reach-v3 or reach-v3:7"
    add_task_selection(parser, "--adapt-on", text, split=None)
    parser.add_argument(
        "--rollouts-per-task", type=positive, help="episodes per adaptation step (default: as in training)"
    )
    parser.add_argument("--seed", type=not_negative, help="seed of the episodes to adapt on (default: the run's)")
    options = parser.parse_args(arguments)
    if options.file.suffix != ".onnx":
        raise UserError(f"{options.file} does not end in .onnx; choose another name, e.g. policy.onnx")
    for name in ("stage", "split", "rollouts_per_task", "seed"):
        if options.adapt_on is None and getattr(options, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} requires --adapt-on; see metarl export --help")
    return _export(options)


def _export(options: argparse.Namespace) -> int:
    from rich.console import Console

    from metarl.build import task_of
    from metarl.deploy.policy import load
    from metarl.envs import make
    from metarl.evaluation.held_out import adapt_to

    policy, task = load(options.run_dir, checkpoint=options.checkpoint), None
    if options.adapt_on is not None:
        if policy.adapted:
            raise UserError(f"the policy in {options.run_dir} is already adapted; omit --adapt-on")
        if policy.has_memory and options.rollouts_per_task is not None:
            raise UserError(f"{policy.config.agent.name} adapts on a single trial; omit --rollouts-per-task")
        task = task_of(policy.config, options.adapt_on, options.split or "test", options.stage)
    console = Console(markup=False)  # task names may have brackets
    with console.status("adapting and exporting" if task else "exporting"):
        env = None if task is None else make(task)
        if task is not None:
            policy = adapt_to(policy, task, rollouts_per_task=options.rollouts_per_task, seed=options.seed)
        policy.export(options.file, env, task=task)
        if env is not None:
            env.close()
    size = options.file.stat().st_size
    adapted = "adapted" if policy.adapted else "before adaptation"
    adapted += f" to {task.name} {task.index} ({task.split})" if task else ""
    console.print(f"{options.file}: {adapted}, {size:,} bytes, verified against torch", highlight=False, soft_wrap=True)
    return 0
