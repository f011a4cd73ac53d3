"""Pictures of Meta-World: the official model with all that is drawn, in the pose of one that has lost it.

Of metarl it imports `camera` alone.
"""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from metarl.envs.drawing.camera import Camera, View, ball

VIEW = View(distance=1.42, azimuth=155.0, elevation=-28.0)
"""From the robot's left. The cameras of the official models stand upside down in the MuJoCo of today."""

LOOKAT = np.array([0.0, 0.6, 0.16])
"""Metres: above the middle of the table."""

_STATE = mujoco.mjtState.mjSTATE_INTEGRATION


class SawyerScene:
    """Draws one environment of `sawyer.py`, with a ball where its goal is.

    Args:
        official: the environment; the scene is good for all tasks of its class.
    """

    def __init__(self, official: Any) -> None:
        self._model = mujoco.MjModel.from_xml_path(official.fullpath)
        assert _names(self._model) == _names(official.model), "bodies or sites are others than in the fast model"
        # Some classes leave their own marks of the goal at other places than the goal.
        for site, _ in official._target_site_config:
            self._model.site(site).rgba[3] = 0.0
        self._data = mujoco.MjData(self._model)
        self._state = np.empty(mujoco.mj_stateSize(self._model, _STATE))
        self._camera = Camera(self._model, VIEW)

    def render(self, official: Any) -> NDArray[np.uint8]:
        """Return `[H, W, 3]` of the environment that the scene was made for; nothing of it changes."""
        fast = official._sim
        for field in ("body_pos", "site_pos"):  # what resets move
            getattr(self._model, field)[:] = getattr(fast.model, field)
        mujoco.mj_getState(fast.model, fast.data, self._state, _STATE)
        mujoco.mj_setState(self._model, self._data, self._state, _STATE)
        mujoco.mj_forward(self._model, self._data)
        return self._camera.render(self._data, LOOKAT, [ball(official._target_pos[:3], 0.02)])

    def close(self) -> None:
        """Free what OpenGL holds."""
        self._camera.close()


def _names(model: Any) -> list[list[str]]:
    counts = {"body": model.nbody, "site": model.nsite, "joint": model.njnt}
    return [[getattr(model, kind)(i).name for i in range(count)] for kind, count in counts.items()]
