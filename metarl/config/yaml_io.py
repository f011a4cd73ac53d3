"""Settings as YAML. Reads what anyone may have written: no objects, nothing twice, bounded in size and in time.

PyYAML's safe loader runs nothing, but lets the last of two equal settings win without a word, and aliases stand for
more values than a machine has memory for. Imports errors alone of metarl.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from metarl.errors import UserError

MOST_BYTES = 1 << 20
"""Of a file: a sequence of a hundred stages takes 40 kB."""

_MOST_VALUES = 100_000  # with all aliases written out
_MOST_BITS = 64  # of a whole number; beyond some thousand, Python refuses to print it
_OLD_NUMBER = re.compile(r"[-+]?0[0-7_]+|[^:]+:.+")  # YAML 1.1: octal, and to the base of 60
_MERGE = "tag:yaml.org,2002:merge"  # <<


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds.

    Raises:
        UserError: it cannot be read, is too large, or is not valid YAML; the line names the file, line and column.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > MOST_BYTES:
        raise UserError(f"{path} has more than {MOST_BYTES:,} bytes; settings take a few thousand: is it another file?")
    try:
        return parse_yaml(data.decode("utf-8-sig"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML: {_cause(error)}") from error


def _cause(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start + 1} is not UTF-8; save the file as UTF-8 text"
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    if "constructor for the tag" in problem:
        return f"{problem.rpartition(' ')[2]} asks for an object; settings are text, numbers, lists and mappings alone"
    return f"{problem}: indent by spaces" if r"'\t'" in problem else str(problem)


def parse_yaml(text: str) -> Any:
    """Return the value of one YAML document.

    Raises:
        yaml.YAMLError: it is none, names a setting twice, or its aliases stand for too much.
        ValueError: it holds characters that YAML cannot.
        RecursionError: it is nested too deeply.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _written_out(loader, node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def write_yaml(value: Any) -> str:
    """Return a tree of mappings, lists and plain values as YAML that `parse_yaml` reads back to an equal one."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """PyYAML's, but for text with line breaks of Unicode, which comes back as another text unless it is quoted."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    quoted = any(each in text for each in "\x85\u2028\u2029")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


_Dumper.add_representer(str, _represent_text)


def _written_out(loader: yaml.SafeLoader, node: yaml.Node, known: dict[int, int | None]) -> int:
    """Return how many values a node stands for with all aliases written out; refuses what cannot be meant."""
    count = known.get(id(node), 0)
    if count is None:
        raise _Refused("a value refers to itself", node)
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
        count += _written_out(loader, child, known)
        if count > _MOST_VALUES:
            raise _Refused(f"with its aliases written out it has more than {_MOST_VALUES:,} values", node)
    known[id(node)] = count
    return count


def _check_keys(node: yaml.MappingNode) -> None:
    seen: dict[Hashable, yaml.Node] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
            continue
        if (first := seen.setdefault(key.value, key)) is not key:
            raise _Refused(
                f"{key.value[:40]!r} is set twice, first in line {first.start_mark.line + 1}; remove one", key
            )


def _check_scalar(loader: yaml.SafeLoader, node: yaml.Node) -> None:
    if any("\ud800" <= each <= "\udfff" for each in node.value):
        raise _Refused("half a character (a surrogate), which no file can hold", node)
    if node.tag.rpartition(":")[2] not in ("binary", "bool", "float", "int", "timestamp"):
        return
    try:
        value = loader.construct_object(node)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # all that PyYAML runs into
        raise _Refused(f"{node.value[:40]!r} is no {node.tag.rpartition(':')[2]}", node) from error
    if isinstance(value, int) and _OLD_NUMBER.fullmatch(node.value):
        raise _Refused(f"{node.value} would be read as {value}; write it without leading zeros or colons", node)
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise _Refused(f"a whole number of {value.bit_length()} bits; expected at most {_MOST_BITS}", node)


class _Refused(yaml.MarkedYAMLError):
    """Valid YAML that no settings are written in."""

    def __init__(self, problem: str, node: yaml.Node) -> None:
        super().__init__(problem=problem, problem_mark=node.start_mark)
