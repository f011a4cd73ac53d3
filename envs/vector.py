"""Steps many environments: in this process, or in worker processes through shared memory.

What is stepped, and in which order results come back, does not depend on the number of workers. A step costs one short
message a worker and copies no array: observations, actions and rewards lie in memory that all processes share.
Environment i belongs to worker i modulo their number, so that each has its share of every task and of every lane.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import struct
import traceback
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import DTypeLike, NDArray

from metarl.types import BatchEnv, BoolArray, FloatArray, Step, Task, TaskDistribution

LANES = 2
"""While the environments of one lane are stepped, actions are computed for the other (if a task has two episodes)."""

POOL = 400
"""Environments that all processes keep together at least, in use or idle, since building one takes longer than the
memory is worth (3.2 MB for a Meta-World environment, under 1 MB for a MuJoCo one)."""


def make_envs(distribution: TaskDistribution, max_envs: int, num_workers: int) -> BatchEnv:
    """Return a `BatchEnv` for the tasks of a distribution.

    Args:
        distribution: if it has a method `make_batch(max_envs)`, that one steps all environments as one computation.
        max_envs: how many environments are stepped together at most.
        num_workers: processes; 0 steps in this one.
    """
    make_batch = getattr(distribution, "make_batch", None)
    if make_batch is not None:
        batch: BatchEnv = make_batch(max_envs)
        return batch
    if num_workers == 0:
        return SerialEnvs(distribution, max_envs)
    return WorkerEnvs(distribution, max_envs, min(num_workers, max_envs))


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def env_spaces(distribution: TaskDistribution) -> tuple[gymnasium.spaces.Box, gymnasium.spaces.Box]:
    """Return the observation and action space; raises ValueError for any but flat boxes with bounded actions."""
    env = distribution.make(distribution.train_tasks[0])
    observation_space, action_space = env.observation_space, env.action_space
    env.close()
    if not isinstance(observation_space, gymnasium.spaces.Box) or len(observation_space.shape) != 1:
        raise ValueError(f"observation space is {observation_space}; expected a Box of one dimension: flatten it")
    if not isinstance(action_space, gymnasium.spaces.Box) or len(action_space.shape) != 1:
        raise ValueError(f"action space is {action_space}; expected a Box of one dimension")
    if not (np.isfinite(action_space.low).all() and np.isfinite(action_space.high).all()):
        raise ValueError(f"action space is {action_space}; expected finite bounds, to which actions are scaled")
    return observation_space, action_space


@dataclass(frozen=True)
class _Buffers:
    """The arrays that E environments read and write; shared between processes if there are workers."""

    observations: FloatArray  # [E, O]
    actions: NDArray[np.float32]  # [E, A]
    rewards: FloatArray  # [E]
    success: FloatArray  # [E]
    terminated: BoolArray  # [E]
    truncated: BoolArray  # [E]
    active: BoolArray  # [E]

    @staticmethod
    def shapes(envs: int, observation_size: int, action_size: int) -> dict[str, tuple[tuple[int, ...], DTypeLike]]:
        return {
            "observations": ((envs, observation_size), np.float64),
            "actions": ((envs, action_size), np.float32),
            "rewards": ((envs,), np.float64),
            "success": ((envs,), np.float64),
            "terminated": ((envs,), np.bool_),
            "truncated": ((envs,), np.bool_),
            "active": ((envs,), np.bool_),
        }

    @classmethod
    def view(cls, memory: dict[str, Any], shapes: dict[str, tuple[tuple[int, ...], DTypeLike]]) -> _Buffers:
        """Return arrays over `memory`, one writable buffer of bytes each."""
        return cls(
            **{name: np.frombuffer(memory[name], dtype).reshape(shape) for name, (shape, dtype) in shapes.items()}
        )

    def step(self, rows: slice) -> Step:
        """Return views of the environments `rows`."""
        return Step(
            self.observations[rows], self.rewards[rows], self.terminated[rows], self.truncated[rows], self.success[rows]
        )


class _Slots:
    """The environments of one process: those in use, in order, and a pool of idle ones to retarget.

    The process has every `stride`-th of all environments in use, from `first` on.
    """

    def __init__(self, distribution: TaskDistribution, pool_size: int, first: int = 0, stride: int = 1) -> None:
        self._distribution, self._pool_size = distribution, pool_size
        self._first, self._stride = first, stride
        self._used: list[tuple[Task, gymnasium.Env[Any, Any]]] = []
        self._idle: list[tuple[Task, gymnasium.Env[Any, Any]]] = []  # the longest unused first

    def assign(self, tasks: Sequence[Task]) -> None:
        """Have one environment for each task."""
        if [task for task, _ in self._used] == list(tasks):
            return
        for task, env in self._used:
            if hasattr(env.unwrapped, "set_task"):
                self._idle.append((task, env))
            else:
                env.close()
        self._used = []
        for task in tasks:
            self._used.append((task, self._take(task)))
        surplus = max(0, len(self._used) + len(self._idle) - self._pool_size)
        for _, env in self._idle[:surplus]:
            env.close()
        del self._idle[:surplus]

    def _take(self, task: Task) -> gymnasium.Env[Any, Any]:
        kind = (task.family, task.benchmark, task.name, task.options)
        for i, (other, env) in enumerate(self._idle):
            if (other.family, other.benchmark, other.name, other.options) == kind:
                del self._idle[i]
                env.unwrapped.set_task(task)  # type: ignore[attr-defined]
                return env
        return self._distribution.make(task)

    def reset(self, buffers: _Buffers, seeds: NDArray[np.uint32]) -> None:
        """Reset all that this process has, its seeds in order; observations go to `buffers`."""
        for i, (_, env) in enumerate(self._used):
            buffers.observations[self._first + i * self._stride] = env.reset(seed=int(seeds[i]))[0]

    def step(self, buffers: _Buffers, start: int, stop: int) -> None:
        """Step those of `start` to `stop` that are active with the actions in `buffers`; results go there, too."""
        mine = range(self._first, self._first + len(self._used) * self._stride, self._stride)
        skipped = max(0, -(-(start - self._first) // self._stride))
        for i, (_, env) in zip(mine[skipped:], self._used[skipped:], strict=True):
            if i >= stop:
                break
            if buffers.active[i]:
                try:
                    observation, reward, terminated, truncated, info = env.step(buffers.actions[i].copy())
                except FloatingPointError:  # the physics diverged; NaN tells the caller to drop the episode
                    buffers.rewards[i] = np.nan
                    continue
                buffers.observations[i] = observation
                buffers.rewards[i] = reward
                buffers.terminated[i] = terminated
                buffers.truncated[i] = truncated
                buffers.success[i] = info.get("success", np.nan)

    def close(self) -> None:
        for _, env in self._used + self._idle:
            env.close()
        self._used, self._idle = [], []


class SerialEnvs:
    """Environments stepped one after another in this process; a `BatchEnv`.

    Args:
        distribution: builds them.
        max_envs: how many at most.
    """

    lanes = LANES

    def __init__(self, distribution: TaskDistribution, max_envs: int) -> None:
        self.max_envs = max_envs
        self.observation_space, self.action_space = env_spaces(distribution)
        shapes = _Buffers.shapes(max_envs, self.observation_space.shape[0], self.action_space.shape[0])
        self._buffers = _Buffers(**{name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()})
        self._slots = _Slots(distribution, max(max_envs, POOL))

    def reset(self, tasks: Sequence[Task], seeds: NDArray[np.uint32]) -> FloatArray:
        """See `BatchEnv.reset`."""
        self._slots.assign(tasks)
        self._slots.reset(self._buffers, seeds)
        return self._buffers.observations[: len(tasks)]

    def step_async(self, rows: slice, actions: FloatArray, active: BoolArray) -> None:
        """See `BatchEnv.step_async`."""
        self._buffers.actions[rows], self._buffers.active[rows] = actions, active
        self._slots.step(self._buffers, rows.start, rows.stop)

    def step_wait(self, rows: slice) -> Step:
        """See `BatchEnv.step_wait`."""
        return self._buffers.step(rows)

    def close(self) -> None:
        """See `BatchEnv.close`."""
        self._slots.close()


_OK = b"ok"


class WorkerEnvs:
    """Environments stepped by worker processes, several each; a `BatchEnv`.

    Workers are started by `spawn`: a script that trains needs the usual `if __name__ == "__main__":`.

    Args:
        distribution: builds them, in the workers; must be picklable.
        max_envs: how many at most.
        num_workers: how many processes, at least 1.

    Raises:
        RuntimeError: (by `reset` and `step_wait`) an environment raised, with its traceback, or a worker died; or the
            environments are closed, which an interruption while waiting does, too.
    """

    lanes = LANES

    def __init__(self, distribution: TaskDistribution, max_envs: int, num_workers: int) -> None:
        self.max_envs = max_envs
        self.observation_space, self.action_space = env_spaces(distribution)
        shapes = _Buffers.shapes(max_envs, self.observation_space.shape[0], self.action_space.shape[0])
        context = multiprocessing.get_context("spawn")
        memory = {
            name: context.RawArray("b", max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize))
            for name, (shape, dtype) in shapes.items()
        }
        self._buffers = _Buffers.view(memory, shapes)
        self._requests = 0  # sent, and not yet answered by all
        self._workers: list[tuple[Connection, Any]] = []
        pool_size = -(-max(max_envs, POOL) // num_workers)
        for number in range(num_workers):
            ours, theirs = context.Pipe()
            arguments = (theirs, distribution, pool_size, number, num_workers, memory, shapes)
            process = context.Process(target=_work, args=arguments, daemon=True)
            with _worker_environment():
                process.start()
            theirs.close()
            self._workers.append((ours, process))
        self._stop = weakref.finalize(self, _stop, self._workers)  # at exit, too

    def reset(self, tasks: Sequence[Task], seeds: NDArray[np.uint32]) -> FloatArray:
        """See `BatchEnv.reset`."""
        while self._requests:  # of an episode that was given up
            with contextlib.suppress(RuntimeError):
                self._wait()
        stride = len(self._workers)
        self._ask([pickle.dumps((tasks[number::stride], seeds[number::stride])) for number in range(stride)])
        self._wait()
        return self._buffers.observations[: len(tasks)]

    def step_async(self, rows: slice, actions: FloatArray, active: BoolArray) -> None:
        """See `BatchEnv.step_async`."""
        self._buffers.actions[rows], self._buffers.active[rows] = actions, active
        self._ask([_ROWS.pack(rows.start, rows.stop)] * len(self._workers))

    def step_wait(self, rows: slice) -> Step:
        """See `BatchEnv.step_wait`."""
        self._wait()
        return self._buffers.step(rows)

    def _ask(self, requests: Sequence[bytes]) -> None:
        """Send each worker its request: what to reset to, or which rows to step."""
        self._check_open()
        with self._closed_if_interrupted():
            for (connection, _), request in zip(self._workers, requests, strict=True):
                with contextlib.suppress(OSError):  # a dead worker is found when its answer is missing
                    connection.send_bytes(request)
            self._requests += 1

    def _wait(self) -> None:
        """Wait until all workers have answered the oldest request, so that no answer is left for the next one."""
        self._check_open()
        if not self._requests:
            raise RuntimeError("step_wait without step_async")
        failures = []
        with self._closed_if_interrupted():
            self._requests -= 1
            for number, (connection, process) in enumerate(self._workers):
                try:
                    answer = connection.recv_bytes()
                except (EOFError, OSError):
                    process.join(timeout=1.0)
                    failures.append(f"environment worker {number} died with exit code {process.exitcode}")
                else:
                    if answer != _OK:
                        failures.append(f"an environment failed in worker {number}:\n{answer.decode()}")
        if failures:
            raise RuntimeError("\n".join(failures))

    def _check_open(self) -> None:
        if not self._workers:
            raise RuntimeError("the environments are closed; make new ones")

    @contextlib.contextmanager
    def _closed_if_interrupted(self) -> Iterator[None]:
        """Close upon Ctrl-C and the like: which requests are answered is unknown then."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """See `BatchEnv.close`."""
        self._stop()
        self._workers = []


def _stop(workers: Sequence[tuple[Connection, Any]]) -> None:
    """End worker processes: a closed connection tells them to, and one that hangs is killed."""
    for connection, _ in workers:
        connection.close()
    for _, process in workers:
        process.join(timeout=5.0)
        if process.is_alive():
            process.kill()
            process.join()


WORKER_ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "MALLOC_MMAP_THRESHOLD_": str(2**20),
}
"""One thread of linear algebra each, since workers would compete for the cores otherwise. And memory from 1 MiB on is
mapped: glibc would place MuJoCo's arenas, 15 MB of which 0.1 are used, on what compiling a model has left dirty."""


