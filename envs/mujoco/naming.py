"""Names of MuJoCo coordinates, from the joints and bodies of a model. Imports nothing of metarl."""

from __future__ import annotations

from typing import Any

import mujoco

_FREE_POSITIONS = ("x", "y", "z", "quaternion_w", "quaternion_x", "quaternion_y", "quaternion_z")
_FREE_VELOCITIES = ("x", "y", "z", "angular_x", "angular_y", "angular_z")


def positions(model: Any) -> tuple[str, ...]:
    """Return the names of `qpos`, e.g. `root_z` and `hip_1`."""
    return _by_joint(model, _FREE_POSITIONS, "")


def velocities(model: Any) -> tuple[str, ...]:
    """Return the names of `qvel`, e.g. `root_velocity_angular_x` and `hip_1_velocity`."""
    return _by_joint(model, _FREE_VELOCITIES, "_velocity")


def actuators(model: Any) -> tuple[str, ...]:
    """Return the name of the joint that each actuator moves."""
    return tuple(model.joint(model.actuator_trnid[i, 0]).name for i in range(model.nu))


def per_body(model: Any, quantity: str, size: int) -> tuple[str, ...]:
    """Return the names of `size` numbers for each body except the world, e.g. `torso_contact_0`."""
    bodies = [model.body(i).name or f"body{i}" for i in range(1, model.nbody)]
    return tuple(f"{body}_{quantity}_{k}" for body in bodies for k in range(size))


def _by_joint(model: Any, free_joint_parts: tuple[str, ...], suffix: str) -> tuple[str, ...]:
    names: list[str] = []
    for i in range(model.njnt):
        name = model.joint(i).name + suffix
        free = model.jnt_type[i] == mujoco.mjtJoint.mjJNT_FREE
        names += [f"{name}_{part}" for part in free_joint_parts] if free else [name]
    return tuple(names)
