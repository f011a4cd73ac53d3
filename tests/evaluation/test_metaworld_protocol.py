"""Meta-World's own evaluation with our agents: what upstream counts, what there is to count, and the adapter between.

Most of it runs in made-up environments without physics, where every figure is known.
"""

import inspect
import json

import gymnasium
import metaworld
import numpy as np
import pytest
import torch
from metaworld import evaluation as upstream

from metarl.build import build_agent
from metarl.config.schema import RunConfig
from metarl.deploy.policy import Policy
from metarl.errors import UserError
from metarl.evaluation import metaworld_protocol as official
from metarl.evaluation.metaworld_protocol import (
    CountedEnvs,
    MetaWorldAgent,
    envs_per_class,
    evaluate_both_ways,
    success_per_class,
)
from metarl.spaces import Spaces

REACH, PUSH = "SawyerReachEnvV3", "SawyerPushEnvV3"  # as upstream's environments name themselves
LOW, HIGH = (-1.0, 0.0), (1.0, 4.0)  # so that the second action, a, becomes 2 + 2 · a


class FakeEnvs:
    """What upstream's evaluation asks of vector environments, without physics; autoreset in the same step.

    An observation is (environment, step of the episode); the reward of an environment's k-th step in all is 100 · its
    number + k. Environment i is solved in step `solved_after[i]` of an episode and truncated after `horizon[i]` steps.
    """

    def __init__(self, class_names, horizon, solved_after=None, recurrent=False, reward_scale=1.0):
        self.class_names, self.horizon, self.num_envs = class_names, horizon, len(class_names)
        self.solved_after = solved_after or [None] * self.num_envs
        self.recurrent, self.reward_scale = recurrent, reward_scale
        self.terminate_on_success, self.closed, self.rounds, self.actions = False, False, 0, []
        self.time, self.total = np.zeros(self.num_envs, int), np.zeros(self.num_envs, int)
        self.returns = np.zeros(self.num_envs)
        self.single_observation_space = np.zeros(2 + 4 * recurrent)  # of spaces, only the shape is asked for
        self.single_action_space = gymnasium.spaces.Box(np.float32(LOW), np.float32(HIGH))

    def get_attr(self, name):
        return {
            "task_name": tuple(self.class_names),
            "terminate_on_success": (self.terminate_on_success,) * self.num_envs,
        }[name]

    def call(self, name, *args):
        if name == "toggle_terminate_on_success":
            self.terminate_on_success = args[0]
        self.rounds += name == "sample_tasks"

    def observe(self, rewards=0.0):
        observations = np.stack([np.arange(self.num_envs), self.time], -1).astype(float)
        if not self.recurrent:
            return observations
        extra = np.zeros((self.num_envs, 4))
        extra[:, :2], extra[:, 2], extra[:, 3] = 0.5, rewards, self.time == 0
        return np.concatenate([observations, extra * (self.time > 0)[:, None]], -1)

    def reset(self):
        self.time[:], self.returns[:] = 0, 0
        return self.observe(), {}

    def step(self, actions):
        self.actions.append(actions)
        self.time, self.total = self.time + 1, self.total + 1
        rewards = self.rewards(actions)
        self.returns = self.returns + rewards
        success = self.solved()
        terminated = success & self.terminate_on_success
        truncated = self.time == np.array(self.horizon)
        infos = {"final_info": {"success": success.astype(float), "episode": {"r": self.returns.copy()}}}
        ended = terminated | truncated
        self.time[ended] = self.returns[ended] = 0
        return self.observe(rewards * self.reward_scale), rewards, terminated, truncated, infos

    def rewards(self, actions):
        return 100.0 * np.arange(self.num_envs) + self.total

    def solved(self):
        return np.array([self.time[i] == after for i, after in enumerate(self.solved_after)])

    def close(self):
        self.closed = True


class SolvedOnce(FakeEnvs):
    """Solved in that step of all, and never again."""

    def solved(self):
        return np.array([self.total[i] == after for i, after in enumerate(self.solved_after)])


class RewardedActions(FakeEnvs):
    """The reward is the first action: a return tells the noise."""

    def rewards(self, actions):
        return actions[:, 0]


