"""Single-task references: stable-baselines3's PPO or SAC, trained from scratch on single tasks.

A meta-learner's result after a few episodes is compared with that of a whole training run. Finished tasks are cached
in JSON files. Knows tasks and environments; must not import metarl's agents, policies or training.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import math
import os
import random
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import Logger

from metarl import statistics
from metarl.collect import run_episode
from metarl.envs import make as make_env
from metarl.errors import UserError, unknown_name
from metarl.seeding import Purpose, seeds
from metarl.settings import Settings
from metarl.spaces import CheckedEnv
from metarl.types import Task

Make = Callable[[Task], gymnasium.Env[Any, Any]]

HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "ppo": {
        **{"learning_rate": 3e-4, "n_steps": 2048, "batch_size": 64, "n_epochs": 10, "gamma": 0.99, "gae_lambda": 0.95},
        **{"clip_range": 0.2, "ent_coef": 0.0, "vf_coef": 0.5, "max_grad_norm": 0.5},
        "policy_kwargs": {"net_arch": [64, 64]},
    },
    "sac": {
        **{"learning_rate": 3e-4, "buffer_size": 1_000_000, "learning_starts": 100, "batch_size": 256, "tau": 0.005},
        **{"gamma": 0.99, "train_freq": 1, "gradient_steps": 1, "ent_coef": "auto"},
        "policy_kwargs": {"net_arch": [256, 256]},
    },
}
"""stable-baselines3's defaults, written out: close to those of Schulman et al. 2017 and Haarnoja et al. 2018 for
MuJoCo, with one environment. Neither observations nor rewards are normalised."""

CURVE_POINTS = 10
"""Maximum number of evaluations during and after training; one more comes before training."""

_ALGORITHMS: dict[str, type[BaseAlgorithm]] = {"ppo": PPO, "sac": SAC}
_FORMAT = 1  # of the cache; increase it when the computation of scores changes
_LIBRARIES = ("metarl", "stable-baselines3", "torch", "numpy", "gymnasium", "mujoco", "metaworld")
_LOG = logging.getLogger(__name__)


class _Curve(Settings):
    """The cached learning curve of a task: one value per evaluation, the first before and the last after training."""

    env_steps: list[int]
    returns: list[float]
    success: list[float | None]


def reference(
    tasks: Sequence[Task],
    algorithm: str = "ppo",
    env_steps: int = 100_000,
    *,
    eval_episodes: int = 10,
    seed: int = 0,
    cache: str | Path | None = None,
    make: Make = make_env,
    progress: Callable[[int, Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train a fresh agent on each task alone, on the CPU, and evaluate it before, during and after training.

    Evaluations sample actions, as in metarl's other reports. They use the same seeds at every point of the curve and do
    not affect training. Global random generators are restored.

    Args:
        tasks: the tasks to train on, e.g. some of a distribution's `test_tasks`.
        algorithm: `ppo` or `sac`, with `HYPERPARAMETERS`.
        env_steps: training steps per task; for PPO rounded up to whole rollouts of `n_steps`.
        eval_episodes: episodes per evaluation.
        seed: the seed of networks, episodes and intervals.
        cache: the folder for finished tasks, created if missing; None for no cache. A file's name is a hash of
            everything that the scores depend on except `make`: use a separate folder for each `make`.
        make: builds the environment of a task; required for custom tasks.
        progress: called with the number of finished tasks and the last one's entry in the report.

    Returns:
        `{"algorithm", "hyperparameters", "env_steps", "eval_episodes", "seed", "versions", "tasks": [{"name", "index",
        "task": the Task, "curve": {"env_steps": [0, …], "returns": […], "success": […]}, "return_untrained",
        "return_final", "success_untrained", "success_final"}], "aggregate": {"return_final": {"mean", "iqm", "ci95":
        [low, high], "iqm_ci95"}, …}}`. Success is the fraction of episodes solved at any step; null where a task does
        not define it, and left out of the aggregates.

    Raises:
        UserError: unknown algorithm, too few `env_steps`, spaces that the algorithm does not support, or `cache` cannot
            be written.
        ValueError: no task or no episode.
        RuntimeError: more than half of an evaluation's episodes diverged.
    """
    if not tasks or eval_episodes < 1:
        raise ValueError(f"got {len(tasks)} tasks and eval_episodes {eval_episodes}; expected at least one of each")
    settings = {**_settings(algorithm, env_steps), "eval_episodes": eval_episodes, "seed": seed}
    folder = _writable(Path(cache)) if cache is not None else None
    rows: list[dict[str, Any]] = []
    for task in tasks:
        key = {"format": _FORMAT, "curve_points": CURVE_POINTS, **settings, "task": json.loads(task.to_json())}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        path = folder / f"{digest[:32]}.json" if folder else None
        curve = _read(path, key) if path else None
        if curve is None:
            curve = _train(task, settings, make)
            if path:
                _write(path, json.dumps({"key": key, "curve": curve.model_dump()}))
        row = {"name": task.name, "index": task.index, "task": key["task"], "curve": curve.model_dump()}
        row |= {"return_untrained": curve.returns[0], "return_final": curve.returns[-1]}
        row |= {"success_untrained": curve.success[0], "success_final": curve.success[-1]}
        rows.append(row)
        if progress:
            progress(len(rows), row)
    return {**settings, "tasks": rows, "aggregate": _aggregate(rows, seed)}


