"""The words that all parts of metarl share: Task, Trajectory, Rollout, and the Protocols that the loop is written in.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import gymnasium
    import torch

FloatArray: TypeAlias = NDArray[np.float64]
BoolArray: TypeAlias = NDArray[np.bool_]
Scalar: TypeAlias = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Task:
    """One environment with one goal (or one set of dynamics): all that is needed to build it again, exactly.

    Attributes:
        family: `metaworld`, `mujoco`, `navigation`, or the name of a family of one's own.
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
        observations: `[M, N, T, O]`, before the action.
        next_observations: `[M, N, T, O]`, after it; the true last observation at an episode's end, though the next
            step of a trial begins from another one.
        actions: `[M, N, T, A]`, as the policy drew them: before clipping and scaling to the action space.
        rewards: `[M, N, T]`.
        log_probs: `[M, N, T]`, of the policy that acted.
        terminated: `[M, N, T]`, bool.
        truncated: `[M, N, T]`, bool.
        episode_start: `[M, N, T]`, bool: the first step of an episode.
        valid: `[M, N, T]`, bool.
        success: `[M, N, T]`, 0 or 1; NaN where the family does not define success.
    """

    observations: torch.Tensor
    next_observations: torch.Tensor
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

    observations: FloatArray  # [E, O]
    rewards: FloatArray  # [E]
    terminated: BoolArray  # [E]
    truncated: BoolArray  # [E]
    success: FloatArray  # [E], NaN where undefined


class Percept(NamedTuple):
    """What an agent is told before it acts in P rollouts of each of M tasks."""

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

    mean: torch.Tensor
    """`[M, N, T, A]`, of its actions."""
    log_std: torch.Tensor
    """`[M, N, T, A]`."""
    values: torch.Tensor | None
    """`[M, N, T]`, in units of return; None if no value function is trained with the policy."""
    advantages: torch.Tensor | None
    """`[M, N, T]`, V-trace's for the policy gradient, in units of return, constants; None if not asked for."""
    scale: torch.Tensor
    """The standard deviation of returns, by which losses of values and advantages are measured; 1 without either."""


class Sensitivity(NamedTuple):
    """How the policy's outputs at S states depend on each of its parameters."""

    mean: torch.Tensor
    """`[S, A]`, of the actions."""
    log_std: torch.Tensor
    """`[S, A]`."""
    of_mean: dict[str, torch.Tensor]
    """∂mean/∂parameter by name, `[S, A, ...]`; without the parameters that it does not depend on."""
    of_log_std: dict[str, torch.Tensor]
    """∂log_std/∂parameter by name, `[S, A, ...]`; likewise."""


class EpisodesLostError(RuntimeError):
    """The episodes under way are lost, because a process that stepped them has died; they can be begun again."""


class BatchEnv(Protocol):
    """Up to `max_envs` environments stepped together. It holds no random stream: a reset is told its seeds.

    If its processes can be lost, `reset` and `step_wait` raise `EpisodesLostError`, the next reset starts what has
    died again, and an attribute `restarts` counts how often that was; read it as `getattr(envs, "restarts", 0)`.

    Attributes:
        max_envs: how many at most.
        lanes: in how many parts a caller should step them, if it can, so that some are stepped while it computes the
            actions of others; does not depend on the number of processes.
    """

    max_envs: int
    lanes: int
    observation_space: gymnasium.spaces.Box
    action_space: gymnasium.spaces.Box

    def reset(self, tasks: Sequence[Task], seeds: NDArray[np.uint32]) -> FloatArray:
        """Begin an episode of each of E ≤ max_envs tasks, seeded by `seeds` `[E]`; returns observations `[E, O]`."""

    def step_async(self, rows: slice, actions: FloatArray, active: BoolArray) -> None:
        """Begin a step of the environments `rows`, e of those that were reset, where `active` `[e]`.

        `actions` `[e, A]` are in the units of the action space.
        """

    def step_wait(self, rows: slice) -> Step:
        """Return what the step of `rows` led to; asked for in the order in which the steps were begun."""

    def close(self) -> None:
        """End worker processes and free memory; calling it twice is fine."""