class Counting:
    """Adapts between rollouts: its state is the number of adaptations, and the mean of its actions."""

    device, trial_episodes, adaptation_steps, training_adaptation_steps = torch.device("cpu"), 1, 2, 2
    adapts_by, noise_size = "gradient", 2

    def __init__(self):
        self.time_steps, self.draws, self.rollouts = [], [], []

    def initial_state(self, num_tasks):
        return torch.zeros(num_tasks)

    def act(self, time_step, noise, state):
        assert time_step.observations.shape == (*noise.shape[:2], 2) and noise.shape[:2] == (len(state), 1)
        self.time_steps.append(time_step)
        self.draws.append(state[:, None, None] + noise)
        return self.draws[-1], -self.draws[-1].sum(-1), state

    def adapt(self, state, rollout):
        self.rollouts.append(rollout)
        return state + 1


class Remembering:
    """Adapts in its memory: its state is all of its inputs, as tuples (step, reward, episode_start)."""

    device, trial_episodes, adaptation_steps, training_adaptation_steps = torch.device("cpu"), 3, 0, 0
    adapts_by, noise_size = "memory", 2

    def __init__(self, observation_size=2):
        self.memories = {}  # of each environment, after every step
        self.observation_size, self.noise_size = observation_size, 2 if observation_size == 2 else 4

    def initial_state(self, num_tasks):
        return ((),) * num_tasks

    def act(self, time_step, noise, state):
        memories = []
        assert time_step.observations.shape == (len(state), 1, self.observation_size)
        for memory, (observation,), reward, start in zip(state, *time_step[:3], strict=True):
            env, time = observation[:2].int().tolist()
            memories.append((*memory, (time, reward.item(), start.item())))
            self.memories.setdefault(env, []).append(memories[-1])
        return noise, noise.sum(-1), tuple(memories)

    def adapt(self, state, rollout):
        raise AssertionError("it adapts in its memory")


def make_policy(agent, low=LOW, high=HIGH, observation_size=2, task_seed=5):
    tasks = {"family": "metaworld", "name": "reach-v3", "seed": task_seed}
    config = RunConfig.model_validate({"stages": [{"tasks": tasks}], "agent": {"hidden_sizes": [8]}})
    spaces = Spaces(observation_size, low, high)
    agent = build_agent(config, spaces, torch.device("cpu")) if agent is None else agent
    return Policy(config, agent, spaces, 1234, agent.initial_state(1))


def one_of_four_is_solved():
    """One class; environment 2 is solved in its first step, the others never."""
    return FakeEnvs([REACH] * 4, horizon=[6] * 4, solved_after=[None, None, 1, None])


# --- the two counts ----------------------------------------------------------------------------------------------


def test_upstream_reads_one_solved_goal_of_four_as_all_of_them():
    """Environment 2 finishes its three episodes in steps 1, 2, 3: the first three of the class; all are solved."""
    envs = one_of_four_is_solved()
    success, _, of_class, _ = upstream.evaluation(MetaWorldAgent(make_policy(Counting())), envs, num_episodes=3)
    assert (success, of_class, envs.total.tolist()) == (1.0, {"reach-v3": 1.0}, [3] * 4)


def test_ours_reads_a_quarter_of_the_same_episodes():
    """The others go on to the end of their third episode: 3 · 6 = 18 steps. (1 + 0 + 0 + 0) / 4."""
    envs = one_of_four_is_solved()
    agent = MetaWorldAgent(make_policy(Counting()))
    counted = CountedEnvs(envs, agent, num_episodes=3)
    success, _, of_class, _ = upstream.evaluation(agent, counted, num_episodes=3)
    assert (success, of_class) == (1.0, {"reach-v3": 1.0})
    assert counted.success == [{"reach-v3": 0.25}] and envs.total.tolist() == [18] * 4


