"""MuJoCo locomotion: seven families of tasks on gymnasium's v5 bodies. Owns their tasks, rewards and stepping.

Imports neither torch nor the rest of metarl but `types`, `errors` and `rendering`.

MuJoCo is stepped directly, without gymnasium's environment classes, and equals them to the bit: the first observation
after `reset(seed=...)`, every observation, every reward where the definitions coincide, and `terminated`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, get_args

import gymnasium
import mujoco
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator

from metarl.envs import naming
from metarl.envs.camera import Camera, Mark, View, arrow, ball, post
from metarl.errors import STRICT, unknown_name
from metarl.rendering import check_render_mode, render_metadata
from metarl.types import FloatArray, Scalar, Task

Name = Literal[
    "HalfCheetahDir", "HalfCheetahVel", "AntDir", "AntGoal", "HumanoidDir", "HopperRandParams", "Walker2DRandParams"
]

NAMES: tuple[str, ...] = get_args(Name)
"""The families, in the order in which they are listed."""

SHARED_SPLITS = frozenset({"HalfCheetahDir"})
"""Distributions that have so few tasks that training and test tasks are the same ones."""

VELOCITY = (0.0, 2.0)
"""Range in m/s that the targets of HalfCheetahVel are drawn from, if the config gives none."""

Scaled = Literal["body_mass", "body_inertia", "dof_damping", "geom_friction"]

SCALED_PARAMETERS: dict[Scaled, float] = {
    "body_mass": 1.5,
    "body_inertia": 1.5,
    "dof_damping": 1.3,
    "geom_friction": 1.5,
}
"""Arrays of the model that a RandParams task scales, each with the base b of its multipliers b^U(−3, 3)."""

Parameters: TypeAlias = dict[str, Any]
"""What a task is about, by name: a direction (±1 or a unit vector `[2]`), a velocity, a goal `[2]`, or multipliers."""

_ASSETS = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"
_SPLITS = ("train", "test")
_DIRECTIONS = {"HalfCheetahDir-forward": 1.0, "HalfCheetahDir-backward": -1.0}


def _words(value: object) -> object:
    """Let a string stand for a list of its words: how a task's option holds one."""
    return tuple(value.split()) if isinstance(value, str) else value


class MujocoConfig(BaseModel):
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

    model_config = STRICT

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
        if self.scaled != tuple(SCALED_PARAMETERS) and _FAMILIES[self.name].draw is not _draw_multipliers:
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
    return _FAMILIES[config.name].draw(np.random.default_rng(sequence), task, config)


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
    nominal = _nominal(_FAMILIES[task.benchmark].xml)
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
        self._family = _FAMILIES[config.name]
        self._frame_skip = self._family.frame_skip
        self.model = copy.copy(_nominal(self._family.xml))
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
        nominal = _nominal(self._family.xml)
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
        if data.time <= time_s:
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
            UserError: nothing here can draw; see `metarl.rendering`.
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
    return tuple(_DIRECTIONS) if name == "HalfCheetahDir" else (name,)


@functools.cache
def _nominal(xml: str) -> Any:
    """The compiled model of an asset; shared, never to be changed."""
    return mujoco.MjModel.from_xml_path(str(_ASSETS / xml))


# Below, `model` and `data` are MuJoCo's; they are Any because its compiled module carries no types.


def _mass_centre(model: Any, data: Any) -> FloatArray:
    centre: FloatArray = np.einsum("b,bj->j", model.body_mass, data.xipos) / np.add.reduce(model.body_mass)
    return centre[:2]


def _observe_hopper(data: Any) -> FloatArray:
    return np.concatenate((data.qpos[1:], np.minimum(np.maximum(data.qvel, -10.0), 10.0)))


def _observe_placed_ant(data: Any) -> FloatArray:
    return np.concatenate((data.qpos, data.qvel, _clipped_contacts(data)[1:].ravel()))


