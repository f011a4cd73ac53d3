"""The Protocols that the loop is written in: agents, batches of environments, task distributions, stability methods.

Must not import torch, environments or agents at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from metarl.types import (
    AdaptsBy,
    AgentSpec,
    BoolArray,
    FloatArray,
    PolicyJacobian,
    Prediction,
    Rollout,
    Step,
    Task,
    TimeStep,
)

if TYPE_CHECKING:
    import gymnasium
    import torch

    from metarl.spaces import Spaces


class EpisodesLostError(RuntimeError):
    """The episodes under way are lost, because a process that stepped them has died; they can be begun again."""


class BatchEnv(Protocol):
    """Up to `max_envs` environments stepped together. It holds no random stream: a reset gets its seeds.

    If its processes can be lost, `reset` and `step_wait` raise `EpisodesLostError`, the next reset starts what has
    died again, and an attribute `restarts` counts how often that was; read it as `getattr(envs, "restarts", 0)`.

    Attributes:
        max_envs: how many at most.
        lanes: in how many parts a caller should step them, if it can, so that some are stepped while it computes the
            actions of others; does not depend on the number of processes.
        spaces: of all environments; bounds of actions may differ by task, and are those of the first one here.
    """

    max_envs: int
    lanes: int
    spaces: Spaces

    def reset(self, tasks: Sequence[Task], seeds: NDArray[np.uint32]) -> NDArray[Any]:
        """Begin an episode of each of E ≤ max_envs tasks, seeded by `seeds` `[E]`, below 2³¹; returns `[E, O]`."""

    def step_async(self, rows: slice, actions: NDArray[np.float32], active: BoolArray) -> None:
        """Begin a step of the environments `rows`, e of those that were reset, where `active` `[e]`.

        `actions` `[e, A]` are in policy units (see `Spaces`), as the policy drew them.
        """

    def step_wait(self, rows: slice) -> Step:
        """Return what the step of `rows` led to; called in the order in which the steps were begun."""

    def close(self) -> None:
        """End worker processes and free memory; calling it twice is fine."""


class TaskDistribution(Protocol):
    """Tasks to train on, tasks held out, and how to build the environment of one.

    Three methods are optional: `make_batch(max_envs)` steps all environments as one computation; `retarget(env, task)`
    gives an environment that `make` built another task of the same family, benchmark, class and options, which is
    faster than to build one; `difficulty(task)` says how hard a task is, harder is larger, which a curriculum needs,
    and raises ValueError where there is no order.
    """

    @property
    def train_tasks(self) -> list[Task]:
        """Tasks to meta-train on."""

    @property
    def test_tasks(self) -> list[Task]:
        """Held-out tasks: disjoint from `train_tasks`, but for families that have only a few tasks in all."""

    def make(self, task: Task) -> gymnasium.Env[Any, Any]:
        """Build the environment of `task`."""


class Actor(Protocol):
    """What acts in environments: all that collecting needs of an agent, light enough to be sent to another process."""

    @property
    def trial_episodes(self) -> int:
        """L, the episodes of a rollout, through which the state of `act` is carried; 1 for agents without a memory."""

    @property
    def noise_size(self) -> int:
        """How many standard normal numbers one action takes."""

    def act(self, time_step: TimeStep, noise: torch.Tensor, state: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Choose actions; all tensors that go in and out are on the CPU.

        Args:
            time_step: of P rollouts of each task.
            noise: `[M, P, noise_size]`, standard normal; zeros give the deterministic action.
            state: from `initial_state`, `adapt` or the last `act`; it stays as it is.

        Returns:
            actions `[M, P, A]` in policy units (see `Spaces`), log_probs `[M, P]`, and the next state.
        """


