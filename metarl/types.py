"""The data that all parts of metarl share: Task, Trajectory, Rollout, Position, AgentSpec.

Owns validation and JSON, no other behaviour. Must not import torch, environments or agents at run time.

Shape legend, used in every docstring:

    M tasks      N rollouts a task      T steps      K adaptation steps
    L episodes a rollout: 1, or the episodes of a trial for agents that adapt in their memory
    P rollouts of one task in flight    E environments stepped together (E = M · P, task first)
    O observation size                  A action size

A `[M, N, T, ...]` array has the task first, so that `torch.func.vmap` maps over tasks.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

if TYPE_CHECKING:
    import torch

    from metarl.nn.distributions import Distribution
    from metarl.spaces import Spaces

FloatArray: TypeAlias = NDArray[np.float64]
BoolArray: TypeAlias = NDArray[np.bool_]
Scalar: TypeAlias = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Task:
    """One environment with one goal (or one set of dynamics): all that is needed to build it again, exactly.

    Attributes:
        family: `metaworld`, `mujoco`, `navigation`, or the name of a custom family.
        benchmark: the distribution within the family, e.g. `ML10` or `HalfCheetahDir`.
        split: `train` or `test`.
        name: the class of the task, e.g. `reach-v3`; results are reported per class.
        index: the number of the task within (benchmark, split, name).
        seed: the seed of the distribution that the task came from.
        options: what else the environment is built with, e.g. `{"horizon": 100}`; kept sorted, so that equal tasks
            are equal.
    """

    family: str
    benchmark: str
    split: str
    name: str
    index: int
    seed: int
    options: tuple[tuple[str, Scalar], ...] = ()

    def __post_init__(self) -> None:
        pairs = self.options.items() if isinstance(self.options, Mapping) else self.options
        object.__setattr__(self, "options", tuple(sorted((str(key), value) for key, value in pairs)))

    def option(self, key: str) -> Any:
        """Return one option; raises KeyError if the task has none of that name."""
        return dict(self.options)[key]

    def to_json(self) -> str:
        """Return the task as one JSON object."""
        return json.dumps({**dataclasses.asdict(self), "options": dict(self.options)})

    @classmethod
    def from_json(cls, text: str) -> Task:
        """Build a task from what `to_json` wrote; raises ValueError for anything else."""
        try:
            fields = json.loads(text)
            _check_fields(fields)
            return cls(**fields)
        except (RecursionError, TypeError, ValueError) as error:
            cause = str(error)[:200]
            raise ValueError(f"not a task: {text[:80]!r} ({cause}); expected what Task.to_json writes") from error


def _check_fields(fields: Any) -> None:
    """Raise ValueError if a task's fields are not of their types; unknown and missing ones are left to Task."""
    if not isinstance(fields, dict):
        raise ValueError("it is no JSON object")
    for name, value in fields.items():
        if name in ("index", "seed"):
            fits = type(value) is int and value >= 0
        elif name == "options":
            fits = _are_options(list(value.items()) if isinstance(value, dict) else value)
        else:
            fits = isinstance(value, str)
        if not fits:
            raise ValueError(f"{name} is {str(value)[:80]}")


def _are_options(pairs: object) -> bool:
    """Whether this is a list of names and values, as JSON has it of a task's options, too; each name once."""
    return (
        isinstance(pairs, list)
        and all(isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs)
        and all(_is_scalar(value) for _, value in pairs)
        and len({name for name, _ in pairs}) == len(pairs)
    )


def _is_scalar(value: object) -> bool:
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


@dataclass(frozen=True)
class Trajectory:
    """One recorded episode, as a robot would hand it over; checked on construction.

    Attributes:
        observations: `[T, O]`, the observation before each action.
        actions: `[T, A]`, in the units of the environment.
        rewards: `[T]`.
        terminated: `[T]`, the episode ended by itself.
        truncated: `[T]`, the episode was cut off.
        log_probs: `[T]` or None, of the policy that acted; recomputed when absent.

    Raises:
        ValueError: a shape does not fit or a number is not finite; the message names the field.
    """

    observations: FloatArray
    actions: FloatArray
    rewards: FloatArray
    terminated: BoolArray
    truncated: BoolArray
    log_probs: FloatArray | None = None

    def __post_init__(self) -> None:
        for field, ndim in (("observations", 2), ("actions", 2), ("rewards", 1), ("log_probs", 1)):
            if field != "log_probs" or self.log_probs is not None:
                value = _array(field, getattr(self, field)).astype(np.float64)
                object.__setattr__(self, field, _checked(field, value, ndim))
        for field in ("terminated", "truncated"):
            value = _array(field, getattr(self, field))
            if not np.isin(value, (0, 1)).all():
                raise ValueError(f"trajectory.{field} holds other values than True and False")
            object.__setattr__(self, field, _checked(field, value.astype(np.bool_), 1))
        length = len(self.rewards)
        if length == 0:
            raise ValueError("trajectory is empty; expected at least one step")
        for field in ("observations", "actions", "terminated", "truncated", "log_probs"):
            value = getattr(self, field)
            if value is not None and len(value) != length:
                raise ValueError(f"trajectory.{field} has {len(value)} steps, rewards has {length}; they must be equal")


