"""The agent of the MAML family on made-up rollouts: adapting, the meta-update, the learned value function, saving."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from metarl.agents.maml import meta_objective, outer
from metarl.agents.maml.maml import Maml
from metarl.rl.returns import gae
from metarl.rl.value import LearnedValue
from tests.agents.rollouts import OBSERVATIONS, assert_same, collect, iteration, make_agent, of_task, snapshot


def policy_of(agent):
    return {name: value.detach() for name, value in agent.meta.theta.items()}


# Adapting


def test_a_task_adapts_alike_alone_and_among_others():
    """Its inner loss is a mean over its own samples: the step is not divided by the number of tasks."""
    agent = make_agent()
    rollout = collect(agent, agent.initial_state(3))
    together = agent.adapt(agent.initial_state(3), rollout)
    for i in range(3):
        alone = agent.adapt(agent.initial_state(1), of_task(rollout, i))
        assert_same({n: v[i : i + 1] for n, v in together.items()}, alone, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(together["bias_2"][0], together["bias_2"][1], atol=1e-4)


def advantages_by_hand(rollout, gamma, gae_lambda):
    """Normalised advantages of one task: a regression on time and observations, then GAE step by step."""
    episodes = []
    for observations, rewards, valid in zip(rollout.observations[0], rollout.rewards[0], rollout.valid[0], strict=True):
        rewards, o = rewards[valid].double().numpy(), observations[valid].double().numpy()
        returns = [float(np.dot(rewards[t:], gamma ** np.arange(len(rewards) - t))) for t in range(len(rewards))]
        t = np.arange(len(rewards))[:, None] / 100
        episodes.append((rewards, returns, np.hstack([o, o**2, t, t**2, t**3, np.ones_like(t)])))
    features, returns = np.vstack([f for *_, f in episodes]), np.concatenate([r for _, r, _ in episodes])
    gram = features.T @ features
    ridge = 1e-5 * np.diag(gram).mean() * np.eye(len(gram))
    coefficients = np.linalg.solve(gram + ridge, features.T @ returns)
    advantages = []
    for rewards, _, f in episodes:
        values, advantage, backwards = [*(f @ coefficients), 0.0], 0.0, []
        for t in reversed(range(len(rewards))):
            advantage = rewards[t] + gamma * values[t + 1] - values[t] + gamma * gae_lambda * advantage
            backwards.append(advantage)
        advantages += backwards[::-1]
    return (np.array(advantages) - np.mean(advantages)) / np.std(advantages)


def test_an_inner_step_by_hand():
    """θ' = θ − α ∇L, L = −mean of A over the task's valid samples at ratio 1, so that ∇L = −mean A ∇log π."""
    agent = make_agent(inner_lr=0.25, gamma=0.99, gae_lambda=0.97)
    rollout = of_task(collect(agent, agent.initial_state(3)), 1)
    valid = rollout.valid
    advantages = torch.from_numpy(advantages_by_hand(rollout, 0.99, 0.97)).float()
    leaves = {name: value.detach().clone().requires_grad_() for name, value in agent.meta.theta.items()}
    log_probs = agent.policy.log_prob(leaves, rollout.observations[valid], rollout.actions[valid])
    gradients = torch.autograd.grad((log_probs * advantages).mean(), list(leaves.values()))
    adapted = agent.adapt(agent.initial_state(1), rollout)
    expected = {n: (v + 0.25 * g).detach()[None] for (n, v), g in zip(leaves.items(), gradients, strict=True)}
    assert_same(adapted, expected, rtol=1e-5, atol=1e-6)


def test_adapting_changes_neither_agent_nor_state_nor_rollout():
    agent = make_agent()
    state = agent.initial_state(3)
    rollout = collect(agent, state)
    before, state_before = snapshot(agent), {name: value.clone() for name, value in state.items()}
    rollout_before = rollout.map(torch.clone)
    adapted = agent.adapt(state, rollout)
    assert not torch.allclose(adapted["bias_2"], state["bias_2"], atol=1e-4)
    assert_same(snapshot(agent), before, rtol=0, atol=0)
    assert_same(state, state_before, rtol=0, atol=0)
    for field in fields(rollout):
        assert torch.equal(getattr(rollout, field.name), getattr(rollout_before, field.name))
    assert not any(value.requires_grad for value in adapted.values())
    assert all(value.grad is None for value in agent.meta.theta.values())


@pytest.mark.parametrize("critic", ["linear", "learned"])
def test_padding_has_no_influence(critic):
    clean, dirty = make_agent(critic=critic, epochs=2), make_agent(critic=critic, epochs=2)
    rollouts = iteration(clean)
    generator = torch.Generator().manual_seed(5)

    def with_garbage(rollout):
        changes = {}
        for name in ("observations", "actions", "rewards", "log_probs", "success"):
            value = getattr(rollout, name).clone()
            pad = ~rollout.valid
            value[pad] = 3.0 * torch.randn(value[pad].shape, generator=generator)
            changes[name] = value
        return replace(rollout, **changes)

    garbage = [with_garbage(rollout) for rollout in rollouts]
    assert not torch.equal(garbage[0].observations, rollouts[0].observations)
    state = clean.initial_state(3)
    assert_same(dirty.adapt(state, garbage[0]), clean.adapt(state, rollouts[0]), rtol=1e-5, atol=1e-6)
    metrics = clean.update((), rollouts)
    assert dirty.update((), garbage) == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    assert_same(snapshot(dirty), snapshot(clean), rtol=1e-4, atol=1e-6)
    assert all(value.isfinite().all() for value in snapshot(dirty).values())


def test_a_dropped_episode_has_no_influence():
    """An episode that is padding from its first step on."""
    agent = make_agent()
    rollout = collect(agent, agent.initial_state(3))
    dropped = rollout.map(lambda value: torch.cat([value, torch.zeros_like(value[:, :1])], 1))
    adapted = agent.adapt(agent.initial_state(3), dropped)
    assert_same(adapted, agent.adapt(agent.initial_state(3), rollout), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "device",
    [
        "meta",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
        ),
    ],
)
def test_densities_are_computed_where_the_rollout_is(device):
    """The state lies on the CPU, where the agent acts. Replay asks at the end of a stage, on the device that learns."""
    agent = make_agent()
    state = agent.initial_state(3)
    rollout = collect(agent, state)
    found = agent.log_prob(state, rollout.to(device))
    assert (found.device.type, found.shape) == (device, rollout.valid.shape)


# Updating


def gradient(rollouts, **settings):
    """The meta-gradient and the metrics of the first epoch of an agent as it starts."""
    agent = make_agent(max_grad_norm=1e9, **settings)
    metrics = agent.update((), rollouts)
    rates = {name: value.grad for name, value in agent.meta.learned.items()}
    gradients = {name: value.grad for name, value in agent.meta.theta.items()} | rates
    return gradients | {name: torch.tensor(metrics[f"train/{name}"]) for name in ("loss", "kl", "clip_fraction")}


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("chunk", [1, 2])
def test_chunks_add_up_to_the_whole_gradient(monkeypatch, chunk, steps):
    settings = {"name": "meta_sgd", "adaptation_steps": steps, "inner_kl_coef": 0.1}
    rollouts = iteration(make_agent(**settings))
    whole = gradient(rollouts, **settings)
    samples, widest = 4 * 6, 8
    monkeypatch.setattr(meta_objective, "CPU_CHUNK_BYTES", chunk * 4 * samples * widest)
    dimensions = []
    inner_loop = meta_objective.inner_loop
    monkeypatch.setattr(
        meta_objective, "inner_loop", lambda *a: dimensions.append(a[3][0].weights.ndim) or inner_loop(*a)
    )
    assert_same(gradient(rollouts, **settings), whole, rtol=1e-5, atol=1e-6)
    assert dimensions == ([1, 1, 1] if chunk == 1 else [2, 1])  # a task by itself has no task dimension
    assert whole["weight_0"].norm() > 1e-3 and whole["inner_lr.weight_2"].norm() > 1e-3


@pytest.mark.parametrize(("taken", "share"), [(1, 1 / 2), (39, 1 / 2), (51, 1 / 4), (69, 1 / 8)])
def test_a_run_that_goes_on_cuts_the_chunks_as_one_that_was_not_stopped(monkeypatch, taken, share):
    """On a GPU of 80 GiB, `taken` by others. The first update finds PyTorch's cache empty, later ones do not."""
    found = []
    for reserved, allocated in ((0.0, 0.0), (0.5, 0.25), (8.0, 0.25)):
        sizes = {
            "mem_get_info": (int((80 - taken - reserved) * 2**30), 80 * 2**30),
            "memory_reserved": int(reserved * 2**30),
            "memory_allocated": int(allocated * 2**30),
        }
        for name, size in sizes.items():
            monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size)
        found.append(meta_objective.chunk_bytes(torch.device("cuda")))
    assert found == [int(0.01 * share * 80 * 2**30)] * 3


