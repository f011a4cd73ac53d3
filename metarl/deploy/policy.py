"""The trained agent as users hold it: predict, adapt to a new task from a few episodes, save, export. Loads runs.

Loading reads YAML, JSON and safetensors; nothing in a run directory is ever executed.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import gymnasium
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError

from metarl.build import build_agent, check_spaces, env_of, resolve_device
from metarl.collect import act, rollout_arrays, run_episode
from metarl.config.schema import RunConfig, dump_config, hash_of, load_config
from metarl.deploy.onnx_export import describe, write_onnx
from metarl.errors import UserError
from metarl.nn.torch_settings import default_torch_settings
from metarl.protocols import Agent, AgentBuilder, Controller, ProtectedAgent
from metarl.runs.atomic_files import replace_file
from metarl.runs.checkpoint import Checkpoint, CorruptCheckpointError, load_best, load_iteration, load_latest
from metarl.runs.checkpoint import save as save_checkpoint
from metarl.runtime import as_env_actions, checked_memory, checked_observations
from metarl.spaces import CheckedEnv, Spaces
from metarl.types import FloatArray, Position, Rollout, Task, Trajectory

_LOG = logging.getLogger(__name__)
_ADAPTED = "adapted"  # the part of a checkpoint that holds an adaptation state


@dataclass(frozen=True)
class Policy:
    """An agent in one state of adaptation. Immutable: adapting returns another policy.

    Attributes:
        config: of the run that it comes from.
        agent: what adapts and acts.
        spaces: sizes and bounds that it was built for.
        env_steps: environment steps of its training.
        state: the agent's adaptation state for one task.
        adapted: whether it has been adapted to a task.
        builder: builds the agent, if it is not a built-in one.
    """

    config: RunConfig
    agent: Agent
    spaces: Spaces
    env_steps: int
    state: Any
    adapted: bool = False
    builder: AgentBuilder | None = None

    @property
    def num_parameters(self) -> int:
        """How many numbers one task's parameters hold."""
        return sum(value.numel() for name, value in self.agent.state_dict().items() if name.startswith("policy."))

    @property
    def observation_size(self) -> int:
        """O."""
        return self.spaces.observation_size

    @property
    def action_size(self) -> int:
        """A."""
        return self.spaces.action_size

    @property
    def action_kind(self) -> str:
        """`box`, `discrete` or `multi_discrete`."""
        return self.spaces.action_kind

    @property
    def action_low(self) -> FloatArray:
        """`[A]`."""
        return self.spaces.action_bounds[0]

    @property
    def action_high(self) -> FloatArray:
        """`[A]`."""
        return self.spaces.action_bounds[1]

    def predict(
        self,
        observation: Any,
        state: NDArray[np.float32] | None = None,
        episode_start: ArrayLike | None = None,
        deterministic: bool = False,
        reward: ArrayLike | None = None,
    ) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        """Choose actions; the signature of stable-baselines3, and the last reward for agents that read it.

        Args:
            observation: `[O]` or `[B, O]`, as the environment gives it; of a dictionary space a mapping, too.
            state: `[B, S]`, what the last call returned; None, or rows of zeros, where a trial begins. An agent
                without a memory returns it as is.
            episode_start: `[B]`, bool, where an episode begins; the memory of a trial lives on. Where a trial begins
                an episode does, too.
            deterministic: the mean instead of a draw (from torch's global generator).
            reward: a number or `[B]`, of the last step. An agent with a memory takes an unknown reward as the average.
                It is not read where a trial begins; there the agent knows the last one of recorded episodes.

        Returns:
            Actions `[A]` or `[B, A]` within the action space, float32, and the next state. Choices are int64; those
            of a `Discrete` space `[]` or `[B]`.

        Raises:
            ValueError: wrong shape, NaN or infinity.
        """
        form = self.spaces.observation_parts, self.spaces.image
        observations = checked_observations(observation, self.observation_size, *form)
        batch = torch.from_numpy(observations if observations.ndim == 2 else observations[None])
        noise = None if deterministic else torch.randn(len(batch), self.agent.noise_size, dtype=torch.float32)
        with torch.inference_mode():
            if self.has_memory:
                inputs = checked_memory(len(batch), self.controller.state_size, state, episode_start, reward)
                actions, after = self.controller(batch, *map(torch.from_numpy, inputs), noise)
                state = after.numpy()
            else:
                actions = self.controller(batch, noise)
        return as_env_actions(actions.numpy(), self.action_kind, observations.ndim == 1), state

    def reset(self, batch: int = 1) -> NDArray[np.float32]:
        """Return the state with which `batch` trials begin: zeros `[B, S]`, where S is 0 without a memory.

        What a policy has read in recorded episodes is part of it and not of the state.
        """
        return np.zeros((batch, self.controller.state_size), np.float32)

    @property
    def has_memory(self) -> bool:
        """Whether it adapts in its memory, while it acts."""
        return self.agent.adapts_by == "memory"

    @functools.cached_property
    def controller(self) -> Controller:
        """One control step as a function of tensors, on the CPU: what `predict` runs and `export` writes."""
        return self.agent.controller(self.state, self.spaces)

    @default_torch_settings()
    def record(self, env: gymnasium.Env[Any, Any], episodes: int) -> list[Trajectory]:
        """Run exploring episodes, to adapt on: the procedure of training. With a memory they are a trial.

        Args:
            env: of the new task; its episodes must end (see `gymnasium.wrappers.TimeLimit`).
            episodes: how many.

        Returns:
            Trajectories whose actions are the policy's draws before clipping, with their log-probabilities.

        Raises:
            UserError: the environment has other spaces, or returned something else than they say.
        """
        checked = CheckedEnv(env)
        check_spaces(self.spaces, checked.spaces, bounds=False)
        state, reward, trajectories = self.state, math.nan, []
        for _ in range(episodes):
            trajectory, state = self._record_episode(checked, state, reward)
            trajectories.append(trajectory)
            reward = float(trajectory.rewards[-1])
        return trajectories

    def _record_episode(self, env: CheckedEnv, state: Any, reward: float) -> tuple[Trajectory, Any]:
        """Run an episode with the agent itself, which gives log-probabilities; returns it and the state after it."""
        active = np.ones((1, 1), np.bool_)
        drawn: list[FloatArray] = []
        log_probs: list[float] = []

        def choose(observation: NDArray[Any], reward: float, start: bool) -> Any:
            nonlocal state
            sensed = checked_observations(observation, self.observation_size, image=self.spaces.image)[None, None]
            last_reward, begins = np.full((1, 1), reward, np.float32), np.full((1, 1), start)
            noise = torch.randn(1, 1, self.agent.noise_size)
            actions, log_prob, state = act(self.agent, sensed, last_reward, begins, active, noise, state)
            draws = actions[0, 0].numpy()
            drawn.append(self.spaces.to_env(draws, clip=False))
            log_probs.append(float(log_prob))
            return env.env_action(draws)

        steps = list(run_episode(env, choose, reward=reward))
        ends = [[getattr(step, name) for step in steps] for name in ("reward", "terminated", "truncated")]
        observations = np.array([step.observation for step in steps])
        rewards, terminated, truncated = map(np.array, ends)
        actions = np.array(drawn)
        return Trajectory(observations, actions, rewards, terminated, truncated, np.array(log_probs)), state

    @default_torch_settings()
    def adapt(self, trajectories: Sequence[Trajectory], steps: int = 1, inner_lr: float | None = None) -> Policy:
        """Return the policy after adapting to recorded episodes of the new task; this one stays as it is.

        An agent of the MAML family makes gradient steps on them; one with a memory reads them one after another.

        Args:
            trajectories: at least one episode, best from `record`. Others are accepted: without `log_probs` those of
                this policy are used, as if it had collected them; actions that were clipped make for a shorter step
                than the one that was trained. The last observation of an episode also serves as its next observation.
            steps: gradient steps on these episodes. Training makes each of its steps on fresh ones: to adapt as in
                training, record and adapt alternately.
            inner_lr: step size instead of that of training; the step is scaled in proportion, so that learned rates
                keep their ratios.

        Raises:
            ValueError: no trajectory, sizes that do not fit, or steps and rates for an agent that has none.
        """
        if steps < 1 or (inner_lr is not None and not 0 < inner_lr < math.inf):
            raise ValueError(f"steps is {steps}, inner_lr is {inner_lr}; expected at least 1 and more than 0")
        name, adapts_by = self.config.agent.name, self.agent.adapts_by
        if adapts_by == "nothing":
            raise ValueError(f"{name} does not adapt; use the policy as it is")
        if adapts_by != "gradient" and (steps != 1 or inner_lr is not None):
            raise ValueError(f"{name} adapts by {adapts_by}: it reads the episodes, and has no steps and no inner_lr")
        rollout, state = self._rollout(trajectories), self.state
        for _ in range(steps):
            state = self.agent.adapt(state, rollout) if inner_lr is None else self.agent.adapt(state, rollout, inner_lr)
        if adapts_by == "gradient" and not all(bool(part.isfinite().all()) for part in self.agent.pack(state).values()):
            raise ValueError(
                "adapting led to numbers that are not finite; look at the log_probs and rewards of the episodes, or "
                "lower inner_lr"
            )
        return replace(self, state=state, adapted=True)

    def _rollout(self, trajectories: Sequence[Trajectory]) -> Rollout:
        """Pad trajectories to a rollout `[1, N, T, ...]`."""
        if not trajectories:
            raise ValueError("no trajectories; adapting needs at least one episode")
        sizes = (self.spaces.observation_size, self.spaces.action_size)
        shape = (1, len(trajectories), max(len(t.rewards) for t in trajectories))
        arrays = rollout_arrays(shape, 1, self.spaces)
        for n, trajectory in enumerate(trajectories):
            found = (trajectory.observations.shape[1], trajectory.actions.shape[1])
            if found != sizes:
                raise ValueError(f"trajectory {n} has (observation, action) sizes {found}; the agent expects {sizes}")
            if (trajectory.terminated | trajectory.truncated)[:-1].any():
                raise ValueError(f"trajectory {n} ends before its last step; hand over one for each episode")
            length = len(trajectory.rewards)
            where = (0, n, slice(length))
            arrays["observations"][where] = trajectory.observations
            arrays["final_observations"][0, n, 0] = trajectory.observations[-1]
            arrays["actions"][where] = self.spaces.to_policy(trajectory.actions)
            arrays["rewards"][where] = trajectory.rewards
            arrays["success"][where] = np.nan
            arrays["terminated"][where], arrays["truncated"][where] = trajectory.terminated, trajectory.truncated
            arrays["truncated"][0, n, length - 1] |= not trajectory.terminated[-1]
            arrays["episode_start"][0, n, 0] = arrays["valid"][where] = True
        rollout = Rollout(**{name: torch.from_numpy(array) for name, array in arrays.items()})
        return replace(rollout, log_probs=self._log_probs(rollout, trajectories))

    def _log_probs(self, rollout: Rollout, trajectories: Sequence[Trajectory]) -> torch.Tensor:
        missing = sum(trajectory.log_probs is None for trajectory in trajectories)
        missing *= self.agent.adapts_by == "gradient"  # others read no log-probabilities
        if not missing:
            log_probs = torch.zeros_like(rollout.rewards)
        else:
            _LOG.warning(
                "metarl: %d of %d episodes come without log-probabilities; those of this policy are used, as if it had "
                "recorded them",
                missing,
                len(trajectories),
            )
            if not hasattr(self.agent, "log_prob"):
                raise ValueError(
                    f"{missing} episodes have no log_probs, and the agent no method log_prob to compute them"
                )
            log_probs = cast(ProtectedAgent, self.agent).log_prob(self.state, rollout).clone()
        for n, trajectory in enumerate(trajectories):
            if trajectory.log_probs is not None:
                log_probs[0, n, : len(trajectory.log_probs)] = torch.from_numpy(trajectory.log_probs).float()
        return log_probs

    def save(self, path: str | Path) -> None:
        """Write the policy, adapted as it is, into a new folder that `metarl.load` reads.

        Raises:
            UserError: the folder holds something already, or cannot be written.
        """
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} exists already; save to another folder, or remove it")
        states = {"agent": self.agent.state_dict()}
        if self.adapted:
            states[_ADAPTED] = self.agent.pack(self.state)
        try:
            path.mkdir(parents=True, exist_ok=True)
            config, position = dump_config(self.config).encode(), Position(env_steps=self.env_steps)
            digest = hash_of(config)
            save_checkpoint(path / "checkpoints", states, position, self.spaces, keep=1, config_sha256=digest)
            replace_file(path / "config.yaml", config)  # last: it makes a run of it
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"cannot write to {path}: {reason}; choose another folder") from error

    def export(
        self,
        path: str | Path,
        env: gymnasium.Env[Any, Any] | None = None,
        *,
        task: Task | None = None,
        control_period_s: float | None = None,
    ) -> None:
        """Write the policy as one ONNX file, which `metarl.runtime.OnnxPolicy` runs without torch.

        Normaliser, clipping and the units of the action space are inside. The file is compared with this policy on
        random inputs before it is kept.

        Args:
            path: the file.
            env: what the policy is for: names entries of observations and actions (`observation_names`,
                `action_names`) and the control period (`dt`) where it has them. None for one of the run's own, where
                the tasks are not custom ones.
            task: that it was adapted to, for the record.
            control_period_s: time between two actions; that of `env` if None.

        Raises:
            UserError: the packages of the extra `onnx` are missing, or the file cannot be written.
            ValueError: the environment has other sizes than the policy.
        """
        own = env_of(self.config) if env is None else None
        with contextlib.closing(own) if own is not None else contextlib.nullcontext():
            metadata = self._metadata(own if env is None else env, task, control_period_s)
        write_onnx(self.controller, Path(path), metadata)

    def _metadata(
        self, env: gymnasium.Env[Any, Any] | None, task: Task | None, control_period_s: float | None
    ) -> dict[str, Any]:
        return describe(
            self.controller,
            self.config,
            self.spaces,
            trial_episodes=self.agent.trial_episodes if self.has_memory else None,
            adapted=self.adapted,
            env_steps=self.env_steps,
            noise_size=self.agent.noise_size,
            env=env,
            task=task,
            control_period_s=control_period_s,
        )


