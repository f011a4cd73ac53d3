"""Definitions of the MuJoCo locomotion families: body, observation, reward, termination, camera.

`env.py` steps them. Imports neither torch nor the rest of metarl except `types` and the drawing of `metarl.envs`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import gymnasium
import mujoco
import numpy as np

from metarl.envs.drawing.camera import Mark, View, arrow, ball, post
from metarl.envs.mujoco import naming
from metarl.envs.mujoco.tasks import DIRECTIONS, SCALED_PARAMETERS, VELOCITY, MujocoConfig
from metarl.types import FloatArray, Task

Parameters: TypeAlias = dict[str, Any]
"""Hidden parameters of a task: a direction (±1 or a unit vector `[2]`), a velocity, a goal `[2]`, multipliers."""

_ASSETS = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"


@functools.cache
def nominal_model(xml: str) -> Any:
    """Return the compiled model of an asset; it is shared, so do not modify it."""
    return mujoco.MjModel.from_xml_path(str(_ASSETS / xml))


# Below, `model` and `data` are MuJoCo's; they are Any because its compiled module carries no types.


def _mass_centre(model: Any, data: Any) -> FloatArray:
    centre: FloatArray = np.einsum("b,bj->j", model.body_mass, data.xipos) / np.add.reduce(model.body_mass)
    return centre[:2]


def _observe_hopper(data: Any) -> FloatArray:
    return np.concatenate((data.qpos[1:], np.minimum(np.maximum(data.qvel, -10.0), 10.0)))


def _observe_ant_with_position(data: Any) -> FloatArray:
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
    """Return external torques and forces on each body `[bodies, 6]`, clipped to ±1."""
    contacts: FloatArray = np.minimum(np.maximum(data.cfrc_ext, -1.0), 1.0)
    return contacts


def _draw_direction(rng: np.random.Generator, task: Task, config: MujocoConfig) -> Parameters:
    angle = rng.uniform(0.0, 2.0 * np.pi)
    return {"direction": np.array([np.cos(angle), np.sin(angle)])}


def _draw_goal(rng: np.random.Generator, task: Task, config: MujocoConfig) -> Parameters:
    angle = rng.uniform(0.0, 2.0 * np.pi)
    radius = 3.0 * np.sqrt(rng.uniform())  # the root makes the density uniform in area
    return {"goal": radius * np.array([np.cos(angle), np.sin(angle)])}


def draw_multipliers(rng: np.random.Generator, task: Task, config: MujocoConfig) -> Parameters:
    """Draw the multipliers of a RandParams task, in the shape of each array; ones for arrays that are not scaled."""
    model = nominal_model(SPECS[task.benchmark].xml)
    # All arrays are drawn, scaled or not, so that the multipliers of one do not depend on the others.
    multipliers = {
        field: base ** rng.uniform(-3.0, 3.0, getattr(model, field).shape) for field, base in SCALED_PARAMETERS.items()
    }
    return {field: value if field in config.scaled else np.ones_like(value) for field, value in multipliers.items()}


def _ant_names(model: Any) -> tuple[str, ...]:
    return (*naming.positions(model), *naming.velocities(model), *naming.per_body(model, "contact", 6))


def _humanoid_names(model: Any) -> tuple[str, ...]:
    return (
        *naming.positions(model)[2:],
        *naming.velocities(model),
        *naming.per_body(model, "inertia", 10),
        *naming.per_body(model, "velocity", 6),
        *(f"{name}_force" for name in naming.velocities(model)[6:]),
        *naming.per_body(model, "contact", 6),
    )


def _mark_direction(data: Any, direction: Any) -> list[Mark]:
    """Return an arrow above the torso; `direction` is ±1 or a unit vector `[2]`."""
    above = data.xpos[1] + np.array([0.0, 0.0, 0.6])
    return [arrow(above, np.append(np.ravel(direction), (0.0, 0.0))[:3], 1.0)]


def _mark_velocity(data: Any, velocity: float) -> list[Mark]:
    return [post(np.array([velocity * data.time, 0.8, 0.5]), 0.04, 1.0)]


class LocomotionSpec(NamedTuple):
    """A family of tasks: reward = progress_weight · progress + alive_bonus · healthy − control − contact."""

    xml: str
    frame_skip: int  # physics steps per control step
    control_weight: float
    draw: Callable[[np.random.Generator, Task, MujocoConfig], Parameters]
    progress: Callable[[Any, Any, Any], Any]  # of position, velocity and the first hidden parameter
    observe: Callable[[Any], FloatArray]
    reset_noise: float = 0.1
    normal_velocities: bool = True  # at reset; else uniform
    position: Callable[[Any, Any], Any] = lambda model, data: data.qpos[0]
    healthy: Callable[[Any], bool] = lambda data: True
    contact_cost: Callable[[Any], Any] = lambda data: 0.0
    contacts: bool = False  # whether to compute cfrc_ext, which mj_step leaves out
    progress_weight: float = 1.0
    alive_bonus: float = 0.0
    effort_of_ctrl: bool = False  # cost of the float64 controls, not of the action in its own dtype
    names: Callable[[Any], tuple[str, ...]] = lambda model: (*naming.positions(model)[1:], *naming.velocities(model))
    mark: Callable[[Any, Any], list[Mark]] = lambda data, aim: []  # of the first hidden parameter
    view: View = View(distance=3.4, azimuth=90.0, elevation=-12.0)
    look_at_height: float = 0.7  # metres


_CHEETAH = LocomotionSpec(
    xml="half_cheetah.xml",
    frame_skip=5,
    control_weight=0.05,
    draw=lambda rng, task, config: {"direction": DIRECTIONS[task.name]},
    progress=lambda position, velocity, sign: sign * velocity,
    observe=lambda data: np.concatenate((data.qpos[1:], data.qvel)),
    mark=_mark_direction,
    view=View(distance=4.0, azimuth=90.0, elevation=-15.0),
)
_ANT = LocomotionSpec(
    xml="ant.xml",
    frame_skip=5,
    control_weight=0.5,
    draw=_draw_direction,
    progress=lambda position, velocity, direction: direction[0] * velocity[0] + direction[1] * velocity[1],
    observe=lambda data: _observe_ant_with_position(data)[2:],
    position=lambda model, data: data.xpos[1, :2].copy(),
    healthy=_healthy_ant,
    contact_cost=lambda data: 5e-4 * np.add.reduce(np.square(_clipped_contacts(data)), axis=None),
    contacts=True,
    alive_bonus=1.0,
    names=lambda model: _ant_names(model)[2:],
    mark=_mark_direction,
    view=View(distance=5.0, azimuth=90.0, elevation=-30.0),
)
_HOPPER = LocomotionSpec(
    xml="hopper.xml",
    frame_skip=4,
    control_weight=1e-3,
    draw=draw_multipliers,
    progress=lambda position, velocity, multipliers: velocity,
    observe=_observe_hopper,
    reset_noise=5e-3,
    normal_velocities=False,
    healthy=_healthy_hopper,
    alive_bonus=1.0,
)
SPECS: dict[str, LocomotionSpec] = {
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
        observe=_observe_ant_with_position,
        healthy=lambda data: True,
        alive_bonus=0.0,
        names=_ant_names,
        mark=lambda data, goal: [ball(np.append(goal, 0.2), 0.2)],
        view=View(distance=8.0, azimuth=90.0, elevation=-40.0),  # goals at 3 m on all sides are in view
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
        names=_humanoid_names,
        view=View(distance=4.0, azimuth=90.0, elevation=-15.0),
        look_at_height=1.1,
    ),
    "HopperRandParams": _HOPPER,
    "Walker2DRandParams": _HOPPER._replace(
        xml="walker2d_v5.xml",
        healthy=lambda data: bool(0.8 < data.qpos[1] < 2.0 and -1.0 < data.qpos[2] < 1.0),
    ),
}