def test_ours_is_the_mean_over_the_episodes_of_an_environment():
    """Environment 0 is solved in the first of its three episodes, the others never: (1/3 + 0 + 0 + 0) / 4."""
    agent = MetaWorldAgent(make_policy(Counting()))
    counted = CountedEnvs(SolvedOnce([REACH] * 4, [6] * 4, [1, None, None, None]), agent, num_episodes=3)
    upstream.evaluation(agent, counted, num_episodes=3)
    assert counted.success == [{"reach-v3": pytest.approx(1 / 12, rel=1e-12)}]


def test_the_report_holds_both_counts_and_their_difference():
    """The class push has two environments, one of which is solved in step 2: upstream 2 of 2, ours 1/2."""
    envs = FakeEnvs([REACH] * 4 + [PUSH] * 2, [6] * 6, [None, None, 1, None, 2, None])
    agent = MetaWorldAgent(make_policy(Counting()))
    settings = {"adaptation_steps": 2, "adaptation_episodes": 1, "evaluation_episodes": 2}
    report = evaluate_both_ways(envs, agent, num_evals=3, **settings)
    assert envs.rounds == 3
    assert report["success_mean"] == 1.0 and report["success_per_class"] == {"reach-v3": 1.0, "push-v3": 1.0}
    # (1/4 + 1/2) / 2
    assert report["per_environment"] == {"success_mean": 0.375, "success_per_class": {"reach-v3": 0.25, "push-v3": 0.5}}
    assert report["biased_by"] == 0.625
    assert list(report["success_per_class"]) == ["reach-v3", "push-v3"]  # not in the order of a set


def test_the_report_is_the_mean_over_rounds():
    """A round is 6 steps of adaptation and 6 of evaluation; one of two is solved in the first step of the second."""
    envs = SolvedOnce([REACH] * 2, [6] * 2, [12 + 6 + 1, None])
    settings = {"adaptation_steps": 1, "adaptation_episodes": 1, "evaluation_episodes": 1}
    report = evaluate_both_ways(envs, MetaWorldAgent(make_policy(Counting())), num_evals=2, **settings)
    assert report["success_per_class"] == {"reach-v3": 0.5}  # (0 + 1) / 2
    assert report["per_environment"]["success_per_class"] == {"reach-v3": 0.25}  # (0 + 1/2) / 2


def test_success_counts_every_environment_alike_and_only_its_first_episodes():
    outcomes = [[0.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0], [0.0, 0.0, 1.0]]
    # a: (1/2 + 0) / 2; b: 1
    assert success_per_class(["a", "b", "a"], outcomes, num_episodes=2) == {"a": 0.25, "b": 1.0}
    with pytest.raises(ValueError, match=r"\[5, 2, 3\].*at least 3"):
        success_per_class(["a", "b", "a"], outcomes, num_episodes=3)


def test_counting_beside_it_does_not_change_what_upstream_reads():
    """It draws separate noise and continues with memories; nothing of it reaches the next round."""
    figures = []
    for counting in (False, True):
        envs = RewardedActions([REACH] * 3, [6] * 3, [None, 1, None], recurrent=True)
        agent = MetaWorldAgent(make_policy(Remembering()), seed=9)
        watched = CountedEnvs(envs, agent, 3) if counting else envs
        figures.append(upstream.metalearning_evaluation(agent, watched, 3, 1, 1, 3))
        assert envs.total[0] == 3 * (6 + (18 if counting else 3))
    assert figures[0] == figures[1] and figures[0][1] != 0


# --- agents that adapt between rollouts --------------------------------------------------------------------------


def evaluate_upstream(agent, envs, adaptation_episodes=2, evaluation_episodes=1, num_evals=1):
    steps = max(1, agent.adaptation_steps)
    adapter = MetaWorldAgent(make_policy(agent), seed=3, deterministic=True)
    upstream.metalearning_evaluation(adapter, envs, num_evals, steps, adaptation_episodes, evaluation_episodes)


