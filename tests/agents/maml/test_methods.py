"""What every method of the MAML family must do, and what makes each one itself; on made-up rollouts."""

from typing import get_args

import pytest
import torch

from metarl.agents import INNER_METHODS, agent_configs
from metarl.agents.maml import meta_objective
from metarl.agents.maml.inner import Batch, MetaParams, PolicyLoss
from metarl.agents.maml.meta_curvature import precondition
from metarl.agents.maml.meta_objective import MetaObjective
from metarl.agents.maml.outer import likelihood_ratio
from metarl.rl.surrogates import ESTIMATORS, approximate_kl
from tests.agents.rollouts import assert_same, collect, iteration, make_agent, snapshot

DIFFERENTIATED = ["maml_ppo", "meta_sgd", "meta_curvature", "anil", "meta_dropout"]
"""Methods whose meta-gradient is the derivative of what they compute."""


def phases(agent, tasks=3, seed=0):
    """The rollouts that an update takes."""
    return iteration(agent, tasks, seed)[: agent.training_adaptation_steps + 1]


def clear(agent):
    for value in agent.meta.named().values():
        value.grad = None


def test_every_agent_has_a_method_and_a_name():
    assert set(INNER_METHODS) == set(agent_configs()) - {"rl2"}


# All of them


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", INNER_METHODS)
def test_training_goes_on_bit_for_bit_from_a_saved_state(name, steps):
    """Fails when an optimiser's moments, a learned tensor or the iteration that seeds noise is not saved."""
    settings = {"name": name, "adaptation_steps": steps}
    agent, restored = make_agent(**settings), make_agent(seed=9, **settings)
    for number in range(2):
        agent.update((), phases(agent, seed=number))
    restored.load_state_dict(snapshot(agent))
    for number in range(2, 4):
        rollouts = phases(agent, seed=number)
        for ours, theirs in zip(rollouts, phases(restored, seed=number), strict=True):
            assert torch.equal(ours.actions, theirs.actions)
        assert restored.update((), rollouts) == agent.update((), rollouts)
    assert_same(snapshot(restored), snapshot(agent), rtol=0, atol=0)


@pytest.mark.parametrize("name", INNER_METHODS)
def test_every_update_moves_all_that_is_trained(name):
    """θ and what is learned beside it. Fails when a learned tensor is cut off from the outer loss."""
    agent = make_agent(name=name, adaptation_steps=2)
    before = snapshot(agent)
    agent.update((), phases(agent))
    after = snapshot(agent)
    for key in agent.meta.named():
        assert not torch.equal(after[key], before[key]), key
        assert after[key].isfinite().all()


@pytest.mark.parametrize("name", INNER_METHODS)
def test_recomputing_the_adaptation_leads_to_what_collected(name):
    """The KL of the first epoch is 0: update and adapt take the same steps, with the same noise if there is any."""
    agent = make_agent(name=name, adaptation_steps=2)
    for number in range(2):
        rollouts = phases(agent, seed=number)
        objective = agent.objective([agent._prepare(rollout) for rollout in rollouts])
        assert objective.measure(likelihood_ratio)["kl"] == pytest.approx(0, abs=1e-6)
        agent.update((), rollouts)


@pytest.mark.parametrize("name", INNER_METHODS)
def test_chunks_add_up_to_the_whole(name, monkeypatch):
    """Gradient, loss and Fisher product. Fails when a chunk's part is not weighed by its number of tasks."""
    agent = make_agent(name=name, adaptation_steps=2)
    batches = [agent._prepare(rollout) for rollout in phases(agent)]
    monkeypatch.setattr(meta_objective, "FISHER_SHARE", 1)
    found = []
    for chunk in (3, 2, 1):
        monkeypatch.setattr(meta_objective, "CPU_CHUNK_BYTES", chunk * 4 * batches[-1].weights.shape[1] * 8)
        objective, trained = agent.objective(batches), agent.meta.named()
        clear(agent)
        metrics = objective.backward(likelihood_ratio)
        assert objective.measure(likelihood_ratio)["loss"] == pytest.approx(metrics["loss"], abs=1e-6)
        vector = {key: torch.sin(torch.arange(value.numel())).view_as(value) for key, value in trained.items()}
        product = objective.fisher_product(vector)
        gradient = {key: value.grad for key, value in trained.items()}
        found.append(gradient | {f"F {key}": value for key, value in product.items()})
    for other in found[1:]:
        assert_same(other, found[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "estimator"),
    [(n, e) for n in INNER_METHODS for e in get_args(agent_configs()[n].model_fields["estimator"].annotation)],
)
def test_only_the_adapted_modules_adapt(name, estimator):
    """While θ is learned as a whole. Fails when a step descends on all parameters."""
    agent = make_agent(name=name, adapted_modules=["layer_1", "log_std"], estimator=estimator)
    state = agent.initial_state(3)
    adapted = agent.adapt(state, collect(agent, state))
    assert {key for key in state if not torch.equal(adapted[key], state[key])} == {"weight_1", "bias_1", "log_std"}
    before = snapshot(agent)
    agent.update((), phases(agent))
    assert not torch.equal(snapshot(agent)["policy.weight_0"], before["policy.weight_0"])


