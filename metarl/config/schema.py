"""The configuration of a run: one frozen pydantic tree, YAML in and YAML out, with flags laid over it.

Imports the config classes of agents and task families, nothing else of them.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.resources
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AliasChoices,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)

from metarl.agents import AgentConfig
from metarl.agents.maml.maml import MamlPpoConfig
from metarl.agents.maml.outer import OuterConfig
from metarl.agents.rl2.networks import CriticConfig, MemoryConfig
from metarl.config.error_messages import Wording, shown
from metarl.config.overrides import change_members, lay_over, parse_flags
from metarl.config.sequences import DEFAULT_NAME, expand_for_each, located_as_written, name_stages
from metarl.config.yaml_io import read_yaml, write_yaml
from metarl.envs import BuiltinTasksConfig
from metarl.envs.navigation import NavigationConfig
from metarl.errors import UserError
from metarl.settings import Settings
from metarl.stability import StabilityConfig, expand_names

StageId = Literal["none", "input", "head"]
"""How a policy is told the stage: not at all, by a one-hot at the end of its observations, or that and a head each."""


class CustomTasksConfig(Settings):
    """Tasks of one's own, given to `metarl.train` from Python."""

    family: Literal["custom"] = "custom"
    name: str = Field("custom", description="the name of the family, for the record")


TasksConfig = Annotated[BuiltinTasksConfig | CustomTasksConfig, Field(discriminator="family")]


class CurriculumConfig(Settings):
    """Tasks from easy to hard: the part of them that is sampled from grows linearly with the iterations of a stage."""

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