def test_adapting_sees_exactly_the_recorded_episodes():
    """Episodes of 2 and 3 steps, until both have finished two: 6 steps are three episodes of 2 and two of 3."""
    agent, envs = Counting(), FakeEnvs([REACH, PUSH], horizon=[2, 3])
    evaluate_upstream(agent, envs)
    first, second = agent.rollouts  # K = 2
    assert first.observations.shape == (2, 3, 3, 2) and first.actions.shape == (2, 3, 3, 2)
    valid = [[[1, 1, 0]] * 3, [[1, 1, 1], [1, 1, 1], [0, 0, 0]]]
    last = [[[0, 1, 0]] * 3, [[0, 0, 1], [0, 0, 1], [0, 0, 0]]]
    assert first.valid.int().tolist() == valid
    assert first.rewards[0].tolist() == [[1, 2, 0], [3, 4, 0], [5, 6, 0]]
    assert first.rewards[1].tolist() == [[101, 102, 103], [104, 105, 106], [0, 0, 0]]
    assert first.truncated.int().tolist() == last and not first.terminated.any()
    assert first.episode_start.int().tolist() == [[[1, 0, 0]] * 3, [[1, 0, 0], [1, 0, 0], [0, 0, 0]]]
    assert first.observations[..., 1].tolist() == [[[0, 1, 0]] * 3, [[0, 1, 2], [0, 1, 2], [0, 0, 0]]]
    # The last observation of an episode also serves as the next one.
    assert first.next_observations[..., 1].tolist() == [[[1, 1, 0]] * 3, [[1, 2, 2], [1, 2, 2], [0, 0, 0]]]
    assert (first.observations[1, :2, :, 0] == 1).all() and (first.next_observations[1, :2, :, 0] == 1).all()
    assert first.success.isnan().equal(first.valid)
    assert second.rewards[0].tolist() == [[7, 8, 0], [9, 10, 0], [11, 12, 0]]  # nothing of the first one

    draws = torch.cat(agent.draws[:6], 1)  # [2, 6, 2]
    assert (draws.abs() > 1).any()
    expected = torch.zeros(2, 3, 3, 2)
    expected[0, :, :2], expected[1, :2] = draws[0].view(3, 2, 2), draws[1].view(2, 3, 2)
    torch.testing.assert_close(first.actions, expected, rtol=0, atol=0)  # as drawn, before clipping
    torch.testing.assert_close(first.log_probs, -expected.sum(-1), rtol=0, atol=0)


def test_an_episode_that_has_not_ended_is_left_out():
    """Until the episode of 3 steps has ended, the other environment has begun its second episode of 2."""
    agent = Counting()
    evaluate_upstream(agent, FakeEnvs([REACH, PUSH], horizon=[2, 3]), adaptation_episodes=1)
    assert agent.rollouts[0].rewards.tolist() == [[[1, 2, 0]], [[101, 102, 103]]]


def test_a_solved_adaptation_episode_ends_by_termination():
    agent = Counting()
    adapter = MetaWorldAgent(make_policy(agent))
    actions, aux = adapter.adapt_action(np.zeros((1, 2)))
    true, false = np.array([True]), np.array([False])
    adapter.step(upstream.Timestep(np.zeros((1, 2)), actions, np.array([1.5]), true, false, aux))
    adapter.adapt()
    assert agent.rollouts[0].terminated.tolist() == [[[True]]] and agent.rollouts[0].truncated.tolist() == [[[False]]]


def test_it_acts_with_the_adapted_state_clipped_and_scaled():
    agent, envs = Counting(), FakeEnvs([REACH, PUSH], horizon=[3, 3])
    evaluate_upstream(agent, envs)
    exploring, adapted = np.array(envs.actions[:12]), np.array(envs.actions[12:])
    draws = np.array([draw[:, 0].double().numpy() for draw in agent.draws[:12]])
    np.testing.assert_allclose(exploring, np.clip(draws, -1, 1) * [1, 2] + [0, 2], rtol=1e-6)
    # After K = 2 adaptations the mean is 2, beyond the bound 1, which means HIGH.
    assert adapted.shape == (3, 2, 2) and (adapted == [1.0, 4.0]).all()


