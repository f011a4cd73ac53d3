"""Task distributions and how to step them: metaworld, mujoco, navigation, or one of the user's own.

May import numpy, gymnasium and simulators, of metarl `types`, `errors` and `rendering`; never torch, agents or
training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import gymnasium
from pydantic import BaseModel

from metarl.envs import navigation
from metarl.envs.custom import custom
from metarl.envs.metaworld import env as metaworld_env
from metarl.envs.mujoco import env as mujoco_env
from metarl.envs.registration import register_envs
from metarl.envs.stage_id import StageIdEnv, StageIdTasks, has_stage_id, without_stage_id
from metarl.errors import unknown_name
from metarl.protocols import TaskDistribution
from metarl.types import Task

__all__ = ["FAMILIES", "Family", "StageIdTasks", "custom", "distribution", "make"]


class Family(NamedTuple):
    """What a family consists of; a new one is one file and one entry in `FAMILIES`.

    Attributes:
        config: its settings.
        tasks: builds a task distribution from a config.
        make: builds the environment of a task, which draws itself if `render_mode="rgb_array"`.
        names: returns what there is to choose from: name → the settings that choose it.
        shared_splits: benchmarks with so few tasks that training and test tasks are the same ones.
    """

    config: type[BaseModel]
    tasks: Callable[[Any], TaskDistribution]
    make: Callable[[Task, str | None], gymnasium.Env[Any, Any]]
    names: Callable[[], Mapping[str, Mapping[str, str]]]
    shared_splits: frozenset[str] = frozenset()


FAMILIES: Mapping[str, Family] = {
    "metaworld": Family(
        metaworld_env.MetaWorldConfig, metaworld_env.MetaWorldTasks, metaworld_env.make, metaworld_env.choices
    ),
    "mujoco": Family(
        mujoco_env.MujocoConfig, mujoco_env.MujocoTasks, mujoco_env.make, mujoco_env.choices, mujoco_env.SHARED_SPLITS
    ),
    "navigation": Family(
        navigation.NavigationConfig, navigation.NavigationTasks, navigation.NavigationEnv, navigation.choices
    ),
}


def distribution(family: str, **options: Any) -> TaskDistribution:
    """Return a task distribution, e.g. `distribution("metaworld", benchmark="ML10", seed=0)`.

    Args:
        family: a key of `FAMILIES`.
        options: the fields of the family's config.

    Raises:
        ValueError: unknown family, option or task name (pydantic's ValidationError is one); names the nearest.
    """
    entry = _family(family)
    return entry.tasks(entry.config(**options))


def make(task: Task, render_mode: str | None = None) -> gymnasium.Env[Any, Any]:
    """Build the environment of a task of a built-in family.

    Args:
        task: one of `StageIdTasks` gives observations that end in its cue.
        render_mode: `rgb_array` for an environment whose `render` returns a picture, `[H, W, 3]`.

    Raises:
        ValueError: a task of another family, or an unknown mode.
    """
    if has_stage_id(task):
        return StageIdEnv(make(without_stage_id(task), render_mode), task)
    return _family(task.family).make(task, render_mode)


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise unknown_name("task family", name, FAMILIES, "metarl list envs")
    return FAMILIES[name]


register_envs()
