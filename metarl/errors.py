"""Exceptions whose one-line message says what is wrong, where, and what to do. Imports nothing of metarl."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can fix; the command line prints its message and exits with status 2."""


class RunError(Exception):
    """A run that cannot continue; the command line prints its message and exits with status 1."""


class PhysicsDivergedError(FloatingPointError):
    """A simulation that left the finite numbers; its episode is dropped."""


def unknown_name(what: str, name: str, choices: Iterable[str], where_to_look: str) -> ValueError:
    """Return the error for an unknown name; it suggests the closest known one.

    Args:
        what: kind of name, e.g. `Meta-World task`.
        name: the unknown name.
        choices: the known names.
        where_to_look: a command or page that lists them, e.g. `metarl list envs`.
    """
    near = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.3)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ValueError(f"unknown {what} {name!r}: {hint}`{where_to_look}` shows all")