def _array(field: str, value: object) -> NDArray[Any]:
    """Return an array of numbers or truth values, as it was given."""
    try:
        array = np.asarray(value)
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"trajectory.{field} is no array: {str(error)[:200]}") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"trajectory.{field} has shape {array.shape} and dtype {array.dtype}; expected numbers")
    return array


def _checked(field: str, value: NDArray[Any], ndim: int) -> NDArray[Any]:
    if value.ndim != ndim:
        raise ValueError(f"trajectory.{field} has shape {value.shape}; expected {ndim} dimension(s)")
    if not np.isfinite(value).all():
        raise ValueError(f"trajectory.{field} holds NaN or infinity; drop the episode or mend the recording")
    return value


@dataclass(frozen=True)
class Rollout:
    """What agents learn from: of M tasks N rollouts each, of L complete episodes end to end, padded to T steps.

    L is 1 for agents that adapt between rollouts; for those that adapt in their memory a rollout is a trial. The steps
    of a rollout come first, padding is last: it has `valid` False and zeros elsewhere. `terminated` and `truncated` are
    never merged: a value function bootstraps after truncation and not after termination.

    Attributes:
        observations: `[M, N, T, O]`, before the action; float32 or, of images, uint8.
        final_observations: `[M, N, L, O]`, after the last action of each episode.
        actions: `[M, N, T, A]`, as the policy drew them, in policy units (see `metarl.spaces.Spaces`).
        rewards: `[M, N, T]`.
        log_probs: `[M, N, T]`, of the policy that acted.
        terminated: `[M, N, T]`, bool.
        truncated: `[M, N, T]`, bool.
        episode_start: `[M, N, T]`, bool: the first step of an episode.
        valid: `[M, N, T]`, bool.
        success: `[M, N, T]`, 0 or 1; NaN where the family does not define success.
    """

    observations: torch.Tensor
    final_observations: torch.Tensor
    actions: torch.Tensor
    rewards: torch.Tensor
    log_probs: torch.Tensor
    terminated: torch.Tensor
    truncated: torch.Tensor
    episode_start: torch.Tensor
    valid: torch.Tensor
    success: torch.Tensor

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Rollout:
        """Return a rollout with `function` applied to every tensor."""
        return Rollout(**{field.name: function(getattr(self, field.name)) for field in dataclasses.fields(self)})

    def to(self, device: torch.device | str) -> Rollout:
        """Return the rollout on `device`."""
        return self.map(lambda tensor: tensor.to(device))

    @property
    def env_steps(self) -> int:
        """How many environment steps the rollout holds."""
        return int(self.valid.sum())

    @property
    def episode(self) -> torch.Tensor:
        """The episode that each step belongs to, counted from 0 in every rollout, `[M, N, T]`."""
        return (self.episode_start.cumsum(-1) - 1).clamp_min(0)

    @property
    def next_observations(self) -> torch.Tensor:
        """The observations after each action, `[M, N, T, O]`, computed: at an episode's end the true last one.

        The next step of a trial begins from another one.
        """
        following = self.observations.new_zeros(self.observations.shape)
        following[:, :, :-1] = self.observations[:, :, 1:]
        following[~self.valid] = 0
        ends = self.valid.clone()
        ends[:, :, :-1] &= ~self.valid[:, :, 1:] | self.episode_start[:, :, 1:]
        task, rollout, step = ends.nonzero(as_tuple=True)
        following[task, rollout, step] = self.final_observations[task, rollout, self.episode[task, rollout, step]]
        return following

    def episode_returns(self) -> torch.Tensor:
        """Undiscounted return of each episode, `[M, N, L]`; NaN for the episodes of a dropped rollout."""
        returns = self._by_episode(self.rewards * self.valid, "sum")
        return returns.masked_fill(~self.valid.any(-1, keepdim=True), float("nan"))

    def episode_success(self) -> torch.Tensor:
        """1 where success held at ANY step of the episode, else 0, `[M, N, L]`; NaN if undefined or dropped."""
        undefined = self._by_episode((self.success.isnan() & self.valid).to(self.rewards.dtype), "amax") > 0
        reached = self._by_episode(self.success.nan_to_num() * self.valid, "amax")
        return reached.masked_fill(undefined | ~self.valid.any(-1, keepdim=True), float("nan"))

    def _by_episode(self, values: torch.Tensor, reduce: str) -> torch.Tensor:
        """Reduce `[M, N, T]` to `[M, N, L]`; values are not negative where the reduction is a maximum."""
        episode = self.episode
        count = int(episode.max()) + 1
        return values.new_zeros(*values.shape[:2], count).scatter_reduce(-1, episode, values, reduce)


