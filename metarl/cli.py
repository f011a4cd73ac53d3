"""The verbs of the command line; the only module that imports everything.

Exit status: 0 success, 1 a failure of the run, 2 the user's mistake (one line: cause and cure), 130 and 143 stopped
by a signal after saving.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

from metarl.errors import UserError

RUN_OPTIONS = """options of the run:
  --run-dir DIR         where results go (default: runs/<name of the config>)
  --resume              go on with the run in the run directory
  --overwrite           throw away the run in the run directory
  --max-iterations N    stop after N iterations, counted from the first of the run
  --max-minutes X       stop at the first iteration that ends after X minutes
  --debug               show tracebacks

Every setting of the config is a flag as well:
"""


class _Parser(argparse.ArgumentParser):
    """argparse with mistakes told in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with its status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        status = _dispatch([word for word in arguments if word != "--debug"])
    except UserError as error:
        if debug:
            raise
        print(f"metarl: {error}", file=sys.stderr)
        status = 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        if debug:
            raise
        first, *_ = str(error).splitlines() or [""]
        print(f"metarl: {type(error).__name__}: {first} (--debug shows where)", file=sys.stderr)
        status = 1
    raise SystemExit(status)


def _dispatch(arguments: list[str]) -> int:
    verbs: dict[str, tuple[Callable[[list[str]], int], str]] = {
        "train": (_train, "train an agent from a YAML config"),
        "evaluate": (_evaluate, "evaluate a run on held-out tasks"),
        "inspect": (_inspect, "show what a run directory holds"),
        "list": (_list, "list envs, agents or configs"),
        "doctor": (_doctor, "check this machine"),
        "baseline": (_baseline, "train a standard single-task agent from scratch on some of a config's tasks"),
    }
    if arguments and arguments[0] in verbs:
        return verbs[arguments[0]][0](arguments[1:])
    if arguments and arguments[0] == "--version":
        from importlib.metadata import version

        print(f"metarl {version('metarl')}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: metarl VERB ...\n")
        for verb, (_, purpose) in verbs.items():
            print(f"  {verb:<10} {purpose}")
        print("\n`metarl VERB --help` tells more.")
        return 0 if arguments else 2
    near = difflib.get_close_matches(arguments[0], verbs, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"unknown verb {arguments[0]!r}: {hint}there are {', '.join(verbs)}")


def _train(arguments: list[str]) -> int:
    from metarl.config import find_config, load_config

    parser = _Parser("metarl train", add_help=False, allow_abbrev=False)
    parser.add_argument("--run-dir")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--max-iterations", type=int)
    parser.add_argument("--max-minutes", type=float)
    parser.add_argument("-h", "--help", action="store_true")
    config_name = arguments[0] if arguments and not arguments[0].startswith("-") else None
    options, flags = parser.parse_known_args(arguments[1:] if config_name else arguments)
    if options.help:
        return _train_help(config_name, flags)
    if config_name is None:
        raise UserError("name a config: a YAML file or one of `metarl list configs`, e.g. metarl train quickstart")
    if options.resume and options.overwrite:
        raise UserError("--resume and --overwrite exclude each other: go on with the run, or throw it away")
    for name in ("max_iterations", "max_minutes"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} is {value}; expected more than 0")
    config = load_config(config_name, flags)
    run_dir = Path(options.run_dir) if options.run_dir else Path("runs") / find_config(config_name).stem
    return _run_training(config, run_dir, options)


def _run_training(config: Any, run_dir: Path, options: argparse.Namespace) -> int:
    from rich.console import Console

    from metarl.display import TrainingDisplay
    from metarl.training import train

    total = sum(stage.iterations for stage in config.stages)
    console = Console()
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        print(
            f"metarl: {signal.Signals(number).name}: saving after this iteration; once more stops at once",
            file=sys.stderr,
        )

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with TrainingDisplay(config, min(total, options.max_iterations or total), console) as display:
            run = train(
                config,
                run_dir=run_dir,
                resume=options.resume,
                overwrite=options.overwrite,
                max_iterations=options.max_iterations,
                max_minutes=options.max_minutes,
                should_stop=lambda: bool(received),
                progress=display,
            )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    state = "finished" if run.finished else "stopped; go on with --resume"
    console.print(
        f"{state}: {run.policy.env_steps:,} env steps, saved in {run.run_dir}", highlight=False, soft_wrap=True
    )
    return 128 + received[0] if received else 0


