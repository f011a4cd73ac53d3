"""MuJoCo locomotion: seven families of tasks on gymnasium's v5 bodies. Owns their tasks and how they are stepped.

What differs between the families is in `bodies.py`. Imports neither torch nor the rest of metarl but `types`, `errors`
and `rendering`.

MuJoCo is stepped directly, without gymnasium's environment classes, and equals them to the bit: the first observation
after `reset(seed=...)`, every observation, every reward where the definitions coincide, and `terminated`.
"""

from __future__ import annotations

import copy
import functools
from typing import Annotated, Any, Literal, get_args

import gymnasium
import mujoco
import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, field_validator, model_validator

from metarl.envs.drawing.camera import Camera
from metarl.envs.drawing.rendering import check_render_mode, render_metadata
from metarl.envs.mujoco import naming
from metarl.envs.mujoco.bodies import (
    DIRECTIONS,
    FAMILIES,
    SCALED_PARAMETERS,
    VELOCITY,
    Parameters,
    Scaled,
    draw_multipliers,
    nominal_model,
)
from metarl.errors import unknown_name
from metarl.settings import Settings
from metarl.types import FloatArray, Scalar, Task

Name = Literal[
    "HalfCheetahDir", "HalfCheetahVel", "AntDir", "AntGoal", "HumanoidDir", "HopperRandParams", "Walker2DRandParams"
]

NAMES: tuple[str, ...] = get_args(Name)
"""The families, in the order in which they are listed."""

SHARED_SPLITS = frozenset({"HalfCheetahDir"})
"""Distributions that have so few tasks that training and test tasks are the same ones."""

_SPLITS = ("train", "test")


def _words(value: object) -> object:
    """Let a string stand for a list of its words: how a task's option holds one."""
    return tuple(value.split()) if isinstance(value, str) else value


class MujocoConfig(Settings):
    """MuJoCo locomotion tasks: bodies, observations, noise at reset and time steps of gymnasium's v5 environments.

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
      are multiplied by 1.5^U(−3, 3), joint dampings by 1.3^U(−3, 3), each element on its own (rand_param_envs);
      with `scaled` these of the arrays alone. Terminate by height and angle. Deviation: a control step of the walker is
      4 physics steps as in gymnasium, not 5.

    Costs of contact, bonuses for being alive and conditions of health are gymnasium's defaults; so AntDir at 0° is
    Ant-v5, HumanoidDir at 0° is Humanoid-v5, and both RandParams with all multipliers 1 are Hopper-v5 and Walker2d-v5.
    Published horizons: 200 in maml_rl and PEARL, 100 in ProMP.
    """

    family: Literal["mujoco"] = "mujoco"
    name: Name = Field("HalfCheetahDir", description="which family of tasks")
    horizon: int = Field(200, ge=1, le=1000, description="control steps an episode, then it is truncated")
    num_train: int = Field(100, ge=1, description="training tasks; HalfCheetahDir always has its two")
    num_test: int = Field(40, ge=1, description="held-out tasks; HalfCheetahDir always has the same two as in training")
    velocity: Annotated[tuple[float, float] | None, BeforeValidator(_words)] = Field(
        None, description="range of the target velocities in m/s (HalfCheetahVel only); none: 0 to 2"
    )
    scaled: Annotated[tuple[Scaled, ...], BeforeValidator(_words)] = Field(
        tuple(SCALED_PARAMETERS), min_length=1, description="which arrays of the body are scaled (RandParams only)"
    )
    seed: int = Field(0, ge=0, description="seed of the tasks")

    @field_validator("name", mode="before")
    @classmethod
    def _known(cls, name: object) -> object:
        if isinstance(name, str) and name not in NAMES:
            raise unknown_name("MuJoCo family", name, NAMES, "metarl list envs")
        return name

    @field_validator("velocity")
    @classmethod
    def _increasing(cls, velocity: tuple[float, float] | None) -> tuple[float, float] | None:
        if velocity is not None and velocity[0] >= velocity[1]:
            raise ValueError(f"velocity is {velocity}; expected the lower bound, then the upper one")
        return velocity

    @field_validator("scaled")
    @classmethod
    def _once(cls, scaled: tuple[Scaled, ...]) -> tuple[Scaled, ...]:
        if len(set(scaled)) < len(scaled):
            raise ValueError(f"scaled {scaled} names an array twice; each counts once")
        return tuple(field for field in SCALED_PARAMETERS if field in scaled)  # their order has no effect

    @model_validator(mode="after")
    def _have_a_use(self) -> MujocoConfig:
        if self.velocity is not None and self.name != "HalfCheetahVel":
            raise ValueError(f"velocity={self.velocity} with name={self.name!r}: only HalfCheetahVel has targets")
        if self.scaled != tuple(SCALED_PARAMETERS) and FAMILIES[self.name].draw is not draw_multipliers:
            raise ValueError(f"scaled={self.scaled} with name={self.name!r}: only RandParams families scale arrays")
        return self


