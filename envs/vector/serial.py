"""Vectorised environments: stepped in turn in this process, in worker processes, or as one computation.

Neither the results nor their order depends on the number of workers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metarl.envs.vector.pool import LANES, POOL, Buffers, EnvPool, env_spaces
from metarl.envs.vector.workers import WORKER_TIMEOUT, WorkerEnvs
from metarl.protocols import BatchEnv, TaskDistribution
from metarl.types import BoolArray, Step, Task


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


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the number of cores that this process may use, at least 1.

    Args:
        cgroup: the folder of the control group, whose quota on processor time counts (containers have one).
    """
    visible = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(visible, _quota(cgroup))))


def _quota(cgroup: Path) -> float:
    """Return how many cores a control group may keep busy: infinity without a limit (version 2, then version 1)."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return math.inf
    return int(quota) / int(period) if quota.strip() not in ("max", "-1") else math.inf


class SerialEnvs:
    """Environments stepped in turn in this process; a `BatchEnv`.

    Args:
        distribution: the task distribution, which builds the environments.
        max_envs: the maximum number of environments.
    """

    lanes = LANES

    def __init__(self, distribution: TaskDistribution, max_envs: int) -> None:
        self.max_envs = max_envs
        self.spaces = env_spaces(distribution)
        shapes = Buffers.shapes(max_envs, self.spaces)
        self._buffers = Buffers(**{name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()})
        self._pool = EnvPool(distribution, self.spaces, self._buffers, max(max_envs, POOL))

    def reset(self, tasks: Sequence[Task], seeds: NDArray[np.uint32]) -> NDArray[Any]:
        """See `BatchEnv.reset`."""
        self._pool.assign(tasks)
        self._pool.reset(seeds)
        return self._buffers.observations[: len(tasks)]

    def step_async(self, rows: slice, actions: NDArray[np.float32], active: BoolArray) -> None:
        """See `BatchEnv.step_async`."""
        self._buffers.actions[rows], self._buffers.active[rows] = actions, active
        self._pool.step(rows.start, rows.stop)

    def step_wait(self, rows: slice) -> Step:
        """See `BatchEnv.step_wait`."""
        return self._buffers.step(rows)

    def close(self) -> None:
        """See `BatchEnv.close`."""
        self._pool.close()
