#!/usr/bin/env python
"""Few-shot regression of sinusoids (Finn et al. 2017, 5.1): the inner loop of the RL agents with another loss.

A task is y = a sin(x − φ) with a ~ U[0.1, 5], φ ~ U[0, π], x ~ U[−5, 5], as in the paper's code. A network with two
hidden layers of 40 ReLU units adapts to it from 10 points. `meta_train` below is the whole of meta-learning. The
control, `pretrained`, fits all tasks jointly, which teaches it their mean, and then fine-tunes by gradient descent.

Errors are mean squared errors on a grid over [−5, 5], on the same held-out tasks and points for all methods. All
gradient steps of a test use the same points, at the inner step size of training. Intervals are 95 % intervals over
held-out tasks, from one training.

As in the paper: inner step size 0.01, one inner step in training, 25 tasks in a meta-batch, Adam. Deviations:
- Adam at 0.01 with cosine decay, not at a constant 0.001: 6,000 iterations and not 70,000. Chosen for MAML on
  other seeds; the other methods use it unchanged.
- Orthogonal weights, not normal ones with deviation 0.01: the agents' `init_mlp`.
- The control's step size is the best of `FINE_TUNING_RATES` on separate tasks, neither trained nor tested on.
- Reptile (Nichol et al. 2018) takes 4 steps and one on the query, each on fresh points: 50 points of a task in 5 steps,
  as published, with Adam on its displacement and the inner step size of the others.
- Meta-SGD (Li et al. 2017) starts all its rates at 0.01. It learns them for ONE step: later ones may diverge.

    .venv/bin/python scripts/studies/sinusoid.py [--iterations 6000] [--shots 10] [--seed 0] [--out runs/sinusoid]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from metarl.agents.maml.fomaml import Fomaml, FomamlConfig
from metarl.agents.maml.inner import InnerMethod, MetaParams, inner_loop
from metarl.agents.maml.maml import Maml, MamlPpoConfig
from metarl.agents.maml.meta_sgd import MetaSgd, MetaSgdConfig
from metarl.agents.maml.multi_task import MultiTask, MultiTaskConfig
from metarl.agents.maml.reptile import Reptile, ReptileConfig
from metarl.nn.mlp import Params, apply_mlp, init_mlp
from metarl.seeding import Purpose, integer_seed

SIZES = (1, 40, 40, 1)
ACTIVATION = "relu"
INNER_LR = 0.01
OUTER_LR = 0.01
META_BATCH = 25
FINE_TUNING_RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
HELD_OUT_TASKS = 600
TEST_STEPS = 10
REPORTED_STEPS = (0, 1, 5, 10)


class Points(NamedTuple):
    """Samples of sinusoids."""

    inputs: Tensor  # [M, S, 1]
    targets: Tensor  # [M, S, 1]


class Sinusoids(NamedTuple):
    """M tasks."""

    amplitudes: Tensor  # [M, 1, 1]
    phases: Tensor  # [M, 1, 1]

    @classmethod
    def draw(cls, num_tasks: int, generator: torch.Generator) -> Sinusoids:
        """Draw tasks."""
        amplitudes, phases = torch.rand(2, num_tasks, 1, 1, generator=generator)
        return cls(0.1 + 4.9 * amplitudes, math.pi * phases)

    def at(self, inputs: Tensor) -> Points:
        """Return points at `inputs`, `[M, S, 1]` or `[S, 1]`."""
        return Points(inputs.expand(len(self.phases), -1, -1), self.amplitudes * (inputs - self.phases).sin())

    def sample(self, shots: int, generator: torch.Generator) -> Points:
        """Draw points."""
        return self.at(10 * torch.rand(len(self.phases), shots, 1, generator=generator) - 5)

    def grid(self) -> Points:
        """Return 101 points over [−5, 5]."""
        return self.at(torch.linspace(-5, 5, 101).unsqueeze(-1))


class Learner(NamedTuple):
    """A method of the table and its number of inner steps."""

    label: str
    method: InnerMethod
    inner_steps: int  # in training


def learners(inner_lr: float = INNER_LR) -> list[Learner]:
    """Return the methods of the table. The control comes last; it does not adapt in training."""
    adapted = tuple(init_mlp(SIZES, 1.0, torch.Generator()))
    return [
        Learner("MAML", Maml(MamlPpoConfig(inner_lr=inner_lr), adapted), 1),
        Learner("FOMAML", Fomaml(FomamlConfig(inner_lr=inner_lr), adapted), 1),
        Learner("Reptile", Reptile(ReptileConfig(inner_lr=inner_lr), adapted), 4),
        Learner("Meta-SGD", MetaSgd(MetaSgdConfig(inner_lr=inner_lr), adapted), 1),
        Learner("pretrained", MultiTask(MultiTaskConfig(inner_lr=inner_lr), adapted), 0),
    ]


def mse(params: Params, batch: Points) -> Tensor:
    """Return the mean squared error of each task, `[M]`: the `Loss` of the inner steps."""
    return (apply_mlp(params, batch.inputs, ACTIVATION) - batch.targets).square().mean((-2, -1))


def stacked(meta: MetaParams, num_tasks: int) -> MetaParams:
    """Return `meta` with one copy of θ for each task, `[M, ...]`."""
    return meta._replace(theta={name: value.expand(num_tasks, *value.shape) for name, value in meta.theta.items()})


def seeded(seed: int, purpose: Purpose, *position: int) -> torch.Generator:
    """Return the generator of one purpose."""
    return torch.Generator().manual_seed(integer_seed(seed, purpose, *position))


def meta_train(learner: Learner, iterations: int, shots: int, seed: int) -> MetaParams:
    """Learn θ and the method's own parameters. With the same seed, all learners see the same tasks."""
    initial = init_mlp(SIZES, 1.0, seeded(seed, Purpose.AGENT))
    theta = {name: value.requires_grad_() for name, value in initial.items()}
    meta = MetaParams(theta, learner.method.learned(theta))
    optimizer = torch.optim.Adam(meta.named().values(), lr=OUTER_LR, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for iteration in range(iterations):
        generator = seeded(seed, Purpose.TASKS, iteration)
        tasks = Sinusoids.draw(META_BATCH, generator)
        *supports, query = (tasks.sample(shots, generator) for _ in range(learner.inner_steps + 1))
        path = inner_loop(learner.method, mse, stacked(meta, META_BATCH), supports)
        phases = list(zip(path, [*supports, query], strict=True))
        outer = phases if learner.method.outer_phases == "all" else phases[-1:]
        loss = torch.stack([mse(params, batch).mean() for params, batch in outer]).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return meta


def adapt(method: InnerMethod, meta: MetaParams, support: Points) -> list[Params]:
    """Return the parameters after 0, 1, …, 10 steps, `[M, ...]`, all on the same points."""
    supports = [support] * TEST_STEPS
    return inner_loop(method, mse, stacked(meta, len(support.inputs)), supports, create_graph=False)


def test_errors(method: InnerMethod, meta: MetaParams, tasks: Sinusoids, support: Points) -> Tensor:
    """Return the error over the grid after 0, 1, …, 10 steps, `[11, M]`."""
    path = adapt(method, meta, support)
    with torch.no_grad():
        return torch.stack([mse(params, tasks.grid()) for params in path])


def best_rate(meta: MetaParams, shots: int, seed: int) -> float:
    """Return the control's best step size: lowest mean error over the table's columns, on separate tasks."""
    generator = seeded(seed, Purpose.EVALUATION_TASKS, 1)
    tasks = Sinusoids.draw(HELD_OUT_TASKS, generator)
    support = tasks.sample(shots, generator)
    errors = {}
    for rate in FINE_TUNING_RATES:
        found = test_errors(learners(rate)[-1].method, meta, tasks, support)[list(REPORTED_STEPS)].mean()
        errors[rate] = float(found) if found.isfinite() else math.inf
    return min(errors, key=lambda rate: errors[rate])


def cell(errors: Tensor) -> str:
    """Return a mean with its interval, from `[M]`."""
    mean, half = float(errors.mean()), float(1.96 * errors.std() / math.sqrt(len(errors)))
    return f"{mean:.2f} ± {half:.2f}" if mean < 100 else "diverges"


def draw_picture(
    shown: Sequence[tuple[str, InnerMethod, MetaParams]], tasks: Sinusoids, support: Points, path: Path
) -> None:
    """Draw the paper's Fig. 2: a row for each task, a column for each method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grid, rows = tasks.grid(), len(tasks.phases)
    figure = plt.figure(figsize=(11, 3.3 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, len(shown), sharex=True, sharey="row", squeeze=False)
    for column, (title, method, meta) in enumerate(shown):
        curves = [apply_mlp(params, grid.inputs, ACTIVATION).detach() for params in adapt(method, meta, support)]
        for row, axis in enumerate(axes[:, column]):
            x = grid.inputs[row, :, 0]
            axis.plot(x, grid.targets[row, :, 0], color="#222222", linewidth=2.6, label="ground truth")
            axis.plot(x, curves[0][row, :, 0], color="#999999", linewidth=1.6, linestyle=":", label="before adaptation")
            axis.plot(x, curves[1][row, :, 0], color="#e69f00", linewidth=1.8, linestyle="--", label="1 gradient step")
            label = f"{TEST_STEPS} gradient steps"
            axis.plot(x, curves[TEST_STEPS][row, :, 0], color="#0072b2", linewidth=1.8, label=label)
            points = (support.inputs[row, :, 0], support.targets[row, :, 0])
            axis.plot(
                *points, "o", color="#cc3311", markeredgecolor="white", markersize=8, label="points used", zorder=5
            )
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0, column].set_title(title)
        axes[-1, column].set_xlabel("x")
    for row in range(rows):
        axes[row, 0].set_ylabel(f"y = {float(tasks.amplitudes[row]):.1f} sin(x − {float(tasks.phases[row]):.1f})")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Train, test, print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=6000, help="meta-updates of every method")
    parser.add_argument("--shots", type=int, default=10, help="points in a gradient step")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything, including the held-out tasks")
    parser.add_argument("--out", type=Path, default=Path("runs/sinusoid"), help="folder for the picture")
    options = parser.parse_args()
    torch.set_num_threads(1)  # tensors this small gain nothing from more
    generator = seeded(options.seed, Purpose.EVALUATION_TASKS, 0)
    tasks = Sinusoids.draw(HELD_OUT_TASKS, generator)
    support = tasks.sample(options.shots, generator)
    print(f"error on {HELD_OUT_TASKS} held-out sinusoids from {options.shots} points, by number of gradient steps\n")
    print(f"| {'method':28} |" + "".join(f" {steps:^11} |" for steps in REPORTED_STEPS) + " seconds |")
    print(f"|{'-' * 30}|" + f"{'-' * 13}|" * len(REPORTED_STEPS) + "--------:|")
    shown = {}
    for learner in learners():
        began, label, method = time.perf_counter(), learner.label, learner.method
        meta = meta_train(learner, options.iterations, options.shots, options.seed)
        if label == "pretrained":
            rate = best_rate(meta, options.shots, options.seed)
            label, method = f"pretrained (step size {rate:g})", learners(rate)[-1].method
        errors = test_errors(method, meta, tasks, support)
        cells = "".join(f" {cell(errors[steps]):^11} |" for steps in REPORTED_STEPS)
        print(f"| {label:28} |{cells} {time.perf_counter() - began:7.0f} |", flush=True)
        shown[learner.label] = (label, method, meta)
    options.out.mkdir(parents=True, exist_ok=True)
    first = (Sinusoids(*(value[:2] for value in tasks)), Points(*(value[:2] for value in support)))
    draw_picture([shown["MAML"], shown["pretrained"]], *first, options.out / "sinusoid.png")
    print(f"\npicture: {options.out / 'sinusoid.png'}")


if __name__ == "__main__":
    main()