class MujocoTasks:
    """The tasks of one MuJoCo family; task i of a split does not depend on how many there are."""

    def __init__(self, config: MujocoConfig) -> None:
        self.config = config

    @functools.cached_property
    def train_tasks(self) -> list[Task]:
        """Tasks to meta-train on."""
        return self._tasks("train", self.config.num_train)

    @functools.cached_property
    def test_tasks(self) -> list[Task]:
        """Held-out tasks, drawn apart from `train_tasks`; for HalfCheetahDir the same two directions."""
        return self._tasks("test", self.config.num_test)

    def make(self, task: Task) -> MujocoTaskEnv:
        """Build the environment of `task`."""
        return make(task)

    def difficulty(self, task: Task) -> float:
        """Return how hard a task is; see `difficulty`."""
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
    """Build the environment of `task` from the task alone; raises ValueError if it is not one of these families."""
    return MujocoTaskEnv(task, render_mode)


def choices() -> dict[str, dict[str, str]]:
    """Return the families by name, each with the settings that choose it."""
    return {name: {"name": name} for name in NAMES}


def parameters(task: Task) -> Parameters:
    """What `task` is about, by name: a pure function of (benchmark, name, seed, split, index) and the options.

    Returns:
        `direction`, ±1 for HalfCheetahDir, else a unit vector `[2]`; `velocity` in m/s; `goal` `[2]` in m; or for
        RandParams the multipliers of each array of `SCALED_PARAMETERS`, in that array's shape; ones if not scaled.
    """
    config = _config(task)
    sequence = np.random.SeedSequence(task.seed, spawn_key=(_SPLITS.index(task.split), task.index))
    return FAMILIES[config.name].draw(np.random.default_rng(sequence), task, config)


def difficulty(task: Task) -> float:
    """How far `task` is from what its body does most easily, harder is larger; a pure function as `parameters` is.

    Returns:
        The angle in rad between the direction and the one in which the body faces, +x: 0 for HalfCheetahDir-forward,
        π for backward; the target speed in m/s, to either side; the distance of the goal from the start in m; or for
        RandParams the root mean square of the logarithms of the multipliers of the arrays that are scaled, but those of
        zeros, which have no effect.
    """
    drawn = parameters(task)
    aim = next(iter(drawn.values()))
    if "direction" in drawn:
        return float(np.arccos(np.ravel(aim)[0]))
    if len(drawn) == 1:
        return float(np.linalg.norm(aim))
    nominal = nominal_model(FAMILIES[task.benchmark].xml)
    scaled = _config(task).scaled
    logs = np.concatenate([np.log(drawn[field][getattr(nominal, field) != 0]) for field in scaled])
    return float(np.sqrt(np.mean(np.square(logs))))


