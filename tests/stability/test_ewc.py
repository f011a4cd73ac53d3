"""Fisher information: against the score's mean square, in closed form, and through time; and what EWC does with it."""

import math

import numpy as np
import pytest
import torch

from metarl.nn.distributions import DiagonalGaussian
from metarl.stability import build
from metarl.stability.ewc import EwcConfig, fisher, fisher_sums
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
    policy_of,
)

ALL = 10**9
"""More states than there are."""


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def whole(sums):
    """Both parts of the Fisher information together."""
    through_mean, through_std = sums.values()
    zero = torch.zeros(())
    names = through_mean.keys() | through_std.keys()
    return {name: through_mean.get(name, zero) + through_std.get(name, zero) for name in names}


def own_parameters(agent, rollouts):
    """The policy's parameters of each phase and task, found by acting and adapting as evaluation does."""
    state, path = agent.initial_state(len(rollouts[0].valid)), []
    for k in range(len(rollouts)):
        state = agent.adapt(state, rollouts[k - 1]) if k else state
        path.append(state)
    return path


# Against the mean square of the score, ∇ log π(a|s) with a drawn from π: what Fisher information is


def assert_within_errors(found, means, squares, draws, states):
    """`means` and `squares` are sums over states of the mean of s² and of its variance, over `draws`."""
    outliers = 0
    for name, expected in means.items():
        error = (squares[name] / draws).sqrt() / states
        deviation = (found[name] - expected / states).abs()
        assert (deviation <= 4.0 * error + 1e-6).all(), (name, (deviation / error).max())
        outliers += int((deviation > 2.0 * error + 1e-6).sum())
    return outliers


def test_the_fisher_information_of_an_adapted_mlp_is_the_mean_squared_score():
    agent, draws = learned("maml", inner_lr=0.5), 3000
    rollouts = iteration(agent, tasks=2)
    path = own_parameters(agent, rollouts)
    assert (path[1]["weight_0"] - path[0]["weight_0"]).abs().max() > 0.01  # that it adapts makes a difference
    assert not torch.allclose(path[1]["weight_0"][0], path[1]["weight_0"][1], atol=1e-3)
    draw, states, means, squares = generator(5), 0, {}, {}

    def log_prob(params, observation, action):
        hidden = torch.tanh(params["weight_0"] @ observation + params["bias_0"])
        mean = params["weight_1"] @ hidden + params["bias_1"]
        return torch.distributions.Normal(mean, params["log_std"].exp()).log_prob(action).sum()

    score = torch.func.vmap(torch.func.grad(log_prob), (None, None, 0))
    for params, rollout in zip(path, rollouts, strict=True):
        for task in range(2):
            own = {name: value[task] for name, value in params.items()}
            for observation in agent.normalizer(rollout.observations)[task][rollout.valid[task]]:
                mean, log_std = agent.policy.distribution(own, observation[None]).parameters().values()
                actions = mean + log_std.exp() * torch.randn(draws, ACTIONS, generator=draw)
                for name, part in score(own, observation, actions).items():
                    means[f"policy.{name}"] = means.get(f"policy.{name}", 0.0) + part.square().mean(0)
                    squares[f"policy.{name}"] = squares.get(f"policy.{name}", 0.0) + part.square().var(0)
                states += 1
    assert states == 2 * 2 * (4 + 3)
    found = whole(fisher_sums(agent, rollouts, ALL, generator()))
    assert found.keys() == means.keys() == policy_of(agent).keys()
    outliers = assert_within_errors(found, means, squares, draws, states)
    assert outliers < 0.2 * sum(value.numel() for value in found.values())  # 5 % are expected


