"""The official Sawyer environments of Meta-World, several times faster and equal bit for bit.

`fast_class` derives a subclass from an official class. Every reward, observation and reset still comes from the
official source: its functions are rebuilt over new globals, in which the slowest helpers are replaced by faster ones
that return the same bits. The metaworld package itself is not changed. Time is saved because

- bodies, geoms and sites are looked up by name once, and their arrays are live views;
- norms, tolerances and rotations of single vectors skip the overhead of numpy and scipy (`fast_functions.py`);
- the model has no visual elements: meshes, textures, lights, cameras (`model.py`);
- the first of five substeps reuses the positions and contacts of the last forward pass, since only the target of the
  hand has moved; forces that nothing reads (`mj_rnePostConstraint`) are not computed;
- a reset is a pure function of the task: the second reset of a task restores a snapshot of the first.

Numbers keep their types: float32 actions multiply into rewards, so a Python float in place of a `np.float64` would
round differently. `tests/envs/metaworld/test_parity.py` compares all 50 tasks with the unchanged package.

Of metarl it imports only `fast_functions` and `model`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from math import sqrt
from typing import Any

import metaworld.utils.reward_utils as official_rewards
import mujoco
import numpy as np
from metaworld.sawyer_xyz_env import SawyerXYZEnv
from mujoco import mj_checkAcc, mj_Euler, mj_forward, mj_forwardSkip, mj_kinematics, mj_makeConstraint, mj_step
from numpy.typing import NDArray

from metarl.envs.metaworld.fast_functions import fast_globals, norm, rebuilt, tolerance
from metarl.envs.metaworld.model import model_without_visuals
from metarl.errors import PhysicsDivergedError

SUBSTEPS = 5
"""Physics steps of 0.0025 s in one environment step."""

MAX_SNAPSHOTS = 500
"""Snapshots kept per class, a few kB each; the oldest are dropped first."""

_STATE = mujoco.mjtState.mjSTATE_INTEGRATION
_POSITIONS = mujoco.mjtStage.mjSTAGE_POS.value
_HAND_LOW, _HAND_HIGH = SawyerXYZEnv._HAND_SPACE.low.tolist(), SawyerXYZEnv._HAND_SPACE.high.tolist()


@cache
def fast_class(official: Any) -> Any:
    """Return a faster subclass of an official environment class with the same results.

    It cannot render or be copied, and only `reset`, `set_state` and `step` may change the state of the simulation,
    since the next step relies on it.

    Its `step` raises ValueError for an action that is not `[4]`, and FloatingPointError if the action is not finite or
    the physics diverges; upstream would continue from a simulation that MuJoCo has silently reset.
    """
    functions = {name: rebuilt(value) for name, value in vars(official).items() if name != "__init__"}
    changed = {name: value for name, value in functions.items() if value is not vars(official)[name]}
    fast = type(official.__name__, (_Fast, official), {**changed, "_snapshots": {}})
    fast_globals(official.__module__)[official.__name__] = (
        fast  # its source calls static methods through the class name
    )
    return fast


class _CachedAccessor:
    """Result of `MjData.body(name)` and the like that fetches each array once; the arrays are live views."""

    def __init__(self, accessor: Any) -> None:
        self.__dict__["_accessor"] = accessor

    def __getattr__(self, name: str) -> Any:
        value = self.__dict__[name] = getattr(self._accessor, name)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._accessor, name, value)


class _AccessorCache(dict[str, _CachedAccessor]):
    def __init__(self, find: Callable[[str], Any]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, name: str) -> _CachedAccessor:
        accessor = self[name] = _CachedAccessor(self._find(name))
        return accessor


class _CachedData:
    """An `MjData` that looks up each body, geom, site and joint by name once."""

    def __init__(self, data: Any) -> None:
        self.__dict__["_data"] = data
        kinds = ("body", "geom", "site", "joint")
        self.__dict__["accessors"] = {kind: _AccessorCache(getattr(data, kind)) for kind in kinds}
        for kind, by_name in self.accessors.items():
            self.__dict__[kind] = by_name.__getitem__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._data, name, value)


class _Simulation:
    """MuJoCo model and data of one environment, and the arrays that every step reads or writes."""

    def __init__(self, model: Any, low: NDArray[np.float64], high: NDArray[np.float64]) -> None:
        self.model, self.data = model, mujoco.MjData(model)
        self.mocap, self.ctrl = self.data.mocap_pos[0], self.data.ctrl
        self.hand = self.data.body("hand").xpos
        self.right_claw, self.left_claw = self.data.body("rightclaw").xpos, self.data.body("leftclaw").xpos
        self.low, self.high = low.tolist(), high.tolist()
        self.forwarded = False  # whether the last operation was a forward pass at the current state
        self.hand_inside = False  # whether the hand was inside the observation space one step ago
        self.time_s = 0.0

    def silence(self) -> None:
        """Suppress MuJoCo's output: it prints the first warning of each kind and writes it to MUJOCO_LOG.TXT."""
        self.data.warning.number[:] = 1


