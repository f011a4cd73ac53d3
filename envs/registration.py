"""Gymnasium ids of metarl's environments; importing `metarl.envs` registers them.

The ids are `metarl/HalfCheetahDir-v0`, `metarl/NavigationGoals-v0`, `metarl/reach-v3` and so on: one for each name in
`metarl.envs.FAMILIES` that has a single kind of environment. Gymnasium has loaded no plugins by itself since version
1.0, so a program has to register the ids:

    import gymnasium
    import metarl

    gymnasium.register_envs(metarl.envs)
    env = gymnasium.make("metarl/reach-v3", split="test", index=3)

or call `gymnasium.make("metarl.envs:metarl/reach-v3")`. A simulator is imported when its first environment is built.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import gymnasium

from metarl.types import Task

if TYPE_CHECKING:
    from metarl.envs import Family

ENVIRONMENTS: dict[str, tuple[str, str]] = {}
"""The registered ids: id → (family, name of the distribution or class; see `metarl list envs`)."""


def versioned_id(name: str) -> str:
    """Return the gymnasium id of a name whose version is 0."""
    return f"metarl/{name}-v0"


def register_envs(families: Mapping[str, Family]) -> None:
    """Register the ids of all names of `families` with gymnasium; calling it twice changes nothing."""
    for family, entry in families.items():
        for name in entry.names():
            env_id = entry.env_id(name)
            if env_id is None:
                continue
            ENVIRONMENTS[env_id] = family, name
            if env_id not in gymnasium.registry:
                settings = {"family": family, "name": name}
                # At the first step, gymnasium's checker would warn about the three zeros of Meta-World's hidden goal.
                gymnasium.register(env_id, "metarl.envs.registration:make", disable_env_checker=True, kwargs=settings)


def make(
    family: str,
    name: str,
    task: Task | str | Mapping[str, Any] | None = None,
    split: str = "train",
    index: int = 0,
    render_mode: str | None = None,
    **options: Any,
) -> gymnasium.Env[Any, Any]:
    """Build the environment of a task; `gymnasium.make(id, ...)` calls this with the family and name of the id.

    The environment truncates its own episodes at the horizon of the task; pass e.g. `horizon=50` to change it.

    Args:
        family: a key of `metarl.envs.FAMILIES`.
        name: a distribution of the family, or a class of Meta-World (ML1).
        task: a task of that name, or the output of `Task.to_json` as a string or, from a deserialised spec, a mapping.
            None selects a task by `split` and `index`.
        split: `train` or `test`, if there is no `task`.
        index: the position of the task in the split.
        render_mode: `rgb_array` for an environment whose `render` returns an image.
        options: the settings of the distribution, e.g. `horizon` and `seed`.

    Raises:
        ValueError: no such task or option, or both a task and arguments that select one.
    """
    from metarl.envs import FAMILIES, distribution
    from metarl.envs import make as make_env

    if task is not None:
        if (split, index, options) != ("train", 0, {}):
            raise ValueError(f"got a task with split={split!r}, index={index}, options={options}; pass the task alone")
        return make_env(_parse_task(task, family, name), render_mode)
    tasks = distribution(family, **FAMILIES[family].names()[name], **options)
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; expected 'train' or 'test'")
    candidates = tasks.train_tasks if split == "train" else tasks.test_tasks
    if not 0 <= index < len(candidates):
        raise ValueError(f"index is {index}; the {split} split of {name} has tasks 0 to {len(candidates) - 1}")
    return make_env(candidates[index], render_mode)


def _parse_task(task: Task | str | Mapping[str, Any], family: str, name: str) -> Task:
    """Return the task, parsed if it is JSON; raises ValueError if it does not belong to `name`."""
    if not isinstance(task, Task):
        task = Task.from_json(task if isinstance(task, str) else json.dumps(dict(task)))
    if task.family != family or name not in (task.benchmark, task.name):
        raise ValueError(f"the task is {task.to_json()}; expected a task of {family} {name}")
    return task
