"""Command-line flags that override settings: `--agent.inner-lr 0.05` changes the YAML tree before validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from metarl.agents import DEFAULT_AGENT, agent_configs
from metarl.config.models import union_members
from metarl.config.yaml_io import parse_yaml
from metarl.errors import UserError
from metarl.stability import expand_names


def parse_flags(arguments: Sequence[str]) -> dict[tuple[str, ...], Any]:
    """Parse `--a.b-c value` and `--a.b-c=value` into path → value, read as YAML; several values make a list.

    Raises:
        UserError: an argument without a flag, or a flag without a value.
    """
    flags: dict[tuple[str, ...], list[str]] = {}
    values: list[str] | None = None
    for word in arguments:
        if not word.isascii() and any("\ud800" <= letter <= "\udfff" for letter in word):
            raise UserError(f"{word[:80]!r} is not valid UTF-8; write it in UTF-8")
        if word.startswith("--"):
            flag, equals, value = word[2:].partition("=")
            keys = tuple(flag.replace("-", "_").split("."))
            if word != "--" and not all(keys):
                raise UserError(f"{word!r} names no setting; write --name value (see metarl train --help)")
            values = flags[keys] = [value] if equals else []
        elif values is None:
            raise UserError(f"unexpected argument {word!r}; write settings as --name value (see metarl train --help)")
        else:
            values.append(word)
    for keys, words in flags.items():
        if not words:
            raise UserError(f"{flag_of(keys)} has no value; add one (see metarl train --help)")
        if not all(word.strip() for word in words):
            raise UserError(f"{flag_of(keys)} has an empty value; write one, or null for none")
    return {keys: _parse_value(words) for keys, words in flags.items()}


def _parse_value(words: list[str]) -> Any:
    if words == ["None"]:  # --help shows a setting without a value so
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
    """Drop the file's settings that do not apply to the agent, or the part of it, that flags choose instead."""
    agents, agent = agent_configs(), tree.get("agent")
    if not isinstance(agent, dict):
        return
    old_name = agent.get("name", DEFAULT_AGENT)
    name = flags.get(("agent", "name"), old_name)
    if not {str(name), str(old_name)} <= agents.keys():
        return  # validation reports it
    old, new = agents[old_name].model_fields, agents[name].model_fields
    if name != old_name:
        both = {key for key in old.keys() & new.keys() if _is_section(old[key]) == _is_section(new[key])}
        tree["agent"] = agent = {key: value for key, value in agent.items() if key in both}
    for part in old.keys() & new.keys():
        flag = flags.get(("agent", part, "name"))
        if isinstance(agent.get(part), dict) and (flag or name != old_name):
            _change_member(agent, part, old[part], new[part], flag)


def _is_section(field: FieldInfo) -> bool:
    """Return whether a setting holds nested settings."""
    return isinstance(field.get_default(call_default_factory=True), BaseModel)


def _change_member(agent: dict[str, Any], part: str, old: FieldInfo, new: FieldInfo, flag: Any) -> None:
    """Drop the settings of a part of the agent, e.g. `outer`, if another member of its union is chosen."""
    old_default, new_default = (field.get_default(call_default_factory=True) for field in (old, new))
    if not (hasattr(old_default, "name") and hasattr(new_default, "name")):
        return  # no union
    before = agent[part].get("name", old_default.name)
    after = flag or (before if union_members(new) else new_default.name)
    if after != before:
        agent[part] = {"name": after}


def lay_over(tree: Any, keys: tuple[str, ...], value: Any) -> None:
    """Set one value in nested mappings and lists; creates the mappings that are missing; raises UserError."""
    *parents, last = keys
    for i, key in enumerate(parents):
        if isinstance(tree, list):
            if not (key.isascii() and key.isdigit()) or int(key) >= len(tree):
                raise UserError(
                    f"{flag_of(keys)}: there is no {flag_of(keys[: i + 1])[2:]}; the list has {len(tree)} item(s)"
                )
            tree = tree[int(key)]
        else:
            if key in ("stability", "wrappers"):
                tree[key] = expand_names(tree.get(key, [{}] if key == "stability" else []))
            tree = tree.setdefault(key, [{}] if key == "stages" else {})
        if not isinstance(tree, dict | list):
            raise UserError(f"{flag_of(keys)}: {'.'.join(keys[: i + 1])} is a single value; it has no nested settings")
    if isinstance(tree, list):
        raise UserError(f"{flag_of(keys)}: choose an item of the list, e.g. --stages.0.iterations")
    tree[last] = value