class AdaptiveActor(Actor, Protocol):
    """What evaluation needs of an agent. Its adaptation state is opaque: parameters per task, a memory, or a latent."""

    device: torch.device
    """Where `adapt` and `update` take their rollouts."""

    adapts_by: AdaptsBy
    """How it adapts."""

    adaptation_steps: int
    """K, the number of calls of `adapt` between the first rollout and the last; 0 for agents that adapt in memory."""

    def initial_state(self, num_tasks: int) -> Any:
        """Return the state before adaptation, for `num_tasks` tasks."""

    def adapt(self, state: Any, rollout: Rollout) -> Any:
        """Return the state after one adaptation step on `rollout`, which `state` collected; nothing else changes."""

    def actor(self) -> Actor:
        """Return a snapshot that acts as the agent does now, on the CPU; it pickles, for collectors elsewhere."""


class Collector(Protocol):
    """Collects rollouts for the loop: in this process and its workers, or on other machines.

    Results depend on tasks and seeds alone, never on the number or place of workers.

    Attributes:
        max_tasks: tasks that one call may have.
        restarts: how often lost worker processes have been replaced so far.
    """

    max_tasks: int

    @property
    def restarts(self) -> int:
        """See above."""

    def collect(
        self,
        agent: AdaptiveActor,
        state: Any,
        tasks: Sequence[Task],
        rollouts_per_task: int,
        seeds: Sequence[np.random.SeedSequence],
    ) -> Rollout:
        """Run `rollouts_per_task` rollouts of each of M tasks, begun in `state`; see `metarl.collect.collect`.

        Args:
            agent: acts. Another process gets its `actor()`.
            state: of M tasks.
            tasks: M.
            rollouts_per_task: N.
            seeds: one for each task.

        Returns:
            A rollout `[M, N, T, ...]` on the agent's device.
        """

    def close(self) -> None:
        """End processes and free memory; calling it twice is fine."""


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


class AuxiliaryLoss(Protocol):
    """What `Agent.update` adds to its loss before each step of its optimiser."""

    def __call__(self, fraction: float, again: bool = False) -> torch.Tensor | None:
        """Return a scalar, or None for nothing.

        Args:
            fraction: of the iteration's data that the step learns from.
            again: repeat the last random draw, so that both values can be compared.
        """


class Agent(AdaptiveActor, Protocol):
    """What the loop and the stability methods need of an agent."""

    training_adaptation_steps: int
    """K of the K + 1 rollouts that `update` learns from; differs where training does without adaptation."""

    def adapt(self, state: Any, rollout: Rollout, inner_lr: float | None = None) -> Any:
        """See `AdaptiveActor.adapt`; `inner_lr` replaces the step size of training, ValueError where there is none."""

    def controller(self, state: Any, spaces: Spaces) -> Controller:
        """What the agent does in `state`, of one task, step by step, for actions with the bounds of `spaces`."""

    def pack(self, state: Any) -> dict[str, torch.Tensor]:
        """Return an adaptation state as tensors, to be saved."""

    def unpack(self, packed: Mapping[str, torch.Tensor]) -> Any:
        """Return the state of one task that was packed; raises ValueError naming the entry that does not fit."""

    def update(
        self, tasks: Sequence[Task], rollouts: Sequence[Rollout], auxiliary_loss: AuxiliaryLoss | None = None
    ) -> dict[str, float]:
        """Take the outer step: learn from the K + 1 rollouts of one iteration.

        Args:
            tasks: M, those of the rollouts, for agents that store experience by task.
            rollouts: K + 1, each `[M, N, T, ...]`.
            auxiliary_loss: what stability methods add to the loss; None: nothing.

        Returns:
            Metrics by name, e.g. `train/loss`.

        Raises:
            FloatingPointError: numbers are not finite; the loop puts back what `state_dict` held before.
        """

    def parameters(self) -> dict[str, torch.Tensor]:
        """What `update` trains, by name: the tensors themselves. Those of the policy begin with `policy.`."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return everything that training changes, flat; what `parameters` returns is there under the same names."""

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned; raises ValueError naming the entry that does not fit."""


class ProtectedAgent(Agent, Protocol):
    """What stability methods need of an agent beyond `Agent`; a run without them does without."""

    def log_prob(self, state: Any, rollout: Rollout) -> torch.Tensor:
        """Log-density `[M, N, T]` of a rollout's actions, by the agent that begins it in `state`; no gradient."""

    def replay_policy(self, rollouts: Sequence[Rollout], advantages: bool = False) -> Prediction:
        """Adapt again on the first K of K + 1 recorded rollouts; predict what the agent would do in the last one.

        Args:
            rollouts: K + 1 rollouts of earlier policies. The log-probabilities of the first K are those of the policy
                that is replayed, which may differ from the one that collected them.
            advantages: whether to estimate advantages, too.
        """

    def policy_jacobians(
        self, rollouts: Sequence[Rollout], states: int, generator: torch.Generator
    ) -> Iterator[PolicyJacobian]:
        """Differentiate the policy at about `states` steps, drawn from all of the K + 1 rollouts, part by part.

        An agent that adapts by gradient steps is differentiated at the parameters that it had adapted then.
        """

    def hidden_units(self, rollouts: Sequence[Rollout]) -> dict[str, torch.Tensor]:
        """Activations `[S, H]` of each hidden layer of the policy, by name, at the valid steps of the last rollout."""


