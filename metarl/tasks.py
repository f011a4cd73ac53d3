"""Which tasks a run is about: those of its stages, or others by name."""

from __future__ import annotations

from typing import Any

import gymnasium

from metarl.config import RunConfig
from metarl.envs import FAMILIES, CuedTasks, distribution, make
from metarl.errors import UserError, unknown_name
from metarl.types import Task, TaskDistribution


def family_names() -> dict[str, str]:
    """Return what `distribution_of` understands: name of a benchmark, distribution or Meta-World class → its family."""
    return {name: family for family, entry in FAMILIES.items() for name in entry.names()}


def distribution_of(config: RunConfig, name: str | None = None, stage: str | None = None) -> TaskDistribution:
    """Return the tasks of one of a run's stages, or others with that stage's options.

    Args:
        config: of the run.
        name: a key of `family_names`, e.g. `ML10`, `push-v3` or `HalfCheetahVel`; None for the run's own tasks.
        stage: name of the stage; the last one if None. An agent that is told its stage is told this one.

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
    return found if config.stage_cue == "none" else CuedTasks(found, number, len(stages))


def _named(name: str, like: Any) -> TaskDistribution:
    """Return the tasks of a name with the options of others."""
    families = family_names()
    if name not in families:
        raise UserError(str(unknown_name("task or benchmark", name, families, "metarl list envs")))
    family = families[name]
    options = like.model_dump(include={"seed", "horizon", "reward_version"}) if like.family == family else {}
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
