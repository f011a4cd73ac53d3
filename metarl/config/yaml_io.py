"""Reads and writes settings as YAML; untrusted files are safe to read.

PyYAML's safe loader runs no code, but of a setting that is given twice it silently takes the last, and aliases
can expand to more values than fit into memory. Here both are errors, and size is bounded. Imports only metarl's errors.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from metarl.errors import UserError

MOST_BYTES = 1 << 20
"""Largest file that is read; a hundred stages take 40 kB."""

_MOST_VALUES = 100_000  # with all aliases expanded
_MOST_BITS = 64  # of an integer; Python refuses to print one of some thousand digits
_YAML_1_1_NUMBER = re.compile(r"[-+]?0[0-7_]+|[^:]+:.+")  # octal, and base 60
_MERGE = "tag:yaml.org,2002:merge"  # <<


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        UserError: the file cannot be read, is too large or not valid YAML; the message names its line and column.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > MOST_BYTES:
        raise UserError(
            f"{path} has more than {MOST_BYTES:,} bytes; a config takes a few thousand; is this another file?"
        )
    try:
        return parse_yaml(data.decode("utf-8-sig"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML: {_cause(error)}") from error


def _cause(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start + 1} is not UTF-8; save the file as UTF-8"
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    if "constructor for the tag" in problem:
        return (
            f"{problem.rpartition(' ')[2]} asks for an object; settings can only be text, numbers, lists and mappings"
        )
    return f"{problem}: indent by spaces" if r"'\t'" in problem else str(problem)


def parse_yaml(text: str) -> Any:
    """Return the value of one YAML document.

    Raises:
        yaml.YAMLError: invalid YAML, a setting that is given twice, or aliases that expand to too many values.
        ValueError: characters that YAML cannot hold.
        RecursionError: nested too deeply.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count_values(loader, node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def write_yaml(value: Any) -> str:
    """Return mappings, lists and plain values as YAML; `parse_yaml` reads back an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """PyYAML's dumper, with quotes around Unicode line breaks, which would otherwise come back as other text."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    quoted = any(letter in text for letter in "\x85\u2028\u2029")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


_Dumper.add_representer(str, _represent_text)


def _count_values(loader: yaml.SafeLoader, node: yaml.Node, known: dict[int, int | None]) -> int:
    """Return the number of values in a node with all aliases expanded; raises `_RefusedError`."""
    count = known.get(id(node), 0)
    if count is None:
        raise _RefusedError("a value refers to itself", node)
    if count:
        return count
    known[id(node)] = None
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    else:
        children = []
        _check_scalar(loader, node)
    count = 1
    for child in children:
        count += _count_values(loader, child, known)
        if count > _MOST_VALUES:
            raise _RefusedError(f"with its aliases expanded it has more than {_MOST_VALUES:,} values", node)
    known[id(node)] = count
    return count


def _check_keys(node: yaml.MappingNode) -> None:
    """Raise `_RefusedError` for a key that occurs twice."""
    seen: dict[Hashable, yaml.Node] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
            continue
        if (first := seen.setdefault(key.value, key)) is not key:
            raise _RefusedError(
                f"{key.value[:40]!r} is set twice, first in line {first.start_mark.line + 1}; remove one", key
            )


def _check_scalar(loader: yaml.SafeLoader, node: yaml.Node) -> None:
    """Raise `_RefusedError` for a scalar that cannot be read, or that YAML 1.1 reads as an unexpected number."""
    if any("\ud800" <= letter <= "\udfff" for letter in node.value):
        raise _RefusedError("an unpaired surrogate, which is not a character", node)
    if node.tag.rpartition(":")[2] not in ("binary", "bool", "float", "int", "timestamp"):
        return
    try:
        value = loader.construct_object(node)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # PyYAML raises any of these
        raise _RefusedError(f"{node.value[:40]!r} is not a valid {node.tag.rpartition(':')[2]}", node) from error
    if isinstance(value, int) and _YAML_1_1_NUMBER.fullmatch(node.value):
        raise _RefusedError(f"{node.value} means {value} in YAML 1.1; write it without leading zeros or colons", node)
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise _RefusedError(f"an integer of {value.bit_length()} bits; expected at most {_MOST_BITS}", node)


class _RefusedError(yaml.MarkedYAMLError):
    """Valid YAML that is not accepted for settings."""

    def __init__(self, problem: str, node: yaml.Node) -> None:
        super().__init__(problem=problem, problem_mark=node.start_mark)
