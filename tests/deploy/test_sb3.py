"""The bridge to stable-baselines3: the copied PPO acts as the policy does, and a trial counts as one episode."""

import dataclasses
import random
import warnings
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3 import PPO
from stable_baselines3.common import env_checker
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

import metarl
from metarl.build import build_agent, distribution_of
from metarl.config.schema import RunConfig
from metarl.deploy.policy import Policy
from metarl.deploy.sb3 import EpisodeSuccess, NormalizedObservations, TrialEnv, TrialPolicy, to_sb3
from metarl.errors import UserError
from metarl.nn.distributions import DiagonalGaussian
from metarl.runtime import OnnxPolicy
from metarl.spaces import Spaces

GOALS = {"family": "navigation", "name": "goals", "horizon": 5}


def spaces_of(env):
    low, high = (tuple(map(float, bound)) for bound in (env.action_space.low, env.action_space.high))
    return Spaces(env.observation_space.shape[0], low, high)


def make_policy(env, agent, tasks=GOALS, **settings):
    """A policy away from a mean near 0 and from a normaliser that changes nothing, as if it had been trained."""
    stages = settings.pop("stages", [{"name": "only", "tasks": tasks}])
    config = RunConfig.model_validate({"seed": 3, "num_workers": 0, "stages": stages, "agent": agent, **settings})
    spaces, generator = spaces_of(env), torch.Generator().manual_seed(0)
    built = build_agent(config, spaces, torch.device("cpu"))
    state = built.state_dict()
    for name, value in state.items():
        if name == "normalizer.mean":
            state[name] = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        elif name == "normalizer.variance":
            state[name] = (4 * torch.randn(value.shape, generator=generator, dtype=value.dtype)).exp()
        elif name.endswith("log_std"):  # some beyond the bounds
            state[name] = torch.linspace(-5, 2, len(value))
        elif "weight" in name or "bias" in name:
            state[name] = torch.randn(value.shape, generator=generator) / np.sqrt(value.shape[-1])
    built.load_state_dict(state)
    return Policy(config, built, spaces, 1234, built.initial_state(1))


class Line(gymnasium.Env):
    """Episodes of 3 steps; reward: minus the distance of the action from a target, success: nearer than 0.5."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (3,))
    action_space = gymnasium.spaces.Box(np.float32([-1.0, 0.0]), np.float32([3.0, 4.0]))

    def __init__(self, target=(0.5, 2.0)):
        self.target = target

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), {}

    def step(self, action):
        self.steps += 1
        distance = float(np.linalg.norm(action - self.target))
        observation = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        return observation, -distance, False, self.steps == 3, {"success": float(distance < 0.5)}


RL2 = {"name": "rl2", "trial_episodes": 3, "encoder_sizes": [8], "memory": {"name": "gru", "size": 8}}


def small(**settings):
    return {"hidden_sizes": [16, 8], **settings}


# --- to_sb3 ------------------------------------------------------------------------------------------------------


def own_distribution(policy, observations):
    """Mean and deviation of the policy's actions in the units of the environment, `[B, A]`, before clipping."""
    inputs = policy.agent.normalizer(torch.from_numpy(observations).float()[None])
    mean, log_std = policy.agent.policy.distribution(policy.state, inputs).parameters().values()
    low, high = policy.spaces.action_bounds
    half = torch.from_numpy((high - low) / 2)
    return mean[0] * half + torch.from_numpy((high + low) / 2), log_std[0].exp() * half


