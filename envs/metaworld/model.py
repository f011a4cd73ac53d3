"""The MuJoCo models of Meta-World without visual elements: the same physics, faster, 3.2 MB instead of 21.

Imports nothing of metarl.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any

import mujoco


@cache
def model_without_visuals(path: str) -> Any:
    """Compile a MuJoCo model (XML) without visual elements; dynamics and named geoms stay the same."""
    full = mujoco.MjModel.from_xml_path(path)
    spec = mujoco.MjSpec.from_file(path)
    bodies = list(_depth_first(spec.worldbody))
    for i, body in enumerate(bodies[1:], start=1):  # keep the mass of the geoms to delete
        body.explicitinertial = True
        body.mass, body.inertia = full.body_mass[i], full.body_inertia[i]
        body.ipos, body.iquat = full.body_ipos[i], full.body_iquat[i]
    kept = _delete_visual_geoms(full, bodies)
    for site in spec.sites:
        site.material = ""
    meshes = {geom.meshname for geom in spec.geoms}
    unused = [mesh for mesh in spec.meshes if mesh.name not in meshes]
    for element in itertools.chain(unused, spec.lights, spec.cameras, spec.materials, spec.textures):
        element.delete()
    model = spec.compile()
    for field in ("pos", "quat", "sameframe"):  # a mesh geom is placed by the inertia of its mesh
        getattr(model, f"geom_{field}")[:] = getattr(full, f"geom_{field}")[kept]
    return model


def _delete_visual_geoms(full: Any, bodies: Sequence[Any]) -> list[int]:
    """Delete geoms that neither collide nor have a name; return the indices of the others in the full model.

    A colliding body with several geoms keeps at least two. For two bodies with a single geom each, MuJoCo skips the
    bounding volumes (mj_collision), which can change the contacts that it finds.
    """
    kept = []
    for i, body in enumerate(bodies):
        numbers = range(full.body_geomadr[i], full.body_geomadr[i] + full.body_geomnum[i])
        visual = [full.geom_contype[k] == full.geom_conaffinity[k] == 0 for k in numbers]
        geoms = list(zip(numbers, list(body.geoms), visual, strict=True))
        removable = [geom for _, geom, is_visual in geoms if is_visual and not geom.name]
        if len(geoms) > 1 and len(geoms) - len(removable) == 1 and not all(visual):
            removable = removable[1:]
        for number, geom, is_visual in geoms:
            if any(geom is other for other in removable):
                geom.delete()
                continue
            kept.append(number)
            geom.material = ""
            if is_visual and geom.type == mujoco.mjtGeom.mjGEOM_MESH:  # kept for its position and index only
                geom.type, geom.size, geom.meshname = mujoco.mjtGeom.mjGEOM_SPHERE, [0.01, 0, 0], ""
    return kept


def _depth_first(body: Any) -> Any:
    """Yield a body and its descendants in the order of the compiled model."""
    yield body
    for child in body.bodies:
        yield from _depth_first(child)
