"""Environments stepped in worker processes through shared memory: both the main process and the workers.

A step sends one short message to each worker and copies no array: observations, actions and rewards are in shared
memory. Environment i belongs to worker i modulo the number of workers, which spreads every task and every lane over all
workers.
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
from metarl.errors import UserError
from metarl.protocols import EpisodesLostError, TaskDistribution
from metarl.spaces import Spaces
from metarl.types import BoolArray, Step, Task

WORKER_TIMEOUT = 60.0
"""Default number of seconds without progress after which a worker counts as hung."""

START_TIMEOUT = 300.0
"""Minimum of that number for a worker that is starting, since it first imports its environments."""

_ROWS = struct.Struct("<qq")
"""Request to step the environments from `start` to `stop`; a request of another size is a pickled reset."""

_OK = b"ok"
"""Answer to a request that succeeded; any other answer is a traceback, or a mistake of the user."""

_MISTAKE = b"mistake: "
"""What the message of a `UserError` follows."""


@dataclass
class _Worker:
    """A worker process, seen from the main process."""

    number: int
    connection: Connection
    poll: Callable[[float], Any]  # waits up to the given seconds; truthy if there is an answer to receive
    process: Any
    lost: str = ""  # why the process ended, once known

    def end(self, cause: str = "") -> None:
        """End the connection and record why the process ended; kill it first if there is a `cause`."""
        if cause:
            self.process.kill()
        self.process.join(timeout=5.0)
        if self.process.is_alive():
            cause = cause or "closed its connection and was killed"
            self.process.kill()
            self.process.join(timeout=5.0)
        self.connection.close()
        self.lost = f"environment worker {self.number} {cause or _describe_exit(self.process.exitcode)}"


def _fast_poll(connection: Connection) -> Callable[[float], Any]:
    """Return an equivalent of `connection.poll`, whose own set-up takes longer than most answers."""
    if not hasattr(select, "poll"):
        return connection.poll
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return lambda seconds: poll.poll(1000.0 * seconds)


def _describe_exit(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    name = next((number.name for number in signal.Signals if number == -exit_code), f"signal {-exit_code}")
    return f"was killed by {name}" + (" (as happens when memory runs out)" if name == "SIGKILL" else "")


class WorkerEnvs:
    """Environments stepped by worker processes, several in each; a `BatchEnv`.

    Workers start by `spawn`: a script that trains needs the usual `if __name__ == "__main__":`. They end with this
    process, however it ends. On Linux they also end with the thread that started them, which is the one that created
    these environments or reset them after a loss. The next reset restarts them, but use a single thread.

    If a worker dies or hangs, the episodes in progress are lost. The next reset restarts the worker with fresh
    environments, so that equal seeds still give equal episodes.

    Args:
        distribution: the task distribution, which builds the environments in the workers; must be picklable.
        max_envs: the maximum number of environments.
        num_workers: the number of processes, at least 1.
        worker_timeout_s: seconds without a built, reset or stepped environment after which a worker counts as hung.

    Attributes:
        restarts: the number of worker restarts so far.

    Raises:
        EpisodesLostError: (from `reset` and `step_wait`) a worker died, or hung and was killed.
        RuntimeError: (from `reset` and `step_wait`) an environment raised an exception (the message has its traceback),
            a worker could not start, or the environments are closed, as they are after an interrupted wait.
        UserError: (from `reset` and `step_wait`) an environment has or returned something else than it should.
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
        self.spaces = env_spaces(distribution)
        self.restarts = 0
        self._shapes = Buffers.shapes(max_envs, self.spaces, num_workers)
        self._context = multiprocessing.get_context("spawn")
        self._memory = {
            name: self._context.RawArray("b", max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize))
            for name, (shape, dtype) in self._shapes.items()
        }
        self._buffers = Buffers.view(self._memory, self._shapes)
        self._watch = _Watch(self._buffers.progress, worker_timeout_s)
        self._distribution = distribution
        self._pool_size = -(-max(max_envs, POOL) // num_workers)
        self._requests = 0  # requests sent but not yet answered by all workers
        self._workers = [self._start(number, num_workers) for number in range(num_workers)]
        self._stop = weakref.finalize(self, _stop, self._workers)  # also at exit

    def _start(self, number: int, stride: int) -> _Worker:
        self._buffers.progress[number] = 0
        ours, theirs = self._context.Pipe()
        pool = (self._pool_size, number, stride)
        arguments = (os.getpid(), theirs, self._distribution, self.spaces, *pool, self._memory, self._shapes)
        process = self._context.Process(target=_work, args=arguments, daemon=True)
        with _worker_environment(), _blocked_signals():
            process.start()
        theirs.close()
        return _Worker(number, ours, _fast_poll(ours), process)

    def reset(self, tasks: Sequence[Task], seeds: NDArray[np.uint32]) -> NDArray[Any]:
        """See `BatchEnv.reset`."""
        self._check_open()
        while self._requests:  # of an abandoned episode
            with contextlib.suppress(RuntimeError):
                self._wait()
        self._restart()
        stride = len(self._workers)
        self._ask([pickle.dumps((tasks[number::stride], seeds[number::stride])) for number in range(stride)])
        self._wait()
        return self._buffers.observations[: len(tasks)]

    def step_async(self, rows: slice, actions: NDArray[np.float32], active: BoolArray) -> None:
        """See `BatchEnv.step_async`."""
        self._buffers.actions[rows], self._buffers.active[rows] = actions, active
        self._ask([_ROWS.pack(rows.start, rows.stop)] * len(self._workers))

    def step_wait(self, rows: slice) -> Step:
        """See `BatchEnv.step_wait`."""
        self._wait()
        return self._buffers.step(rows)

    def _restart(self) -> None:
        """Restart the workers that have died."""
        self._check_open()
        with self._close_if_interrupted():
            for number, worker in enumerate(self._workers):
                if worker.lost or not worker.process.is_alive():
                    worker.connection.close()
                    self._workers[number] = self._start(number, len(self._workers))
                    self.restarts += 1

    def _ask(self, requests: Sequence[bytes]) -> None:
        """Send each worker its request: a reset, or the rows to step."""
        self._check_open()
        with self._close_if_interrupted():
            for worker, request in zip(self._workers, requests, strict=True):
                with contextlib.suppress(OSError):  # a dead worker is noticed when its answer is missing
                    worker.connection.send_bytes(request)
            self._requests += 1

    def _wait(self) -> None:
        """Wait until all workers have answered the oldest request, so that no answer is left over for the next."""
        self._check_open()
        if not self._requests:
            raise RuntimeError("step_wait without step_async; call step_async first")
        failures, losses, mistakes = [], [], []
        with self._close_if_interrupted():
            self._requests -= 1
            self._watch.begin()
            for worker in self._workers:
                answer = _OK if worker.lost else self._answer(worker)
                if worker.lost:
                    losses.append(worker.lost)
                    if self._buffers.progress[worker.number] == 0 and (worker.process.exitcode or 0) > 0:
                        failures.append(
                            "it could not start: see its traceback above, and check that the script has `if "
                            '__name__ == "__main__":`'
                        )
                elif answer.startswith(_MISTAKE):
                    mistakes.append(answer.removeprefix(_MISTAKE).decode())
                elif answer != _OK:
                    failures.append(f"an environment failed in worker {worker.number}:\n{answer.decode()}")
        if failures:
            raise RuntimeError("\n".join(losses + failures))
        if mistakes:
            raise UserError(mistakes[0])
        if losses:
            raise EpisodesLostError("; ".join(losses))

    def _answer(self, worker: _Worker) -> bytes:
        """Return the next answer of a worker; if it will never answer, set its `lost`."""
        try:
            while not worker.poll(self._watch.slice_s):
                if self._watch.is_hung(worker.number):
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
    def _close_if_interrupted(self) -> Iterator[None]:
        """Close on Ctrl-C and other exceptions, after which it is unknown which requests were answered."""
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
    """Detects workers that make no progress during a wait for all of them.

    The time is the sum of the slices that this process has waited, not the time of day: suspending the whole run
    (Ctrl-Z) hangs no worker.

    Args:
        progress: the progress counters of the workers, `[workers]`.
        timeout_s: seconds without progress after which a worker counts as hung.
    """

    def __init__(self, progress: NDArray[np.int64], timeout_s: float) -> None:
        self._progress, self._timeout_s = progress, timeout_s
        self.slice_s = min(0.5, timeout_s / 4)
        self.begin()

    def begin(self) -> None:
        """Begin a wait."""
        self._waited_s = 0.0
        self._seen: dict[int, tuple[int, float]] = {}  # worker → last progress, and the time waited when it was seen

    def limit_s(self, number: int) -> float:
        """Return the timeout of a worker; it is longer until the worker has started."""
        return self._timeout_s if self._progress[number] else max(self._timeout_s, START_TIMEOUT)

    def is_hung(self, number: int) -> bool:
        """Add a slice of time without an answer; return whether worker `number` is hung."""
        self._waited_s += self.slice_s
        for worker, progress in enumerate(self._progress.tolist()):
            if self._seen.setdefault(worker, (progress, self._waited_s))[0] != progress:
                self._seen[worker] = (progress, self._waited_s)
        return self._waited_s - self._seen[number][1] >= self.limit_s(number)


def _stop(workers: Sequence[_Worker]) -> None:
    """Stop worker processes: close their connections, then kill any that are still alive after 5 s."""
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
"""Environment variables of workers. One thread of linear algebra each, or workers would compete for the cores. Blocks
of 1 MiB and more are mapped, or glibc would place MuJoCo's arenas (15 MB, of which 0.1 are used) on dirty pages that
compiling a model has left."""


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
def _blocked_signals() -> Iterator[None]:
    """Block Ctrl-C and SIGTERM, so that a process started here inherits the mask and lives until it ignores them.

    A process group receives such a signal as a whole, but the main process decides when to stop. It receives a blocked
    signal afterwards.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # starting it inside would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _MAIN_PROCESS_DECIDES)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_MAIN_PROCESS_DECIDES = (signal.SIGINT, signal.SIGTERM)
"""Signals that workers ignore; the main process stops them."""


def _work(
    parent: int,
    connection: Connection,
    distribution: TaskDistribution,
    spaces: Spaces,
    pool_size: int,
    number: int,
    stride: int,
    memory: dict[str, Any],
    shapes: dict[str, tuple[tuple[int, ...], DTypeLike]],
) -> None:
    """Run a worker: answer requests until the main process closes the connection."""
    for signal_number in _MAIN_PROCESS_DECIDES:
        signal.signal(signal_number, signal.SIG_IGN)
    _die_with(parent)
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # may have children
    pool = EnvPool(distribution, spaces, Buffers.view(memory, shapes), pool_size, number, stride)
    while True:
        try:
            request = connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            break
        answer = _OK
        try:
            if len(request) == _ROWS.size:
                pool.step(*_ROWS.unpack(request))
            else:
                tasks, seeds = pickle.loads(request)
                pool.assign(tasks)
                pool.reset(seeds)
        except UserError as error:
            answer = _MISTAKE + str(error).encode()
        except Exception:
            answer = traceback.format_exc().encode()
        try:
            connection.send_bytes(answer)
        except OSError:  # the main process has closed the connection
            break
    pool.close()


def _die_with(parent: int) -> None:
    """Make the kernel kill this process when its parent ends; without Linux, the closed connection ends it."""
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # the parent has ended already
        os._exit(1)
