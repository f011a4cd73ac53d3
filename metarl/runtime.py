"""Runs an exported policy on a robot. Needs only numpy and onnxruntime; this file can be copied there by itself.

`OnnxPolicy` runs an ONNX file of `metarl export`; `ControlLoop` calls a policy once per tick, with safety checks. Must
not import the rest of metarl.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

FORMAT = 1
METADATA_KEY = "metarl"
_SEAL_KEY = b"metarl.sha256"
# A protobuf entry of the model's metadata_props; bytes appended to a serialised message become part of it.
_SEAL = b"\x72\x51\x0a" + bytes([len(_SEAL_KEY)]) + _SEAL_KEY + b"\x12\x40"
_SEAL_BYTES = len(_SEAL) + 64
_EXTERNAL = b"\n\x08location"  # the key of a tensor that is stored in another file


def seal(model: bytes) -> bytes:
    """Append the hash of a serialised ONNX model to it; the result is still an ONNX model."""
    return model + _SEAL + hashlib.sha256(model).hexdigest().encode()


def _check_seal(data: bytes, name: str) -> None:
    body, tail = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
    if not tail.startswith(_SEAL):
        raise ValueError(f"{name} is not a complete file of `metarl export`: its hash is missing; export it again")
    if tail[len(_SEAL) :] != hashlib.sha256(body).hexdigest().encode():
        raise ValueError(f"{name} was changed after `metarl export`: its hash differs; copy or export it again")
    if _EXTERNAL in body:
        raise ValueError(f"{name} refers to other files, unlike any file of `metarl export`; export it again")


def checked_observations(
    observation: Any, size: int, parts: Sequence[Sequence[Any]] = (), image: Sequence[int] | None = None
) -> NDArray[Any]:
    """Return observations `[O]` or `[B, O]`, as float32 or, of images, as bytes.

    Args:
        observation: an array, or for observations of several parts a mapping from their names to arrays.
        size: O.
        parts: names and sizes of the parts, in order.
        image: (H, W, C) where observations are images, which may come in that shape.

    Raises:
        ValueError: wrong shape, dtype or parts, NaN or infinity.
    """
    array = np.asarray(_joined(observation, parts) if isinstance(observation, Mapping) else observation)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"observation has dtype {array.dtype}; expected numbers")
    if image is not None:
        if array.dtype != np.uint8:
            raise ValueError(f"observation has dtype {array.dtype}; expected an image of uint8")
        if array.shape[-3:] == tuple(image):
            array = array.reshape(*array.shape[:-3], size)
    if array.ndim not in (1, 2) or array.shape[-1] != size:
        raise ValueError(f"observation has shape {array.shape}; expected ({size},) or (batch, {size})")
    if image is not None:
        return array
    observations = array.astype(np.float32)
    if not np.isfinite(observations).all():
        raise ValueError("observation contains NaN or infinity; check the sensors before calling predict")
    return observations


def _joined(observation: Mapping[str, Any], parts: Sequence[Sequence[Any]]) -> NDArray[Any]:
    """Return the parts of observations in a row, `[O]` or `[B, O]`."""
    names = [name for name, _ in parts]
    if set(observation) != set(names):
        raise ValueError(f"observation has the parts {sorted(observation)}; expected {names or 'an array'}")
    arrays = [np.asarray(observation[name]) for name in names]
    single = all(array.size == size for array, (_, size) in zip(arrays, parts, strict=True)) and any(
        array.ndim < 2 or len(array) > 1 for array in arrays
    )
    rows = [array.reshape(-1) if single else array.reshape(len(array), -1) for array in arrays]
    for row, (name, size) in zip(rows, parts, strict=True):
        if row.shape[-1] != size:
            raise ValueError(f"part {name} of the observation has {row.shape[-1]} numbers; expected {size}")
    return np.concatenate(rows, -1)


def checked_memory(
    batch: int, state_size: int, state: ArrayLike | None, episode_start: ArrayLike | None, reward: ArrayLike | None
) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.float32]]:
    """Return the inputs of a memory besides observations: rewards `[B]`, episode starts `[B]`, the state `[B, S]`.

    Raises:
        ValueError: a shape does not fit, the reward is infinite, or the state does not come from `predict`.
    """
    rewards = _batched("reward", np.asarray(np.nan if reward is None else reward, np.float32), batch)
    starts = _batched("episode_start", np.asarray(False if episode_start is None else episode_start, np.bool_), batch)
    before = np.zeros((batch, state_size), np.float32) if state is None else np.asarray(state, np.float32)
    if np.isinf(rewards).any():
        raise ValueError("reward is infinite; expected a number, or None if it is unknown")
    if before.shape != (batch, state_size):
        raise ValueError(
            f"state has shape {before.shape}; expected {(batch, state_size)}, the state that predict returned, or None "
            "at the start of a trial"
        )
    begun = before[:, -1]
    if not ((begun == 0.0) | (begun == 1.0)).all():
        raise ValueError("state does not come from predict: its last entry is neither 0 (a new trial) nor 1")
    return rewards, starts, before


def _batched(name: str, value: NDArray[Any], batch: int) -> NDArray[Any]:
    if value.shape not in ((), (1,), (batch,)):
        raise ValueError(f"{name} has shape {value.shape}; expected one value for each of {batch} observation(s)")
    return value if value.shape == (batch,) else np.full(batch, value)


def as_env_actions(actions: NDArray[Any], kind: str, single: bool) -> NDArray[Any]:
    """Return actions `[B, A]` as environments expect them, `[A]` of a single row; without the A of a single choice.

    Raises:
        ValueError: they are not finite.
    """
    if not np.isfinite(actions).all():
        raise ValueError("the action is not finite: observation or state are far from the training distribution")
    if kind == "discrete":
        actions = actions[:, 0]
    chosen: NDArray[Any] = actions[0] if single else actions
    return np.asarray(chosen)


class OnnxPolicy:
    """A policy from an ONNX file, with the `predict` of `metarl.Policy`.

    Args:
        source: the path of the file, or its content.
        num_threads: threads of onnxruntime; networks of this size gain nothing from a second one.
        seed: seed of the action noise; None: a different one each time.

    Attributes:
        metadata: the file's description of itself: names of observations and actions, bounds, control period, the task
            that it is adapted to, versions; see `metarl.deploy.onnx_export.describe`.
        observation_size: O.
        action_size: A.
        state_size: S, the size of the memory; 0 without a memory.
        action_kind: `box`, `discrete` or `multi_discrete`.
        action_low: `[A]`; of choices the numbers of the first ones.
        action_high: `[A]`.
        noise_size: numbers of noise that an action takes.

    Raises:
        ValueError: the file is damaged, not from `metarl export`, or has a newer format.
        ImportError: onnxruntime is missing.
    """

    def __init__(self, source: str | Path | bytes, *, num_threads: int = 1, seed: int | None = None) -> None:
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # it would send model names and sizes over the network
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError("running an exported policy needs onnxruntime: pip install onnxruntime") from error
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        name = "the model" if isinstance(source, bytes) else str(source)
        _check_seal(data, name)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
            self.metadata: dict[str, Any] = json.loads(self._session.get_modelmeta().custom_metadata_map[METADATA_KEY])
            file_format = self.metadata["format"]
            if file_format == FORMAT:  # other formats may have other keys
                sizes = (int(self.metadata[f"{kind}_size"]) for kind in ("observation", "action", "state"))
                self.observation_size, self.action_size, self.state_size = sizes
                self.noise_size = int(self.metadata.get("noise_size", self.action_size))
                self.action_kind = self.metadata.get("action_kind", "box")
                self.action_low, self.action_high = (
                    np.array(self.metadata[f"action_{end}"], np.float64) for end in ("low", "high")
                )
        except Exception as error:  # onnxruntime's own exceptions have no common base class
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[-200:]}"  # the cause is at the end
            raise ValueError(f"{name} is not a model of `metarl export`: {reason}") from error
        if file_format != FORMAT:
            raise ValueError(
                f"{name} has format {file_format}; this metarl.runtime reads format {FORMAT}: use a newer one"
            )
        expected: dict[str, int | None] = {"observations": self.observation_size, "noise": self.noise_size}
        if self.state_size:
            expected |= {"rewards": None, "episode_start": None, "state": self.state_size}
        inputs = {item.name: item.shape[1] if len(item.shape) > 1 else None for item in self._inputs()}
        if inputs != expected:
            raise ValueError(f"{name} has inputs {inputs}; expected {expected} according to its metadata")
        self._outputs = ["actions", "next_state"] if self.state_size else ["actions"]
        self._rng = np.random.default_rng(seed)
        kind = np.float32 if self.metadata.get("image") is None else np.uint8
        self.run(np.zeros((1, self.observation_size), kind))  # the first run is the slowest: not during a tick

    def _inputs(self) -> list[Any]:
        return [*self._session.get_inputs(), *self._session.get_overridable_initializers()]

    @property
    def has_memory(self) -> bool:
        """Whether the policy adapts in its memory while it acts."""
        return self.state_size > 0

    def reset(self, batch: int = 1) -> NDArray[np.float32]:
        """Return the state at the start of `batch` trials: zeros `[B, S]`; S is 0 without a memory."""
        return np.zeros((batch, self.state_size), np.float32)

    def predict(
        self,
        observation: ArrayLike,
        state: NDArray[np.float32] | None = None,
        episode_start: ArrayLike | None = None,
        deterministic: bool = False,
        reward: ArrayLike | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Choose actions; see `metarl.Policy.predict`.

        Args:
            observation: `[O]` or `[B, O]`.
            state: `[B, S]`, the state that the last call returned; None or zeros at the start of a trial.
            episode_start: `[B]`, whether an episode starts; the memory persists through a trial.
            deterministic: whether to return the mean instead of a sample.
            reward: a number or `[B]`, the reward of the last step; None or NaN if unknown. Ignored at the start of a
                trial.

        Returns:
            actions `[A]` or `[B, A]` within their bounds, and the next state. Choices are int64; those of a `Discrete`
            space `[]` or `[B]`.

        Raises:
            ValueError: wrong shape, NaN or infinity.
        """
        form = self.metadata.get("observation_parts", ()), self.metadata.get("image")
        observations = checked_observations(observation, self.observation_size, *form)
        single = observations.ndim == 1
        if single:
            observations = observations[None]
        noise = None if deterministic else self._rng.standard_normal((len(observations), self.noise_size), np.float32)
        actions, state = self.run(observations, state, episode_start, noise, reward)
        return as_env_actions(actions, self.action_kind, single), state

    def run(
        self,
        observations: NDArray[np.float32],
        state: NDArray[np.float32] | None = None,
        episode_start: ArrayLike | None = None,
        noise: NDArray[np.float32] | None = None,
        rewards: ArrayLike | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Run the model on a batch `[B, O]` with noise `[B, noise_size]`, or without for the mode; else as `predict`.

        Actions are `[B, A]`.
        """
        feed: dict[str, Any] = {"observations": observations}
        if noise is not None:
            feed["noise"] = noise
        if not self.state_size:
            return self._session.run(self._outputs, feed)[0], state
        memory = checked_memory(len(observations), self.state_size, state, episode_start, rewards)
        feed |= zip(("rewards", "episode_start", "state"), memory, strict=True)
        actions, next_state = self._session.run(self._outputs, feed)
        return actions, next_state


class Predictor(Protocol):
    """The interface of a policy for `ControlLoop`: an `OnnxPolicy` or a `metarl.Policy`."""

    @property
    def observation_size(self) -> int:
        """O."""

    @property
    def action_size(self) -> int:
        """A."""

    @property
    def action_low(self) -> NDArray[np.float64]:
        """`[A]`."""

    @property
    def action_high(self) -> NDArray[np.float64]:
        """`[A]`."""

    def reset(self) -> NDArray[np.float32]:
        """Return the state at the start of a trial."""

    def predict(
        self,
        observation: Any,
        state: NDArray[np.float32] | None,
        episode_start: Any,
        deterministic: bool,
        reward: Any,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Choose an action."""


@dataclass
class Counts:
    """Counters of a control loop.

    Attributes:
        ticks: calls of `step`.
        faults: ticks that did not use the policy's action.
        limited: ticks in which the rate limit changed the action.
        deadline_misses: ticks that took longer than the deadline.
        swaps: policies that took over.
    """

    ticks: int = 0
    faults: int = 0
    limited: int = 0
    deadline_misses: int = 0
    swaps: int = 0


class ControlLoop:
    """Calls a policy once per tick, carries its memory, and checks its inputs and outputs.

    A tick has a fault if the observation is not finite or out of range, the policy raises, or its action is not finite.
    Then the loop holds the last action or sends the safe one, and the memory does not change. `swap` may be called from
    another thread; everything else belongs to the thread that calls `step`. A new policy takes over at the next tick,
    as a whole. The memory reads the action that the policy chose, not the one after limits and faults.

    Args:
        policy: an `OnnxPolicy` or a `metarl.Policy`.
        safe_action: `[A]`, the robot's action before the first tick, e.g. to stand still. Sent at faults before there
            is an action to hold, and at every fault with `on_fault="safe"`.
        on_fault: `hold` the last action, send the `safe` one, or `raise` the error.
        max_held: consecutive faults for which an action is held before the safe one is sent. None: no limit.
        observation_low: `[O]` or a number, lower limit of plausible observations; None: no limit.
        observation_high: `[O]` or a number, upper limit.
        max_change: `[A]` or a number, maximum change of an action per tick; None: no limit. It also applies to safe
            actions, and to the first action, relative to the safe one.
        episode_ticks: ticks, faults included, after which a new episode starts as with `begin_episode`: a memory is not
            trained beyond the length of its training episodes. None: the horizon in the metadata of a policy with a
            memory, otherwise never.
        deadline_s: time limit of `step`; misses are counted and their action is still returned. None: no limit.
        deterministic: whether to act without noise.
        clock: returns the time in seconds.

    Attributes:
        counts: the counters so far.
        last_fault: the error of the last fault, "" before the first.

    Raises:
        ValueError: a setting does not fit the policy.
    """

    def __init__(
        self,
        policy: Predictor,
        safe_action: ArrayLike,
        *,
        on_fault: Literal["hold", "safe", "raise"] = "hold",
        max_held: int | None = None,
        observation_low: ArrayLike | None = None,
        observation_high: ArrayLike | None = None,
        max_change: ArrayLike | None = None,
        episode_ticks: int | None = None,
        deadline_s: float | None = None,
        deterministic: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if on_fault not in ("hold", "safe", "raise"):
            raise ValueError(f"on_fault is {on_fault!r}; expected hold, safe or raise")
        if deadline_s is not None and not deadline_s > 0:
            raise ValueError(f"deadline_s is {deadline_s}; expected more than 0")
        if episode_ticks is not None and episode_ticks < 1:
            raise ValueError(f"episode_ticks is {episode_ticks}; expected at least 1")
        if max_held is not None and max_held < 0:
            raise ValueError(f"max_held is {max_held}; expected at least 0")
        self._policy, self._sizes = policy, (policy.observation_size, policy.action_size)
        self._safe = _sized("safe_action", safe_action, policy.action_size)
        self._low = None if observation_low is None else _sized("observation_low", observation_low, self._sizes[0])
        self._high = None if observation_high is None else _sized("observation_high", observation_high, self._sizes[0])
        if self._low is not None and self._high is not None and not (self._low <= self._high).all():
            raise ValueError(f"observation_low is {observation_low!r}, above observation_high {observation_high!r}")
        low, high = (np.asarray(bound, np.float32) for bound in (policy.action_low, policy.action_high))
        if not ((low <= self._safe) & (self._safe <= high)).all():
            raise ValueError(f"safe_action is {safe_action!r}; expected within {low} and {high}")
        if max_change is not None and getattr(policy, "action_kind", "box") != "box":
            raise ValueError(f"max_change is {max_change!r}; the policy's actions are choices, which it cannot limit")
        self._max_change = None if max_change is None else _sized("max_change", max_change, policy.action_size)
        if self._max_change is not None and not (self._max_change > 0).all():
            raise ValueError(f"max_change is {max_change!r}; expected more than 0")
        self._on_fault, self._deadline_s, self._deterministic, self._clock = on_fault, deadline_s, deterministic, clock
        self._waiting: collections.deque[Predictor] = collections.deque(maxlen=1)  # its operations are atomic
        self._last, self._max_held, self._faults_in_a_row = self._safe, max_held, 0
        self._episode_ticks = episode_ticks
        self.counts, self.last_fault = Counts(), ""
        self.begin_trial()

    def begin_trial(self) -> None:
        """Reset the memory and start an episode with the next tick."""
        self._state: NDArray[np.float32] | None = self._policy.reset()
        self.begin_episode()

    def begin_episode(self) -> None:
        """Start an episode of the same task with the next tick; the memory persists."""
        self._starts, self._elapsed_ticks = True, 0

    def swap(self, policy: Predictor) -> None:
        """Switch to another policy, at the start of a trial, with the next tick; thread-safe.

        Raises:
            ValueError: it has different observations or actions.
        """
        sizes = (policy.observation_size, policy.action_size)
        if sizes != self._sizes:
            raise ValueError(f"the new policy has (observation, action) sizes {sizes}; the loop's has {self._sizes}")
        for end in ("action_low", "action_high"):
            old, new = (getattr(item, end).tolist() for item in (self._policy, policy))
            if old != new:
                raise ValueError(f"the new policy has {end} {new}; the loop's has {old}")
        for field in ("observation_names", "action_names", "control_period_s"):
            old, new = (getattr(item, "metadata", {}).get(field) for item in (self._policy, policy))
            if old is not None and new is not None and old != new:
                if isinstance(old, list):
                    old, new = next(pair for pair in zip(old, new, strict=True) if pair[0] != pair[1])
                raise ValueError(f"the new policy has {new!r} among its {field}; the loop's has {old!r}")
        self._waiting.append(policy)

    def step(self, observation: ArrayLike, reward: float | None = None) -> NDArray[np.float32]:
        """Return the action of one tick, `[A]`.

        Args:
            observation: `[O]`.
            reward: the reward of the last tick, even across episodes, for a policy with a memory; None if unknown.
                Ignored at the start of a trial.
        """
        began = self._clock()
        self.counts.ticks += 1
        if self._waiting:
            self._policy = self._waiting.pop()
            self.counts.swaps += 1
            self.begin_trial()
        if self._elapsed_ticks == self._ticks_per_episode():
            self.begin_episode()
        self._elapsed_ticks += 1
        try:
            action, state = self._act(observation, reward)
        except Exception as error:  # whatever the error, the robot needs an action
            self.counts.faults += 1
            self.last_fault = f"{type(error).__name__}: {error}"
            if self._on_fault == "raise":
                raise
            self._faults_in_a_row += 1
            held_too_long = self._max_held is not None and self._faults_in_a_row > self._max_held
            action = self._safe if self._on_fault == "safe" or held_too_long else self._last
        else:
            self._state, self._starts, self._faults_in_a_row = state, False, 0
        if self._max_change is not None:
            limited = np.clip(action, self._last - self._max_change, self._last + self._max_change)
            self.counts.limited += bool((limited != action).any())
            action = limited
        self._last = action.copy()
        if self._deadline_s is not None and self._clock() - began > self._deadline_s:
            self.counts.deadline_misses += 1
        return action.copy()

    def _ticks_per_episode(self) -> int | None:
        if self._episode_ticks is not None:
            return self._episode_ticks
        trial = getattr(self._policy, "metadata", {}).get("trial")
        return trial["horizon"] if trial else None

    def _act(
        self, observation: ArrayLike, reward: float | None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        array = np.asarray(observation, np.float32)
        if array.shape != self._sizes[:1]:
            raise ValueError(f"observation has shape {array.shape}; expected ({self._sizes[0]},)")
        if not np.isfinite(array).all():
            raise ValueError(f"entry {int(np.flatnonzero(~np.isfinite(array))[0])} of the observation is not finite")
        outside = np.zeros(len(array), np.bool_)
        if self._low is not None:
            outside |= array < self._low
        if self._high is not None:
            outside |= array > self._high
        if outside.any():
            first = int(np.flatnonzero(outside)[0])
            raise ValueError(f"entry {first} of the observation is {array[first]:g}, out of its range")
        starts = np.array([self._starts])
        action, state = self._policy.predict(array, self._state, starts, self._deterministic, reward)
        if not np.isfinite(action).all():
            raise ValueError(f"the policy's action {action} is not finite")
        return action, state


def _sized(name: str, value: ArrayLike, size: int) -> NDArray[np.float32]:
    array = np.asarray(value, np.float32)
    if array.shape not in ((), (size,)) or np.isnan(array).any():
        raise ValueError(f"{name} is {value!r}; expected a number or {size} numbers")
    return np.full(size, array, np.float32)