class StageConfig(Settings):
    """A stretch of training on one task distribution."""

    name: str = Field(DEFAULT_NAME, description="shown in logs; unique in a run")
    tasks: TasksConfig = Field(default_factory=NavigationConfig)
    for_each: str | None = Field(
        None,
        exclude=True,  # a run holds the stages that it stands for
        description="makes a stage for each value of one field of tasks, e.g. {name: [reach-v3, push-v3]}; CW10 and "
        "CW20: for each class of Continual World",
    )
    iterations: int = Field(100, ge=1, description="meta-updates")
    init_from: str | None = Field(
        None,
        min_length=1,
        description="run directory whose agent the stage starts from: policy, normaliser, and what else both agents "
        "have; none: go on with the agent as it is",
    )
    curriculum: CurriculumConfig = Field(default_factory=CurriculumConfig)
    score_range: tuple[float, float] | None = Field(
        None,
        description="returns that count as 0 and 1 in the account of forgetting, e.g. those of an untrained agent and "
        "of one trained on this stage alone; none: success where it is defined, else plain returns",
    )

    @field_validator("for_each", mode="before")
    @classmethod
    def _stands_for_others(cls, for_each: object) -> None:
        if for_each is not None:
            raise ValueError("stands for several stages; give them to RunConfig or metarl.train as a mapping")

    @field_validator("init_from")
    @classmethod
    def _is_a_path(cls, value: str | None) -> str | None:
        if value is not None and "\0" in value:
            raise ValueError("expected the path of a run directory")
        return value

    @field_validator("score_range")
    @classmethod
    def _increases(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not value[0] < value[1]:
            raise ValueError(f"score_range is {value}; expected the lower return first")
        return value


class EvaluationConfig(Settings):
    """Evaluation on held-out tasks, during training and by `metarl evaluate`."""

    every_iterations: int = Field(50, ge=0, description="iterations between evaluations; 0: only at the end of a stage")
    num_tasks: int = Field(
        20, ge=1, description="held-out tasks of an evaluation during training, balanced over classes"
    )
    rollouts_per_task: int | None = Field(
        None, ge=1, description="episodes a task before each adaptation step and after the last; none: as in training"
    )


NO_EFFECT = frozenset(
    {
        "device",
        "num_workers",
        "worker_timeout_s",
        "checkpoint_every_iterations",
        "keep_checkpoints",
        "keep_best_checkpoints",
    }
)
"""Settings that no result depends on: a run may go on elsewhere, with others."""


class RunConfig(Settings):
    """A run of metarl."""

    seed: int = Field(0, ge=0, lt=2**64, description="the root of all randomness")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where updates are computed")
    num_workers: int | None = Field(
        None,
        ge=0,
        le=1024,
        description="processes that step environments; 0: this one; none: one a core. No effect on results",
    )
    worker_timeout_s: float = Field(
        60.0,
        gt=0,
        description="seconds without any progress after which one of these processes counts as hung, and is restarted",
    )
    num_tasks: int = Field(20, ge=1, le=100_000, description="M, tasks of an iteration, balanced over classes")
    rollouts_per_task: int = Field(
        10, ge=1, le=100_000, description="N, episodes a task for each adaptation step, and after the last"
    )
    num_envs: int | None = Field(
        None,
        ge=1,
        description="environments stepped together, at least num_tasks; none: num_tasks · rollouts_per_task, for "
        "Meta-World (3.2 MB each) as many of the rollouts as fit into 400. Changes results by rounding alone",
    )
    checkpoint_every_iterations: int = Field(25, ge=1, description="iterations between checkpoints")
    keep_checkpoints: int = Field(3, ge=1, description="newest checkpoints that are kept")
    keep_best_checkpoints: int = Field(
        1, ge=0, description="and those with the best evaluation: success or, without it, return; of stages their mean"
    )
    agent: AgentConfig = Field(default_factory=MamlPpoConfig)
    stages: tuple[StageConfig, ...] = Field((StageConfig(),), min_length=1)
    stability: Annotated[tuple[StabilityConfig, ...], BeforeValidator(expand_names)] = Field(
        (), description="methods that guard earlier stages, by name or with settings; none: fine-tuning"
    )
    control: Literal["none", "joint", "scratch"] = Field(
        "none",
        description="joint: all stages train on the tasks of all (upper bound); scratch: each stage starts from a new "
        "agent (reference for transfer)",
    )
    stage_id: StageId = Field(
        "none",
        validation_alias=AliasChoices("stage_id", "stage_cue"),
        description="what tells the policy its stage: none; input: observations end in a one-hot of it; head: that, "
        "and each stage has an output layer of its own",
    )
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)

    @model_validator(mode="wrap")
    @classmethod
    def _written_out(cls, data: Any, validate: ModelWrapValidatorHandler[RunConfig]) -> RunConfig:
        """Make the stages of each `for_each` and name all; what is wrong with them is told of what the user wrote."""
        given = data.get("stages") if isinstance(data, Mapping) else None
        if not isinstance(given, list | tuple):
            return validate(data)
        stages = [stage for position, stage in enumerate(given) for stage in expand_for_each(position, stage)]
        try:
            return validate({**data, "stages": name_stages([stage.settings for stage in stages])})
        except ValidationError as error:
            raise located_as_written(error, stages) from None

    @model_validator(mode="after")
    def _methods_differ(self) -> RunConfig:
        names = [method.name for method in self.stability]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"stability names {', '.join(twice)} twice; each method counts once")
        return self

    @model_validator(mode="after")
    def _scratch_starts_from_nothing(self) -> RunConfig:
        if self.control == "scratch" and any(stage.init_from for stage in self.stages):
            raise ValueError(
                "control is scratch and a stage has init_from; each stage starts anew, leave out one of them"
            )
        return self

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
    try:
        if path.is_file():
            return path
    except OSError as error:  # a name that is too long, or a folder that one may not look into
        raise UserError(f"cannot read {shown(name_or_path)}: {error.strerror}") from error
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
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else shown(tree)
        raise UserError(f"{path}: expected settings such as `seed: 0`, found {found}")
    flags = parse_flags(overrides)
    change_members(tree, flags)
    for keys, value in sorted(flags.items(), key=lambda flag: len(flag[0])):  # a list before what changes its items
        lay_over(tree, keys, value)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(_WORDING.explain(error, str(path), flags)) from error


def as_config(config: RunConfig | Mapping[str, Any] | str | Path) -> RunConfig:
    """Return a config, its settings as a mapping, or a YAML file or embedded config by name; raises UserError."""
    if isinstance(config, RunConfig):
        return config
    if isinstance(config, str | Path):
        return load_config(config)
    try:
        return RunConfig.model_validate(dict(config))
    except ValidationError as error:
        raise UserError(_WORDING.explain(error)) from error


def dump_config(config: RunConfig) -> str:
    """Return the whole config as YAML that `load_config` reads back to an equal config."""
    return write_yaml(config.model_dump(mode="json"))


def hash_of(config: bytes) -> str:
    """Return the hash of a config.yaml, by which a checkpoint and an exported policy know their own."""
    return hashlib.sha256(config).hexdigest()


def _tags(union: Any, key: str) -> set[str]:
    members = get_args(get_args(union)[0])
    return {tag for member in members for tag in get_args(member.model_fields[key].annotation)}


_WORDING = Wording(
    RunConfig,
    {
        "tasks": _tags(TasksConfig, "family"),
        "agent": _tags(AgentConfig, "name"),
        "outer": _tags(OuterConfig, "name"),
        "memory": _tags(MemoryConfig, "name"),
        "critic": _tags(CriticConfig, "name"),
        "stability": _tags(StabilityConfig, "name"),
    },
)
