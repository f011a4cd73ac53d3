"""Steps environments in worker processes, through shared memory: the main process's side of it, and a worker's own.

A step costs one short message a worker and copies no array: observations, actions and rewards lie in memory that all
processes share. Environment i belongs to worker i modulo their number, so that each has its share of every task and of
every lane.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import select
import signal
import struct
import sys
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from metarl.envs.vector.pool import LANES, POOL, Buffers, EnvPool, env_spaces
from metarl.protocols import EpisodesLostError, TaskDistribution
from metarl.types import BoolArray, FloatArray, Step, Task

WORKER_TIMEOUT = 60.0
"""Seconds without any progress after which a worker process counts as hung, unless told otherwise."""

START_TIMEOUT = 300.0
"""The same for one that is still starting, if that is longer: it imports what its environments need."""

_ROWS = struct.Struct("<qq")
"""A request to step the environments from the first number to the second; a longer one is to reset."""

_OK = b"ok"
"""The answer to either; any other is a traceback."""


@dataclass
class _Worker:
    """A worker process as the main process sees it."""

    number: int
    connection: Connection
    poll: Callable[[float], Any]  # waits for that many seconds; whether there is something to receive
    process: Any
    lost: str = ""  # how it came to its end, once that is known

    def end(self, cause: str = "") -> None:
        """Note how the process came to its end, or kill it for `cause`; nothing is received from it any more."""
        if cause:
            self.process.kill()
        self.process.join(timeout=5.0)
        if self.process.is_alive():
            cause = cause or "closed its connection and was killed"
            self.process.kill()
            self.process.join(timeout=5.0)
        self.connection.close()
        self.lost = f"environment worker {self.number} {cause or _how_it_ended(self.process.exitcode)}"


def _poll_of(connection: Connection) -> Callable[[float], Any]:
    """Return what does the same as `connection.poll`, which takes longer to prepare than most answers to come."""
    if not hasattr(select, "poll"):
        return connection.poll
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return lambda seconds: poll.poll(1000.0 * seconds)


def _how_it_ended(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    name = next((each.name for each in signal.Signals if each == -exit_code), f"signal {-exit_code}")
    return f"was killed by {name}" + (" (as happens when memory runs out)" if name == "SIGKILL" else "")


class WorkerEnvs:
    """Environments stepped by worker processes, several each; a `BatchEnv`.

    Workers are started by `spawn`: a script that trains needs the usual `if __name__ == "__main__":`. They end with
    this process, however it ends. On Linux they also end with the thread that has started them (the one that makes
    these environments, or resets them after a loss): the next reset starts them again, but better make and use them
    in one thread.

    A worker that dies, or that hangs, costs the episodes under way. The next reset starts it again, with fresh
    environments, so that episodes with the same seeds come out the same.

    Args:
        distribution: builds them, in the workers; must be picklable.
        max_envs: how many at most.
        num_workers: how many processes, at least 1.
        worker_timeout_s: seconds in which a worker must have built, reset or stepped an environment, else it is hung.

    Attributes:
        restarts: how often a worker was started again.

    Raises:
        EpisodesLostError: (by `reset` and `step_wait`) a worker died, or hung and was killed.
        RuntimeError: (by `reset` and `step_wait`) an environment raised, with its traceback, or a worker could not
            start; or the environments are closed, which an interruption while waiting does, too.
    """

    lanes = LANES

    def __init__(
        self,
        distribution: TaskDistribution,
        max_envs: int,
        num_workers: int,
        worker_timeout_s: float = WORKER_TIMEOUT,
    ) -> None:
        self.max_envs = max_envs
        self.observation_space, self.action_space = env_spaces(distribution)
        self.restarts = 0
        sizes = (self.observation_space.shape[0], self.action_space.shape[0])
        self._shapes = Buffers.shapes(max_envs, *sizes, num_workers)
        self._context = multiprocessing.get_context("spawn")
        self._memory = {
            name: self._context.RawArray("b", max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize))
            for name, (shape, dtype) in self._shapes.items()
        }
        self._buffers = Buffers.view(self._memory, self._shapes)
        self._watch = _Watch(self._buffers.progress, worker_timeout_s)
        self._distribution = distribution
        self._pool_size = -(-max(max_envs, POOL) // num_workers)
        self._requests = 0  # sent, and not yet answered by all
        self._workers = [self._start(number, num_workers) for number in range(num_workers)]
        self._stop = weakref.finalize(self, _stop, self._workers)  # at exit, too

    def _start(self, number: int, stride: int) -> _Worker:
        self._buffers.progress[number] = 0
        ours, theirs = self._context.Pipe()
        place = (self._pool_size, number, stride)
        arguments = (os.getpid(), theirs, self._distribution, *place, self._memory, self._shapes)
        process = self._context.Process(target=_work, args=arguments, daemon=True)
        with _worker_environment(), _signals_held_back():
            process.start()
        theirs.close()
        return _Worker(number, ours, _poll_of(ours), process)

    def reset(self, tasks: Sequence[Task], seeds: NDArray[np.uint32]) -> FloatArray:
        """See `BatchEnv.reset`."""
        self._check_open()
        while self._requests:  # of an episode that was given up
            with contextlib.suppress(RuntimeError):
                self._wait()
        self._restart()
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

    def _restart(self) -> None:
        """Start those workers again that have died."""
        self._check_open()
        with self._closed_if_interrupted():
            for number, worker in enumerate(self._workers):
                if worker.lost or not worker.process.is_alive():
                    worker.connection.close()
                    self._workers[number] = self._start(number, len(self._workers))
                    self.restarts += 1

    def _ask(self, requests: Sequence[bytes]) -> None:
        """Send each worker its request: what to reset to, or which rows to step."""
        self._check_open()
        with self._closed_if_interrupted():
            for worker, request in zip(self._workers, requests, strict=True):
                with contextlib.suppress(OSError):  # a dead worker is found when its answer is missing
                    worker.connection.send_bytes(request)
            self._requests += 1

    def _wait(self) -> None:
        """Wait until all workers have answered the oldest request, so that no answer is left for the next one."""
        self._check_open()
        if not self._requests:
            raise RuntimeError("step_wait without step_async")
        failures, losses = [], []
        with self._closed_if_interrupted():
            self._requests -= 1
            self._watch.begin()
            for worker in self._workers:
                answer = _OK if worker.lost else self._answer(worker)
                if worker.lost:
                    losses.append(worker.lost)
                    if self._buffers.progress[worker.number] == 0 and (worker.process.exitcode or 0) > 0:
                        failures.append(
                            "it could not start: see its traceback above, and whether the script has `if "
                            '__name__ == "__main__":`'
                        )
                elif answer != _OK:
                    failures.append(f"an environment failed in worker {worker.number}:\n{answer.decode()}")
        if failures:
            raise RuntimeError("\n".join(losses + failures))
        if losses:
            raise EpisodesLostError("; ".join(losses))

    def _answer(self, worker: _Worker) -> bytes:
        """Receive the next answer of a worker; if none will come, the worker is `lost` then."""
        try:
            while not worker.poll(self._watch.slice_s):
                if self._watch.hangs(worker.number):
                    seconds = f"{self._watch.limit_s(worker.number):g} s (worker_timeout_s)"
                    worker.end(f"made no progress for {seconds} and was killed")
                    return _OK
            return worker.connection.recv_bytes()
        except (EOFError, OSError):
            worker.end()
            return _OK

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


class _Watch:
    """Tells which workers make no progress, in one wait for all of them.

    Time counts only as far as this process has waited, slice by slice: one that was stopped along with its workers
    (Ctrl-Z) goes on where it was.

    Args:
        progress: `[workers]`, as they write it.
        timeout_s: how long a worker may take to make some.
    """

    def __init__(self, progress: NDArray[np.int64], timeout_s: float) -> None:
        self._progress, self._timeout_s = progress, timeout_s
        self.slice_s = min(0.5, timeout_s / 4)
        self.begin()

    def begin(self) -> None:
        """Begin a wait."""
        self._waited_s = 0.0
        self._seen: dict[int, tuple[int, float]] = {}  # its progress, and how long the wait had been when it came

    def limit_s(self, number: int) -> float:
        """How long a worker may take; the first time, it has to start."""
        return self._timeout_s if self._progress[number] else max(self._timeout_s, START_TIMEOUT)

    def hangs(self, number: int) -> bool:
        """Note that a slice of time has passed without an answer; returns whether that worker is hung."""
        self._waited_s += self.slice_s
        for each, progress in enumerate(self._progress.tolist()):
            if self._seen.setdefault(each, (progress, self._waited_s))[0] != progress:
                self._seen[each] = (progress, self._waited_s)
        return self._waited_s - self._seen[number][1] >= self.limit_s(number)


def _stop(workers: Sequence[_Worker]) -> None:
    """End worker processes: a closed connection tells them to, and one that hangs is killed."""
    for worker in workers:
        worker.connection.close()
    deadline = time.monotonic() + 5.0
    for worker in workers:
        worker.process.join(timeout=max(0.0, deadline - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


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


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Have what is started meanwhile not end upon Ctrl-C before it can say so itself; this process hears of it after.

    A group of processes gets such a signal as a whole, and the main process may want to finish what it does.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # which takes these signals, if it begins only now
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _MAIN_PROCESS_DECIDES)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_MAIN_PROCESS_DECIDES = (signal.SIGINT, signal.SIGTERM)
"""Signals that workers leave to the main process, which ends them."""


def _work(
    parent: int,
    connection: Connection,
    distribution: TaskDistribution,
    pool_size: int,
    number: int,
    stride: int,
    memory: dict[str, Any],
    shapes: dict[str, tuple[tuple[int, ...], DTypeLike]],
) -> None:
    """Serve one worker's environments until the other end of the connection closes."""
    for signal_number in _MAIN_PROCESS_DECIDES:
        signal.signal(signal_number, signal.SIG_IGN)
    _end_with(parent)
    slots = EnvPool(distribution, Buffers.view(memory, shapes), pool_size, number, stride)
    while True:
        try:
            request = connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            break
        answer = _OK
        try:
            if len(request) == _ROWS.size:
                slots.step(*_ROWS.unpack(request))
            else:
                tasks, seeds = pickle.loads(request)
                slots.assign(tasks)
                slots.reset(seeds)
        except Exception:
            answer = traceback.format_exc().encode()
        try:
            connection.send_bytes(answer)
        except OSError:  # closed meanwhile
            break
    slots.close()


def _end_with(parent: int) -> None:
    """Have this process killed when its parent ends; without Linux the closed connection ends it when it is read."""
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)
