"""Adapting to recordings and to tasks, and saving what was adapted."""

from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

import metarl
from metarl.build import build_agent
from metarl.collect import collect
from metarl.config.schema import RunConfig
from metarl.deploy.policy import Policy
from metarl.envs.vector.serial import make_envs
from metarl.errors import UserError
from metarl.evaluation.held_out import adapt_to
from metarl.seeding import Purpose, children, seeds
from metarl.spaces import Spaces
from metarl.types import TimeStep
from tests.agents.deployed import AGENTS, SPACES, make_episodes, make_policy, make_trials, walk


def test_steps_and_rates_of_adapting_are_the_ones_asked_for():
    policy, episodes = make_policy("mlp"), make_episodes(log_probs=True)
    once, twice, half = (policy.adapt(episodes, **asked) for asked in ({}, {"steps": 2}, {"inner_lr": 0.05}))
    again = once.adapt(episodes)
    for name, start in policy.state.items():
        torch.testing.assert_close(twice.state[name], again.state[name], rtol=0, atol=0)
        # The configured rate is 0.1: half of it goes half as far.
        torch.testing.assert_close(half.state[name] - start, (once.state[name] - start) / 2, rtol=1e-4, atol=1e-7)
    assert any(not torch.equal(once.state[name], start) for name, start in policy.state.items())
    rates = make_policy("meta_sgd")  # learned, each its own: 0.05 is half of where they began
    full, halved = rates.adapt(episodes), rates.adapt(episodes, inner_lr=0.05)
    for name, start in rates.state.items():
        torch.testing.assert_close(halved.state[name] - start, (full.state[name] - start) / 2, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("mlp", {"steps": 0}, "steps is 0"),
        ("mlp", {"inner_lr": 0.0}, "inner_lr is 0.0"),
        ("gru", {"steps": 2}, "rl2 adapts by memory: it reads the episodes"),
        ("gru", {"inner_lr": 0.1}, "and has no steps and no inner_lr"),
    ],
)
def test_adapting_as_no_agent_does_is_refused(name, asked, message):
    with pytest.raises(ValueError, match=message):
        make_policy(name).adapt(make_episodes(), **asked)


def test_episodes_without_log_probabilities_get_those_of_the_policy_and_it_is_said(caplog):
    policy = make_policy("mlp")
    bare, with_log_probs = make_episodes(), make_episodes(log_probs=True)
    policy.adapt(with_log_probs)
    assert not caplog.records
    adapted = policy.adapt([bare[0], with_log_probs[1]])
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "metarl: 1 of 2 episodes come without log-probabilities; those of this policy"
    )
    rollout = policy._rollout(bare)
    filled = [
        replace(episode, log_probs=own.numpy().astype(np.float64))
        for episode, own in zip(bare, policy.agent.log_prob(policy.state, rollout)[0], strict=True)
    ]
    for name, value in policy.adapt([filled[0], with_log_probs[1]]).state.items():
        torch.testing.assert_close(value, adapted.state[name])


@pytest.mark.parametrize("name", ["mlp", "meta_sgd", "gru", "transformer", "episodic"])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_saved_policy_is_the_same_when_it_is_loaded(tmp_path, name, adapted):
    policy = make_policy(name)
    policy = policy.adapt(make_episodes()) if adapted else policy
    policy.save(tmp_path / "saved")
    loaded = metarl.load(tmp_path / "saved")
    assert (loaded.adapted, loaded.env_steps, loaded.spaces) == (adapted, 1000, policy.spaces)
    np.testing.assert_array_equal(walk(loaded, make_trials())[0], walk(policy, make_trials())[0])
    # It goes on adapting as the one that was saved.
    more = make_episodes(seed=1, log_probs=True)
    ours, theirs = (walk(each.adapt(more), make_trials())[0] for each in (policy, loaded))
    # By rounding alone: a state that was saved lies otherwise in memory, which some processors sum in another order.
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "gru", "episodic"])
def test_a_packed_state_goes_on_in_the_middle_of_an_episode(name):
    agent = make_policy(name).agent
    observations, rewards, starts = map(torch.from_numpy, make_trials(batch=1))
    noise, active = torch.zeros(1, 1, 2), torch.ones(1, 1, dtype=torch.bool)

    def live(state, steps):
        actions = []
        for t in steps:
            time_step = TimeStep(observations[t][None], rewards[t][None], starts[t][None], active)
            action, _, state = agent.act(time_step, noise, state)
            actions.append(action)
        return torch.cat(actions), state

    _, state = live(agent.initial_state(1), range(6))  # episodes begin at 0, 4 and 8
    packed = agent.pack(state)
    expected, _ = live(state, range(6, 12))
    found, _ = live(agent.unpack(packed), range(6, 12))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for wrong in ({}, {key: value[:, :-1] for key, value in packed.items()}):
        with pytest.raises(ValueError, match=r"cannot load .*: expected shape"):
            agent.unpack(wrong)


