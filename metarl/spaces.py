"""The border to environments: what their spaces must be, and the checks on all that they return.

`Spaces` describes observations and actions as agents see them: a vector `[O]` each, actions in policy units.
`CheckedEnv` puts one environment behind that border; `Answers` is its check on what the environment returns. An error
is one line that names the task, the field, what came and what was expected. Imports numpy and gymnasium; of metarl
`types` and `errors`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces as gym_spaces
from numpy.typing import NDArray

from metarl.errors import PhysicsDivergedError, UserError
from metarl.types import FloatArray, Task

ActionKind = Literal["box", "discrete", "multi_discrete"]


@dataclass(frozen=True)
class Spaces:
    """Observations and actions that an agent is built for.

    Policy units of actions `[A]`: for `box`, ±1 are the bounds; for `discrete` (A = 1) and `multi_discrete`, the number
    of the choice, from 0.

    Attributes:
        observation_size: O; of an image H · W · C.
        action_low: `[A]`; for choices, the environment's number of the first one.
        action_high: `[A]`; for choices, that of the last one.
        action_kind: `box`, `discrete` or `multi_discrete`.
        observation_parts: names and sizes of what a flattened dictionary or tuple consists of, in order.
        image: (H, W, C) where observations are images, flattened row by row, of bytes.
    """

    observation_size: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    action_kind: ActionKind = "box"
    observation_parts: tuple[tuple[str, int], ...] = ()
    image: tuple[int, int, int] | None = None

    @classmethod
    def within_one(cls, observation_size: int, action_size: int) -> Spaces:
        """Return spaces whose actions lie within ±1."""
        return cls(observation_size, (-1.0,) * action_size, (1.0,) * action_size)

    @classmethod
    def of(cls, observation_space: gymnasium.Space[Any], action_space: gymnasium.Space[Any]) -> Spaces:
        """Return the spaces of an environment; raises UserError for those that agents cannot have."""
        size, parts, image = _observations(observation_space)
        return cls(size, *_actions(action_space), observation_parts=parts, image=image)

    @property
    def action_size(self) -> int:
        """A."""
        return len(self.action_low)

    @property
    def action_bounds(self) -> tuple[FloatArray, FloatArray]:
        """Low and high, both `[A]`."""
        return np.array(self.action_low), np.array(self.action_high)

    @property
    def choices(self) -> tuple[int, ...]:
        """The number of choices of each action dimension; () for a box."""
        if self.action_kind == "box":
            return ()
        return tuple(int(high - low) + 1 for low, high in zip(self.action_low, self.action_high, strict=True))

    @property
    def observation_dtype(self) -> type[np.uint8] | type[np.float32]:
        """What observations are kept as: bytes for images, else float32."""
        return np.float32 if self.image is None else np.uint8

    def to_env(self, actions: NDArray[Any], clip: bool = True) -> FloatArray:
        """Return actions `[..., A]` in the units of the action space, given policy units.

        Args:
            actions: in policy units.
            clip: whether to clip a box to ±1 first; choices always lie within their range.
        """
        low, high = self.action_bounds
        actions = np.asarray(actions, np.float64)
        if self.action_kind != "box":
            actions = np.clip(np.rint(actions) + low, low, high)
        else:
            within = np.clip(actions, -1.0, 1.0) if clip else actions
            actions = (high + low) / 2 + (high - low) / 2 * within
        return actions

    def to_policy(self, actions: NDArray[Any]) -> FloatArray:
        """Return actions `[..., A]` in policy units; undoes `to_env` without clipping."""
        low, high = self.action_bounds
        shift, scale = ((high + low) / 2, (high - low) / 2) if self.action_kind == "box" else (low, 1.0)
        units: FloatArray = (np.asarray(actions, np.float64) - shift) / scale
        return units

    def misfit(self, other: Spaces, bounds: bool = True) -> str | None:
        """Return in a line why an environment with the spaces `other` does not fit these; None if it does.

        Args:
            other: of the environment.
            bounds: whether the bounds of actions in a box must be equal, too.
        """
        shapes = [s.image or (s.observation_size,) for s in (other, self)]
        if shapes[0] != shapes[1]:
            return f"the environment's observations have shape {shapes[0]}; the agent was trained for {shapes[1]}"
        parts = [s.observation_parts for s in (other, self)]
        if parts[0] != parts[1] and all(parts):
            found, ours = map(dict, parts)
            return f"the environment's observations consist of {found}; the agent was trained for {ours}"
        if other.action_kind != self.action_kind:
            return f"the environment's actions are {other.action_kind}; the agent was trained for {self.action_kind}"
        if other.action_size != self.action_size:
            return (
                f"the environment's actions have shape ({other.action_size},); the agent was trained for "
                f"({self.action_size},)"
            )
        if self.choices != other.choices:
            return f"the environment's actions have {other.choices} choices; the agent was trained for {self.choices}"
        for name in ("low", "high"):
            ends = [np.array(getattr(s, f"action_{name}")) for s in (other, self)]
            if ends[0].tolist() != ends[1].tolist() and (bounds or self.choices):
                return f"the environment's actions have {name} {ends[0]}; the agent was trained for {ends[1]}"
        return None


def _observations(space: Any) -> tuple[int, tuple[tuple[str, int], ...], tuple[int, int, int] | None]:
    """Return size, parts and image shape of an observation space."""
    if _is_image(space):
        return math.prod(space.shape), (), space.shape
    if isinstance(space, gym_spaces.Box) and space.dtype.kind in "fiub" and len(space.shape) == 1:
        if space.shape[0] == 0:
            raise UserError("observation space has no entries; expected at least one")
        return space.shape[0], (), None
    return sum(size for _, size in _parts(space, "")), _parts(space, ""), None


def _is_image(space: Any) -> bool:
    return isinstance(space, gym_spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3


def _parts(space: Any, name: str) -> tuple[tuple[str, int], ...]:
    """Return names and sizes of what `gymnasium.spaces.flatten` puts in a row."""
    if isinstance(space, gym_spaces.Dict):
        members = [(str(key), member) for key, member in space.spaces.items()]
    elif isinstance(space, gym_spaces.Tuple):
        members = [(str(number), member) for number, member in enumerate(space.spaces)]
    elif isinstance(space, gym_spaces.Box) and _is_image(space):
        raise UserError(
            f"observation space has an image in {name or 'it'}, beside other parts; expected an image alone, or vectors"
        )
    elif isinstance(space, gym_spaces.Box | gym_spaces.Discrete | gym_spaces.MultiDiscrete | gym_spaces.MultiBinary):
        return ((name or "observation", gym_spaces.flatdim(space)),)
    else:
        raise UserError(
            f"observation space is {space}; expected Box, Discrete, MultiDiscrete, MultiBinary, an image "
            "[H, W, C] of uint8, or a Dict or Tuple of them"
        )
    return tuple(part for key, member in members for part in _parts(member, f"{name}.{key}" if name else key))


def _actions(space: Any) -> tuple[tuple[float, ...], tuple[float, ...], ActionKind]:
    """Return the bounds and the kind of an action space."""
    if isinstance(space, gym_spaces.Discrete):
        first = int(space.start)
        return (float(first),), (float(first + int(space.n) - 1),), "discrete"
    if isinstance(space, gym_spaces.MultiDiscrete):
        if space.nvec.ndim != 1:
            raise UserError(f"action space is {space}; expected one dimension: flatten it")
        first_ones = np.asarray(space.start, np.float64)
        return tuple(first_ones.tolist()), tuple((first_ones + space.nvec - 1).tolist()), "multi_discrete"
    if not isinstance(space, gym_spaces.Box) or len(space.shape) != 1 or space.shape[0] == 0:
        raise UserError(f"action space is {space}; expected a one-dimensional Box, Discrete or MultiDiscrete")
    if space.dtype.kind != "f":
        raise UserError(
            f"action space is {space} of whole numbers; use Discrete or MultiDiscrete for choices, or a Box of floats"
        )
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise UserError(f"action space is {space}; expected finite bounds, since actions are scaled to them")
    if not (low < high).all():
        entry = int(np.argmin(high - low))
        raise UserError(
            f"action space has low {low[entry]:g} and high {high[entry]:g} in entry {entry}; expected a width"
        )
    return tuple(low.tolist()), tuple(high.tolist()), "box"


class StepResult(NamedTuple):
    """One checked step of one environment."""

    observation: NDArray[Any]  # [O], a copy
    reward: float
    terminated: bool
    truncated: bool
    success: float  # NaN where the environment does not say it
    info: dict[str, Any]


class CheckedEnv:
    """One environment behind the border: what goes in lies in its action space, what comes out is checked and copied.

    The first episode is checked in full. After that a step is checked for what costs next to nothing: five values, an
    observation of the right shape and type, a number as reward.

    Args:
        env: the environment.
        task: of the environment, for messages; None: "the environment".

    Raises:
        UserError: its spaces are not those that agents can have; from `reset` and `step`: it returned something else
            than its spaces and gymnasium's interface say.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], task: Task | None = None) -> None:
        self.env = env
        try:
            self.spaces = Spaces.of(env.observation_space, env.action_space)
        except AttributeError as error:
            message = f"{described(task)}: {error}; expected a gymnasium.Env with observation_space and action_space"
            raise UserError(message) from error
        except UserError as error:
            raise UserError(f"{described(task)}: {error}") from error
        space = env.observation_space
        self._answers = Answers(space, task)
        plain = isinstance(space, gym_spaces.Box) and (len(space.shape) == 1 or self.spaces.image is not None)
        self._flatten: Callable[[Any], Any] | None = None if plain else functools.partial(gym_spaces.flatten, space)
        self._dtype = np.dtype(np.uint8) if self.spaces.image is not None else np.dtype(np.float64)
        self._send = self._sender(env.action_space)

    def retarget(self, task: Task) -> None:
        """Name another task in messages from now on: the environment was given it."""
        self._answers.task = task

    def reset(self, seed: int | None = None) -> NDArray[Any]:
        """Begin an episode; returns the observation `[O]`, a copy."""
        observation, _ = self._answers.reset(self.env.reset(seed=seed))
        return self._vector(observation, "reset")

    def step(self, action: NDArray[Any]) -> StepResult:
        """Step with an action `[A]` in policy units."""
        return self.step_raw(self._send(action))

    def step_raw(self, action: Any) -> StepResult:
        """Step with an action as the environment expects it; see `env_action`."""
        try:
            answer = self.env.step(action)
        except PhysicsDivergedError:
            raise
        except FloatingPointError as error:
            raise self._answers.error(
                f"step raised FloatingPointError ({error}); mend it, or raise metarl.errors.PhysicsDivergedError where "
                "the episode should be dropped"
            ) from error
        observation, reward, terminated, truncated, info = self._answers.step(answer)
        success = self._answers.success(info) if "success" in info else math.nan
        return StepResult(self._vector(observation, "step"), reward, terminated, truncated, success, info)

    def env_action(self, action: NDArray[Any]) -> Any:
        """Return an action `[A]` in policy units as the environment expects it: within its space, of its dtype."""
        return self._send(action)

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def _sender(self, space: Any) -> Callable[[NDArray[Any]], Any]:
        spaces = self.spaces
        if spaces.action_kind == "discrete":
            kind = space.dtype.type
            return lambda action: kind(spaces.to_env(action)[0])
        if spaces.action_kind == "multi_discrete":
            return lambda action: spaces.to_env(action).astype(space.dtype)
        low, high, dtype = space.low, space.high, space.dtype
        centre = (high.astype(np.float64) + low.astype(np.float64)) / 2
        half_range = (high.astype(np.float64) - low.astype(np.float64)) / 2

        def send(action: NDArray[Any]) -> NDArray[Any]:
            scaled = centre + half_range * np.clip(action.astype(np.float64), -1.0, 1.0)
            within: NDArray[Any] = np.clip(scaled.astype(dtype), low, high)  # rounding must not lead out of the space
            return within

        return send

    def _vector(self, observation: Any, source: str) -> NDArray[Any]:
        """Return a copy of an observation as a vector."""
        if self._flatten is None:
            return np.array(observation, self._dtype).reshape(-1)
        try:
            flat = np.array(self._flatten(observation), np.float64)
        except Exception:
            flat = None
        if flat is None or flat.shape != (self.spaces.observation_size,):
            raise self._answers.misfit(observation, source)
        return flat