class Step(NamedTuple):
    """What one step of E environments returns. Arrays are views that their next step overwrites: copy what you keep."""

    observations: NDArray[Any]  # [E, O], floats or, of images, bytes
    rewards: FloatArray  # [E]
    terminated: BoolArray  # [E]
    truncated: BoolArray  # [E]
    success: FloatArray  # [E], NaN where undefined


Count = Annotated[int, Field(ge=0, lt=2**62)]
"""What a whole number on disk may be."""


@dataclass(frozen=True)
class Position:
    """Where a run stands, counted after the last finished iteration.

    Attributes:
        stage: index of the current stage.
        stage_iteration: iterations finished in that stage.
        iteration: iterations finished in all.
        env_steps: environment steps of training in all.
        skipped: consecutive iterations at the end that were undone, since their numbers were not finite.
    """

    stage: Count = 0
    stage_iteration: Count = 0
    iteration: Count = 0
    env_steps: Count = 0
    skipped: Count = 0


class TimeStep(NamedTuple):
    """What an agent reads before it acts in P rollouts of each of M tasks."""

    observations: torch.Tensor
    """`[M, P, O]`, raw."""
    rewards: torch.Tensor
    """`[M, P]`, of the last step, also of the episode before; NaN where not known, or where a rollout begins."""
    episode_start: torch.Tensor
    """`[M, P]`, bool: an episode begins with these observations."""
    active: torch.Tensor
    """`[M, P]`, bool: elsewhere the episode has ended, actions have no effect, and a memory stays as it is."""


class Prediction(NamedTuple):
    """What an agent would do and expects now, at the steps of recorded rollouts; attached to its parameters."""

    distribution: Distribution
    """Of its actions, `[M, N, T]`."""
    values: torch.Tensor | None
    """`[M, N, T]`, in units of return; None if no value function is trained with the policy."""
    advantages: torch.Tensor | None
    """`[M, N, T]`, V-trace's for the policy gradient, in units of return, constants; None if not requested."""
    scale: torch.Tensor
    """The standard deviation of returns, by which losses of values and advantages are measured; 1 without either."""


class PolicyJacobian(NamedTuple):
    """How the distribution of actions at S states depends on each parameter of the policy."""

    distribution: Distribution
    """Of the actions, `[S]`."""
    slopes: dict[str, dict[str, torch.Tensor]]
    """∂output/∂parameter, by the outputs that define the distribution (e.g. `mean`) and by the parameters, each
    `[S, A, ...]`; without the parameters that an output does not depend on."""


AdaptsBy: TypeAlias = Literal["gradient", "memory", "inference", "nothing"]
"""How an agent adapts: by gradient steps on rollouts; in its memory, while it acts; by inferring a latent from
rollouts; or not at all."""


@dataclass(frozen=True)
class AgentSpec:
    """What an agent is built for.

    Attributes:
        spaces: sizes of observations and actions, bounds of actions.
        device: where the agent adapts and updates.
        seed: root of the initial parameters and of everything that the agent draws.
        num_stage_ids: entries at the end of an observation that are a one-hot of the stage; 0: none. An agent should
            not normalise them.
        stage_heads: whether the policy has one output layer for each stage, chosen by the one-hot.
    """

    spaces: Spaces
    device: torch.device
    seed: int
    num_stage_ids: int = 0
    stage_heads: bool = False
