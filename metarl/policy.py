"""The trained agent as users hold it: predict, and adapt to a new task from a few episodes. Loads runs from disk.

Loading reads YAML, JSON and safetensors; nothing in a run directory is ever executed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

from metarl import agents
from metarl.checkpoint import Checkpoint, CorruptCheckpointError, Spaces, load_latest
from metarl.config import RunConfig, load_config
from metarl.errors import UserError
from metarl.sampling import rollout_arrays, scale_actions
from metarl.seeding import Purpose, integer_seed
from metarl.types import Agent, FloatArray, Percept, Rollout, Trajectory


def build_agent(config: RunConfig, spaces: Spaces, device: torch.device, purpose: Purpose = Purpose.AGENT) -> Agent:
    """Return a freshly initialised agent for observations and actions of the given sizes."""
    seed = integer_seed(config.seed, purpose)
    cues = len(config.stages) if config.stage_cue != "none" else 0
    sizes = spaces.observation_size, spaces.action_size
    return agents.build(config.agent, *sizes, device, seed, cues, config.stage_cue == "head")


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
    """

    config: RunConfig
    agent: Agent
    spaces: Spaces
    env_steps: int
    state: Any
    adapted: bool = False

    @property
    def num_parameters(self) -> int:
        """How many numbers one task's parameters hold."""
        return sum(value.numel() for name, value in self.agent.state_dict().items() if name.startswith("policy."))

    def predict(
        self,
        observation: NDArray[Any],
        state: Any = None,
        episode_start: NDArray[np.bool_] | None = None,
        deterministic: bool = False,
        reward: float | NDArray[Any] | None = None,
    ) -> tuple[NDArray[np.float32], Any]:
        """Choose actions; the signature of stable-baselines3, and the last reward for agents that read it.

        Args:
            observation: `[O]` or `[B, O]`, as the environment gives it.
            state: what the last call returned; None where a trial begins. An agent without a memory returns it as is.
            episode_start: `[B]`, bool, where an episode begins; the memory of a trial lives on. None: where `state` is.
            deterministic: the mean instead of a draw (from torch's global generator).
            reward: a number or `[B]`, of the last step. An agent with a memory takes it as average if it is not told;
                it knows by itself where a trial begins, and the last one of recorded episodes.

        Returns:
            Actions `[A]` or `[B, A]`, float32, within the bounds of the action space, and the next state.

        Raises:
            ValueError: wrong shape, NaN or infinity.
        """
        observation = np.asarray(observation, dtype=np.float64)
        begins = state is None
        reward = np.nan if reward is None else reward
        start = begins if episode_start is None else episode_start
        before = self.state if begins or not self.has_memory else state
        actions, _, after = self._draw(observation, before, deterministic, reward, start)
        scaled = scale_actions(np.clip(actions, -1.0, 1.0), *self.spaces.action_bounds)
        chosen = scaled.reshape(*observation.shape[:-1], -1).astype(np.float32)
        return chosen, after if self.has_memory else state

    @property
    def has_memory(self) -> bool:
        """Whether it adapts in its memory, while it acts."""
        return self.agent.adaptation_steps == 0

    def _draw(
        self,
        observation: FloatArray,
        state: Any,
        deterministic: bool,
        reward: float | NDArray[Any],
        episode_start: bool | NDArray[np.bool_],
    ) -> tuple[FloatArray, FloatArray, Any]:
        """Return actions `[B, A]` in which ±1 are the bounds, not clipped, log-probabilities `[B]`, the next state."""
        size = self.spaces.observation_size
        if observation.ndim not in (1, 2) or observation.shape[-1] != size:
            raise ValueError(f"observation has shape {observation.shape}; expected ({size},) or (batch, {size})")
        if not np.isfinite(observation).all():
            raise ValueError("observation holds NaN or infinity; check the sensors before calling predict")
        batch = torch.from_numpy(np.atleast_2d(observation)).float()[None]
        shape = (1, batch.shape[1])
        rewards = torch.as_tensor(np.broadcast_to(np.asarray(reward, dtype=np.float32), shape).copy())
        start = torch.as_tensor(np.broadcast_to(np.asarray(episode_start, dtype=np.bool_), shape).copy())
        percept = Percept(batch, rewards, start, torch.ones_like(start))
        noise = torch.zeros(*shape, self.spaces.action_size)
        if not deterministic:
            noise = torch.randn(noise.shape)
        actions, log_probs, state = self.agent.act(percept, noise, state)
        return actions[0].double().numpy(), log_probs[0].double().numpy(), state

    def record(self, env: gymnasium.Env[Any, Any], episodes: int) -> list[Trajectory]:
        """Run exploring episodes, to adapt on: the procedure of training. With a memory they are a trial.

        Args:
            env: of the new task; its episodes must end (see `gymnasium.wrappers.TimeLimit`).
            episodes: how many.

        Returns:
            Trajectories whose actions are the policy's draws before clipping, with their log-probabilities.
        """
        state, reward, trajectories = self.state, np.nan, []
        for _ in range(episodes):
            trajectory, state = self._episode(env, state, reward)
            trajectories.append(trajectory)
            reward = float(trajectory.rewards[-1])
        return trajectories

    def _episode(self, env: gymnasium.Env[Any, Any], state: Any, reward: float) -> tuple[Trajectory, Any]:
        bounds = self.spaces.action_bounds
        steps: list[tuple[Any, ...]] = []
        observation, _ = env.reset()
        ended = False
        while not ended:
            sensed = np.asarray(observation, dtype=np.float64)
            actions, log_probs, state = self._draw(sensed, state, False, reward, not steps)
            action = scale_actions(np.clip(actions[0], -1.0, 1.0), *bounds).astype(np.float32)
            following, gained, terminated, truncated, _ = env.step(action)
            reward = float(gained)
            steps.append((observation, scale_actions(actions[0], *bounds), reward, terminated, truncated, log_probs[0]))
            observation, ended = following, terminated or truncated
        return Trajectory(*(np.array(part) for part in zip(*steps, strict=True))), state

    def adapt(self, trajectories: Sequence[Trajectory]) -> Policy:
        """Return the policy after adapting to recorded episodes of the new task; this one stays as it is.

        An agent of the MAML family makes one gradient step on them; one with a memory reads them one after another.

        Args:
            trajectories: at least one episode, best from `record`. Others are accepted: without `log_probs` those of
            this policy are used, as if it had collected them; actions that were clipped make for a shorter step than
            the one that was trained. The last observation of an episode stands for the one after it.

        Raises:
            ValueError: no trajectory, or sizes that do not fit.
        """
        rollout = self._rollout(trajectories)
        return replace(self, state=self.agent.adapt(self.state, rollout), adapted=True)

    def _rollout(self, trajectories: Sequence[Trajectory]) -> Rollout:
        """Pad trajectories to a rollout `[1, N, T, ...]`."""
        if not trajectories:
            raise ValueError("no trajectories; adapting needs at least one episode")
        sizes = (self.spaces.observation_size, self.spaces.action_size)
        low, high = self.spaces.action_bounds
        shape = (1, len(trajectories), max(len(t.rewards) for t in trajectories))
        arrays = rollout_arrays(shape, *sizes)
        for n, trajectory in enumerate(trajectories):
            found = (trajectory.observations.shape[1], trajectory.actions.shape[1])
            if found != sizes:
                raise ValueError(f"trajectory {n} has (observation, action) sizes {found}; the agent expects {sizes}")
            length = len(trajectory.rewards)
            where = (0, n, slice(length))
            arrays["observations"][where] = trajectory.observations
            following = np.concatenate([trajectory.observations[1:], trajectory.observations[-1:]])
            arrays["next_observations"][where] = following
            arrays["actions"][where] = (trajectory.actions - (high + low) / 2) / ((high - low) / 2)
            arrays["rewards"][where] = trajectory.rewards
            arrays["success"][where] = np.nan
            arrays["terminated"][where], arrays["truncated"][where] = trajectory.terminated, trajectory.truncated
            arrays["truncated"][0, n, length - 1] |= not trajectory.terminated[-1]
            arrays["episode_start"][0, n, 0] = arrays["valid"][where] = True
        rollout = Rollout(**{name: torch.from_numpy(array) for name, array in arrays.items()})
        return replace(rollout, log_probs=self._log_probs(rollout, trajectories))

    def _log_probs(self, rollout: Rollout, trajectories: Sequence[Trajectory]) -> torch.Tensor:
        if all(trajectory.log_probs is not None for trajectory in trajectories):
            log_probs = torch.zeros_like(rollout.rewards)
        else:
            log_probs = self.agent.log_prob(self.state, rollout).clone()
        for n, trajectory in enumerate(trajectories):
            if trajectory.log_probs is not None:
                log_probs[0, n, : len(trajectory.log_probs)] = torch.from_numpy(trajectory.log_probs).float()
        return log_probs