def test_the_meta_loss_is_a_mean_over_tasks():
    rollouts = iteration(make_agent())
    whole = gradient(rollouts)
    parts = [gradient([of_task(rollout, i) for rollout in rollouts]) for i in range(3)]
    for name in whole:
        torch.testing.assert_close(whole[name], sum(part[name] for part in parts) / 3, rtol=1e-4, atol=1e-6)


def test_the_ratio_is_1_in_the_first_epoch_only():
    """Re-adapting θ on the support data leads back to exactly what collected the query data."""
    settings = {"lr": 0.05, "clip_eps": 0.02}
    first = make_agent(**settings)
    metrics = first.update((), iteration(first))
    assert metrics["train/clip_fraction"] == 0
    assert metrics["train/kl"] == pytest.approx(0, abs=1e-6)
    later = make_agent(**settings, epochs=3)
    metrics = later.update((), iteration(later))
    assert metrics["train/clip_fraction"] > 0.1
    assert metrics["train/kl"] > 1e-4
    assert metrics["train/epochs"] == 3


def test_every_epoch_adapts_anew_from_the_current_parameters(monkeypatch):
    one, three = make_agent(lr=0.02), make_agent(lr=0.02, epochs=3)
    rollouts = iteration(one)
    seen = []
    step = Maml.step

    def spy(self, loss, meta, params, *rest):
        seen.append(params["bias_0"][0].detach().clone())
        return step(self, loss, meta, params, *rest)

    monkeypatch.setattr(Maml, "step", spy)
    three.update((), rollouts)
    monkeypatch.undo()
    start = one.meta.theta["bias_0"].detach().clone()
    one.update((), rollouts)
    assert len(seen) == 3
    assert torch.equal(seen[0], start)
    torch.testing.assert_close(seen[1], one.meta.theta["bias_0"].detach())
    assert not torch.allclose(seen[1], start, atol=1e-4) and not torch.allclose(seen[2], seen[1], atol=1e-4)


