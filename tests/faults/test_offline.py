"""Nothing metarl does at run time uses the network, and loading a run builds no object that the run's files name.

Commands run in processes that `tests/faults/watch.py` watches, their workers too.
"""

import json
import os
import shutil
import signal
import sys

import pytest

from tests.faults import watch
from tests.faults.processes import NAVIGATION, run_cli

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
    """Run commands in one process that is watched, and is ended at the first use of the network: what was noted.

    It has a home of its own, and no sign of a test: what libraries keep there, or leave out here, makes no difference.
    """
    if sys.platform != "linux" or os.uname().machine not in watch.ARCHITECTURES:
        pytest.skip("needs seccomp of Linux")
    shutil.copy(watch.__file__, tmp_path / "sitecustomize.py")
    (tmp_path / "home").mkdir()

    def run(*commands, script=COMMANDS):
        for log in tmp_path.glob("log.*"):
            log.unlink()
        variables = {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])),
            "METARL_WATCH_LOG": tmp_path / "log",
            "METARL_WATCH_CANARY": CANARY,
            "HOME": tmp_path / "home",
            "XDG_CACHE_HOME": None,
            **dict.fromkeys(name for name in os.environ if "CI" in name.split("_") or "GITHUB" in name),
        }
        given = json.dumps([[str(word) for word in command] for command in commands])
        done = run_cli(given, command=[sys.executable, "-c", script], cwd=tmp_path, timeout_s=300, **variables)
        noted = [line for log in tmp_path.glob("log.*") for line in log.read_text().splitlines()]
        if any(line.startswith("unfiltered ") for line in noted):
            pytest.skip("the kernel takes no filter here")
        return done, noted

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
    done, _ = watched(script=f"import socket, urllib.request\n{use}")
    assert done.status in (watch.ENDED, -signal.SIGSYS)


def test_the_watch_sees_what_is_not_python(watched):
    for family in ("AF_INET", "AF_INET6"):
        script = f"import ctypes, socket\nctypes.CDLL(None).socket(int(socket.{family}), int(socket.SOCK_DGRAM), 0)"
        assert watched(script=script)[0].status == -signal.SIGSYS
    assert watched(script="import socket\nsocket.socketpair()")[0].status == 0


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
    assert not list((tmp_path / "home").rglob("*onnxruntime*"))  # its telemetry keeps a number of this machine there


FROM_PYTHON = """
import metarl
from metarl.runtime import OnnxPolicy
metarl.load("run").export("policy.onnx")
print(OnnxPolicy("policy.onnx").predict([0.0, 0.0])[0].shape)
"""


@pytest.mark.slow
def test_exporting_and_running_a_policy_from_python_does_not_either(watched, tmp_path):
    assert watched([*NAVIGATION, "--run-dir", "run"])[0].status == 0
    done, noted = watched(script=FROM_PYTHON)
    assert (done.status, done.out) == (0, "(2,)\n"), (done.err, noted)
    assert not list((tmp_path / "home").rglob("*onnxruntime*"))


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
