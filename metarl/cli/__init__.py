"""The command line, one file a verb; the only part of metarl that imports everything.

A verb imports what it needs when it is called, so that help and mistakes come at once.

Exit status: 0 success, 1 a failure of the run, 2 the user's mistake (one line: cause and cure), 130 and 143 stopped
by a signal after saving.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence

from metarl.cli.baseline import baseline
from metarl.cli.evaluate import evaluate
from metarl.cli.export import export
from metarl.cli.play import play
from metarl.cli.plot import plot
from metarl.cli.show import doctor, inspect, list_names
from metarl.cli.train import train
from metarl.errors import RunError, UserError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with its status."""
    # A thread that waits for others goes to sleep sooner. On a machine that has other work to do, too, updates that are
    # made of many small operations take several times as long otherwise; OpenMP reads it when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        status = _dispatch([word for word in arguments if word != "--debug"])
    except UserError as error:
        if debug:
            raise
        print(f"metarl: {error}", file=sys.stderr)
        status = 2
    except RunError as error:
        if debug:
            raise
        print(f"metarl: {error}", file=sys.stderr)
        status = 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        if debug:
            raise
        first, *_ = str(error).splitlines() or [""]
        print(f"metarl: {type(error).__name__}: {first} (--debug shows where)", file=sys.stderr)
        status = 1
    raise SystemExit(status)


def _dispatch(arguments: list[str]) -> int:
    verbs: dict[str, tuple[Callable[[list[str]], int], str]] = {
        "train": (train, "train an agent from a YAML config"),
        "evaluate": (evaluate, "evaluate a run on held-out tasks"),
        "export": (export, "write a policy as one ONNX file, to run without torch"),
        "play": (play, "draw an episode before and after adaptation, as MP4 and GIF"),
        "inspect": (inspect, "show what a run directory holds"),
        "list": (list_names, "list envs, agents, methods or configs"),
        "doctor": (doctor, "check this machine"),
        "plot": (plot, "draw what runs have tracked"),
        "baseline": (baseline, "train a standard single-task agent from scratch on some of a config's tasks"),
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
    near = difflib.get_close_matches(arguments[0], verbs, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"unknown verb {arguments[0]!r}: {hint}there are {', '.join(verbs)}")
