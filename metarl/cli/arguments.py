"""How verbs read their arguments."""

from __future__ import annotations

import argparse
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


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    return _at_least(1, text)


def not_negative(text: str) -> int:
    """Read a whole number of at least 0."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not text.lstrip("-").isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least {least}")
    return int(text)
