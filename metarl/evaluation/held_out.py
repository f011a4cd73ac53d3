"""Held-out evaluation: adapts as in training and reports results before and after, next to an untrained agent."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import torch

from metarl import statistics
from metarl.build import build_agent, check_spaces
from metarl.collect import LocalCollector, adapt_and_collect, per_phase
from metarl.deploy.policy import Policy
from metarl.envs import FAMILIES
from metarl.envs import make as make_env
from metarl.envs.manager import EnvManager
from metarl.envs.vector.serial import make_envs
from metarl.errors import UserError
from metarl.evaluation.ablation import Ablation, ablated
from metarl.nn.torch_settings import default_torch_settings
from metarl.protocols import AdaptiveActor, Collector
from metarl.seeding import Purpose, children, seeds
from metarl.types import FloatArray, Rollout, Task

Report = dict[str, Any]
"""A JSON object; see `evaluate`."""

HOW = {"memory": "in its memory", "inference": "by inference", "nothing": "to nothing"}
"""How agents without adaptation steps adapt, in words."""

MAX_ENVS = 200
"""Maximum number of environments of an evaluation; more rollouts, then more tasks, run one after another."""


class _Tasks:
    """A list of tasks as a task distribution, for `make_envs`."""

    def __init__(self, tasks: Sequence[Task], make: Callable[[Task], gymnasium.Env[Any, Any]]) -> None:
        self.train_tasks = self.test_tasks = list(tasks)
        self.make = make


@default_torch_settings()
def evaluate(
    policy: Policy,
    tasks: Sequence[Task],
    *,
    rollouts_per_task: int | None = None,
    adaptation_steps: int | None = None,
    seed: int | None = None,
    ablate: Ablation | None = None,
    num_workers: int = 0,
    make: Callable[[Task], gymnasium.Env[Any, Any]] = make_env,
) -> Report:
    """Evaluate an agent on tasks, adapting to each as in training, and an untrained agent on the same tasks.

    Every phase runs `rollouts_per_task` episodes with sampled actions. An agent that adapts by gradient steps has K + 1
    phases, and each step adapts on the episodes of the phase before. For an agent with a memory, the phases are the
    episodes of a trial. The return of a phase is the mean over its episodes; its success is the fraction of episodes in
    which the task was solved at any step.

    Args:
        policy: a policy from `metarl.load` or `metarl.train`, before adaptation.
        tasks: the tasks, e.g. a distribution's `test_tasks`.
        rollouts_per_task: N; None for that of `config.evaluation`, or as in training if that is None, too.
        adaptation_steps: K; None for that of training.
        seed: the seed of the episodes and intervals; None for the run's.
        ablate: for an agent with a memory: also evaluate it without memory of earlier episodes, or without its rewards.
        num_workers: the number of processes that step environments; does not affect the result.
        make: builds the environment of a task; required for custom tasks.

    Returns:
        `{"protocol", "split", "held_out", "env_steps", "seed", "adaptation_steps", "adapts_by", "trial_episodes",
        "rollouts_per_task", "tasks": [{"name", "index", "returns": [pre, …, post], "success": [pre, …, post],
        "untrained_returns", "untrained_success"}], "aggregate": {"return_pre": {"mean", "iqm", "ci95": [low, high]},
        "return_post", "return_gain", "success_pre", …, "untrained_return_post", …}, "phases": [{"return": {"mean",
        …}, "success"}], "per_class": {name: {"return_pre", "success_post", "untrained_success_post", …}}}`. Intervals
        are 95 % bootstrap intervals of the mean over tasks, stratified by class; `gain` is post − pre per task.
        Undefined success and phases whose episodes were all dropped are null and left out of the aggregates. An
        ablation is named in "ablate"; its results are in "ablated_returns", "ablated_return_post" and so on.

    Raises:
        UserError: the policy is already adapted; the tasks do not fit the agent; `adaptation_steps` is given for an
            agent that takes none; or the agent has no memory to ablate.
        ValueError: no tasks.
    """
    if not tasks:
        raise ValueError("no tasks to evaluate on; expected at least one")
    if policy.adapted:
        raise UserError("the policy is already adapted; pass the policy before adaptation")
    config, adapts_by = policy.config, policy.agent.adapts_by
    if adapts_by != "gradient" and adaptation_steps is not None:
        raise UserError(
            f"{config.agent.name} adapts {HOW[adapts_by]}, within trials of {policy.agent.trial_episodes} episodes, "
            "without adaptation steps; omit adaptation_steps"
        )
    if ablate is not None and adapts_by != "memory":
        raise UserError(f"{config.agent.name} has no memory to ablate; omit ablate, or use an agent with one, e.g. rl2")
    seed = config.seed if seed is None else seed
    rollouts = rollouts_per_task or config.evaluation.rollouts_per_task or config.rollouts_per_task
    untrained = build_agent(config, policy.spaces, policy.agent.device, Purpose.UNTRAINED_AGENT, policy.builder)
    most = min(len(tasks) * rollouts, MAX_ENVS)
    envs = make_envs(_Tasks(tasks, make), most, num_workers, config.worker_timeout_s)
    try:
        check_spaces(policy.spaces, envs.spaces)
        report = evaluate_agent(
            policy.agent,
            LocalCollector(envs),
            tasks,
            rollouts,
            seed=seed,
            env_steps=policy.env_steps,
            adaptation_steps=adaptation_steps,
            untrained=untrained,
            ablate=ablate,
        )
    finally:
        envs.close()
    return report


def evaluate_agent(
    agent: AdaptiveActor,
    collector: Collector,
    tasks: Sequence[Task],
    rollouts_per_task: int,
    *,
    seed: int,
    env_steps: int,
    adaptation_steps: int | None = None,
    untrained: AdaptiveActor | None = None,
    ablate: Ablation | None = None,
) -> Report:
    """Evaluate with the given collector; see `evaluate` for the report. The untrained agent is optional."""
    trials = functools.partial(
        _collect,
        collector,
        tasks=tasks,
        rollouts_per_task=rollouts_per_task,
        seed=seed,
        adaptation_steps=adaptation_steps,
    )
    rollouts = trials(agent)
    outcomes = {"": rollouts}
    if untrained is not None:
        outcomes["untrained_"] = trials(untrained)
    if ablate is not None:
        outcomes["ablated_"] = trials(ablated(agent, ablate, [part for (part,) in rollouts]))
    rows: list[dict[str, Any]] = [{"name": task.name, "index": task.index} for task in tasks]
    for prefix, outcome in outcomes.items():
        for field, measure in (("returns", Rollout.episode_returns), ("success", Rollout.episode_success)):
            values = torch.cat([per_phase(part, measure) for part in outcome]).tolist()
            for row, phases in zip(rows, values, strict=True):
                row[prefix + field] = [None if math.isnan(value) else value for value in phases]
    shared = any(task.family in FAMILIES and task.benchmark in FAMILIES[task.family].shared_splits for task in tasks)
    return {
        "protocol": "metarl",
        "split": "/".join(sorted({task.split for task in tasks})),
        "held_out": all(task.split == "test" for task in tasks) and not shared,
        "env_steps": env_steps,
        "seed": seed,
        "adaptation_steps": agent.adaptation_steps if adaptation_steps is None else adaptation_steps,
        "adapts_by": agent.adapts_by,
        "trial_episodes": agent.trial_episodes,
        "rollouts_per_task": rollouts_per_task,
        **({"ablate": ablate} if ablate else {}),
        "tasks": rows,
        "aggregate": _aggregate(rows, seed),
        "phases": _per_phase(rows, seed),
        "per_class": _per_class(rows),
    }


def _collect(
    collector: Collector,
    agent: AdaptiveActor,
    tasks: Sequence[Task],
    rollouts_per_task: int,
    seed: int,
    adaptation_steps: int | None,
) -> list[list[Rollout]]:
    """Return the K + 1 rollouts of all tasks, in batches of at most `collector.max_tasks` tasks."""
    task_seeds, size = children(seeds(seed, Purpose.EVALUATION_ROLLOUTS), len(tasks)), collector.max_tasks
    return [
        adapt_and_collect(
            collector,
            agent,
            tasks[start : start + size],
            rollouts_per_task,
            task_seeds[start : start + size],
            adaptation_steps,
        )
        for start in range(0, len(tasks), size)
    ]


_MEASURES = {"return": "returns", "success": "success"}

_PREFIXES = ("", "untrained_", "ablated_")


def _defined(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[list[str], FloatArray]]:
    """Return for each measure the classes and values `[tasks, phases]` of the tasks that define it."""
    measures = {}
    for prefix in _PREFIXES:
        for measure, field in _MEASURES.items():
            kept = [row for row in rows if prefix + field in row and None not in row[prefix + field]]
            if kept:
                values = np.array([row[prefix + field] for row in kept], dtype=np.float64)
                measures[prefix + measure] = [row["name"] for row in kept], values
    return measures


def _measures(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[list[str], FloatArray]]:
    """Return the classes and values `[tasks]` of each measure before and after adaptation, and of the gain."""
    measures: dict[str, tuple[list[str], FloatArray]] = {}
    for name, (classes, values) in _defined(rows).items():
        measures[f"{name}_pre"], measures[f"{name}_post"] = (classes, values[:, 0]), (classes, values[:, -1])
        if not name.startswith("untrained_"):
            measures[f"{name}_gain"] = classes, values[:, -1] - values[:, 0]
    return measures


def _aggregate(rows: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seeds(seed, Purpose.BOOTSTRAP))
    return {name: statistics.aggregate(values, classes, rng) for name, (classes, values) in _measures(rows).items()}


def _per_phase(rows: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seeds(seed, Purpose.BOOTSTRAP, 1))
    phases: list[dict[str, Any]] = [{} for _ in rows[0]["returns"]]
    for name, (classes, values) in _defined(rows).items():
        for phase, column in zip(phases, values.T, strict=True):
            phase[name] = statistics.aggregate(column, classes, rng)
    return phases


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
    """Return the scalars of a report under the names that are tracked during training."""
    aggregate = report["aggregate"]
    names = [f"{measure}_{phase}" for measure in _MEASURES for phase in ("pre", "post")]
    metrics = {f"meta_test/{name}": aggregate[name]["mean"] for name in names if name in aggregate}
    for name, row in report["per_class"].items():
        if "success_post" in row:
            metrics[f"meta_test/{name}/success_post"] = row["success_post"]
    return metrics


@default_torch_settings()
def adapt_to(
    policy: Policy,
    task: Task,
    *,
    rollouts_per_task: int | None = None,
    seed: int | None = None,
    make: Callable[[Task], gymnasium.Env[Any, Any]] = make_env,
) -> Policy:
    """Return the policy adapted to a task as in training: K steps, each on fresh episodes.

    An agent with a memory adapts on all episodes of a trial but the last, and then acts in that one.

    Args:
        policy: the policy before adaptation.
        task: the task to adapt to.
        rollouts_per_task: N, the episodes per step; None for that of training (not of `config.evaluation`). An agent
            with a memory always adapts on a single trial.
        seed: the seed of the episodes; None for the run's.
        make: builds the environment of a task.

    Raises:
        UserError: the task does not fit the agent, the agent does not adapt, or the policy is already adapted.
    """
    if policy.adapted:
        raise UserError("the policy is already adapted; pass the policy before adaptation")
    if policy.agent.adapts_by == "nothing":
        raise UserError(f"{policy.config.agent.name} does not adapt; use the policy as it is")
    agent, config = policy.agent, policy.config
    root = seeds(config.seed if seed is None else seed, Purpose.EVALUATION_ROLLOUTS)
    count = 1 if agent.adapts_by == "memory" else rollouts_per_task or config.rollouts_per_task
    envs = make_envs(_Tasks([task], make), min(count, MAX_ENVS), num_workers=0)
    state, collector = policy.state, LocalCollector(envs)
    try:
        check_spaces(policy.spaces, envs.spaces)
        for phase in children(root, max(1, agent.adaptation_steps)):
            rollout = collector.collect(agent, state, [task], count, [phase])
            if agent.trial_episodes > 1:
                rollout = replace(rollout, valid=rollout.valid & (rollout.episode < agent.trial_episodes - 1))
            state = agent.adapt(state, rollout)
    finally:
        collector.close()
    return replace(policy, state=state, adapted=True)


def select_tasks(tasks: Sequence[Task], count: int, rng: np.random.Generator) -> list[Task]:
    """Sample `count` tasks, or return all if there are fewer, balanced over classes and in a fixed order of classes."""
    return list(tasks) if count >= len(tasks) else EnvManager(tasks).sample(count, rng)