# Derivatives of what is computed


def in_float64(agent, rollouts):
    """The agent's objective in float64, and its trained tensors."""
    batches = [agent._prepare(rollout) for rollout in rollouts]
    batches = [Batch(*(v.double() if v.is_floating_point() else v for v in batch)) for batch in batches]
    theta, learned = (
        {name: value.detach().double().requires_grad_() for name, value in part.items()}
        for part in (agent.meta.theta, agent.meta.learned)
    )
    meta, loss = MetaParams(theta, learned, 5), PolicyLoss(agent.policy.log_prob, ESTIMATORS["lvc"])
    return MetaObjective(agent.method, loss, agent.policy.log_prob, meta, batches, 8), meta.named()


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_meta_gradients_are_those_of_finite_differences(name, steps):
    """For θ, rates, preconditioners and the noise's parameters, on data that is older than θ.

    Fails when a learned tensor is detached, the inner gradient is first order, or noise is drawn anew each time.
    """
    agent = make_agent(name=name, adaptation_steps=steps, inner_lr=0.5)
    objective, trained = in_float64(agent, phases(agent))
    generator = torch.Generator().manual_seed(3)
    for value in trained.values():
        value.data += 0.1 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
    objective.backward(likelihood_ratio)
    for key, value in trained.items():
        direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        losses = []
        for sign in (1.0, -1.0):
            value.data += sign * 1e-5 * direction
            losses.append(objective.measure(likelihood_ratio)["loss"])
            value.data -= sign * 1e-5 * direction
        slope = (losses[0] - losses[1]) / 2e-5
        assert float((value.grad * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-8), key
        assert value.grad.abs().max() > 1e-7, key


# Each of them


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", ["meta_sgd", "meta_curvature"])
def test_learned_rates_and_curvatures_begin_as_maml_bit_for_bit(name, steps):
    """Adaptation, meta-loss and the meta-gradient of θ. Fails with rates that start at other values than inner_lr."""
    settings = {"adaptation_steps": steps, "inner_lr": 0.3, "max_grad_norm": 1e9}
    agents = [make_agent(**settings), make_agent(name=name, **settings)]
    rollouts = phases(agents[0])
    state = agents[0].initial_state(3)
    assert_same(*(agent.adapt(state, rollouts[0]) for agent in agents), rtol=0, atol=0)
    metrics = [agent.update((), rollouts) for agent in agents]
    for key in ("train/loss", "train/kl", "train/clip_fraction"):
        assert metrics[0][key] == metrics[1][key]
    assert_same(*({key: value.grad for key, value in agent.meta.theta.items()} for agent in agents), rtol=0, atol=0)


def test_meta_curvature_by_hand():
    """G = [[1, 2], [3, 4]], M_o = [[0, 1], [1, 0]], M_i = [[1, 5], [0, 2]]: M_o G = [[3, 4], [1, 2]], times M_i."""
    learned = {
        "curvature_out.w": torch.tensor([[0.0, 1.0], [1.0, 0.0]]),
        "curvature_in.w": torch.tensor([[1.0, 5.0], [0.0, 2.0]]),
        "curvature_out.b": torch.tensor([[1.0, 2.0], [0.0, 1.0]]),
    }
    gradient = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.equal(precondition(learned, "w", gradient), torch.tensor([[3.0, 23.0], [1.0, 9.0]]))
    stacked = torch.tensor([[1.0, 1.0], [0.0, 3.0]])  # M_o g = (g_0 + 2 g_1, g_1) for two tasks
    assert torch.equal(precondition(learned, "b", stacked), torch.tensor([[3.0, 1.0], [6.0, 3.0]]))


def test_anil_adapts_the_head_alone():
    """By its default; it is MAML with these modules. Fails with the default of the others, all."""
    agents = [make_agent(name="anil"), make_agent(adapted_modules=["head"])]
    state = agents[0].initial_state(3)
    adapted = agents[0].adapt(state, collect(agents[0], state))
    assert {key for key in state if not torch.equal(adapted[key], state[key])} == {"weight_2", "bias_2"}
    for number in range(2):
        rollouts = phases(agents[0], seed=number)
        assert agents[0].update((), rollouts) == agents[1].update((), rollouts)


def test_meta_dropout_perturbs_the_inner_loss_alone():
    """An iteration's noise is the same each time, another iteration's differs; acting is without noise."""
    agent, other = make_agent(name="meta_dropout"), make_agent()
    state = agent.initial_state(3)
    rollout = collect(agent, state)
    assert torch.equal(rollout.actions, collect(other, state).actions)
    first, again = agent.adapt(state, rollout), agent.adapt(state, rollout)
    assert_same(first, again, rtol=0, atol=0)
    assert not torch.allclose(first["weight_2"], other.adapt(state, rollout)["weight_2"], atol=1e-4)
    meta = agent.meta
    for change in ({"iteration": 1}, {"seed": 1}):
        agent.meta = meta._replace(**change)
        assert not torch.allclose(first["weight_2"], agent.adapt(state, rollout)["weight_2"], atol=1e-4)


def test_meta_dropout_without_variance_begins_as_maml(monkeypatch):
    """softplus of the initial bias is 1. Fails with a bias of 0, which shrinks all activations by ln 2."""
    agent, maml = make_agent(name="meta_dropout"), make_agent()
    state = agent.initial_state(3)
    rollout = collect(agent, state)
    monkeypatch.setattr(torch, "randn", lambda shape, generator, dtype: torch.zeros(shape, dtype=dtype))
    assert_same(agent.adapt(state, rollout), maml.adapt(state, rollout), rtol=1e-5, atol=1e-6)


def test_multi_task_training_learns_from_unadapted_episodes():
    """One phase, the policy gradient at θ; at evaluation it adapts as the others do."""
    agent, maml = make_agent(name="multi_task"), make_agent()
    assert (agent.training_adaptation_steps, agent.adaptation_steps) == (0, 1)
    (rollout,) = phases(agent)
    state = agent.initial_state(3)
    assert_same(agent.adapt(state, rollout), maml.adapt(state, rollout), rtol=0, atol=0)
    batch = agent._prepare(rollout)
    agent.objective([batch]).backward(likelihood_ratio)
    theta = agent.meta.theta
    log_probs = agent.policy.log_prob(theta, batch.observations.flatten(0, 1), batch.actions.flatten(0, 1))
    weights = (batch.weights / batch.weights.sum(-1, keepdim=True) / 3).flatten()
    expected = torch.autograd.grad(-(log_probs * batch.advantages.flatten() * weights).sum(), list(theta.values()))
    for value, gradient in zip(theta.values(), expected, strict=True):
        torch.testing.assert_close(value.grad, gradient, rtol=1e-4, atol=1e-6)


def test_rollouts_that_are_not_k_plus_1_are_refused():
    agent = make_agent(name="multi_task")
    with pytest.raises(ValueError, match="got 2 rollouts, expected 1"):
        agent.update((), iteration(agent))


def test_settings_without_effect_are_refused():
    for name in ("fomaml", "reptile", "multi_task", "meta_dropout"):
        with pytest.raises(ValueError, match="estimator"):
            make_agent(name=name, estimator="dice")
    with pytest.raises(ValueError, match="inner_kl_coef has no effect"):
        make_agent(name="multi_task", inner_kl_coef=0.1)


def test_reptile_sums_the_gradients_of_all_phases():
    """With hardly any inner step all phases are at θ. Fails when the outer loss is that of the query data alone."""
    agent = make_agent(name="reptile", adaptation_steps=2, inner_lr=1e-6)
    batches = [agent._prepare(rollout) for rollout in phases(agent)]
    gradients = []
    for part in (batches, *([batch] for batch in batches)):
        clear(agent)
        agent.objective(part).backward(likelihood_ratio)
        gradients.append({key: value.grad.clone() for key, value in agent.meta.theta.items()})
    whole, *parts = gradients
    assert_same(whole, {key: sum(part[key] for part in parts) for key in whole}, rtol=1e-3, atol=1e-5)


def test_imaml_holds_parameters_near_theta():
    """A stronger pull moves a task's parameters less."""
    moved = []
    for proximal in (0.01, 2.0, 50.0):
        agent = make_agent(name="imaml", proximal=proximal, inner_lr=0.01, gradient_steps=30)
        state = agent.initial_state(3)
        adapted = agent.adapt(state, collect(agent, state))
        moved.append(max(float((adapted[key] - state[key]).abs().max()) for key in state))
    assert moved[0] > moved[1] > moved[2] > 0


# Outer steps


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "sgd"])
def test_a_plain_gradient_step_by_each_optimiser(optimizer):
    """The first step: Adam −lr sign g, RMSProp −lr g / √(0.01 g²) = −10 lr sign g, SGD −lr g; and it resumes."""
    outer = {"optimizer": optimizer, "lr": 1e-3, "max_grad_norm": 1e9}
    agent, restored = (make_agent(name="maml_vpg", outer=outer, seed=seed) for seed in (0, 9))
    before = snapshot(agent)["policy.bias_2"]
    agent.update((), phases(agent))
    gradient = agent.meta.theta["bias_2"].grad
    expected = {"adam": gradient.sign(), "rmsprop": 10 * gradient.sign(), "sgd": gradient}[optimizer]
    torch.testing.assert_close(snapshot(agent)["policy.bias_2"] - before, -1e-3 * expected, rtol=1e-3, atol=1e-7)
    restored.load_state_dict(snapshot(agent))
    rollouts = phases(agent, seed=1)
    assert restored.update((), rollouts) == agent.update((), rollouts)
    assert_same(snapshot(restored), snapshot(agent), rtol=0, atol=0)