def _train_help(name: str | None, flags: Sequence[str]) -> int:
    """Show every setting with its default; tyro draws it from the same config that the flags are laid over."""
    import tyro

    from metarl.config import RunConfig, load_config

    print("usage: metarl train CONFIG.yaml [--run-dir DIR] [--resume | --overwrite] [--SETTING VALUE ...]\n")
    print(RUN_OPTIONS)
    config = load_config(name or "quickstart", flags)
    shown = Annotated[RunConfig, tyro.conf.arg(name="")]
    tyro.cli(
        shown,
        prog="metarl train CONFIG.yaml",
        default=config,
        args=["--help"],
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
    )
    return 0


def _evaluate(arguments: list[str]) -> int:
    parser = _Parser(
        "metarl evaluate", description="Adapt to held-out tasks as in training, beside an untrained agent."
    )
    parser.add_argument("run_dir", help="what `metarl train` wrote")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="tasks to evaluate on (test)")
    parser.add_argument("--tasks", metavar="NAME", help="another benchmark or task than the run was trained on")
    parser.add_argument("--num-tasks", type=_positive, help="how many tasks, balanced over classes (all)")
    parser.add_argument("--rollouts-per-task", type=_positive, help="episodes a task and phase (as in training)")
    parser.add_argument("--adaptation-steps", type=_positive, help="K (as in training)")
    parser.add_argument(
        "--ablate",
        choices=("memory", "reward"),
        help="also without memory of earlier episodes, or with the average task's rewards (agents with a memory)",
    )
    parser.add_argument(
        "--official", action="store_true", help="by Meta-World's own evaluation, which is biased; see also the next two"
    )
    parser.add_argument("--num-evals", type=_positive, help="official rounds (until each of 40 goals has had its turn)")
    parser.add_argument("--adaptation-episodes", type=_positive, help="official episodes to adapt on (10)")
    parser.add_argument("--seed", type=_not_negative, help="of episodes and intervals (the run's)")
    parser.add_argument("--num-workers", type=_not_negative, help="processes that step environments (one a core)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where adapting is computed")
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="where the report goes (RUN_DIR/evaluation/<split>.json)"
    )
    options = parser.parse_args(arguments)
    own = {"ablate", "num_tasks", "rollouts_per_task", "adaptation_steps", "num_workers"}
    for name in sorted(own if options.official else {"num_evals", "adaptation_episodes"}):
        if getattr(options, name) is not None:
            there = "does not go with" if options.official else "needs"
            raise UserError(f"--{name.replace('_', '-')} {there} --official; see metarl evaluate --help")
    return _evaluate_officially(options) if options.official else _evaluate_run(options)


