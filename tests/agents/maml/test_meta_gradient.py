"""Meta-gradients against ground truth: enumerable MDPs, quadratics and finite differences, in float64."""

import pytest
import torch
from torch import Tensor

from metarl.agents.maml.fomaml import Fomaml, FomamlConfig
from metarl.agents.maml.imaml import Imaml, ImamlConfig
from metarl.agents.maml.inner import Batch, MetaParams, PolicyLoss
from metarl.agents.maml.maml import Maml, MamlPpoConfig
from metarl.agents.maml.meta_objective import MetaObjective
from metarl.agents.maml.outer import likelihood_ratio
from metarl.agents.maml.reptile import Reptile, ReptileConfig
from metarl.rl.surrogates import ESTIMATORS, likelihood_ratio_loss, weighted_mean
from tests.agents.enumerable import (
    ALPHA,
    LOGITS,
    STATES,
    STEPS,
    clipped,
    enumerate_batch,
    exact_adapted,
    exact_meta_gradient,
    exact_return,
    expected_meta_gradient,
    log_prob,
    make_mdp,
    make_objective,
    make_theta,
    maml,
    policy,
    relative_error,
)


@pytest.fixture
def theta() -> Tensor:
    return make_theta()


# Estimators


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("actions_matter", [False, True])
def test_exact_post_adaptation_gradient_matches_finite_differences(theta, steps, actions_matter):
    """The reference itself: automatic differentiation and finite differences agree."""
    mdp = make_mdp(0, actions_matter)
    leaf = theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(exact_return(mdp, exact_adapted(mdp, leaf, steps)), leaf)
    assert relative_error(gradient, exact_meta_gradient(mdp, theta, steps)) < 1e-4


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_lvc_matches_the_exact_return_where_actions_do_not_change_the_future(theta, steps):
    """No action changes a later advantage, and LVC leaves nothing out. Fails with −log π · A instead of the ratio."""
    mdp = make_mdp(0, actions_matter=False)
    found = expected_meta_gradient(mdp, theta, steps)
    assert relative_error(found, exact_meta_gradient(mdp, theta, steps)) < 1e-4


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("actions_matter", [False, True])
def test_dice_matches_the_exact_return_everywhere(theta, steps, actions_matter):
    """To second order DiCE leaves nothing out. Fails when □_{<t} is dropped, or sums run on across episodes."""
    mdp = make_mdp(0, actions_matter)
    found = expected_meta_gradient(mdp, theta, steps, "dice")
    assert relative_error(found, exact_meta_gradient(mdp, theta, steps)) < 1e-4


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("actions_matter", [False, True])
def test_the_score_function_is_biased_by_what_its_hessian_lacks(theta, steps, actions_matter):
    """It equals the gradient with E[∇²log π · A] alone for the inner Hessian; an error of more than 1 % shows it."""
    mdp = make_mdp(0, actions_matter)
    found = expected_meta_gradient(mdp, theta, steps, "score_function")
    assert relative_error(found, exact_meta_gradient(mdp, theta, steps)) > 1e-2
    if steps == 1:
        batch, leaf = enumerate_batch(mdp, theta), theta.clone().requires_grad_()
        surrogate = weighted_mean(log_prob({"logits": leaf}, *batch[:2]) * batch.advantages, batch.weights)
        (inner,) = torch.autograd.grad(surrogate, leaf, create_graph=True)
        (expected,) = torch.autograd.grad(exact_return(mdp, leaf + ALPHA * inner), leaf)
        assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("actions_matter", [False, True])
def test_all_estimators_have_the_same_first_derivative_also_on_older_data(theta, estimator, actions_matter):
    """Only the score function, which does not correct for the data's age, differs where θ has moved on.

    Fails when `dice_loss` leaves out the ratio of the data.
    """
    batch = enumerate_batch(make_mdp(0, actions_matter), theta)
    loss = PolicyLoss(log_prob, ESTIMATORS[estimator])
    for point, agrees in ((theta, True), (theta + 0.3 * torch.sin(torch.arange(6.0)).view(3, 2), False)):
        leaf = point.double().clone().requires_grad_()
        (found,) = torch.autograd.grad(loss({"logits": leaf}, batch), leaf)
        log_probs = log_prob({"logits": leaf}, batch.observations, batch.actions)
        reference = likelihood_ratio_loss(log_probs, batch.log_probs, batch.advantages, batch.weights)
        (expected,) = torch.autograd.grad(reference, leaf)
        assert (relative_error(found, expected) < 1e-9) == (agrees or estimator != "score_function")


