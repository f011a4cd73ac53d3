"""A process with two workers that ends while they do something: `python -m tests.faults.parent ENDING DOING MARK`.

It says `ready` when they do. ENDING is `exit`, `raise` or `os._exit`, for which it waits until its input is closed, or
the name of a signal that it waits for. DOING is `starting`, `idle`, `stepping`, `sleep` (in a step), or `stopped` (one
of them, in a step); MARK is a file for that.
"""

import os
import sys

import numpy as np

from metarl.envs.vector import WorkerEnvs
from tests.faults.fragile import BREAK_AT, Tasks, walks


def main(ending, doing, mark):
    names = {"sleep": ("sleep", "sleep"), "stopped": ("step", "walk")}.get(doing, ("walk", "walk"))
    tasks = walks(*names, signal="SIGSTOP", mark=mark)
    envs = WorkerEnvs(Tasks(tasks), 2, 2, 1000.0)
    rows = slice(0, 2)

    def begin_step():
        envs.step_async(rows, np.zeros((2, 2)), np.ones(2, dtype=bool))

    if doing != "starting":
        envs.reset(tasks, np.arange(2, dtype=np.uint32))
    for _ in range({"sleep": 1, "stopped": BREAK_AT, "stepping": 1}.get(doing, 0)):
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
