"""THE loop: one for meta-training and for task sequences. It knows agents and environments by their Protocols.

for stage in stages:                                   # meta-RL is one stage
    agent.load_state_dict(...)                             # if the stage starts from another run
    for iteration in range(stage.iterations):
        tasks    = manager.sample(M, iteration)                  # with a curriculum from the easiest to all
        rollouts = adapt_and_collect(envs, agent, tasks, N)      # K + 1 rollouts, adapting between them
        metrics  = agent.update(rollouts, auxiliary_loss)        # the outer step, and what guards earlier stages
        methods.observe(agent, rollouts)
        tracker.write(metrics); checkpoint.save(...)
    methods.end_stage(agent, fresh rollouts)               # if others follow
    evaluate on held-out tasks: of all stages, if there are several: a row of the matrix of scores
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from safetensors import SafetensorError
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # torch does not say that it is public

from metarl import stability
from metarl.build import common_spaces, max_envs, num_workers, resolve_device, stage_distributions, stage_managers
from metarl.collect import BrokenRolloutsError, adapt_and_collect, per_phase
from metarl.config.schema import RunConfig, as_config, hash_of
from metarl.continual.score_table import ScoreTable, plasticity
from metarl.deploy.policy import Policy
from metarl.envs.manager import Manager
from metarl.envs.vector.union import UnionOfTasks, make_stage_envs
from metarl.errors import RunError
from metarl.evaluation.held_out import Report, evaluate_agent, held_out_metrics, select_tasks
from metarl.plots.run import score_matrix_image
from metarl.protocols import StabilityMethod, TaskDistribution
from metarl.runs.checkpoint import save
from metarl.runs.directory import flatten, write_config
from metarl.runs.divergence import not_finite, write_statistics
from metarl.runs.lock import default_run_dir, locked
from metarl.runs.random_state import random_state, set_random_state
from metarl.runs.tracking import Tracker, read_metrics
from metarl.seeding import Purpose, children, seeds
from metarl.training.setup import Start, begin
from metarl.training.setup import resume as start_again
from metarl.training.warm_start import start_from
from metarl.types import Position, Rollout, Spaces

MOST_SKIPPED = 3
"""So many iterations in a row may come to nothing, since their numbers are not finite; then a run stops."""

NOT_FINITE = (FloatingPointError, LinAlgError)
"""What numbers that are not finite raise, and what solving equations with them does."""

_LOG = logging.getLogger(__name__)

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
    allow_config_change: bool = False,
    max_iterations: int | None = None,
    max_minutes: float | None = None,
    should_stop: Callable[[], bool] = _never,
    progress: Progress = _silent,
) -> Run:
    """Train an agent.

    A run that is stopped, by whatever, is gone on with exactly as if it had not been, but for what the clock says.
    Environments are stepped in processes of their own unless `num_workers` is 0: a script that calls this needs the
    usual `if __name__ == "__main__":`.

    Args:
        config: a config, its settings as a mapping, a YAML file, or the name of an embedded config.
        distribution: tasks of one's own, for all stages or one for each, instead of those that the config names.
        methods: stability methods of one's own, instead of those that the config names.
        run_dir: where results go; `runs/<name of the config>` if None.
        resume: go on with the run in `run_dir`.
        overwrite: throw away the run in `run_dir`.
        allow_config_change: go on with a run though its settings differ from `config`; its earlier ones are kept in
            `config.before_<iteration>.yaml`.
        max_iterations: stop after this many iterations, counted from the first of the run.
        max_minutes: stop at the first iteration that ends later than this.
        should_stop: asked before each iteration; True saves and ends the run.
        progress: called after each iteration and evaluation.

    Returns:
        The run; it is saved at its end, wherever it stopped.

    Raises:
        UserError: the config, the device, the run directory or one that a stage starts from cannot be used.
        RunError: numbers are not finite any more, or the disk cannot be written; the run stays at its last checkpoint.
    """
    default_dir = default_run_dir(config)
    config = as_config(config)
    device = resolve_device(config.device)
    run_dir = (Path(run_dir) if run_dir is not None else default_dir).absolute()  # wherever the process goes
    limits = Limits(
        max_iterations if max_iterations is not None else float("inf"),
        time.monotonic() + 60.0 * max_minutes if max_minutes is not None else float("inf"),
        should_stop,
    )
    with locked(run_dir, resume=resume, overwrite=overwrite):
        distributions = stage_distributions(config, distribution)
        if methods is None:
            methods = [stability.build(method, run_dir) for method in config.stability]
        managers, spaces = stage_managers(config, distributions), common_spaces(distributions)
        if resume:
            start = start_again(config, spaces, device, run_dir, methods, allow_config_change)
        else:
            start = begin(config, spaces, device, run_dir)
        return _Trainer(config, distributions, managers, methods, spaces, start, run_dir, limits, progress).run()


class _Trainer:
    """The state of one run: the agent, its position, and where results go."""

    def __init__(
        self,
        config: RunConfig,
        distributions: Sequence[TaskDistribution],
        managers: Sequence[Manager],
        methods: Sequence[StabilityMethod],
        spaces: Spaces,
        start: Start,
        run_dir: Path,
        limits: Limits,
        progress: Progress,
    ) -> None:
        self.config, self.distributions, self.managers, self.methods = config, distributions, managers, methods
        self.spaces, self.start, self.run_dir, self.limits, self.progress = spaces, start, run_dir, limits, progress
        self.agent, self.position = start.agent, start.position
        self.score = start.score  # of the evaluation in this iteration, if there was one
        self.report: Report | None = None

    def run(self) -> Run:
        config, stages, start = self.config, self.config.stages, self.start
        shown = start.config_text if start.config_is_new else None
        with self._writing():
            tracker = Tracker(self.run_dir, shown, flatten(config.model_dump()), self.position, start.logs)
        with tracker as self.tracker:
            self.score_table = ScoreTable(stages, read_metrics(self.run_dir, len(stages))) if len(stages) > 1 else None
            most = [max_envs(config, stage) for stage in range(len(stages))]
            sources = (
                [UnionOfTasks(self.distributions)] * len(most) if config.control == "joint" else self.distributions
            )
            self.envs = make_stage_envs(sources, most, num_workers(config), config.worker_timeout_s)
            try:
                if start.random_state is not None:
                    set_random_state(start.random_state)
                if start.config_is_new:
                    self._save()
                    with self._writing():
                        write_config(self.run_dir, start.config_text, self.position)  # last: it makes a run of it
                new = self.score_table is not None and self.score_table.empty and not self.position.iteration
                if new and not self.limits.reached(self.position):
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
        for number in range(self.position.stage_iteration, iterations):
            if self.limits.reached(self.position):
                self._save()
                return False
            if number == 0 and stage in self.start.stages:  # what a run stopped before this is saved with is its own
                start_from(self.agent, self.start.stages[stage])
            self._iterate(stage, number)
            if number + 1 == iterations:
                break  # the end of the stage saves and evaluates in any case
            evaluated = (
                bool(config.evaluation.every_iterations) and (number + 1) % config.evaluation.every_iterations == 0
            )
            if evaluated:
                self._evaluate(stage)
            due = (number + 1) % config.checkpoint_every_iterations == 0
            if (due or (evaluated and config.keep_best_checkpoints)) and not self.position.skipped:
                self._save()
        self._save()
        in_use = self._consolidate(stage) if self.score_table is not None else {}
        self._evaluate(stage, in_use, finished=True)
        self.position = replace(self.position, stage=stage + 1, stage_iteration=0)
        self._save()
        return True

    def _iterate(self, stage: int, number: int) -> None:
        """One iteration: sample tasks, collect and adapt, update. Numbers that are not finite undo it."""
        config, manager, began = self.config, self.managers[stage], time.perf_counter()
        restarts, before = self._restarts(), {name: value.clone() for name, value in self.agent.state_dict().items()}
        rng = np.random.default_rng(seeds(config.seed, Purpose.TASKS, stage, number))
        root = seeds(config.seed, Purpose.ROLLOUTS, stage, number)
        rollouts, error = self._try_to_collect(stage, number, rng, root)
        collected = time.perf_counter()
        metrics = {"train/dropped_episodes": float(sum(_dropped(rollout) for rollout in rollouts))}
        if error is None:
            metrics |= rollout_metrics(rollouts)
            try:
                metrics |= self._update(stage, number, rollouts)
            except NOT_FINITE as found:
                error = found
                self.agent.load_state_dict(before)
        metrics["train/skipped_updates"] = float(error is not None)
        if config.stages[stage].curriculum.iterations:
            metrics["train/task_fraction"] = manager.fraction(number)
        ended, env_steps = time.perf_counter(), _env_steps(rollouts)
        metrics["time/env_steps_per_second"] = env_steps / (ended - began)
        metrics["time/update_fraction"] = (ended - collected) / (ended - began)
        metrics["time/iteration_seconds"] = ended - began
        metrics["time/worker_restarts"] = float(self._restarts() - restarts)
        steps, skipped = self.position.env_steps + env_steps, 0 if error is None else self.position.skipped + 1
        self.position = Position(stage, number + 1, self.position.iteration + 1, steps, skipped)
        self.score = None
        self._track(metrics)
        if error is not None:
            _LOG.warning("metarl: iteration %d was undone: %s", self.position.iteration, str(error))
            if skipped >= MOST_SKIPPED:
                self._give_up(error, rollouts)
        del error  # its traceback holds this frame and the update's: their tensors would live until the next collection

    def _restarts(self) -> int:
        different = {id(envs): envs for envs in self.envs}
        return sum(getattr(envs, "restarts", 0) for envs in different.values())

    def _give_up(self, error: Exception, rollouts: Sequence[Rollout]) -> NoReturn:
        """Stop, with the run as it was at its last checkpoint."""
        with self._writing():
            path = write_statistics(self.run_dir, self.position, error, self.agent, rollouts)
        raise RunError(
            f"stopped at iteration {self.position.iteration}: {error}; so it was {MOST_SKIPPED} times in a row. "
            f"{path} has the statistics of the batch. The run is kept as of its last checkpoint: go on with --resume "
            "--allow-config-change and smaller steps"
        ) from error

    def _try_to_collect(
        self, stage: int, number: int, rng: np.random.Generator, root: np.random.SeedSequence
    ) -> tuple[Sequence[Rollout], Exception | None]:
        """Sample the tasks of an iteration; collect and adapt. If too many episodes broke, what there is, and why."""
        tasks = self.managers[stage].sample(self.config.num_tasks, rng, number)
        try:
            return adapt_and_collect(
                self.envs[stage],
                self.agent,
                tasks,
                self.config.rollouts_per_task,
                children(root, len(tasks)),
                self.agent.training_adaptation_steps,
            ), None
        except BrokenRolloutsError as error:
            return [error.rollout], error
        except NOT_FINITE as error:
            return [], error

    def _update(self, stage: int, number: int, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """The outer step, under guard; raises FloatingPointError if it leads to numbers that are not finite."""
        before = {name: value.detach().clone() for name, value in self.agent.parameters().items()}
        asked, observing = (
            np.random.default_rng(seeds(self.config.seed, Purpose.STABILITY, stage, number, use)) for use in (0, 1)
        )
        auxiliary_loss = stability.StabilityLoss(self.methods, self.agent, asked) if self.methods else None
        metrics = self.agent.update(rollouts, auxiliary_loss) | (
            auxiliary_loss.metrics() if auxiliary_loss is not None else {}
        )
        broken = not_finite(self.agent.state_dict())
        if broken:
            raise FloatingPointError(
                f"the update made {', '.join(broken)} NaN or infinite; lower the agent's step size"
            )
        for method, rng in zip(self.methods, observing.spawn(len(self.methods)), strict=True):
            with self._writing():  # replayed trials may lie on disk
                method.observe(self.agent, rollouts, before, rng)
        return metrics

    def _consolidate(self, stage: int) -> dict[str, float]:
        """Collect fresh rollouts at the end of a stage, for the methods and to see how much of the network is in use.

        They count as environment steps, with or without methods. If numbers are not finite, others are collected.
        """
        iterations, others_follow = self.config.stages[stage].iterations, stage + 1 < len(self.config.stages)
        left = dict(enumerate(self.methods)) if others_follow else {}
        for attempt in range(MOST_SKIPPED):
            tasks, root, use = (
                seeds(self.config.seed, Purpose.CONSOLIDATION, stage, 3 * attempt + part) for part in range(3)
            )
            rollouts, error = self._try_to_collect(stage, iterations, np.random.default_rng(tasks), root)
            self.position = replace(self.position, env_steps=self.position.env_steps + _env_steps(rollouts))
            rngs = np.random.default_rng(use).spawn(len(self.methods))
            for place, method in list(left.items()) if error is None else []:
                try:
                    with self._writing():
                        method.end_stage(self.agent, rollouts, rngs[place])
                    del left[place]
                except NOT_FINITE as found:
                    error = found
            if error is None:
                return plasticity(self.agent, rollouts)
            _LOG.warning("metarl: the end of stage %d came to nothing: %s", stage, error)
            last = error
        self._give_up(last, rollouts)

    def _evaluate(self, stage: int, metrics: Mapping[str, float] | None = None, finished: bool = False) -> None:
        """Evaluate on held-out tasks: of this stage, or of all if there are several.

        If the episodes break training goes on without.
        """
        began = time.perf_counter()
        try:
            reports = self._reports() if self.score_table is not None else [self._report(stage)]
        except NOT_FINITE as error:
            _LOG.warning("metarl: no evaluation after iteration %d: %s", self.position.iteration, error)
            if metrics:
                with self._writing():
                    self.tracker.write(self.position, metrics)
            return
        self.report = reports[stage if self.score_table is not None else 0]
        self.score = _score(reports)
        found = {**(metrics or {}), **held_out_metrics(self.report)}
        if self.score_table is not None:
            place = {"iteration": self.position.iteration, "stage": stage, "env_steps": self.position.env_steps}
            found |= self.score_table.add(place, reports, stage + finished)
            if finished:
                with self._writing():
                    continual = self.score_table.write(self.run_dir / "evaluation" / "continual.json", stage + 1)
                self.report = {**self.report, "continual": continual}
                for phase, name in (("post", "continual/score_matrix"), ("pre", "continual/score_matrix_pre")):
                    image = score_matrix_image(self.score_table.matrix(stage + 1, phase), self.score_table.names)
                    with self._writing():
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
        with self._writing():
            self.tracker.write(self.position, metrics)
        self.progress(self.position, metrics)

    def _save(self) -> None:
        states = {
            "agent": self.agent.state_dict(),
            "stability": stability.state_dict(self.methods),
            "random": random_state(),
        }
        with self._writing():
            save(
                self.run_dir / "checkpoints",
                states,
                self.position,
                self.spaces,
                self.config.keep_checkpoints,
                keep_best=self.config.keep_best_checkpoints,
                score=self.score,
                config_sha256=hash_of(self.start.config_text.encode()),
                logs=self.tracker.sync(),
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"cannot write to {self.run_dir}: {error}; its checkpoints are as they were: make room and go on with "
                "--resume"
            ) from error


@dataclass(frozen=True)
class Limits:
    """Where a run stops before its end: at an iteration, at a time of `time.monotonic()`, or when asked to."""

    iteration: float
    deadline: float
    asked: Callable[[], bool]

    def reached(self, position: Position) -> bool:
        """Whether the run stops before its next iteration."""
        return position.iteration >= self.iteration or time.monotonic() >= self.deadline or self.asked()


def _env_steps(rollouts: Sequence[Rollout]) -> int:
    return sum(rollout.env_steps for rollout in rollouts)


def _dropped(rollout: Rollout) -> int:
    return int(rollout.episode_returns().isnan().sum())


def _score(reports: Sequence[Report]) -> float | None:
    """Return by what checkpoints are compared: success after adaptation, or return without it; of stages their mean.

    None: episodes of an evaluation broke, so that there is neither.
    """
    for kind in ("success_post", "return_post"):
        if all(kind in report["aggregate"] for report in reports):
            return float(np.mean([report["aggregate"][kind]["mean"] for report in reports]))
    return None


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return the scalars of an iteration's K + 1 rollouts: means over all tasks, dropped rollouts left out."""
    measures = Rollout.episode_returns, Rollout.episode_success
    returns, success = (per_phase(rollouts, measure).nanmean(0).tolist() for measure in measures)
    metrics = {"meta_train/return_pre": returns[0], "meta_train/return_post": returns[-1]}
    metrics |= {"meta_train/success_pre": success[0], "meta_train/success_post": success[-1]}
    metrics |= {f"adaptation/return_after_{k}": value for k, value in enumerate(returns)}
    return metrics
