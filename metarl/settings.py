"""The base of every config class: frozen, no unknown keys, no NaN, and no truth value where a number belongs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError


class Settings(BaseModel):
    """A frozen section of a config; unknown keys, NaN and infinity are errors.

    So are True and False for a number: pydantic takes them as 1 and 0, and YAML reads `on` and `yes` as True.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        wrong: list[InitErrorDetails] = []
        for name in _numbers(cls) & data.keys():
            items = data[name] if isinstance(data[name], list | tuple) else (data[name],)
            for item in (item for item in items if isinstance(item, bool)):
                wrong.append(
                    {"type": PydanticCustomError("number", "expected a number"), "loc": (name,), "input": item}
                )
        if wrong:
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        return data


@functools.cache
def _numbers(settings: type[BaseModel]) -> frozenset[str]:
    """Return the names of the fields that hold numbers, or lists of them."""
    types = {name: _types_in(field.annotation) for name, field in settings.model_fields.items()}
    return frozenset(name for name, found in types.items() if found & {int, float} and bool not in found)


def _types_in(annotation: Any) -> set[Any]:
    arguments = [argument for argument in get_args(annotation) if isinstance(argument, type) or get_args(argument)]
    return ({annotation} if isinstance(annotation, type) else set()).union(*map(_types_in, arguments))


def as_tuple(value: object) -> object:
    """Wrap a single value, e.g. of a flag, into a tuple; lists, tuples and None stay as they are."""
    return value if value is None or isinstance(value, list | tuple) else (value,)


def named_by_default(default: str, value: object) -> object:
    """Let settings without a `name` be those of the default member of a union."""
    return {"name": default, **value} if isinstance(value, Mapping) and "name" not in value else value
