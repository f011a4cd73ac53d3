"""The help of `metarl train`: every setting of a config as a flag, with its type, description and value."""

from __future__ import annotations

import inspect
import json
import textwrap
import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from metarl.config.models import discriminator, union_members
from metarl.config.overrides import flag_of

_TYPES = {int: "INT", float: "FLOAT", str: "TEXT", bool: "{true,false}", type(None): "None"}
_MAX_CHOICES_WIDTH = 36  # columns; longer choices are listed in the description


class _Section(NamedTuple):
    """A model in the tree of a config, its path, and the field that holds it; None for the root."""

    path: tuple[str, ...]
    model: BaseModel
    field: FieldInfo | None


class _Row(NamedTuple):
    """A setting of a section."""

    name: str
    metavar: str
    description: str
    default: str


def describe_settings(config: BaseModel, width: int) -> str:
    """Return help on every setting of a config: a section for each nested model, the member in use for each union.

    A model that occurs again, e.g. in another stage, is not described again; its values are.

    Args:
        config: its values are shown as the defaults.
        width: of a line, in columns.
    """
    lines: list[str] = []
    described: set[type[BaseModel]] = set()
    for section in _sections(_Section((), config, None)):
        kind = type(section.model)
        is_new = kind not in described
        described.add(kind)
        lines.append(f"{'.'.join(section.path) or 'run'}:")
        if is_new and section.path:
            lines += _fill_docstring(inspect.getdoc(kind) or "", width)
        for row in _rows(section):
            default = f"(default: {row.default})"
            if len(default) <= width // 2:
                default = default.replace(" ", "\0")  # textwrap breaks a line at white space
            text = f"{row.description} {default}" if is_new and row.description else default
            lines += _columns(f"  {flag_of((*section.path, row.name))} {row.metavar}", text, width)
        lines.append("")
    return "\n".join(lines)


def _sections(section: _Section) -> Iterator[_Section]:
    """Yield a section and all below it."""
    yield section
    for name, field in type(section.model).model_fields.items():
        value = getattr(section.model, name)
        if isinstance(value, BaseModel):
            yield from _sections(_Section((*section.path, name), value, field))
        for i, item in enumerate(value if isinstance(value, tuple) else ()):
            if isinstance(item, BaseModel):
                yield from _sections(_Section((*section.path, name, str(i)), item, field))


def _rows(section: _Section) -> Iterator[_Row]:
    """Yield the settings of a section, but for those that have a section of their own."""
    tag = discriminator(section.field) if section.field else None
    for name, field in type(section.model).model_fields.items():
        value, members = getattr(section.model, name), union_members(field)
        if members and isinstance(value, tuple):
            if any(setting.is_required() for model in members.values() for setting in model.model_fields.values()):
                description = f"{field.description}; one of {', '.join(members)}"
                yield _Row(name, "[{name: NAME, ...}, ...]", description, _format_members(value))
                continue
            # A flag sets a list of members by name.
            names = " ".join(getattr(item, discriminator(field) or "") for item in value)
            yield _Row(name, f"{_braces(members)} ...", field.description or "", names or "[]")
            continue
        if isinstance(value, BaseModel) or (isinstance(value, tuple) and any(isinstance(v, BaseModel) for v in value)):
            continue
        description, metavar = field.description or "", _metavar(field.annotation)
        choices: tuple[Any, ...] = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        if name == tag and section.field:
            choices = tuple(union_members(section.field))
            metavar = _braces(choices)
        if choices and len(metavar) > _MAX_CHOICES_WIDTH:
            metavar = "NAME"
            description = "; ".join(filter(None, (description, f"one of {', '.join(map(str, choices))}")))
        yield _Row(name, metavar, description, _format_value(value))


def _braces(choices: Iterable[Any]) -> str:
    return f"{{{','.join(map(str, choices))}}}"


def _metavar(annotation: Any) -> str:
    """Return a type as help writes it, e.g. `INT|None`, `FLOAT FLOAT`, `TEXT ...`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _metavar(arguments[0])
    if origin in (Union, types.UnionType):
        return "|".join(filter(None, map(_metavar, arguments)))
    if origin is tuple:
        return " ".join("..." if argument is Ellipsis else _metavar(argument) for argument in arguments)
    if origin is Literal:
        return _braces(arguments)
    return _TYPES.get(annotation, "VALUE")


def _format_value(value: Any) -> str:
    """Return a value as a flag takes it."""
    if isinstance(value, tuple):
        return " ".join(map(_format_value, value)) or "[]"
    return str(value).lower() if isinstance(value, bool) else str(value) or "''"


def _format_members(members: tuple[BaseModel, ...]) -> str:
    """Return a list of members with their settings as a flag takes it: YAML in quotes."""
    settings = [member.model_dump(mode="json") for member in members]
    return f"'{json.dumps(settings, ensure_ascii=False)}'" if settings else "[]"


def _columns(flag: str, text: str, width: int) -> list[str]:
    """Return a flag on the left and text on the right; the text starts on the next line if the flag is too long."""
    indent = " " * (width * 2 // 5)
    lines = textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    lines = [line.replace("\0", " ") for line in lines]
    if len(flag) + 2 <= len(indent):
        return [flag + lines[0][len(flag) :], *lines[1:]]
    return [flag, *lines]


def _fill_docstring(text: str, width: int) -> list[str]:
    """Return the lines of a docstring, its paragraphs and list items filled."""
    lines: list[str] = []
    for paragraph in text.replace("`", "").split("\n\n"):
        for item in paragraph.replace("\n- ", "\0- ").split("\0"):
            hanging = "    " if item.startswith("- ") else "  "
            lines += textwrap.wrap(" ".join(item.split()), width, initial_indent="  ", subsequent_indent=hanging)
        lines.append("")
    return lines
