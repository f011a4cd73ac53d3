"""The command line, one file per verb; the only part of metarl that may import everything.

Verbs import heavy modules only when they run, so that help and error messages appear at once.

Exit status: 0 success; 1 a failed run; 2 a user error, in one line with cause and fix; 130 and 143 stopped by a signal
after saving.
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
    """Run the command line and exit with its status."""
    # Waiting OpenMP threads spin for less time before they sleep. Otherwise updates of many small operations take
    # several times as long on a busy machine. OpenMP reads the variable when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime would send model names and sizes over the network
    if sys.stdout is not None and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # for terminals that cannot print all of our characters
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
        status, message = _describe(error)
        print(f"metarl: {one_line(message)}", file=sys.stderr)
    raise SystemExit(_flush(status))


def _describe(error: Exception) -> tuple[int, str]:
    """Return the exit status and the message of an error."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, RunError):
        return 1, str(error)
    if "MUJOCO_GL" in str(error):  # MuJoCo failed to import
        from metarl.envs.drawing.rendering import check_gl

        try:
            check_gl()
        except UserError as mistake:
            return 2, str(mistake)
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        longest = max(str(error.filename).split(os.sep), key=len)
        return 2, f"{longest[:40]}…: the file name is too long; choose a shorter one"
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "allocate memory" in first:
        return 1, (
            "out of memory; lower num_tasks, rollouts_per_task, the horizon or the network sizes "
            f"({first or type(error).__name__})"
        )
    cause = " ".join((first, *rest[-1:]))  # a worker's traceback ends with its cause
    return 1, f"{type(error).__name__}: {cause} (--debug shows where)"


def _flush(status: int) -> int:
    """Flush stdout and return the exit status: `status`, or 1 if that is 0 and flushing fails."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit
        if not isinstance(error, BrokenPipeError):  # the reader has closed the pipe
            print(f"metarl: cannot write to stdout: {error.strerror}", file=sys.stderr)
        return status or 1


def _dispatch(arguments: list[str]) -> int:
    verbs: dict[str, tuple[Callable[[list[str]], int], str]] = {
        "train": (train.train, "train an agent from a YAML config"),
        "evaluate": (evaluate.evaluate, "evaluate a run on held-out tasks"),
        "export": (export.export, "export a policy to an ONNX file that runs without torch"),
        "play": (play.play, "record an episode before and after adaptation as MP4 and GIF"),
        "inspect": (show.inspect, "summarise a run directory"),
        "list": (show.list_names, "list envs, wrappers, agents, stability methods or configs"),
        "doctor": (doctor.doctor, "check the installation"),
        "plot": (plot.plot, "plot the metrics of runs"),
        "baseline": (baseline.baseline, "train a single-task agent from scratch on tasks of a config"),
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
        print("\nSee `metarl VERB --help` for its options.")
        return 0 if arguments else 2
    matches = difflib.get_close_matches(arguments[0].lower(), verbs, n=1)
    hint = f"did you mean {matches[0]!r}? " if matches else ""
    raise UserError(f"unknown verb {arguments[0][:40]!r}: {hint}expected one of {', '.join(verbs)}; see metarl --help")
