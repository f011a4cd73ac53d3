"""`metarl export`."""

from __future__ import annotations

import argparse

from metarl.cli.arguments import Parser, add_checkpoint, new_file, not_negative, positive, run_folder, task_name
from metarl.errors import UserError


def export(arguments: list[str]) -> int:
    """Write a run's policy as one ONNX file."""
    parser = Parser(
        "metarl export",
        description="Write the policy of a run, before or after adapting, as one ONNX file, for "
        "metarl.runtime.OnnxPolicy (numpy and onnxruntime) or another runtime. It is compared with torch first.",
    )
    parser.add_argument("run_dir", type=run_folder, help="what `metarl train` wrote")
    add_checkpoint(parser)
    parser.add_argument(
        "file", type=new_file, metavar="FILE.onnx", help="where the model goes; replaced if it is there"
    )
    parser.add_argument(
        "--adapt-on",
        metavar="TASK",
        type=task_name,
        help="adapt to a task first, as in training, e.g. reach-v3 or reach-v3:7",
    )
    parser.add_argument("--stage", metavar="NAME", help="stage to take TASK and the stage id from (the last)")
    parser.add_argument("--split", choices=("test", "train"), help="which TASK (test)")
    parser.add_argument("--rollouts-per-task", type=positive, help="episodes of a phase to adapt on (as in training)")
    parser.add_argument("--seed", type=not_negative, help="of the episodes to adapt on (the run's)")
    options = parser.parse_args(arguments)
    if options.file.suffix != ".onnx":
        raise UserError(f"{options.file} does not end in .onnx; name the file so, e.g. policy.onnx")
    for name in ("stage", "split", "rollouts_per_task", "seed"):
        if options.adapt_on is None and getattr(options, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} needs --adapt-on; see metarl export --help")
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
            raise UserError(f"{options.run_dir} holds a policy that is adapted already; leave --adapt-on out")
        if policy.has_memory and options.rollouts_per_task is not None:
            raise UserError(f"{policy.config.agent.name} reads one trial; leave --rollouts-per-task out")
        task = task_of(policy.config, options.adapt_on, options.split or "test", options.stage)
    console = Console(markup=False)  # names in brackets are names
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
    console.print(f"{options.file}: {adapted}, {size:,} bytes, equal to torch", highlight=False, soft_wrap=True)
    return 0
