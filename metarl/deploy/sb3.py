"""Interoperation with stable-baselines3: policies as a PPO that continues to learn, and trials as single episodes.

`to_sb3` copies a policy without a memory into a PPO. `TrialEnv` and `TrialPolicy` let stable-baselines3 run an agent
with a memory: a trial of several episodes is a single episode to it, so that the memory persists through all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.utils import RecordConstructorArgs
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from torch import Tensor, nn

from metarl.build import check_spaces, env_of
from metarl.deploy.policy import Policy
from metarl.errors import UserError
from metarl.nn.mlp import MlpPolicy, Params
from metarl.nn.normalizer import Normalizer
from metarl.runtime import OnnxPolicy
from metarl.spaces import Spaces
from metarl.types import FloatArray

_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


def to_sb3(policy: Policy, env: gymnasium.Env[Any, Any] | VecEnv | None = None, **ppo_settings: Any) -> PPO:
    """Copy a policy of the MAML family into a PPO of stable-baselines3 that can continue to learn.

    Its deterministic actions and the standard deviations of its samples equal the policy's to 1e-6. A features
    extractor normalises observations with fixed statistics. The units of the actions are part of the last layer and of
    `log_std`. Bounds of the standard deviation apply to the copied value, not to what PPO learns from there.

    The critic starts fresh, since the value function of a meta-learner is not that of a single task.

    Args:
        policy: a policy from `metarl.load`, best adapted to the task (`Policy.adapt`).
        env: the environment to continue in: a gymnasium environment or a VecEnv. None: that of the first held-out task
            of the run, whichever task the policy is adapted to.
        ppo_settings: settings of PPO, e.g. `learning_rate`, `n_steps`, `seed` and `verbose`. By default, `gamma`,
            `gae_lambda` and `clip_range` are the run's (if it has them), `device` is the CPU, and the rest are
            stable-baselines3's defaults.

    Raises:
        UserError: PPO's networks cannot represent the agent, e.g. one with a memory or several heads; the environment
            does not fit the policy or normalises observations; the run has custom tasks and `env` is missing; or a
            setting is determined by the policy.
    """
    # Only agents of the MAML family have these parts; this module does not know their classes.
    network, normalizer = getattr(policy.agent, "policy", None), getattr(policy.agent, "normalizer", None)
    name, adapts_by = policy.config.agent.name, policy.agent.adapts_by
    if adapts_by == "memory":
        raise UserError(
            f"{name} adapts in its memory, which PPO does not have; run it in stable-baselines3 as "
            "metarl.sb3.TrialPolicy(policy) in a metarl.sb3.TrialEnv"
        )
    if adapts_by == "inference" or not (isinstance(network, MlpPolicy) and isinstance(normalizer, Normalizer)):
        raise UserError(
            f"to_sb3 does not support {name}: it has no MLP policy that acts on observations alone; run it in "
            "stable-baselines3 as metarl.sb3.TrialPolicy(policy)"
        )
    if network.heads > 1:
        raise UserError(
            f"the policy has {network.heads} heads, and PPO has one; run it in stable-baselines3 as it is, e.g. "
            "evaluate_policy(policy, env), or as metarl.sb3.TrialPolicy(policy)"
        )
    env = _first_held_out(policy) if env is None else env
    _check_fit(policy, env)
    if isinstance(env, gymnasium.Env):
        env = EpisodeSuccess(env)
    settings = {"device": "cpu", **_run_settings(policy.config.agent), **ppo_settings}
    settings["policy_kwargs"] = _policy_kwargs(network, ppo_settings)
    ppo = PPO("MlpPolicy", env, **settings)
    _copy(network, policy.state, normalizer, policy.spaces.action_bounds, ppo.policy)
    return ppo


def _first_held_out(policy: Policy) -> gymnasium.Env[Any, Any]:
    env = env_of(policy.config)
    if env is None:
        raise UserError("the run has custom tasks; pass the environment to continue in, to_sb3(policy, env)")
    return env


def _check_fit(policy: Policy, env: gymnasium.Env[Any, Any] | VecEnv) -> None:
    check_spaces(policy.spaces, Spaces.of(env.observation_space, env.action_space))
    normalized = unwrap_vec_normalize(env) if isinstance(env, VecEnv) else None
    if normalized is not None and normalized.norm_obs:
        raise UserError("the policy normalises observations itself; use VecNormalize(..., norm_obs=False)")


def _run_settings(agent: Any) -> dict[str, float]:
    """Return the settings that PPO shares with a run's agent."""
    settings = {name: getattr(agent, name) for name in ("gamma", "gae_lambda")}
    clip_eps = getattr(agent.outer, "clip_eps", None)
    return settings if clip_eps is None else {**settings, "clip_range": clip_eps}