def test_epochs_end_when_the_kl_exceeds_its_bound():
    bound, free = make_agent(lr=0.05, epochs=5, max_kl=1e-3), make_agent(lr=0.05, epochs=5)
    one = make_agent(lr=0.05)
    rollouts = iteration(one)
    metrics = bound.update((), rollouts)
    assert metrics["train/epochs"] == 1 and metrics["train/kl"] > 1e-3
    assert free.update((), rollouts)["train/epochs"] == 5
    one.update((), rollouts)
    assert_same(policy_of(bound), policy_of(one))


def test_the_outer_rate_shrinks_after_too_large_a_step_and_recovers():
    agent = make_agent(lr=0.05, epochs=3, max_kl=1e-3)
    used = [agent.update((), iteration(agent, seed=number))["train/outer_lr"] for number in range(2)]
    assert used == pytest.approx([0.05, 0.05 / outer.LR_STEP])
    calm = make_agent(lr=0.05, epochs=1)
    calm.load_state_dict(snapshot(agent))
    used = [calm.update((), iteration(calm, seed=number))["train/outer_lr"] for number in range(20)]
    assert used == sorted(used) and used[0] < used[-1] == 0.05


def test_a_step_does_not_carry_the_deviation_past_its_bounds():
    """Beyond them the gradient is 0, and the deviation would stay there for good."""
    agent = make_agent(lr=0.5, epochs=1, min_std=0.9, max_std=1.1)
    bounds = torch.tensor([0.9, 1.1])
    for seed in range(3):
        agent.update((), iteration(agent, seed=seed))
        std = agent.meta.theta["log_std"].detach().exp()
        torch.testing.assert_close(std.clamp(*bounds), std)
        assert torch.isclose(std[:, None], bounds).any()


