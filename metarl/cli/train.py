"""`metarl train`."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from metarl.cli.arguments import Parser, any_path
from metarl.errors import UserError
from metarl.runs.lock import default_run_dir

RUN_OPTIONS = """options of the run:
  --run-dir DIR           where results go (default: runs/<name of the config>)
  --resume                resume the run in the run directory
  --overwrite             delete the run in the run directory, start a new one
  --allow-config-change   resume with settings that differ from the run's
  --max-iterations N      stop after N iterations, counted from the run's start
  --max-minutes X         stop at the first iteration that ends after X minutes
  --debug                 show tracebacks

Every setting of the config is a flag, too. To see the settings of another agent,
memory or task family, name it: metarl train CONFIG --agent.name rl2 --help
"""


def train(arguments: list[str]) -> int:
    """Train an agent with a YAML config."""
    parser = Parser("metarl train", add_help=False, allow_abbrev=False)
    parser.add_argument("--run-dir", type=any_path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--allow-config-change", action="store_true")
    parser.add_argument("--max-iterations", type=int)
    parser.add_argument("--max-minutes", type=float)
    parser.add_argument("-h", "--help", action="store_true")
    config_name = arguments[0] if arguments and not arguments[0].startswith("-") else None
    options, flags = parser.parse_known_args(arguments[1:] if config_name else arguments)
    if options.help:
        return _print_help(config_name, flags)
    if config_name is None:
        raise UserError(
            "name a config before the flags: a YAML file or one of `metarl list configs`, e.g. metarl train quickstart"
        )
    if options.resume and options.overwrite:
        raise UserError("--resume and --overwrite are mutually exclusive: resume the run, or replace it")
    if options.allow_config_change and not options.resume:
        raise UserError("--allow-config-change requires --resume; a new run takes any settings")
    for name in ("max_iterations", "max_minutes"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} is {value}; expected more than 0")
    run_dir = options.run_dir or default_run_dir(config_name)

    from metarl.config.schema import load_config

    return _run_training(load_config(config_name, flags), run_dir, options)


def _run_training(config: Any, run_dir: Path, options: argparse.Namespace) -> int:
    from rich.console import Console

    from metarl.cli.display import TrainingDisplay
    from metarl.training import loop as training

    total = sum(stage.iterations for stage in config.stages)
    console = Console(markup=False)
    received: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        _say(
            f"metarl: {signal.Signals(number).name}: saving after this iteration; a second signal stops at once",
            sys.stderr,
        )

    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with TrainingDisplay(config, min(total, options.max_iterations or total), console) as display:
            run = training.train(
                config,
                run_dir=run_dir,
                resume=options.resume,
                overwrite=options.overwrite,
                allow_config_change=options.allow_config_change,
                max_iterations=options.max_iterations,
                max_minutes=options.max_minutes,
                should_stop=lambda: bool(received),
                progress=display,
            )
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    state = "finished" if run.finished else "stopped; continue with --resume"
    _say(f"{state}: {run.policy.env_steps:,} env steps, saved in {run_dir}", sys.stdout)
    return 128 + received[0] if received else 0


def _say(line: str, file: TextIO) -> None:
    """Print a line unless the pipe is closed: Ctrl-C ends both sides of `metarl train … | tee log`."""
    with contextlib.suppress(OSError):
        print(line, file=file, flush=True)


def _print_help(name: str | None, flags: Sequence[str]) -> int:
    """Print help on the options and on every setting, with its value in the named config after the flags."""
    from metarl.config.schema import load_config
    from metarl.config.settings_help import describe_settings

    config = load_config(name or "quickstart", flags)
    width = min(max(shutil.get_terminal_size().columns, 80), 120)
    print("usage: metarl train CONFIG [options of the run] [--SETTING VALUE ...]\n")
    print(RUN_OPTIONS)
    print(describe_settings(config, width))
    return 0