def _observe_humanoid(data: Any) -> FloatArray:
    per_body = (data.cinert[1:].ravel(), data.cvel[1:].ravel(), data.qfrc_actuator[6:], data.cfrc_ext[1:].ravel())
    return np.concatenate((data.qpos[2:], data.qvel, *per_body))


def _healthy_ant(data: Any) -> bool:
    return bool(0.2 <= data.qpos[2] <= 1.0 and np.isfinite(data.qpos).all() and np.isfinite(data.qvel).all())


def _healthy_hopper(data: Any) -> bool:
    qpos = data.qpos
    upright = 0.7 < qpos[1] < np.inf and -0.2 < qpos[2] < 0.2
    return bool(upright and np.abs(qpos[2:]).max() < 100.0 and np.abs(data.qvel).max() < 100.0)


def _clipped_contacts(data: Any) -> FloatArray:
    """External torques and forces on each body `[bodies, 6]`, within ±1."""
    contacts: FloatArray = np.minimum(np.maximum(data.cfrc_ext, -1.0), 1.0)
    return contacts


def _draw_direction(rng: np.random.Generator, task: Task, config: MujocoConfig) -> Parameters:
    angle = rng.uniform(0.0, 2.0 * np.pi)
    return {"direction": np.array([np.cos(angle), np.sin(angle)])}


def _draw_goal(rng: np.random.Generator, task: Task, config: MujocoConfig) -> Parameters:
    angle = rng.uniform(0.0, 2.0 * np.pi)
    radius = 3.0 * np.sqrt(rng.uniform())  # the root makes the density uniform in area
    return {"goal": radius * np.array([np.cos(angle), np.sin(angle)])}


def _draw_multipliers(rng: np.random.Generator, task: Task, config: MujocoConfig) -> Parameters:
    model = _nominal(_FAMILIES[task.benchmark].xml)
    # All are drawn, whichever count, so that an array has the same multipliers with or without the others.
    drawn = {
        field: base ** rng.uniform(-3.0, 3.0, getattr(model, field).shape) for field, base in SCALED_PARAMETERS.items()
    }
    return {field: value if field in config.scaled else np.ones_like(value) for field, value in drawn.items()}


def _names_of_ant(model: Any) -> tuple[str, ...]:
    return (*naming.positions(model), *naming.velocities(model), *naming.per_body(model, "contact", 6))


def _names_of_humanoid(model: Any) -> tuple[str, ...]:
    return (
        *naming.positions(model)[2:],
        *naming.velocities(model),
        *naming.per_body(model, "inertia", 10),
        *naming.per_body(model, "velocity", 6),
        *(f"{name}_force" for name in naming.velocities(model)[6:]),
        *naming.per_body(model, "contact", 6),
    )


def _mark_direction(data: Any, direction: Any) -> list[Mark]:
    """An arrow over the torso; `direction` is ±1 or a unit vector `[2]`."""
    above = data.xpos[1] + np.array([0.0, 0.0, 0.6])
    return [arrow(above, np.append(np.ravel(direction), (0.0, 0.0))[:3], 1.0)]


def _mark_velocity(data: Any, velocity: float) -> list[Mark]:
    return [post(np.array([velocity * data.time, 0.8, 0.5]), 0.04, 1.0)]


class _Family(NamedTuple):
    """A body and what it is rewarded for: progress_weight · progress + alive_bonus · healthy − control − contact."""

    xml: str
    frame_skip: int  # physics steps a control step
    control_weight: float
    draw: Callable[[np.random.Generator, Task, MujocoConfig], Parameters]
    progress: Callable[[Any, Any, Any], Any]  # of position, velocity, and the first of the drawn parameters
    observe: Callable[[Any], FloatArray]
    reset_noise: float = 0.1
    normal_velocities: bool = True  # at reset; else uniform
    position: Callable[[Any, Any], Any] = lambda model, data: data.qpos[0]
    healthy: Callable[[Any], bool] = lambda data: True
    contact_cost: Callable[[Any], Any] = lambda data: 0.0
    contacts: bool = False  # whether cfrc_ext is computed, which mj_step leaves out
    progress_weight: float = 1.0
    alive_bonus: float = 0.0
    effort_of_ctrl: bool = False  # cost of the float64 controls rather than of the action in its own dtype
    names: Callable[[Any], tuple[str, ...]] = lambda model: (*naming.positions(model)[1:], *naming.velocities(model))
    mark: Callable[[Any, Any], list[Mark]] = lambda data, aim: []  # of the first of the drawn parameters
    view: View = View(distance=3.4, azimuth=90.0, elevation=-12.0)
    look_at_height: float = 0.7  # metres