def assert_acts_alike(policy, ppo):
    normalizer = policy.agent.normalizer
    noise = np.random.default_rng(0).normal(size=(2000, policy.spaces.observation_size))
    observations = normalizer.mean.numpy() + noise * normalizer.variance.sqrt().clamp_min(normalizer.floor).numpy()
    actions, _ = policy.predict(observations, deterministic=True)
    theirs, _ = ppo.predict(observations, deterministic=True)
    np.testing.assert_allclose(theirs, actions, rtol=0, atol=1e-6)
    low, high = policy.spaces.action_bounds
    inside = (actions > low) & (actions < high)
    assert 0.2 < inside.mean() < 1.0 and actions.std() > 0.1 * (high - low).max() / 2  # there was something to compare
    one, _ = ppo.predict(observations[0], deterministic=True)
    np.testing.assert_allclose(one, policy.predict(observations[0], deterministic=True)[0], rtol=0, atol=1e-6)

    mean, std = own_distribution(policy, observations)
    drawn = mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    tensor = torch.from_numpy(observations).float()
    distribution = ppo.policy.get_distribution(tensor).distribution
    torch.testing.assert_close(distribution.stddev.double(), std.expand_as(mean), rtol=1e-6, atol=0)
    _, log_probs, _ = ppo.policy.evaluate_actions(tensor, drawn.float())
    expected = DiagonalGaussian(mean, std.log()).log_prob(drawn)
    torch.testing.assert_close(log_probs.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("tasks", "agent"),
    [
        (GOALS, small()),
        (GOALS, {"name": "meta_sgd", "hidden_sizes": []}),
        ({"family": "mujoco", "name": "HalfCheetahDir"}, small(activation="relu")),
        ({"family": "mujoco", "name": "HumanoidDir"}, {"hidden_sizes": [64, 64]}),  # actions within ±0.4
    ],
)
def test_the_copy_acts_as_the_policy_does(tasks, agent):
    distribution = metarl.envs.distribution(**tasks)
    policy = make_policy(distribution.make(distribution.test_tasks[0]), agent, tasks)
    ppo = metarl.to_sb3(policy)
    assert isinstance(ppo, PPO)
    assert_acts_alike(policy, ppo)
    (env,) = ppo.get_env().envs
    assert env.unwrapped.task == distribution.test_tasks[0]


def test_bounds_need_not_be_symmetric():
    policy = make_policy(Line(), small())
    assert_acts_alike(policy, to_sb3(policy, Line()))


def test_an_adapted_policy_is_copied_as_it_is_adapted():
    env = Line()
    policy = make_policy(env, small(inner_lr=1.0))
    env.reset(seed=0)
    torch.manual_seed(0)
    adapted = policy.adapt(policy.record(env, 2))
    before, after = (each.predict(np.zeros(3), deterministic=True)[0] for each in (policy, adapted))
    assert np.abs(after - before).max() > 1e-2
    assert_acts_alike(adapted, to_sb3(adapted, env))


def test_it_goes_on_learning_and_what_normalises_stays():
    env = Line(target=(2.5, 0.5))
    policy = make_policy(env, small(init_std=0.3, min_std=0.3, max_std=0.3))
    ppo = to_sb3(policy, env, seed=0, n_steps=128, n_epochs=5, learning_rate=1e-2, gamma=0.0)
    before = {name: value.clone() for name, value in ppo.policy.state_dict().items()}
    gained = [evaluate_policy(ppo, Monitor(env), 10)[0]]
    ppo.learn(10 * 128)
    gained.append(evaluate_policy(ppo, Monitor(env), 10)[0])
    assert gained[1] > gained[0] / 4, gained  # returns are negative, minus the distances of three steps
    kept = {name for name, value in ppo.policy.state_dict().items() if torch.equal(value, before[name])}
    assert kept == {name for name in before if "features_extractor" in name} != set()


def test_it_can_be_saved_and_loaded(tmp_path):
    policy = make_policy(Line(), small(activation="relu"))
    to_sb3(policy, Line(), n_steps=16, batch_size=16).save(tmp_path / "ppo.zip")
    ppo = PPO.load(tmp_path / "ppo.zip", Line())
    assert_acts_alike(policy, ppo)
    assert ppo.learn(16).num_timesteps == 16


