"""THE loop: one for meta-training and for task sequences. It knows agents and environments by their Protocols.

for stage in stages:                                   # meta-RL is one stage
    agent.load_state_dict(...)                             # if the stage starts from another run
    for iteration in range(stage.iterations):
        tasks    = manager.sample(M, iteration)                  # with a curriculum from the easiest to all
        rollouts = adapt_and_collect(envs, agent, tasks, N)      # K + 1 rollouts, adapting between them
        metrics  = agent.update(rollouts, guard)                 # the outer step, and what guards earlier stages
        methods.observe(agent, rollouts)
        tracker.write(metrics); checkpoint.save(...)
    methods.end_stage(agent, fresh rollouts)               # if others follow
    evaluate on held-out tasks: of all stages, if there are several: a row of the matrix of scores
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from torch import Tensor

from metarl import stability
from metarl.account import Account, plasticity
from metarl.checkpoint import Position, Spaces, save
from metarl.config import RunConfig, dump_config, explain_validation, load_config
from metarl.envs.manager import JointManager, Manager
from metarl.envs.together import Together, make_stage_envs
from metarl.envs.vector import env_spaces
from metarl.errors import UserError
from metarl.evaluation import Report, evaluate_agent, held_out_metrics, select_tasks
from metarl.plotting import score_matrix_image
from metarl.policy import Policy, build_agent, resolve_device, restore
from metarl.run_directory import checkpoint_to_resume, flatten, open_run_dir
from metarl.sampling import adapt_and_collect, by_phase
from metarl.seeding import Purpose, children, seeds
from metarl.stages import load_methods, max_envs, num_workers, stage_distributions, task_manager
from metarl.tracking import Tracker, read_metrics
from metarl.transfer import stage_starts, start_from
from metarl.types import Rollout, StabilityMethod, TaskDistribution

Progress = Callable[[Position, Mapping[str, float]], None]
"""Told of every iteration and every evaluation, with the metrics that were tracked."""


@dataclass(frozen=True)
class Run:
    """What training leaves behind.

    Attributes:
        run_dir: config, checkpoints, metrics and reports.
        policy: the trained agent, before adaptation.
        report: of the last evaluation on held-out tasks; None if the run stopped before one.
        finished: whether all stages were trained to their end; else it can be resumed.
    """

    run_dir: Path
    policy: Policy
    report: Report | None
    finished: bool


def _never() -> bool:
    return False


def _silent(position: Position, metrics: Mapping[str, float]) -> None:
    pass


def train(
    config: RunConfig | Mapping[str, Any] | str | Path,
    distribution: TaskDistribution | Sequence[TaskDistribution] | None = None,
    *,
    methods: Sequence[StabilityMethod] | None = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    max_iterations: int | None = None,
    max_minutes: float | None = None,
    should_stop: Callable[[], bool] = _never,
    progress: Progress = _silent,
) -> Run:
    """Train an agent.

    Args:
        config: a config, its settings as a mapping, a YAML file, or the name of an embedded config.
        distribution: tasks of one's own, for all stages or one for each, instead of those that the config names.
        methods: stability methods of one's own, instead of those that the config names.
        run_dir: where results go; `runs/<name of the config>` if None.
        resume: go on with the run in `run_dir`.
        overwrite: throw away the run in `run_dir`.
        max_iterations: stop after this many iterations, counted from the first of the run.
        max_minutes: stop at the first iteration that ends later than this.
        should_stop: asked before each iteration; True saves and ends the run.
        progress: called after each iteration and evaluation.

    Returns:
        The run; it is saved at its end, wherever it stopped.

    Raises:
        UserError: the config, the device, the run directory or one that a stage starts from cannot be used.
    """
    name = Path(config).stem if isinstance(config, str | Path) else "run"
    config = as_config(config)
    device = resolve_device(config.device)
    distributions = stage_distributions(config, distribution)
    run_dir = Path(run_dir) if run_dir is not None else Path("runs") / name
    limits = Limits(
        max_iterations if max_iterations is not None else float("inf"),
        time.monotonic() + 60.0 * max_minutes if max_minutes is not None else float("inf"),
        should_stop,
    )
    spaces = [_spaces(distribution) for distribution in distributions]
    if len(set(spaces)) > 1:
        raise UserError(
            f"all stages need the same observation and action space; they have {', '.join(map(str, spaces))}"
        )
    managers: Sequence[Manager] = [
        task_manager(f"stages.{i}", *pair) for i, pair in enumerate(zip(config.stages, distributions, strict=True))
    ]
    if config.control == "joint":
        managers = [JointManager(list(managers))] * len(managers)
    if methods is None:
        methods = [stability.build(method, run_dir) for method in config.stability]
    checkpoint = checkpoint_to_resume(run_dir, config) if resume else None
    if checkpoint:
        if checkpoint.spaces != spaces[0]:
            raise UserError(f"{run_dir} was trained for {checkpoint.spaces}; its tasks now have {spaces[0]}")
        policy, position = restore(config, checkpoint, device), checkpoint.position
        load_methods(methods, checkpoint)
        starts = stage_starts(policy, position, run_dir)
    else:
        agent = build_agent(config, spaces[0], device)
        policy, position = Policy(config, agent, spaces[0], 0, agent.initial_state(1)), Position()
        starts = stage_starts(policy, position, run_dir)  # before an old run is thrown away
        open_run_dir(run_dir, config, overwrite=overwrite)
    if config.control == "scratch":
        new = build_agent(config, spaces[0], device).state_dict()
        begun = [(position.stage, position.stage_iteration) > (stage, 0) for stage in range(len(spaces))]
        starts = {
            stage: {name: v.clone() for name, v in new.items()} for stage in range(len(spaces)) if not begun[stage]
        }
    return _Trainer(config, distributions, managers, starts, policy, methods, position, run_dir, limits, progress).run()


def _spaces(distribution: TaskDistribution) -> Spaces:
    observation_space, action_space = env_spaces(distribution)
    low, high = (tuple(float(bound) for bound in bounds) for bounds in (action_space.low, action_space.high))
    return Spaces(observation_space.shape[0], low, high)


class _Trainer:
    """The state of one run: the agent, its position, and where results go."""

    def __init__(
        self,
        config: RunConfig,
        distributions: Sequence[TaskDistribution],
        managers: Sequence[Manager],
        starts: Mapping[int, Mapping[str, Tensor]],
        policy: Policy,
        methods: Sequence[StabilityMethod],
        position: Position,
        run_dir: Path,
        limits: Limits,
        progress: Progress,
    ) -> None:
        self.config, self.distributions, self.run_dir = config, distributions, run_dir
        self.managers, self.starts, self.methods = managers, starts, methods
        self.agent, self.spaces, self.position = policy.agent, policy.spaces, position
        self.limits, self.progress = limits, progress
        self.report: Report | None = None

    def run(self) -> Run:
        config, stages = self.config, self.config.stages
        with Tracker(self.run_dir, dump_config(config), flatten(config.model_dump()), self.position) as self.tracker:
            self.account = Account(stages, read_metrics(self.run_dir)) if len(stages) > 1 else None
            most = [max_envs(config, stage) for stage in range(len(stages))]
            sources = [Together(self.distributions)] * len(most) if config.control == "joint" else self.distributions
            self.envs = make_stage_envs(sources, most, num_workers(config), config.worker_timeout)
            try:
                if self.account is not None and not self.position.iteration and not self.limits.reached(self.position):
                    self._evaluate(0)
                for stage in range(self.position.stage, len(stages)):
                    if not self._run_stage(stage):
                        break
            finally:
                for envs in self.envs:
                    envs.close()
        policy = Policy(config, self.agent, self.spaces, self.position.env_steps, self.agent.initial_state(1))
        return Run(self.run_dir, policy, self.report, finished=self.position.stage == len(stages))

    def _run_stage(self, stage: int) -> bool:
        """Train to the end of a stage; returns whether it was reached."""
        config, iterations = self.config, self.config.stages[stage].iterations
        every = config.evaluation.every_iterations
        if stage in self.starts:
            start_from(self.agent, self.starts[stage])
        for number in range(self.position.stage_iteration, iterations):
            if self.limits.reached(self.position):
                self._save()
                return False
            self._iterate(stage, number)
            if number + 1 == iterations:
                break  # the end of the stage saves and evaluates in any case
            if every and (number + 1) % every == 0:
                self._evaluate(stage)
            if (number + 1) % config.checkpoint_every_iterations == 0:
                self._save()
        self._save()
        in_use = self._consolidate(stage) if self.account is not None else {}
        self._evaluate(stage, in_use, finished=True)
        self.position = replace(self.position, stage=stage + 1, stage_iteration=0)
        self._save()
        return True

    def _iterate(self, stage: int, number: int) -> None:
        """One iteration: sample tasks, collect and adapt, update."""
        config, manager, began = self.config, self.managers[stage], time.perf_counter()
        rng = np.random.default_rng(seeds(config.seed, Purpose.TASKS, stage, number))
        rollouts = self._collect(stage, number, rng, seeds(config.seed, Purpose.ROLLOUTS, stage, number))
        collected = time.perf_counter()
        metrics = rollout_metrics(rollouts) | self._update(stage, number, rollouts)
        if config.stages[stage].curriculum.iterations:
            metrics["train/task_fraction"] = manager.fraction(number)
        ended = time.perf_counter()
        env_steps = sum(rollout.env_steps for rollout in rollouts)
        metrics["time/env_steps_per_second"] = env_steps / (ended - began)
        metrics["time/update_fraction"] = (ended - collected) / (ended - began)
        metrics["time/iteration_seconds"] = ended - began
        self.position = Position(stage, number + 1, self.position.iteration + 1, self.position.env_steps + env_steps)
        self._track(metrics)

    def _collect(
        self, stage: int, number: int, rng: np.random.Generator, root: np.random.SeedSequence
    ) -> list[Rollout]:
        """Sample the tasks of an iteration; collect and adapt."""
        tasks = self.managers[stage].sample(self.config.num_tasks, rng, number)
        return adapt_and_collect(
            self.envs[stage],
            self.agent,
            tasks,
            self.config.rollouts_per_task,
            children(root, len(tasks)),
            self.agent.training_adaptation_steps,
        )

    def _update(self, stage: int, number: int, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """The outer step, under guard."""
        if not self.methods:
            return self.agent.update(rollouts)
        before = {name: value.detach().clone() for name, value in self.agent.parameters().items()}
        asked, observing = (
            np.random.default_rng(seeds(self.config.seed, Purpose.STABILITY, stage, number, use)) for use in (0, 1)
        )
        guard = stability.Guarding(self.methods, self.agent, asked)
        metrics = self.agent.update(rollouts, guard) | guard.metrics()
        for method, rng in zip(self.methods, observing.spawn(len(self.methods)), strict=True):
            method.observe(self.agent, rollouts, before, rng)
        return metrics

    def _consolidate(self, stage: int) -> dict[str, float]:
        """Collect fresh rollouts at the end of a stage, for the methods and to see how much of the network is in use.

        They count as environment steps, with or without methods.
        """
        tasks, rollouts_root, use = (seeds(self.config.seed, Purpose.CONSOLIDATION, stage, part) for part in range(3))
        number = self.config.stages[stage].iterations
        rollouts = self._collect(stage, number, np.random.default_rng(tasks), rollouts_root)
        if stage + 1 < len(self.config.stages):
            rngs = np.random.default_rng(use).spawn(len(self.methods))
            for method, rng in zip(self.methods, rngs, strict=True):
                method.end_stage(self.agent, rollouts, rng)
        env_steps = self.position.env_steps + sum(rollout.env_steps for rollout in rollouts)
        self.position = replace(self.position, env_steps=env_steps)
        return plasticity(self.agent, rollouts)

    def _evaluate(self, stage: int, metrics: Mapping[str, float] | None = None, finished: bool = False) -> None:
        """Evaluate on held-out tasks: of this stage, or of all if there are several."""
        began = time.perf_counter()
        reports = self._reports() if self.account is not None else [self._report(stage)]
        self.report = reports[stage if self.account is not None else 0]
        found = {**(metrics or {}), **held_out_metrics(self.report)}
        if self.account is not None:
            place = {"iteration": self.position.iteration, "stage": stage, "env_steps": self.position.env_steps}
            found |= self.account.add(place, reports, stage + finished)
            if finished:
                continual = self.account.write(self.run_dir / "evaluation" / "continual.json", stage + 1)
                self.report = {**self.report, "continual": continual}
                for phase, name in (("post", "continual/score_matrix"), ("pre", "continual/score_matrix_pre")):
                    image = score_matrix_image(self.account.matrix(stage + 1, phase), self.account.names)
                    self.tracker.write_image(self.position, name, image)
        self._track(found | {"time/evaluation_seconds": time.perf_counter() - began})

    def _reports(self) -> list[Report]:
        """Evaluate all stages; those of the same tasks once."""
        found: dict[int, Report] = {}
        reports = []
        for stage, distribution in enumerate(self.distributions):
            if id(distribution) not in found:
                found[id(distribution)] = self._report(stage)
            reports.append(found[id(distribution)])
        return reports

    def _report(self, stage: int) -> Report:
        """Evaluate in the training environments, but from random streams of its own."""
        config = self.config
        rng = np.random.default_rng(seeds(config.seed, Purpose.EVALUATION_TASKS, stage))
        tasks = select_tasks(self.distributions[stage].test_tasks, config.evaluation.num_tasks, rng)
        return evaluate_agent(
            self.agent,
            self.envs[stage],
            tasks,
            config.evaluation.rollouts_per_task or config.rollouts_per_task,
            seed=config.seed,
            env_steps=self.position.env_steps,
        )

    def _track(self, metrics: Mapping[str, float]) -> None:
        self.tracker.write(self.position, metrics)
        self.progress(self.position, metrics)

    def _save(self) -> None:
        save(
            self.run_dir / "checkpoints",
            {"agent": self.agent.state_dict(), "stability": stability.state_dict(self.methods)},
            self.position,
            self.spaces,
            self.config.keep_checkpoints,
        )


@dataclass(frozen=True)
class Limits:
    """Where a run stops before its end: at an iteration, at a time of `time.monotonic()`, or when asked to."""

    iteration: float
    deadline: float
    asked: Callable[[], bool]

    def reached(self, position: Position) -> bool:
        """Whether the run stops before its next iteration."""
        return position.iteration >= self.iteration or time.monotonic() >= self.deadline or self.asked()


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return the scalars of an iteration's K + 1 rollouts: means over all tasks, dropped rollouts left out."""
    measures = Rollout.episode_returns, Rollout.episode_success
    returns, success = (by_phase(rollouts, measure).nanmean(0).tolist() for measure in measures)
    metrics = {"meta_train/return_pre": returns[0], "meta_train/return_post": returns[-1]}
    metrics |= {"meta_train/success_pre": success[0], "meta_train/success_post": success[-1]}
    metrics |= {f"adaptation/return_after_{k}": value for k, value in enumerate(returns)}
    metrics["train/dropped_episodes"] = float(sum(rollout.episode_returns().isnan().sum() for rollout in rollouts))
    return metrics


def as_config(config: RunConfig | Mapping[str, Any] | str | Path) -> RunConfig:
    """Return a validated config; raises UserError."""
    if isinstance(config, RunConfig):
        return config
    if isinstance(config, str | Path):
        return load_config(config)
    try:
        return RunConfig.model_validate(dict(config))
    except ValidationError as error:
        raise UserError(explain_validation(error)) from error
