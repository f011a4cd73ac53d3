"""Replay: what is stored and drawn, what is cloned, the policy gradient and its gate; and how agents replay trials."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from metarl.agents.maml.outer import likelihood_ratio
from metarl.agents.rl2.networks import LearnedCriticConfig, LinearCriticConfig
from metarl.nn.distributions import DiagonalGaussian
from metarl.rl.returns import discounted_returns
from metarl.stability import StabilityLoss
from metarl.stability.replay import Replay, ReplayConfig, effective_sample_size
from metarl.types import Prediction, Rollout
from tests.stability.agents import (
    ACTIONS,
    KINDS,
    MEMORIES,
    copy_of,
    disturb,
    explicit_outputs,
    gradient,
    iteration,
    learned,
    make,
)

every_kind = pytest.mark.parametrize("kind", KINDS)
NOTHING = {}


def rng(*seed):
    return np.random.default_rng(seed)


def numbered_rollouts(agent, number, tasks=3, rollouts=2, seed=0):
    """Rollouts of an iteration whose rewards are its number, so that stored trials can be distinguished."""
    return [
        replace(each, rewards=(number + 0.0 * each.rewards) * each.valid)
        for each in iteration(agent, tasks, rollouts, seed)
    ]


def after_stages(agent, stages=2, current=0, iterations=2, **settings):
    """A method after some stages; the rewards of their trials are 0, 1, …"""
    method = Replay(ReplayConfig(**{"capacity": 12, **settings}))
    for stage in range(stages + (current > 0)):
        for number in range(current if stage == stages else iterations):
            method.observe(
                agent, numbered_rollouts(agent, stage, seed=10 * stage + number), NOTHING, rng(stage, number)
            )
        if stage < stages:
            method.end_stage(agent, numbered_rollouts(agent, stage), rng(stage))
    return method


def stages_of(items):
    first = sorted(name for name in items if name.endswith(".rewards"))[0]
    return items[first][:, 0, 0].int().tolist()


# What is stored


@every_kind
def test_stages_have_equal_shares_of_the_capacity(kind):
    """12 places: a stage alone has 12, two have 6 each, three 4; 6 or 3 trials an iteration, 4 iterations a stage."""
    agent, sizes = make(kind), []
    method = Replay(ReplayConfig(capacity=12))
    for stage in range(3):
        for number in range(4):
            method.observe(agent, numbered_rollouts(agent, stage, seed=number), NOTHING, rng(stage, number))
            assert method.new_trials == (3 if kind == "maml" else 6)
        sizes.append([len(part) for part in (*method.ended, method.current)])
        method.end_stage(agent, numbered_rollouts(agent, stage), rng(stage))
        assert method.current is None and len(method.ended) == stage + 1
    assert sizes == [[12], [6, 6], [4, 4, 4]]
    for stage, reservoir in enumerate(method.ended):
        assert set(stages_of(reservoir.take(np.arange(4)))) == {stage}


def test_a_capacity_below_the_number_of_stages_keeps_one_of_each():
    method = after_stages(make("gru"), stages=3, capacity=2)
    assert [len(reservoir) for reservoir in method.ended] == [1, 1, 1]


@every_kind
def test_dropped_trials_are_never_stored(kind):
    """Of task 1 (for MAML in one of its phases), or of one rollout, all steps are invalid."""
    agent, method = make(kind), Replay(ReplayConfig(capacity=100))
    rollouts = numbered_rollouts(agent, 1)

    def drop(value):
        value = value.clone()
        value[1] = 0
        return value

    method.observe(agent, [rollouts[0].map(drop), *rollouts[1:]], NOTHING, rng(0))
    kept = method.current.take(np.arange(len(method.current)))
    assert len(kept["0.valid"]) == (2 if kind == "maml" else 4)
    assert kept["0.valid"].flatten(1).any(1).all()
    nothing = [rollout.map(torch.zeros_like) for rollout in rollouts]
    method.observe(agent, nothing, NOTHING, rng(1))
    assert len(method.current) == len(kept["0.valid"])


def test_a_stage_of_which_nothing_was_kept_is_left_out():
    agent = make("gru")
    method, (rollout,) = Replay(ReplayConfig()), iteration(agent)
    method.observe(agent, [rollout.map(torch.zeros_like)], NOTHING, rng(0))
    method.end_stage(agent, [rollout], rng(0))
    assert method.ended == [] and method.loss(agent, rng(1), 1.0) == {}
    method.end_stage(agent, [rollout], rng(0))  # a stage without any iteration
    assert method.ended == []


# What is drawn


def test_as_many_are_drawn_of_each_stage_that_has_ended_and_none_of_the_current_one():
    """10 of 3 stages: 4, 3 and 3, the one with 4 being drawn; the stage in training is not among them."""
    method = after_stages(make("gru"), stages=3, current=2)
    assert method.current is not None and set(stages_of(method.current.take(np.arange(3)))) == {3}
    generator, more = rng(0), set()
    for _ in range(40):
        stages = stages_of(method.draw(10, generator))
        counts = [stages.count(stage) for stage in range(3)]
        assert sorted(counts) == [3, 3, 4] and len(stages) == 10
        more.add(counts.index(4))
    assert more == {0, 1, 2}
    assert len(stages_of(method.draw(1, generator))) == 1
    drawn = {tuple(method.draw(1, generator)["0.actions"].flatten().tolist()) for _ in range(200)}
    assert len(drawn) == sum(len(reservoir) for reservoir in method.ended)  # all have their turn


@pytest.mark.parametrize(
    ("share", "fraction", "expected"),
    # share / (1 − share) · 6 new trials · fraction, at least 1
    [(0.5, 1.0, 6), (0.5, 0.25, 2), (0.25, 1.0, 2), (0.75, 0.5, 9), (0.01, 0.1, 1)],
)
def test_the_share_of_replayed_trials(monkeypatch, share, fraction, expected):
    agent = make("gru")
    method, counts = after_stages(agent, share=share), []
    draw = method.draw
    monkeypatch.setattr(method, "draw", lambda count, generator: counts.append(count) or draw(count, generator))
    assert method.new_trials == 6
    method.loss(agent, rng(0), fraction)
    assert counts == [expected]


# What is cloned


@every_kind
def test_the_labels_are_what_the_agent_does_at_the_end_of_the_stage(kind):
    """Not what it did when the trial was collected: KL is 0 right then and not after an update."""
    agent, method = learned(kind), Replay(ReplayConfig(capacity=50))
    for number in range(2):
        rollouts, before = iteration(agent, seed=number), copy_of(agent.parameters())
        agent.update((), rollouts)
        method.observe(agent, rollouts, before, rng(0, number))
        assert method.loss(agent, rng(1), 1.0) == {}
    method.end_stage(agent, iteration(agent), rng(2))
    losses = method.loss(agent, rng(1), 1.0)
    assert losses["kl"].item() == pytest.approx(0.0, abs=1e-6)
    assert losses["loss"].item() == pytest.approx(0.0, abs=1e-6)
    disturb(agent)
    assert method.loss(agent, rng(1), 1.0)["kl"].item() > 1e-3


@pytest.mark.parametrize("broken", ["0.log_probs", "mean", "log_std", "values"])
def test_labels_that_are_not_finite_leave_the_stage_as_it_was_until_it_is_asked_again(monkeypatch, broken):
    """The second of two batches of labels breaks: not even the first is kept."""
    agent = learned("maml")
    method = after_stages(agent, stages=1, current=2, capacity=8)  # 4 trials
    monkeypatch.setattr("metarl.stability.replay._LABEL_BATCH", 2)
    replay_policy, log_prob, calls = agent.replay_policy, agent.log_prob, []

    def spoil(value):
        value = value.detach().clone()
        value[-1, 0, 0] = torch.nan
        return value

    def broken_retrace(rollouts, advantages=False):
        found = replay_policy(rollouts, advantages)
        found = found._replace(values=torch.zeros_like(found.distribution.mean[..., 0]))
        calls.append(len(rollouts[-1].valid))
        if len(calls) == 2 and broken == "values":
            found = found._replace(values=spoil(found.values))
        elif len(calls) == 2 and broken in found.distribution.parameters():
            found = found._replace(
                distribution=found.distribution.with_parameters(
                    {**found.distribution.parameters(), broken: spoil(getattr(found.distribution, broken))}
                )
            )
        return found

    def broken_log_prob(state, rollout):
        found = log_prob(state, rollout)
        return spoil(found) if broken.endswith("log_probs") and len(calls) == 1 else found

    before = copy_of(method.state_dict())
    with monkeypatch.context() as patched:
        patched.setattr(agent, "replay_policy", broken_retrace)
        patched.setattr(agent, "log_prob", broken_log_prob)
        patched.setattr(agent, "adapt", lambda state, rollout: state)
        with pytest.raises(FloatingPointError, match=rf"stored trials is not finite \({broken}\)"):
            method.end_stage(agent, iteration(agent), rng(2))
    after = method.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    method.end_stage(agent, iteration(agent), rng(3))
    assert len(method.ended) == 2 and method.current is None
    assert method.loss(agent, rng(1), 1.0)["kl"].item() == pytest.approx(0.0, abs=1e-6)


def test_steps_that_no_trial_has_need_no_finite_labels(monkeypatch):
    agent = learned("maml")
    method, log_prob = after_stages(agent, stages=0, current=1), agent.log_prob
    filled = lambda value, valid: torch.where(valid, value, torch.nan)  # noqa: E731
    monkeypatch.setattr(agent, "log_prob", lambda state, each: filled(log_prob(state, each), each.valid))
    method.end_stage(agent, iteration(agent), rng(2))
    assert len(method.ended) == 1


@every_kind
def test_the_loss_written_out(kind):
    agent = learned(kind)
    method = after_stages(agent, cloning_coef=0.7, value_coef=0.3)
    then = learned(kind)
    disturb(agent)
    items = method.draw(max(1, round(0.33 / 0.67 * method.new_trials)), rng(5))
    rollouts = [
        Rollout(**{name: items[f"{k}.{name}"] for name in vars(numbered_rollouts(agent, 0)[0])})
        for k in range(agent.training_adaptation_steps + 1)
    ]
    now, labels, valid = agent.replay_policy(rollouts), then.replay_policy(rollouts), rollouts[-1].valid
    kl = labels.distribution.kl(now.distribution)[valid].mean()
    expected = 0.7 * kl
    if kind != "maml":
        errors = (now.values - labels.values) / agent.critic.scale[1]
        expected = expected + 0.3 * 0.5 * errors[valid].square().mean()
    losses = method.loss(agent, rng(5), 1.0)
    torch.testing.assert_close(losses["kl"], kl, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["loss"], expected, rtol=1e-4, atol=1e-6)
    assert set(losses) == {"kl", "loss"}
    moved = gradient(losses["loss"], agent)
    still = [name for name, part in moved.items() if part.abs().max() == 0]
    assert still == []


def test_the_kl_is_that_of_then_from_now():
    """KL(N(0, 1) ‖ N(1, e²)) = 1 + ½ (e⁻² (1 + 1) − 1) a dimension, which is not KL of now from then."""

    class Fixed:
        device = torch.device("cpu")

        def __init__(self, mean, log_std):
            self.output = torch.full((1,), mean), torch.full((1,), log_std)

        def initial_state(self, num_tasks):
            return None

        def replay_policy(self, rollouts, advantages=False):
            shape = rollouts[-1].valid.shape
            mean, log_std = (part.expand(*shape, ACTIONS).clone().requires_grad_() for part in self.output)
            return Prediction(DiagonalGaussian(mean, log_std), None, torch.zeros(shape), torch.ones(()))

    method, rollouts = Replay(ReplayConfig(cloning_coef=2.0)), iteration(make("gru"))
    method.observe(None, rollouts, NOTHING, rng(0))
    method.end_stage(Fixed(0.0, 0.0), rollouts, rng(0))
    losses = method.loss(Fixed(1.0, 1.0), rng(0), 1.0)
    kl = ACTIONS * (1.0 + 0.5 * (2.0 * math.exp(-2.0) - 1.0))
    assert losses["kl"].item() == pytest.approx(kl, rel=1e-5)
    assert losses["loss"].item() == pytest.approx(2.0 * kl, rel=1e-5)


# The policy gradient on stored trials


@pytest.mark.parametrize(
    ("log_ratios", "valid", "expected"),
    [
        ([0.3, 0.3, 0.3, 0.3], [1, 1, 1, 1], 1.0),
        ([0.0, -200.0, -200.0, -200.0], [1, 1, 1, 1], 0.25),  # one counts alone: 1 / n
        ([500.0, 0.0, 0.0, 0.0, 0.0], [1, 1, 1, 1, 1], 0.2),
        ([math.log(3.0), 0.0], [1, 1], 0.8),  # (3 + 1)² / (2 · (9 + 1))
        ([math.log(3.0), 0.0, 99.0], [1, 1, 0], 0.8),  # padding does not count
    ],
)
def test_effective_sample_size_by_hand(log_ratios, valid, expected):
    found = effective_sample_size(torch.tensor(log_ratios), torch.tensor(valid, dtype=torch.bool))
    assert float(found) == pytest.approx(expected, abs=1e-6)


class OneAction:
    """Says N(mean, 1) of one-dimensional actions, and given advantages."""

    device = torch.device("cpu")

    def __init__(self, mean, advantages, scale):
        self.mean = torch.tensor(mean, requires_grad=True)
        self.advantages, self.scale = torch.tensor(advantages), torch.tensor(scale)

    def initial_state(self, num_tasks):
        return None

    def replay_policy(self, rollouts, advantages=False):
        shape = rollouts[-1].valid.shape
        mean = self.mean.expand(*shape, 1)
        return Prediction(
            DiagonalGaussian(mean, torch.zeros(*shape, 1)), None, self.advantages.expand(shape), self.scale
        )


def one_trial(actions, log_probs):
    """A trial of as many steps as actions."""
    steps = len(actions)
    flags, last = torch.zeros(1, 1, steps, dtype=torch.bool), torch.arange(steps) == steps - 1
    zeros = torch.zeros(1, 1, steps)
    return Rollout(
        observations=zeros[..., None],
        final_observations=zeros[..., :1, None],
        actions=torch.tensor(actions)[None, None, :, None],
        rewards=zeros,
        log_probs=torch.tensor(log_probs)[None, None],
        terminated=flags,
        truncated=last.expand(1, 1, steps),
        episode_start=flags,
        valid=~flags,
        success=zeros,
    )


def gated(min_sample_size, log_probs=None):
    """Two steps with actions 2 and −1, advantages 3 and 1, σ_R = 2, the mean at 0.5."""
    agent = OneAction(0.5, [3.0, 1.0], 2.0)
    actions = torch.tensor([2.0, -1.0])
    now = DiagonalGaussian(torch.tensor([[0.5]]), torch.zeros(1, 1)).log_prob(actions[:, None])
    rollout = one_trial([2.0, -1.0], now.tolist() if log_probs is None else log_probs)
    config = ReplayConfig(cloning_coef=0.0, policy_coef=0.4, min_sample_size=min_sample_size, capacity=1)
    method = Replay(config)
    method.observe(None, [rollout], NOTHING, rng(0))
    method.end_stage(agent, [rollout], rng(0))
    return agent, method.loss(agent, rng(0), 1.0), now


def test_the_policy_gradient_by_hand():
    """d/dμ of −c/σ_R · mean(A log π) = −c/σ_R · mean(A (a − μ)) = −0.4/2 · (3 · 1.5 − 1 · 1.5)/2 = −0.3."""
    agent, losses, now = gated(0.3)
    expected = -0.4 / 2.0 * (3.0 * now[0] + 1.0 * now[1]) / 2.0
    torch.testing.assert_close(losses["loss"], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(losses["loss"], agent.mean)[0], torch.tensor(-0.3))
    assert float(losses["effective_sample_size"]) == pytest.approx(1.0)


@pytest.mark.parametrize(("min_sample_size", "slope"), [(0.51, 0.0), (0.49, -0.3)])
def test_the_gate_closes_where_few_samples_count(min_sample_size, slope):
    """Densities of collecting that were 0 and e^50 times those of now: only one of two steps counts, 0.5."""
    _, _, now = gated(0.0)
    agent, losses, _ = gated(min_sample_size, [float(now[0]), float(now[1]) + 50.0])
    assert float(losses["effective_sample_size"]) == pytest.approx(0.5, abs=1e-6)
    found = torch.autograd.grad(losses["loss"], agent.mean)[0]
    torch.testing.assert_close(found, torch.tensor(slope), rtol=1e-5, atol=1e-6)


@every_kind
def test_the_policy_gradient_of_an_agent_is_vtrace_s(kind):
    agent = learned(kind)
    method = after_stages(agent, cloning_coef=0.0, value_coef=0.0, policy_coef=1.0, min_sample_size=0.0)
    disturb(agent, 0.02)
    items = method.draw(max(1, round(0.33 / 0.67 * method.new_trials)), rng(5))
    rollouts = [
        Rollout(**{name: items[f"{k}.{name}"] for name in vars(numbered_rollouts(agent, 0)[0])})
        for k in range(agent.training_adaptation_steps + 1)
    ]
    now, last = agent.replay_policy(rollouts, advantages=True), rollouts[-1]
    assert not now.advantages.requires_grad and not now.scale.requires_grad
    log_probs = now.distribution.log_prob(last.actions)
    expected = -((now.advantages / now.scale * log_probs)[last.valid]).mean()
    losses = method.loss(agent, rng(5), 1.0)
    torch.testing.assert_close(losses["loss"], expected, rtol=1e-4, atol=1e-6)
    assert 0.0 < float(losses["effective_sample_size"]) <= 1.0


def test_a_line_search_compares_losses_on_the_same_trials():
    """TRPO takes a step if its loss is lower after it than before: at the same θ both are equal."""
    agent = make("maml", name="maml_trpo")
    method = after_stages(agent)
    disturb(agent, 0.3)
    rollouts = iteration(agent)
    auxiliary_loss = StabilityLoss([method], agent, rng(0))
    objective = agent.objective([agent._prepare(rollout) for rollout in rollouts], auxiliary_loss)
    before, after = objective.backward(likelihood_ratio), objective.measure(likelihood_ratio)
    assert before["loss"] == pytest.approx(after["loss"], rel=1e-4)


# Saving


@every_kind
@pytest.mark.parametrize("current", [0, 2])
def test_a_loaded_method_goes_on_exactly(kind, current):
    """Also in the middle of a stage, whose trials are not labelled yet."""
    agent = learned(kind)
    ours, theirs = after_stages(agent, current=current), Replay(ReplayConfig(capacity=12))
    theirs.load_state_dict(copy_of(ours.state_dict()))
    disturb(agent)
    for number in range(2):
        for method in (ours, theirs):
            method.observe(agent, numbered_rollouts(agent, 2, seed=20 + number), NOTHING, rng(7, number))
        left, right = (method.loss(agent, rng(8), 0.5) for method in (ours, theirs))
        assert left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())
    for method in (ours, theirs):
        method.end_stage(agent, numbered_rollouts(agent, 2), rng(9))
    left, right = ours.state_dict(), theirs.state_dict()
    assert left.keys() == right.keys() and len(ours.ended) == 3
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def test_nothing_remembered_comes_back_as_nothing():
    ours, theirs = Replay(ReplayConfig()), after_stages(make("gru"))
    theirs.load_state_dict(ours.state_dict())
    assert theirs.ended == [] and theirs.current is None and theirs.new_trials == 0


@pytest.mark.parametrize("entry", ["ended", "new_trials", "0/seen", "1/0.rewards", "0/mean", "2/1.valid", "1/values"])
def test_an_entry_that_is_missing_is_named(entry):
    """Two stages have ended, and one has begun."""
    method = after_stages(make("maml"), current=1)
    state = copy_of(method.state_dict())
    del state[entry]
    with pytest.raises(ValueError, match=entry.partition("/")[2] or entry):
        Replay(ReplayConfig(capacity=12)).load_state_dict(state)


def test_a_stage_that_is_missing_is_noticed():
    state = copy_of(after_stages(make("maml")).state_dict())
    with pytest.raises(ValueError, match="1"):
        Replay(ReplayConfig(capacity=12)).load_state_dict(
            {name: value for name, value in state.items() if not name.startswith("1/")}
        )


# How agents replay: what they would do and expect now, in recorded trials


def critics():
    return {
        "shared": LearnedCriticConfig(sizes=(4,)),
        "separate": LearnedCriticConfig(name="separate", sizes=(4,)),
        "linear": LinearCriticConfig(),
    }


@pytest.mark.parametrize("kind", MEMORIES)
@pytest.mark.parametrize("critic", critics())
def test_a_memory_retraced_does_what_it_did_step_by_step(kind, critic):
    """The log-densities that acting gave, and mean and log σ of a loop of steps."""
    agent = learned(kind, critic=critics()[critic], state_dependent_std=True)
    (rollout,) = rollouts = iteration(agent)
    found, valid = agent.replay_policy(rollouts, advantages=True), rollout.valid
    log_probs = found.distribution.log_prob(rollout.actions)
    torch.testing.assert_close(log_probs[valid], rollout.log_probs[valid], rtol=1e-4, atol=1e-4)
    steps = [step for trial in explicit_outputs(agent, rollout) for step in trial]
    for part, which in ((found.distribution.mean, 0), (found.distribution.log_std, 1)):
        torch.testing.assert_close(part[valid], torch.stack([step[which] for step in steps]), rtol=1e-5, atol=1e-5)
    assert (found.values is None) == (critic == "linear")
    assert not found.advantages.requires_grad and found.advantages[valid].std() > 0


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_values_and_advantages_of_a_memory_are_those_of_its_critic(critic):
    """On policy and at γ: A_t = r_t + γ (G_{t+1}) − V_t, with the last value behind the trial bootstrapped."""
    agent = learned("gru", critic=critics()[critic])
    (rollout,) = rollouts = iteration(agent)
    assert agent.replay_policy(rollouts).advantages is None  # not asked for
    found = agent.replay_policy(rollouts, advantages=True)
    trials = agent._read(rollout)
    inputs = agent.normalize(trials.inputs)
    trunk = agent.policy.trunk if critic == "shared" else agent.critic.trunk
    with torch.no_grad():
        values = agent.critic.values(trunk.scan(inputs, trunk.initial(len(inputs)))[0])
    torch.testing.assert_close(found.values[rollout.valid], values[:, :-1].view(3, 2, 5)[rollout.valid])
    assert float(found.scale) == pytest.approx(float(agent.critic.scale[1]))
    for trial, length in enumerate(trials.valid.sum(1).tolist()):
        gain = values[trial, length]
        for t in reversed(range(length)):
            gain = rollout.rewards.flatten(0, 1)[trial, t] + agent.config.gamma * gain
            advantage = found.advantages.flatten(0, 1)[trial, t]
            torch.testing.assert_close(advantage, gain - values[trial, t], rtol=1e-4, atol=1e-3)


def test_the_value_of_an_agent_retraced_is_attached_to_its_critic():
    for critic in ("shared", "separate"):
        agent = learned("gru", critic=critics()[critic])
        found = agent.replay_policy(iteration(agent))
        parts = gradient(found.values.sum(), agent)
        assert all(part.abs().max() > 0 for name, part in parts.items() if name.startswith("value."))
        encoder = next(name for name in parts if name.startswith("policy.trunk.encoder"))
        assert (parts[encoder].abs().max() > 0) == (critic == "shared")


@pytest.mark.parametrize("adaptation_steps", [1, 2])
@pytest.mark.parametrize("estimator", ["lvc", "dice"])
def test_maml_retraced_is_what_it_adapted_to(adaptation_steps, estimator):
    """On data of θ itself: mean, log σ and log-densities at the parameters that `adapt` gives."""
    agent = learned("maml", adaptation_steps=adaptation_steps, inner_lr=0.5, estimator=estimator)
    rollouts = iteration(agent)
    state = agent.initial_state(3)
    for rollout in rollouts[:-1]:
        state = agent.adapt(state, rollout)
    query, found = rollouts[-1], agent.replay_policy(rollouts, advantages=True)
    inputs = agent.normalizer(query.observations).flatten(1, 2)
    mean, log_std = agent.policy.distribution(state, inputs).parameters().values()
    torch.testing.assert_close(found.distribution.mean.flatten(1, 2), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.distribution.log_std.flatten(1, 2), log_std.expand_as(mean), rtol=1e-4, atol=1e-5)
    log_probs = found.distribution.log_prob(query.actions)
    torch.testing.assert_close(log_probs[query.valid], query.log_probs[query.valid], rtol=1e-4, atol=1e-4)
    unadapted = agent.policy.distribution(agent.initial_state(3), inputs).mode
    assert (unadapted - mean).abs().max() > 0.01
    returns = discounted_returns(query.rewards, query.terminated | query.truncated, agent.config.gamma)
    assert found.values is None and float(found.scale) == pytest.approx(
        float(returns[query.valid].std(correction=0)), rel=1e-5
    )


def test_support_data_stands_for_the_agent_at_the_end_of_the_stage():
    """Its log-densities become those of θ, and of what θ adapts to; the query's stay those of the agent that acted."""
    agent = learned("maml", adaptation_steps=2, inner_lr=0.5)
    method, rollouts = Replay(ReplayConfig(capacity=3)), iteration(agent)
    method.observe(agent, rollouts, NOTHING, rng(0))
    disturb(agent, 0.2)
    method.end_stage(agent, rollouts, rng(0))
    stored, state = method.ended[0].take(np.arange(3)), agent.initial_state(3)
    for k in range(2):
        expected = agent.log_prob(state, rollouts[k]) * rollouts[k].valid
        torch.testing.assert_close(stored[f"{k}.log_probs"], expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(expected, rollouts[k].log_probs, atol=1e-2)
        state = agent.adapt(state, replace(rollouts[k], log_probs=expected))
    assert torch.equal(stored["2.log_probs"], rollouts[2].log_probs)
    mean = agent.policy.distribution(state, agent.normalizer(rollouts[2].observations).flatten(1, 2)).mode
    found = stored["mean"].flatten(1, 2)
    valid = rollouts[2].valid.flatten(1, 2)
    torch.testing.assert_close(found[valid], mean[valid], rtol=1e-4, atol=1e-5)


def test_the_query_counts_by_its_likelihood_ratio():
    """Where it was collected by a policy under which it was e⁵ times as likely, ρ is e⁻⁵ at an episode's last step."""
    agent = learned("maml", inner_lr=0.5)
    support, query = iteration(agent)
    far = replace(query, log_probs=query.log_probs + 5.0)
    first, second = (agent.replay_policy([support, each], advantages=True).advantages for each in (far, query))
    last = (query.terminated | query.truncated) & query.valid
    ratio = (first / second)[last]
    torch.testing.assert_close(ratio, torch.full_like(ratio, math.exp(-5.0)), rtol=1e-3, atol=1e-6)


def test_the_gradient_goes_through_the_inner_step():
    """As MAML's does (LVC): against finite differences in θ of adapting to data that θ has collected; first order is
    something else."""
    agent, first_order = (learned("maml", inner_lr=0.5, name=name) for name in ("maml_ppo", "fomaml"))
    first_order.load_state_dict(agent.state_dict())
    support, query = iteration(agent)
    inputs = agent.normalizer(query.observations).flatten(1, 2)
    target = torch.randn(*query.valid.shape, ACTIONS, generator=torch.Generator().manual_seed(3))

    def loss_of(mean):
        return (mean - target).square()[query.valid].mean()

    def adapted():
        state = agent.adapt(agent.initial_state(3), support)
        return loss_of(agent.policy.distribution(state, inputs).mode.view_as(target)).item()

    losses = [loss_of(each.replay_policy([support, query]).distribution.mode) for each in (agent, first_order)]
    torch.testing.assert_close(*losses)
    assert losses[0].item() == pytest.approx(adapted(), rel=1e-5)
    found, other = (gradient(loss, each) for loss, each in zip(losses, (agent, first_order), strict=True))
    differences = []
    for name in ("policy.bias_1", "policy.weight_1", "policy.bias_0", "policy.weight_0", "policy.log_std"):
        value = agent.parameters()[name]
        place, ends = (0,) * value.ndim, []
        for step in (1e-2, -2e-2):
            with torch.no_grad():
                value[place] += step
            ends.append(adapted())
        with torch.no_grad():
            value[place] += 1e-2
        assert float(found[name][place]) == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=0.01, abs=1e-3)
        differences.append(float((found[name] - other[name]).abs().max()))
    assert max(differences) > 0.05