def test_settings_are_the_runs_unless_they_are_given():
    agent = small(gamma=0.9, gae_lambda=0.8, outer={"name": "ppo", "clip_eps": 0.15})
    ppo = to_sb3(make_policy(Line(), agent), Line())
    assert (ppo.gamma, ppo.gae_lambda, ppo.clip_range(1.0), ppo.device.type) == (0.9, 0.8, 0.15, "cpu")
    ppo = to_sb3(make_policy(Line(), agent), Line(), gamma=0.5, gae_lambda=0.6, clip_range=0.7, n_steps=64)
    assert (ppo.gamma, ppo.gae_lambda, ppo.clip_range(1.0), ppo.n_steps) == (0.5, 0.6, 0.7, 64)
    no_clipping = small(name="maml_trpo", gamma=0.9)
    ppo = to_sb3(make_policy(Line(), no_clipping), Line(), policy_kwargs={"optimizer_kwargs": {"eps": 1e-3}})
    assert (ppo.gamma, ppo.clip_range(1.0), ppo.policy.optimizer.defaults["eps"]) == (0.9, 0.2, 1e-3)
    for name, settings in (("net_arch", {"policy_kwargs": {"net_arch": [4]}}), ("use_sde", {"use_sde": True})):
        with pytest.raises(UserError, match=f"to_sb3 got {name}, which the copied policy"):
            to_sb3(make_policy(Line(), agent), Line(), **settings)


def test_it_draws_no_more_than_stable_baselines3_does():
    policy, env = make_policy(Line(), small()), Line()
    kwargs = {"net_arch": {"pi": [16, 8], "vf": [16, 8]}, "features_extractor_class": NormalizedObservations}
    streams = []
    for build in (lambda: PPO("MlpPolicy", env, policy_kwargs=kwargs, device="cpu"), lambda: to_sb3(policy, env)):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        build()
        streams.append((random.random(), np.random.random(), float(torch.rand(()))))
    assert streams[0] == streams[1]


def cued_wedges(stage_id):
    """A policy with the stage id of two stages, and the environment of the last one."""
    stages = [
        {"name": f"stage-{number}", "tasks": {"family": "navigation", "name": "rotated_wedges", "wedges": [number]}}
        for number in range(2)
    ]
    tasks = distribution_of(RunConfig.model_validate({"stages": stages, "stage_id": stage_id}))
    env = tasks.make(tasks.test_tasks[0])
    return make_policy(env, small(), stages=stages, stage_id=stage_id), env


def test_a_cue_is_an_observation_like_any_other():
    policy, env = cued_wedges("input")
    ppo = to_sb3(policy)
    assert_acts_alike(policy, ppo)
    assert ppo.get_env().envs[0].unwrapped.task == env.task


def test_observations_are_not_normalised_twice():
    policy = make_policy(metarl.envs.make(metarl.envs.distribution(**GOALS).test_tasks[0]), small())

    def normalized(**settings):
        envs = DummyVecEnv([lambda: metarl.envs.make(metarl.envs.distribution(**GOALS).test_tasks[0])])
        return VecMonitor(VecNormalize(envs, **settings))  # it is found inside others, too

    with pytest.raises(UserError, match=r"normalises observations itself; use VecNormalize\(\.\.\., norm_obs=False\)"):
        to_sb3(policy, normalized())
    assert_acts_alike(policy, to_sb3(policy, normalized(norm_obs=False)))


def test_what_cannot_be_copied_is_named():
    env = metarl.envs.make(metarl.envs.distribution(**GOALS).test_tasks[0])
    with pytest.raises(UserError, match=r"rl2 adapts in its memory.*TrialPolicy.*TrialEnv"):
        to_sb3(make_policy(env, RL2))
    with pytest.raises(UserError, match=r"2 heads.*TrialPolicy"):
        to_sb3(cued_wedges("head")[0])
    own = make_policy(Line(), small(), {"family": "custom"})
    with pytest.raises(UserError, match=r"custom tasks.*to_sb3\(policy, env\)"):
        to_sb3(own)
    with pytest.raises(UserError, match=r"observations have shape .*; the agent was trained for \(3,\)"):
        to_sb3(own, env)
    wider = Line()
    wider.action_space = gymnasium.spaces.Box(-4.0, 4.0, (2,))
    with pytest.raises(UserError, match=r"actions have low .*; the agent was trained for \[-1"):
        to_sb3(own, wider)