def test_what_lvc_leaves_out_where_actions_change_the_future(theta):
    """With consequences the inner Hessian is E[(∇²log π + ∇log π ∇log πᵀ) Q], Q held fixed (Rothfuss et al. 2019).

    So the meta-gradient equals that of an inner step whose Q does not depend on θ, and differs from the exact one.
    """
    mdp = make_mdp(0, actions_matter=True)

    def lvc_return(x: Tensor) -> Tensor:
        fixed = x.detach()
        visited, value = [mdp.start], torch.zeros(STATES, dtype=torch.float64)
        for _ in range(STEPS - 1):
            visited.append(torch.einsum("s,sa,sax->x", visited[-1], policy(fixed), mdp.transition))
        objective = torch.zeros((), dtype=torch.float64)
        for t in reversed(range(STEPS)):
            q = mdp.reward + mdp.transition @ value
            objective = objective + torch.einsum("s,sa,sa->", visited[t], policy(x), q)
            value = (policy(fixed) * q).sum(-1)
        return objective

    leaf = theta.clone().requires_grad_()
    (inner,) = torch.autograd.grad(lvc_return(leaf) / STEPS, leaf, create_graph=True)
    (expected,) = torch.autograd.grad(exact_return(mdp, leaf + ALPHA * inner), leaf)
    found = expected_meta_gradient(mdp, theta, 1)
    assert relative_error(found, expected) < 1e-6
    assert relative_error(found, exact_meta_gradient(mdp, theta, 1)) > 1e-3


# Orders


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("actions_matter", [False, True])
def test_fomaml_applies_the_gradient_at_the_adapted_parameters_to_theta(theta, steps, actions_matter):
    """And so differs from second-order MAML. Fails with `create_graph=True` in its step."""
    mdp = make_mdp(0, actions_matter)
    adapted = exact_adapted(mdp, theta, steps).detach().requires_grad_()
    (expected,) = torch.autograd.grad(exact_return(mdp, adapted), adapted)
    found = expected_meta_gradient(mdp, theta, steps, method=Fomaml(FomamlConfig(inner_lr=ALPHA), LOGITS))
    assert relative_error(found, expected) < 1e-9
    assert relative_error(found, expected_meta_gradient(mdp, theta, steps)) > 1e-2


@pytest.mark.parametrize("steps", [1, 2])
def test_reptile_moves_to_where_one_more_step_leads(theta, steps):
    """Its meta-gradient is (θ − θ^{K+1}) / α, the mean over tasks. Fails when the outer loss is the last phase's."""
    mdps = [make_mdp(seed, actions_matter=True) for seed in range(2)]
    ends = torch.stack([exact_adapted(mdp, theta, steps + 1).detach() for mdp in mdps])
    objective, leaf = make_objective(mdps, theta, Reptile(ReptileConfig(inner_lr=ALPHA), LOGITS), steps=steps)
    objective.backward(likelihood_ratio)
    torch.testing.assert_close(leaf.grad, (theta - ends.mean(0)) / ALPHA)


def test_stacked_tasks_give_the_gradients_of_tasks_alone(theta):
    """The batched form, three tasks on parameters stacked [M, ...], against one task at a time."""
    mdps = [make_mdp(seed, actions_matter=True) for seed in range(3)]
    objective, leaf = make_objective(mdps, theta, maml())
    objective.backward(clipped)
    alone = sum(expected_meta_gradient(mdp, theta, 1) for mdp in mdps) / 3
    torch.testing.assert_close(-leaf.grad * STEPS, alone)


# A quadratic as a task: log π = −½ (x − c)ᵀ A (x − c), one sample; observations hold A, actions c


