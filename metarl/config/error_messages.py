"""How mistakes in settings are told: where, what was found, what was expected; in the words of who wrote them.

Works on what pydantic found; knows no setting by name. `metarl.config.schema` calls it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from metarl.config.overrides import flag_of

Keys: TypeAlias = tuple[str | int, ...]
"""The path of a setting."""

Flags: TypeAlias = Mapping[tuple[str, ...], Any]
"""What flags set, by its path."""

_SETTINGS = "expected settings of its own, `key: value`"
_PLAINER = {
    "dict_type": _SETTINGS,
    "float_parsing": "expected a valid number",
    "int_parsing": "expected a valid integer",
    "model_attributes_type": _SETTINGS,
    "model_type": _SETTINGS,
    "string_too_short": "expected at least {min_length} character(s)",
    "too_short": "expected at least {min_length} item(s)",
    "tuple_type": "expected a list",
}
"""What is said of an error instead of pydantic's words, by its type."""


class Wording:
    """Words for the mistakes in the settings of one model.

    Args:
        root: the model.
        tags: what pydantic puts into the path of an error below a union, the tag of its member, by the name of the
            setting that the union is of.
    """

    def __init__(self, root: type[BaseModel], tags: Mapping[str, Collection[str]]) -> None:
        self._root, self._tags = root, tags

    def explain(self, error: ValidationError, source: str = "", flags: Flags | None = None) -> str:
        """Return all that is wrong in one line.

        Args:
            error: of the validation.
            source: the file that the settings are from.
            flags: that were laid over it.
        """
        lines, items, flags = [], error.errors(include_url=False), flags or {}
        for item in items:
            keys = self._path(item["loc"])
            given = [flag for flag in flags if flag[: len(keys)] == tuple(map(str, keys))]
            if given and len(given[0]) > len(keys) and item["type"].endswith("_type"):
                lines.append(f"{flag_of(given[0])}: {'.'.join(map(str, keys))} is a single value and has no settings")
                continue
            if item["type"] == "too_short" and len(items) > 1:
                continue  # pydantic counts an invalid item as missing, too
            where, by_flag = _where(keys, item["msg"], source, flags), _is_flags(keys, flags)
            if item["type"] == "extra_forbidden" and given:  # the flag of something below what is not there
                where, by_flag = flag_of(given[0]), True
            lines.append(f"{where}: {self._problem(item, keys, by_flag=by_flag)}")
        return " ".join("; ".join(lines).split())

    def _problem(self, item: Any, keys: Keys, *, by_flag: bool) -> str:
        kind, value = item["type"], item["input"]
        if kind == "extra_forbidden":
            near = difflib.get_close_matches(str(keys[-1]), self._fields_at(item["loc"][:-1]), n=1, cutoff=0.4)
            name = (lambda key: flag_of((*keys[:-1], key))) if by_flag else repr
            return "unknown setting" + (f"; did you mean {name(near[0])}?" if near else "")
        if kind == "union_tag_not_found":
            names = self._tags.get(_above((*item["loc"], ""))[-1], ())
            return f"no {_discriminator(item)}; expected one of {', '.join(sorted(names))}"
        if kind == "union_tag_invalid":
            tags = [name.strip("'") for name in item["ctx"]["expected_tags"].split(", ")]
            tag = value[_discriminator(item)] if isinstance(value, Mapping) else item["ctx"]["tag"]
            near = difflib.get_close_matches(str(tag), tags, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            return f"got {shown(tag)}, expected one of {', '.join(tags)}{hint}"
        if kind == "invalid_key":
            return f"got {shown(value)} for the name of a setting, expected text"
        if kind in _PLAINER:
            message = _PLAINER[kind].format(**item.get("ctx", {}))
        else:
            message = item["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        found = "" if isinstance(value, dict | list | BaseModel) else f"got {shown(value)}, "
        return f"{found}{message[0].lower()}{message[1:]}"

    def _path(self, location: Keys) -> Keys:
        """Drop the tags of unions."""
        pairs = zip(location, _above(location), strict=True)
        return tuple(key for key, above in pairs if key not in self._tags.get(above, ()))

    def _fields_at(self, location: Keys) -> list[str]:
        """Names of the settings below a location; for a union those of the member whose tag the location holds."""
        models = [self._root]
        for key, above in zip(location, _above(location), strict=True):
            if isinstance(key, int):
                continue
            if key in self._tags.get(above, ()):
                models = [each for each in models if any(_has_tag(field, key) for field in each.model_fields.values())]
                continue
            found = [model.model_fields[key].annotation for model in models if key in model.model_fields]
            models = [model for annotation in found for model in _models_in(annotation)]
        return [name for model in models for name in model.model_fields]


def shown(value: object) -> str:
    """Return a value as a message quotes it: not at length."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number that Python refuses to print; what holds itself
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:79]}…"


def _is_flags(keys: Keys, flags: Flags) -> bool:
    """Whether a setting is what a flag gave, or part of it."""
    named = tuple(map(str, keys))
    return any(named[: len(flag)] == flag for flag in flags)


def _where(keys: Keys, told: str, source: str, flags: Flags) -> str:
    """Return where a mistake was made: the flag, or the file and the path in it.

    Args:
        keys: of the setting.
        told: what is wrong with it; flags that set something below it, of which this speaks, are the place.
        source: the file.
        flags: that were laid over it.
    """
    if _is_flags(keys, flags):
        return flag_of(keys)
    named = tuple(map(str, keys))
    words = set(re.findall(r"[\w.-]+", told))
    below = [
        flag
        for flag, value in flags.items()
        if flag[: len(named)] == named and (flag[-1] in words or (isinstance(value, str) and value in words))
    ]
    if below:
        return ", ".join(map(flag_of, below))
    return ": ".join(filter(None, (source, ".".join(name or "''" for name in named))))


def _discriminator(item: Any) -> str:
    """The setting that tells the members of a union apart."""
    return str(item["ctx"]["discriminator"]).strip("'")


def _above(location: Sequence[str | int]) -> list[str]:
    """Return the name of the setting that each key of a location lies below, past the indices of lists."""
    above, names = "", []
    for key in location:
        names.append(above)
        above = key if isinstance(key, str) else above
    return names


def _has_tag(field: FieldInfo, tag: str) -> bool:
    return get_origin(field.annotation) is Literal and tag in get_args(field.annotation)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
