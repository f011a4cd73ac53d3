"""How metarl words the user's mistakes: what, where, what to do. Imports nothing of metarl."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend; the command line prints its one line and exits with status 2."""


class RunError(Exception):
    """A run that cannot go on, and what to do; the command line prints its one line and exits with status 1."""


def unknown_name(what: str, name: str, choices: Iterable[str], where_to_look: str) -> ValueError:
    """Return the error for a name that does not exist, with the nearest one that does.

    Args:
        what: what kind of name it is, e.g. `Meta-World task`.
        name: the name given.
        choices: the names that exist.
        where_to_look: a command or page that lists them, e.g. `metarl list envs`.
    """
    near = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.3)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ValueError(f"unknown {what} {name!r}: {hint}`{where_to_look}` shows all")
