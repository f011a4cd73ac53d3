"""Rendering of Meta-World: the full official model, in the state of the fast model, which has no visual elements.

Of metarl it imports only `camera`.
"""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from metarl.envs.drawing.camera import Camera, View, ball

VIEW = View(distance=1.42, azimuth=155.0, elevation=-28.0)
"""View from the left of the robot. The cameras of the official models are upside down in current MuJoCo."""

LOOKAT = np.array([0.0, 0.6, 0.16])
"""A point above the centre of the table, in m."""

_STATE = mujoco.mjtState.mjSTATE_INTEGRATION


class SawyerScene:
    """Renderer of a fast environment (`fast.py`), with a ball at the goal.

    Args:
        official: the environment; the scene renders any task of its class.
    """

    def __init__(self, official: Any) -> None:
        self._model = mujoco.MjModel.from_xml_path(official.fullpath)
        assert _names(self._model) == _names(official.model), "bodies, sites or joints differ from the fast model"
        # Some classes place their own goal markers away from the goal.
        for site, _ in official._target_site_config:
            self._model.site(site).rgba[3] = 0.0
        self._data = mujoco.MjData(self._model)
        self._state = np.empty(mujoco.mj_stateSize(self._model, _STATE))
        self._camera = Camera(self._model, VIEW)

    def render(self, official: Any) -> NDArray[np.uint8]:
        """Return an image `[H, W, 3]` of `official`, which is not changed."""
        fast = official._sim
        for field in ("body_pos", "site_pos"):  # changed by resets
            getattr(self._model, field)[:] = getattr(fast.model, field)
        mujoco.mj_getState(fast.model, fast.data, self._state, _STATE)
        mujoco.mj_setState(self._model, self._data, self._state, _STATE)
        mujoco.mj_forward(self._model, self._data)
        return self._camera.render(self._data, LOOKAT, [ball(official._target_pos[:3], 0.02)])

    def close(self) -> None:
        """Free OpenGL resources."""
        self._camera.close()


def _names(model: Any) -> list[list[str]]:
    counts = {"body": model.nbody, "site": model.nsite, "joint": model.njnt}
    return [[getattr(model, kind)(i).name for i in range(count)] for kind, count in counts.items()]