def _evaluate_run(options: argparse.Namespace) -> int:
    import numpy as np
    from rich.console import Console

    from metarl.display import report_tables
    from metarl.evaluation import distribution_of, evaluate, select_tasks
    from metarl.policy import load
    from metarl.seeding import Purpose, seeds
    from metarl.training import num_workers

    policy = load(options.run_dir, device=options.device)
    distribution = distribution_of(policy.config, options.tasks)
    tasks = distribution.test_tasks if options.split == "test" else distribution.train_tasks
    if options.num_tasks:
        tasks = select_tasks(tasks, options.num_tasks, np.random.default_rng(seeds(0, Purpose.EVALUATION_TASKS)))
    name = "_".join(filter(None, (options.tasks, options.split, options.ablate and f"without_{options.ablate}")))
    path = _report_path(options, name)
    console = Console()
    with console.status(f"evaluating on {len(tasks)} tasks"):
        report = evaluate(
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
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console.print(f"report: {path}", highlight=False, soft_wrap=True)
    return 0


def _evaluate_officially(options: argparse.Namespace) -> int:
    from rich.console import Console

    from metarl.display import official_table
    from metarl.evaluation import distribution_of
    from metarl.official import official_report
    from metarl.policy import load

    policy = load(options.run_dir, device=options.device)
    tasks: Any = getattr(distribution_of(policy.config, options.tasks), "config", None)
    if getattr(tasks, "family", None) != "metaworld":
        raise UserError("--official is for tasks of Meta-World; name some with --tasks, e.g. --tasks reach-v3")
    path = _report_path(options, "_".join(filter(None, ("official", options.tasks, options.split))))
    given = {name: getattr(options, name) for name in ("num_evals", "adaptation_episodes", "seed")}
    console = Console()
    with console.status("evaluating in Meta-World's own environments, which takes a while"):
        report = official_report(
            policy,
            benchmark=tasks.benchmark,
            name=tasks.name,
            split=options.split,
            horizon=tasks.horizon,
            reward_version=tasks.reward_version,
            **{name: value for name, value in given.items() if value is not None},
        )
    console.print(official_table(report))
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console.print(f"report: {path}", highlight=False, soft_wrap=True)
    return 0


def _report_path(options: argparse.Namespace, name: str) -> Path:
    """Return where a report goes; raises UserError before the work is done if nothing can be written there."""
    path: Path = options.json or Path(options.run_dir) / "evaluation" / f"{name}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise UserError(f"cannot write the report to {path}: {error.strerror}; choose another with --json") from error
    return path


def _baseline(arguments: list[str]) -> int:
    parser = _Parser(
        "metarl baseline",
        usage="metarl baseline CONFIG [options] [--SETTING VALUE ...]",
        description="Train stable-baselines3's PPO or SAC from scratch on each of some tasks of a config, on the CPU: "
        "what a single-task agent reaches. Every setting of the config is a flag as well (metarl train CONFIG --help): "
        "--seed is that of the networks and episodes, --stages.0.tasks... say which tasks.",
        epilog="Finished tasks are kept: the same command goes on where it was stopped, or shows its result at once.",
        allow_abbrev=False,
    )
    parser.add_argument("--algorithm", choices=("ppo", "sac"), default="ppo", help="what is trained (ppo)")
    parser.add_argument(
        "--env-steps", type=_positive, default=100_000, metavar="N", help="of training on each task (100000)"
    )
    parser.add_argument("--num-tasks", type=_positive, default=5, metavar="N", help="tasks, balanced over classes (5)")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="which tasks (test)")
    parser.add_argument(
        "--eval-episodes", type=_positive, default=10, metavar="N", help="episodes of an evaluation (10)"
    )
    parser.add_argument("--stage", type=_not_negative, metavar="I", help="stage of the config, from 0 (the last)")
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/baselines"), metavar="DIR", help="finished tasks (runs/baselines)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the report as well")
    named = bool(arguments) and not arguments[0].startswith("-")
    options, flags = parser.parse_known_args(arguments[1:] if named else arguments)
    if not named:
        raise UserError("name a config: a YAML file or one of `metarl list configs`, e.g. metarl baseline quickstart")
    return _run_baseline(arguments[0], flags, options)