class Answers:
    """Checks what an environment returns: tuples as gymnasium has them, observations of its space, numbers and flags.

    Args:
        space: of observations; of any kind.
        task: named in messages; None: "the environment".
        every_step: whether dictionaries and tuples are checked at every step, or in the first episode alone.

    Raises:
        UserError: from the methods: the environment returned something else.
    """

    def __init__(self, space: gymnasium.Space[Any], task: Task | None = None, every_step: bool = False) -> None:
        self.task, self._space, self._every_step = task, space, every_step
        self._shape = space.shape if isinstance(space, gym_spaces.Box) else None
        self._kinds = "biuf" if space.dtype is None or space.dtype.kind == "f" else "biu"
        self._episodes = 0
        self._flags = (bool, np.bool_)

    def reset(self, answer: Any) -> tuple[Any, dict[str, Any]]:
        """Return observation and info, given what `reset` returned; observations of a Box come as arrays."""
        if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], dict)):
            raise self.error(f"reset returned {_shown(answer)}; expected (observation, info)")
        self._episodes += 1
        return self._observation(answer[0], "reset"), answer[1]

    def step(self, answer: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Return the five values, given what `step` returned; observations of a Box come as arrays."""
        if type(answer) is not tuple or len(answer) != 5:
            raise self.error(
                f"step returned {_shown(answer)}; expected (observation, reward, terminated, truncated, info)"
            )
        observation, reward, terminated, truncated, info = answer
        observation = self._observation(observation, "step")
        if type(reward) is not float:
            reward = self._number(reward)
        if type(terminated) not in self._flags:
            terminated = self._flag(terminated, "terminated")
        if type(truncated) not in self._flags:
            truncated = self._flag(truncated, "truncated")
        if type(info) is not dict:
            raise self.error(f"step returned info {_shown(info)}; expected a dict")
        return observation, reward, terminated, truncated, info

    def success(self, info: dict[str, Any]) -> float:
        """Return `info["success"]`, 0, 1 or NaN."""
        array = _as_array(info["success"])
        if array is not None and array.size == 1 and array.dtype.kind in "biuf":
            number = float(array.reshape(()))
            if number in (0.0, 1.0) or math.isnan(number):
                return number
        raise self.error(f'step returned info["success"] {_shown(info["success"])}; expected 0, 1, True or False')

    def _observation(self, observation: Any, source: str) -> Any:
        """Return a checked observation; of a Box as an array, which may be the environment's own."""
        if self._shape is None:
            if (self._every_step or self._episodes <= 1) and not _fits(self._space, observation):
                raise self.misfit(observation, source)
            return observation
        array = observation if type(observation) is np.ndarray else _as_array(observation)
        if array is None or array.shape != self._shape:
            raise self.error(
                f"{source} returned an observation {_shown(observation)}; its space says shape {self._shape}"
            )
        if array.dtype.kind not in self._kinds:
            raise self.error(f"{source} returned an observation of {array.dtype}; its space says {self._space.dtype}")
        return array

    def misfit(self, observation: Any, source: str) -> UserError:
        """Return the error for an observation that is none of a composed space."""
        return self.error(f"{source} returned observation {_shown(observation)}; expected one of {self._space}")

    def _number(self, reward: Any) -> float:
        array = _as_array(reward)
        if array is None or array.size != 1 or array.dtype.kind not in "biuf":
            raise self.error(f"step returned reward {_shown(reward)}; expected a number")
        return float(array.reshape(()))

    def _flag(self, value: Any, field: str) -> bool:
        array = _as_array(value)
        if array is None or array.size != 1 or array.reshape(()) not in (0, 1):
            raise self.error(f"step returned {field} {_shown(value)}; expected True or False")
        return bool(array.reshape(()))

    def error(self, message: str) -> UserError:
        """Return the error for a message, in one line that names the task."""
        return UserError(" ".join(f"{described(self.task)}: {message}".split()))


def described(task: Task | None) -> str:
    """Return how messages name a task."""
    return "the environment" if task is None else f"task {task.name} {task.index} of {task.family}"


def _as_array(value: Any) -> NDArray[Any] | None:
    """Return an array, or None for what is no array of numbers or truth values."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        return None
    return array if array.dtype.kind in "biuf" else None


def _fits(space: Any, value: Any) -> bool:
    """Like `_has_structure`, also of values for which comparing raises."""
    try:
        return _has_structure(space, value)
    except Exception:
        return False


def _has_structure(space: Any, value: Any) -> bool:
    """Whether a value has the members, shapes and kinds of numbers that a space says; bounds of boxes don't count."""
    if isinstance(space, gym_spaces.Dict):
        if not isinstance(value, dict) or set(value) != set(space.spaces):
            return False
        return all(_has_structure(member, value[key]) for key, member in space.spaces.items())
    if isinstance(space, gym_spaces.Tuple):
        if not isinstance(value, tuple | list) or len(value) != len(space.spaces):
            return False
        return all(_has_structure(*pair) for pair in zip(space.spaces, value, strict=True))
    if isinstance(space, gym_spaces.Box):
        array = _as_array(value)
        return array is not None and array.shape == space.shape
    return bool(space.contains(value))


def _shown(value: Any) -> str:
    """Return a value as a message shows it: the shape of an array, the types in a tuple, else the value."""
    if isinstance(value, np.ndarray):
        return f"of shape {value.shape} and dtype {value.dtype}"
    if isinstance(value, tuple):
        return f"{len(value)} values ({', '.join(type(part).__name__ for part in value)})"
    if isinstance(value, dict):
        return f"a dict with {sorted(map(str, value))}"
    return repr(value)[:80] if isinstance(value, str | int | float | bool | None) else type(value).__name__


def env_attribute(env: gymnasium.Env[Any, Any], name: str) -> Any:
    """Return an attribute of the outermost layer of an environment that has it, e.g. `dt`; None if none has."""
    return env.get_wrapper_attr(name) if env.has_wrapper_attr(name) else None
