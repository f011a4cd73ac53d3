"""Vectorised environments: stepped in turn in this process, in worker processes, or as one computation.

Neither the results nor their order depends on the number of workers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from metarl.envs.vector.pool import LANES, POOL, Buffers, EnvPool, env_spaces
from metarl.envs.vector.workers import WORKER_TIMEOUT, WorkerEnvs
from metarl.protocols import BatchEnv, TaskDistribution
from metarl.types import BoolArray, FloatArray, Step, Task


def make_envs(
    distribution: TaskDistribution, max_envs: int, num_workers: int, worker_timeout_s: float = WORKER_TIMEOUT
) -> BatchEnv:
    """Return a `BatchEnv` for the tasks of a distribution.

    Args:
        distribution: the task distribution. If it has a method `make_batch(max_envs)`, its environments are stepped as
            one computation, without workers.
        max_envs: the maximum number of environments stepped together.
        num_workers: the number of worker processes; 0 steps in this process.
        worker_timeout_s: seconds without progress after which a worker counts as hung and is restarted.
    """
    make_batch = getattr(distribution, "make_batch", None)
    if make_batch is not None:
        batch: BatchEnv = make_batch(max_envs)
        return batch
    if num_workers == 0:
        return SerialEnvs(distribution, max_envs)
    return WorkerEnvs(distribution, max_envs, min(num_workers, max_envs), worker_timeout_s)


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class SerialEnvs:
    """Environments stepped in turn in this process; a `BatchEnv`.

    Args:
        distribution: the task distribution, which builds the environments.
        max_envs: the maximum number of environments.
    """

    lanes = LANES

    def __init__(self, distribution: TaskDistribution, max_envs: int) -> None:
        self.max_envs = max_envs
        self.observation_space, self.action_space = env_spaces(distribution)
        shapes = Buffers.shapes(max_envs, self.observation_space.shape[0], self.action_space.shape[0])
        self._buffers = Buffers(**{name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()})
        self._pool = EnvPool(distribution, self._buffers, max(max_envs, POOL))

    def reset(self, tasks: Sequence[Task], seeds: NDArray[np.uint32]) -> FloatArray:
        """See `BatchEnv.reset`."""
        self._pool.assign(tasks)
        self._pool.reset(seeds)
        return self._buffers.observations[: len(tasks)]

    def step_async(self, rows: slice, actions: FloatArray, active: BoolArray) -> None:
        """See `BatchEnv.step_async`."""
        self._buffers.actions[rows], self._buffers.active[rows] = actions, active
        self._pool.step(rows.start, rows.stop)

    def step_wait(self, rows: slice) -> Step:
        """See `BatchEnv.step_wait`."""
        return self._buffers.step(rows)

    def close(self) -> None:
        """See `BatchEnv.close`."""
        self._pool.close()
