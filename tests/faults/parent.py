"""A process with two workers that ends while they do something: `python -m tests.faults.parent ENDING DOING MARK`.

It says `ready` when they do. ENDING is `exit`, `raise` or `os._exit`, for which it waits until its input is closed, or
the name of a signal that it waits for. DOING is `starting` (to build what takes long), `idle`, `stepping`, `asleep` (in
a step), or `stopped` (one of them, in a step); MARK is a file for that.
"""

import os
import signal
import sys

import numpy as np

from metarl.envs.vector.workers import WorkerEnvs
from tests.faults.fragile import BREAK_AT, Tasks, walks


def main(ending, doing, mark):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background ignore it
    walk = walks("walk", "walk")
    tasks = {
        "starting": walks("build", "build", sleep=1000.0),
        "asleep": walks("step", "step", sleep=1000.0),
        "stopped": walks("step", "walk", signal="SIGSTOP", mark=mark),
    }.get(doing, walk)
    envs = WorkerEnvs(Tasks(walk), 2, 2, 1000.0)
    rows = slice(0, 2)

    def begin_step():
        envs.step_async(rows, np.zeros((2, 2)), np.ones(2, dtype=bool))

    if doing == "starting":
        print("ready", flush=True)
    envs.reset(tasks, np.arange(2, dtype=np.uint32))
    for _ in range({"idle": 0, "stepping": 1}.get(doing, BREAK_AT)):
        begin_step()
    print("ready", flush=True)
    if not ending.startswith("SIG"):
        sys.stdin.read()
    if ending == "exit":
        sys.exit(7)
    if ending == "raise":
        raise KeyError("the end")
    if ending == "os._exit":
        os._exit(8)
    while doing == "stepping":
        envs.step_wait(rows)
        begin_step()
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
