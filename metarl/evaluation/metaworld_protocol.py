"""Meta-World's own evaluation of meta-learning agents, for comparison with published results.

Owns the adapter between agents and `metaworld.evaluation`, and a second count of its episodes. Upstream counts success
over the first episodes of a class to finish. Solved episodes end early, so that easy goals are counted more often. The
environments are the official ones, unchanged and with hidden goals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

from metarl.build import check_spaces
from metarl.collect import act, rollout_arrays
from metarl.deploy.policy import Policy
from metarl.errors import UserError
from metarl.seeding import Purpose, integer_seed
from metarl.spaces import Spaces
from metarl.types import BoolArray, FloatArray, Rollout

GOALS_PER_CLASS = {"train": 50, "test": 40}
"""Goals per class of published results (`MetaworldMetaLearningConfig` of metaworld-algorithms)."""

NUM_ENVS = 20
"""Environments of published results (upstream's `meta_batch_size`); fewer if goals or classes do not divide them."""


class MetaWorldAgent:
    """A policy as a `metaworld.evaluation.MetaLearningAgent` for any number E of environments, one task each.

    Agents that adapt between rollouts (the MAML family) adapt on the complete episodes since the last adaptation. The
    last observation of an episode also serves as its next observation, which upstream does not pass on.

    Agents that adapt in their memory keep it across adaptation episodes; `reset` restores the memory and the last
    reward of the last `adapt`. Upstream passes no rewards during evaluation, so that these agents need environments
    with `recurrent_info_in_obs=True, normalize_reward_in_recurrent_info=False`. Each environment has a separate state,
    since single rows of a batched one could not be restored: a step takes E calls of the agent.

    Args:
        policy: the policy before adaptation.
        seed: the seed of the action noise; each `init` starts a new stream.
        deterministic: whether `eval_action` acts without noise, as in published results (metaworld-algorithms uses the
            mode, for both MAML and RL²); otherwise it explores as in training. Adaptation always explores.
    """

    def __init__(self, policy: Policy, *, seed: int = 0, deterministic: bool = False) -> None:
        self._agent, self._spaces = policy.agent, policy.spaces
        self._remembers = policy.agent.adapts_by == "memory"
        self._seed, self._deterministic, self._num_inits = seed, deterministic, 0
        self.init()

    def init(self) -> None:
        """Reset the agent for new tasks."""
        noise_seed = integer_seed(self._seed, Purpose.EVALUATION_ROLLOUTS, self._num_inits)
        self._noise = torch.Generator().manual_seed(noise_seed)
        self._num_inits, self._num_envs = self._num_inits + 1, 0
        self._record: list[dict[str, NDArray[Any]]] = []

    def _begin(self, envs: int) -> None:
        """Create the states when the number of environments is first known."""
        if self._num_envs:
            return
        agent, self._num_envs = self._agent, envs
        self._states = [agent.initial_state(1) for _ in range(envs)] if self._remembers else [agent.initial_state(envs)]
        self._rewards, self._episode_start = np.zeros(envs, np.float32), np.ones(envs, np.bool_)
        self._adapted = self._states, self._rewards

    def adapt_action(self, observations: FloatArray) -> tuple[FloatArray, dict[str, NDArray[Any]]]:
        """Explore: return actions `[E, A]` for observations `[E, ·]`, and the data that `step` needs."""
        inputs, rewards = self._read(observations)
        fits = self._episode_start | np.isclose(rewards, self._rewards, rtol=1e-4)
        if not fits.all():
            raise ValueError(
                f"observations have the rewards {rewards[~fits]}, environments {self._rewards[~fits]}; build them "
                "with normalize_reward_in_recurrent_info=False and no wrapper that changes rewards"
            )
        draws, log_probs = self._act(inputs, deterministic=False)
        return self._to_envs(draws), {"observations": inputs, "actions": draws, "log_probs": log_probs}

    def step(self, timestep: Any) -> None:
        """Record the `metaworld.evaluation.Timestep` that follows an `adapt_action`."""
        ends = {"terminated": timestep.terminated, "truncated": timestep.truncated}
        self._rewards = np.array(timestep.reward, np.float32)
        self._episode_start = np.logical_or(*ends.values())
        if not self._remembers:
            self._record.append({**timestep.aux_policy_outputs, "rewards": self._rewards, **ends})

    def adapt(self) -> None:
        """Adapt on the recorded episodes, or store the memory; the next step starts an episode."""
        if not self._remembers:
            rollout = self._rollout().to(self._agent.device)
            self._states, self._record = [self._agent.adapt(self._states[0], rollout)], []
        self._adapted = self._states, self._rewards
        self._episode_start = np.ones(self._num_envs, np.bool_)

    def reset(self, env_mask: BoolArray) -> None:
        """Start an episode with the adapted state in the environments of `env_mask` `[E]`; others do not change."""
        self._begin(len(env_mask))
        states, rewards = self._adapted
        self._rewards, self._episode_start = np.where(env_mask, rewards, self._rewards), self._episode_start | env_mask
        if self._remembers:
            parts = zip(env_mask, states, self._states, strict=True)
            self._states = [adapted if restored else current for restored, adapted, current in parts]

    def eval_action(self, observations: FloatArray) -> FloatArray:
        """Act after adaptation: return actions `[E, A]` for observations `[E, ·]`."""
        inputs, rewards = self._read(observations)
        self._rewards = np.where(self._episode_start, self._rewards, rewards)
        return self._to_envs(self._act(inputs, self._deterministic)[0])

    def _read(self, observations: FloatArray) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return observations `[E, O]` and the last rewards `[E]`, which for memories are part of the observations."""
        self._begin(len(observations))
        size = self._spaces.observation_size
        expected = (self._num_envs, size + (self._spaces.action_size + 2 if self._remembers else 0))
        if observations.shape != expected:
            raise ValueError(
                f"observations have shape {observations.shape}; expected {expected}: build the environments of this "
                f"agent with recurrent_info_in_obs={self._remembers}"
            )
        if not np.isfinite(observations).all():
            raise ValueError("observations contain NaN or infinity; the simulation has diverged")
        observations = observations.astype(np.float32)
        return observations[:, :size], observations[:, -2] if self._remembers else self._rewards

    def _act(self, observations: NDArray[Any], deterministic: bool) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return unclipped actions `[E, A]` with bounds ±1 and their log-probabilities `[E]`; updates the states."""
        shape = (self._num_envs, 1)
        noise = torch.randn(*shape, self._agent.noise_size, generator=self._noise) * (not deterministic)
        rewards, start, active = self._rewards[:, None], self._episode_start[:, None], np.ones(shape, np.bool_)
        count = self._num_envs // len(self._states)
        outputs = []
        for i, state in zip(range(0, self._num_envs, count), self._states, strict=True):
            rows = slice(i, i + count)
            inputs = observations[rows, None], rewards[rows], start[rows], active[rows]
            outputs.append(act(self._agent, *inputs, noise[rows], state))
        draws, log_probs, self._states = (list(part) for part in zip(*outputs, strict=True))
        self._episode_start = np.zeros(self._num_envs, np.bool_)
        return torch.cat(draws)[:, 0].numpy(), torch.cat(log_probs)[:, 0].numpy()

    def _to_envs(self, draws: NDArray[Any]) -> FloatArray:
        return self._spaces.to_env(draws)

    def _rollout(self) -> Rollout:
        """Return the complete episodes as a rollout `[E, N, T, ...]`, padded at the end; drops unfinished episodes."""
        steps = {name: np.stack([step[name] for step in self._record]) for name in self._record[0]}
        ends = [np.flatnonzero(ended) + 1 for ended in (steps["terminated"] | steps["truncated"]).T]
        episodes = [np.split(np.arange(of_env[-1]), of_env[:-1]) for of_env in ends]
        longest = max(len(when) for parts in episodes for when in parts)
        shape = (self._num_envs, max(len(parts) for parts in episodes), longest)
        arrays = rollout_arrays(shape, 1, self._spaces)
        for m, parts in enumerate(episodes):
            for n, when in enumerate(parts):
                where = (m, n, slice(len(when)))
                for name, values in steps.items():
                    arrays[name][where] = values[when, m]
                arrays["final_observations"][m, n, 0] = steps["observations"][when[-1], m]  # the next is another's
                arrays["success"][where] = np.nan  # not passed on by upstream
                arrays["valid"][where] = arrays["episode_start"][m, n, 0] = True
        return Rollout(**{name: torch.from_numpy(array) for name, array in arrays.items()})


def success_per_class(names: Sequence[str], outcomes: Sequence[Sequence[float]], num_episodes: int) -> dict[str, float]:
    """Return the success of each class, with equal weight for every environment.

    Args:
        names: the class of each of E environments.
        outcomes: for each of E environments the success, 0 or 1, of its episodes in order.
        num_episodes: the number of episodes of each environment to count, from the first.

    Raises:
        ValueError: an environment has finished fewer episodes.
    """
    finished = [len(of_env) for of_env in outcomes]
    if min(finished) < num_episodes:
        raise ValueError(f"the environments finished {finished} episodes; expected at least {num_episodes} of each")
    of_class: dict[str, list[float]] = {name: [] for name in names}
    for name, of_env in zip(names, outcomes, strict=True):
        of_class[name].append(float(np.mean(of_env[:num_episodes])))
    return {name: float(np.mean(of_envs)) for name, of_envs in of_class.items()}


class CountedEnvs:
    """Official vector environments that also count success per environment, on the same episodes as upstream.

    Upstream ends an evaluation by resetting `terminate_on_success`, when its own count is complete. Before that is
    passed on, episodes continue here until every environment has finished `num_episodes`.

    Args:
        envs: environments of `metaworld.make_ml_envs`.
        agent: the agent under evaluation.
        num_episodes: the number of episodes that upstream counts per class.
    """

    def __init__(self, envs: Any, agent: MetaWorldAgent, num_episodes: int) -> None:
        from metaworld.evaluation import _get_task_names

        self.num_envs: int = envs.num_envs
        self.names = _get_task_names(envs)
        self.success: list[dict[str, float]] = []  # of each evaluation, by class
        self._envs, self._agent, self._num_episodes = envs, agent, num_episodes
        self._outcomes: list[list[float]] | None = None  # of the evaluation in progress
        self._observations: FloatArray

    def get_attr(self, name: str) -> Any:
        """As upstream."""
        return self._envs.get_attr(name)

    def call(self, name: str, *args: Any) -> Any:
        """As upstream; an evaluation starts when success is set to end episodes, and ends at the next such call."""
        if name == "toggle_terminate_on_success":
            if self._outcomes is not None:
                self._finish(self._outcomes)
            self._outcomes = [[] for _ in range(self.num_envs)] if args[0] else None
        return self._envs.call(name, *args)

    def reset(self) -> tuple[FloatArray, dict[str, Any]]:
        """As upstream."""
        self._observations, infos = self._envs.reset()
        return self._observations, infos

    def step(self, actions: FloatArray) -> tuple[FloatArray, FloatArray, BoolArray, BoolArray, dict[str, Any]]:
        """As upstream."""
        self._observations, rewards, terminated, truncated, infos = self._envs.step(actions)
        if self._outcomes is not None:
            for i in np.flatnonzero(np.logical_or(terminated, truncated)):
                self._outcomes[i].append(float(infos["final_info"]["success"][i]))
        return self._observations, rewards, terminated, truncated, infos

    def _finish(self, outcomes: Sequence[Sequence[float]]) -> None:
        while min(len(of_env) for of_env in outcomes) < self._num_episodes:
            _, _, terminated, truncated, _ = self.step(self._agent.eval_action(self._observations))
            self._agent.reset(np.logical_or(terminated, truncated))
        self.success.append(success_per_class(self.names, outcomes, self._num_episodes))


def evaluate_both_ways(
    envs: Any,
    agent: MetaWorldAgent,
    *,
    num_evals: int,
    adaptation_steps: int,
    adaptation_episodes: int,
    evaluation_episodes: int,
) -> dict[str, Any]:
    """Run `metaworld.evaluation.metalearning_evaluation`; return its results and those per environment."""
    from metaworld.evaluation import metalearning_evaluation

    counted: Any = CountedEnvs(envs, agent, evaluation_episodes)
    official, returns, of_class = metalearning_evaluation(
        agent, counted, num_evals, adaptation_steps, adaptation_episodes, evaluation_episodes
    )
    names = dict.fromkeys(counted.names)
    ours = {name: float(np.mean([success[name] for success in counted.success])) for name in names}
    success_mean = float(np.mean(list(ours.values())))
    return {
        "success_mean": official,
        "return_mean": returns,
        "success_per_class": {name: float(of_class[name]) for name in names},
        "per_environment": {"success_mean": success_mean, "success_per_class": ours},
        "biased_by": official - success_mean,
    }


def official_report(
    policy: Policy,
    *,
    benchmark: str,
    name: str | None = None,
    split: Literal["train", "test"] = "test",
    seed: int = 0,
    goal_seed: int | None = None,
    num_evals: int | None = None,
    adaptation_episodes: int = 10,
    evaluation_episodes: int = 3,
    horizon: int = 500,
    reward_version: str = "v2",
    deterministic: bool = True,
    vector_strategy: Literal["sync", "async"] = "sync",
) -> dict[str, Any]:
    """Evaluate a policy with Meta-World's own evaluation, by default with the settings of published results.

    By default: each of 40 test goals per class once, in 20 environments; K adaptation steps on 10 episodes each; then 3
    episodes per class without noise. Upstream's success is biased upwards: it counts the first 3 episodes of a class to
    finish in any of its environments, and solved episodes finish early. The report also has the success of the first 3
    episodes of every environment, of the same adapted agents.

    Args:
        policy: a policy from `metarl.load` or `metarl.train`, before adaptation.
        benchmark: the benchmark of the environments. ML25 tests on one of its training classes; the report names it.
        name: the class of ML1.
        split: the split of the benchmark's classes and goals.
        seed: the seed of the action noise.
        goal_seed: the seed of the benchmark's goals and their order; None for that of the run's goals. A seed one
            lower would make ML1 test on training goals.
        num_evals: the number of rounds, each with new goals in every environment; None: enough for every goal.
        adaptation_episodes: episodes per adaptation step, or before the evaluation of a memory.
        evaluation_episodes: counted episodes per class, and per environment.
        horizon: steps per episode, at most 500.
        reward_version: Meta-World's reward_function_version.
        deterministic: whether the adapted agent acts without noise.
        vector_strategy: `async` runs every environment in a separate process; does not affect the result.

    Returns:
        `{"protocol": "metaworld", "success_mean", "return_mean", "success_per_class": {name: …}, "per_environment":
        {"success_mean", "success_per_class"}, "biased_by": official − per environment, "shared_classes": those in both
        splits, "env_steps": of training, …}` and the settings.

    Raises:
        UserError: the policy is already adapted or was trained for other observations or actions, benchmark and name do
            not fit, or Meta-World does not have the reward version.
    """
    if policy.adapted:
        raise UserError("the policy is already adapted; pass the policy before adaptation")
    if reward_version not in ("v1", "v2"):
        raise UserError(f"reward_version is {reward_version!r}; expected v1 or v2")
    import metaworld

    classes, goals = _classes(benchmark, name), GOALS_PER_CLASS[split]
    per_class = envs_per_class(len(classes[split]), goals)
    num_envs = per_class * len(classes[split])
    remembers = policy.agent.adapts_by == "memory"
    settings = {"split": split, "seed": seed, "horizon": horizon, "reward_version": reward_version}
    rounds = {
        "num_evals": goals // per_class if num_evals is None else num_evals,
        "adaptation_steps": max(1, policy.agent.adaptation_steps),  # for upstream, a memory adapts in one step
        "adaptation_episodes": adaptation_episodes,
        "evaluation_episodes": evaluation_episodes,
    }
    if goal_seed is None:
        goal_seed = int(getattr(policy.config.stages[-1].tasks, "seed", 0))
    envs: Any = metaworld.make_ml_envs(
        name or benchmark,
        seed=goal_seed,
        meta_batch_size=num_envs,
        total_tasks_per_cls=goals,
        split=split,
        vector_strategy=vector_strategy,
        autoreset_mode="SameStep",
        max_episode_steps=horizon,
        task_select="pseudorandom",
        reward_function_version=reward_version,
        recurrent_info_in_obs=remembers,
        normalize_reward_in_recurrent_info=False,
    )
    try:
        action_size = envs.single_action_space.shape[0]
        appended = (action_size + 2) * remembers  # upstream's inputs for a memory
        own = gymnasium.spaces.Box(-np.inf, np.inf, (envs.single_observation_space.shape[0] - appended,))
        check_spaces(policy.spaces, Spaces.of(own, envs.single_action_space))
        agent = MetaWorldAgent(policy, seed=seed, deterministic=deterministic)
        results = evaluate_both_ways(envs, agent, **rounds)
    finally:
        envs.close()
    shared = set() if benchmark == "ML1" else set(classes["train"]) & set(classes["test"])
    return {
        "protocol": "metaworld",
        "benchmark": benchmark,
        "name": name,
        **settings,
        "goal_seed": goal_seed,
        "goals_per_class": goals,
        "num_envs": num_envs,
        **rounds,
        "deterministic": deterministic,
        "env_steps": policy.env_steps,
        "shared_classes": sorted(shared),
        **results,
    }


def envs_per_class(num_classes: int, goals: int) -> int:
    """Return the number of environments per class: as published, or the next smaller divisor of `goals`."""
    return max(k for k in range(1, goals + 1) if goals % k == 0 and (k == 1 or k * num_classes <= NUM_ENVS))


def _classes(benchmark: str, name: str | None) -> Mapping[str, Sequence[str]]:
    """Return the names of the classes of each split, in upstream's order."""
    from metaworld import env_dict

    if benchmark not in ("ML1", "ML10", "ML25", "ML45") or (name is None) == (benchmark == "ML1"):
        raise UserError(
            f"benchmark is {benchmark!r}, name is {name!r}; expected ML1 with a name, or ML10, ML25 or ML45 without"
        )
    if name is None:
        return {split: list(classes) for split, classes in getattr(env_dict, f"{benchmark}_V3").items()}
    if name not in env_dict.ALL_V3_ENVIRONMENTS:
        raise UserError(f"name is {name!r}; expected a class of Meta-World, see `metarl list envs`")
    return {"train": [name], "test": [name]}
