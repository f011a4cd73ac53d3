"""Task distributions and environments: Meta-World, MuJoCo locomotion, 2D navigation, and your own.

This file is the registry of task families: a new family is one file (or folder), one member of `BuiltinTasksConfig` and
one entry of `FAMILIES`. Next to it are the env manager (`manager.py`, a task sampler), wrappers (`wrappers`), the
vectorized environments (`vector`), the gymnasium ids (`registration.py`) and off-screen rendering (`drawing`).

May import numpy, gymnasium and simulators; of metarl `settings`, `types`, `protocols` and `errors`. Never torch, agents
or training. Importing it loads neither Meta-World nor MuJoCo.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import gymnasium
from pydantic import BaseModel

from metarl.envs import navigation
from metarl.envs.custom import custom
from metarl.envs.metaworld import env as metaworld_env
from metarl.envs.mujoco import tasks as mujoco_tasks
from metarl.envs.registration import register_envs, versioned_id
from metarl.envs.stage_id import StageIdEnv, StageIdTasks, has_stage_id, without_stage_id
from metarl.envs.vector.pool import POOL
from metarl.envs.wrapped import WrappedTasks, add_wrappers, has_wrappers, without_wrappers, wrap_env
from metarl.envs.wrappers import WrapperConfig
from metarl.errors import unknown_name
from metarl.protocols import TaskDistribution
from metarl.types import Task

__all__ = [
    "FAMILIES",
    "BuiltinTasksConfig",
    "Family",
    "StageIdTasks",
    "WrappedTasks",
    "WrapperConfig",
    "add_wrappers",
    "custom",
    "distribution",
    "make",
]


class Family(NamedTuple):
    """A family of tasks, as the rest of metarl uses it.

    Attributes:
        config: its settings.
        tasks: builds a task distribution from a config.
        make: builds the environment of a task, given the task and `render_mode`.
        names: returns the names that users choose from: name → the settings that select it.
        example: settings of one distribution, which `metarl doctor` steps for a moment.
        env_id: returns the gymnasium id of a name; None for a name with several classes of tasks.
        carried_options: settings that stay the same when a run is evaluated under another name of the family.
        shared_splits: names with so few tasks that training and test tasks are the same.
        kept_envs: environments that a run steps together at most, unless `num_envs` is set, because each needs much
            memory; None: no limit.
    """

    config: type[BaseModel]
    tasks: Callable[[Any], TaskDistribution]
    make: Callable[[Task, str | None], gymnasium.Env[Any, Any]]
    names: Callable[[], Mapping[str, Mapping[str, Any]]]
    example: Mapping[str, Any]
    env_id: Callable[[str], str | None] = versioned_id
    carried_options: frozenset[str] = frozenset({"seed", "horizon"})
    shared_splits: frozenset[str] = frozenset()
    kept_envs: int | None = None


BuiltinTasksConfig = metaworld_env.MetaWorldConfig | mujoco_tasks.MujocoConfig | navigation.NavigationConfig
"""Settings of the built-in families, distinguished by the field `family`."""

FAMILIES: Mapping[str, Family] = {
    "metaworld": Family(
        config=metaworld_env.MetaWorldConfig,
        tasks=metaworld_env.MetaWorldTasks,
        make=metaworld_env.make,
        names=metaworld_env.names,
        example={"benchmark": "ML1", "name": "reach-v3"},
        env_id=metaworld_env.env_id,
        carried_options=frozenset({"seed", "horizon", "reward_version"}),
        kept_envs=POOL,  # 3.2 MB each
    ),
    "mujoco": Family(
        config=mujoco_tasks.MujocoConfig,
        tasks=mujoco_tasks.MujocoTasks,
        make=mujoco_tasks.make,
        names=mujoco_tasks.names,
        example={"name": "HalfCheetahDir"},
        shared_splits=mujoco_tasks.SHARED_SPLITS,
    ),
    "navigation": Family(
        config=navigation.NavigationConfig,
        tasks=navigation.NavigationTasks,
        make=navigation.NavigationEnv,
        names=navigation.names,
        example={"name": "goals"},
        env_id=navigation.env_id,
    ),
}
"""The built-in families, by the value of `family` in their settings."""


def distribution(
    family: str, *, wrappers: Iterable[Mapping[str, Any] | BaseModel] = (), **options: Any
) -> TaskDistribution:
    """Return a task distribution, e.g. `distribution("metaworld", benchmark="ML10", seed=0)`.

    Args:
        family: a key of `FAMILIES`.
        wrappers: settings of environment wrappers, e.g. `[{"name": "frame_stack", "frames": 4}]`, from the innermost to
            the outermost.
        options: the fields of the family's config.

    Raises:
        ValueError: unknown family, option, wrapper or task name (pydantic's ValidationError is one); names the nearest.
    """
    entry = _family(family)
    return add_wrappers(entry.tasks(entry.config(**options)), wrappers)


def make(task: Task, render_mode: str | None = None) -> gymnasium.Env[Any, Any]:
    """Build the environment of a task of a built-in family.

    Args:
        task: a task; if it is one of `WrappedTasks`, its environment is in wrappers; if it is one of `StageIdTasks`,
            observations end in the one-hot stage id.
        render_mode: `rgb_array` for an environment whose `render` returns an image, `[H, W, 3]`.

    Raises:
        ValueError: a task of another family, or an unknown mode.
        UserError: the task has a wrapper that does not support its spaces.
    """
    if has_stage_id(task):
        return StageIdEnv(make(without_stage_id(task), render_mode), task)
    if has_wrappers(task):
        return wrap_env(make(without_wrappers(task), render_mode), task)
    return _family(task.family).make(task, render_mode)


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise unknown_name("task family", name, FAMILIES, "metarl list envs")
    return FAMILIES[name]


register_envs(FAMILIES)
