"""Task distributions and how to step them: metaworld, mujoco, navigation, or one of the user's own.

May import numpy, gymnasium and simulators, `metarl.types` and `metarl.errors`; never torch, agents or training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import gymnasium
from pydantic import BaseModel

from metarl.envs.custom import custom
from metarl.envs.metaworld import MetaWorldConfig, MetaWorldTasks
from metarl.envs.metaworld import make as make_metaworld
from metarl.envs.mujoco import MujocoConfig, MujocoTasks
from metarl.envs.mujoco import make as make_mujoco
from metarl.envs.navigation import NavigationConfig, NavigationEnv, NavigationTasks
from metarl.errors import unknown_name
from metarl.types import Task, TaskDistribution

__all__ = ["FAMILIES", "Family", "custom", "distribution", "make"]


class Family(NamedTuple):
    """What a family consists of; a new one is one file and one entry in `FAMILIES`."""

    config: type[BaseModel]
    tasks: Callable[[Any], TaskDistribution]
    make: Callable[[Task], gymnasium.Env[Any, Any]]


FAMILIES: Mapping[str, Family] = {
    "metaworld": Family(MetaWorldConfig, MetaWorldTasks, make_metaworld),
    "mujoco": Family(MujocoConfig, MujocoTasks, make_mujoco),
    "navigation": Family(NavigationConfig, NavigationTasks, NavigationEnv),
}


def distribution(family: str, **options: Any) -> TaskDistribution:
    """Return a task distribution, e.g. `distribution("metaworld", benchmark="ML10", seed=0)`.

    Args:
        family: a key of `FAMILIES`.
        options: the fields of the family's config.

    Raises:
        ValueError: unknown family, option or task name (pydantic's ValidationError is one), with the nearest that exists.
    """
    entry = _family(family)
    return entry.tasks(entry.config(**options))


def make(task: Task) -> gymnasium.Env[Any, Any]:
    """Build the environment of a task of a built-in family; raises ValueError for another family."""
    return _family(task.family).make(task)


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise unknown_name("task family", name, FAMILIES, "metarl list envs")
    return FAMILIES[name]
