"""The bridge to stable-baselines3: an adapted policy as a PPO that goes on learning, and trials as its episodes.

`to_sb3` copies a policy without a memory into a PPO. `TrialEnv` and `TrialPolicy` let stable-baselines3 run an agent
with a memory: a trial of several episodes is one episode to it, so that the memory lives through all of them.
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

from metarl.build import check_env, env_of
from metarl.deploy.policy import Policy
from metarl.errors import UserError
from metarl.nn.mlp import MlpPolicy, Params
from metarl.nn.normalizer import Normalizer
from metarl.runtime import OnnxPolicy
from metarl.types import FloatArray

_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


def to_sb3(policy: Policy, env: gymnasium.Env[Any, Any] | VecEnv | None = None, **ppo_settings: Any) -> PPO:
    """Copy a policy of the MAML family into a PPO of stable-baselines3 that can go on learning.

    Its deterministic actions equal the policy's to 1e-6, and so do the standard deviations of its draws. Observations
    are normalised in a features extractor, with statistics that stay as they are; the units of the actions are part of
    the last layer and of `log_std`. Bounds of the deviation hold for what is copied, not for what PPO learns then.

    The critic starts fresh, since what a meta-learner expects is not what one task gives: PPO learns it on the way.

    Args:
        policy: from `metarl.load`, best adapted to the task (`Policy.adapt`).
        env: of the task to go on with: a gymnasium environment, or a VecEnv of several. None for the first held-out
            task of the run, whichever task the policy is adapted to.
        ppo_settings: of PPO, e.g. `learning_rate`, `n_steps`, `seed` and `verbose`. `gamma`, `gae_lambda` and
            `clip_range` are the run's if they are not given and the run has them, `device` is the CPU, and all else is
            stable-baselines3's own default.

    Raises:
        UserError: the policy has a memory or several heads, which PPO's networks do not; the environment does not fit
            the policy, normalises observations, or is needed since the run's tasks are custom ones; a setting that the
            policy determines.
    """
    # Of the agents only those of the MAML family have these parts; this module need not know their classes.
    network, normalizer = getattr(policy.agent, "policy", None), getattr(policy.agent, "normalizer", None)
    name = policy.config.agent.name
    if policy.has_memory:
        raise UserError(
            f"{name} has a memory, and PPO has none: run it in stable-baselines3 as metarl.sb3.TrialPolicy(policy), in "
            "a metarl.sb3.TrialEnv"
        )
    if not isinstance(network, MlpPolicy) or not isinstance(normalizer, Normalizer):
        raise UserError(
            f"{name} has no MLP that PPO could take over: run it in stable-baselines3 as metarl.sb3.TrialPolicy(policy)"
        )
    if network.heads > 1:
        raise UserError(
            f"the policy has {network.heads} heads, and PPO's has one: run it in stable-baselines3 as it is, e.g. "
            "evaluate_policy(policy, env), or as metarl.sb3.TrialPolicy(policy)"
        )
    env = _first_held_out(policy) if env is None else env
    _check_fit(policy, env)
    if isinstance(env, gymnasium.Env):
        env = EpisodeSuccess(env)
    settings = {"device": "cpu", **_of_run(policy.config.agent), **ppo_settings}
    settings["policy_kwargs"] = _policy_kwargs(network, ppo_settings)
    ppo = PPO("MlpPolicy", env, **settings)
    _copy(network, policy.state, normalizer, policy.spaces.action_bounds, ppo.policy)
    return ppo


def _first_held_out(policy: Policy) -> gymnasium.Env[Any, Any]:
    env = env_of(policy.config)
    if env is None:
        raise UserError("the run has custom tasks: give the environment to go on in, to_sb3(policy, env)")
    return env


def _check_fit(policy: Policy, env: gymnasium.Env[Any, Any] | VecEnv) -> None:
    check_env(policy.spaces, env.observation_space, env.action_space)
    normalized = unwrap_vec_normalize(env) if isinstance(env, VecEnv) else None
    if normalized is not None and normalized.norm_obs:
        raise UserError("the policy normalises observations itself: VecNormalize(..., norm_obs=False)")


def _of_run(agent: Any) -> dict[str, float]:
    """Return what PPO has in common with the settings of a run's agent."""
    settings = {name: getattr(agent, name) for name in ("gamma", "gae_lambda")}
    clip_eps = getattr(agent.outer, "clip_eps", None)
    return settings if clip_eps is None else {**settings, "clip_range": clip_eps}


