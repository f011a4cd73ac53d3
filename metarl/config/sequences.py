"""Stage sequences as users write them: expands `for_each`, names the stages, maps errors back to the user's settings.

Works on settings before validation; used by `metarl.config.schema`.
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
"""The name of an only stage that the user did not name."""

_CW10 = (
    "hammer push-wall faucet-close push-back stick-pull handle-press-side push shelf-place window-close peg-unplug-side"
)
CW10 = tuple(f"{name}-v3" for name in _CW10.split())
"""The sequence of Continual World (Wołczyk et al. 2021, 2105.10919), with the names of Meta-World 3."""

SEQUENCES = {"CW10": CW10, "CW20": CW10 * 2}
"""Classes of named sequences: `for_each: CW10`."""


class ExpandedStage(NamedTuple):
    """A stage before validation, and where it comes from.

    Attributes:
        settings: of the stage.
        position: index of the user's stage that it was expanded from.
        for_each: the field that `for_each` sets, and the index of the value; None without `for_each`.
    """

    settings: Any
    position: int
    for_each: tuple[str, int] | None = None


def expand_for_each(stages: Sequence[Any]) -> list[ExpandedStage]:
    """Return the stages of a run: for a stage with `for_each`, one for each of its values; raises ValidationError."""
    return [expanded for position, stage in enumerate(stages) for expanded in _expand_stage(position, stage)]


def _expand_stage(position: int, stage: Any) -> list[ExpandedStage]:
    if not isinstance(stage, Mapping) or stage.get("for_each") is None:
        return [ExpandedStage(stage, position)]
    template = {key: value for key, value in stage.items() if key != "for_each"}
    tasks = template.get("tasks", {"family": "navigation"})
    if isinstance(tasks, BaseModel):
        tasks = {"family": getattr(tasks, "family", None), **tasks.model_dump(exclude_unset=True)}
    if not isinstance(tasks, Mapping):
        return [ExpandedStage(template, position)]  # validation reports it
    try:
        field, values = _field_and_values(stage["for_each"], tasks)
    except ValueError as error:
        problem = PydanticCustomError("for_each", "{problem}", {"problem": str(error)})
        where = ("stages", position, "for_each")
        details = InitErrorDetails(type=problem, loc=where, input=stage["for_each"])
        raise ValidationError.from_exception_data("RunConfig", [details]) from None
    stages = []
    for index, value in enumerate(values):
        settings = {**template, "tasks": {**tasks, field: value}}
        if index:  # init_from starts the sequence; later stages continue with its agent
            settings.pop("init_from", None)
        prefix = template.get("name", DEFAULT_NAME)
        if isinstance(prefix, str):
            label = _label(field, value)
            settings["name"] = label if prefix == DEFAULT_NAME else f"{prefix} {label}"
        stages.append(ExpandedStage(settings, position, (field, index)))
    return stages


def _field_and_values(for_each: Any, tasks: Mapping[str, Any]) -> tuple[str, Sequence[Any]]:
    """Return the field that `for_each` sets and its values; raises ValueError."""
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
        fields = f" ({', '.join(map(str, for_each))})" if for_each else ""
        raise ValueError(f"names {len(for_each)} fields of tasks{fields}; expected exactly one, with a list of values")
    [(field, value)] = for_each.items()
    known = FAMILIES[family].config.model_fields if family in FAMILIES else {field: None}
    if field not in known:
        near = difflib.get_close_matches(str(field), known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{field!r} is not a setting of {family} tasks{hint}")
    if field in tasks:
        raise ValueError(f"tasks.{field} is also set; remove one of them")
    values = as_tuple(value)
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"{field} has no values; expected at least one, a stage for each")
    return field, values


def _label(field: str, value: Any) -> str:
    """Return the name of an expanded stage: `hammer-v3`, `velocity 0-1`, `wedge 2`."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple):
        return f"{field.removesuffix('s')} {value}"
    if all(isinstance(item, str) for item in value):
        return "+".join(value)
    return f"{field} {'-'.join(f'{item:g}' if isinstance(item, float) else str(item) for item in value)}"


def name_stages(stages: Sequence[Any]) -> list[Any]:
    """Give each stage of a sequence a unique name: `stage 1`, `reach-v3`, `reach-v3 (2)`."""
    old_names = [_name(stage) for stage in stages]
    several = len(stages) > 1
    names = [f"stage {i + 1}" if name == DEFAULT_NAME and several else name for i, name in enumerate(old_names)]
    for i, name in enumerate(names):
        if name is not None and name in names[:i]:
            names[i] = next(new for k in itertools.count(2) if (new := f"{name} ({k})") not in names)
    named: list[Any] = []
    for stage, old_name, name in zip(stages, old_names, names, strict=True):
        if name == old_name:
            named.append(stage)
        elif isinstance(stage, BaseModel):
            named.append(stage.model_copy(update={"name": name}))
        else:
            named.append({**stage, "name": name})
    return named


def _name(stage: Any) -> str | None:
    """Return the name of a stage before validation; None if it is not a text."""
    name = stage.get("name", DEFAULT_NAME) if isinstance(stage, Mapping) else getattr(stage, "name", None)
    return name if isinstance(name, str) else None


def relocate_errors(error: ValidationError, stages: Sequence[ExpandedStage]) -> ValidationError:
    """Move errors from expanded stages to the settings that the user wrote, and drop duplicates."""
    if all(stage.for_each is None for stage in stages):
        return error
    relocated: dict[Any, InitErrorDetails] = {}
    for item in error.errors(include_url=False):
        where = item["loc"]
        if where[:1] == ("stages",) and len(where) > 1:
            stage, (_, _, *rest) = stages[int(where[1])], where
            if stage.for_each and rest[:1] == ["tasks"] and rest[2:3] == [stage.for_each[0]]:
                rest = ["for_each", *stage.for_each, *rest[3:]]
            where = ("stages", stage.position, *rest)
        details = InitErrorDetails(type=item["type"], loc=where, input=item["input"], ctx=item.get("ctx", {}))
        relocated.setdefault((where, item["msg"]), details)
    return ValidationError.from_exception_data(error.title, list(relocated.values()))