@default_torch_settings()
def load(
    run_dir: str | Path,
    device: str = "cpu",
    checkpoint: str | int = "latest",
    *,
    agent: AgentBuilder | None = None,
) -> Policy:
    """Load the agent of a run, before adaptation; or a policy that was saved, adapted as it was.

    Args:
        run_dir: what `metarl train` or `Policy.save` wrote.
        device: where adapting is computed: `cpu`, `cuda`, or `auto`.
        checkpoint: `latest`; `best` by the evaluations during training (its score on those tasks is optimistically
            biased); or the number of an iteration. A damaged checkpoint gives way to the next, with a warning, unless
            its iteration was named.
        agent: builds a custom agent, as `metarl.train` got it; None for the built-in agents.

    Raises:
        UserError: no such device; no run there, or nothing in it can be loaded; the message names what was rejected,
            and why.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir} holds no run: there is no config.yaml; train one with `metarl train CONFIG`")
    config = load_config(run_dir / "config.yaml")
    folder = run_dir / "checkpoints"
    try:
        if isinstance(checkpoint, int):
            found = load_iteration(folder, checkpoint)
        elif checkpoint in ("latest", "best"):
            found = load_best(folder) if checkpoint == "best" else load_latest(folder)
        else:
            raise UserError(f"checkpoint is {checkpoint!r}; expected latest, best or the number of an iteration")
    except CorruptCheckpointError as error:
        raise UserError(f"cannot load {run_dir}: {error}") from error
    if found.manifest.config_sha256 != hash_of((run_dir / "config.yaml").read_bytes()):
        _LOG.warning("metarl: %s is not what %s was trained with", run_dir / "config.yaml", found.path.name)
    return restore(config, found, resolve_device(device), agent)


def restore(
    config: RunConfig, checkpoint: Checkpoint, device: torch.device, builder: AgentBuilder | None = None
) -> Policy:
    """Return the policy that a checkpoint holds."""
    agent = build_agent(config, checkpoint.spaces, device, builder=builder)
    try:
        agent.load_state_dict(checkpoint.state)
        packed = checkpoint.load(_ADAPTED)
        state = agent.unpack(packed) if packed else agent.initial_state(1)
    except ValueError as error:
        raise UserError(f"{checkpoint.path} does not fit the run's config: {error}") from error
    env_steps = checkpoint.position.env_steps
    return Policy(config, agent, checkpoint.spaces, env_steps, state, bool(packed), builder)
