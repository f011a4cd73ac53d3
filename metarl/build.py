"""Builds the objects that a config describes: task distributions, task samplers, the agent, the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import gymnasium
import torch

from metarl import agents
from metarl.collect import LocalCollector
from metarl.config.schema import RunConfig, StageConfig
from metarl.envs import FAMILIES, StageIdTasks, add_wrappers, distribution, make
from metarl.envs.manager import Curriculum, EnvManager, JointManager, Manager
from metarl.envs.vector.pool import env_spaces
from metarl.envs.vector.serial import usable_cores
from metarl.envs.vector.union import check_distinct_tasks, make_stage_envs
from metarl.errors import UserError, unknown_name
from metarl.protocols import Agent, AgentBuilder, Collector, TaskDistribution
from metarl.seeding import Purpose, integer_seed
from metarl.spaces import Spaces
from metarl.types import AgentSpec, Task


def resolve_device(device: str) -> torch.device:
    """Return the device; `auto` takes the GPU if there is one. Raises UserError for a GPU that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: PyTorch finds no GPU here; use --device cpu or auto, or see `metarl doctor`")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def build_agent(
    config: RunConfig,
    spaces: Spaces,
    device: torch.device,
    purpose: Purpose = Purpose.AGENT,
    builder: AgentBuilder | None = None,
) -> Agent:
    """Return a freshly initialised agent.

    Args:
        config: of the run.
        spaces: of its tasks.
        device: where the agent updates.
        purpose: of its random stream.
        builder: builds a custom agent.

    Raises:
        UserError: the config has a custom agent and there is no builder for it, or the other way round.
    """
    custom = isinstance(config.agent, agents.CustomAgentConfig)
    if custom and builder is None:
        raise UserError(
            "the run has a custom agent: give the function that builds it, metarl.train(config, agent=build) or "
            "metarl.load(run_dir, agent=build)"
        )
    if builder is not None and not custom:
        raise UserError(f"the run has the built-in agent {config.agent.name}; leave out agent=")
    stage_ids = len(config.stages) if config.stage_id != "none" else 0
    spec = AgentSpec(spaces, device, integer_seed(config.seed, purpose), stage_ids, config.stage_id == "head")
    return agents.build(config.agent, spec) if builder is None else builder(spec)


def with_custom_agent(config: RunConfig) -> RunConfig:
    """Return the config of a run whose agent Python gives; settings of a built-in agent have no place in it."""
    return config.model_copy(update={"agent": agents.CustomAgentConfig()})


def check_spaces(spaces: Spaces, found: Spaces, bounds: bool = True) -> None:
    """Check that an environment with the spaces `found` fits an agent: the one place that decides it.

    Args:
        spaces: that the agent was trained for.
        found: of the environment.
        bounds: whether the bounds of its actions must be equal, too.

    Raises:
        UserError: observations or actions are others.
    """
    misfit = spaces.misfit(found, bounds)
    if misfit:
        raise UserError(misfit)


def local_collectors(config: RunConfig, distributions: Sequence[TaskDistribution]) -> list[Collector]:
    """Return what collects for each stage, in this process and its workers; stages share what they can.

    Args:
        config: of the run.
        distributions: the tasks of each stage; the same object may come again.
    """
    most = [max_envs(config, stage) for stage in range(len(distributions))]
    envs = make_stage_envs(distributions, most, num_workers(config), config.worker_timeout_s)
    collectors = {id(each): LocalCollector(each) for each in envs}
    return [collectors[id(each)] for each in envs]


def stage_distributions(
    config: RunConfig, given: TaskDistribution | Sequence[TaskDistribution] | None
) -> list[TaskDistribution]:
    """Return the tasks of each stage in its wrappers, one object for equal ones; raises UserError."""
    count = len(config.stages)
    if given is None:
        different = {stage.tasks: _family_tasks(stage) for stage in config.stages}
        own = [different[stage.tasks] for stage in config.stages]
    elif isinstance(given, Sequence) and not hasattr(given, "train_tasks"):
        if len(given) != count:
            raise UserError(f"{len(given)} distributions for {count} stages; give one for each, or one for all")
        check_distinct_tasks(given)
        own = list(given)
    else:
        own = [cast(TaskDistribution, given)] * count
    pairs = [(tasks, stage.wrappers) for tasks, stage in zip(own, config.stages, strict=True)]
    in_wrappers = {(id(tasks), wrappers): add_wrappers(tasks, wrappers) for tasks, wrappers in pairs}
    own = [in_wrappers[id(tasks), wrappers] for tasks, wrappers in pairs]
    if config.stage_id == "none":
        return own
    return [StageIdTasks(distribution, stage, count) for stage, distribution in enumerate(own)]


def task_distribution(stage: StageConfig) -> TaskDistribution:
    """Return the tasks of a stage in its wrappers; raises UserError for tasks that only Python can give."""
    return add_wrappers(_family_tasks(stage), stage.wrappers)


def _family_tasks(stage: StageConfig) -> TaskDistribution:
    """Return the tasks of a stage without its wrappers."""
    if stage.tasks.family not in FAMILIES:
        raise UserError("the tasks are custom ones: train from Python with metarl.train(config, distribution)")
    return FAMILIES[stage.tasks.family].tasks(stage.tasks)


def common_spaces(distributions: Sequence[TaskDistribution]) -> Spaces:
    """Return the observation and action space that all stages have; raises UserError if they differ."""
    spaces = [env_spaces(distribution) for distribution in distributions]
    if len(set(spaces)) > 1:
        raise UserError(
            f"all stages need the same observation and action space; they have {', '.join(map(str, spaces))}"
        )
    return spaces[0]