def test_noise_comes_from_the_seed_and_the_round():
    def draws(seed, deterministic=False, rounds=1):
        agent, envs = Counting(), FakeEnvs([REACH], horizon=[4])
        adapter = MetaWorldAgent(make_policy(agent), seed=seed, deterministic=deterministic)
        upstream.metalearning_evaluation(adapter, envs, rounds, 2, 1, 1)
        return torch.stack(agent.draws)

    first = draws(1, rounds=2)
    assert torch.equal(first, draws(1, rounds=2)) and not torch.isclose(first, draws(2, rounds=2)).any()
    assert not torch.isclose(first[:12], first[12:]).any()  # rounds differ
    assert (first[8:12] != 2).all() and (draws(1, deterministic=True)[8:12] == 2).all()
    assert torch.equal(first[:8], draws(1, deterministic=True)[:8])  # adapting always explores


# --- agents that adapt in their memory ---------------------------------------------------------------------------

ADAPTED = (  # of environment 0: episodes of 2 steps; the reward is that of the step before, 0 before the first
    (0, 0.0, True),
    (1, 1.0, False),
    (0, 2.0, True),
    (1, 3.0, False),
    (0, 4.0, True),
    (1, 5.0, False),
)
ADAPTED_1 = (
    (0, 0.0, True),
    (1, 101.0, False),
    (2, 102.0, False),
    (0, 103.0, True),
    (1, 104.0, False),
    (2, 105.0, False),
)


def test_a_memory_is_carried_through_adaptation_and_brought_back_where_an_episode_ends():
    """Episodes of 2 and 3 steps. Adaptation: 6 steps. Evaluation: until both have finished one, 3 steps."""
    agent = Remembering()
    evaluate_upstream(agent, FakeEnvs([REACH, PUSH], horizon=[2, 3], recurrent=True))
    memories = agent.memories[0]
    assert memories[5] == ADAPTED and agent.memories[1][5] == ADAPTED_1
    assert memories[6] == (*ADAPTED, (0, 6.0, True))  # the reward of the last adaptation step
    assert memories[7] == (*ADAPTED, (0, 6.0, True), (1, 7.0, False))  # as the observation tells it
    assert memories[8] == (*ADAPTED, (0, 6.0, True))  # the episode has ended: as adapted, and so is the reward
    # The other environment goes on in its episode meanwhile.
    assert agent.memories[1][8] == (*ADAPTED_1, (0, 106.0, True), (1, 107.0, False), (2, 108.0, False))


def test_a_round_begins_without_memory():
    agent = Remembering()
    evaluate_upstream(agent, FakeEnvs([REACH], horizon=[2], recurrent=True), adaptation_episodes=1, num_evals=2)
    assert agent.memories[0][4] == ((0, 0.0, True),)  # 2 steps of adaptation, 2 of evaluation


def test_a_memory_is_brought_back_in_the_episodes_that_upstream_does_not_wait_for():
    """Upstream stops after 3 steps, with two episodes of the class; 6 steps are two of the longer ones."""
    agent, envs = Remembering(), FakeEnvs([REACH, REACH], horizon=[2, 3], recurrent=True)
    adapter = MetaWorldAgent(make_policy(agent))
    upstream.metalearning_evaluation(adapter, CountedEnvs(envs, adapter, 2), 1, 1, 2, 2)
    lengths = [[len(memory) - len(ADAPTED) for memory in agent.memories[env][6:]] for env in range(2)]
    assert lengths == [[1, 2, 1, 2, 1, 2], [1, 2, 3, 1, 2, 3]]


def test_a_second_adaptation_step_begins_an_episode_where_the_last_one_has_not_ended():
    """The longer episode ends after 3 steps, within the second one of the other environment."""
    agent, envs = Remembering(), FakeEnvs([REACH, PUSH], horizon=[2, 3], recurrent=True)
    upstream.metalearning_evaluation(MetaWorldAgent(make_policy(agent)), envs, 1, 2, 1, 1)
    assert agent.memories[0][3] == ((0, 0.0, True), (1, 1.0, False), (0, 2.0, True), (0, 3.0, True))


