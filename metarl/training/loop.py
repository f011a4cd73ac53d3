"""The training loop: one for meta-training and for sequences of stages.

    for stage in stages:                                  # meta-RL is one stage; continual learning is several
        for iteration in range(stage.iterations):
            tasks    = manager.sample(M)                       # with a curriculum, from the easiest to all
            rollouts = adapt_and_collect(collector, agent, tasks, N)      # K + 1 rollouts, adapting in between
            metrics  = agent.update(tasks, rollouts, auxiliary_loss)      # the outer step
            stability.observe(agent, rollouts); tracker.write(metrics); checkpoint.save(…)
        stability.end_stage(agent, fresh rollouts)             # if stages follow
        evaluate every stage                                   # one row of the score matrix

It knows agents, environments and stability methods by their Protocols alone.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
from safetensors import SafetensorError
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # torch does not say that it is public

from metarl import stability
from metarl.build import local_collectors, resolve_device, stage_distributions, with_custom_agent
from metarl.collect import BrokenRolloutsError, adapt_and_collect, per_phase
from metarl.config.schema import RunConfig, as_config, hash_of
from metarl.continual.network_use import network_use
from metarl.deploy.policy import Policy
from metarl.errors import RunError
from metarl.evaluation import Report
from metarl.nn.torch_settings import default_torch_settings
from metarl.protocols import (
    Agent,
    AgentBuilder,
    Collector,
    ProtectedAgent,
    StabilityMethod,
    StoresData,
    TaskDistribution,
)
from metarl.runs.checkpoint import save
from metarl.runs.data_store import DATA, DataStore
from metarl.runs.directory import flatten, folder_id, write_config
from metarl.runs.divergence import not_finite, write_statistics
from metarl.runs.lock import default_run_dir, locked
from metarl.runs.random_state import random_state, set_random_state
from metarl.runs.tracking import Tracker, read_metrics
from metarl.seeding import Purpose, children, seeds
from metarl.training.setup import RunParts, Start, begin, check_protected, prepare
from metarl.training.setup import resume as restore_run
from metarl.training.stage_evaluation import StageEvaluation
from metarl.training.warm_start import start_from
from metarl.types import Position, Rollout, Task

MAX_SKIPPED = 3
"""Abort after this many consecutive iterations whose numbers are not finite."""

NOT_FINITE = (FloatingPointError, LinAlgError)
"""What numbers that are not finite raise, and solvers that meet them."""

_LOG = logging.getLogger(__name__)

Progress = Callable[[Position, Mapping[str, float]], None]
"""Called after every iteration and every evaluation, with the metrics that were tracked."""

Collectors = Callable[[RunConfig, Sequence[TaskDistribution]], Sequence[Collector]]
"""Returns the collector of each stage, for the tasks of each stage; stages may share one."""


@dataclass(frozen=True)
class Run:
    """A training run, finished or stopped.

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