def _run_baseline(config_name: str, flags: list[str], options: argparse.Namespace) -> int:
    from metarl.config import load_config

    config = load_config(config_name, flags)
    if options.stage is not None and options.stage >= len(config.stages):
        raise UserError(f"--stage is {options.stage}; {config_name} has {len(config.stages)} stage(s), counted from 0")
    stage = config.stages[-1 if options.stage is None else options.stage]

    import numpy as np
    from rich.console import Console

    from metarl.baseline import reference
    from metarl.display import baseline_progress, baseline_table
    from metarl.envs import FAMILIES
    from metarl.evaluation import select_tasks
    from metarl.seeding import Purpose, seeds

    if stage.tasks.family not in FAMILIES:
        raise UserError("the tasks are custom ones: call metarl.baseline.reference(tasks, make=...) from Python")
    distribution = FAMILIES[stage.tasks.family].tasks(stage.tasks)
    tasks = distribution.test_tasks if options.split == "test" else distribution.train_tasks
    # The same draw as that of `metarl evaluate --num-tasks`, so that scores of the same tasks stand side by side.
    tasks = select_tasks(tasks, options.num_tasks, np.random.default_rng(seeds(0, Purpose.EVALUATION_TASKS)))
    try:
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.touch()
    except OSError as error:
        raise UserError(f"cannot write the report to {options.json}: {error.strerror}; choose another file") from error
    console = Console()
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
        print(f"metarl: stopped; finished tasks are kept in {options.cache}: the same command goes on", file=sys.stderr)
        return 130
    console.print(baseline_table(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        console.print(f"report: {options.json}", highlight=False, soft_wrap=True)
    return 0


def _positive(text: str) -> int:
    return _at_least(1, text)


def _not_negative(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not text.lstrip("-").isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least {least}")
    return int(text)


def _inspect(arguments: list[str]) -> int:
    parser = _Parser("metarl inspect", description="Show what a run directory holds.")
    parser.add_argument("run_dir")
    options = parser.parse_args(arguments)

    from metarl.policy import load
    from metarl.tracking import read_metrics

    run_dir = Path(options.run_dir)
    policy = load(run_dir)
    config, lines = policy.config, read_metrics(run_dir)
    steps, episodes = policy.agent.adaptation_steps, policy.agent.trial_episodes
    adapts = f"K = {steps}" if steps else f"trials of {episodes} episodes"
    print(f"agent        {config.agent.name}, {adapts}, {policy.num_parameters:,} parameters")
    print(f"observations {policy.spaces.observation_size}, actions {policy.spaces.action_size}")
    for stage in config.stages:
        tasks = ", ".join(f"{key} {value}" for key, value in stage.tasks.model_dump(exclude_none=True).items() if value)
        print(f"stage        {stage.name}: {stage.iterations} iterations of {tasks}")
    print(f"trained      {lines[-1]['iteration'] if lines else 0} iterations, {policy.env_steps:,} env steps")
    for prefix in ("meta_train", "meta_test"):
        last = next((line for line in reversed(lines) if f"{prefix}/return_post" in line), None)
        if last:
            figures = ", ".join(f"{key} {value:.2f}" for key, value in last.items() if key.startswith(f"{prefix}/"))
            print(f"{prefix:<12} iteration {last['iteration']}: {figures.replace(f'{prefix}/', '')}")
    for path in sorted((run_dir / "evaluation").glob("*.json")):
        print(f"report       {path}")
    return 0


def _list(arguments: list[str]) -> int:
    parser = _Parser("metarl list", description="List what there is.")
    parser.add_argument("what", choices=("envs", "agents", "configs"))
    options = parser.parse_args(arguments)
    if options.what == "configs":
        from metarl.config import embedded_configs

        for name, path in embedded_configs().items():
            first = path.read_text(encoding="utf-8").partition("\n")[0]
            print(f"{name:<30}{first.removeprefix('# ')}")
    elif options.what == "agents":
        from metarl.agents import agent_configs

        for name, agent in agent_configs().items():
            print(f"{name:<30}{agent.__doc__}")
    else:
        from metarl.evaluation import family_names

        for name, family in family_names().items():
            print(f"{name:<30}{family}")
    return 0


def _doctor(arguments: list[str]) -> int:
    _Parser("metarl doctor", description="Check versions, devices and simulators on this machine.").parse_args(
        arguments
    )

    from metarl.doctor import findings

    healthy = True
    for name, found, fine in findings():
        print(f"{'ok ' if fine else 'BAD'} {name:<20}{found}")
        healthy &= fine
    return 0 if healthy else 1
