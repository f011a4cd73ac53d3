"""How verbs read their arguments."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NoReturn

from metarl.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse with mistakes told in one line."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{message}; see {self.prog} --help")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Let a verb be told which checkpoint of a run it takes."""
    told = "latest, best (by the evaluations during training) or the number of an iteration (latest)"
    parser.add_argument("--checkpoint", metavar="WHICH", type=_which_checkpoint, default="latest", help=told)


def _which_checkpoint(text: str) -> str | int:
    if text in ("latest", "best") or text.isdigit():
        return text if text in ("latest", "best") else int(text)
    raise argparse.ArgumentTypeError(f"got {text!r}, expected latest, best or the number of an iteration")


def any_path(text: str) -> Path:
    """Read the name of a file or folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a name")
    try:
        Path(text).exists()
    except OSError as error:  # a name that is too long, or a folder that one may not look into
        raise argparse.ArgumentTypeError(f"cannot use {text[:80]!r}: {error.strerror}") from error
    return Path(text)


def run_folder(text: str) -> Path:
    """Read the name of a run directory; whether it holds a run is found out later."""
    any_path(str(any_path(text) / "config.yaml"))
    return Path(text)


def new_file(text: str) -> Path:
    """Read the name of a file that is written."""
    found = any_path(text)
    if found.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file")
    if found.exists() and not found.is_file():  # /dev/null: a file that is put in its place would be there for all
        raise argparse.ArgumentTypeError(f"{text} is no plain file; name one")
    return found


def task_name(text: str) -> str:
    """Read the name of a task, `reach-v3` or `reach-v3:7`."""
    name, colon, number = text.partition(":")
    if colon and not (number.isascii() and number.isdigit() and len(number) < 10):
        raise argparse.ArgumentTypeError(
            f"got {text[:80]!r}, expected a number behind the colon, e.g. {name[:40] or 'reach-v3'}:3"
        )
    return text


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    return _at_least(1, text)


def not_negative(text: str) -> int:
    """Read a whole number of at least 0."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,18}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"got {text[:80]!r}, expected a whole number of at least {least}")
    return int(text)


def one_line(text: str) -> str:
    """Return a message for a terminal: what would break the line or steer the terminal is written as its escape."""
    shown = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
    return shown if len(shown) <= 2000 else f"{shown[:1999]}…"
