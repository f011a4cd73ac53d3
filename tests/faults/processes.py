"""The command line as a process of its own, and what its answer to a mistake must look like."""

import os
import subprocess
import sys
import time
from typing import NamedTuple

COMMAND = (sys.executable, "-c", "from metarl.cli import main; main()")

SMALL = """
    --num-tasks 2 --rollouts-per-task 1 --num-workers 0 --device cpu --agent.hidden-sizes [8] --agent.outer.epochs 1
    --stages.0.tasks.horizon 5 --stages.0.iterations 2 --evaluation.every-iterations 0 --evaluation.num-tasks 1
"""
"""Flags that make `navigation_maml_ppo` a run of well under a second."""

NAVIGATION = ("train", "navigation_maml_ppo", *SMALL.split())


class Done(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str
    seconds: float


def environment(**changes):
    """Return this process's environment variables with changes; None leaves one out. One thread, for small runs."""
    wanted = {**os.environ, "OMP_NUM_THREADS": "1", **changes}
    return {name: str(value) for name, value in wanted.items() if value is not None}


def run_cli(*arguments, cwd=None, timeout_s=120, command=COMMAND, **variables):
    """Run a command to its end; `variables` are laid over the environment."""
    began = time.monotonic()
    done = subprocess.run(
        [*command, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        cwd=cwd,
        env=environment(**variables),
        timeout=timeout_s,
        check=False,
    )
    out, err = (stream.decode(errors="backslashreplace") for stream in (done.stdout, done.stderr))
    return Done(done.returncode, out, err, time.monotonic() - began)


def start_cli(*arguments, cwd=None, **variables):
    """Start a command and return its process, which leads a group of its own; its output goes to pipes, as text."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=environment(**variables),
        start_new_session=True,
    )


def assert_one_line_error(done, *expected, status=2):
    """Check that a command ended with one line of cause and cure, without a traceback and with nothing else."""
    code, out, err = done[:3]
    assert code == status, (code, out, err)
    assert "Traceback" not in err and 'File "' not in err, err
    assert out == "", out
    assert err.startswith("metarl: ") and err.endswith("\n") and len(err.splitlines()) == 1, err
    assert err.removesuffix("\n").isprintable() and len(err) < 2100, err
    for text in expected:
        assert text in err, (text, err)
    return err