def test_two_inner_steps_are_differentiated_through_both():
    agent = make_agent(adaptation_steps=2)
    rollouts = iteration(agent)
    assert len(rollouts) == 3
    assert agent.update((), rollouts)["train/kl"] == pytest.approx(0, abs=1e-6)  # both steps are redone as they were
    other = replace(rollouts[0], rewards=-rollouts[0].rewards)  # only the first support rollout differs
    found, expected = (gradient([first, *rollouts[1:]], adaptation_steps=2) for first in (other, rollouts[0]))
    assert not torch.allclose(found["bias_2"], expected["bias_2"], atol=1e-4)


def test_updates_improve_adaptation():
    """Task i wants the action (0.3 i, −0.3 i): 40 updates raise the return after adaptation."""
    agent = make_agent(lr=0.02, epochs=3, inner_lr=0.1, max_kl=0.1)
    shape = {"rollouts": 10, "steps": 5}
    before = iteration(agent, seed=1, **shape)[-1].episode_returns().mean()
    for number in range(40):
        agent.update((), iteration(agent, seed=number, **shape))
    after = iteration(agent, seed=1, **shape)[-1].episode_returns().mean()
    assert before < -8 and after > -5


def test_inner_rates_are_learned_only_when_asked():
    fixed, learned = make_agent(), make_agent(name="meta_sgd")
    rollouts = iteration(fixed)
    fixed.update((), rollouts)
    learned.update((), rollouts)
    for name in fixed.meta.theta:
        rate = learned.meta.learned[f"inner_lr.{name}"]
        assert rate.grad.abs().max() > 0
        assert (rate != 0.1).any()
    assert fixed.meta.learned == {}
    assert not torch.equal(
        learned.adapt(learned.initial_state(3), rollouts[0])["bias_2"],
        fixed.adapt(fixed.initial_state(3), rollouts[0])["bias_2"],
    )


def test_the_normaliser_learns_valid_observations_after_the_update():
    agent, off = make_agent(), make_agent(normalizer_iterations=0)
    rollouts = iteration(agent)
    agent.update((), rollouts)
    off.update((), rollouts)
    seen = torch.cat([rollout.observations[rollout.valid] for rollout in rollouts])
    torch.testing.assert_close(agent.normalizer.mean.float(), seen.mean(0))
    torch.testing.assert_close(agent.normalizer.variance.float(), seen.var(0, correction=0))
    assert agent.normalizer.count == len(seen)  # each once: twice would weigh them double against later ones
    assert off.normalizer.count == 0
    assert_same(policy_of(off), policy_of(agent))


# The learned value function


def make_value(epochs=5, lr=3e-3):
    return LearnedValue(OBSERVATIONS, (8,), lr, epochs, torch.Generator().manual_seed(0), torch.device("cpu"))