@pytest.mark.parametrize(
    "name", ["maml_ppo", "maml_trpo", "fomaml", "reptile", "anil", "meta_sgd", "imaml", "multi_task", "meta_dropout"]
)
def test_every_meta_learner_can_be_asked(name):
    """What it would do now moves with what it trains; its parameters, gradients and counters stay as they are."""
    agent = make("maml", name=name)
    rollouts, before = iteration(agent), copy_of(agent.state_dict())
    found = agent.replay_policy(rollouts)
    moved = gradient(found.distribution.mean[rollouts[-1].valid].square().sum(), agent)
    assert all(part.abs().max() > 0 for key, part in moved.items() if key in ("policy.weight_0", "policy.weight_1"))
    parts = list(agent.policy_jacobians(rollouts, 10, torch.Generator().manual_seed(0)))
    assert {key for part in parts for key in part.slopes["mean"]} == {
        f"policy.{key}" for key in agent.meta.theta if key != "log_std"
    }
    assert agent.hidden_units(rollouts)["layer_0"].shape == (int(rollouts[-1].valid.sum()), 4)
    assert all(torch.equal(value, before[key]) for key, value in agent.state_dict().items())


# Hidden units


def test_the_hidden_units_of_a_tiny_mlp_by_hand():
    """Two ReLU layers at θ (no adaptation in training), at valid steps only: h₁ = (x₀ + 1, −x₁), h₂ = h₁₀ − h₁₁."""
    agent = make("maml", name="multi_task", hidden_sizes=(2, 1), activation="relu", normalizer_iterations=0)
    values = {
        "weight_0": [[1.0, 0.0, 0.0], [0.0, -1.0, 0.0]],
        "bias_0": [1.0, 0.0],
        "weight_1": [[1.0, -1.0]],
        "bias_1": [0.0],
    }
    with torch.no_grad():
        for name, value in values.items():
            agent.meta.theta[name].copy_(torch.tensor(value))
    (rollout,) = iteration(agent)
    x = rollout.observations[rollout.valid]
    first = torch.stack([(x[:, 0] + 1.0).relu(), (-x[:, 1]).relu()], -1)
    units = agent.hidden_units([rollout])
    assert list(units) == ["layer_0", "layer_1"]
    torch.testing.assert_close(units["layer_0"], first)
    torch.testing.assert_close(units["layer_1"], (first[:, :1] - first[:, 1:]).relu())


