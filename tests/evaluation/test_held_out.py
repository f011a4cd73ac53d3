"""Evaluation reports, the choice of tasks, and the policy that users hold."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import metarl
from metarl.build import build_agent, distribution_of, family_names
from metarl.collect import adapt_and_collect, collect
from metarl.config.schema import RunConfig, load_config
from metarl.deploy.policy import Policy
from metarl.errors import UserError
from metarl.evaluation.held_out import evaluate, held_out_metrics, select_tasks
from metarl.spaces import Spaces
from metarl.types import Task, Trajectory


def make_policy(observation_size, low, high, **agent):
    config = RunConfig.model_validate(
        {"seed": 3, "num_workers": 0, "rollouts_per_task": 2, "agent": {"hidden_sizes": [8], **agent}}
    )
    spaces = Spaces(observation_size, low, high)
    agent = build_agent(config, spaces, torch.device("cpu"))
    with torch.no_grad():  # away from a mean near 0 and a deviation of 1, as if it had been trained
        for name, value in agent.meta.theta.items():
            value.copy_(0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
    return Policy(config, agent, spaces, 1234, agent.initial_state(1))


@pytest.fixture(scope="module")
def policy():
    return make_policy(2, (-1.0, -1.0), (1.0, 1.0), adaptation_steps=2)


@pytest.fixture(scope="module")
def goals():
    return metarl.envs.distribution("navigation", name="goals", horizon=5, num_train=7, num_test=6)


@pytest.fixture(scope="module")
def report(policy, goals):
    return evaluate(policy, goals.test_tasks)


def test_a_report_has_the_fields_of_the_contract(report, goals):
    assert report == json.loads(json.dumps(report, allow_nan=False))
    assert (report["protocol"], report["split"], report["held_out"]) == ("metarl", "test", True)
    assert (report["env_steps"], report["seed"]) == (1234, 3)  # of the policy and of its run
    assert (report["adaptation_steps"], report["rollouts_per_task"]) == (2, 2)
    assert [(row["name"], row["index"]) for row in report["tasks"]] == [(t.name, t.index) for t in goals.test_tasks]
    for row in report["tasks"]:
        for field in ("returns", "success", "untrained_returns", "untrained_success"):
            assert len(row[field]) == 3  # K + 1
        assert all(0 <= value <= 1 for value in row["success"])
    measures = {f"{arm}{m}_{p}" for arm in ("", "untrained_") for m in ("return", "success") for p in ("pre", "post")}
    assert report["aggregate"].keys() == measures | {"return_gain", "success_gain"}
    for entry in report["aggregate"].values():
        assert entry["ci95"][0] <= entry["mean"] <= entry["ci95"][1] and "iqm" in entry
    assert report["per_class"].keys() == {"goals"}
    assert {"success_post", "untrained_success_post", "return_pre"} <= report["per_class"]["goals"].keys()


def test_aggregates_are_means_over_tasks_and_gain_is_post_minus_pre(report):
    pre, _, post = np.transpose([row["returns"] for row in report["tasks"]])
    aggregate = report["aggregate"]
    assert aggregate["return_pre"]["mean"] == pytest.approx(pre.mean())
    assert aggregate["return_post"]["mean"] == pytest.approx(post.mean())
    assert aggregate["return_gain"]["mean"] == pytest.approx((post - pre).mean())
    # Task by task, and so narrower than the difference of two independent means.
    low, high = aggregate["return_gain"]["ci95"]
    assert (post - pre).min() <= low <= high <= (post - pre).max()
    assert report["per_class"]["goals"]["return_post"] == pytest.approx(post.mean())
    untrained = np.mean([row["untrained_returns"][-1] for row in report["tasks"]])
    assert aggregate["untrained_return_post"]["mean"] == pytest.approx(untrained)


def test_a_phase_is_the_mean_of_its_episodes(policy, goals, monkeypatch):
    collected = []

    def spy(*args):
        rollouts = adapt_and_collect(*args)
        collected.append(rollouts)
        return rollouts

    monkeypatch.setattr(metarl.evaluation.held_out, "adapt_and_collect", spy)
    report = evaluate(policy, goals.test_tasks, rollouts_per_task=3)
    trained, _ = collected
    for k, rollout in enumerate(trained):
        assert rollout.rewards.shape == (6, 3, 5)
        returns, success = rollout.rewards.sum(-1).mean(-1), (rollout.success.amax(-1) > 0).float().mean(-1)
        assert [row["returns"][k] for row in report["tasks"]] == pytest.approx(returns.tolist())
        assert [row["success"][k] for row in report["tasks"]] == pytest.approx(success.tolist())


def test_every_phase_is_collected_with_what_the_phases_before_led_to(policy, goals, monkeypatch):
    collected = []
    monkeypatch.setattr(
        metarl.evaluation.held_out,
        "adapt_and_collect",
        lambda *a: collected.append(adapt_and_collect(*a)) or collected[-1],
    )
    evaluate(policy, goals.test_tasks)
    state = policy.agent.initial_state(6)
    for rollout in collected[0]:
        log_probs = policy.agent.log_prob(state, rollout)
        torch.testing.assert_close(rollout.log_probs, log_probs)
        state = policy.agent.adapt(state, rollout)
        adapted = policy.agent.log_prob(state, rollout)
        assert (adapted - log_probs).abs().max() > 1e-3


def test_a_task_is_evaluated_alike_whatever_tasks_come_after_it(policy, goals):
    alone, among = (evaluate(policy, goals.test_tasks[:count])["tasks"][0] for count in (1, 6))
    assert alone["returns"] == pytest.approx(among["returns"], rel=1e-4)


def test_the_untrained_agent_is_another_one_and_the_same_for_all_policies(policy, goals, report):
    assert report["aggregate"]["untrained_return_pre"] != report["aggregate"]["return_pre"]
    other = make_policy(2, (-1.0, -1.0), (1.0, 1.0), adaptation_steps=2)
    with torch.no_grad():
        other.agent.meta.theta["bias_1"].add_(1.0)
    second = evaluate(other, goals.test_tasks)
    assert [r["untrained_returns"] for r in second["tasks"]] == [r["untrained_returns"] for r in report["tasks"]]
    assert [r["returns"] for r in second["tasks"]] != [r["returns"] for r in report["tasks"]]


def test_the_untrained_agent_is_not_the_one_that_the_run_began_with(policy, goals):
    begun = build_agent(policy.config, policy.spaces, torch.device("cpu"))
    first = evaluate(dataclasses.replace(policy, agent=begun, state=begun.initial_state(1)), goals.test_tasks)
    assert first["aggregate"]["untrained_return_pre"] != first["aggregate"]["return_pre"]


def test_a_report_is_a_function_of_the_seed(policy, goals, report):
    torch.manual_seed(9)
    np.random.seed(9)
    assert evaluate(policy, goals.test_tasks) == report
    assert evaluate(policy, goals.test_tasks, seed=3) == report
    other = evaluate(policy, goals.test_tasks, seed=4)
    assert other["seed"] == 4 and other["aggregate"]["return_pre"] != report["aggregate"]["return_pre"]


def test_evaluating_changes_no_policy(policy, goals, report):
    before = {name: value.clone() for name, value in policy.agent.state_dict().items()}
    evaluate(policy, goals.test_tasks, adaptation_steps=1)
    assert all(torch.equal(value, before[name]) for name, value in policy.agent.state_dict().items())


def test_steps_and_episodes_may_differ_from_training(policy, goals):
    report = evaluate(policy, goals.test_tasks[:2], adaptation_steps=3, rollouts_per_task=1)
    assert (report["adaptation_steps"], report["rollouts_per_task"]) == (3, 1)
    assert [len(row["returns"]) for row in report["tasks"]] == [4, 4]


def test_episodes_are_as_many_as_asked_for_else_as_the_config_has_for_evaluations_else_as_in_training(policy, goals):
    settings = policy.config.model_dump() | {"evaluation": {"rollouts_per_task": 3}}
    own = dataclasses.replace(policy, config=RunConfig.model_validate(settings))
    found = [evaluate(own, goals.test_tasks[:1], rollouts_per_task=asked) for asked in (1, None)]
    found.append(evaluate(policy, goals.test_tasks[:1]))
    assert [report["rollouts_per_task"] for report in found] == [1, 3, 2]


def test_tasks_beyond_the_environments_are_evaluated_in_turn_with_seeds_of_their_own(
    policy, goals, report, monkeypatch
):
    monkeypatch.setattr(metarl.evaluation.held_out, "MAX_ENVS", 2)
    in_turn = evaluate(policy, goals.test_tasks)
    assert [row["index"] for row in in_turn["tasks"]] == [row["index"] for row in report["tasks"]]
    for row, together in zip(in_turn["tasks"], report["tasks"], strict=True):
        assert row["returns"] == pytest.approx(together["returns"], abs=1e-5)


def test_only_unseen_tasks_count_as_held_out(policy, goals):
    assert evaluate(policy, goals.train_tasks[:1])["held_out"] is False
    assert evaluate(policy, goals.train_tasks[:1])["split"] == "train"
    mixed = evaluate(policy, [goals.train_tasks[0], goals.test_tasks[0]])
    assert mixed["held_out"] is False and mixed["split"] == "test/train"
    with pytest.raises(ValueError, match="no tasks"):
        evaluate(policy, [])


@pytest.fixture(scope="module")
def cheetah():
    return make_policy(17, (-1.0,) * 6, (1.0,) * 6)


def test_mujoco_has_no_success_and_cheetah_directions_are_not_held_out(cheetah):
    runs = metarl.envs.distribution("mujoco", name="HalfCheetahDir", horizon=3)
    report = evaluate(cheetah, runs.test_tasks)
    assert report["held_out"] is False and report["split"] == "test"
    assert all(row["success"] == row["untrained_success"] == [None, None] for row in report["tasks"])
    assert not [name for name in report["aggregate"] if "success" in name]
    assert report["per_class"].keys() == {"HalfCheetahDir-forward", "HalfCheetahDir-backward"}
    assert not [name for row in report["per_class"].values() for name in row if "success" in name]
    assert held_out_metrics(report).keys() == {"meta_test/return_pre", "meta_test/return_post"}
    speeds = metarl.envs.distribution("mujoco", name="HalfCheetahVel", horizon=3, num_test=2)
    assert evaluate(cheetah, speeds.test_tasks)["held_out"] is True


@pytest.mark.slow
def test_the_number_of_workers_has_no_influence(cheetah):
    tasks = metarl.envs.distribution("mujoco", name="HalfCheetahVel", horizon=4, num_test=3).test_tasks
    assert evaluate(cheetah, tasks, num_workers=2) == evaluate(cheetah, tasks, num_workers=0)


def test_tracked_scalars_are_those_of_the_report(report):
    metrics = held_out_metrics(report)
    for measure in ("return_pre", "return_post", "success_pre", "success_post"):
        assert metrics[f"meta_test/{measure}"] == report["aggregate"][measure]["mean"]
    assert metrics["meta_test/goals/success_post"] == report["per_class"]["goals"]["success_post"]
    assert len(metrics) == 5


# Which tasks


def test_selected_tasks_are_balanced_over_classes():
    tasks = metarl.envs.distribution("navigation", name="cued_wedges", num_test=10).test_tasks
    chosen = select_tasks(tasks, 6, np.random.default_rng(0))
    counts = [sum(task.name == f"wedge-{k}" for task in chosen) for k in range(4)]
    assert sorted(counts) == [1, 1, 2, 2] and len(set(chosen)) == 6
    assert [task.name for task in chosen] == sorted(task.name for task in chosen)
    assert chosen == select_tasks(tasks, 6, np.random.default_rng(0))
    assert chosen != select_tasks(tasks, 6, np.random.default_rng(1))
    for count in (40, 41):
        assert select_tasks(tasks, count, np.random.default_rng(0)) == tasks


@pytest.mark.parametrize(
    ("name", "family", "benchmark", "task"),
    [
        ("ML10", "metaworld", "ML10", None),
        ("push-v3", "metaworld", "ML1", "push-v3"),
        ("HalfCheetahVel", "mujoco", "HalfCheetahVel", None),
        ("semicircle", "navigation", "semicircle", None),
    ],
)
def test_tasks_are_found_by_name(name, family, benchmark, task):
    found = distribution_of(load_config("navigation_maml_ppo"), name)
    first = found.test_tasks[0]
    assert (first.family, first.benchmark) == (family, benchmark)
    assert task is None or {each.name for each in found.test_tasks} == {task}
    assert family_names()[name] == family


def test_tasks_of_the_same_family_keep_the_options_of_the_run():
    flags = ["--stages.0.tasks.horizon", "7", "--stages.0.tasks.seed", "5"]
    config = load_config("half_cheetah_dir_maml_ppo", flags)
    assert distribution_of(config).test_tasks[0].benchmark == "HalfCheetahDir"
    first = distribution_of(config, "HalfCheetahVel").test_tasks[0]
    assert (first.option("horizon"), first.seed) == (7, 5)
    assert distribution_of(config, "goals").test_tasks[0].option("horizon") == 100  # of another family


def test_unknown_and_custom_tasks():
    with pytest.raises(UserError, match=r"unknown task or benchmark 'reach-v9': did you mean 'reach-v3'\?"):
        distribution_of(load_config("quickstart"), "reach-v9")
    custom = RunConfig.model_validate({"stages": [{"tasks": {"family": "custom"}}]})
    with pytest.raises(UserError, match=r"metarl\.evaluate"):
        distribution_of(custom)
    assert distribution_of(custom, "goals").test_tasks


# The policy


def test_predict_takes_one_observation_or_a_batch(policy):
    observations = np.random.default_rng(0).normal(size=(5, 2))
    batch, state = policy.predict(observations, state="anything", deterministic=True)
    assert batch.shape == (5, 2) and state == "anything"
    for row, action in zip(observations, batch, strict=True):
        alone, _ = policy.predict(row, deterministic=True)
        assert alone.shape == (2,)
        np.testing.assert_allclose(alone, action, atol=1e-6)
    assert np.ptp(batch, axis=0).min() > 1e-3  # the observation matters
    inputs = torch.tensor(observations, dtype=torch.float32)
    mean = policy.agent.policy.distribution(policy.agent.meta.theta, inputs).mode
    np.testing.assert_allclose(batch, np.clip(mean.detach().numpy(), -1, 1), atol=1e-6)


def test_predict_explores_unless_deterministic(policy):
    observation = np.zeros(2)
    torch.manual_seed(0)
    draws = np.array([policy.predict(observation)[0] for _ in range(50)])
    assert draws.std(0).min() > 0.1
    torch.manual_seed(0)
    np.testing.assert_array_equal(policy.predict(observation)[0], draws[0])
    first, again = (policy.predict(observation, deterministic=True)[0] for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_actions_lie_within_the_bounds_of_the_action_space():
    policy = make_policy(2, (-3.0, 0.0), (1.0, 10.0))
    observations = 100 * np.random.default_rng(0).normal(size=(200, 2))
    torch.manual_seed(0)
    actions, _ = policy.predict(observations)
    assert (actions.min(0) >= [-3, 0]).all() and (actions.max(0) <= [1, 10]).all()
    # Clipped draws reach both ends of each dimension: ±1 are mapped to the bounds.
    np.testing.assert_allclose(actions.min(0), [-3, 0])
    np.testing.assert_allclose(actions.max(0), [1, 10])


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        (np.zeros(3), r"shape \(3,\); expected \(2,\) or \(batch, 2\)"),
        (np.zeros((4, 3)), r"shape \(4, 3\); expected"),
        (np.zeros((1, 4, 2)), r"shape \(1, 4, 2\); expected"),
        (np.float64(1.0), r"shape \(\); expected"),
        (np.array([0.0, np.nan]), "NaN or infinity"),
        (np.array([[0.0, 1.0], [np.inf, 0.0]]), "NaN or infinity"),
    ],
)
def test_predict_refuses_what_is_no_observation(policy, observation, message):
    with pytest.raises(ValueError, match=message):
        policy.predict(observation)


def record(policy, tasks, episodes=3):
    """A rollout of one task, and the same as trajectories; actions lie within ±1, so that clipping changes none."""
    envs = metarl.envs.navigation.NavigationTasks(metarl.envs.navigation.NavigationConfig()).make_batch(episodes)
    rollout = collect(envs, policy.agent, policy.state, tasks, episodes, [np.random.SeedSequence(0)] * len(tasks))
    actions = rollout.actions.clamp(-1.0, 1.0)
    rollout = metarl.types.Rollout(
        **{
            **vars(rollout),
            "actions": actions,
            "log_probs": policy.agent.log_prob(policy.state, dataclasses.replace(rollout, actions=actions)),
        }
    )
    trajectories = [
        Trajectory(
            *(getattr(rollout, name)[0, n].numpy() for name in ("observations", "actions", "rewards", "terminated")),
            truncated=rollout.truncated[0, n].numpy(),
            log_probs=rollout.log_probs[0, n].numpy(),
        )
        for n in range(episodes)
    ]
    return rollout, trajectories


def test_adapting_equals_the_agents_own_adaptation(policy, goals):
    rollout, trajectories = record(policy, goals.test_tasks[:1])
    adapted = policy.adapt(trajectories)
    expected = policy.agent.adapt(policy.state, rollout)
    for name, value in expected.items():
        torch.testing.assert_close(adapted.state[name], value, atol=1e-6, rtol=1e-5)
        assert not torch.allclose(value, policy.state[name], atol=1e-5)
    without = [Trajectory(t.observations, t.actions, t.rewards, t.terminated, t.truncated) for t in trajectories]
    recomputed = policy.adapt(without)  # log_probs are this policy's
    for name, value in expected.items():
        torch.testing.assert_close(recomputed.state[name], value, atol=1e-6, rtol=1e-5)


def test_adapting_uses_the_units_of_the_environment():
    """Actions of a space [−3, 1] × [0, 10] are mapped back to ±1: (−1, 5) is the middle."""
    plain, scaled = make_policy(2, (-1.0, -1.0), (1.0, 1.0)), make_policy(2, (-3.0, 0.0), (1.0, 10.0))
    rng = np.random.default_rng(0)
    observations, actions, rewards = rng.normal(size=(6, 2)), rng.uniform(-1, 1, (6, 2)), rng.normal(size=6)
    ends = np.zeros(6, dtype=bool), np.arange(6) == 5
    expected = plain.adapt([Trajectory(observations, actions, rewards, *ends)]).state
    found = scaled.adapt([Trajectory(observations, actions * [2, 5] + [-1, 5], rewards, *ends)]).state
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5)


def test_adapting_leaves_the_policy_as_it_is(policy, goals):
    _, trajectories = record(policy, goals.test_tasks[:1])
    state = {name: value.clone() for name, value in policy.state.items()}
    agent = {name: value.clone() for name, value in policy.agent.state_dict().items()}
    action, _ = policy.predict(np.ones(2), deterministic=True)
    adapted = policy.adapt(trajectories)
    assert adapted is not policy
    assert all(torch.equal(policy.state[name], value) for name, value in state.items())
    assert all(torch.equal(policy.agent.state_dict()[name], value) for name, value in agent.items())
    np.testing.assert_array_equal(policy.predict(np.ones(2), deterministic=True)[0], action)
    assert np.abs(adapted.predict(np.ones(2), deterministic=True)[0] - action).max() > 1e-5
    twice = adapted.adapt(trajectories)
    assert not torch.equal(twice.state["bias_1"], adapted.state["bias_1"])


def test_episodes_of_unequal_length_do_not_dilute_each_other(policy):
    """A short episode is padded to the length of the longest; which comes first changes nothing."""
    rng = np.random.default_rng(0)

    def episode(length):
        ends = np.arange(length) == length - 1
        actions = rng.uniform(-1, 1, (length, 2))
        return Trajectory(rng.normal(size=(length, 2)), actions, rng.normal(size=length), ends, ends & False)

    short, long = episode(4), episode(9)
    rollout = policy._rollout([short, long])
    assert rollout.valid.sum(-1).tolist() == [[4, 9]]
    assert all(torch.isfinite(value).all() for value in policy.adapt([short, long]).state.values())
    swapped = policy.adapt([long, short]).state
    for name, value in policy.adapt([short, long]).state.items():
        torch.testing.assert_close(value, swapped[name], atol=1e-6, rtol=1e-5)


def test_trajectories_that_do_not_fit_are_refused(policy):
    ends = np.zeros(4, dtype=bool)
    with pytest.raises(ValueError, match="at least one episode"):
        policy.adapt([])
    with pytest.raises(ValueError, match=r"trajectory 0 has \(observation, action\) sizes \(3, 2\).*expects \(2, 2\)"):
        policy.adapt([Trajectory(np.zeros((4, 3)), np.zeros((4, 2)), np.zeros(4), ends, ends)])
    good = Trajectory(np.ones((4, 2)), np.zeros((4, 2)), np.zeros(4), ends, ends)
    with pytest.raises(ValueError, match="trajectory 1"):
        policy.adapt([good, Trajectory(np.zeros((4, 2)), np.zeros((4, 1)), np.zeros(4), ends, ends)])


def test_tasks_of_a_family_unknown_to_metarl_need_make(policy):
    task = Task("mine", "mine", "test", "mine", 0, 0, {"horizon": 5})
    with pytest.raises(ValueError, match="unknown task family 'mine'"):
        evaluate(policy, [task])
