"""The ids by which gymnasium knows metarl's environments; importing `metarl.envs` registers them.

They are `metarl/HalfCheetahDir-v0`, `metarl/NavigationGoals-v0`, `metarl/reach-v3` and so on: one for each family of
tasks. Gymnasium loads no plugins by itself since its version 1.0, so a program says where the ids come from:

    import gymnasium
    import metarl

    gymnasium.register_envs(metarl.envs)
    env = gymnasium.make("metarl/reach-v3", split="test", index=3)

or `gymnasium.make("metarl.envs:metarl/reach-v3")`. The names are written out here, so that Meta-World, which has most
of them, is imported when one of its environments is made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import gymnasium

from metarl.types import Task

_MUJOCO = "HalfCheetahDir HalfCheetahVel AntDir AntGoal HumanoidDir HopperRandParams Walker2DRandParams"
_NAVIGATION = "goals semicircle cued_wedges rotated_wedges rotated_cued_wedges"
_METAWORLD = (
    "assembly basketball bin-picking box-close button-press-topdown button-press-topdown-wall button-press "
    "button-press-wall coffee-button coffee-pull coffee-push dial-turn disassemble door-close door-lock door-open "
    "door-unlock hand-insert drawer-close drawer-open faucet-open faucet-close hammer handle-press-side handle-press "
    "handle-pull-side handle-pull lever-pull pick-place-wall pick-out-of-hole pick-place plate-slide plate-slide-side "
    "plate-slide-back plate-slide-back-side peg-insert-side peg-unplug-side soccer stick-push stick-pull push "
    "push-wall push-back reach reach-wall shelf-place sweep-into sweep window-open window-close"
)

ENVIRONMENTS: Mapping[str, tuple[str, str]] = {
    **{f"metarl/{name}-v0": ("mujoco", name) for name in _MUJOCO.split()},
    **{f"metarl/Navigation{name.title().replace('_', '')}-v0": ("navigation", name) for name in _NAVIGATION.split()},
    **{f"metarl/{name}-v3": ("metaworld", f"{name}-v3") for name in _METAWORLD.split()},
}
"""The ids: each with the family of its tasks, and the name that chooses them there (see `metarl list envs`)."""


def register_envs() -> None:
    """Register the ids of `ENVIRONMENTS` with gymnasium; twice is as good as once."""
    for environment, (family, name) in ENVIRONMENTS.items():
        if environment not in gymnasium.registry:
            settings = {"family": family, "name": name}
            # The checker of every first step would warn of Meta-World's three zeros where the goal is hidden.
            gymnasium.register(environment, "metarl.envs.registration:make", disable_env_checker=True, kwargs=settings)


def make(
    family: str,
    name: str,
    task: Task | str | Mapping[str, Any] | None = None,
    split: str = "train",
    index: int = 0,
    render_mode: str | None = None,
    **options: Any,
) -> gymnasium.Env[Any, Any]:
    """Build the environment of a task: what `gymnasium.make(id, ...)` calls, with the id's family and name.

    The environment truncates its episodes at the task's horizon by itself; `horizon=50` says another one.

    Args:
        family: `mujoco`, `navigation` or `metaworld`.
        name: which of its distributions, or which class of Meta-World (ML1).
        task: a task of that name, or what `Task.to_json` wrote of it; in a spec that was JSON it is a mapping. None for
            one of the distribution's own.
        split: `train` or `test`: where to take the task from, if none is given.
        index: which of that split's tasks.
        render_mode: `rgb_array` for an environment whose `render` returns a picture.
        options: settings of the distribution, e.g. `horizon` and `seed`.

    Raises:
        ValueError: no such task or option, or a task together with what would choose one.
    """
    from metarl.envs import FAMILIES, distribution
    from metarl.envs import make as make_env

    if task is not None:
        if (split, index, options) != ("train", 0, {}):
            raise ValueError(f"got a task and split={split!r}, index={index}, options {options}; a task fixes them all")
        return make_env(_task(task, family, name), render_mode)
    tasks = distribution(family, **FAMILIES[family].names()[name], **options)
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; expected 'train' or 'test'")
    choices = tasks.train_tasks if split == "train" else tasks.test_tasks
    if not 0 <= index < len(choices):
        raise ValueError(f"index is {index}; the {split} split of {name} has tasks 0 to {len(choices) - 1}")
    return make_env(choices[index], render_mode)


def _task(given: Task | str | Mapping[str, Any], family: str, name: str) -> Task:
    """Return the task that was given in one form or another; raises ValueError if it is not one of that name."""
    if not isinstance(given, Task):
        given = Task.from_json(given if isinstance(given, str) else json.dumps(dict(given)))
    if given.family != family or name not in (given.benchmark, given.name):
        raise ValueError(f"the task is {given.to_json()}; expected one of {family} {name}")
    return given
