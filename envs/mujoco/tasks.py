"""Tasks of the MuJoCo locomotion families: settings, names, training and held-out tasks.

Does not import MuJoCo: `env.py` applies a task to the simulator, and `bodies.py` defines the observations and rewards
of each family.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from metarl.errors import unknown_name
from metarl.settings import Settings
from metarl.types import Scalar, Task

if TYPE_CHECKING:
    from metarl.envs.mujoco.env import MujocoTaskEnv

Name = Literal[
    "HalfCheetahDir", "HalfCheetahVel", "AntDir", "AntGoal", "HumanoidDir", "HopperRandParams", "Walker2DRandParams"
]

NAMES: tuple[str, ...] = get_args(Name)
"""The families, in the order in which `metarl list envs` shows them."""

SHARED_SPLITS = frozenset({"HalfCheetahDir"})
"""Families with too few tasks for a held-out split: training and test tasks are the same."""

SPLITS = ("train", "test")
"""The splits of a task; the position of each is part of the seed of its tasks."""

DIRECTIONS = {"HalfCheetahDir-forward": 1.0, "HalfCheetahDir-backward": -1.0}
"""The classes of HalfCheetahDir."""

VELOCITY = (0.0, 2.0)
"""Default range in m/s of the target velocities of HalfCheetahVel."""

Scaled = Literal["body_mass", "body_inertia", "dof_damping", "geom_friction"]

SCALED_PARAMETERS: dict[Scaled, float] = {
    "body_mass": 1.5,
    "body_inertia": 1.5,
    "dof_damping": 1.3,
    "geom_friction": 1.5,
}
"""Arrays of the model that a RandParams task scales, each with the base b of its multipliers b^U(−3, 3)."""


def _split_words(value: object) -> object:
    """Return the tuple of words of a string, which is how a task option stores a list."""
    return tuple(value.split()) if isinstance(value, str) else value


class MujocoConfig(Settings):
    """MuJoCo locomotion tasks: bodies, observations, reset noise and time steps of gymnasium's v5 environments.

    v is the displacement over one control step divided by its duration (of the centre of mass for Humanoid, the torso
    for Ant, the root joint for the others), |a|² the sum of squared actions. Actions are not clipped for the costs.

    - `HalfCheetahDir`: reward = ±v − 0.05 |a|². Two tasks in all, forward and backward, a class each. Finn et al. 2017,
      5.3 (maml_rl, ProMP; v of the root joint as in ProMP). Never terminates.
    - `HalfCheetahVel`: reward = −|v − target| − 0.05 |a|², target in U(0, 2) as in maml_rl, or uniform in
      `velocity`; ProMP's and PEARL's code draw from U(0, 3). Never terminates.
    - `AntDir`: reward = v · direction + 1 − 0.5 |a|² − 5e-4 · contact, the angle in U(0, 2π) (ProMP, PEARL; maml_rl has
      only forward and backward). Terminates when the height leaves [0.2, 1.0] (PEARL; ProMP [0, 1]).
    - `AntGoal`: reward = −‖torso − goal‖₁ − 0.1 |a|² − 5e-4 · contact, goals uniform in the disc of radius 3, never
      terminates, and the observation begins with the position (ProMP, PEARL). maml_rl differs: goals in [−3, 3]²,
      4 + 0.05 more a step, control cost 0.005 |a|², termination by height.
    - `HumanoidDir`: reward = 1.25 v · direction + 5 − 0.1 |a|² − contact, the angle in U(0, 2π) (ProMP, PEARL; their
      0.25 / timestep is the same 1.25). Terminates when the height leaves (1, 2).
    - `HopperRandParams`, `Walker2DRandParams`: reward = v + 1 − 0.001 |a|². Body masses, inertias and contact frictions
      are multiplied by 1.5^U(−3, 3), joint dampings by 1.3^U(−3, 3), each element independently (rand_param_envs);
      `scaled` restricts this to some of the arrays. Terminate by height and angle. Deviation: a control step of the
      walker is 4 physics steps as in gymnasium, not 5.

    Contact costs, alive bonuses and health conditions are gymnasium's defaults; so AntDir at 0° is Ant-v5, HumanoidDir
    at 0° is Humanoid-v5, and both RandParams with all multipliers 1 are Hopper-v5 and Walker2d-v5. Published horizons:
    200 in maml_rl and PEARL, 100 in ProMP.
    """

    family: Literal["mujoco"] = "mujoco"
    name: Name = Field("HalfCheetahDir", description="task family")
    horizon: int = Field(200, ge=1, le=1000, description="control steps per episode, which is then truncated")
    num_train: int = Field(100, ge=1, description="number of training tasks; HalfCheetahDir always has its two")
    num_test: int = Field(
        40, ge=1, description="number of held-out tasks; HalfCheetahDir always has the same two as in training"
    )
    velocity: Annotated[tuple[float, float] | None, BeforeValidator(_split_words)] = Field(
        None, description="range of the target velocities in m/s (HalfCheetahVel only); none: 0 to 2"
    )
    scaled: Annotated[tuple[Scaled, ...], BeforeValidator(_split_words)] = Field(
        tuple(SCALED_PARAMETERS), min_length=1, description="arrays of the body that are scaled (RandParams only)"
    )
    seed: int = Field(0, ge=0, description="seed of the tasks")

    @field_validator("name", mode="before")
    @classmethod
    def _check_name(cls, name: object) -> object:
        if isinstance(name, str) and name not in NAMES:
            raise unknown_name("MuJoCo family", name, NAMES, "metarl list envs")
        return name

    @field_validator("velocity")
    @classmethod
    def _check_increasing(cls, velocity: tuple[float, float] | None) -> tuple[float, float] | None:
        if velocity is not None and velocity[0] >= velocity[1]:
            raise ValueError(f"velocity is {velocity}; expected the lower bound, then the upper one")
        return velocity

    @field_validator("scaled")
    @classmethod
    def _sort_unique(cls, scaled: tuple[Scaled, ...]) -> tuple[Scaled, ...]:
        if len(set(scaled)) < len(scaled):
            raise ValueError(f"scaled {scaled} lists an array twice; list each once")
        return tuple(field for field in SCALED_PARAMETERS if field in scaled)  # their order has no effect

    @model_validator(mode="after")
    def _check_options_apply(self) -> MujocoConfig:
        if self.velocity is not None and self.name != "HalfCheetahVel":
            raise ValueError(f"velocity={self.velocity} with name={self.name!r}: only HalfCheetahVel has targets")
        if self.scaled != tuple(SCALED_PARAMETERS) and not self.name.endswith("RandParams"):
            raise ValueError(f"scaled={self.scaled} with name={self.name!r}: only RandParams families scale arrays")
        return self


class MujocoTasks:
    """The tasks of one MuJoCo family; task i of a split does not depend on the number of tasks."""

    def __init__(self, config: MujocoConfig) -> None:
        self.config = config

    @functools.cached_property
    def train_tasks(self) -> list[Task]:
        """Tasks to meta-train on."""
        return self._tasks("train", self.config.num_train)

    @functools.cached_property
    def test_tasks(self) -> list[Task]:
        """Held-out tasks, drawn independently of `train_tasks`; for HalfCheetahDir the same two directions."""
        return self._tasks("test", self.config.num_test)

    def make(self, task: Task) -> MujocoTaskEnv:
        """Build the environment of `task`."""
        return make(task)

    @staticmethod
    def retarget(env: MujocoTaskEnv, task: Task) -> None:
        """Give an environment that `make` built another task of its class; takes effect at the next reset."""
        env.set_task(task)

    def difficulty(self, task: Task) -> float:
        """Return the difficulty of a task; see `metarl.envs.mujoco.env.difficulty`."""
        from metarl.envs.mujoco.env import difficulty

        return difficulty(task)

    def _tasks(self, split: str, number: int) -> list[Task]:
        config = self.config
        indices = range(1 if config.name in SHARED_SPLITS else number)
        options: dict[str, Scalar] = {"horizon": config.horizon}
        if config.velocity not in (None, VELOCITY):
            options["velocity"] = " ".join(map(repr, config.velocity))
        if config.scaled != tuple(SCALED_PARAMETERS):
            options["scaled"] = " ".join(config.scaled)
        return [
            Task("mujoco", config.name, split, class_name, index, config.seed, tuple(options.items()))
            for class_name in _classes(config.name)
            for index in indices
        ]


def make(task: Task, render_mode: str | None = None) -> MujocoTaskEnv:
    """Build the environment of `task` from the task alone; raises ValueError if it belongs to no such family."""
    from metarl.envs.mujoco.env import MujocoTaskEnv

    return MujocoTaskEnv(task, render_mode)


def names() -> dict[str, dict[str, str]]:
    """Return the families by name: name → the settings that select it."""
    return {name: {"name": name} for name in NAMES}


def task_config(task: Task) -> MujocoConfig:
    """Return the settings of a task; raises ValueError if it belongs to none of these families."""
    options: dict[str, Any] = dict(task.options)
    config = MujocoConfig.model_validate({"family": task.family, "name": task.benchmark, "seed": task.seed, **options})
    if task.name not in _classes(config.name):
        raise unknown_name(f"class of {config.name}", task.name, _classes(config.name), "metarl list envs")
    if task.split not in SPLITS:
        raise ValueError(f"task.split is {task.split!r}; expected one of {SPLITS}")
    return config


def _classes(name: str) -> tuple[str, ...]:
    return tuple(DIRECTIONS) if name == "HalfCheetahDir" else (name,)