def test_values_after_a_termination_are_0_and_after_a_truncation_those_of_the_last_observation():
    agent, value = make_agent(), make_value()
    rollout = collect(agent, agent.initial_state(3))
    values, following = value.values(rollout, rollout.observations, rollout.next_observations)
    of_next, _ = value.values(rollout, rollout.next_observations, rollout.next_observations)
    assert rollout.terminated.any() and rollout.truncated.any()
    assert (following[rollout.terminated] == 0).all()
    torch.testing.assert_close(following[rollout.truncated], of_next[rollout.truncated])
    assert (following[rollout.truncated] - values[rollout.truncated]).abs().min() > 1e-5
    assert (of_next[rollout.terminated] != 0).all()


def test_a_truncated_episode_counts_on_the_value_of_its_normalised_last_observation():
    """A = r + γ V(last observation) − V at a truncation, A = r − V at a termination; γ = 0.99."""
    agent = make_agent(critic="learned")
    agent.update((), iteration(agent, seed=1))  # so that observations are scaled
    rollout = collect(agent, agent.initial_state(3))
    observations, values, advantages = agent._advantages(rollout)
    torch.testing.assert_close(observations, agent.normalizer(rollout.observations))
    assert (observations - rollout.observations).abs().max() > 0.1
    of_last, _ = agent.value.values(rollout, agent.normalizer(rollout.next_observations), observations)
    for end, following in ((rollout.truncated, 0.99 * of_last), (rollout.terminated, torch.zeros_like(of_last))):
        assert end.any()
        torch.testing.assert_close(advantages[end], (rollout.rewards + following - values)[end])


def test_a_constant_reward_without_an_end_is_worth_its_geometric_sum():
    """Reward 1 a step, cut off after 6, γ = 0.9: V = 1/(1 − 0.9) = 10 everywhere; without a bootstrap at most 4.7."""
    value, agent = make_value(), make_agent()
    rollout = collect(agent, agent.initial_state(3))
    rollout = replace(
        rollout,
        rewards=rollout.valid.float(),
        truncated=rollout.truncated | rollout.terminated,
        terminated=torch.zeros_like(rollout.terminated),
    )
    flat, losses = rollout.observations.flatten(0, 2), []
    for _ in range(150):
        values, following = value.values(rollout, rollout.observations, rollout.next_observations)
        advantages = gae(rollout.rewards, values, following, rollout.terminated, rollout.truncated, 0.9, 0.95)
        fitted = value.fit(flat, (values + advantages).flatten(), rollout.valid.flatten(), seed=0)
        losses.append(fitted["value_loss"])
    values, _ = value.values(rollout, rollout.observations, rollout.next_observations)
    torch.testing.assert_close(values[rollout.valid], torch.full_like(values[rollout.valid], 10.0), atol=0.3, rtol=0)


def test_fitting_reduces_the_loss():
    generator = torch.Generator().manual_seed(0)
    value, observations = make_value(), torch.randn(200, OBSERVATIONS, generator=generator)
    targets, valid = 50.0 + 20.0 * observations[:, 0], torch.ones(200, dtype=torch.bool)
    targets[150:], valid[150:] = float("nan"), False
    losses = [value.fit(observations, targets, valid, seed)["value_loss"] for seed in range(60)]
    assert losses[-1] < 0.1 * losses[0]


def test_the_agent_fits_its_value_function_on_all_phases(monkeypatch):
    agent = make_agent(critic="learned", value_lr=1e-2)
    rollouts, sizes = iteration(agent), []
    before = snapshot(agent)
    fit = LearnedValue.fit
    monkeypatch.setattr(LearnedValue, "fit", lambda *a: sizes.append(int(a[3].sum())) or fit(*a))
    assert "train/value_loss" in agent.update((), rollouts)
    assert sizes == [rollouts[0].env_steps + rollouts[1].env_steps]
    assert not torch.equal(snapshot(agent)["value.weight_0"], before["value.weight_0"])
    assert "train/value_loss" not in make_agent().update((), rollouts)