class _Snapshot:
    """State after a reset: the physics, the model fields that resets change, and the assigned attributes."""

    def __init__(self, env: _Fast, assigned: set[str], observation: NDArray[np.float64]) -> None:
        model, data = env._sim.model, env._sim.data
        self._state = np.empty(mujoco.mj_stateSize(model, _STATE))
        mujoco.mj_getState(model, data, self._state, _STATE)
        self._model = [(field, getattr(model, field).copy()) for field in ("body_pos", "site_pos")]
        views = {
            id(view): (kind, name, attribute)
            for kind, by_name in env.data.accessors.items()
            for name, accessor in by_name.items()
            for attribute, view in vars(accessor).items()
            if type(view) is np.ndarray
        }
        values = {name: vars(env)[name] for name in assigned}
        self._views = {name: views[id(value)] for name, value in values.items() if id(value) in views}
        self._values = {name: copy.copy(value) for name, value in values.items() if name not in self._views}
        self._observation = observation.copy()

    def restore(self, env: _Fast) -> NDArray[np.float64]:
        """Restore this state in an environment of the same class, and return the observation."""
        model, data = env._sim.model, env._sim.data
        for field, values in self._model:
            getattr(model, field)[:] = values
        mujoco.mj_setState(model, data, self._state, _STATE)
        mj_forward(model, data)
        mujoco.mj_setState(model, data, self._state, _STATE)  # the pass has changed the warm start of the solver
        for name, value in self._values.items():
            setattr(env, name, copy.copy(value))
        for name, (kind, key, attribute) in self._views.items():
            setattr(env, name, getattr(getattr(env.data, kind)(key), attribute))
        return self._observation.copy()


