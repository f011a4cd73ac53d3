"""Readable config errors: location, value, expectation, in terms of the file or flags that the user wrote.

Rewrites pydantic's errors; knows no setting by name. Used by `metarl.config.schema`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from pydantic import BaseModel, ValidationError

from metarl.config.models import models_in, union_members
from metarl.config.overrides import flag_of

Keys: TypeAlias = tuple[str | int, ...]
"""The path of a setting."""

Flags: TypeAlias = Mapping[tuple[str, ...], Any]
"""Values set by flags, by the path of the setting."""

_SETTINGS = "expected nested settings, `key: value`"
_MESSAGES = {
    "dict_type": _SETTINGS,
    "float_parsing": "expected a valid number",
    "int_parsing": "expected a valid integer",
    "model_attributes_type": _SETTINGS,
    "model_type": _SETTINGS,
    "string_too_short": "expected at least {min_length} character(s)",
    "too_short": "expected at least {min_length} item(s)",
    "tuple_type": "expected a list",
}
"""Our messages for pydantic's types of errors; the others keep pydantic's."""


class ErrorMessages:
    """One-line messages for the validation errors of one config model.

    Args:
        root: the model.
    """

    def __init__(self, root: type[BaseModel]) -> None:
        self._root = root

    def explain(self, error: ValidationError, source: str = "", flags: Flags | None = None) -> str:
        """Return one line that names every error.

        Args:
            error: raised by validation.
            source: the file that holds the settings.
            flags: laid over the file.
        """
        lines, items, flags = [], error.errors(include_url=False), flags or {}
        for item in items:
            keys, _ = self._follow(item["loc"])
            flags_below = [flag for flag in flags if flag[: len(keys)] == tuple(map(str, keys))]
            if flags_below and len(flags_below[0]) > len(keys) and item["type"].endswith("_type"):
                setting = ".".join(map(str, keys))
                lines.append(f"{flag_of(flags_below[0])}: {setting} is a single value; it has no nested settings")
                continue
            if item["type"] == "too_short" and len(items) > 1:
                continue  # pydantic also counts an invalid item as missing
            where, by_flag = _where(keys, item["msg"], source, flags), _is_set_by(flags, keys)
            if item["type"] == "extra_forbidden" and flags_below:  # a flag below a setting that does not exist
                where, by_flag = flag_of(flags_below[0]), True
            lines.append(f"{where}: {self._problem(item, keys, by_flag=by_flag)}")
        return " ".join("; ".join(lines).split())

    def _problem(self, item: Any, keys: Keys, *, by_flag: bool) -> str:
        kind, value = item["type"], item["input"]
        if kind == "extra_forbidden":
            _, models = self._follow(item["loc"][:-1])
            names = [name for model in models for name in model.model_fields]
            near = difflib.get_close_matches(str(keys[-1]), names, n=1, cutoff=0.4)
            name = (lambda key: flag_of((*keys[:-1], key))) if by_flag else repr
            return "unknown setting" + (f"; did you mean {name(near[0])}?" if near else "")
        if kind == "union_tag_not_found":
            return f"no {_discriminator(item)}; expected one of {', '.join(sorted(self._tags_at(item['loc'])))}"
        if kind == "union_tag_invalid":
            tags = [name.strip("'") for name in item["ctx"]["expected_tags"].split(", ")]
            tag = value[_discriminator(item)] if isinstance(value, Mapping) else item["ctx"]["tag"]
            near = difflib.get_close_matches(str(tag), tags, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            return f"got {quote_value(tag)}, expected one of {', '.join(tags)}{hint}"
        if kind == "invalid_key":
            return f"got {quote_value(value)} for the name of a setting, expected text"
        if kind in _MESSAGES:
            message = _MESSAGES[kind].format(**item.get("ctx", {}))
        else:
            message = item["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        got = "" if isinstance(value, dict | list | BaseModel) else f"got {quote_value(value)}, "
        return f"{got}{message[0].lower()}{message[1:]}"

    def _follow(self, location: Keys) -> tuple[Keys, list[type[BaseModel]]]:
        """Follow an error's location; returns the setting's path, without tags of unions, and the models there."""
        keys: list[str | int] = []
        models = [self._root]
        members: dict[str, type[BaseModel]] = {}
        for key in location:
            if key in members:  # pydantic puts the tag of a union's member into the location
                models, members = [members[str(key)]], {}
                continue
            keys.append(key)
            if isinstance(key, int):
                continue
            fields = [model.model_fields[key] for model in models if key in model.model_fields]
            models = [model for field in fields for model in models_in(field.annotation)]
            members = {tag: model for field in fields for tag, model in union_members(field).items()}
        return tuple(keys), models

    def _tags_at(self, location: Keys) -> set[str]:
        """Return the tags of the union at a location."""
        *parents, name = (key for key in location if isinstance(key, str))
        _, models = self._follow(tuple(parents))
        return {
            tag for model in models if name in model.model_fields for tag in union_members(model.model_fields[name])
        }


def quote_value(value: object) -> str:
    """Return a value as messages quote it, cut to 80 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer that is too long to print, a list that holds itself
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:79]}…"


def _is_set_by(flags: Flags, keys: Keys) -> bool:
    """Return whether a flag set this setting, or one that it is part of."""
    path = tuple(map(str, keys))
    return any(path[: len(flag)] == flag for flag in flags)


def _where(keys: Keys, message: str, source: str, flags: Flags) -> str:
    """Return the location of an error: the flag, or the file and the path in it.

    Args:
        keys: the path of the setting.
        message: of the error; it may name a setting below `keys`, and a flag that set that one is the location.
        source: the file.
        flags: laid over the file.
    """
    if _is_set_by(flags, keys):
        return flag_of(keys)
    path = tuple(map(str, keys))
    words = set(re.findall(r"[\w.-]+", message))
    below = [
        flag
        for flag, value in flags.items()
        if flag[: len(path)] == path and (flag[-1] in words or (isinstance(value, str) and value in words))
    ]
    if below:
        return ", ".join(map(flag_of, below))
    return ": ".join(filter(None, (source, ".".join(name or "''" for name in path))))


def _discriminator(item: Any) -> str:
    """Return the setting that tells the members of a union apart."""
    return str(item["ctx"]["discriminator"]).strip("'")