class MujocoTaskEnv(gymnasium.Env[FloatArray, NDArray[np.float32]]):
    """One body, aimed at one task; `set_task` aims it at another of the same class without compiling the model again.

    Observations are float64 `[O]`. `info` is empty: these families define no success.

    Attributes:
        model: the MuJoCo model, this environment's own.
        data: the MuJoCo state.
        task: the task that it is aimed at.
        render_mode: `rgb_array` or None.
        observation_names: `[O]`, what each entry of an observation is.
        action_names: `[A]`, the joint that each entry of an action moves.
        dt: the control period in s.
    """

    def __init__(self, task: Task, render_mode: str | None = None) -> None:
        check_render_mode(render_mode)
        self.render_mode = render_mode
        config = _config(task)
        self._family = FAMILIES[config.name]
        self._frame_skip = self._family.frame_skip
        self.model = copy.copy(nominal_model(self._family.xml))
        self.data = mujoco.MjData(self.model)
        self._camera: Camera | None = None
        self.dt = float(self.model.opt.timestep * self._frame_skip)
        self.metadata = render_metadata(1 / self.dt)
        self.observation_names = self._family.names(self.model)
        self.action_names = naming.actuators(self.model)
        low, high = self.model.actuator_ctrlrange.astype(np.float32).T
        self.action_space = gymnasium.spaces.Box(low, high, dtype=np.float32)
        shape = self._family.observe(self.data).shape
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, shape, dtype=np.float64)
        self.task = task
        self.set_task(task)

    def set_task(self, task: Task) -> None:
        """Aim at `task`; call `reset` next.

        RandParams write their arrays into the nominal model, whatever the task before was. As in rand_param_envs only
        these arrays change: what the compiler derived from the nominal masses stays (`body_subtreemass`, `dof_M0`, and
        `body_invweight0` and `dof_invweight0`, which set how soft contacts and joint limits are).

        Raises:
            ValueError: the task is of another class or benchmark, or is not one of these families.
        """
        config = _config(task)
        ours, theirs = ((each.benchmark, each.name) for each in (self.task, task))
        if ours != theirs:
            raise ValueError(f"set_task got a task of {theirs}, this environment is built for {ours}; call make(task)")
        drawn = parameters(task)
        nominal = nominal_model(self._family.xml)
        for field in SCALED_PARAMETERS.keys() & drawn.keys():
            getattr(self.model, field)[:] = getattr(nominal, field) * drawn[field]
        self._aim = next(iter(drawn.values()))
        self._horizon = config.horizon
        self._elapsed_steps = 0
        self.task = task

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[FloatArray, dict[str, Any]]:
        """Begin an episode near the nominal pose; a function of the task and the seed alone, if a seed is given."""
        super().reset(seed=seed)
        family, model, data = self._family, self.model, self.data
        mujoco.mj_resetData(model, data)  # the solver's warm start would leak from the episode before
        data.warning.number[:] = 1  # MuJoCo prints, and writes MUJOCO_LOG.TXT, at the first warning of each kind
        noise = family.reset_noise
        data.qpos[:] = model.qpos0 + self.np_random.uniform(-noise, noise, model.nq)
        if family.normal_velocities:
            data.qvel[:] = noise * self.np_random.standard_normal(model.nv)
        else:
            data.qvel[:] = self.np_random.uniform(-noise, noise, model.nv)
        mujoco.mj_forward(model, data)
        self._elapsed_steps = 0
        return family.observe(data), {}

    def step(self, action: NDArray[Any]) -> tuple[FloatArray, float, bool, bool, dict[str, Any]]:
        """Advance by one control step.

        Args:
            action: `[A]`, in the units of the action space; MuJoCo bounds the forces, the cost sees it as it is.

        Raises:
            ValueError: the action has another shape.
            FloatingPointError: the action is NaN or infinite, or the physics diverged and MuJoCo has silently reset it.
        """
        family, model, data = self._family, self.model, self.data
        if np.shape(action) != (model.nu,):
            raise ValueError(f"action has shape {np.shape(action)}; expected ({model.nu},)")
        if not np.isfinite(action).all():
            raise FloatingPointError(f"action {action} is not finite")
        before = family.position(model, data)
        data.ctrl[:] = action
        time_s = data.time
        mujoco.mj_step(model, data, nstep=self._frame_skip)
        # MuJoCo's reset puts time and the numbers of warnings to 0. In an episode's first step only those tell.
        if data.time <= time_s or (not time_s and not data.warning.number.all()):
            raise FloatingPointError(f"physics of {self.task.name} diverged and was reset; drop the episode")
        if family.contacts:
            mujoco.mj_rnePostConstraint(model, data)
        after = family.position(model, data)

        healthy = family.healthy(data)
        progress = family.progress(after, (after - before) / self.dt, self._aim)
        # The order of the sums is gymnasium's: another one changes the last bits.
        rewards = family.progress_weight * progress + family.alive_bonus * healthy
        effort = np.square(data.ctrl if family.effort_of_ctrl else action)
        costs = family.control_weight * np.add.reduce(effort) + family.contact_cost(data)
        self._elapsed_steps += 1
        truncated = self._elapsed_steps >= self._horizon
        return family.observe(data), float(rewards - costs), not healthy, truncated, {}

    def render(self) -> NDArray[np.uint8] | None:
        """Return a picture `[360, 480, 3]`, or None if `render_mode` is None.

        The camera goes with the body. What the task asks for is yellow: an arrow is the direction, a ball the goal, and
        a post runs beside the body at the target velocity.

        Raises:
            UserError: nothing here can draw; see `metarl.envs.drawing.rendering`.
        """
        if self.render_mode is None:
            return None
        family = self._family
        if self._camera is None:
            self._camera = Camera(self.model, family.view)
        lookat = np.append(self.data.subtree_com[0, :2], family.look_at_height)
        return self._camera.picture(self.data, lookat, family.mark(self.data, self._aim))

    def close(self) -> None:
        """Free what drawing holds; calling it twice is fine."""
        if self._camera is not None:
            self._camera.close()
            self._camera = None


def _config(task: Task) -> MujocoConfig:
    config = MujocoConfig.model_validate(
        {"family": task.family, "name": task.benchmark, "seed": task.seed, **dict(task.options)}
    )
    if task.name not in _classes(config.name):
        raise unknown_name(f"class of {config.name}", task.name, _classes(config.name), "metarl list envs")
    if task.split not in _SPLITS:
        raise ValueError(f"task.split is {task.split!r}; expected one of {_SPLITS}")
    return config


def _classes(name: str) -> tuple[str, ...]:
    return tuple(DIRECTIONS) if name == "HalfCheetahDir" else (name,)