@default_torch_settings()
def train(
    config: RunConfig | Mapping[str, Any] | str | Path,
    distribution: TaskDistribution | Sequence[TaskDistribution] | None = None,
    *,
    agent: AgentBuilder | None = None,
    methods: Sequence[StabilityMethod] | None = None,
    collectors: Collectors = local_collectors,
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

    An interrupted run resumes bit for bit, except for wall-clock metrics. Environments are stepped in worker processes
    unless `num_workers` is 0: a script that calls this needs the usual `if __name__ == "__main__":`.

    Args:
        config: a config, its settings as a mapping, a YAML file, or the name of an embedded config.
        distribution: custom tasks, for all stages or one for each, instead of those that the config names.
        agent: builds a custom agent from an `AgentSpec`, instead of the agent that the config names.
        methods: custom stability methods, instead of those that the config names.
        collectors: returns what collects the rollouts of each stage; by default this process and its workers.
        run_dir: where results go; `runs/<name of the config>` if None.
        resume: resume the run in `run_dir`.
        overwrite: overwrite the run in `run_dir`.
        allow_config_change: resume a run though its settings differ from `config`; the earlier settings are kept in
            `config.before_<iteration>.yaml`.
        max_iterations: stop after this many iterations, counted from the first of the run.
        max_minutes: stop at the first iteration that ends later than this.
        should_stop: called before each iteration; True saves and ends the run.
        progress: called after each iteration and evaluation.

    Returns:
        The run, saved wherever it stopped.

    Raises:
        UserError: the config, the device, the run directory or one that a stage starts from cannot be used.
        RunError: numbers are not finite any more, the disk cannot be written or the run's folder has gone; the run
            stays at its last checkpoint. Or the run has ended, and all of its iterations were undone.
    """
    default_dir = default_run_dir(config)
    config = as_config(config)
    if agent is not None:
        config = with_custom_agent(config)
    device = resolve_device(config.device)
    run_dir = (Path(run_dir) if run_dir is not None else default_dir).absolute()  # wherever the process goes
    limits = Limits(
        max_iterations if max_iterations is not None else float("inf"),
        time.monotonic() + 60.0 * max_minutes if max_minutes is not None else float("inf"),
        should_stop,
    )
    with locked(run_dir, resume=resume, overwrite=overwrite):
        parts = prepare(config, stage_distributions(config, distribution), methods, run_dir)
        if resume:
            start = restore_run(config, parts, device, run_dir, allow_config_change, agent)
        else:
            start = begin(config, parts.spaces, device, run_dir, agent)
        check_protected(start.agent, parts.methods)
        with contextlib.ExitStack() as opened:
            loop = _Loop(config, parts, start, run_dir, limits, progress, collectors, opened)
            loop.run()
    done = loop.position.stage == len(config.stages)
    if done and loop.position.skipped == loop.position.iteration:
        raise RunError(
            f"nothing was learned: all {loop.position.iteration} iterations were undone, since numbers were not "
            "finite; mend the environment, or take smaller steps"
        )
    state = loop.agent.initial_state(1)
    policy = Policy(config, loop.agent, parts.spaces, loop.position.env_steps, state, builder=agent)
    return Run(run_dir, policy, loop.report, finished=done)


class _Loop:
    """The state of one run: the agent, its position, and where results go.

    Args:
        config: of the run.
        parts: its tasks, env managers and stability methods.
        start: a new agent, or what a checkpoint holds.
        run_dir: where results go.
        limits: where it stops before its end.
        progress: called with what was tracked.
        collectors: returns the collector of each stage.
        opened: closes what the loop opens.
    """

    def __init__(
        self,
        config: RunConfig,
        parts: RunParts,
        start: Start,
        run_dir: Path,
        limits: Limits,
        progress: Progress,
        collectors: Collectors,
        opened: contextlib.ExitStack,
    ) -> None:
        self.config, self.parts, self.start, self.run_dir = config, parts, start, run_dir
        self.limits, self.progress = limits, progress
        self.agent: Agent = start.agent
        self.position = start.position
        self.score = start.score  # of the evaluation in this iteration, if there was one
        self.report: Report | None = None
        self.folder_id = folder_id(run_dir)
        self.store = DataStore(run_dir / DATA, start.data)
        shown = start.config_text if start.config_is_new else None
        with self._writing():
            tracker = Tracker(run_dir, shown, flatten(config.model_dump()), self.position, start.logs)
        self.tracker = opened.enter_context(tracker)
        lines = read_metrics(run_dir, len(config.stages)) if len(config.stages) > 1 else []
        self.collectors = list(collectors(config, parts.training_sources))
        for collector in self.collectors:
            opened.callback(collector.close)
        self.evaluation = StageEvaluation(config, parts.distributions, self.collectors, lines)

    def run(self) -> None:
        """Run the loop of the module's docstring, from where the run stands to its end or a limit."""
        self._begin()
        for stage in range(self.position.stage, len(self.config.stages)):
            iterations = self.config.stages[stage].iterations
            for number in range(self.position.stage_iteration, iterations):
                if self.limits.reached(self.position):
                    return self._save()
                if number == 0 and stage in self.start.stages:  # a run stopped before this is saved with its own agent
                    start_from(self.agent, self.start.stages[stage])
                self._iterate(stage, number)
                if number + 1 < iterations:  # the end of the stage saves and evaluates in any case
                    self._evaluate_and_save_if_due(stage, number + 1)
            self._save()
            in_use = self._end_stage(stage) if len(self.config.stages) > 1 else {}
            self._evaluate(stage, in_use, finished=True)
            self.position = replace(self.position, stage=stage + 1, stage_iteration=0)
            self._save()

    def _begin(self) -> None:
        """Make a run of the directory, and evaluate the stages of a new sequence before training."""
        if self.start.random_state is not None:
            set_random_state(self.start.random_state)
        if self.start.config_is_new:
            self._save()
            with self._writing():
                write_config(self.run_dir, self.start.config_text, self.position)  # last: it makes a run of it
        if self.evaluation.wanted_before_training(self.position) and not self.limits.reached(self.position):
            self._evaluate(0)

    def _iterate(self, stage: int, number: int) -> None:
        """One iteration: sample tasks, collect and adapt, update. Numbers that are not finite undo it."""
        config, began, restarts = self.config, time.perf_counter(), self._restarts()
        before = {name: value.clone() for name, value in self.agent.state_dict().items()}
        rng = np.random.default_rng(seeds(config.seed, Purpose.TASKS, stage, number))
        root = seeds(config.seed, Purpose.ROLLOUTS, stage, number)
        tasks, rollouts, error = self._try_to_collect(stage, number, rng, root)
        collected = time.perf_counter()
        metrics = {"train/dropped_episodes": float(sum(_dropped(rollout) for rollout in rollouts))}
        if error is None:
            metrics |= rollout_metrics(rollouts)
            try:
                metrics |= self._update(stage, number, tasks, rollouts)
            except NOT_FINITE as found:
                error = found
                self.agent.load_state_dict(before)
        metrics["train/skipped_updates"] = float(error is not None)
        if config.stages[stage].curriculum.iterations:
            metrics["train/task_fraction"] = self.parts.managers[stage].fraction(number)
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
            if skipped >= MAX_SKIPPED:
                self._give_up(error, rollouts)
        del error  # its traceback holds this frame and the update's: their tensors would live until the next collection

    def _update(self, stage: int, number: int, tasks: Sequence[Task], rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Take the outer step and let stability methods observe it; raises FloatingPointError if it is not finite."""
        methods, agent = self.parts.methods, cast(ProtectedAgent, self.agent)
        before = {name: value.detach().clone() for name, value in agent.parameters().items()}
        loss_rng, observe_rng = (
            np.random.default_rng(seeds(self.config.seed, Purpose.STABILITY, stage, number, use)) for use in (0, 1)
        )
        auxiliary_loss = stability.StabilityLoss(methods, agent, loss_rng) if methods else None
        metrics = agent.update(tasks, rollouts, auxiliary_loss)
        if auxiliary_loss is not None:
            metrics |= auxiliary_loss.metrics()
        broken = not_finite(agent.state_dict())
        if broken:
            raise FloatingPointError(
                f"the update made {', '.join(broken)} NaN or infinite; lower the agent's step size"
            )
        for method, rng in zip(methods, observe_rng.spawn(len(methods)), strict=True):
            with self._writing():  # replayed trials may lie on disk
                method.observe(agent, rollouts, before, rng)
        return metrics

    def _end_stage(self, stage: int) -> dict[str, float]:
        """Collect fresh rollouts; consolidate if stages follow; return how much of the network is in use.

        The rollouts count as environment steps, with or without methods. If numbers are not finite, others are
        collected.
        """
        iterations, stages_follow = self.config.stages[stage].iterations, stage + 1 < len(self.config.stages)
        left, agent = dict(enumerate(self.parts.methods)) if stages_follow else {}, cast(ProtectedAgent, self.agent)
        for attempt in range(MAX_SKIPPED):
            tasks, root, use = (
                seeds(self.config.seed, Purpose.CONSOLIDATION, stage, 3 * attempt + part) for part in range(3)
            )
            _, rollouts, error = self._try_to_collect(stage, iterations, np.random.default_rng(tasks), root)
            self.position = replace(self.position, env_steps=self.position.env_steps + _env_steps(rollouts))
            rngs = np.random.default_rng(use).spawn(len(self.parts.methods))
            for place, method in list(left.items()) if error is None else []:
                try:
                    with self._writing():
                        method.end_stage(agent, rollouts, rngs[place])
                    del left[place]
                except NOT_FINITE as found:
                    error = found
            if error is None:
                try:
                    return network_use(agent, rollouts) if hasattr(agent, "hidden_units") else {}
                except ValueError as found:  # activations that are not finite
                    error = found
            _LOG.warning("metarl: the end of stage %d failed and is tried again: %s", stage, error)
            last = error
        self._give_up(last, rollouts)

    def _try_to_collect(
        self, stage: int, number: int, rng: np.random.Generator, root: np.random.SeedSequence
    ) -> tuple[Sequence[Task], Sequence[Rollout], Exception | None]:
        """Sample the tasks of an iteration; collect and adapt. If too many episodes broke: the rest, and why."""
        tasks = self.parts.managers[stage].sample(self.config.num_tasks, rng, number)
        rollouts_per_task, steps = self.config.rollouts_per_task, self.agent.training_adaptation_steps
        task_seeds = children(root, len(tasks))
        try:
            rollouts = adapt_and_collect(
                self.collectors[stage], self.agent, tasks, rollouts_per_task, task_seeds, steps
            )
            return tasks, rollouts, None
        except BrokenRolloutsError as error:
            return tasks, [error.rollout], error
        except NOT_FINITE as error:
            return tasks, [], error

    def _evaluate_and_save_if_due(self, stage: int, done: int) -> None:
        """Evaluate and save after an iteration, each as often as the config says."""
        config, every = self.config, self.config.evaluation.every_iterations
        evaluated = bool(every) and done % every == 0
        if evaluated:
            self._evaluate(stage)
        due = done % config.checkpoint_every_iterations == 0
        if (due or (evaluated and config.keep_best_checkpoints)) and not self.position.skipped:
            self._save()

    def _evaluate(self, stage: int, metrics: Mapping[str, float] | None = None, finished: bool = False) -> None:
        """Evaluate on held-out tasks and track it; if too many episodes break, training continues."""
        began = time.perf_counter()
        try:
            result = self.evaluation.evaluate(self.agent, self.position, stage, finished)
        except NOT_FINITE as error:
            _LOG.warning("metarl: no evaluation after iteration %d: %s", self.position.iteration, error)
            if metrics:
                with self._writing():
                    self.tracker.write(self.position, metrics)
            return
        self.report, self.score = result.report, result.score
        with self._writing():
            if finished:
                self.report = self.evaluation.write(self.run_dir, result.report, stage + 1)
            for name, image in result.images.items():
                self.tracker.write_image(self.position, name, image)
        seconds = {"time/evaluation_seconds": time.perf_counter() - began}
        self._track({**(metrics or {}), **result.metrics, **seconds})

    def _restarts(self) -> int:
        return sum(collector.restarts for collector in {id(each): each for each in self.collectors}.values())

    def _give_up(self, error: Exception, rollouts: Sequence[Rollout]) -> NoReturn:
        """Stop, with the run as it was at its last checkpoint."""
        with self._writing():
            path = write_statistics(self.run_dir, self.position, error, self.agent, rollouts)
        raise RunError(
            f"stopped at iteration {self.position.iteration}: {error}; this was so {MAX_SKIPPED} times in a row. "
            f"{path} has the statistics of the batch. The run stays at its last checkpoint: use --resume "
            "--allow-config-change and smaller steps"
        ) from error

    def _track(self, metrics: Mapping[str, float]) -> None:
        with self._writing():
            self.tracker.write(self.position, metrics)
        self.progress(self.position, metrics)

    def _save(self) -> None:
        states = {
            "agent": self.agent.state_dict(),
            "stability": stability.state_dict(self.parts.methods),
            "random": random_state(),
        }
        if folder_id(self.run_dir) != self.folder_id:
            raise RunError(
                f"{self.run_dir} was moved, renamed or removed while its run trained; the last checkpoint is where the "
                "folder went: use --resume there"
            )
        checkpoints, stores_data = self.run_dir / "checkpoints", isinstance(self.agent, StoresData)
        with self._writing():
            data = self.store.entries(self.agent.save_data(self.store)) if isinstance(self.agent, StoresData) else {}
            save(
                checkpoints,
                states,
                self.position,
                self.parts.spaces,
                self.config.keep_checkpoints,
                keep_best=self.config.keep_best_checkpoints,
                score=self.score,
                config_sha256=hash_of(self.start.config_text.encode()),
                logs=self.tracker.sync(),
                data=data,
            )
            if stores_data:
                self.store.remove_unused(checkpoints)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"cannot write to {self.run_dir}: {error}; its checkpoints are as they were: make room and use --resume"
            ) from error


@dataclass(frozen=True)
class Limits:
    """Where a run stops before its end: at an iteration, at a time of `time.monotonic()`, or on request."""

    iteration: float
    deadline: float
    requested: Callable[[], bool]

    def reached(self, position: Position) -> bool:
        """Whether the run stops before its next iteration."""
        return position.iteration >= self.iteration or time.monotonic() >= self.deadline or self.requested()


def _env_steps(rollouts: Sequence[Rollout]) -> int:
    return sum(rollout.env_steps for rollout in rollouts)


def _dropped(rollout: Rollout) -> int:
    return int(rollout.episode_returns().isnan().sum())


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return the scalars of an iteration's K + 1 rollouts: means over all tasks, dropped rollouts left out."""
    measures = Rollout.episode_returns, Rollout.episode_success
    returns, success = (per_phase(rollouts, measure).nanmean(0).tolist() for measure in measures)
    metrics = {"meta_train/return_pre": returns[0], "meta_train/return_post": returns[-1]}
    metrics |= {"meta_train/success_pre": success[0], "meta_train/success_post": success[-1]}
    metrics |= {f"adaptation/return_after_{k}": value for k, value in enumerate(returns)}
    return metrics
