"""The configuration of a run: one frozen pydantic tree, YAML in and YAML out, with flags laid over it.

Imports the config classes of agents and task families, nothing else of them.
"""

from __future__ import annotations

import difflib
import importlib.resources
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from metarl.agents import AgentConfig, agent_configs
from metarl.agents.maml import MamlPpoConfig
from metarl.agents.outer import OuterConfig
from metarl.agents.recurrent import BaselineConfig, MemoryConfig
from metarl.envs.metaworld import MetaWorldConfig
from metarl.envs.mujoco import MujocoConfig
from metarl.envs.navigation import NavigationConfig
from metarl.errors import STRICT, UserError


class CustomTasksConfig(BaseModel):
    """Tasks of one's own, given to `metarl.train` from Python."""

    model_config = STRICT

    family: Literal["custom"] = "custom"
    name: str = Field("custom", description="the name of the family, for the record")


TasksConfig = Annotated[
    MetaWorldConfig | MujocoConfig | NavigationConfig | CustomTasksConfig, Field(discriminator="family")
]


class CurriculumConfig(BaseModel):
    """Tasks from easy to hard: the part of them that is sampled from grows linearly with the iterations of a stage."""

    model_config = STRICT

    iterations: int = Field(
        0, ge=0, description="iterations after which all training tasks are sampled from; 0: no curriculum"
    )
    start_fraction: float = Field(
        0.2,
        gt=0,
        le=1,
        description="fraction of the training tasks, the easiest, that iteration 0 of a curriculum samples from",
    )

    @model_validator(mode="after")
    def _a_start_has_an_end(self) -> CurriculumConfig:
        if self.start_fraction != 0.2 and not self.iterations:
            raise ValueError(f"start_fraction={self.start_fraction} with iterations=0: give the curriculum iterations")
        return self


class StageConfig(BaseModel):
    """A stretch of training on one task distribution."""

    model_config = STRICT

    name: str = Field("meta-training", description="shown in logs")
    tasks: TasksConfig = Field(default_factory=NavigationConfig)
    iterations: int = Field(100, ge=1, description="meta-updates")
    init_from: str | None = Field(
        None,
        min_length=1,
        description="run directory whose agent the stage starts from: policy, normaliser, and what else both agents "
        "have; none: go on with the agent as it is",
    )
    curriculum: CurriculumConfig = Field(default_factory=CurriculumConfig)


class EvaluationConfig(BaseModel):
    """Evaluation on held-out tasks, during training and by `metarl evaluate`."""

    model_config = STRICT

    every_iterations: int = Field(50, ge=0, description="iterations between evaluations; 0: only at the end of a stage")
    num_tasks: int = Field(
        20, ge=1, description="held-out tasks of an evaluation during training, balanced over classes"
    )
    rollouts_per_task: int | None = Field(
        None, ge=1, description="episodes a task before each adaptation step and after the last; none: as in training"
    )


class RunConfig(BaseModel):
    """A run of metarl."""

    model_config = STRICT

    seed: int = Field(0, ge=0, description="the root of all randomness")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where updates are computed")
    num_workers: int | None = Field(
        None, ge=0, description="processes that step environments; 0: this one; none: one a core. No effect on results"
    )
    num_tasks: int = Field(20, ge=1, description="M, tasks of an iteration, balanced over classes")
    rollouts_per_task: int = Field(
        10, ge=1, description="N, episodes a task for each adaptation step, and after the last"
    )
    num_envs: int | None = Field(
        None,
        ge=1,
        description="environments stepped together, at least num_tasks; none: num_tasks · rollouts_per_task, for "
        "Meta-World (3.2 MB each) as many of the rollouts as fit into 400. Changes results by rounding alone",
    )
    checkpoint_every_iterations: int = Field(25, ge=1, description="iterations between checkpoints")
    keep_checkpoints: int = Field(3, ge=1, description="newest checkpoints that are kept")
    agent: AgentConfig = Field(default_factory=MamlPpoConfig)
    stages: tuple[StageConfig, ...] = Field((StageConfig(),), min_length=1)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)

    @model_validator(mode="after")
    def _envs_hold_the_tasks(self) -> RunConfig:
        if self.num_envs is not None and self.num_envs < self.num_tasks:
            raise ValueError(f"num_envs is {self.num_envs}; expected at least num_tasks, {self.num_tasks}")
        return self