def test_the_fisher_information_of_a_gru_is_the_mean_squared_score_through_all_earlier_steps():
    agent, draws = learned("gru", encoder_sizes=()), 1000
    rollouts = iteration(agent, tasks=2, rollouts=1)
    params, draw, states, means, squares = policy_of(agent), generator(5), 0, {}, {}
    for steps in explicit_outputs(agent, rollouts[0]):
        for mean, log_std in steps:
            with torch.no_grad():
                actions = mean + log_std.exp() * torch.randn(draws, ACTIONS, generator=draw)
            log_probs = DiagonalGaussian(mean, log_std).log_prob(actions)
            with torch.backends.mkldnn.flags(enabled=False):
                scores = torch.autograd.grad(
                    log_probs,
                    list(params.values()),
                    torch.eye(draws),
                    is_grads_batched=True,
                    retain_graph=True,
                    allow_unused=True,
                )
            for (name, value), part in zip(params.items(), scores, strict=True):
                part = torch.zeros(draws, *value.shape) if part is None else part
                means[name] = means.get(name, 0.0) + part.square().mean(0)
                squares[name] = squares.get(name, 0.0) + part.square().var(0)
            states += 1
    assert states == 2 * 5
    found = whole(fisher_sums(agent, rollouts, ALL, generator()))
    assert found.keys() == means.keys()
    assert min(float(found[name].sum()) for name in found if "weight_hh" in name) > 0
    outliers = assert_within_errors(found, means, squares, draws, states)
    assert outliers < 0.2 * sum(value.numel() for value in found.values())


# In closed form


@pytest.fixture(scope="module")
def linear():
    """μ = W x + b, and a log σ of its own; it does not adapt in training."""
    agent = make("maml", name="multi_task", hidden_sizes=())
    with torch.no_grad():
        agent.meta.theta["log_std"].copy_(torch.tensor([-0.5, 0.2]))
    rollouts = iteration(agent)
    states = agent.normalizer(rollouts[0].observations)[rollouts[0].valid]
    return agent, rollouts, states


def test_the_fisher_information_of_a_linear_policy_in_closed_form(linear):
    """∂μ_d/∂W_dj = x_j: F_W[d, j] = E[x_j²] / σ_d², F_b = 1 / σ_d², F_log σ = 2 (½ of (a − μ)⁴/σ⁴ − … = 3 − 1)."""
    agent, rollouts, states = linear
    found = whole(fisher_sums(agent, rollouts, ALL, generator()))
    precision = torch.tensor([math.exp(1.0), math.exp(-0.4)])  # σ⁻² = exp(−2 log σ)
    expected = precision[:, None] * states.square().mean(0)
    torch.testing.assert_close(found["policy.weight_0"], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["policy.bias_0"], precision, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["policy.log_std"], torch.tensor([2.0, 2.0]))


def test_a_squared_gradient_of_a_batch_is_something_else(linear):
    """Of S states drawn together it is about F / S where states differ, since their scores cancel out."""
    agent, rollouts, states = linear
    found = whole(fisher_sums(agent, rollouts, ALL, generator()))["policy.weight_0"]
    std = agent.meta.theta["log_std"].detach().exp()
    scores = torch.randn(500, len(states), ACTIONS, 1, generator=generator(1)) / std[:, None] * states[:, None]
    torch.testing.assert_close(scores.square().mean((0, 1)), found, rtol=0.1, atol=0.0)
    squared_mean = scores.mean(1).square().mean(0)
    assert (squared_mean < 2.0 * found / len(states)).all() and len(states) > 10