def quadratic(params: dict[str, Tensor], curvature: Tensor, centre: Tensor) -> Tensor:
    offset = params["x"] - centre
    return -0.5 * torch.einsum("...i,...ij,...j->...", offset, curvature, offset).unsqueeze(-1)


def quadratic_loss(params: dict[str, Tensor], batch: Batch) -> Tensor:
    return -quadratic(params, batch.observations, batch.actions).sum(-1)


def plain(log_probs: Tensor, batch: Batch):
    return -log_probs.sum(-1), torch.zeros_like(log_probs.sum(-1))


def make_quadratics(tasks: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(tasks, 3, 3, generator=generator, dtype=torch.float64)
    curvature = root @ root.mT / 3 + 0.3 * torch.eye(3, dtype=torch.float64)
    centre = torch.randn(tasks, 3, generator=generator, dtype=torch.float64)
    one = torch.ones(tasks, 1, dtype=torch.float64)
    return Batch(curvature, centre, 0 * one, one, one, torch.zeros(tasks, 1, dtype=torch.long))


def quadratic_meta_gradient(method, supports: list[Batch], query: Batch) -> Tensor:
    x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64).requires_grad_()
    meta = MetaParams({"x": x}, {})
    MetaObjective(method, quadratic_loss, quadratic, meta, [*supports, query], width=8).backward(plain)
    return x.grad


START = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def descended(batch: Batch, steps: int) -> tuple[Tensor, Tensor]:
    """x after K gradient steps of size 0.1 from START, c + (I − αA)^K (x − c), and its derivative (I − αA)^K."""
    shrink = torch.linalg.matrix_power(torch.eye(3, dtype=torch.float64) - 0.1 * batch.observations, steps)
    return batch.actions + (shrink @ (START - batch.actions).unsqueeze(-1)).squeeze(-1), shrink


def pulled_back(query: Batch, end: Tensor, jacobian: Tensor) -> Tensor:
    """Mean over tasks of Jᵀ A' (x' − c')."""
    gradient = (query.observations @ (end - query.actions).unsqueeze(-1)).squeeze(-1)
    return (jacobian.mT @ gradient.unsqueeze(-1)).squeeze(-1).mean(0)


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("steps", [1, 3])
def test_maml_and_fomaml_on_a_quadratic(tasks, steps):
    """J = (I − αA)^K for MAML, I for FOMAML. Fails when either is differentiated as the other."""
    support, query = make_quadratics(tasks, 0), make_quadratics(tasks, 1)
    end, shrink = descended(support, steps)
    for method, jacobian in (
        (Maml(MamlPpoConfig(inner_lr=0.1), ("x",)), shrink),
        (Fomaml(FomamlConfig(inner_lr=0.1), ("x",)), torch.eye(3, dtype=torch.float64).expand_as(shrink)),
    ):
        found = quadratic_meta_gradient(method, [support] * steps, query)
        torch.testing.assert_close(found, pulled_back(query, end, jacobian))


@pytest.mark.parametrize("steps", [1, 3])
def test_reptile_on_a_quadratic(steps):
    """(x − x^{K+1}) / α with x^{K+1} in closed form. Fails when a phase is left out of the outer loss."""
    batch = make_quadratics(3, 0)
    end, _ = descended(batch, steps + 1)
    found = quadratic_meta_gradient(Reptile(ReptileConfig(inner_lr=0.1), ("x",)), [batch] * steps, batch)
    torch.testing.assert_close(found, (START - end.mean(0)) / 0.1)


def imaml(**settings) -> Imaml:
    return Imaml(ImamlConfig(**{"inner_lr": 0.1, "proximal": 1.5, "gradient_steps": 2000, **settings}), ("x",))