def embedded_configs() -> dict[str, Path]:
    """Return the configs that come with metarl: name → file."""
    folder = Path(str(importlib.resources.files("metarl.configs")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(name_or_path: str) -> Path:
    """Return the file of a config, given as a path or by the name of an embedded one; raises UserError."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    embedded = embedded_configs()
    if name_or_path in embedded:
        return embedded[name_or_path]
    near = difflib.get_close_matches(path.stem, embedded, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(
        f"no config {name_or_path!r}: it is neither a file nor embedded; {hint}`metarl list configs` shows all"
    )


def load_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML and lay flags over it.

    Args:
        name_or_path: a file, or the name of an embedded config.
        overrides: command-line flags such as `["--agent.inner-lr", "0.05"]`.

    Raises:
        UserError: one line that names the file or flag, what was found, and what was expected.
    """
    path = find_config(str(name_or_path))
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}{where}: not valid YAML: {problem}") from error
    if not isinstance(tree, dict):
        raise UserError(
            f"{path}: expected settings such as `seed: 0`, found {'nothing' if tree is None else repr(tree)}"
        )
    flags = parse_flags(overrides)
    _change_members(tree, flags)
    for keys, value in flags.items():
        _lay_over(tree, keys, value)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error, str(path), set(flags))) from error


