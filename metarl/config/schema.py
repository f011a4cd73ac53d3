"""The config of a run: a frozen pydantic tree, read from YAML and flags, and written to YAML.

Imports only the config classes of agents, task families and stability methods.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.resources
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)

from metarl.agents import DEFAULT_AGENT, AgentConfig, agent_configs
from metarl.config.error_messages import ErrorMessages, quote_value
from metarl.config.overrides import change_members, lay_over, parse_flags
from metarl.config.sequences import DEFAULT_NAME, expand_for_each, name_stages, relocate_errors
from metarl.config.yaml_io import read_yaml, write_yaml
from metarl.envs import BuiltinTasksConfig, WrapperConfig
from metarl.envs.navigation import NavigationConfig
from metarl.errors import UserError
from metarl.settings import Settings
from metarl.stability import StabilityConfig, expand_names

StageId = Literal["none", "input", "head"]
"""How a policy knows its stage: not at all, by a one-hot in its observations, or by that and an output head a stage."""


class CustomTasksConfig(Settings):
    """Custom tasks, passed to `metarl.train` in Python."""

    family: Literal["custom"] = "custom"
    name: str = Field("custom", description="name of the family; only recorded")


TasksConfig = Annotated[BuiltinTasksConfig | CustomTasksConfig, Field(discriminator="family")]


class CurriculumConfig(Settings):
    """A curriculum from easy to hard tasks: the sampled fraction grows linearly over the iterations of a stage."""

    iterations: int = Field(0, ge=0, description="iterations until all training tasks are sampled; 0: no curriculum")
    start_fraction: float = Field(
        0.2,
        gt=0,
        le=1,
        description="fraction of the training tasks, easiest first, that iteration 0 samples from",
    )

    @model_validator(mode="after")
    def _start_needs_iterations(self) -> CurriculumConfig:
        if self.start_fraction != 0.2 and not self.iterations:
            raise ValueError(
                f"start_fraction={self.start_fraction} with iterations=0: set the iterations of the curriculum"
            )
        return self


class StageConfig(Settings):
    """Training on one task distribution."""

    name: str = Field(DEFAULT_NAME, description="name in logs and reports; made unique")
    tasks: TasksConfig = Field(default_factory=NavigationConfig)
    wrappers: Annotated[tuple[WrapperConfig, ...], BeforeValidator(expand_names)] = Field(
        (),
        description="environment wrappers, from the innermost to the outermost, e.g. [{name: action_repeat, times: 2}]",
    )
    for_each: str | None = Field(
        None,
        exclude=True,  # a run holds the expanded stages
        description="expands to a stage for each value of one field of tasks, e.g. {name: [reach-v3, push-v3]}; CW10 "
        "and CW20: the sequences of Continual World",
    )
    iterations: int = Field(100, ge=1, description="meta-updates")
    init_from: str | None = Field(
        None,
        min_length=1,
        description="run directory whose agent initialises this stage: policy, normaliser, and all else that both "
        "agents have; none: keep the current agent",
    )
    curriculum: CurriculumConfig = Field(default_factory=CurriculumConfig)
    score_range: tuple[float, float] | None = Field(
        None,
        description="returns scored as 0 and 1 in the continual-learning metrics, e.g. of an untrained agent and "
        "of one trained on this stage alone; none: success rates where defined, else returns",
    )

    @field_validator("for_each", mode="before")
    @classmethod
    def _must_be_expanded(cls, for_each: object) -> None:
        if for_each is not None:
            raise ValueError("expands to several stages; pass the settings to RunConfig or metarl.train as a mapping")

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

    every_iterations: int = Field(
        50, ge=0, description="iterations between evaluations; 0: only at the end of each stage"
    )
    num_tasks: int = Field(20, ge=1, description="held-out tasks per evaluation during training, balanced over classes")
    rollouts_per_task: int | None = Field(
        None,
        ge=1,
        description="episodes per task before each adaptation step and after the last; none: as in training",
    )


OPERATIONAL_SETTINGS = frozenset(
    {
        "device",
        "num_workers",
        "worker_timeout_s",
        "checkpoint_every_iterations",
        "keep_checkpoints",
        "keep_best_checkpoints",
    }
)
"""Settings that do not affect results: a run can be resumed with other values."""


class RunConfig(Settings):
    """The config of a training run."""

    seed: int = Field(0, ge=0, lt=2**64, description="root of all random seeds")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="device of the updates; auto: a GPU if there is one"
    )
    num_workers: int | None = Field(
        None,
        ge=0,
        le=1024,
        description="worker processes that step environments; 0: the main process; none: one per core. No effect on "
        "results",
    )
    worker_timeout_s: float = Field(
        60.0,
        gt=0,
        description="seconds without progress after which a worker counts as hung and is restarted",
    )
    num_tasks: int = Field(20, ge=1, le=100_000, description="M, tasks per iteration, balanced over classes")
    rollouts_per_task: int = Field(
        10, ge=1, le=100_000, description="N, episodes per task before each adaptation step and after the last"
    )
    num_envs: int | None = Field(
        None,
        ge=1,
        description="environments stepped together, at least num_tasks; none: num_tasks · rollouts_per_task, or for "
        "Meta-World (3.2 MB each) as many rollouts per task as fit into 400. Affects results only by rounding",
    )
    checkpoint_every_iterations: int = Field(25, ge=1, description="iterations between checkpoints")
    keep_checkpoints: int = Field(3, ge=1, description="number of newest checkpoints to keep")
    keep_best_checkpoints: int = Field(
        1,
        ge=0,
        description="number of best checkpoints to keep as well, by success, or by return where there is none; mean "
        "over stages",
    )
    agent: AgentConfig = Field(default_factory=agent_configs()[DEFAULT_AGENT])
    stages: tuple[StageConfig, ...] = Field((StageConfig(),), min_length=1)
    stability: Annotated[tuple[StabilityConfig, ...], BeforeValidator(expand_names)] = Field(
        (), description="methods that protect earlier stages, by name or with settings; none: fine-tuning"
    )
    control: Literal["none", "joint", "scratch"] = Field(
        "none",
        description="joint: every stage trains on the tasks of all stages (upper bound); scratch: every stage starts "
        "with a new agent (reference for transfer)",
    )
    stage_id: StageId = Field(
        "none",
        validation_alias=AliasChoices("stage_id", "stage_cue"),
        description="how the policy knows its stage; none: not at all; input: a one-hot at the end of the observation; "
        "head: that, and a separate output layer per stage",
    )
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)

    @model_validator(mode="wrap")
    @classmethod
    def _expand_stages(cls, data: Any, validate: ModelWrapValidatorHandler[RunConfig]) -> RunConfig:
        """Expand `for_each` and name all stages; errors name the settings that the user wrote."""
        written = data.get("stages") if isinstance(data, Mapping) else None
        if not isinstance(written, list | tuple):
            return validate(data)
        stages = expand_for_each(written)
        try:
            return validate({**data, "stages": name_stages([stage.settings for stage in stages])})
        except ValidationError as error:
            raise relocate_errors(error, stages) from None

    @model_validator(mode="after")
    def _methods_differ(self) -> RunConfig:
        names = [method.name for method in self.stability]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"stability names {', '.join(twice)} twice; name each method once")
        return self

    @model_validator(mode="after")
    def _scratch_excludes_init_from(self) -> RunConfig:
        if self.control == "scratch" and any(stage.init_from for stage in self.stages):
            raise ValueError(
                "control: scratch starts every stage with a new agent, but a stage has init_from; remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _one_env_per_task(self) -> RunConfig:
        if self.num_envs is not None and self.num_envs < self.num_tasks:
            raise ValueError(f"num_envs is {self.num_envs}; expected at least num_tasks, {self.num_tasks}")
        return self


def embedded_configs() -> dict[str, Path]:
    """Return the files of the configs that come with metarl, by name."""
    folder = Path(str(importlib.resources.files("metarl.configs")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(name_or_path: str) -> Path:
    """Return the file of a config, given as a path or by the name of an embedded one; raises UserError."""
    path = Path(name_or_path)
    try:
        if path.is_file():
            return path
    except OSError as error:  # a name that is too long, a folder without permission
        raise UserError(f"cannot read {quote_value(name_or_path)}: {error.strerror}") from error
    embedded = embedded_configs()
    if name_or_path in embedded:
        return embedded[name_or_path]
    near = difflib.get_close_matches(path.stem, embedded, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(
        f"no config {name_or_path!r}: neither a file nor an embedded config; {hint}`metarl list configs` shows all"
    )


def load_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config from YAML and apply flags.

    Args:
        name_or_path: a file, or the name of an embedded config.
        overrides: command-line flags such as `["--agent.inner-lr", "0.05"]`.

    Raises:
        UserError: one line that names the file or flag, its value, and what was expected.
    """
    path = find_config(str(name_or_path))
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else quote_value(tree)
        raise UserError(f"{path}: expected settings such as `seed: 0`, found {found}")
    flags = parse_flags(overrides)
    change_members(tree, flags)
    for keys, value in sorted(flags.items(), key=lambda flag: len(flag[0])):  # a list before its items
        lay_over(tree, keys, value)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(_MESSAGES.explain(error, str(path), flags)) from error


def as_config(config: RunConfig | Mapping[str, Any] | str | Path) -> RunConfig:
    """Return a config that is given as such, as a mapping, as a YAML file or by its name; raises UserError."""
    if isinstance(config, RunConfig):
        return config
    if isinstance(config, str | Path):
        return load_config(config)
    try:
        return RunConfig.model_validate(dict(config))
    except ValidationError as error:
        raise UserError(_MESSAGES.explain(error)) from error


def dump_config(config: RunConfig) -> str:
    """Return the config as YAML; `load_config` reads back an equal config."""
    return write_yaml(config.model_dump(mode="json"))


def hash_of(config: bytes) -> str:
    """Return the SHA-256 of a config.yaml; checkpoints and exported policies store it to recognise their config."""
    return hashlib.sha256(config).hexdigest()


_MESSAGES = ErrorMessages(RunConfig)