class TensorStore(Protocol):
    """Files of tensors in a run directory, each written once and never changed."""

    def write(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a new file through to the disk; raises ValueError for a name that exists or is not `[a-z0-9_]+`."""

    def read(self, name: str) -> dict[str, torch.Tensor]:
        """Return the tensors of a file, verified by their hash; raises ValueError naming what is damaged."""


@runtime_checkable
class StoresData(Protocol):
    """An agent that stores more than fits into its state, e.g. replayed experience; an option of `Agent`.

    The data is no part of `state_dict`, which the loop copies every iteration and writes whole at every checkpoint.
    It lives in files that are written once, so that a checkpoint costs what is new. How much of it counts belongs into
    `state_dict`, so that an iteration that is undone, or a resumed run, forgets the rest.
    """

    def save_data(self, store: TensorStore) -> list[str]:
        """Write what is new; return the names of all files that the agent needs, in an order that `load_data` gets."""

    def load_data(self, store: TensorStore, names: Sequence[str]) -> None:
        """Read the files that `save_data` named; called after `load_state_dict`."""


AgentBuilder: TypeAlias = Callable[[AgentSpec], Agent]
"""Returns a freshly initialised agent; equal specs give equal agents."""


class StabilityMethod(Protocol):
    """Protects what an agent learned in earlier stages. Any number of methods combine; the loop calls them in order.

    A penalty or replay acts through `loss`; a method that moves parameters does so in `observe`. Its state is in
    `state_dict`, so that a run can be resumed.
    """

    name: str
    """As in the config and in `stability/<name>/loss`."""

    def loss(self, agent: ProtectedAgent, rng: np.random.Generator, fraction: float) -> dict[str, torch.Tensor]:
        """What is added to the agent's loss before a step of its optimiser; see `AuxiliaryLoss`.

        Args:
            agent: about to make a step.
            rng: of this iteration, the only source of randomness.
            fraction: of the iteration's data that the step learns from.

        Returns:
            `{"loss": …}`, a scalar, or nothing where there is nothing to protect. Further entries are tracked only; all
            are `stability/<method>/<entry>`.
        """

    def observe(
        self,
        agent: ProtectedAgent,
        rollouts: Sequence[Rollout],
        before: Mapping[str, torch.Tensor],
        rng: np.random.Generator,
    ) -> None:
        """Take note of an iteration after its update, or move the agent's parameters.

        Args:
            agent: after the update.
            rollouts: the K + 1 that it has learned from.
            before: what `Agent.parameters` held before the update.
            rng: of this iteration, independent of the one passed to `loss`.
        """

    def end_stage(self, agent: ProtectedAgent, rollouts: Sequence[Rollout], rng: np.random.Generator) -> None:
        """Consolidate at the end of a stage that others follow.

        Args:
            agent: at the end of the stage.
            rollouts: K + 1 fresh ones of it, on tasks of the stage.
            rng: of this stage's end.

        Raises:
            FloatingPointError: numbers are not finite; nothing was changed, and it is called again with other rollouts.
        """

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything that the method remembers, flat."""

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned; raises ValueError naming the entry that does not fit."""
