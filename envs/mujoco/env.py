"""MuJoCo locomotion environments: one body from gymnasium's v5 environments and one task.

The tasks are in `tasks.py`, the differences between the families in `bodies.py`. Imports neither torch nor the rest of
metarl except `types`, `settings`, `errors` and the drawing of `metarl.envs`.

MuJoCo is stepped directly, without gymnasium's environment classes. The results equal theirs bit for bit: the first
observation after `reset(seed=...)`, every observation, every reward where the definitions coincide, and `terminated`.
"""

from __future__ import annotations

import copy
from typing import Any

import gymnasium
import mujoco
import numpy as np
from numpy.typing import NDArray

from metarl.envs.drawing.camera import Camera
from metarl.envs.drawing.rendering import check_render_mode, render_metadata
from metarl.envs.mujoco import naming
from metarl.envs.mujoco.bodies import SPECS, Parameters, nominal_model
from metarl.envs.mujoco.tasks import SCALED_PARAMETERS, SPLITS, task_config
from metarl.errors import PhysicsDivergedError
from metarl.types import FloatArray, Task


def parameters(task: Task) -> Parameters:
    """Return the hidden parameters of `task`: a pure function of (benchmark, name, seed, split, index) and the options.

    Returns:
        `direction`, ±1 for HalfCheetahDir, else a unit vector `[2]`; `velocity` in m/s; `goal` `[2]` in m; or for
        RandParams the multipliers of each array of `SCALED_PARAMETERS`, in that array's shape; ones if not scaled.
    """
    config = task_config(task)
    sequence = np.random.SeedSequence(task.seed, spawn_key=(SPLITS.index(task.split), task.index))
    return SPECS[config.name].draw(np.random.default_rng(sequence), task, config)


def difficulty(task: Task) -> float:
    """Return the difficulty of `task`; harder is larger. A pure function, like `parameters`.

    Returns:
        The angle in rad between the direction and +x, where the body faces (0 for HalfCheetahDir-forward, π for
        backward); the absolute target speed in m/s; the distance of the goal from the start in m; or, for RandParams,
        the root mean square of the logarithms of the multipliers of the scaled arrays, without the elements that are
        zero, on which a multiplier has no effect.
    """
    hidden = parameters(task)
    aim = next(iter(hidden.values()))
    if "direction" in hidden:
        return float(np.arccos(np.ravel(aim)[0]))
    if len(hidden) == 1:
        return float(np.linalg.norm(aim))
    nominal = nominal_model(SPECS[task.benchmark].xml)
    scaled = task_config(task).scaled
    logs = np.concatenate([np.log(hidden[field][getattr(nominal, field) != 0]) for field in scaled])
    return float(np.sqrt(np.mean(np.square(logs))))


