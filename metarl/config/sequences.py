"""Sequences of stages as users write them: `for_each` written out, a name for each, mistakes told where they were made.

Works on settings before they are validated; `metarl.config.schema` calls it.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from metarl.envs import FAMILIES
from metarl.settings import as_tuple

DEFAULT_NAME = "meta-training"
"""The name of a stage, if it is the only one and the user gives none."""

_CW10 = (
    "hammer push-wall faucet-close push-back stick-pull handle-press-side push shelf-place window-close peg-unplug-side"
)
CW10 = tuple(f"{name}-v3" for name in _CW10.split())
"""The sequence of Continual World (Wołczyk et al. 2021, 2105.10919), with the names of Meta-World 3."""

SEQUENCES = {"CW10": CW10, "CW20": CW10 * 2}
"""What `for_each` has a short name for."""


class Stage(NamedTuple):
    """A stage before validation: its settings, its place among those given, and what `for_each` sets in it."""

    settings: Any
    position: int
    chosen: tuple[str, int] | None = None  # the field, and which of its values


def expand_for_each(position: int, stage: Any) -> list[Stage]:
    """The stages that one of a config stands for: one for each value of `for_each`, if it has that."""
    if not isinstance(stage, Mapping) or stage.get("for_each") is None:
        return [Stage(stage, position)]
    template = {key: value for key, value in stage.items() if key != "for_each"}
    tasks = template.get("tasks", {"family": "navigation"})
    if isinstance(tasks, BaseModel):
        tasks = {"family": getattr(tasks, "family", None), **tasks.model_dump(exclude_unset=True)}
    if not isinstance(tasks, Mapping):
        return [Stage(template, position)]  # validation tells
    try:
        field, values = _field_and_values(stage["for_each"], tasks)
    except ValueError as error:
        problem = PydanticCustomError("for_each", "{problem}", {"problem": str(error)})
        where = ("stages", position, "for_each")
        details = InitErrorDetails(type=problem, loc=where, input=stage["for_each"])
        raise ValidationError.from_exception_data("RunConfig", [details]) from None
    stages = []
    for number, value in enumerate(values):
        settings = {**template, "tasks": {**tasks, field: value}}
        if number:  # another run's agent begins the sequence; it does not replace what a stage has learned
            settings.pop("init_from", None)
        prefix = template.get("name", DEFAULT_NAME)
        if isinstance(prefix, str):
            label = _label(field, value)
            settings["name"] = label if prefix == DEFAULT_NAME else f"{prefix} {label}"
        stages.append(Stage(settings, position, (field, number)))
    return stages


def _field_and_values(for_each: Any, tasks: Mapping[str, Any]) -> tuple[str, Sequence[Any]]:
    """Read `for_each`; raises ValueError."""
    family = str(tasks.get("family"))
    if isinstance(for_each, str) and for_each in SEQUENCES:
        if family != "metaworld":
            raise ValueError(f"expected tasks of family metaworld, found {family}")
        for_each = {"name": SEQUENCES[for_each]}
    if not isinstance(for_each, Mapping):
        raise ValueError(
            f"expected {', '.join(SEQUENCES)} or one field of tasks with a list of values, e.g. "
            "{name: [reach-v3, push-v3]}"
        )
    if len(for_each) != 1:
        name_stages = f" ({', '.join(map(str, for_each))})" if for_each else ""
        raise ValueError(
            f"names {len(for_each)} fields of tasks{name_stages}; expected exactly one, with a list of values"
        )
    [(field, value)] = for_each.items()
    fields = FAMILIES[family].config.model_fields if family in FAMILIES else {field: None}
    if field not in fields:
        near = difflib.get_close_matches(str(field), fields, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{field!r} is no setting of {family} tasks{hint}")
    if field in tasks:
        raise ValueError(f"tasks.{field} is set, too; leave out one of them")
    values = as_tuple(value)
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"{field} has no values; expected at least one, each makes a stage")
    return field, values


def _label(field: str, value: Any) -> str:
    """What a stage is about: `hammer-v3`, `velocity 0-1`, `wedge 2`."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple):
        return f"{field.removesuffix('s')} {value}"
    if all(isinstance(item, str) for item in value):
        return "+".join(value)
    return f"{field} {'-'.join(f'{item:g}' if isinstance(item, float) else str(item) for item in value)}"


def name_stages(stages: Sequence[Any]) -> list[Any]:
    """Give each stage of a sequence a name of its own: `stage 1`, `reach-v3`, `reach-v3 (2)`."""
    given = [_name(stage) for stage in stages]
    names = [f"stage {i + 1}" if name == DEFAULT_NAME and len(given) > 1 else name for i, name in enumerate(given)]
    for i, name in enumerate(names):
        if name is not None and name in names[:i]:
            names[i] = next(new for k in itertools.count(2) if (new := f"{name} ({k})") not in names)
    name_stages = []
    for stage, before, name in zip(stages, given, names, strict=True):
        if name == before:
            name_stages.append(stage)
        elif isinstance(stage, BaseModel):
            name_stages.append(stage.model_copy(update={"name": name}))
        else:
            name_stages.append({**stage, "name": name})
    return name_stages


def _name(stage: Any) -> str | None:
    """The name of a stage before validation; None where it has none that is one."""
    name = stage.get("name", DEFAULT_NAME) if isinstance(stage, Mapping) else getattr(stage, "name", None)
    return name if isinstance(name, str) else None


def located_as_written(error: ValidationError, stages: Sequence[Stage]) -> ValidationError:
    """The same mistakes, each once, at the places in the user's settings from which the stages were made."""
    if all(stage.chosen is None for stage in stages):
        return error
    found: dict[Any, InitErrorDetails] = {}
    for item in error.errors(include_url=False):
        where = item["loc"]
        if where[:1] == ("stages",) and len(where) > 1:
            stage, (_, _, *rest) = stages[int(where[1])], where
            if stage.chosen and rest[:1] == ["tasks"] and rest[2:3] == [stage.chosen[0]]:
                rest = ["for_each", *stage.chosen, *rest[3:]]
            where = ("stages", stage.position, *rest)
        details = InitErrorDetails(type=item["type"], loc=where, input=item["input"], ctx=item.get("ctx", {}))
        found.setdefault((where, item["msg"]), details)
    return ValidationError.from_exception_data(error.title, list(found.values()))