@pytest.mark.parametrize("adapts_by", ["gradient", "inference", "nothing"])
def test_an_agent_without_an_mlp_is_not_said_to_have_a_memory(adapts_by):
    """An agent that infers its task is refused even with an MLP, which reads the inferred task, too."""
    policy = make_policy(Line(), small(), {"family": "custom"})
    parts = {"policy": policy.agent.policy, "normalizer": policy.agent.normalizer} if adapts_by == "inference" else {}
    other = dataclasses.replace(policy, agent=SimpleNamespace(adapts_by=adapts_by, **parts))
    with pytest.raises(
        UserError, match=r"to_sb3 does not support maml_ppo: it has no MLP policy.*TrialPolicy"
    ) as error:
        to_sb3(other, Line())
    assert "memory" not in str(error.value) and "TrialEnv" not in str(error.value)


# --- success as stable-baselines3 reads it -----------------------------------------------------------------------


class Scripted(gymnasium.Env):
    """Episodes of given lengths, one after another; what it returns counts resets and steps.

    Observations `[episode, step]`, rewards 10 · episode + step, success where `solved` says so.
    """

    observation_space = gymnasium.spaces.Box(0.0, 100.0, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))

    def __init__(self, lengths=(2, 1, 3), solved=(), terminates=False, defined=True):
        self.lengths, self.solved, self.terminates, self.defined = lengths, solved, terminates, defined
        self.resets, self.seeds, self.options = 0, [], []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.options.append(options)
        self.episode, self.elapsed, self.resets = self.resets % len(self.lengths), 0, self.resets + 1
        return np.float32([self.episode, 0]), {"resets": self.resets}

    def step(self, action):
        self.elapsed += 1
        ended = self.elapsed == self.lengths[self.episode]
        info = {"success": float((self.episode, self.elapsed) in self.solved)} if self.defined else {}
        observation = np.float32([self.episode, self.elapsed])
        reward = 10.0 * self.episode + self.elapsed
        return observation, reward, ended and self.terminates, ended and not self.terminates, info


def run(env, steps, **reset):
    """Reset and step; returns observations `[steps + 1, ...]` and the rest of each step."""
    observations, rest = [env.reset(**reset)[0]], []
    for _ in range(steps):
        observation, *others = env.step(env.action_space.sample())
        observations.append(observation)
        rest.append(tuple(others))
    return np.array(observations), rest


@pytest.mark.parametrize("terminates", [True, False])
def test_an_episode_is_solved_if_it_was_at_any_step(terminates):
    env = EpisodeSuccess(Scripted(solved={(0, 1), (2, 3)}, terminates=terminates))
    episodes = [run(env, length)[1] for length in (2, 1, 3)]
    said = [[info.get("is_success") for *_, info in episode] for episode in episodes]
    assert said == [[None, True], [False], [None, None, True]]
    for episode in episodes:  # a time limit handed on as a termination would keep PPO from bootstrapping
        ends = [(terminated, truncated) for _, terminated, truncated, _ in episode]
        assert ends == [(False, False)] * (len(episode) - 1) + [(terminates, not terminates)]
    silent = EpisodeSuccess(Scripted(terminates=terminates, defined=False))
    assert run(silent, 2)[1][-1][-1] == {}


class Kept(KVWriter):
    """What was logged last under each name."""

    def __init__(self):
        self.values = {}

    def write(self, key_values, key_excluded, step=0):
        self.values |= key_values

    def close(self):
        pass


def test_callbacks_of_stable_baselines3_log_the_rate_of_success():
    training, held_out = Scripted(solved={(0, 1), (1, 1)}), EpisodeSuccess(Scripted(solved={(2, 2)}))
    ppo = to_sb3(make_policy(training, small()), training, n_steps=12, batch_size=6)
    kept = Kept()
    ppo.set_logger(Logger(None, [kept]))
    ppo.learn(24, EvalCallback(Monitor(held_out), n_eval_episodes=3, eval_freq=12, verbose=0))
    assert kept.values["eval/success_rate"] == pytest.approx(1 / 3)
    assert kept.values["rollout/success_rate"] == pytest.approx(2 / 3)