def _settings(algorithm: str, env_steps: int) -> dict[str, Any]:
    """Return the settings of an algorithm, with `env_steps` as trained, and the versions of libraries."""
    if algorithm not in HYPERPARAMETERS:
        raise UserError(str(unknown_name("algorithm", algorithm, HYPERPARAMETERS, "metarl baseline --help")))
    values = HYPERPARAMETERS[algorithm]
    least = values["n_steps"] if algorithm == "ppo" else values["learning_starts"] + 1
    if env_steps < least:
        raise UserError(
            f"env_steps is {env_steps}; expected at least {least}, since {algorithm} does not learn earlier"
        )
    if algorithm == "ppo":
        env_steps = -(-env_steps // values["n_steps"]) * values["n_steps"]
    versions = {name: version(name) for name in _LIBRARIES}
    return {"algorithm": algorithm, "hyperparameters": {**values}, "env_steps": env_steps, "versions": versions}


def _train(task: Task, settings: Mapping[str, Any], make: Make) -> _Curve:
    """Return the learning curve of a fresh agent on one task."""
    algorithm, env_steps = settings["algorithm"], settings["env_steps"]
    values = copy.deepcopy(settings["hyperparameters"])  # stable-baselines3 modifies `policy_kwargs`
    unit = values.get("n_steps", 1)  # PPO's policy changes only between rollouts
    points = np.unique(np.linspace(0, env_steps // unit, CURVE_POINTS + 1).round().astype(int)) * unit
    if algorithm == "sac":  # a larger buffer would never fill up
        values["buffer_size"] = min(values["buffer_size"], env_steps)
    # The seed depends on the task, not on its index, so that a score does not depend on the other tasks.
    root, number = settings["seed"], zlib.crc32(task.to_json().encode())
    train_seed = int(seeds(root, Purpose.AGENT, number).generate_state(1)[0])
    eval_seeds = seeds(root, Purpose.EVALUATION_ROLLOUTS, number).generate_state(1 + settings["eval_episodes"])
    env, eval_env = (gymnasium.wrappers.TimeLimit(_Guarded(make(task)), task.option("horizon")) for _ in range(2))
    outcomes = []
    with contextlib.closing(env), contextlib.closing(eval_env), _seeded(train_seed):
        try:
            agent = _ALGORITHMS[algorithm]("MlpPolicy", env, seed=train_seed, device="cpu", **values)
        except (AssertionError, ValueError) as error:
            raise UserError(f"{algorithm} cannot be trained on {task.name}: {error}") from error
        agent.set_logger(Logger(None, []))  # the default logger creates a folder
        for point in points.tolist():
            if point:
                agent.learn(point - agent.num_timesteps, reset_num_timesteps=False)
            outcomes.append(_evaluate(agent, eval_env, eval_seeds.tolist()))
    returns, success = zip(*outcomes, strict=True)
    return _Curve(env_steps=points.tolist(), returns=list(returns), success=list(success))


def _evaluate(agent: BaseAlgorithm, env: gymnasium.Env[Any, Any], seeds: Sequence[int]) -> tuple[float, float | None]:
    """Return mean return and success rate over episodes; the first seed is for the actions."""
    outcomes, checked = [], CheckedEnv(env)
    with _seeded(seeds[0]):
        for seed in seeds[1:]:
            total, solved = 0.0, 0.0
            for step in run_episode(checked, lambda observation, *_: agent.predict(observation)[0], seed=seed):
                total += step.reward
                solved = float(np.maximum(solved, step.info.get("success", np.nan)))  # NaN stays NaN
            if not step.info.get("diverged"):
                outcomes.append((total, solved))
    if 2 * len(outcomes) < len(seeds) - 1:
        raise RuntimeError(f"{len(seeds) - 1 - len(outcomes)} of {len(seeds) - 1} episodes of an evaluation diverged")
    defined = [solved for _, solved in outcomes if not math.isnan(solved)]
    return float(np.mean([total for total, _ in outcomes])), float(np.mean(defined)) if defined else None


class _Guarded(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Truncates an episode whose physics diverge at its last finite observation, so that training continues."""

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        self._last, info = self.env.reset(**options)
        return self._last, info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        with contextlib.suppress(FloatingPointError):
            observation, reward, terminated, truncated, info = self.env.step(action)
            if np.isfinite(observation).all() and np.isfinite(float(reward)):
                self._last = observation
                return observation, float(reward), terminated, truncated, info
        return self._last, 0.0, False, True, {"diverged": True}


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global random generators, which stable-baselines3 uses, and use one thread; restore both on exit.

    The last bits of sums depend on the number of threads, and networks this small gain nothing from a second one.
    Unused GPUs are left alone: reading the state of their generators would allocate memory on them.
    """
    python, numpy, threads = random.getstate(), np.random.get_state(), torch.get_num_threads()
    in_use = torch.cuda.device_count() if torch.cuda.is_initialized() else 0  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=range(in_use)):
        try:
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            torch.set_num_threads(1)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_num_threads(threads)


def _aggregate(rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, statistics.Aggregate]:
    rng, aggregate = np.random.default_rng(seeds(seed, Purpose.BOOTSTRAP)), {}
    for measure in ("return_untrained", "return_final", "success_untrained", "success_final"):
        kept = [row for row in rows if row[measure] is not None]
        if kept:
            values = np.array([row[measure] for row in kept])
            aggregate[measure] = statistics.aggregate(values, [row["name"] for row in kept], rng)
    return aggregate


def _read(path: Path, key: Mapping[str, Any]) -> _Curve | None:
    """Return the curve in a cache file; None if the file is missing or, with a warning, if it is damaged."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        if entry["key"] != key:
            raise ValueError("its settings do not match its name")
        curve = _Curve.model_validate(entry["curve"], strict=True)
        ends = curve.env_steps[0], curve.env_steps[-1]
        if ends != (0, key["env_steps"]) or not len(curve.env_steps) == len(curve.returns) == len(curve.success):
            raise ValueError("its curve is incomplete")
    except FileNotFoundError:
        return None
    except (OSError, LookupError, TypeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        _LOG.warning("metarl: %s is damaged and will be recomputed: %s: %s", path, type(error).__name__, reason)
        return None
    return curve


def _write(path: Path, text: str) -> None:
    """Write a file atomically, also if several processes write it at once; it is not synced to disk."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def _writable(folder: Path) -> Path:
    """Create the folder; raises UserError if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another folder with --cache") from error
    return folder