def _policy_kwargs(network: MlpPolicy, ppo_settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of PPO's networks; raises UserError if the caller sets one of them."""
    sizes = list(network.hidden_sizes)
    ours = {
        "net_arch": {"pi": sizes, "vf": sizes},
        "activation_fn": _ACTIVATIONS[network.activation],
        "features_extractor_class": NormalizedObservations,
        "share_features_extractor": True,
    }
    theirs = dict(ppo_settings.get("policy_kwargs") or {})
    taken = sorted(ours.keys() & theirs.keys())
    if taken or ppo_settings.get("use_sde"):
        raise UserError(f"to_sb3 got {', '.join(taken) or 'use_sde'}, which the copied policy determines; leave it out")
    return {**theirs, **ours}


@torch.no_grad()
def _copy(
    network: MlpPolicy,
    state: Params,
    normalizer: Normalizer,
    action_bounds: tuple[FloatArray, FloatArray],
    target: ActorCriticPolicy,
) -> None:
    """Copy the parameters `[1, ...]` of one task, with actions in the units of the environment."""
    low, high = (torch.from_numpy(bound) for bound in action_bounds)
    centre, half_range = (high + low) / 2, (high - low) / 2
    params = {name: value[0].double() for name, value in state.items()}
    last = len(network.hidden_sizes)
    params[f"weight_{last}"] = half_range[:, None] * params[f"weight_{last}"]
    params[f"bias_{last}"] = half_range * params[f"bias_{last}"] + centre
    layers = [module for module in target.mlp_extractor.policy_net if isinstance(module, nn.Linear)]
    for number, layer in enumerate([*layers, target.action_net]):
        weight, bias = params[f"weight_{number}"], params[f"bias_{number}"]
        layer.load_state_dict({"weight": weight, "bias": bias})
    for name, value in network.head.stable_baselines3_parameters(params, half_range).items():
        target.get_parameter(name).copy_(value)
    scale = normalizer.variance.sqrt().clamp_min(normalizer.floor)
    target.features_extractor.load_state_dict({"mean": normalizer.mean, "scale": scale})


class NormalizedObservations(BaseFeaturesExtractor):
    """Normalises observations as the copied policy does; the statistics are saved buffers and not trained.

    They are not folded into the first layer, where large terms would cancel: on Meta-World some standard deviations are
    a thousandth of the mean.
    """

    mean: Tensor
    """`[O]`."""
    scale: Tensor
    """`[O]`."""

    def __init__(self, observation_space: gymnasium.spaces.Box) -> None:
        (size,) = observation_space.shape
        super().__init__(observation_space, features_dim=size)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    def forward(self, observations: Tensor) -> Tensor:
        """Return normalised observations `[B, O]`."""
        return (observations - self.mean) / self.scale


class EpisodeSuccess(gymnasium.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Reports at the end of an episode whether it was solved at any step, as `info["is_success"]`.

    Stable-baselines3 reads this key: EvalCallback logs it as `eval/success_rate`. Metarl's environments report success
    at every step as `info["success"]`; without that key nothing is added. Wrap it around any wrapper that ends
    episodes.

    Args:
        env: the environment to wrap.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self._solved = 0.0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """Start an episode."""
        self._solved = 0.0
        return self.env.reset(seed=seed, options=options)

    def step(self, action: NDArray[Any]) -> tuple[NDArray[Any], float, bool, bool, dict[str, Any]]:
        """Take a step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._solved = _solved(self._solved, info)
        if (terminated or truncated) and not math.isnan(self._solved):
            info = {**info, "is_success": self._solved > 0}
        return observation, float(reward), terminated, truncated, info


def _solved(before: float, info: Mapping[str, Any]) -> float:
    """Return 1 if the episode was solved at any step so far, else 0; NaN if success is not defined."""
    return float(np.maximum(before, info.get("success", math.nan)))


class TrialEnv(gymnasium.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Turns a trial of several episodes into a single episode, so that an agent can adapt from one to the next.

    Observations are `[O + 2]`, in the environment's dtype: its observation, the last reward, and 1 at the first step of
    each episode of the trial, else 0. The reward is 0 at the start of the trial. The first observation of a later
    episode comes with the last reward of the episode before, whose final observation is not returned.

    A trial always ends by truncation, after its last episode. Then `info` has `episode_returns`, a list. If the
    environment defines success, it also has `episode_success`, a list of whether each episode was solved at any step,
    and `is_success`, the last of them.

    The first episode has the seed of the trial; the seeds of later ones are derived from it.

    Args:
        env: the environment to wrap, whose episodes must end (see `gymnasium.wrappers.TimeLimit`).
        episodes: episodes per trial; for the agent of a run, `policy.agent.trial_episodes`.

    Raises:
        ValueError: `episodes` is less than 1, or observations are not a flat box of floats.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], episodes: int) -> None:
        RecordConstructorArgs.__init__(self, episodes=episodes)
        super().__init__(env)
        space = env.observation_space
        if episodes < 1:
            raise ValueError(f"episodes is {episodes}; expected at least 1")
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1 or space.dtype.kind != "f":
            raise ValueError(f"observation space is {space}; expected a one-dimensional Box of floats: flatten it")
        low, high = np.append(space.low, [-np.inf, 0.0]), np.append(space.high, [np.inf, 1.0])
        dtype: Any = space.dtype
        self.observation_space = gymnasium.spaces.Box(low.astype(dtype), high.astype(dtype), dtype=dtype)
        self._episodes = episodes
        self._seeds = np.random.default_rng()
        self._returns: list[float] = [0.0] * episodes
        self._success: list[float] = [0.0] * episodes
        self._episode = episodes  # index of the current episode; `episodes`: no trial in progress

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """Start a trial; `options` are passed to the reset of each episode."""
        if seed is not None:
            self._seeds = np.random.default_rng([seed, 1])  # independent of the environment's own stream
        self._options = options
        self._returns, self._success = [0.0] * self._episodes, [0.0] * self._episodes
        self._episode = 0
        return self._begin_episode(0.0, seed)

    def _begin_episode(self, reward: float, seed: int | None = None) -> tuple[NDArray[Any], dict[str, Any]]:
        seed = int(self._seeds.integers(2**31)) if seed is None else seed
        observation, info = self.env.reset(seed=seed, options=self._options)
        return self._observe(observation, reward, 1.0), info

    def _observe(self, observation: NDArray[Any], reward: float, start: float) -> NDArray[Any]:
        return np.append(observation, [reward, start]).astype(self.observation_space.dtype)

    def step(self, action: NDArray[Any]) -> tuple[NDArray[Any], float, bool, bool, dict[str, Any]]:
        """Take a step of the trial.

        Raises:
            gymnasium.error.ResetNeeded: no trial is in progress.
        """
        number, last = self._episode, self._episodes - 1
        if number > last:
            raise gymnasium.error.ResetNeeded("no trial in progress; call reset() before step()")
        observation, gained, terminated, truncated, info = self.env.step(action)
        reward = float(gained)
        self._returns[number] += reward
        self._success[number] = _solved(self._success[number], info)
        if not (terminated or truncated):
            return self._observe(observation, reward, 0.0), reward, False, False, info
        self._episode += 1
        if number < last:
            return self._begin_episode(reward)[0], reward, False, False, info
        info = {**info, "episode_returns": self._returns}
        if not np.isnan(self._success).any():
            success = [solved > 0 for solved in self._success]
            info |= {"episode_success": success, "is_success": success[-1]}
        return self._observe(observation, reward, 0.0), reward, False, True, info


class TrialPolicy:
    """Adapts a policy to stable-baselines3's interface, for the observations of a `TrialEnv`.

    Stable-baselines3 does not pass rewards to a policy, which an agent with a memory needs; they are part of the
    observations here. It also runs policies without a memory.

    Args:
        policy: a policy from `metarl.load`, or an exported one; trials start from what it has adapted to.
    """

    def __init__(self, policy: Policy | OnnxPolicy) -> None:
        self.policy = policy

    def predict(
        self,
        observation: NDArray[Any],
        state: NDArray[np.float32] | None = None,
        episode_start: NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Choose actions; stable-baselines3's `PolicyPredictor`.

        Args:
            observation: `[O + 2]` or `[B, O + 2]`, from `TrialEnv`.
            state: the state that the last call returned; None at the start of all trials.
            episode_start: `[B]`, bool, whether a trial starts; other memories are kept. None: all of them if `state` is
                None, otherwise no trial.
            deterministic: whether to return the mean instead of a sample (from torch's global generator).

        Returns:
            actions `[A]` or `[B, A]`, float32, and the next state `[B, S]`; S is 0 without a memory.

        Raises:
            ValueError: wrong shape, NaN or infinity.
        """
        observation, size = np.asarray(observation, dtype=np.float64), self.policy.observation_size
        if observation.ndim not in (1, 2) or observation.shape[-1] != size + 2:
            raise ValueError(
                f"observation has shape {observation.shape}; expected ({size + 2},) or (batch, {size + 2}) of TrialEnv"
            )
        count = 1 if observation.ndim == 1 else len(observation)
        before = self.policy.reset(count)  # at the start of a trial, predict ignores reward and start
        if state is not None:
            if state.shape != before.shape:
                raise ValueError(
                    f"state has shape {state.shape}; expected {before.shape}, the state that predict returned, or None"
                )
            starts = np.full(count, False if episode_start is None else episode_start)
            before = np.where(starts[:, None], before, state)
        start, reward = observation[..., -1] > 0, observation[..., -2]
        return self.policy.predict(observation[..., :-2], before, start, deterministic, reward)