class _Fast:
    """Mixin that overrides methods of `SawyerXYZEnv` and gymnasium's `MujocoEnv`; the first base class."""

    _snapshots: dict[Any, _Snapshot]
    _sim: _Simulation
    data: Any
    model: Any

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.data = _CachedData(self._sim.data)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to copy and to pickle: live views would still refer to the original."""
        raise TypeError(f"{type(self).__name__} cannot be copied; build a new one with metarl.envs.make(task)")

    def _initialize_simulation(self: Any) -> tuple[Any, Any]:
        model = copy.copy(model_without_visuals(self.fullpath))
        self._sim = _Simulation(model, self.mocap_low, self.mocap_high)
        return model, self._sim.data

    def set_state(self, qpos: NDArray[np.float64], qvel: NDArray[np.float64]) -> None:
        """Same as gymnasium's `MujocoEnv.set_state`."""
        self._sim.data.qpos[:], self._sim.data.qvel[:] = qpos, qvel
        mj_forward(self.model, self._sim.data)

    def _step_mujoco_simulation(self, ctrl: Sequence[float], n_frames: int) -> None:
        self._sim.data.ctrl[:] = ctrl
        mj_step(self.model, self._sim.data, n_frames)

    def reset(
        self: Any, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float64], dict[str, Any]]:
        """Same as `SawyerXYZEnv.reset`; from the second reset of a task on, restore a snapshot."""
        self._sim.forwarded = self._sim.hand_inside = False
        self.curr_path_length = 0
        if not self._freeze_rand_vec:
            observation = self._official_reset()
        else:
            key = (self._last_rand_vec.tobytes(), self.reward_function_version, self._partially_observable)
            if key in self._snapshots:
                observation = self._snapshots[key].restore(self)
            else:
                assigned, observation = _record_assignments(self, self._official_reset)
                self._snapshots[key] = _Snapshot(self, assigned, observation)
                if len(self._snapshots) > MAX_SNAPSHOTS:
                    del self._snapshots[next(iter(self._snapshots))]
        self._prev_obs = observation[:18].copy()
        self._sim.time_s = self._sim.data.time
        self._sim.silence()
        return observation, {}

    def _official_reset(self: Any) -> NDArray[np.float64]:
        """Call `reset_model` twice, the second time from MuJoCo's initial state."""
        self.reset_model()
        mujoco.mj_resetData(self.model, self._sim.data)
        observation: NDArray[np.float64] = self.reset_model().astype(np.float64)
        observation[18:36] = observation[:18]
        return observation

    def step(self: Any, action: NDArray[np.float32]) -> tuple[NDArray[np.float64], Any, bool, bool, dict[str, Any]]:
        """Same as `SawyerXYZEnv.step`."""
        if not self._set_task_called:
            raise RuntimeError("You must call env.set_task before using env.step")
        if self.curr_path_length >= self.max_path_length:
            raise ValueError("You must reset the env manually once truncate==True")
        self._simulate(action)
        self.curr_path_length += 1
        observation = self._observe()
        reward, info = self.evaluate_state(observation, action)
        return observation, reward, False, self.curr_path_length == self.max_path_length, info

    def _simulate(self: Any, action: NDArray[np.float32]) -> None:
        """Same as `set_xyz_action`, `do_simulation` and the forward pass after them."""
        if np.shape(action) != (4,):
            raise ValueError(f"action has shape {np.shape(action)}; expected (4,)")
        delta = np.asarray(action)[:3]
        x, y, z = delta.tolist()
        effort = float(action[3])
        if not (-1 <= x <= 1 and -1 <= y <= 1 and -1 <= z <= 1 and abs(effort) < np.inf):
            if not np.isfinite(action).all():
                raise FloatingPointError(f"action {action} is not finite")
            delta = np.clip(delta, -1, 1)
        dx, dy, dz = (delta * self.action_scale).tolist()  # in the dtype of the action, as upstream
        sim = self._sim
        model, data, mocap, low, high = sim.model, sim.data, sim.mocap, sim.low, sim.high
        x, y, z = mocap.tolist()
        mocap[0] = min(max(x + dx, low[0]), high[0])
        mocap[1] = min(max(y + dy, low[1]), high[1])
        mocap[2] = min(max(z + dz, low[2]), high[2])
        sim.ctrl[0], sim.ctrl[1] = effort, -effort
        if sim.forwarded:
            # Since the last forward pass, only the target of the hand and the controls have changed. Among the
            # quantities that depend on positions, they affect only the weld between target and hand.
            mj_kinematics(model, data)
            mj_makeConstraint(model, data)
            mj_forwardSkip(model, data, _POSITIONS, False)
            mj_checkAcc(model, data)
            mj_Euler(model, data)
            mj_step(model, data, SUBSTEPS - 1)
        else:
            data.mocap_quat[0] = (1, 0, 1, 0)
            mj_step(model, data, SUBSTEPS)
        mj_forward(model, data)
        if data.time <= sim.time_s:  # MuJoCo found NaN or a huge number, and reset itself
            sim.forwarded = False
            raise PhysicsDivergedError(f"the physics of {type(self).__name__} diverged; drop the episode")
        sim.forwarded, sim.time_s = True, data.time

    def _observe(self: Any) -> NDArray[np.float64]:
        """Same as `_get_obs` and the clipping after it."""
        observation = np.zeros(39)
        x, y, z = self._observe_now(observation)
        observation[18:36] = self._prev_obs
        self._prev_obs = observation[:18].copy()
        sim = self._sim
        inside = (
            _HAND_LOW[0] <= x <= _HAND_HIGH[0]
            and _HAND_LOW[1] <= y <= _HAND_HIGH[1]
            and _HAND_LOW[2] <= z <= _HAND_HIGH[2]
        )
        if not self._partially_observable:
            observation[36:] = self._get_pos_goal()
        if not (inside and sim.hand_inside and self._partially_observable):  # no other bound is finite
            space = self.sawyer_observation_space
            np.clip(observation, space.low, space.high, out=observation)
        sim.hand_inside = inside
        return observation

    def _observe_now(self: Any, observation: NDArray[np.float64]) -> Any:
        """Write the first 18 entries, and return the position of the hand."""
        sim = self._sim
        x, y, z = hand = sim.hand.tolist()
        observation[0], observation[1], observation[2] = x, y, z
        gap = sim.right_claw - sim.left_claw
        observation[3] = min(sqrt(gap.dot(gap)) / 0.1, 1.0)
        positions, quaternions = self._get_pos_objects(), self._get_quat_objects()
        if len(positions) == 3:
            observation[4:7] = positions
            observation[7 : 7 + len(quaternions)] = quaternions
        else:
            observation[4:7], observation[7:11] = positions[:3], quaternions[:4]
            observation[11:14], observation[14:18] = positions[3:], quaternions[4:]
        return hand

    def _get_curr_obs_combined_no_goal(self) -> NDArray[np.float64]:
        observation = np.zeros(18)
        self._observe_now(observation)
        return observation

    def _get_id_main_object(self) -> int:
        return int(self.data.geom("objGeom").id)

    def touching_object(self, object_geom_id: int) -> bool:
        """Same as `SawyerXYZEnv.touching_object`: return whether both pads press on a geom."""
        data = self._sim.data
        if data.ncon == 0:
            return False
        pads = self.data.geom("leftpad_geom").id, self.data.geom("rightpad_geom").id
        forces = [0.0, 0.0]
        for i, geoms in enumerate(data.contact.geom.tolist()):
            if object_geom_id in geoms:
                for side, pad in enumerate(pads):
                    if pad in geoms:
                        forces[side] += data.efc_force[data.contact.efc_address[i]]
        return bool(forces[0] > 0 and forces[1] > 0)

    def _gripper_caging_reward(
        self: Any,
        action: NDArray[np.float32],
        obj_pos: NDArray[np.float64],
        obj_radius: float,
        pad_success_thresh: float,
        object_reach_radius: float,
        xz_thresh: float,
        desired_gripper_effort: float = 1.0,
        high_density: bool = False,
        medium_density: bool = False,
    ) -> Any:
        """Same as `SawyerXYZEnv._gripper_caging_reward`, term by term, on scalars instead of arrays."""
        if high_density and medium_density:
            raise ValueError("Can only be either high_density or medium_density")
        product = official_rewards.hamacher_product
        initial = self.obj_init_pos
        y, initial_y = obj_pos.item(1), initial.item(1)
        bounds = (obj_radius, pad_success_thresh)
        left, right = self.data.body("leftpad").xpos.item(1), self.data.body("rightpad").xpos.item(1)
        left_margin = abs(abs(left - initial_y) - pad_success_thresh)
        right_margin = abs(abs(right - initial_y) - pad_success_thresh)
        caging_y = product(
            tolerance(abs(left - y), bounds, left_margin, "long_tail"),
            tolerance(abs(right - y), bounds, right_margin, "long_tail"),
        )
        tcp = self.tcp_center
        caging_xz = tolerance(
            norm(tcp[::2] - obj_pos[::2]),
            bounds=(0, xz_thresh),
            margin=norm(initial[::2] - self.init_tcp[::2]) - xz_thresh,
            sigmoid="long_tail",
        )
        gripper_closed = min(max(0, action[-1]), desired_gripper_effort) / desired_gripper_effort
        caging = product(caging_y, float(caging_xz))
        caging_and_gripping = product(caging, gripper_closed if caging > 0.97 else 0.0)
        if high_density:
            caging_and_gripping = (caging_and_gripping + caging) / 2
        if medium_density:
            reach = tolerance(
                norm(obj_pos - tcp),
                bounds=(0, object_reach_radius),
                margin=abs(norm(initial - self.init_tcp) - object_reach_radius),
                sigmoid="long_tail",
            )
            caging_and_gripping = (caging_and_gripping + float(reach)) / 2
        return caging_and_gripping


def _record_assignments(env: Any, call: Callable[[], Any]) -> tuple[set[str], Any]:
    """Return the names of the attributes of `env` that `call` assigns, and its result."""
    assigned: set[str] = set()

    class Recording(type(env)):  # type: ignore[misc]
        def __setattr__(self, name: str, value: Any) -> None:
            assigned.add(name)
            super().__setattr__(name, value)

    fast, env.__class__ = type(env), Recording
    try:
        result = call()
    finally:
        env.__class__ = fast
    return assigned - {"_prev_obs", "__class__"}, result
