"""Held-out evaluation: adapt as trained; report before and after, with intervals, beside an untrained agent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np

from metarl import statistics
from metarl.config import RunConfig
from metarl.envs import FAMILIES, distribution
from metarl.envs import make as make_env
from metarl.envs.manager import EnvManager
from metarl.envs.vector import make_envs
from metarl.errors import UserError, unknown_name
from metarl.policy import Policy, build_agent
from metarl.sampling import adapt_and_collect, by_phase
from metarl.seeding import Purpose, children, seeds
from metarl.types import Agent, BatchEnv, Rollout, Task, TaskDistribution

Report = dict[str, Any]
"""JSON: see `evaluate`."""

MAX_ENVS = 200
"""Environments of an evaluation; rollouts and then tasks beyond are run in turn."""


class _Tasks:
    """A list of tasks as a distribution, to make environments for."""

    def __init__(self, tasks: Sequence[Task], make: Callable[[Task], gymnasium.Env[Any, Any]]) -> None:
        self.train_tasks = self.test_tasks = list(tasks)
        self.make = make


def evaluate(
    policy: Policy,
    tasks: Sequence[Task],
    *,
    rollouts_per_task: int | None = None,
    adaptation_steps: int | None = None,
    seed: int | None = None,
    num_workers: int = 0,
    make: Callable[[Task], gymnasium.Env[Any, Any]] = make_env,
) -> Report:
    """Evaluate an agent on tasks, adapting to each as in training, and an untrained agent on the same tasks.

    Every phase runs `rollouts_per_task` episodes with exploring actions; a phase's episodes are what the next step
    adapts on. The return of a phase is the mean over its episodes, its success the fraction of them in which the task
    was solved at any step.

    Args:
        policy: from `metarl.load` or `metarl.train`, before adaptation.
        tasks: what to evaluate on, e.g. a distribution's `test_tasks`.
        rollouts_per_task: N; as in training if None.
        adaptation_steps: K; as in training if None.
        seed: of episodes and of intervals; the run's if None.
        num_workers: processes that step environments; no effect on the result.
        make: builds the environment of a task; needed for tasks of one's own.

    Returns:
        `{"protocol", "split", "held_out", "env_steps", "seed", "adaptation_steps", "rollouts_per_task", "tasks":
        [{"name", "index", "returns": [pre, …, post], "success": [pre, …, post], "untrained_returns",
        "untrained_success"}], "aggregate": {"return_pre": {"mean", "iqm", "ci95": [low, high]}, "return_post",
        "return_gain", "success_pre", …, "untrained_return_post", …}, "per_class": {name: {"return_pre",
        "success_post", "untrained_success_post", …}}}`. Intervals are 95 % bootstrap intervals of the mean over
        tasks, stratified by class; `gain` is post − pre, task by task. Success is null where a task does not define
        it, and so are phases whose episodes all had to be dropped; both are left out of the aggregates.
    """
    if not tasks:
        raise ValueError("no tasks to evaluate on; expected at least one")
    if policy.adapted:
        raise ValueError(
            "the policy is adapted already, and evaluating adapts by itself; give the agent before adaptation"
        )
    config = policy.config
    seed = config.seed if seed is None else seed
    rollouts = rollouts_per_task or config.evaluation.rollouts_per_task or config.rollouts_per_task
    untrained = build_agent(config, policy.spaces, policy.agent.device, Purpose.UNTRAINED_AGENT)
    envs = make_envs(_Tasks(tasks, make), min(len(tasks) * rollouts, MAX_ENVS), num_workers)
    try:
        found = envs.observation_space.shape[0], envs.action_space.shape[0]
        expected = policy.spaces.observation_size, policy.spaces.action_size
        if found != expected:
            raise UserError(f"the tasks have (observation, action) sizes {found}; the agent was trained for {expected}")
        report = evaluate_agent(
            policy.agent,
            envs,
            tasks,
            rollouts,
            seed=seed,
            env_steps=policy.env_steps,
            adaptation_steps=adaptation_steps,
            untrained=untrained,
        )
    finally:
        envs.close()
    return report


def evaluate_agent(
    agent: Agent,
    envs: BatchEnv,
    tasks: Sequence[Task],
    rollouts_per_task: int,
    *,
    seed: int,
    env_steps: int,
    adaptation_steps: int | None = None,
    untrained: Agent | None = None,
) -> Report:
    """Evaluate in given environments; see `evaluate` for the report, in which the untrained agent may be missing."""
    rows = [
        {"name": task.name, "index": task.index, "returns": returns, "success": success}
        for task, (returns, success) in zip(
            tasks, _phases(agent, envs, tasks, rollouts_per_task, seed, adaptation_steps), strict=True
        )
    ]
    if untrained is not None:
        outcome = _phases(untrained, envs, tasks, rollouts_per_task, seed, adaptation_steps)
        for row, (returns, success) in zip(rows, outcome, strict=True):
            row |= {"untrained_returns": returns, "untrained_success": success}
    shared = any(task.family in FAMILIES and task.benchmark in FAMILIES[task.family].shared_splits for task in tasks)
    return {
        "protocol": "metarl",
        "split": "/".join(sorted({task.split for task in tasks})),
        "held_out": all(task.split == "test" for task in tasks) and not shared,
        "env_steps": env_steps,
        "seed": seed,
        "adaptation_steps": agent.adaptation_steps if adaptation_steps is None else adaptation_steps,
        "rollouts_per_task": rollouts_per_task,
        "tasks": rows,
        "aggregate": _aggregate(rows, seed),
        "per_class": _per_class(rows),
    }


def _phases(
    agent: Agent, envs: BatchEnv, tasks: Sequence[Task], rollouts_per_task: int, seed: int, adaptation_steps: int | None
) -> list[tuple[list[float | None], list[float | None]]]:
    """Return each task's mean return and success rate, before adaptation and after each step; None if undefined."""
    results: list[tuple[list[float | None], list[float | None]]] = []
    task_seeds = children(seeds(seed, Purpose.EVALUATION_ROLLOUTS), len(tasks))
    for start in range(0, len(tasks), envs.max_envs):
        part = tasks[start : start + envs.max_envs]
        rollouts = adapt_and_collect(
            envs,
            agent,
            part,
            rollouts_per_task,
            task_seeds[start : start + envs.max_envs],
            adaptation_steps,
        )
        measures = Rollout.episode_returns, Rollout.episode_success
        returns, success = (by_phase(rollouts, measure).tolist() for measure in measures)
        results += [(_defined(a), _defined(b)) for a, b in zip(returns, success, strict=True)]
    return results