@contextlib.contextmanager
def _worker_environment() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in WORKER_ENVIRONMENT}
    os.environ.update(WORKER_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


_ROWS = struct.Struct("<qq")
"""A request to step the environments from the first number to the second; a longer one is to reset."""


def _work(
    connection: Connection,
    distribution: TaskDistribution,
    pool_size: int,
    number: int,
    stride: int,
    memory: dict[str, Any],
    shapes: dict[str, tuple[tuple[int, ...], DTypeLike]],
) -> None:
    """Serve one worker's environments until the other end of the connection closes."""
    for signal_number in (signal.SIGINT, signal.SIGTERM):  # the main process decides what they mean, and ends workers
        signal.signal(signal_number, signal.SIG_IGN)
    buffers = _Buffers.view(memory, shapes)
    slots = _Slots(distribution, pool_size, number, stride)
    while True:
        try:
            request = connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            break
        answer = _OK
        try:
            if len(request) == _ROWS.size:
                slots.step(buffers, *_ROWS.unpack(request))
            else:
                tasks, seeds = pickle.loads(request)
                slots.assign(tasks)
                slots.reset(buffers, seeds)
        except Exception:
            answer = traceback.format_exc().encode()
        try:
            connection.send_bytes(answer)
        except OSError:  # closed meanwhile
            break
    slots.close()