def test_only_what_the_mask_names_is_brought_back():
    agent = Remembering()
    adapter = MetaWorldAgent(make_policy(agent))
    adapter.reset(np.ones(3, np.bool_))
    adapter.adapt()
    adapter.reset(np.ones(3, bool))
    observations = np.zeros((3, 6))
    observations[:, 0] = range(3)
    adapter.eval_action(observations)
    adapter.reset(np.array([False, True, False]))
    observations[:, 1:5] = 1.0, 0.5, 0.5, 8.0  # a step later, with a reward of 8
    adapter.eval_action(observations)
    on, back = ((0, 0.0, True), (1, 8.0, False)), ((1, 0.0, True),)
    assert [agent.memories[env][-1] for env in range(3)] == [on, back, on]


def test_a_memory_evaluates_without_adaptation_too():
    agent = Remembering()
    adapter = MetaWorldAgent(make_policy(agent))
    upstream.evaluation(adapter, FakeEnvs([REACH], horizon=[2], recurrent=True), num_episodes=2)
    assert agent.memories[0][2] == ((0, 0.0, True),)


# --- mistakes ----------------------------------------------------------------------------------------------------


def test_environments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="recurrent_info_in_obs=True"):
        evaluate_upstream(Remembering(), FakeEnvs([REACH], [2]))
    with pytest.raises(ValueError, match="recurrent_info_in_obs=False"):
        evaluate_upstream(Counting(), FakeEnvs([REACH], [2], recurrent=True))
    with pytest.raises(ValueError, match=r"have the rewards \[0.1\], environments \[1.\].*normalize_reward"):
        evaluate_upstream(Remembering(), FakeEnvs([REACH], [2], recurrent=True, reward_scale=0.1))
    with pytest.raises(ValueError, match="NaN or infinity"):
        MetaWorldAgent(make_policy(Counting())).adapt_action(np.array([[0.0, np.nan]]))


def test_goals_are_divided_evenly_over_environments():
    """As published, 20 environments; a divisor of the goals, and one a class where there are more classes."""
    layouts = {("ML1", 1, 40): 20, ("ML10 test", 5, 40): 4, ("ML10 train", 10, 50): 2, ("ML45 train", 45, 50): 1}
    assert {key: envs_per_class(*key[1:]) for key in layouts} == layouts
    assert envs_per_class(1, 50) == 10  # 20 does not divide 50


# --- the report --------------------------------------------------------------------------------------------------


def build_fakes(monkeypatch):
    """Put made-up environments in the place of the official ones; returns what they are asked for."""
    asked = []

    def make(name, **options):
        bound = inspect.signature(genuine).bind(name, **options)  # refuses what upstream would refuse
        fakes = [REACH] * bound.arguments["meta_batch_size"]
        asked.append(options | {"envs": FakeEnvs(fakes, [2] * len(fakes), recurrent=options["recurrent_info_in_obs"])})
        asked[-1]["name"] = name
        return asked[-1]["envs"]

    genuine = metaworld.make_ml_envs
    monkeypatch.setattr(metaworld, "make_ml_envs", make)
    return asked


@pytest.mark.parametrize("agent", [Counting, Remembering])
def test_the_defaults_are_those_of_published_figures(monkeypatch, agent):
    asked = build_fakes(monkeypatch)
    report = official.official_report(make_policy(agent()), benchmark="ML10")
    assert report == json.loads(json.dumps(report, allow_nan=False))
    expected = {"name": "ML10", "split": "test", "meta_batch_size": 20, "total_tasks_per_cls": 40, "seed": 5}
    expected |= {"max_episode_steps": 500, "task_select": "pseudorandom", "autoreset_mode": "SameStep"}
    expected |= {"recurrent_info_in_obs": agent is Remembering, "normalize_reward_in_recurrent_info": False}
    assert expected.items() <= asked[0].items() and asked[0]["envs"].closed
    assert asked[0]["envs"].rounds == report["num_evals"] == 10  # 40 goals / 4 environments
    # 10 rounds of: 2 · 10 or 10 adaptation episodes and 3 of each environment, all of 2 steps
    assert asked[0]["envs"].total[0] == 10 * 2 * ((10 if agent is Remembering else 20) + 3)
    assert (report["protocol"], report["env_steps"], report["goal_seed"]) == ("metaworld", 1234, 5)
    assert report["deterministic"] and report["shared_classes"] == []
    exploring = np.unique(np.array(asked[0]["envs"].actions)[-6:], axis=0)
    assert len(exploring) == 1  # without noise in the end