# --- trials ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminates", [True, False])
def test_a_trial_of_several_episodes_is_one_episode(terminates):
    """Episodes of 2, 1 and 3 steps; in front of the last two columns is what the environment says."""
    env = TrialEnv(Scripted(solved={(0, 1), (2, 2)}, terminates=terminates), episodes=3)
    observations, rest = run(env, 6)
    expected = [[0, 0, 0, 1], [0, 1, 1, 0], [1, 0, 2, 1], [2, 0, 11, 1], [2, 1, 21, 0], [2, 2, 22, 0], [2, 3, 23, 0]]
    assert observations.tolist() == expected and observations.dtype == np.float32
    rewards, terminated, truncated, infos = zip(*rest, strict=True)
    assert rewards == (1.0, 2.0, 11.0, 21.0, 22.0, 23.0)
    assert terminated == (False,) * 6 and truncated == (False,) * 5 + (True,)
    assert [sorted(info) for info in infos[:-1]] == [["success"]] * 5
    last = {"success": 0.0, "episode_returns": [3.0, 11.0, 66.0], "episode_success": [True, False, True]}
    assert infos[-1] == {**last, "is_success": True}
    with pytest.raises(gymnasium.error.ResetNeeded, match="no trial in progress"):
        env.step(env.action_space.sample())
    assert run(env, 6)[0].tolist() == expected  # nothing is left of the trial before


def test_success_is_that_of_the_last_episode_and_absent_where_it_is_not_defined():
    _, rest = run(TrialEnv(Scripted(solved={(0, 1)}), episodes=2), 3)
    info = rest[-1][-1]
    assert (info["episode_success"], info["is_success"]) == ([True, False], False)
    _, rest = run(TrialEnv(Scripted(defined=False), episodes=2), 3)
    assert rest[-1][-1] == {"episode_returns": [3.0, 11.0]}


def test_seeds_of_all_episodes_descend_from_that_of_the_trial():
    def seeds(*given):
        env = TrialEnv(Scripted(lengths=(1,)), episodes=3)
        for seed in given:
            run(env, 3, seed=seed, options={"of": "mine"})
        assert env.unwrapped.options == [{"of": "mine"}] * 3 * len(given)
        return env.unwrapped.seeds

    assert seeds(5, None) == seeds(5, None) and seeds(5)[0] == 5
    assert seeds(5, 5)[:3] == seeds(5, 5)[3:]  # a seed begins everything anew
    assert len({*seeds(5, None), *seeds(6)[1:]}) == 8 and None not in seeds(None)


def test_trials_pass_the_checks_of_both_libraries():
    distribution = metarl.envs.distribution("mujoco", name="HopperRandParams", horizon=7)
    hopper = distribution.make(distribution.test_tasks[0])
    for env in (TrialEnv(hopper, 3), TrialEnv(Line(), 2), EpisodeSuccess(Line())):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is a wrapper, and of what has no bounds or other ones than ±1
            check_env(env, skip_render_check=True)
            env_checker.check_env(env)
    assert TrialEnv(Line(), 2).observation_space == gymnasium.spaces.Box(
        np.float32([-1, -1, -1, -np.inf, 0]), np.float32([1, 1, 1, np.inf, 1])
    )


def test_trials_of_what_they_cannot_be_made_of_are_refused():
    with pytest.raises(ValueError, match="episodes is 0"):
        TrialEnv(Line(), 0)
    image = Line()
    for image.observation_space in (
        gymnasium.spaces.Box(0, 255, (3,), np.uint8),
        gymnasium.spaces.Box(0.0, 1.0, (3, 3)),
        gymnasium.spaces.Discrete(3),
    ):
        with pytest.raises(ValueError, match="flatten it"):
            TrialEnv(image, 2)


# --- agents in trials --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def goals():
    return metarl.envs.distribution(**GOALS, num_test=12).test_tasks


@pytest.fixture(scope="module")
def rl2(goals):
    return make_policy(metarl.envs.make(goals[0]), RL2)


def trial_by_hand(policy, task, seed=None):
    """A deterministic trial of the policy's own; returns actions and the returns of its episodes."""
    env, state, reward, actions, returns = metarl.envs.make(task), None, None, [], []
    for _ in range(policy.agent.trial_episodes):
        observation, _ = env.reset()
        start, ended = True, False
        returns.append(0.0)
        while not ended:
            inputs = (observation, state, np.array([start]), True, reward)
            action, state = policy.predict(*inputs)
            observation, reward, _, ended, _ = env.step(action)
            actions.append(action)
            returns[-1] += reward
            start = False
    return np.array(actions), returns