def resolve_device(device: str) -> torch.device:
    """Return the device; `auto` takes the GPU if there is one. Raises UserError for a GPU that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: PyTorch finds no GPU here; use --device cpu or auto, or see `metarl doctor`")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def load(run_dir: str | Path, device: str = "cpu") -> Policy:
    """Load the agent of a run, before adaptation.

    Args:
        run_dir: what `metarl train` wrote.
        device: where adapting is computed: `cpu`, `cuda`, or `auto`.

    Raises:
        UserError: no such device; no run there, or nothing in it can be loaded; the message names what was rejected,
        and why.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir} holds no run: there is no config.yaml; train one with `metarl train CONFIG`")
    config = load_config(run_dir / "config.yaml")
    try:
        checkpoint = load_latest(run_dir / "checkpoints")
    except CorruptCheckpointError as error:
        raise UserError(f"cannot load {run_dir}: {error}") from error
    return restore(config, checkpoint, resolve_device(device))


def restore(config: RunConfig, checkpoint: Checkpoint, device: torch.device) -> Policy:
    """Return the policy that a checkpoint holds."""
    agent = build_agent(config, checkpoint.spaces, device)
    try:
        agent.load_state_dict(checkpoint.state)
    except ValueError as error:
        raise UserError(f"{checkpoint.path} does not fit the run's config: {error}") from error
    return Policy(config, agent, checkpoint.spaces, checkpoint.position.env_steps, agent.initial_state(1))
