"""Pictures of MuJoCo simulations, drawn off screen. Of metarl it imports `rendering` and `errors`.

A camera draws by what `rendering.choose_gl` finds when it is made: unlike with MuJoCo's own `Renderer`, it does not
matter what was set when mujoco was imported.
"""

from __future__ import annotations

import atexit
import importlib
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import mujoco
import numpy as np
from numpy.typing import NDArray

from metarl.envs.drawing.rendering import choose_gl
from metarl.errors import UserError
from metarl.types import FloatArray

HEIGHT, WIDTH = 360, 480
"""Of a picture, in pixels."""

SHADOW_PIXELS = 1024
"""Edge of the shadow map; MuJoCo's 4096 takes half of the time of a picture where the CPU draws."""

GOAL_COLOUR = (0.94, 0.89, 0.26, 1.0)
"""Okabe and Ito's yellow: no robot, table or floor has it."""


class View(NamedTuple):
    """Where the camera stands, as seen from the point that it looks at.

    Attributes:
        distance: metres.
        azimuth: degrees; at 90 it looks along +y.
        elevation: degrees; negative looks down.
    """

    distance: float
    azimuth: float
    elevation: float


class Mark(NamedTuple):
    """What is drawn although the simulation does not have it: a goal.

    Attributes:
        shape: of MuJoCo's geoms.
        position: `[3]`, metres.
        size: `[3]`, as MuJoCo has it for the shape.
        direction: `[3]`, where an arrow points; upright if it is not one.
    """

    shape: Any
    position: FloatArray
    size: tuple[float, float, float]
    direction: FloatArray = np.array([0.0, 0.0, 1.0])


def ball(position: FloatArray, radius: float) -> Mark:
    """Return a mark at a point."""
    return Mark(mujoco.mjtGeom.mjGEOM_SPHERE, position, (radius, radius, radius))


def post(position: FloatArray, radius: float, height: float) -> Mark:
    """Return an upright mark whose middle is at a point."""
    return Mark(mujoco.mjtGeom.mjGEOM_CYLINDER, position, (radius, height / 2, 0.0))


def arrow(position: FloatArray, direction: FloatArray, length: float) -> Mark:
    """Return an arrow that begins at a point."""
    return Mark(mujoco.mjtGeom.mjGEOM_ARROW, position, (0.05, 0.05, length), direction)


class Camera:
    """Draws one model.

    Args:
        model: MuJoCo's; its shadows become coarser.
        view: where it stands.

    Raises:
        UserError: nothing here can draw; see `rendering.choose_gl`.
    """

    def __init__(self, model: Any, view: View) -> None:
        self._model, self._view = model, view
        model.vis.quality.shadowsize = min(model.vis.quality.shadowsize, SHADOW_PIXELS)
        self._rectangle = mujoco.MjrRect(0, 0, WIDTH, HEIGHT)
        self._scene, self._options = mujoco.MjvScene(model, maxgeom=2000), mujoco.MjvOption()
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False  # costs as much again, and shows goals twice
        self._surface = _Surface(model)
        weakref.finalize(self, self._surface.close).atexit = False  # at exit that is the surface's own business

    def render(self, data: Any, lookat: FloatArray, marks: Sequence[Mark] = ()) -> NDArray[np.uint8]:
        """Return `[HEIGHT, WIDTH, 3]`, a pure function of the simulation.

        Args:
            data: MuJoCo's, after a forward pass.
            lookat: `[3]`, the point in the middle.
            marks: drawn beside what the model has; they shine through what is before them.
        """
        self._surface.make_current()
        camera = mujoco.MjvCamera()
        camera.lookat[:] = lookat
        camera.distance, camera.azimuth, camera.elevation = self._view
        picture = self._drawn(data, camera, mujoco.mjtCatBit.mjCAT_ALL, marks)
        if marks:
            alone = self._drawn(data, camera, 0, marks)
            picture = np.where(alone.any(-1, keepdims=True), alone // 2 + picture // 2, picture)
        return picture

    def _drawn(self, data: Any, camera: Any, categories: Any, marks: Sequence[Mark]) -> NDArray[np.uint8]:
        """Draw the model's geoms of some categories, and marks; where nothing is, it is black if there are none."""
        scene = self._scene
        mujoco.mjv_updateScene(self._model, data, self._options, None, camera, categories, scene)
        for mark in marks:
            self._add(mark)
        for flag in (mujoco.mjtRndFlag.mjRND_SKYBOX, mujoco.mjtRndFlag.mjRND_SHADOW):
            scene.flags[flag] = bool(categories)
        mujoco.mjr_render(self._rectangle, scene, self._surface.context)
        pixels = np.empty((HEIGHT, WIDTH, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(pixels, None, self._rectangle, self._surface.context)
        return np.ascontiguousarray(pixels[::-1])  # OpenGL's first row is the lowest

    def _add(self, mark: Mark) -> None:
        quaternion, matrix = np.empty(4), np.empty(9)
        mujoco.mju_quatZ2Vec(quaternion, mark.direction)
        mujoco.mju_quat2Mat(matrix, quaternion)
        geom = self._scene.geoms[self._scene.ngeom]
        mujoco.mjv_initGeom(geom, mark.shape, mark.size, mark.position, matrix, np.array(GOAL_COLOUR))
        geom.emission = 0.4
        self._scene.ngeom += 1

    def close(self) -> None:
        """Free what OpenGL holds; calling it twice is fine."""
        self._surface.close()


class _Surface:
    """What one camera draws on: an OpenGL context, in which MuJoCo leaves lights behind, so that none is shared."""

    def __init__(self, model: Any) -> None:
        backend = choose_gl()
        try:
            self._gl = importlib.import_module(f"mujoco.{backend}").GLContext(WIDTH, HEIGHT)
            self._gl.make_current()
            self.context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        except Exception as error:  # each backend has errors of its own
            first, *_ = str(error).splitlines() or [""]
            raise UserError(
                f"MUJOCO_GL={backend} cannot draw here ({type(error).__name__}: {first}); unset it to have one found"
            ) from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)
        atexit.register(self.close)  # before EGL ends, at exit too, and complains about what it then finds

    def make_current(self) -> None:
        self._gl.make_current()

    def close(self) -> None:
        if self._gl is not None:
            atexit.unregister(self.close)
            self.make_current()
            self.context.free()
            self._gl.free()
            self._gl = None