def trials_of(policy, envs, count, **settings):
    """Evaluate by stable-baselines3; returns what `info` says at the end of each trial, and the trials' returns."""
    infos = []

    def note(step, _):
        if step["done"]:
            infos.append(step["info"])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a missing Monitor
        returns, _ = evaluate_policy(
            policy, envs, n_eval_episodes=count, callback=note, return_episode_rewards=True, **settings
        )
    return infos, returns


def test_a_memory_lives_through_a_trial_and_no_longer(rl2, goals):
    """One environment, two trials in turn; adapted to another task, it would do otherwise in the second one."""
    _, expected = trial_by_hand(rl2, goals[0])
    assert np.ptp(expected) > 1e-2  # it remembers something
    infos, returns = trials_of(TrialPolicy(rl2), TrialEnv(metarl.envs.make(goals[0]), 3), 2)
    assert len(infos) == 2
    for info, total in zip(infos, returns, strict=True):
        np.testing.assert_allclose(info["episode_returns"], expected, atol=1e-5)
        assert total == pytest.approx(sum(expected), abs=1e-5)


def test_trials_side_by_side_may_begin_at_different_times(rl2, goals):
    """The second environment's trials are of 2 episodes: one begins where the first one's goes on."""
    lengths = ((3, goals[0]), (2, goals[1]))
    envs = DummyVecEnv([lambda pair=pair: TrialEnv(metarl.envs.make(pair[1]), pair[0]) for pair in lengths])
    infos, _ = trials_of(TrialPolicy(rl2), envs, 4)
    for count, task in lengths:
        _, expected = trial_by_hand(rl2, task)
        trials = [info["episode_returns"] for info in infos if len(info["episode_returns"]) == count]
        assert len(trials) == 2
        for returns in trials:
            np.testing.assert_allclose(returns, expected[:count], atol=1e-5)


def test_single_observations_and_batches_are_predicted_alike(rl2):
    policy, rng = TrialPolicy(rl2), np.random.default_rng(0)
    state = states = None
    for step in range(6):
        observations = np.concatenate([rng.normal(size=(3, 3)), np.full((3, 1), step % 3 == 0)], axis=1)
        begins = np.array([step == 0, step in (0, 3), step == 0])
        actions, states = policy.predict(observations, states, begins, deterministic=True)
        action, state = policy.predict(observations[1], state, begins[1:2], deterministic=True)
        assert actions.shape == (3, 2) and action.shape == (2,)
        np.testing.assert_allclose(action, actions[1], atol=1e-6)
    # Without episode_start, a trial continues, and starts where there is no state.
    on, _ = policy.predict(observations, states, deterministic=True)
    explicit, _ = policy.predict(observations, states, np.zeros(3, bool), deterministic=True)
    np.testing.assert_array_equal(on, explicit)
    anew, _ = policy.predict(observations, None, deterministic=True)
    explicit, _ = policy.predict(observations, states, np.ones(3, bool), deterministic=True)
    np.testing.assert_array_equal(anew, explicit)
    assert np.abs(anew - on).max() > 1e-3
    with pytest.raises(ValueError, match=r"shape \(3, 2\); expected \(4,\) or \(batch, 4\) of TrialEnv"):
        policy.predict(observations[:, :2])
    # Nor is the memory of one trial that of several.
    for few, many in ((state, observations), (states[:2], observations), (states, observations[0])):
        count = len(many) if many.ndim == 2 else 1
        with pytest.raises(ValueError, match=rf"state has shape \({len(few)}, \d+\); expected \({count}, \d+\)"):
            policy.predict(many, few, deterministic=True)


def test_actions_are_drawn_unless_they_are_to_be_deterministic(rl2, goals):
    for policy in (rl2, make_policy(metarl.envs.make(goals[0]), small())):
        torch.manual_seed(0)
        drawn, _ = TrialPolicy(policy).predict(np.array([0.1, 0.2, 0.0, 1.0]))
        torch.manual_seed(0)
        np.testing.assert_array_equal(drawn, policy.predict(np.array([0.1, 0.2]), None, np.array([True]))[0])
        mean, _ = TrialPolicy(policy).predict(np.array([0.1, 0.2, 0.0, 1.0]), deterministic=True)
        assert (drawn != mean).any()