_CHEETAH = _Family(
    xml="half_cheetah.xml",
    frame_skip=5,
    control_weight=0.05,
    draw=lambda rng, task, config: {"direction": _DIRECTIONS[task.name]},
    progress=lambda position, velocity, sign: sign * velocity,
    observe=lambda data: np.concatenate((data.qpos[1:], data.qvel)),
    mark=_mark_direction,
    view=View(distance=4.0, azimuth=90.0, elevation=-15.0),
)
_ANT = _Family(
    xml="ant.xml",
    frame_skip=5,
    control_weight=0.5,
    draw=_draw_direction,
    progress=lambda position, velocity, direction: direction[0] * velocity[0] + direction[1] * velocity[1],
    observe=lambda data: _observe_placed_ant(data)[2:],
    position=lambda model, data: data.xpos[1, :2].copy(),
    healthy=_healthy_ant,
    contact_cost=lambda data: 5e-4 * np.add.reduce(np.square(_clipped_contacts(data)), axis=None),
    contacts=True,
    alive_bonus=1.0,
    names=lambda model: _names_of_ant(model)[2:],
    mark=_mark_direction,
    view=View(distance=5.0, azimuth=90.0, elevation=-30.0),
)
_HOPPER = _Family(
    xml="hopper.xml",
    frame_skip=4,
    control_weight=1e-3,
    draw=_draw_multipliers,
    progress=lambda position, velocity, multipliers: velocity,
    observe=_observe_hopper,
    reset_noise=5e-3,
    normal_velocities=False,
    healthy=_healthy_hopper,
    alive_bonus=1.0,
)
_FAMILIES: dict[str, _Family] = {
    "HalfCheetahDir": _CHEETAH,
    "HalfCheetahVel": _CHEETAH._replace(
        draw=lambda rng, task, config: {"velocity": rng.uniform(*(config.velocity or VELOCITY))},
        progress=lambda position, velocity, target: -abs(velocity - target),
        mark=_mark_velocity,
    ),
    "AntDir": _ANT,
    "AntGoal": _ANT._replace(
        control_weight=0.1,
        draw=_draw_goal,
        progress=lambda position, velocity, goal: -np.abs(position - goal).sum(),
        observe=_observe_placed_ant,
        healthy=lambda data: True,
        alive_bonus=0.0,
        names=_names_of_ant,
        mark=lambda data, goal: [ball(np.append(goal, 0.2), 0.2)],
        view=View(distance=8.0, azimuth=90.0, elevation=-40.0),  # so that goals at 3 m to all sides are seen
    ),
    "HumanoidDir": _ANT._replace(
        xml="humanoid.xml",
        control_weight=0.1,
        observe=_observe_humanoid,
        reset_noise=1e-2,
        normal_velocities=False,
        position=_mass_centre,
        healthy=lambda data: bool(1.0 < data.qpos[2] < 2.0),
        contact_cost=lambda data: min(5e-7 * np.add.reduce(np.square(data.cfrc_ext), axis=None), 10.0),
        progress_weight=1.25,
        alive_bonus=5.0,
        effort_of_ctrl=True,
        names=_names_of_humanoid,
        view=View(distance=4.0, azimuth=90.0, elevation=-15.0),
        look_at_height=1.1,
    ),
    "HopperRandParams": _HOPPER,
    "Walker2DRandParams": _HOPPER._replace(
        xml="walker2d_v5.xml",
        healthy=lambda data: bool(0.8 < data.qpos[1] < 2.0 and -1.0 < data.qpos[2] < 1.0),
    ),
}
