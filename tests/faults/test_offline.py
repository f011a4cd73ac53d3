"""Nothing metarl does at run time uses the network, and loading a run builds no object that the run's files name.

Python itself reports what happens (`sys.addaudithook`), in the main process and in the workers that it starts: each
imports `sitecustomize`, which puts the hook in place before anything else.
"""

import json
import sys

import pytest

from tests.faults.processes import NAVIGATION, run_cli

WATCH = r"""
import os, sys

LOG = os.environ["METARL_WATCH_LOG"]
CANARY = os.environ["METARL_WATCH_CANARY"]
NAMES = ("getaddrinfo", "gethostbyname", "gethostbyaddr", "getnameinfo")


def note(what):
    file = os.open(f"{LOG}.{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(file, what.encode("utf-8", "backslashreplace") + b"\n")
    os.close(file)


def watch(event, arguments):
    kind, _, what = event.partition(".")
    if kind == "socket" and what in ("connect", "bind", "sendto", "sendmsg"):
        import socket

        if arguments[0].family != socket.AF_UNIX:
            note(f"network {event} {arguments[1:]}")
            os._exit(97)
    elif kind == "socket" and what in NAMES:
        note(f"network {event} {arguments}")
        os._exit(97)
    elif event == "pickle.find_class":
        note(f"pickle {arguments}")
    elif event == "compile" and CANARY in str(arguments[0]):
        note(f"compiled {arguments[0]!r}")


sys.addaudithook(watch)
note(f"watching {sys.orig_argv!r}")
"""

COMMANDS = """
import json, sys
from metarl.cli import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as stop:
        if stop.code:
            raise
"""

CANARY = "__import__('os').abort()"


@pytest.fixture
def watched(tmp_path):
    """Run commands in one process that is watched, and is ended at the first use of the network: what was noted."""
    (tmp_path / "sitecustomize.py").write_text(WATCH)

    def run(*commands, script=COMMANDS):
        for log in tmp_path.glob("log.*"):
            log.unlink()
        variables = {
            "PYTHONPATH": tmp_path,
            "METARL_WATCH_LOG": tmp_path / "log",
            "METARL_WATCH_CANARY": CANARY,
        }
        given = json.dumps([[str(word) for word in command] for command in commands])
        done = run_cli(given, command=[sys.executable, "-c", script], cwd=tmp_path, timeout_s=300, **variables)
        return done, [line for log in tmp_path.glob("log.*") for line in log.read_text().splitlines()]

    return run


@pytest.mark.parametrize(
    "use",
    [
        "socket.create_connection(('127.0.0.1', 9))",
        "socket.getaddrinfo('example.org', 80)",
        "socket.gethostbyname('example.org')",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
        "socket.create_server(('127.0.0.1', 0))",
        "urllib.request.urlopen('http://127.0.0.1:9')",
    ],
)
def test_the_watch_sees_the_network(watched, use):
    done, noted = watched(script=f"import socket, urllib.request\n{use}")
    assert done.status == 97 and any(line.startswith("network ") for line in noted)


def test_the_watch_sees_pickles_and_what_is_compiled(watched):
    done, noted = watched(
        script=f"import pickle, os\npickle.loads(pickle.dumps(os.getcwd))\ncompile({CANARY!r}, '', 'eval')"
    )
    assert done.status == 0 and {line.partition(" ")[0] for line in noted} == {"watching", "pickle", "compiled"}


@pytest.mark.slow
def test_no_verb_uses_the_network(watched, tmp_path):
    stepped = ["--stages.0.tasks", "{family: mujoco, name: HalfCheetahVel, horizon: 5}", "--num-workers", "1"]
    done, noted = watched(
        [*NAVIGATION, *stepped, "--run-dir", "cheetah"],
        ["evaluate", "cheetah", "--num-tasks", "1", "--num-workers", "1"],
        ["export", "cheetah", "policy.onnx", "--adapt-on", "HalfCheetahVel:1"],
        [*NAVIGATION, "--run-dir", "points"],
        ["play", "points", "--gif", "play.gif"],
        ["inspect", "points"],
        ["plot", "points", "cheetah"],
        ["list", "envs"],
        ["doctor"],
    )
    assert done.status == 0, (done.err, noted)
    assert [line for line in noted if line.startswith("network ")] == []
    workers = [line for line in noted if line.startswith("watching ") and "multiprocessing.spawn" in line]
    assert len(workers) >= 2  # those of training and of evaluating
    assert (tmp_path / "policy.onnx").is_file() and (tmp_path / "play.gif").is_file()


@pytest.mark.slow
def test_loading_a_run_unpickles_nothing_and_compiles_none_of_its_words(watched, tmp_path):
    run = tmp_path / "run"
    done, _ = watched([*NAVIGATION, "--stages.0.name", CANARY, "--run-dir", run])
    assert done.status == 0, done.err
    assert CANARY in (run / "config.yaml").read_text()
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({"iteration": 3, "stage": 0, "env_steps": 60, CANARY: 1.0}) + "\n")
    done, noted = watched(
        ["evaluate", run, "--stage", CANARY, "--num-tasks", "1", "--num-workers", "0"],
        ["inspect", run],
        ["plot", run],
        ["export", run, "policy.onnx"],
        [*NAVIGATION, "--stages.0.name", CANARY, "--run-dir", run, "--resume"],
        script=COMMANDS + "import metarl\nmetarl.load(sys.argv[1] and 'run').predict([0.0, 0.0])\n",
    )
    assert done.status == 0, (done.err, noted)
    assert [line for line in noted if not line.startswith("watching ")] == []
