"""What the stages of a run are made of: their tasks, what draws them, how many environments, and what guards them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from metarl import stability
from metarl.checkpoint import Checkpoint, CorruptCheckpointError, Spaces
from metarl.config import RunConfig, StageConfig
from metarl.envs import FAMILIES, CuedTasks
from metarl.envs.manager import Curriculum, EnvManager, JointManager, Manager
from metarl.envs.slots import POOL, env_spaces
from metarl.envs.together import check_apart
from metarl.envs.vector import usable_cores
from metarl.errors import UserError
from metarl.types import StabilityMethod, TaskDistribution


def stage_distributions(
    config: RunConfig, given: TaskDistribution | Sequence[TaskDistribution] | None
) -> list[TaskDistribution]:
    """Return the tasks of each stage, one object for equal ones; raises UserError."""
    count = len(config.stages)
    if given is None:
        different = {stage.tasks: task_distribution(stage) for stage in config.stages}
        own = [different[stage.tasks] for stage in config.stages]
    elif isinstance(given, Sequence) and not hasattr(given, "train_tasks"):
        if len(given) != count:
            raise UserError(f"{len(given)} distributions for {count} stages; give one for each, or one for all")
        check_apart(given)
        own = list(given)
    else:
        own = [cast(TaskDistribution, given)] * count
    if config.stage_cue == "none":
        return own
    return [CuedTasks(distribution, stage, count) for stage, distribution in enumerate(own)]


def load_methods(methods: Sequence[StabilityMethod], checkpoint: Checkpoint) -> None:
    """Give stability methods back what they knew; raises UserError."""
    if "stability" in checkpoint.parts and not methods:
        raise UserError(f"{checkpoint.path} was trained with stability methods of your own; give the same ones again")
    try:
        stability.load_state_dict(methods, checkpoint.load("stability"))
    except (ValueError, CorruptCheckpointError) as error:
        raise UserError(f"{checkpoint.path} does not fit the run's stability methods: {error}") from error


def task_distribution(stage: StageConfig) -> TaskDistribution:
    """Return the tasks of a stage; raises UserError for tasks that only Python can give."""
    if stage.tasks.family not in FAMILIES:
        raise UserError("the tasks are custom ones: train from Python with metarl.train(config, distribution)")
    return FAMILIES[stage.tasks.family].tasks(stage.tasks)


def common_spaces(distributions: Sequence[TaskDistribution]) -> Spaces:
    """Return the observation and action space that all stages have; raises UserError if they differ."""
    spaces = [_spaces(distribution) for distribution in distributions]
    if len(set(spaces)) > 1:
        raise UserError(
            f"all stages need the same observation and action space; they have {', '.join(map(str, spaces))}"
        )
    return spaces[0]


def _spaces(distribution: TaskDistribution) -> Spaces:
    observation_space, action_space = env_spaces(distribution)
    low, high = (tuple(float(bound) for bound in bounds) for bounds in (action_space.low, action_space.high))
    return Spaces(observation_space.shape[0], low, high)


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
        UserError: a curriculum is asked for and the tasks have no order of difficulty.
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
    """Return how many are stepped together: all rollouts of all tasks; of Meta-World, 3.2 MB each, a pool's worth."""
    if config.num_envs is not None:
        return config.num_envs
    rollouts = config.rollouts_per_task
    if config.stages[stage].tasks.family == "metaworld":
        rollouts = min(rollouts, max(1, POOL // config.num_tasks))
    return config.num_tasks * rollouts
