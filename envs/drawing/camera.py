"""Off-screen images of MuJoCo simulations. Of metarl it imports only `rendering`, `errors` and `types`.

A camera calls `rendering.choose_gl` when it is created. MuJoCo's own `Renderer` instead reads `MUJOCO_GL` when mujoco
is imported.
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
"""Size of an image in pixels."""

SHADOW_PIXELS = 1024
"""Size of the shadow map; MuJoCo's 4096 takes half of the rendering time on a CPU."""

GOAL_COLOUR = (0.94, 0.89, 0.26, 1.0)
"""Okabe and Ito's yellow, which no robot, table or floor has."""


class View(NamedTuple):
    """Position of the camera, relative to the point that it looks at.

    Attributes:
        distance: the distance in m.
        azimuth: the azimuth in degrees; at 90 the camera looks along +y.
        elevation: the elevation in degrees; negative looks down.
    """

    distance: float
    azimuth: float
    elevation: float


class Mark(NamedTuple):
    """Marker of a goal, drawn on top of the simulation.

    Attributes:
        shape: the geom type of MuJoCo.
        position: the position in m, `[3]`.
        size: the size in MuJoCo's convention for the geom type, `[3]`.
        direction: the local z axis, `[3]`: the direction of an arrow; upright by default.
    """

    shape: Any
    position: FloatArray
    size: tuple[float, float, float]
    direction: FloatArray = np.array([0.0, 0.0, 1.0])


def ball(position: FloatArray, radius: float) -> Mark:
    """Return a ball centred at a point."""
    return Mark(mujoco.mjtGeom.mjGEOM_SPHERE, position, (radius, radius, radius))


def post(position: FloatArray, radius: float, height: float) -> Mark:
    """Return an upright post centred at a point."""
    return Mark(mujoco.mjtGeom.mjGEOM_CYLINDER, position, (radius, height / 2, 0.0))


def arrow(position: FloatArray, direction: FloatArray, length: float) -> Mark:
    """Return an arrow that starts at a point."""
    return Mark(mujoco.mjtGeom.mjGEOM_ARROW, position, (0.05, 0.05, length), direction)


class Camera:
    """Off-screen renderer of one model.

    Args:
        model: the MuJoCo model; its shadow map is reduced to `SHADOW_PIXELS`.
        view: the position of the camera.

    Raises:
        UserError: no OpenGL backend works; see `rendering.choose_gl`.
    """

    def __init__(self, model: Any, view: View) -> None:
        self._model, self._view = model, view
        model.vis.quality.shadowsize = min(model.vis.quality.shadowsize, SHADOW_PIXELS)
        self._rectangle = mujoco.MjrRect(0, 0, WIDTH, HEIGHT)
        self._scene, self._options = mujoco.MjvScene(model, maxgeom=2000), mujoco.MjvOption()
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False  # doubles the time, and shows goals twice
        self._surface = _Surface(model)
        weakref.finalize(self, self._surface.close).atexit = False  # at exit the surface closes itself

    def render(self, data: Any, lookat: FloatArray, marks: Sequence[Mark] = ()) -> NDArray[np.uint8]:
        """Return an image `[HEIGHT, WIDTH, 3]`, a pure function of the arguments.

        Args:
            data: the MuJoCo data, after a forward pass.
            lookat: the point in the centre of the image, `[3]`.
            marks: the markers to add; they shine through objects in front of them.
        """
        self._surface.make_current()
        camera = mujoco.MjvCamera()
        camera.lookat[:] = lookat
        camera.distance, camera.azimuth, camera.elevation = self._view
        image = self._draw(data, camera, mujoco.mjtCatBit.mjCAT_ALL, marks)
        if marks:
            only_marks = self._draw(data, camera, 0, marks)
            image = np.where(only_marks.any(-1, keepdims=True), only_marks // 2 + image // 2, image)
        return image

    def _draw(self, data: Any, camera: Any, categories: Any, marks: Sequence[Mark]) -> NDArray[np.uint8]:
        """Draw marks and the geoms of `categories` (`mjtCatBit`); with none, the background is black."""
        scene = self._scene
        mujoco.mjv_updateScene(self._model, data, self._options, None, camera, categories, scene)
        for mark in marks:
            self._add(mark)
        for flag in (mujoco.mjtRndFlag.mjRND_SKYBOX, mujoco.mjtRndFlag.mjRND_SHADOW):
            scene.flags[flag] = bool(categories)
        mujoco.mjr_render(self._rectangle, scene, self._surface.context)
        pixels = np.empty((HEIGHT, WIDTH, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(pixels, None, self._rectangle, self._surface.context)
        return np.ascontiguousarray(pixels[::-1])  # the first row of OpenGL is the bottom one

    def _add(self, mark: Mark) -> None:
        quaternion, matrix = np.empty(4), np.empty(9)
        mujoco.mju_quatZ2Vec(quaternion, mark.direction)
        mujoco.mju_quat2Mat(matrix, quaternion)
        geom = self._scene.geoms[self._scene.ngeom]
        mujoco.mjv_initGeom(geom, mark.shape, mark.size, mark.position, matrix, np.array(GOAL_COLOUR))
        geom.emission = 0.4
        self._scene.ngeom += 1

    def close(self) -> None:
        """Free OpenGL resources; calling it twice is fine."""
        self._surface.close()


class _Surface:
    """OpenGL context of one camera, not shared: MuJoCo leaves lights behind in it."""

    def __init__(self, model: Any) -> None:
        backend = choose_gl()
        try:
            self._gl = importlib.import_module(f"mujoco.{backend}").GLContext(WIDTH, HEIGHT)
            self._gl.make_current()
            self.context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        except Exception as error:  # each backend raises its own types
            first, *_ = str(error).splitlines() or [""]
            raise UserError(
                f"MUJOCO_GL={backend} cannot draw here ({type(error).__name__}: {first}); unset it to try others"
            ) from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)
        atexit.register(self.close)  # at exit too, before EGL terminates and complains about live contexts

    def make_current(self) -> None:
        self._gl.make_current()

    def close(self) -> None:
        if self._gl is not None:
            atexit.unregister(self.close)
            self.make_current()
            self.context.free()
            self._gl.free()
            self._gl = None