def test_the_importance_has_mean_1_and_log_std_a_group_of_its_own(linear):
    """F_log σ = (2, 2) becomes (1, 1) whatever the rest is; the rest is divided by its own mean."""
    agent, rollouts, _ = linear
    found = fisher(agent, rollouts, ALL, generator())
    torch.testing.assert_close(found["policy.log_std"], torch.ones(2))
    rest = torch.cat([found["policy.weight_0"].flatten(), found["policy.bias_0"]])
    torch.testing.assert_close(rest.mean(), torch.tensor(1.0))
    sums = whole(fisher_sums(agent, rollouts, ALL, generator()))
    ratio = found["policy.bias_0"] / sums["policy.bias_0"]
    torch.testing.assert_close(found["policy.weight_0"], sums["policy.weight_0"] * ratio[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_of_every_agent_only_the_policy_matters(kind):
    agent = learned(kind)
    found = fisher(agent, iteration(agent), ALL, generator())
    assert found.keys() == policy_of(agent).keys()
    for name, value in policy_of(agent).items():
        assert found[name].shape == value.shape and (found[name] >= 0).all() and not found[name].requires_grad
    own = [name for name in found if name.endswith("log_std")]
    for group in ([name for name in found if name not in own], own):
        mean = torch.cat([found[name].flatten() for name in group]).mean()
        torch.testing.assert_close(mean, torch.tensor(1.0), rtol=1e-5, atol=1e-5)


def test_a_deviation_that_depends_on_the_state_shares_its_trunk_with_the_mean():
    """The log deviation adds 2 (∂ log σ/∂θ)² to what the mean gives the trunk."""
    agent = learned("gru", state_dependent_std=True)
    with torch.no_grad():
        agent.policy.head.deviation[0].weight.mul_(50.0)
    rollouts = iteration(agent)
    through_mean, through_std = fisher_sums(agent, rollouts, ALL, generator()).values()
    recurrent = next(name for name in through_mean if "weight_hh" in name)
    assert through_std[recurrent].max() > 1e-4
    assert set(through_std) - set(through_mean) == {
        f"policy.head.{name}" for name in ("log_std", "deviation.0.weight", "deviation.0.bias")
    }
    found, both = fisher(agent, rollouts, ALL, generator()), through_mean[recurrent] + through_std[recurrent]
    part = both.flatten().argmax()
    ratio = found[recurrent].flatten()[part] / both.flatten()[part]
    torch.testing.assert_close(found[recurrent], both * ratio, rtol=1e-4, atol=1e-6)


def test_a_deviation_at_its_bound_does_not_move():
    """Beyond a bound σ is constant, and so is its Fisher information 0, not 2."""
    agent = make("maml", min_std=0.5)
    with torch.no_grad():
        agent.meta.theta["log_std"].copy_(torch.tensor([-5.0, 0.0]))
    rollouts = iteration(agent)
    found = whole(fisher_sums(agent, rollouts[:1], ALL, generator()))["policy.log_std"]
    torch.testing.assert_close(found, torch.tensor([0.0, 2.0]))


# Through time


@pytest.mark.parametrize("kind", MEMORIES)
@pytest.mark.parametrize("state_dependent_std", [False, True])
def test_sensitivities_are_those_of_a_loop_of_steps(kind, state_dependent_std):
    agent = learned(kind, state_dependent_std=state_dependent_std)
    rollouts = iteration(agent, tasks=2)
    parts, params = list(agent.policy_jacobians(rollouts, ALL, generator())), policy_of(agent)
    trials = explicit_outputs(agent, rollouts[0])
    assert [len(part.distribution.mean) for part in parts] == [len(trial) for trial in trials] == [5, 4, 5, 4]
    for part, trial in zip(parts, trials, strict=True):
        for outputs, slopes, which in (
            (part.distribution.mean, part.slopes["mean"], 0),
            (part.distribution.log_std, part.slopes["log_std"], 1),
        ):
            for t, step in enumerate(trial):
                torch.testing.assert_close(outputs[t], step[which].detach(), rtol=1e-5, atol=1e-5)
                for dimension in range(ACTIONS):
                    expected = torch.autograd.grad(
                        step[which][dimension], list(params.values()), retain_graph=True, allow_unused=True
                    )
                    for (name, value), slope in zip(params.items(), expected, strict=True):
                        slope = torch.zeros_like(value) if slope is None else slope
                        found = slopes[name][t, dimension] if name in slopes else torch.zeros_like(value)
                        torch.testing.assert_close(found, slope, rtol=1e-4, atol=1e-5, msg=f"{name}, step {t}")
    recurrent = next(name for name in params if "weight_hh" in name or "key_value" in name)
    assert parts[0].slopes["mean"][recurrent][4].abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["maml", "gru"])
def test_the_number_of_states_and_the_generator_count(kind):
    agent = learned(kind)
    rollouts = iteration(agent)

    def seen(states, seed):
        return torch.cat([part.distribution.mean for part in agent.policy_jacobians(rollouts, states, generator(seed))])

    few, all_of_them = seen(12, 0), seen(ALL, 0)
    valid = sum(int(rollout.valid.sum()) for rollout in rollouts)
    assert len(few) == 12 and len(all_of_them) == valid == len(all_of_them.unique(dim=0))
    assert torch.equal(few, seen(12, 0)) and not torch.equal(few, seen(12, 1))
    assert len(few.unique(dim=0)) == 12  # without replacement
    distances = (few[:, None] - all_of_them).abs().amax(-1).min(1).values
    assert distances.max() < 1e-5  # each is one of them
    assert seen(1, 0).shape[0] >= 1


def test_a_memory_is_differentiated_without_changing_anything():
    agent = learned("lstm")
    rollouts, before = iteration(agent), copy_of(agent.state_dict())
    for _ in agent.policy_jacobians(rollouts, 8, generator()):
        pass
    assert all(torch.equal(value, before[name]) for name, value in agent.state_dict().items())
    assert all(value.grad is None or value.grad.isfinite().all() for value in agent.parameters().values())


@pytest.mark.parametrize("kind", ["maml", "gru"])
@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_what_is_not_finite_is_refused(kind, value):
    agent = learned(kind)
    rollouts = iteration(agent)
    with torch.no_grad():
        head = agent.meta.theta["weight_1"] if kind == "maml" else agent.policy.head.mean[0].weight
        head[0, 0] = value
    with pytest.raises(FloatingPointError, match="the importance of parameters is not finite"):
        fisher(agent, rollouts, ALL, generator())


# The method


@pytest.mark.parametrize("kind", KINDS)
def test_ewc_holds_each_parameter_by_its_fisher_information(kind):
    agent, method = learned(kind), build(EwcConfig(coef=2.0, fisher_states=ALL))
    rollouts = iteration(agent)
    assert method.loss(agent, None, 1.0) == {}
    importance, there = fisher(agent, rollouts, ALL, generator()), copy_of(policy_of(agent))
    method.end_stage(agent, rollouts, np.random.default_rng(0))
    assert method.loss(agent, None, 1.0)["loss"].item() == pytest.approx(0.0, abs=1e-8)
    disturb(agent)
    loss = method.loss(agent, None, 1.0)["loss"]
    expected = 0.5 * 2.0 * sum((importance[n] * (v - there[n]).square()).sum() for n, v in policy_of(agent).items())
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert loss.item() > 1e-3
    for name, part in gradient(loss, agent).items():
        value = agent.parameters()[name].detach()
        held = 2.0 * importance[name] * (value - there[name]) if name in importance else torch.zeros_like(value)
        torch.testing.assert_close(part, held, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("settings", "anchors"), [({}, 2), ({"anchors": "online", "decay": 0.25}, 1)])
def test_two_stages_have_two_anchors_or_online_one(settings, anchors):
    agent, method = learned("maml"), build(EwcConfig(fisher_states=ALL, **settings))
    importances, places = [], []
    for stage in range(2):
        disturb(agent, 0.1, stage)
        rollouts = iteration(agent, seed=stage)
        importances.append(fisher(agent, rollouts, ALL, generator()))
        places.append(copy_of(policy_of(agent)))
        method.end_stage(agent, rollouts, np.random.default_rng(stage))
    disturb(agent, 0.1, 7)
    if anchors == 1:
        importances = [{name: 0.25 * value + importances[1][name] for name, value in importances[0].items()}]
        places = places[1:]
    expected = sum(
        0.5 * (importance[name] * (value - place[name]).square()).sum()
        for importance, place in zip(importances, places, strict=True)
        for name, value in policy_of(agent).items()
    )
    torch.testing.assert_close(method.loss(agent, None, 1.0)["loss"], expected, rtol=1e-4, atol=1e-6)
    other = build(EwcConfig(fisher_states=ALL, **settings))
    other.load_state_dict(copy_of(method.state_dict()))
    assert torch.equal(other.loss(agent, None, 1.0)["loss"], method.loss(agent, None, 1.0)["loss"])


def test_the_states_are_those_that_the_generator_draws():
    agent, config = learned("gru"), EwcConfig(fisher_states=6)
    rollouts, found = iteration(agent), []
    for seed in (0, 0, 1):
        method = build(config)
        method.end_stage(agent, rollouts, np.random.default_rng(seed))
        found.append(method.state_dict()["weight.policy.head.mean.0.weight"])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_a_decay_without_a_use_is_refused():
    with pytest.raises(ValueError, match="only online anchors decay"):
        EwcConfig(decay=0.5)
