"""TRPO's natural gradient, its bound and its line search, on enumerable MDPs where the KL is exact; float64."""

import itertools

import pytest
import torch
from torch import Tensor

from metarl.agents.maml.fomaml import Fomaml, FomamlConfig
from metarl.agents.maml.imaml import Imaml, ImamlConfig
from metarl.agents.maml.inner import inner_loop
from metarl.agents.maml.meta_objective import MetaObjective
from metarl.agents.maml.outer import Trpo, TrpoConfig, likelihood_ratio
from metarl.agents.maml.reptile import Reptile, ReptileConfig
from metarl.nn.conjugate_gradient import conjugate_gradient
from tests.agents.enumerable import (
    ACTIONS,
    ALPHA,
    LOGITS,
    STATES,
    central_differences,
    exact_adapted,
    exact_return,
    log_prob,
    make_mdp,
    make_objective,
    make_theta,
    maml,
)


@pytest.fixture
def theta() -> Tensor:
    return make_theta()


def trust_region(theta: Tensor, method=None, steps: int = 1, **settings):
    """One step on three MDPs: the objective, θ before and after, and what the step says of itself."""
    mdps = [make_mdp(seed, actions_matter=True) for seed in range(3)]
    objective, leaf = make_objective(mdps, theta, method or maml(), steps=steps)
    metrics = Trpo(TrpoConfig(**{"damping": 1e-3, **settings}), {"policy.logits": leaf}).step(objective)
    return objective, leaf, metrics


def kl_of(objective: MetaObjective, theta: Tensor, leaf: Tensor) -> Tensor:
    """KL of the collecting policies from those after adapting θ: exact, as the data are all trajectories."""
    before = leaf.detach().clone()
    leaf.data.copy_(theta)
    kl = objective.measure(likelihood_ratio)["kl"]
    leaf.data.copy_(before)
    return torch.tensor(kl, dtype=torch.float64)


def fisher_of(objective: MetaObjective, theta: Tensor, leaf: Tensor) -> Tensor:
    """The Hessian of that KL by second differences."""

    def slope(x: Tensor) -> Tensor:
        return central_differences(lambda y: kl_of(objective, y, leaf), x, 1e-4).view(-1)

    rows = [slope(theta + d.view_as(theta)) - slope(theta - d.view_as(theta)) for d in 1e-4 * torch.eye(6).double()]
    return torch.stack(rows) / 2e-4


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", ["maml", "fomaml", "reptile", "imaml"])
def test_fisher_products_are_those_of_the_kl_after_adaptation(theta, name, steps):
    """Against the Hessian of the KL, which is exact here. Fails with the Fisher information at θ itself.

    FOMAML's and iMAML's are those of the derivative that they assume, J = I and (I + H/λ)⁻¹.
    """
    methods = {
        "maml": maml(),
        "fomaml": Fomaml(FomamlConfig(inner_lr=ALPHA), LOGITS),
        "reptile": Reptile(ReptileConfig(inner_lr=ALPHA), LOGITS),
        "imaml": Imaml(ImamlConfig(inner_lr=0.1, proximal=1.0, cg_iterations=6), LOGITS),
    }
    mdps = [make_mdp(seed, actions_matter=True) for seed in range(3)]
    objective, leaf = make_objective(mdps, theta, methods[name], steps=steps)
    columns = [{"policy.logits": row.view(STATES, ACTIONS)} for row in torch.eye(6).double()]
    found = torch.stack([objective.fisher_product(column)["policy.logits"].view(-1) for column in columns])
    if name == "maml":
        expected = fisher_of(objective, theta, leaf)
    else:
        expected = torch.zeros(6, 6, dtype=torch.float64)
        for i in range(3):
            batches = [batch.tasks(i) for batch in objective._batches]
            path = inner_loop(methods[name], objective._loss, objective._meta, batches[:-1])
            jacobian = torch.eye(6, dtype=torch.float64)
            if name == "imaml":
                point = path[-1]["logits"].detach()
                loss = lambda x: objective._loss({"logits": x}, batches[-2])  # noqa: E731, B023
                hessian = torch.autograd.functional.hessian(loss, point).view(6, 6)
                jacobian = torch.linalg.inv(jacobian + hessian)
            seen = range(len(batches)) if name == "reptile" else [len(batches) - 1]
            for k in seen:
                batch, point = batches[k], path[k]["logits"].detach()
                scores = torch.autograd.functional.jacobian(lambda x: log_prob({"logits": x}, *batch[:2]), point)  # noqa: B023
                scores = scores.view(-1, 6) @ jacobian
                weights = batch.weights / batch.weights.sum()
                expected += (scores.T * weights) @ scores / (3 * len(seen))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_trpo_step_follows_the_natural_gradient(theta):
    """θ − θ_old ∝ (F + λI)⁻¹ g of the objective AFTER adaptation. Fails when CG stops after one step: then it is g."""
    objective, leaf, _ = trust_region(theta, cg_iterations=6)
    step, after = leaf.detach() - theta, leaf.detach().clone()
    leaf.data.copy_(theta)
    fisher = fisher_of(objective, theta, leaf)
    leaf.grad = None
    objective.backward(likelihood_ratio)
    natural = torch.linalg.solve(fisher + 1e-3 * torch.eye(6, dtype=torch.float64), -leaf.grad.view(-1))
    cosine = torch.nn.functional.cosine_similarity(step.view(-1), natural, dim=0)
    assert cosine > 0.9999
    assert torch.nn.functional.cosine_similarity(step.view(-1), -leaf.grad.view(-1), dim=0) < 0.99
    assert not torch.equal(after, theta)