def test_the_inner_kl_is_that_of_the_support_data():
    """η times the gradient of mean_i KL(collecting ‖ θ) is added, once θ has moved. Fails when PPO drops η."""
    agent = make_agent()
    rollouts = phases(agent)
    batches = [agent._prepare(rollout) for rollout in rollouts]
    theta = agent.meta.theta
    theta["bias_2"].data += 0.2
    found = []
    for coefficient in (0.0, 0.7):
        clear(agent)
        agent.objective(batches).backward(likelihood_ratio, coefficient)
        found.append({key: value.grad.clone() for key, value in theta.items()})
    clear(agent)
    support = batches[0]
    for task in range(3):
        observations, actions, old, _, weights, _ = support.tasks(task)
        (0.7 / 3 * approximate_kl(agent.policy.log_prob(theta, observations, actions), old, weights)).backward()
    expected = {key: found[0][key] + value.grad for key, value in theta.items()}
    assert_same(found[1], expected, rtol=1e-4, atol=1e-6)
    free, held = make_agent(epochs=3, lr=0.05), make_agent(epochs=3, lr=0.05, inner_kl_coef=10.0)
    for one in (free, held):
        one.update((), rollouts)
    assert not torch.equal(snapshot(held)["policy.bias_2"], snapshot(free)["policy.bias_2"])