class MujocoTaskEnv(gymnasium.Env[FloatArray, NDArray[np.float32]]):
    """One body with one task; `set_task` switches to another task of the same class without recompiling the model.

    Observations are float64 `[O]`. `info` is empty: these families define no success.

    Attributes:
        model: the MuJoCo model, not shared with other environments.
        data: the MuJoCo state.
        task: the current task.
        render_mode: `rgb_array` or None.
        observation_names: `[O]`, name of each entry of an observation.
        action_names: `[A]`, the joint that each entry of an action moves.
        dt: the control period in s.
    """

    def __init__(self, task: Task, render_mode: str | None = None) -> None:
        check_render_mode(render_mode)
        self.render_mode = render_mode
        config = task_config(task)
        self._spec = SPECS[config.name]
        self._frame_skip = self._spec.frame_skip
        self.model = copy.copy(nominal_model(self._spec.xml))
        self.data = mujoco.MjData(self.model)
        self._camera: Camera | None = None
        self.dt = float(self.model.opt.timestep * self._frame_skip)
        self.metadata = render_metadata(1 / self.dt)
        self.observation_names = self._spec.names(self.model)
        self.action_names = naming.actuators(self.model)
        low, high = self.model.actuator_ctrlrange.astype(np.float32).T
        self.action_space = gymnasium.spaces.Box(low, high, dtype=np.float32)
        shape = self._spec.observe(self.data).shape
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, shape, dtype=np.float64)
        self.task = task
        self.set_task(task)

    def set_task(self, task: Task) -> None:
        """Switch to `task`; call `reset` next.

        RandParams scale the arrays of the nominal model, so the previous task has no effect. As in rand_param_envs,
        only these arrays change: values that the compiler derived from the nominal masses stay (`body_subtreemass`,
        `dof_M0`, and `body_invweight0` and `dof_invweight0`, which set how soft contacts and joint limits are).

        Raises:
            ValueError: the task is of another class or benchmark, or does not belong to these families.
        """
        config = task_config(task)
        old, new = (self.task.benchmark, self.task.name), (task.benchmark, task.name)
        if new != old:
            raise ValueError(f"set_task got a task of {new}; this environment is built for {old}: call make(task)")
        hidden = parameters(task)
        nominal = nominal_model(self._spec.xml)
        for field in SCALED_PARAMETERS.keys() & hidden.keys():
            getattr(self.model, field)[:] = getattr(nominal, field) * hidden[field]
        self._aim = next(iter(hidden.values()))
        self._horizon = config.horizon
        self._elapsed_steps = 0
        self.task = task

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[FloatArray, dict[str, Any]]:
        """Begin an episode near the nominal pose; with a seed, a function of the task and the seed alone."""
        super().reset(seed=seed)
        spec, model, data = self._spec, self.model, self.data
        mujoco.mj_resetData(model, data)  # the solver's warm start would leak from the previous episode
        data.warning.number[:] = 1  # or MuJoCo prints the first warning of each kind, and writes MUJOCO_LOG.TXT
        noise = spec.reset_noise
        data.qpos[:] = model.qpos0 + self.np_random.uniform(-noise, noise, model.nq)
        if spec.normal_velocities:
            data.qvel[:] = noise * self.np_random.standard_normal(model.nv)
        else:
            data.qvel[:] = self.np_random.uniform(-noise, noise, model.nv)
        mujoco.mj_forward(model, data)
        self._elapsed_steps = 0
        return spec.observe(data), {}

    def step(self, action: NDArray[Any]) -> tuple[FloatArray, float, bool, bool, dict[str, Any]]:
        """Advance by one control step.

        Args:
            action: `[A]`, in the units of the action space; MuJoCo clips the forces, the cost uses the raw action.

        Raises:
            ValueError: the action is not `[A]`.
            FloatingPointError: the action is NaN or infinite, or the physics diverged and MuJoCo has silently reset it.
        """
        spec, model, data = self._spec, self.model, self.data
        if np.shape(action) != (model.nu,):
            raise ValueError(f"action has shape {np.shape(action)}; expected ({model.nu},)")
        if not np.isfinite(action).all():
            raise FloatingPointError(f"action {action} is not finite")
        before = spec.position(model, data)
        data.ctrl[:] = action
        time_s = data.time
        mujoco.mj_step(model, data, nstep=self._frame_skip)
        # MuJoCo's reset sets time and warning counts to 0. In an episode's first step only the counts reveal it.
        if data.time <= time_s or (not time_s and not data.warning.number.all()):
            raise PhysicsDivergedError(f"physics of {self.task.name} diverged and was reset; drop the episode")
        if spec.contacts:
            mujoco.mj_rnePostConstraint(model, data)
        after = spec.position(model, data)

        healthy = spec.healthy(data)
        progress = spec.progress(after, (after - before) / self.dt, self._aim)
        # The sums are in gymnasium's order: any other changes the last bits.
        rewards = spec.progress_weight * progress + spec.alive_bonus * healthy
        effort = np.square(data.ctrl if spec.effort_of_ctrl else action)
        costs = spec.control_weight * np.add.reduce(effort) + spec.contact_cost(data)
        self._elapsed_steps += 1
        truncated = self._elapsed_steps >= self._horizon
        return spec.observe(data), float(rewards - costs), not healthy, truncated, {}

    def render(self) -> NDArray[np.uint8] | None:
        """Return an image `[360, 480, 3]`, or None if `render_mode` is None.

        The camera follows the body. The task is drawn in yellow: an arrow is the direction, a ball the goal, and a post
        moves next to the body at the target velocity.

        Raises:
            UserError: no OpenGL backend works; see `metarl.envs.drawing.rendering`.
        """
        if self.render_mode is None:
            return None
        spec = self._spec
        if self._camera is None:
            self._camera = Camera(self.model, spec.view)
        lookat = np.append(self.data.subtree_com[0, :2], spec.look_at_height)
        return self._camera.render(self.data, lookat, spec.mark(self.data, self._aim))

    def close(self) -> None:
        """Free rendering resources; calling it twice is fine."""
        if self._camera is not None:
            self._camera.close()
            self._camera = None
