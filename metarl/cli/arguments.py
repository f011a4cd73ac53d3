"""Parses the arguments of the verbs."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NoReturn

from metarl.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises UserError with one line."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{message}; see {self.prog} --help")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the option `--checkpoint`."""
    text = "latest, best (by the evaluations during training) or the number of an iteration (default: latest)"
    parser.add_argument("--checkpoint", metavar="WHICH", type=_which_checkpoint, default="latest", help=text)


def add_task_selection(parser: argparse.ArgumentParser, flag: str, text: str, split: str | None = "test") -> None:
    """Add the options that select tasks of a run: by name, `--stage` and `--split`.

    Args:
        parser: the parser of a verb.
        flag: the option that takes the name of a task or benchmark.
        text: the help of `flag`.
        split: the default of `--split`; None for a verb that checks whether it was given.
    """
    parser.add_argument(flag, metavar="TASK", type=task_name, help=text)
    parser.add_argument("--stage", metavar="NAME", help="stage of the run to take tasks from (default: the last)")
    parser.add_argument(
        "--split", choices=("test", "train"), default=split, help="split to take tasks from (default: test)"
    )


def _which_checkpoint(text: str) -> str | int:
    if text in ("latest", "best") or text.isdigit():
        return text if text in ("latest", "best") else int(text)
    raise argparse.ArgumentTypeError(f"got {text!r}, expected latest, best or the number of an iteration")


def any_path(text: str) -> Path:
    """Parse the path of a file or folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a name")
    try:
        Path(text).exists()
    except OSError as error:  # a name that is too long, a folder without permission
        raise argparse.ArgumentTypeError(f"cannot use {text[:80]!r}: {error.strerror}") from error
    return Path(text)


def run_folder(text: str) -> Path:
    """Parse the path of a run directory; does not check that it holds a run."""
    any_path(str(any_path(text) / "config.yaml"))
    return Path(text)


def new_file(text: str) -> Path:
    """Parse the path of an output file."""
    path = any_path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file")
    if path.exists() and not path.is_file():  # e.g. /dev/null, which an atomic write would replace for everyone
        raise argparse.ArgumentTypeError(f"{text} is not a plain file; name one")
    return path


def task_name(text: str) -> str:
    """Parse the name of a task, `reach-v3` or `reach-v3:7`."""
    name, colon, number = text.partition(":")
    if colon and not (number.isascii() and number.isdigit() and len(number) < 10):
        raise argparse.ArgumentTypeError(
            f"got {text[:80]!r}, expected a number after the colon, e.g. {name[:40] or 'reach-v3'}:3"
        )
    return text


def positive(text: str) -> int:
    """Parse an integer ≥ 1."""
    return _at_least(1, text)


def not_negative(text: str) -> int:
    """Parse an integer ≥ 0."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,18}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"got {text[:80]!r}, expected an integer ≥ {least}")
    return int(text)


def one_line(text: str) -> str:
    """Return a message for a terminal, cut to 2,000 characters; line breaks and control characters are escaped."""
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return line if len(line) <= 2000 else f"{line[:1999]}…"