def test_a_trial_begins_with_what_the_policy_has_read(rl2, goals):
    torch.manual_seed(0)
    read = rl2.adapt(rl2.record(metarl.envs.make(goals[3]), 1))
    _, expected = trial_by_hand(read, goals[0])
    infos, _ = trials_of(TrialPolicy(read), TrialEnv(metarl.envs.make(goals[0]), 3), 2)
    for info in infos:
        np.testing.assert_allclose(info["episode_returns"], expected, atol=1e-5)
    assert np.abs(np.subtract(expected, trial_by_hand(rl2, goals[0])[1])).max() > 1e-3


@pytest.mark.slow
def test_an_exported_agent_runs_in_trials_too(rl2, goals, tmp_path):
    pytest.importorskip("onnxruntime")
    rl2.export(tmp_path / "rl2.onnx")
    _, expected = trial_by_hand(rl2, goals[0])
    exported = TrialPolicy(OnnxPolicy(tmp_path / "rl2.onnx"))
    infos, _ = trials_of(exported, TrialEnv(metarl.envs.make(goals[0]), 3), 2)
    for info in infos:
        np.testing.assert_allclose(info["episode_returns"], expected, atol=1e-4)


def test_stable_baselines3_evaluates_an_agent_as_metarl_does(goals):
    """With little noise: returns of episodes sum 5 rewards, so that an action off by 0.05 moves them by about 0.01."""
    policy = make_policy(metarl.envs.make(goals[0]), {**RL2, "init_std": 0.01, "min_std": 0.01, "max_std": 0.01})
    report = metarl.evaluate(policy, goals)
    envs = DummyVecEnv([lambda task=task: TrialEnv(metarl.envs.make(task), 3) for task in goals])
    torch.manual_seed(0)
    infos, _ = trials_of(TrialPolicy(policy), envs, len(goals), deterministic=False)
    ours, theirs = np.array([row["returns"] for row in report["tasks"]]), [info["episode_returns"] for info in infos]
    np.testing.assert_allclose(theirs, ours, atol=0.02)
    assert np.abs(ours[:, 1:] - ours[:, :1]).max() > 0.1  # without memory all episodes of a trial would be alike


def test_success_by_stable_baselines3_is_what_metarl_reports():
    """An agent that reaches goals near its way; what it remembers leads it to others."""
    tasks = {**GOALS, "horizon": 10}
    goals = metarl.envs.distribution(**tasks, num_test=24).test_tasks
    policy = make_policy(metarl.envs.make(goals[0]), {**RL2, "init_std": 0.01, "min_std": 0.01, "max_std": 0.01}, tasks)
    report = metarl.evaluate(policy, goals)
    envs = DummyVecEnv([lambda task=task: TrialEnv(metarl.envs.make(task), 3) for task in goals])
    torch.manual_seed(0)
    infos, _ = trials_of(TrialPolicy(policy), envs, len(goals), deterministic=False)
    ours = np.array([row["success"] for row in report["tasks"]])
    np.testing.assert_array_equal([info["episode_success"] for info in infos], ours)
    rate = np.mean([info["is_success"] for info in infos])
    assert rate == pytest.approx(report["aggregate"]["success_post"]["mean"])
    assert report["aggregate"]["success_pre"]["mean"] != rate and 0.1 < rate < 0.9


def test_without_a_memory_policies_are_evaluated_as_they_are(goals):
    policy = make_policy(metarl.envs.make(goals[0]), small())
    single = [trials_of(policy, metarl.envs.make(task), 1)[1][0] for task in goals[:4]]
    envs = [lambda task=task: metarl.envs.make(task) for task in goals[:4]]
    assert len(set(single)) == 4
    np.testing.assert_allclose(trials_of(policy, DummyVecEnv(envs), 4)[1], single, atol=1e-5)
    trials = DummyVecEnv([lambda env=env: TrialEnv(env(), 2) for env in envs])
    infos, _ = trials_of(TrialPolicy(policy), trials, 4)
    np.testing.assert_allclose([info["episode_returns"] for info in infos], np.stack([single, single], 1), atol=1e-5)