def _policy_kwargs(network: MlpPolicy, ppo_settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return how PPO's networks are built; raises UserError if it is asked for another way."""
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
        raise UserError(f"to_sb3 got {', '.join(taken) or 'use_sde'}; the policy that is copied determines it")
    return {**theirs, **ours}


@torch.no_grad()
def _copy(
    network: MlpPolicy,
    state: Params,
    normalizer: Normalizer,
    action_bounds: tuple[FloatArray, FloatArray],
    target: ActorCriticPolicy,
) -> None:
    """Copy parameters that are stacked for one task, `[1, ...]`; action units are those of the environment."""
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
    """Shifts and scales observations as the copied policy does. What it does so by is saved with it, and not learned.

    It is not folded into the first layer, where large terms would cancel: on Meta-World some deviations are a
    thousandth of the mean.
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
    """Says at the end of an episode whether it was solved at any step, as `info["is_success"]`.

    That is where stable-baselines3 looks for success: EvalCallback logs it as `eval/success_rate`. Metarl's
    environments say at each step whether they are solved then, as `info["success"]`. Where an environment does not say
    so nothing is added. It belongs around whatever ends the episode.

    Args:
        env: the environment.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self._solved = 0.0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """Begin an episode."""
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
    """Return 1 if an episode has been solved at any step so far, else 0; NaN once that is not defined."""
    return float(np.maximum(before, info.get("success", math.nan)))


class TrialEnv(gymnasium.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Makes a trial of several episodes one episode, so that what acts in it can learn from one to the next.

    Observations are `[O + 2]`, in the dtype of the environment's: its observation, the last reward, and 1 where an
    episode of the trial begins, else 0. The reward is 0 where the trial begins; the first observation of a later
    episode comes with the last reward of the one before. The true last observation of an episode is seen only at the
    end of the trial.

    The trial ends by truncation, however its last episode ended: it is cut off after so many episodes. `info` then
    holds `episode_returns`, a list, and where the environment defines success `episode_success`, a list of whether each
    episode was solved at any step, and `is_success`, the last of them.

    An episode begins with a seed that descends from that of the trial; the first one has the trial's own.

    Args:
        env: the environment, whose episodes must end (see `gymnasium.wrappers.TimeLimit`).
        episodes: of a trial; for the agent of a run, `policy.agent.trial_episodes`.

    Raises:
        ValueError: no episode, or observations are not a flat box of floats.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], episodes: int) -> None:
        RecordConstructorArgs.__init__(self, episodes=episodes)
        super().__init__(env)
        space = env.observation_space
        if episodes < 1:
            raise ValueError(f"episodes is {episodes}; a trial has at least 1")
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1 or space.dtype.kind != "f":
            raise ValueError(f"observation space is {space}; expected a Box of one dimension, of floats: flatten it")
        low, high = np.append(space.low, [-np.inf, 0.0]), np.append(space.high, [np.inf, 1.0])
        dtype: Any = space.dtype
        self.observation_space = gymnasium.spaces.Box(low.astype(dtype), high.astype(dtype), dtype=dtype)
        self._episodes = episodes
        self._seeds = np.random.default_rng()
        self._returns: list[float] = [0.0] * episodes
        self._success: list[float] = [0.0] * episodes
        self._episode = episodes  # in progress; none is, yet

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """Begin a trial; `options` are those of each episode's reset."""
        if seed is not None:
            self._seeds = np.random.default_rng([seed, 1])  # another stream than the environment draws from
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
            gymnasium.error.ResetNeeded: the trial has ended, or none has begun.
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
    """An agent as stable-baselines3's functions take it, for the observations of a `TrialEnv`.

    Stable-baselines3 does not tell a policy its rewards, which an agent with a memory learns from, and its episodes are
    trials here. A policy without a memory can be run so as well.

    Args:
        policy: from `metarl.load`, or an exported one; trials begin with what it has read in recorded episodes.
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
            observation: `[O + 2]` or `[B, O + 2]`, of `TrialEnv`.
            state: what the last call returned; None where all trials begin.
            episode_start: `[B]`, bool, where a trial begins; the memories of the others live on. None: where `state`
                is, or nowhere.
            deterministic: the mean instead of a draw (from torch's global generator).

        Returns:
            Actions `[A]` or `[B, A]`, float32, and the next state `[B, S]`; S is 0 without a memory.

        Raises:
            ValueError: wrong shape, NaN or infinity.
        """
        observation, size = np.asarray(observation, dtype=np.float64), self.policy.observation_size
        if observation.ndim not in (1, 2) or observation.shape[-1] != size + 2:
            raise ValueError(
                f"observation has shape {observation.shape}; expected ({size + 2},) or (batch, {size + 2}), of TrialEnv"
            )
        count = 1 if observation.ndim == 1 else len(observation)
        before = self.policy.reset(count)  # where a trial begins; there predict reads neither reward nor start
        if state is not None:
            if state.shape != before.shape:
                raise ValueError(
                    f"state has shape {state.shape}; expected {before.shape}: what predict returned, or None"
                )
            begins = np.full(count, False if episode_start is None else episode_start)
            before = np.where(begins[:, None], before, state)
        start, reward = observation[..., -1] > 0, observation[..., -2]
        return self.policy.predict(observation[..., :-2], before, start, deterministic, reward)