@pytest.mark.parametrize("name", [name for name in INNER_METHODS if name not in ("maml_ppo", "maml_trpo", "maml_vpg")])
@pytest.mark.parametrize("outer", ["trpo", "gradient"])
def test_every_method_works_with_every_outer_step(name, outer):
    """Two inner steps; TRPO keeps its bound and gains."""
    agent = make_agent(name=name, outer={"name": outer}, adaptation_steps=2)
    for number in range(2):
        metrics = agent.update((), phases(agent, seed=number))
        assert metrics["train/kl"] <= 0.01
        if outer == "trpo":
            assert metrics["train/step_fraction"] > 0 and metrics["train/surrogate_gain"] > 0


@pytest.mark.parametrize("name", ["maml_ppo", "maml_trpo", "maml_vpg"])
def test_a_gradient_that_is_not_finite_changes_nothing(name, monkeypatch):
    """And says what to do. Fails when the optimiser steps before the check."""
    agent = make_agent(name=name)
    rollouts = phases(agent)
    normalize = torch.where
    monkeypatch.setattr(
        "metarl.agents.maml.agent.normalize_advantages",
        lambda advantages, valid: normalize(valid, advantages, 0.0) * float("inf"),
    )
    before = snapshot(agent)
    with pytest.raises(FloatingPointError, match=r"not finite.*inner_lr"):
        agent.update((), rollouts)
    assert_same(snapshot(agent), before, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("outer", ["ppo", "trpo", "gradient"])
@pytest.mark.parametrize("name", [name for name in INNER_METHODS if name not in ("maml_ppo", "maml_trpo", "maml_vpg")])
def test_the_gpu_computes_what_the_cpu_does(name, outer):
    agents = [make_agent(name=name, outer={"name": outer}, adaptation_steps=2, device=d) for d in ("cpu", "cuda")]
    rollouts = phases(agents[0])
    for agent in agents:
        agent.update((), [rollout.to(agent.device) for rollout in rollouts])
    assert_same(*(agent.state_dict() for agent in reversed(agents)), rtol=1e-2, atol=1e-4)
