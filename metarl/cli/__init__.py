"""The command line, one file a verb; the only part of metarl that imports everything.

A verb imports what it needs when it is called, so that help and mistakes come at once.

Exit status: 0 success, 1 a failure of the run, 2 the user's mistake (one line: cause and cure), 130 and 143 stopped
by a signal after saving.
"""

from __future__ import annotations

import difflib
import errno
import os
import sys
from collections.abc import Callable, Sequence

from metarl.cli import baseline, doctor, evaluate, export, play, plot, show, train
from metarl.cli.arguments import one_line
from metarl.errors import RunError, UserError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with its status."""
    # A thread that waits for others goes to sleep sooner. On a machine that has other work to do, too, updates that are
    # made of many small operations take several times as long otherwise; OpenMP reads it when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime would send names and sizes of models over the net
    if sys.stdout is not None and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without our letters shows the others
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        status = _dispatch([word for word in arguments if word != "--debug"])
    except BrokenPipeError:
        status = 1
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        if debug:
            raise
        status, told = _told(error)
        print(f"metarl: {one_line(told)}", file=sys.stderr)
    raise SystemExit(_flushed(status))


def _told(error: Exception) -> tuple[int, str]:
    """Return the exit status of an error, and what is said of it."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, RunError):
        return 1, str(error)
    if "MUJOCO_GL" in str(error):  # MuJoCo cannot be imported
        from metarl.envs.drawing.rendering import check_gl

        try:
            check_gl()
        except UserError as mistake:
            return 2, str(mistake)
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        longest = max(str(error.filename).split(os.sep), key=len)
        return 2, f"{longest[:40]}…: too long for the name of a file; give a shorter one"
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "allocate memory" in first:
        return 1, (
            "out of memory; lower num_tasks, rollouts_per_task, the horizon or the sizes of the networks "
            f"({first or type(error).__name__})"
        )
    told = " ".join((first, *rest[-1:]))  # the last line of a traceback is its cause
    return 1, f"{type(error).__name__}: {told} (--debug shows where)"


def _flushed(status: int) -> int:
    """Write out what was printed; returns the status, which is 1 if that could not be done and nothing else failed."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where the rest of it goes at the end
        if not isinstance(error, BrokenPipeError):  # else nobody wants to read it
            print(f"metarl: cannot print: {error.strerror}", file=sys.stderr)
        return status or 1


def _dispatch(arguments: list[str]) -> int:
    verbs: dict[str, tuple[Callable[[list[str]], int], str]] = {
        "train": (train.train, "train an agent from a YAML config"),
        "evaluate": (evaluate.evaluate, "evaluate a run on held-out tasks"),
        "export": (export.export, "write a policy as one ONNX file, to run without torch"),
        "play": (play.play, "draw an episode before and after adaptation, as MP4 and GIF"),
        "inspect": (show.inspect, "show what a run directory holds"),
        "list": (show.list_names, "list envs, agents, methods or configs"),
        "doctor": (doctor.doctor, "check this machine"),
        "plot": (plot.plot, "draw what runs have tracked"),
        "baseline": (baseline.baseline, "train a standard single-task agent from scratch on some of a config's tasks"),
    }
    if arguments and arguments[0] in verbs:
        return verbs[arguments[0]][0](arguments[1:])
    if arguments and arguments[0] == "--version":
        from importlib.metadata import version

        print(f"metarl {version('metarl')}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: metarl VERB ...\n")
        for verb, (_, purpose) in verbs.items():
            print(f"  {verb:<10} {purpose}")
        print("\n`metarl VERB --help` tells more.")
        return 0 if arguments else 2
    near = difflib.get_close_matches(arguments[0].lower(), verbs, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"unknown verb {arguments[0][:40]!r}: {hint}there are {', '.join(verbs)}; see metarl --help")