@pytest.mark.parametrize("max_kl", [1e-4, 1e-2, 0.3])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_trpo_step_keeps_its_bound_and_improves_the_surrogate_and_the_return(theta, max_kl, steps):
    """The bound nearly binds, too. Fails without the line search (max_kl = 0.3) or with F v for F⁻¹ v."""
    objective, leaf, metrics = trust_region(theta, steps=steps, max_kl=max_kl)
    kl = float(kl_of(objective, leaf.detach(), leaf))
    assert 0.3 * max_kl < kl <= max_kl
    assert metrics["kl"] == pytest.approx(kl)
    assert metrics["surrogate_gain"] > 0
    mdps = [make_mdp(seed, actions_matter=True) for seed in range(3)]
    before, after = (
        sum(exact_return(mdp, exact_adapted(mdp, x, steps)).detach() for mdp in mdps) for x in (theta, leaf.detach())
    )
    assert after > before


def test_a_trpo_step_that_cannot_be_made_leaves_everything_as_it_was(theta, monkeypatch):
    """No step is short enough where every point tried is worse than the start."""
    measure = MetaObjective.measure
    monkeypatch.setattr(MetaObjective, "measure", lambda *a: measure(*a) | {"loss": 1e9})
    _, leaf, metrics = trust_region(theta)
    assert metrics["step_fraction"] == 0 and metrics["surrogate_gain"] == 0
    assert torch.equal(leaf.detach(), theta)


def test_backtracking_shortens_the_step(theta, monkeypatch):
    """Two refusals leave 0.8² of the first step."""
    full, refused = trust_region(theta, max_kl=1e-4), itertools.chain([1e9, 1e9], itertools.repeat(0.0))
    measure = MetaObjective.measure

    def refuse(*arguments):
        found = measure(*arguments)
        return found | {"loss": found["loss"] + next(refused)}

    monkeypatch.setattr(MetaObjective, "measure", refuse)
    _, leaf, metrics = trust_region(theta, max_kl=1e-4)
    fraction = full[2]["step_fraction"]
    assert fraction in (1.0, 0.8) and metrics["step_fraction"] == pytest.approx(0.64)
    torch.testing.assert_close(leaf.detach() - theta, 0.64 / fraction * (full[1].detach() - theta))


def make_systems(definite: bool):
    """Three symmetric systems of 4 unknowns, two tensors: A `[3, 4, 4]` and b."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(3, 4, 4, generator=generator, dtype=torch.float64)
    matrix = root @ root.mT + 0.1 * torch.eye(4, dtype=torch.float64)
    matrix = matrix if definite else -matrix
    target = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    names = {"a": target[:, :1], "b": target[:, 1:].reshape(3, 3)}

    def product(vector):
        flat = torch.cat([vector["a"], vector["b"]], -1)
        image = (matrix @ flat.unsqueeze(-1)).squeeze(-1)
        return {"a": image[:, :1], "b": image[:, 1:]}

    return matrix, target, names, product


def test_conjugate_gradient_solves_each_task_by_itself():
    """Exact after as many steps as unknowns. Fails with one step length for all tasks."""
    matrix, target, names, product = make_systems(definite=True)
    found = conjugate_gradient(product, names, 4, stacked=True)
    torch.testing.assert_close(torch.cat([found["a"], found["b"]], -1), torch.linalg.solve(matrix, target))
    # As one system of 12 unknowns it takes more steps, and leads to the same.
    together = conjugate_gradient(product, names, 12)
    torch.testing.assert_close(torch.cat([together["a"], together["b"]], -1), torch.linalg.solve(matrix, target))


def test_conjugate_gradient_stops_where_the_system_is_not_positive():
    """Along the very first direction: the right-hand side itself, as in truncated Newton methods."""
    _, _, names, product = make_systems(definite=False)
    found = conjugate_gradient(product, names, 4, stacked=True)
    assert all(torch.equal(found[name], names[name]) for name in names)
    zero = conjugate_gradient(product, {name: torch.zeros_like(value) for name, value in names.items()}, 4)
    assert all((value == 0).all() for value in zero.values())


def test_a_natural_gradient_that_is_not_finite_is_no_step(theta, monkeypatch):
    """It counts as one that came to nothing; a direction along which nothing bends is a step of length 0."""
    monkeypatch.setattr(MetaObjective, "fisher_product", lambda self, v: {k: x * float("nan") for k, x in v.items()})
    with pytest.raises(FloatingPointError, match="natural gradient is not finite"):
        trust_region(theta)
    monkeypatch.setattr(MetaObjective, "fisher_product", lambda self, v: {k: 0.0 * x for k, x in v.items()})
    _, leaf, metrics = trust_region(theta, damping=0.0)
    assert metrics["step_fraction"] == 0 and torch.equal(leaf, theta)