def test_every_fit_of_every_run_goes_through_the_data_in_an_order_of_its_own(monkeypatch):
    orders, fit = [], LearnedValue.fit
    monkeypatch.setattr(LearnedValue, "fit", lambda *a: orders.append(a[4]) or fit(*a))
    for seed in (0, 1, 0):
        agent = make_agent(seed=seed, critic="learned")
        for _ in range(2):
            agent.update((), iteration(agent))
    assert orders[:2] == orders[4:] and len(set(orders)) == 4


# Saving


@pytest.mark.parametrize("settings", [{}, {"critic": "learned", "name": "meta_sgd", "adaptation_steps": 2}])
def test_training_goes_on_bit_for_bit_from_a_saved_state(settings):
    agent = make_agent(epochs=2, **settings)
    for number in range(2):
        agent.update((), iteration(agent, seed=number))
    restored = make_agent(seed=9, epochs=2, **settings)
    restored.load_state_dict(snapshot(agent))
    assert_same(snapshot(restored), snapshot(agent), rtol=0, atol=0)
    for number in range(2, 4):
        metrics = agent.update((), iteration(agent, seed=number))
        assert restored.update((), iteration(restored, seed=number)) == metrics
    assert_same(snapshot(restored), snapshot(agent), rtol=0, atol=0)


@pytest.mark.parametrize("critic", ["linear", "learned"])
def test_a_fresh_state_forgets_the_optimiser(critic):
    """Loading a state from before the first update leaves no moments of Adam behind."""
    settings = {"critic": critic, "epochs": 2}
    used, fresh = make_agent(**settings), make_agent(**settings)
    start = snapshot(used)
    used.update((), iteration(used))
    used.load_state_dict(start)
    rollouts = iteration(fresh)
    assert used.update((), rollouts) == fresh.update((), rollouts)
    assert_same(snapshot(used), snapshot(fresh), rtol=0, atol=0)


def names(agent):
    return [name for name in agent.state_dict() if "optimizer." not in name]


@pytest.mark.parametrize("name", names(make_agent(critic="learned")))
def test_a_state_that_does_not_fit_is_refused_by_name(name):
    agent = make_agent(critic="learned")
    state = snapshot(agent)
    missing = {key: value for key, value in state.items() if key != name}
    with pytest.raises(ValueError, match=rf"{name}.*nothing"):
        agent.load_state_dict(missing)
    with pytest.raises(ValueError, match=rf"{name}.*expected shape .*\(7, 7\)"):
        agent.load_state_dict(state | {name: torch.zeros(7, 7)})
    assert_same(snapshot(agent), state, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["optimizer.exp_avg.policy.weight_0", "value.optimizer.exp_avg_sq.weight_0"])
def test_an_optimiser_state_that_does_not_fit_is_refused_by_name(name):
    agent = make_agent(critic="learned")
    agent.update((), iteration(agent))
    state = snapshot(agent)
    assert name in state
    missing = {key: value for key, value in state.items() if key != name}
    for broken in (missing, state | {name: torch.zeros(7, 7)}):
        with pytest.raises(ValueError, match=name.removeprefix("value.")):
            make_agent(critic="learned").load_state_dict(broken)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("critic", ["linear", "learned"])
def test_the_gpu_computes_what_the_cpu_does(critic):
    agents = [make_agent(device=name, epochs=3, critic=critic) for name in ("cpu", "cuda")]
    rollouts = iteration(agents[0])
    for agent in agents:
        agent.update((), [rollout.to(agent.device) for rollout in rollouts])
    on_cpu, on_gpu = (agent.state_dict() for agent in agents)
    assert_same(on_gpu, on_cpu, rtol=1e-3, atol=1e-5)