class TaskDistribution(Protocol):
    """Tasks to train on, tasks held out, and how to build the environment of one.

    Two methods are optional: `make_batch(max_envs)` steps all environments as one computation, and `difficulty(task)`
    says how hard a task is, harder is larger, which a curriculum needs; it raises ValueError where there is no order.
    """

    @property
    def train_tasks(self) -> list[Task]:
        """Tasks to meta-train on."""

    @property
    def test_tasks(self) -> list[Task]:
        """Held-out tasks: disjoint from `train_tasks`, but for families that have only a few tasks in all."""

    def make(self, task: Task) -> gymnasium.Env[Any, Any]:
        """Build the environment of `task`. One with a method `set_task(task)` is reused for tasks of the same class."""


class Actor(Protocol):
    """What collecting asks of an agent. Its adaptation state is opaque: parameters a task, or a memory."""

    device: torch.device
    """Where `adapt` and `update` want their rollouts; `act` takes and gives tensors on the CPU."""

    trial_episodes: int
    """L, the episodes of a rollout, through which the state of `act` is carried; 1 for agents without a memory."""

    adaptation_steps: int
    """K, the number of calls of `adapt` between the first rollout and the last; 0 for agents that adapt in memory."""

    def initial_state(self, num_tasks: int) -> Any:
        """The state before adaptation, for `num_tasks` tasks."""

    def act(self, percept: Percept, noise: torch.Tensor, state: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Choose actions.

        Args:
            percept: of P rollouts of each task.
            noise: `[M, P, A]`, standard normal; zeros give the deterministic action.
            state: from `initial_state`, `adapt` or the last `act`; it stays as it is.

        Returns:
            actions `[M, P, A]` in which ±1 are the bounds of the action space, log_probs `[M, P]`, and the next state.
        """

    def adapt(self, state: Any, rollout: Rollout) -> Any:
        """The state after one adaptation step on `rollout`, which `state` collected; nothing else changes."""


class Controller(Protocol):
    """One control step, on the CPU, as a function of tensors alone; a `torch.nn.Module`, so that it can be exported."""

    state_size: int
    """S, of what is remembered from step to step; 0: nothing."""

    reward_scale: dict[str, float] | None
    """`mean` and `std` by which rewards are normalised inside; None where none are read."""

    observation_scale: tuple[FloatArray, FloatArray]
    """Mean and standard deviation by which observations are normalised inside, both `[O]`."""

    def __call__(self, observations: torch.Tensor, *rest: torch.Tensor | None) -> Any:
        """Return actions `[B, A]`, in the units of the action space, for raw observations `[B, O]`.

        What follows them is the noise `[B, A]` or None for the mean; with a memory (S > 0) before that the last rewards
        `[B]` (NaN: not known), where episodes start `[B]`, bool, and the state `[B, S]`, zeros where a trial begins.
        Then the next state is returned, too.
        """


class Guard(Protocol):
    """What `Agent.update` adds to its loss before each step of its optimiser."""

    def __call__(self, fraction: float, again: bool = False) -> torch.Tensor | None:
        """Return a scalar, or None for nothing.

        Args:
            fraction: of the iteration's data that the step learns from.
            again: on the same draw as the last time, to be compared with it.
        """


class Agent(Actor, Protocol):
    """What the loop, and whatever guards the agent's stability, ask of an agent."""

    training_adaptation_steps: int
    """K of the K + 1 rollouts that `update` learns from; differs where training does without adaptation."""

    def adapt(self, state: Any, rollout: Rollout, inner_lr: float | None = None) -> Any:
        """See `Actor.adapt`; `inner_lr` replaces the step size of training, ValueError where there is none."""

    def controller(self, state: Any, low: FloatArray, high: FloatArray) -> Controller:
        """What the agent does in `state`, of one task, step by step, for actions with bounds `[A]`."""

    def pack(self, state: Any) -> dict[str, torch.Tensor]:
        """Return an adaptation state as tensors, to be saved."""

    def unpack(self, packed: Mapping[str, torch.Tensor]) -> Any:
        """Return the state of one task that was packed; raises ValueError naming the entry that does not fit."""

    def log_prob(self, state: Any, rollout: Rollout) -> torch.Tensor:
        """Log-density `[M, N, T]` of a rollout's actions, by the agent that begins it in `state`; no gradient."""

    def update(self, rollouts: Sequence[Rollout], guard: Guard | None = None) -> dict[str, float]:
        """The outer step: learn from the K + 1 rollouts of one iteration; returns metrics by name."""

    def parameters(self) -> dict[str, torch.Tensor]:
        """What `update` trains, by name: the tensors themselves. Those of the policy begin with `policy.`."""

    def retrace(self, rollouts: Sequence[Rollout], advantages: bool = False) -> Prediction:
        """Adapt anew on the first K of K + 1 recorded rollouts; say what the agent would do in the last one now.

        Args:
            rollouts: of earlier policies. The log-probabilities of the first K are those of the policy that the data
                stands for: it need not be the one that collected it.
            advantages: whether to estimate them, too.
        """

    def sensitivities(
        self, rollouts: Sequence[Rollout], states: int, generator: torch.Generator
    ) -> Iterator[Sensitivity]:
        """Differentiate the policy at about `states` steps, drawn from all of the K + 1 rollouts, part by part.

        An agent that adapts by gradient steps is differentiated at the parameters that it had adapted then.
        """

    def hidden_units(self, rollouts: Sequence[Rollout]) -> dict[str, torch.Tensor]:
        """Activations `[S, H]` of each hidden layer of the policy, by name, at the valid steps of the last rollout."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything that training changes, flat."""

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned; raises ValueError naming the entry that does not fit."""


class StabilityMethod(Protocol):
    """Guards what an agent learned in earlier stages. Any number of them go together; the loop asks them in turn.

    A penalty or replay speaks through `loss`; a method that moves parameters does so in `observe`. What a method
    remembers it gives away in `state_dict`, so that a run can be resumed.
    """

    name: str
    """As in the config and in `stability/<name>/loss`."""

    def loss(self, agent: Agent, rng: np.random.Generator, fraction: float) -> dict[str, torch.Tensor]:
        """What is added to the agent's loss before a step of its optimiser; see `Guard`.

        Args:
            agent: about to make a step.
            rng: of this iteration, the only source of randomness.
            fraction: of the iteration's data that the step learns from.

        Returns:
            `{"loss": …}`, a scalar, or nothing where there is nothing to guard. Further entries are tracked only; all
            are `stability/<method>/<entry>`.
        """

    def observe(
        self,
        agent: Agent,
        rollouts: Sequence[Rollout],
        before: Mapping[str, torch.Tensor],
        rng: np.random.Generator,
    ) -> None:
        """Take note of an iteration after its update, or move the agent's parameters.

        Args:
            agent: after the update.
            rollouts: the K + 1 that it has learned from.
            before: what `Agent.parameters` held before the update.
            rng: of this iteration, another one than that of `loss`.
        """

    def end_stage(self, agent: Agent, rollouts: Sequence[Rollout], rng: np.random.Generator) -> None:
        """Consolidate at the end of a stage that others follow.

        Args:
            agent: at the end of the stage.
            rollouts: K + 1 fresh ones of it, on tasks of the stage.
            rng: of this stage's end.

        Raises:
            FloatingPointError: numbers are not finite; nothing was changed, and it is asked again with other rollouts.
        """

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything that the method remembers, flat."""

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned; raises ValueError naming the entry that does not fit."""
