"""What the fields of config models hold: nested models, and the members of unions. Imports nothing of metarl."""

from __future__ import annotations

from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the models in an annotation: one, the members of a union, or the items of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in models_in(argument)]


def discriminator(field: FieldInfo) -> str | None:
    """Return the setting that tells apart the members of a union, or of a list of its members; None for others."""
    return field.discriminator if isinstance(field.discriminator, str) else _discriminator_in(field.annotation)


def _discriminator_in(annotation: Any) -> str | None:
    if get_origin(annotation) is Annotated:
        for item in annotation.__metadata__:
            if isinstance(item, FieldInfo) and isinstance(item.discriminator, str):
                return item.discriminator
    return next(filter(None, map(_discriminator_in, get_args(annotation))), None)


def union_members(field: FieldInfo) -> dict[str, type[BaseModel]]:
    """Return the members of a discriminated union, or of a list of its members, by tag; empty for other fields."""
    key = discriminator(field)
    if key is None:
        return {}
    models = models_in(field.annotation)
    return {str(tag): model for model in models for tag in get_args(model.model_fields[key].annotation)}