def test_an_agent_with_a_memory_adapts_to_a_task_by_one_trial():
    goals = metarl.envs.distribution("navigation", name="goals", horizon=5, num_train=7, num_test=6)
    spaces = Spaces(2, (-1.0, -1.0), (1.0, 1.0))
    policy = make_policy("gru", spaces, agent={**AGENTS["gru"], "observation_entries": [0, 1], "trial_episodes": 3})
    adapted = adapt_to(policy, goals.test_tasks[2], seed=5)
    envs = make_envs(goals, 1, 0)
    (phase,) = children(seeds(5, Purpose.EVALUATION_ROLLOUTS), 1)
    trial = collect(envs, policy.agent, policy.state, [goals.test_tasks[2]], 1, [phase])
    assert trial.env_steps == 15
    read = replace(trial, valid=trial.valid & (torch.arange(15) < 10))  # the third episode is yet to come
    expected = policy.agent.pack(policy.agent.adapt(policy.state, read))
    torch.testing.assert_close(policy.agent.pack(adapted.state), expected, rtol=0, atol=0, equal_nan=True)


def test_adapting_to_a_task_begins_from_an_agent_that_is_not_adapted():
    task = metarl.envs.distribution("navigation", name="goals").test_tasks[0]
    with pytest.raises(UserError, match="the policy is already adapted"):
        adapt_to(make_policy("mlp").adapt(make_episodes(log_probs=True)), task)


def test_recorded_episodes_are_laid_out_as_rollouts_are():
    one, other = make_episodes(steps=4), make_episodes(count=1, steps=2, seed=1)
    ended = replace(other[0], terminated=np.array([False, True]), truncated=np.zeros(2, bool))
    cut = replace(one[0], truncated=np.zeros(4, bool))  # says nothing of its end: it was cut off there
    rollout = make_policy("gru")._rollout([cut, ended])
    assert rollout.valid.tolist() == [[[True] * 4, [True, True, False, False]]]
    assert rollout.truncated.tolist() == [[[False, False, False, True], [False] * 4]]
    assert rollout.terminated.tolist() == [[[False] * 4, [False, True, False, False]]]
    assert rollout.episode_start.tolist() == [[[True, False, False, False]] * 2]
    observations = torch.from_numpy(cut.observations).float()
    torch.testing.assert_close(rollout.next_observations[0, 0, :3], observations[1:])
    torch.testing.assert_close(rollout.next_observations[0, 0, 3], observations[3])  # also serves as the next one
    low, high = SPACES.action_bounds
    actions = torch.from_numpy((ended.actions - (low + high) / 2) / ((high - low) / 2)).float()
    torch.testing.assert_close(rollout.actions[0, 1, :2], actions)


@pytest.mark.parametrize(
    ("episode", "asked", "message"),
    [
        ({"log_probs": np.full(5, -200.0)}, {}, "adapting led to numbers that are not finite"),
        ({}, {"inner_lr": np.inf}, "inner_lr is inf"),
        ({"terminated": np.arange(5) == 2}, {}, "trajectory 0 ends before its last step"),
        ({"truncated": np.arange(5) == 2}, {}, "trajectory 0 ends before its last step"),
    ],
)
def test_episodes_that_lead_nowhere_are_refused(episode, asked, message):
    (recorded,) = make_episodes(count=1, log_probs=True)
    with pytest.raises(ValueError, match=message):
        make_policy("mlp").adapt([replace(recorded, **episode)], **asked)


def test_saving_replaces_nothing(tmp_path):
    policy = make_policy("mlp")
    policy.save(tmp_path / "saved")
    with pytest.raises(UserError, match="exists already; save to another folder"):
        policy.save(tmp_path / "saved")
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"exists already|cannot write to"):
            policy.save(path)
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (SafetensorError("I/O error: No space left on device (os error 28)"), "I/O error: No space left on device"),
        (OSError(28, "No space left on device"), "No space left on device;"),
    ],
)
def test_saving_to_a_full_disk_is_told(tmp_path, monkeypatch, error, reason):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(UserError, match=f"cannot write to .*saved: {reason}.*choose another folder"):
        make_policy("mlp").save(tmp_path / "saved")


def test_a_damaged_adaptation_is_not_loaded(tmp_path):
    make_policy("gru").adapt(make_episodes()).save(tmp_path / "saved")
    (part,) = tmp_path.glob("saved/checkpoints/*/adapted.safetensors")
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    with pytest.raises(UserError, match=r"adapted\.safetensors: its hash does not match the manifest"):
        metarl.load(tmp_path / "saved")


def test_adapting_to_a_task_is_the_procedure_of_training():
    """As evaluation adapts: the same episodes, of the same seeds, lead to the same parameters."""
    config = RunConfig.model_validate(
        {"num_workers": 0, "rollouts_per_task": 3, "agent": {"hidden_sizes": [8], "adaptation_steps": 2}}
    )
    spaces = Spaces(2, (-1.0, -1.0), (1.0, 1.0))
    agent = build_agent(config, spaces, torch.device("cpu"))
    policy = Policy(config, agent, spaces, 0, agent.initial_state(1))
    goals = metarl.envs.distribution("navigation", name="goals", horizon=5, num_train=7, num_test=6)
    task = goals.test_tasks[2]
    adapted = adapt_to(policy, task, seed=5)
    envs = make_envs(goals, 3, 0)
    state = agent.initial_state(1)
    for phase in children(seeds(5, Purpose.EVALUATION_ROLLOUTS), 2):
        state = agent.adapt(state, collect(envs, agent, state, [task], 3, [phase]))
    assert adapted.adapted and not policy.adapted
    for name, value in state.items():
        torch.testing.assert_close(adapted.state[name], value, rtol=0, atol=0)
