"""Flags of the command line as settings: `--agent.inner-lr 0.05` is laid over a tree of YAML before it is validated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from metarl.agents import agent_configs
from metarl.config.yaml_io import parse_yaml
from metarl.errors import UserError
from metarl.stability import expand_names


def parse_flags(arguments: Sequence[str]) -> dict[tuple[str, ...], Any]:
    """Read `--a.b-c value` and `--a.b-c=value`: path → value, parsed as YAML; several values make a list.

    Raises:
        UserError: a word that is not a flag's, or a flag without a value.
    """
    flags: dict[tuple[str, ...], list[str]] = {}
    values: list[str] | None = None
    for word in arguments:
        if not word.isascii() and any("\ud800" <= each <= "\udfff" for each in word):
            raise UserError(f"{word[:80]!r} is not valid UTF-8; write it in UTF-8")
        if word.startswith("--"):
            flag, equals, value = word[2:].partition("=")
            keys = tuple(flag.replace("-", "_").split("."))
            if word != "--" and not all(keys):
                raise UserError(f"{word!r} names no setting; they are given as --name value (see metarl train --help)")
            values = flags[keys] = [value] if equals else []
        elif values is None:
            raise UserError(
                f"unexpected argument {word!r}; settings are given as --name value (see metarl train --help)"
            )
        else:
            values.append(word)
    for keys, words in flags.items():
        if not words:
            raise UserError(f"{flag_of(keys)} has no value; give one (see metarl train --help)")
        if not all(word.strip() for word in words):
            raise UserError(f"{flag_of(keys)} has an empty value; give one, or null for none")
    return {keys: _value(words) for keys, words in flags.items()}


def _value(words: list[str]) -> Any:
    if words == ["None"]:  # as --help shows a setting without a value
        return None
    try:
        parsed = [parse_yaml(word) for word in words]
    except (yaml.YAMLError, ValueError, RecursionError):
        parsed = list(words)
    return parsed[0] if len(parsed) == 1 else parsed


def flag_of(keys: Sequence[str | int]) -> str:
    """Return the flag of a setting, e.g. `--agent.inner-lr`."""
    return "--" + ".".join(str(key).replace("_", "-") for key in keys)


def change_members(tree: dict[str, Any], flags: Mapping[tuple[str, ...], Any]) -> None:
    """Where flags name another agent, or part of one, than the file, drop what the file says that the new one lacks."""
    agents, agent = agent_configs(), tree.get("agent")
    if not isinstance(agent, dict):
        return
    old_name = agent.get("name", "maml_ppo")
    name = flags.get(("agent", "name"), old_name)
    if not {str(name), str(old_name)} <= agents.keys():
        return  # validation tells
    if name != old_name:
        old, new = agents[old_name].model_fields, agents[name].model_fields
        both = {key for key in old.keys() & new.keys() if _is_section(old[key]) == _is_section(new[key])}
        tree["agent"] = agent = {key: value for key, value in agent.items() if key in both}
    for part in ("outer", "memory", "critic"):
        in_both = part in agents[old_name].model_fields and part in agents[name].model_fields
        flag = flags.get(("agent", part, "name"))
        if in_both and isinstance(agent.get(part), dict) and (flag or name != old_name):
            _change_member_of(agent, part, agents[old_name], agents[name], flag)


def _is_section(field: FieldInfo) -> bool:
    """Whether a setting holds settings of its own."""
    return isinstance(field.get_default(call_default_factory=True), BaseModel)


def _change_member_of(agent: dict[str, Any], part: str, old: type[BaseModel], new: type[BaseModel], flag: Any) -> None:
    """The same for a part of the agent that is one of several by itself."""
    old_field, new_field = (each.model_fields[part] for each in (old, new))
    old_default, new_default = (field.get_default(call_default_factory=True) for field in (old_field, new_field))
    before = agent[part].get("name", old_default.name)
    takes_any = not isinstance(new_field.annotation, type)
    after = flag or (before if takes_any else new_default.name)
    if after != before:
        agent[part] = {"name": after}


def lay_over(tree: Any, keys: tuple[str, ...], value: Any) -> None:
    """Set one value in nested mappings and lists, making mappings on the way."""
    *parents, last = keys
    for i, key in enumerate(parents):
        if isinstance(tree, list):
            if not (key.isascii() and key.isdigit()) or int(key) >= len(tree):
                raise UserError(
                    f"{flag_of(keys)}: there is no {flag_of(keys[: i + 1])[2:]}; the list has {len(tree)} item(s)"
                )
            tree = tree[int(key)]
        else:
            if key == "stability":
                tree[key] = expand_names(tree.get(key, [{}]))
            tree = tree.setdefault(key, [{}] if key == "stages" else {})
        if not isinstance(tree, dict | list):
            raise UserError(f"{flag_of(keys)}: {'.'.join(keys[: i + 1])} is a single value and has no settings")
    if isinstance(tree, list):
        raise UserError(f"{flag_of(keys)}: name an item of the list first, e.g. --stages.0.iterations")
    tree[last] = value