def test_settings_reach_the_environments(monkeypatch):
    asked = build_fakes(monkeypatch)
    settings = {"horizon": 7, "reward_version": "v1", "adaptation_episodes": 2, "evaluation_episodes": 1}
    report = official.official_report(
        make_policy(Counting()), benchmark="ML1", name="push-v3", split="train", goal_seed=8, num_evals=1, **settings
    )
    expected = {"name": "push-v3", "split": "train", "seed": 8, "meta_batch_size": 10, "total_tasks_per_cls": 50}
    assert expected.items() <= asked[0].items()
    assert (asked[0]["max_episode_steps"], asked[0]["reward_function_version"]) == (7, "v1")
    assert asked[0]["envs"].total[0] == 2 * (2 * 2 + 1) and settings.items() <= report.items()
    report = official.official_report(make_policy(Counting()), benchmark="ML25", num_evals=1)
    assert report["shared_classes"] == ["basketball-v3"]


def test_the_seed_is_that_of_the_noise_and_not_of_the_goals(monkeypatch):
    asked, agents = build_fakes(monkeypatch), [Counting() for _ in range(3)]
    for seed, agent in zip((0, 1, 1), agents, strict=True):
        official.official_report(make_policy(agent), benchmark="ML10", seed=seed, num_evals=1, deterministic=False)
    draws = [torch.stack(agent.draws) for agent in agents]
    assert torch.equal(draws[1], draws[2]) and not torch.isclose(draws[0], draws[1]).all(-1).any()
    assert [options["seed"] for options in asked] == [5, 5, 5]


def test_mistakes_are_named(monkeypatch):
    asked = build_fakes(monkeypatch)
    policy = make_policy(Counting())
    with pytest.raises(UserError, match="ML1 with a name"):
        official.official_report(policy, benchmark="ML1")
    with pytest.raises(UserError, match="ML1 with a name"):
        official.official_report(policy, benchmark="ML10", name="reach-v3")
    with pytest.raises(UserError, match="'raech-v3'"):
        official.official_report(policy, benchmark="ML1", name="raech-v3")
    with pytest.raises(UserError, match="already adapted"):
        official.official_report(
            Policy(policy.config, policy.agent, policy.spaces, 0, None, adapted=True), benchmark="ML10"
        )
    assert not asked
    with pytest.raises(UserError, match=r"observations have shape \(2,\); the agent was trained for \(3,\)"):
        official.official_report(make_policy(Counting(), observation_size=3), benchmark="ML10")
    assert asked[0]["envs"].closed


@pytest.mark.slow
@pytest.mark.parametrize("agent", [None, Remembering])
def test_official_environments_end_to_end(monkeypatch, agent):
    """MAML-PPO, and a memory, whose rewards are checked against those that the observations tell."""
    monkeypatch.setattr(official, "NUM_ENVS", 4)
    bounds = (-1.0,) * 4, (1.0,) * 4
    policy = make_policy(agent and agent(39), *bounds, observation_size=39)
    settings = {"benchmark": "ML1", "name": "reach-v3", "horizon": 10, "num_evals": 1, "adaptation_episodes": 2}
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    report = official.official_report(policy, **settings)
    assert (np.random.get_state()[1] == before).all()
    np.random.seed(2)
    assert official.official_report(policy, **settings) == report  # nothing of the global stream
    exploring = [official.official_report(policy, **settings, deterministic=False, seed=seed) for seed in (0, 1)]
    assert len({figures["return_mean"] for figures in [report, *exploring]}) == 3
    assert report == json.loads(json.dumps(report, allow_nan=False))
    assert (report["num_envs"], report["horizon"], report["goal_seed"]) == (4, 10, 5)
    assert report["return_mean"] > 0
    ours = report["per_environment"]
    for success in (report["success_mean"], ours["success_mean"], *ours["success_per_class"].values()):
        assert 0 <= success <= 1
    assert report["biased_by"] == report["success_mean"] - ours["success_mean"]