def stage_managers(config: RunConfig, distributions: Sequence[TaskDistribution]) -> list[Manager]:
    """Return what draws the training tasks of each stage; of joint training one for all. Raises UserError."""
    own = [task_manager(f"stages.{i}", *pair) for i, pair in enumerate(zip(config.stages, distributions, strict=True))]
    return [JointManager(own)] * len(own) if config.control == "joint" else [*own]


def task_manager(setting: str, stage: StageConfig, distribution: TaskDistribution) -> EnvManager:
    """Return what draws the training tasks of a stage, by its curriculum if it has one.

    Args:
        setting: where the stage stands in the config, e.g. `stages.0`.
        stage: its settings.
        distribution: its tasks.

    Raises:
        UserError: there is a curriculum and the tasks have no order of difficulty.
    """
    if not stage.curriculum.iterations:
        return EnvManager(distribution.train_tasks)
    difficulty = getattr(distribution, "difficulty", None)
    if difficulty is None:
        raise UserError(
            f"{setting}.curriculum: these tasks have no order of difficulty; give their distribution a method "
            "`difficulty(task)`, e.g. custom(..., difficulty=...), or leave out the curriculum"
        )
    try:
        curriculum = Curriculum(difficulty, stage.curriculum.start_fraction, stage.curriculum.iterations)
        return EnvManager(distribution.train_tasks, curriculum)
    except ValueError as error:
        raise UserError(f"{setting}.curriculum: {error}") from error


def num_workers(config: RunConfig) -> int:
    """Return how many processes step environments."""
    return config.num_workers if config.num_workers is not None else usable_cores()


def max_envs(config: RunConfig, stage: int) -> int:
    """Return how many environments are stepped together: all rollouts of all tasks, within `Family.kept_envs`."""
    if config.num_envs is not None:
        return config.num_envs
    rollouts = config.rollouts_per_task
    family = FAMILIES.get(config.stages[stage].tasks.family)
    if family is not None and family.kept_envs is not None:
        rollouts = min(rollouts, max(1, family.kept_envs // config.num_tasks))
    return config.num_tasks * rollouts


def family_names() -> dict[str, str]:
    """Return what `distribution_of` understands: name of a benchmark, distribution or Meta-World class → its family."""
    return {name: family for family, entry in FAMILIES.items() for name in entry.names()}


def distribution_of(config: RunConfig, name: str | None = None, stage: str | None = None) -> TaskDistribution:
    """Return the tasks of one of a run's stages, or others with that stage's options; both in that stage's wrappers.

    Args:
        config: of the run.
        name: a key of `family_names`, e.g. `ML10`, `push-v3` or `HalfCheetahVel`; None for the run's own tasks.
        stage: name of the stage; the last one if None. An agent that reads its stage id reads this one.

    Raises:
        UserError: the run was trained on custom tasks and no name is given, or a name is unknown.
    """
    stages = [each.name for each in config.stages]
    if stage is not None and stage not in stages:
        raise UserError(f"the run has no stage {stage!r}; it has {', '.join(stages)}")
    number = len(stages) - 1 if stage is None else stages.index(stage)
    tasks = config.stages[number].tasks
    if name is not None:
        found = _named(name, tasks)
    elif tasks.family in FAMILIES:
        found = FAMILIES[tasks.family].tasks(tasks)
    else:
        raise UserError("the run has custom tasks: evaluate it from Python with metarl.evaluate(…, make=…)")
    found = add_wrappers(found, config.stages[number].wrappers)
    return found if config.stage_id == "none" else StageIdTasks(found, number, len(stages))


def _named(name: str, like: Any) -> TaskDistribution:
    """Return the tasks of a name with the options of others."""
    families = family_names()
    if name not in families:
        raise UserError(str(unknown_name("task or benchmark", name, families, "metarl list envs")))
    family = families[name]
    options = like.model_dump(include=set(FAMILIES[family].carried_options)) if like.family == family else {}
    return distribution(family, **options, **FAMILIES[family].names()[name])


def task_of(config: RunConfig, name: str | None = None, split: str = "test", stage: str | None = None) -> Task:
    """Return one task: `reach-v3` is the first of that class, `reach-v3:7` the one with index 7 among them.

    Args:
        config: of the run, whose options the task has.
        name: of a class of the run's tasks, or anything that `distribution_of` understands; None: the run's first task.
        split: `test` or `train`.
        stage: name of the stage; the last one if None.

    Raises:
        UserError: there is no such task.
    """
    if name is None:
        return _split(distribution_of(config, None, stage), split)[0]
    wanted, _, number = name.partition(":")
    if number and not (number.isascii() and number.isdigit() and len(number) < 10):
        raise UserError(f"task {name!r}: expected a number behind the colon, e.g. {wanted}:3")
    found: list[Task] = []
    if all(each.tasks.family in FAMILIES for each in config.stages):
        found = [task for task in _split(distribution_of(config, None, stage), split) if task.name == wanted]
    found = found or _split(distribution_of(config, wanted, stage), split)
    index = int(number or 0)
    if index >= len(found):
        raise UserError(f"there is no {name}; the {split} split has {len(found)} of {wanted}, counted from 0")
    return found[index]


def horizon_of(config: RunConfig) -> int | None:
    """Return the steps of an episode in a run's last stage; None for custom tasks, which the config does not know."""
    if config.stages[-1].tasks.family not in FAMILIES:
        return None
    return int(distribution_of(config).train_tasks[0].option("horizon"))


def env_of(config: RunConfig) -> gymnasium.Env[Any, Any] | None:
    """Return the environment of the first held-out task of a run's last stage; None for custom tasks."""
    if config.stages[-1].tasks.family not in FAMILIES:
        return None
    return make(task_of(config))


def _split(tasks: TaskDistribution, split: str) -> list[Task]:
    return tasks.test_tasks if split == "test" else tasks.train_tasks
