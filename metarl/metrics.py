"""What a run has tracked, checked line by line: it may be another's, or damaged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from metarl.errors import UserError
from metarl.files import open_plain


def read_metrics(run_dir: Path, num_stages: int | None = None) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl; none if there is no such file.

    A last line that was cut off in writing is passed over.

    Args:
        run_dir: of the run.
        num_stages: how many stages it has; not checked if None.

    Raises:
        UserError: the file cannot be read, or a line holds something else than scalars at a position of the run.
    """
    path = run_dir / "metrics.jsonl"
    try:
        with open_plain(path) as file:
            texts = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    found = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            if number == len(texts):  # behind the last line feed: nothing, or what was cut off
                break
            line = None
        if (problem := _problem(line, num_stages)) is not None:
            raise UserError(f"{path}:{number}: damaged, {problem}; remove the line, or move the file away")
        found.append(line)
    return found


def _problem(line: Any, num_stages: int | None) -> str | None:
    """Return why a line is none of metrics.jsonl; None if it is one."""
    if not isinstance(line, dict):
        return "it is no JSON object"
    for key in ("iteration", "stage", "env_steps"):
        value = line.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
            return f"{key} is not a whole number of at least 0"
    if num_stages is not None and line["stage"] >= num_stages:
        return f"stage is {line['stage']}, the run has {num_stages}"
    for key, value in line.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not _is_finite(value):
            return f"{key} is not a finite number"
    return None


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond what a float can hold
        return False