def test_the_hidden_units_of_maml_are_those_of_each_task_s_adapted_policy():
    agent = learned("maml", inner_lr=0.5)
    rollouts = iteration(agent)
    state = agent.adapt(agent.initial_state(3), rollouts[0])
    inputs, expected = agent.normalizer(rollouts[1].observations), []
    for task in range(3):
        x = inputs[task][rollouts[1].valid[task]]
        expected.append(torch.tanh(x @ state["weight_0"][task].T + state["bias_0"][task]))
    torch.testing.assert_close(agent.hidden_units(rollouts)["layer_0"], torch.cat(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MEMORIES)
def test_the_hidden_units_of_a_memory_are_encoder_and_memory(kind):
    agent = learned(kind)
    (rollout,) = rollouts = iteration(agent)
    units, count = agent.hidden_units(rollouts), int(rollout.valid.sum())
    assert list(units) == ["encoder", "memory"] and not units["memory"].requires_grad
    assert units["encoder"].shape == (count, 4)
    assert units["memory"].shape == (count, agent.policy.trunk.memory.output_size)
    inputs = agent.normalize(agent._read(rollout).inputs[:, :-1])
    features, _ = agent.policy.trunk.scan(inputs, agent.policy.trunk.initial(len(inputs)))
    whole = features.view(*rollout.valid.shape, -1)[rollout.valid].detach()
    torch.testing.assert_close(units["memory"], whole[:, : units["memory"].shape[1]])
    bare = learned(kind, encoder_sizes=())
    assert list(bare.hidden_units(iteration(bare))) == ["memory"]