def _defined(values: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values]


_MEASURES = {"return": "returns", "success": "success"}


def _measures(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[list[str], list[float]]]:
    """Return each measure as the classes and values of the tasks that define it."""
    measures: dict[str, tuple[list[str], list[float]]] = {}
    for prefix in ("", "untrained_"):
        for measure, field in _MEASURES.items():
            kept = [row for row in rows if prefix + field in row and None not in row[prefix + field]]
            if not kept:
                continue
            classes = [row["name"] for row in kept]
            pre, post = ([row[prefix + field][phase] for row in kept] for phase in (0, -1))
            measures[f"{prefix}{measure}_pre"], measures[f"{prefix}{measure}_post"] = (classes, pre), (classes, post)
            if not prefix:
                gains = [after - before for before, after in zip(pre, post, strict=True)]
                measures[f"{measure}_gain"] = classes, gains
    return measures


def _aggregate(rows: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seeds(seed, Purpose.BOOTSTRAP))
    return {
        name: statistics.aggregate(np.array(values), classes, rng)
        for name, (classes, values) in _measures(rows).items()
    }


def _per_class(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    classes = dict.fromkeys(row["name"] for row in rows)
    return {
        name: {
            measure: float(np.mean(values))
            for measure, (_, values) in _measures([row for row in rows if row["name"] == name]).items()
        }
        for name in classes
    }


def held_out_metrics(report: Report) -> dict[str, float]:
    """Return the scalars of a report, as they are tracked during training."""
    aggregate = report["aggregate"]
    names = [f"{measure}_{phase}" for measure in _MEASURES for phase in ("pre", "post")]
    metrics = {f"meta_test/{name}": aggregate[name]["mean"] for name in names if name in aggregate}
    for name, row in report["per_class"].items():
        if "success_post" in row:
            metrics[f"meta_test/{name}/success_post"] = row["success_post"]
    return metrics


def select_tasks(tasks: Sequence[Task], count: int, rng: np.random.Generator) -> list[Task]:
    """Return `count` of the tasks, or all if there are fewer, balanced over classes and in a fixed order of classes."""
    return list(tasks) if count >= len(tasks) else EnvManager(tasks).sample(count, rng)


def family_names() -> dict[str, str]:
    """Return what `distribution_of` understands: name of a benchmark, distribution or Meta-World class → its family."""
    return {name: family for family, entry in FAMILIES.items() for name in entry.names()}


def distribution_of(config: RunConfig, name: str | None = None) -> TaskDistribution:
    """Return the tasks of a run's last stage, or others with that stage's options.

    Args:
        config: of the run.
        name: a key of `family_names`, e.g. `ML10`, `push-v3` or `HalfCheetahVel`; None for the run's own tasks.

    Raises:
        UserError: the run was trained on custom tasks and no name is given, or the name is unknown.
    """
    tasks = config.stages[-1].tasks
    if name is None:
        if tasks.family not in FAMILIES:
            raise UserError("the run has custom tasks: evaluate it from Python with metarl.evaluate(…, make=…)")
        return FAMILIES[tasks.family].tasks(tasks)
    families = family_names()
    if name not in families:
        raise UserError(str(unknown_name("task or benchmark", name, families, "metarl list envs")))
    family = families[name]
    options = tasks.model_dump(include={"seed", "horizon", "reward_version"}) if tasks.family == family else {}
    return distribution(family, **options, **FAMILIES[family].names()[name])