@pytest.mark.parametrize("tasks", [1, 3])
def test_imaml_on_a_quadratic(tasks):
    """φ* = (A + λI)⁻¹ (A c + λ x), dφ*/dx = λ (A + λI)⁻¹.

    Fails without the proximal pull in the descent, with I + λH for the system, or with one dot product for all tasks.
    """
    support, query = make_quadratics(tasks, 0), make_quadratics(tasks, 1)
    system = support.observations + 1.5 * torch.eye(3, dtype=torch.float64)
    target = (support.observations @ support.actions.unsqueeze(-1)).squeeze(-1) + 1.5 * START
    end, jacobian = torch.linalg.solve(system, target), 1.5 * torch.linalg.inv(system)
    found = quadratic_meta_gradient(imaml(cg_iterations=3), [support], query)
    torch.testing.assert_close(found, pulled_back(query, end, jacobian))
    rough = quadratic_meta_gradient(imaml(cg_iterations=1), [support], query)
    assert 1e-3 < relative_error(rough, found) < 0.5


def test_imaml_where_some_parameters_do_not_adapt():
    """L = ½ (z − c)ᵀ A (z − c) in z = (x, y), x adapted: φ_x = (A_xx + λ)⁻¹ (λ x + A_xx c_x − A_xy (y − c_y)).

    Fails when the solution's dependence on y, −(A_xx + λ)⁻¹ A_xy, is left out.
    """
    support, query = make_quadratics(2, 0), make_quadratics(2, 1)

    def joint(params, curvature, centre):
        return quadratic({"x": torch.cat([params["x"], params["y"]], -1)}, curvature, centre)

    def loss(params, batch):
        return -joint(params, batch.observations, batch.actions).sum(-1)

    x, y = START[:2].clone().requires_grad_(), START[2:].clone().requires_grad_()
    method = imaml(cg_iterations=2)
    MetaObjective(method, loss, joint, MetaParams({"x": x, "y": y}, {}), [support, query], width=8).backward(plain)
    expected = torch.zeros(3, dtype=torch.float64)
    for task in range(2):
        a, c = support.observations[task], support.actions[task]
        inverse = torch.linalg.inv(a[:2, :2] + 1.5 * torch.eye(2, dtype=torch.float64))
        offset = 1.5 * START[:2] + a[:2, :2] @ c[:2] - a[:2, 2:] @ (START[2:] - c[2:])
        end = torch.cat([inverse @ offset, START[2:]])
        outer = query.observations[task] @ (end - query.actions[task])
        expected[:2] += 1.5 * inverse @ outer[:2] / 2
        expected[2:] += (outer[2:] - (inverse @ a[:2, 2:]).T @ outer[:2]) / 2
    torch.testing.assert_close(torch.cat([x.grad, y.grad]), expected)


def test_imaml_is_differentiated_as_the_solution_of_its_last_phase():
    """From wherever the phases before led to: with the descent at its end they make no difference."""
    first, last, query = (make_quadratics(2, seed) for seed in range(3))
    found = quadratic_meta_gradient(imaml(cg_iterations=3), [first, last], query)
    torch.testing.assert_close(found, quadratic_meta_gradient(imaml(cg_iterations=3), [last], query))


def test_imaml_with_a_strong_pull_is_training_without_adaptation():
    """λ → ∞ leaves x where it is: J = I and the gradient is that of the query loss at x."""
    support, query = make_quadratics(2, 0), make_quadratics(2, 1)
    found = quadratic_meta_gradient(imaml(proximal=1e6, inner_lr=1e-7, cg_iterations=3), [support], query)
    expected = (query.observations @ (START - query.actions).unsqueeze(-1)).squeeze(-1).mean(0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# What must be seen


@pytest.mark.parametrize("estimator", ["lvc", "dice"])
def test_a_missing_second_order_term_is_seen(theta, estimator, monkeypatch):
    """The comparison with finite differences can fail: it does when inner gradients are detached."""
    mdp = make_mdp(0, actions_matter=False)
    grad = torch.autograd.grad

    def first_order(outputs, inputs, create_graph=False):
        return tuple(value.detach() for value in grad(outputs, inputs, create_graph=create_graph))

    monkeypatch.setattr(torch.autograd, "grad", first_order)
    found = expected_meta_gradient(mdp, theta, 1, estimator)
    monkeypatch.undo()
    assert relative_error(found, exact_meta_gradient(mdp, theta, 1)) > 1e-2