def dump_config(config: RunConfig) -> str:
    """Return the whole config as YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def parse_flags(arguments: Sequence[str]) -> dict[tuple[str, ...], Any]:
    """Read `--a.b-c value` and `--a.b-c=value`: path → value, parsed as YAML; several values make a list.

    Raises:
        UserError: a word that is not a flag's, or a flag without a value.
    """
    flags: dict[tuple[str, ...], list[str]] = {}
    values: list[str] | None = None
    for word in arguments:
        if word.startswith("--"):
            flag, equals, value = word[2:].partition("=")
            values = flags[tuple(flag.replace("-", "_").split("."))] = [value] if equals else []
        elif values is None:
            raise UserError(
                f"unexpected argument {word!r}; settings are given as --name value (see metarl train --help)"
            )
        else:
            values.append(word)
    for keys, words in flags.items():
        if not words:
            raise UserError(f"{_flag(keys)} has no value; give one (see metarl train --help)")
    return {keys: _value(words) for keys, words in flags.items()}


def _value(words: list[str]) -> Any:
    try:
        parsed = [yaml.safe_load(word) for word in words]
    except (yaml.YAMLError, ValueError, RecursionError):
        parsed = list(words)
    return parsed[0] if len(parsed) == 1 else parsed


def _flag(keys: Sequence[str | int]) -> str:
    return "--" + ".".join(str(key).replace("_", "-") for key in keys)


def _change_members(tree: dict[str, Any], flags: Mapping[tuple[str, ...], Any]) -> None:
    """Where flags name another agent, or part of one, than the file, drop what the file says that the new one lacks."""
    agents, agent = agent_configs(), tree.get("agent")
    if not isinstance(agent, dict):
        return
    old_name = agent.get("name", "maml_ppo")
    name = flags.get(("agent", "name"), old_name)
    if not {str(name), str(old_name)} <= agents.keys():
        return  # validation tells
    if name != old_name:
        tree["agent"] = agent = {key: value for key, value in agent.items() if key in agents[name].model_fields}
    for part in ("outer", "memory", "critic"):
        in_both = part in agents[old_name].model_fields and part in agents[name].model_fields
        if in_both and isinstance(agent.get(part), dict):
            _change_member_of(agent, part, agents[old_name], agents[name], flags.get(("agent", part, "name")))


def _change_member_of(agent: dict[str, Any], part: str, old: type[BaseModel], new: type[BaseModel], flag: Any) -> None:
    """The same for a part of the agent that is one of several by itself."""
    old_field, new_field = (each.model_fields[part] for each in (old, new))
    old_default, new_default = (field.get_default(call_default_factory=True) for field in (old_field, new_field))
    before = agent[part].get("name", old_default.name)
    takes_any = not isinstance(new_field.annotation, type)
    after = flag or (before if takes_any else new_default.name)
    if after != before:
        agent[part] = {"name": after}


def _lay_over(tree: Any, keys: tuple[str, ...], value: Any) -> None:
    """Set one value in nested mappings and lists, making mappings on the way."""
    *parents, last = keys
    for i, key in enumerate(parents):
        if isinstance(tree, list):
            if not (key.isascii() and key.isdigit()) or int(key) >= len(tree):
                raise UserError(
                    f"{_flag(keys)}: there is no {'.'.join(keys[: i + 1])}; the list has {len(tree)} item(s)"
                )
            tree = tree[int(key)]
        else:
            tree = tree.setdefault(key, [{}] if key == "stages" else {})
        if not isinstance(tree, dict | list):
            raise UserError(f"{_flag(keys)}: {'.'.join(keys[: i + 1])} is a single value and has no settings")
    if isinstance(tree, list):
        raise UserError(f"{_flag(keys)}: name an item of the list first, e.g. --stages.0.iterations")
    tree[last] = value


def explain_validation(error: ValidationError) -> str:
    """Return a validation error in one line: path, what was found, what was expected."""
    return _explain(error, "", set())


def _explain(error: ValidationError, source: str, flags: set[tuple[str, ...]]) -> str:
    lines = []
    items = error.errors(include_url=False)
    for item in items:
        keys = _path(item["loc"])
        given = [flag for flag in flags if flag[: len(keys)] == tuple(map(str, keys))]
        if given and len(given[0]) > len(keys) and item["type"].endswith("_type"):
            lines.append(f"{_flag(given[0])}: {'.'.join(map(str, keys))} is a single value and has no settings")
            continue
        if item["type"] == "too_short" and len(items) > 1:
            continue  # pydantic counts an invalid item as missing, too
        named = tuple(str(key) for key in keys)
        given_by_flag = named in flags
        where = _flag(keys) if given_by_flag else ": ".join(filter(None, (source, ".".join(named))))
        lines.append(f"{where}: {_problem(item, keys, given_by_flag)}")
    return " ".join("; ".join(lines).split())


def _problem(item: Any, keys: tuple[str | int, ...], given_by_flag: bool) -> str:
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(keys[-1]), _fields_at(item["loc"][:-1]), n=1, cutoff=0.4)
        name = (lambda key: _flag((*keys[:-1], key))) if given_by_flag else repr
        return "unknown setting" + (f"; did you mean {name(near[0])}?" if near else "")
    if item["type"] == "union_tag_invalid":
        tag, tags = item["ctx"]["tag"], [name.strip("'") for name in item["ctx"]["expected_tags"].split(", ")]
        near = difflib.get_close_matches(tag, tags, n=1)
        return f"got {tag!r}, expected one of {', '.join(tags)}" + (f"; did you mean {near[0]!r}?" if near else "")
    message = item["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    value = item["input"]
    found = "" if isinstance(value, dict | list | BaseModel) else f"got {value!r}, "
    return f"{found}{message[0].lower()}{message[1:]}"


def _tags(union: Any, key: str) -> set[str]:
    members = get_args(get_args(union)[0])
    return {tag for member in members for tag in get_args(member.model_fields[key].annotation)}


_TAGS = {
    "tasks": _tags(TasksConfig, "family"),
    "agent": _tags(AgentConfig, "name"),
    "outer": _tags(OuterConfig, "name"),
    "memory": _tags(MemoryConfig, "name"),
    "critic": _tags(BaselineConfig, "name"),
}
"""What pydantic puts into the path of an error below a union: the tag of its member."""


def _path(location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Drop the tags of unions."""
    before = (None, *location)
    return tuple(key for key, above in zip(location, before, strict=False) if key not in _TAGS.get(str(above), ()))


def _fields_at(location: tuple[str | int, ...]) -> list[str]:
    """Names of the settings below a location; for a union those of the member whose tag the location holds."""
    models: list[type[BaseModel]] = [RunConfig]
    for key, above in zip(location, (None, *location), strict=False):
        if isinstance(key, int):
            continue
        if key in _TAGS.get(str(above), ()):
            models = [model for model in models if any(_has_tag(field, key) for field in model.model_fields.values())]
            continue
        found = [model.model_fields[key].annotation for model in models if key in model.model_fields]
        models = [model for annotation in found for model in _models_in(annotation)]
    return [name for model in models for name in model.model_fields]


def _has_tag(field: FieldInfo, tag: str) -> bool:
    return get_origin(field.annotation) is Literal and tag in get_args(field.annotation)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
