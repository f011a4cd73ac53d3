#!/usr/bin/env python
"""Whether a long run keeps its memory and its speed: trains for hours and watches every process of the training.

Starts `metarl train` of the code beside this script, on one core and with one environment worker: a sequence of stages
of HalfCheetahVel under EWC and a replay that is full within the first minutes, evaluated and saved all the time. Every
few seconds it notes the memory of each process, its open files, threads and processor time. In the end it fits a line
through what came after the warm-up, and looks for what was left behind. It measures and does not judge: the exit
status is 1 only if training ended before there was anything to fit.

Memory is PSS: a page that n processes share counts 1/n in each. That moves with other programs that come and go and
share the libraries' files; what is the processes' own (PSS without files) does not. Speed moves with them, too: hence
also env steps per second of processor time, and that against gymnasium's own HalfCheetah, stepped in between in this
process, since processor time passes faster where caches are shared.

    .venv/bin/python tests/faults/soak.py --out soak.json               # two hours; on Linux
    .venv/bin/python tests/faults/soak.py --minutes 15 --warm-up 5 [--SETTING=VALUE ...]     # flags of metarl train
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import yaml

ROOT = Path(__file__).resolve().parents[2]
SPEED = "time/env_steps_per_second"
THINGS = ("pss_kib", "own_kib", "rss_kib", "files", "threads")
ROLES = {b"--multiprocessing-fork": "worker", b"resource_tracker": "resource tracker"}  # by the command line
TIME_RUNS_OUT = 10**6
"""Iterations of the last stage."""
REFERENCE_STEPS = 300

Sample = dict[str, Any]


def config(stages: int = 16, iterations: int = 500) -> dict[str, Any]:
    """Return settings whose iterations all make as many steps, and cost alike from the second stage on.

    The first stage, which nothing guards, is a short one: it ends in the warm-up.
    """
    tasks = [{"family": "mujoco", "name": "HalfCheetahVel", "velocity": v, "horizon": 100} for v in ([0, 1], [1, 2])]
    lengths = [iterations // 4, *[iterations] * (stages - 2), TIME_RUNS_OUT]
    return {
        "num_workers": 1,
        "num_tasks": 5,
        "rollouts_per_task": 4,
        "agent": {"name": "maml_ppo", "hidden_sizes": [64, 64]},
        "stability": ["ewc", {"name": "replay", "capacity": 100}],
        "checkpoint_every_iterations": 5,
        "evaluation": {"every_iterations": 25, "num_tasks": 5},
        "stages": [{"name": f"{i}", "tasks": tasks[i % 2], "iterations": length} for i, length in enumerate(lengths)],
    }


def tree(root: int) -> list[int]:
    """Return a process and all its descendants."""
    children = defaultdict(list)
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            children[int(_stat(path)[1])].append(int(path.name))
    found = [root]
    for pid in found:
        found += children[pid]
    return found


def _stat(path: Path) -> list[str]:
    """Return the fields of /proc/PID/stat from the third on; the second may hold spaces."""
    return (path / "stat").read_text().rpartition(")")[2].split()


def measure(pid: int, root: int) -> Sample:
    """Return what a process has and what it has used; raises OSError if it has ended."""
    path = Path("/proc") / str(pid)
    command, fields = (path / "cmdline").read_bytes(), _stat(path)
    role = "main" if pid == root else next((ROLES[mark] for mark in ROLES if mark in command), "other")
    rollup = (line.split() for line in (path / "smaps_rollup").read_text().splitlines()[1:])
    kib = {key.removesuffix(":"): int(value) for key, value, _ in rollup}
    return {
        "name": f"{role} {pid}",
        "pss_kib": kib["Pss"],
        "own_kib": kib["Pss_Anon"] + kib["Pss_Shmem"],
        "rss_kib": kib["Rss"],
        "files": len(os.listdir(path / "fd")),
        "threads": int(fields[17]),
        "cpu_seconds": (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
    }


def env_steps(metrics: Path) -> int:
    """Return how far the last whole line of metrics.jsonl is; 0 before there is one."""
    with contextlib.suppress(FileNotFoundError, IndexError), metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 2**16))
        return int(json.loads(file.read().split(b"\n")[-2])["env_steps"])
    return 0


def reference_seconds(env: gymnasium.Env[Any, Any]) -> float:
    """Return the processor time of a fixed piece of work: steps of gymnasium's environment."""
    env.reset(seed=0)
    action, began = np.zeros(env.action_space.shape or ()), time.thread_time()
    for _ in range(REFERENCE_STEPS):
        env.step(action)
    return time.thread_time() - began


def watch(training: subprocess.Popen[bytes], metrics: Path, every: float) -> list[Sample]:
    """Return samples of all processes of the training, until it ends."""
    samples: list[Sample] = []
    cpu: dict[str, float] = {}  # of processes that have ended, too
    env, began = gymnasium.make("HalfCheetah-v5"), time.monotonic()
    while training.poll() is None:
        processes = []
        for pid in tree(training.pid):
            with contextlib.suppress(OSError):
                processes.append(measure(pid, training.pid))
        cpu |= {each["name"]: each["cpu_seconds"] for each in processes}
        seconds, steps = time.monotonic() - began, env_steps(metrics)
        together = {thing: sum(each[thing] for each in processes) for thing in THINGS}
        processes.append({"name": "all", **together, "cpu_seconds": sum(cpu.values())})
        reference = reference_seconds(env)
        samples.append({"seconds": seconds, "env_steps": steps, "reference_seconds": reference, "processes": processes})
        with contextlib.suppress(subprocess.TimeoutExpired):
            training.wait(every - (time.monotonic() - began) % every)
    return samples


def fit(seconds: list[float], values: list[float]) -> dict[str, float]:
    """Return the mean, the least-squares slope an hour, the same in percent of the mean, and the range."""
    slope, mean = float(np.polyfit(np.array(seconds) / 3600, values, 1)[0]), float(np.mean(values))
    percent = 100 * slope / mean
    return {"mean": mean, "per_hour": slope, "percent": percent, "lowest": min(values), "highest": max(values)}


def fits(samples: list[Sample]) -> dict[str, dict[str, dict[str, float]]]:
    """Return a fit of each thing that a process has, for all together and for each that was seen more than once."""
    series = defaultdict(list)
    for sample in samples:
        for each in sample["processes"]:
            series[each["name"]].append((sample["seconds"], each))
    return {
        name: {thing: fit([at for at, _ in points], [each[thing] for _, each in points]) for thing in THINGS}
        for name, points in sorted(series.items())
        if len(points) > 1
    }


def speed(samples: list[Sample], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the speed of training iterations, and env steps per second of processor time, evaluations included."""
    progress = [sample["env_steps"] for sample in samples]
    lines = [line for line in lines if SPEED in line and progress[0] < line["env_steps"] <= progress[-1]]
    if len(lines) < 3:
        return {}
    ended = [samples[i]["seconds"] for i in np.searchsorted(progress, [line["env_steps"] for line in lines])]
    edges = np.linspace(0, len(samples) - 1, 4).round().astype(int).tolist()
    used = [(samples[edge]["env_steps"], samples[edge]["processes"][-1]["cpu_seconds"]) for edge in edges]
    per_cpu = [(steps - before) / (cpu - start) for (before, start), (steps, cpu) in itertools.pairwise(used)]
    spans = [[sample["reference_seconds"] for sample in samples[a:b]] for a, b in itertools.pairwise(edges)]
    relative = [rate * float(np.mean(span)) / REFERENCE_STEPS for rate, span in zip(per_cpu, spans, strict=True)]
    medians = [float(np.median(third)) for third in np.array_split([line[SPEED] for line in lines], 3)]
    return {
        "iterations": len(lines),
        "stages": [lines[0]["stage"], lines[-1]["stage"]],
        SPEED: fit(ended, [line[SPEED] for line in lines]),
        "thirds": {
            "env steps/s of an iteration, median": medians,
            "env steps per second of processor time": per_cpu,
            "the same against gymnasium's HalfCheetah": relative,
        },
    }


def left_behind(folder: Path, pids: set[int]) -> list[str]:
    """Return what outlives the training: processes after five seconds, temporary files, shared memory.

    Any program with an optimizer of torch makes the folder of its compiler, one a user; it is passed over while empty.
    """
    deadline = time.monotonic() + 5
    while (alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.1)
    files = [p for p in folder.rglob("*") if not (p.name.startswith("torchinductor_") and not any(p.iterdir()))]
    shared = [path for path in Path("/dev/shm").iterdir() if any(str(pid) in path.name for pid in pids)]
    return [*(f"process {pid}" for pid in alive), *map(str, sorted(files + shared))]


def table(result: dict[str, Any]) -> str:
    """Return the result as lines to read."""
    head = f"{'MiB':>8}{'lowest':>8}{'highest':>8}{'KiB/h':>9}{'%/h':>8}"
    rows = [f"{'after the warm-up':<23}PSS:{head}   its own:{head}   files  threads"]
    for name, fitted in result["processes"].items():
        memory = "           ".join(
            f"{fitted[thing]['mean'] / 1024:8.1f}{fitted[thing]['lowest'] / 1024:8.1f}"
            f"{fitted[thing]['highest'] / 1024:8.1f}{fitted[thing]['per_hour']:9.0f}{fitted[thing]['percent']:8.2f}"
            for thing in ("pss_kib", "own_kib")
        )
        files, threads = (f"{fitted[thing]['lowest']}–{fitted[thing]['highest']}" for thing in ("files", "threads"))
        rows.append(f"{name:<27}{memory}{files:>8}{threads:>9}")
    pace = result["speed"]
    for kind, thirds in pace["thirds"].items():
        numbers, change = ", ".join(f"{value:,.4g}" for value in thirds), 100 * (thirds[2] / thirds[0] - 1)
        rows.append(f"{kind}, in each third: {numbers} ({change:+.2f} %)")
    rows += [
        f"{pace['iterations']} iterations of stages {pace['stages'][0]} to {pace['stages'][1]}; slope of their "
        f"env steps/s: {pace[SPEED]['percent']:+.2f} %/hour",
        f"exit status {result['exit_status']}; left behind: {', '.join(result['left_behind']) or 'nothing'}",
    ]
    return "\n".join(rows)


def main() -> None:
    """Train, watch, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120.0, help="how long to train")
    parser.add_argument("--warm-up", type=float, default=10.0, help="minutes that are not fitted")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between samples")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/soak"), help="settings and output lie beside it")
    parser.add_argument("--out", type=Path, help="JSON file for the result and all samples")
    options, flags = parser.parse_known_args()
    run_dir = options.run_dir.resolve()
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    settings, log, metrics = run_dir.with_suffix(".yaml"), run_dir.with_suffix(".log"), run_dir / "metrics.jsonl"
    settings.write_text(yaml.safe_dump(config(), sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-c", "import metarl.cli; metarl.cli.main()", "train", str(settings), *flags]
    command += ["--run-dir", str(run_dir), "--max-minutes", str(options.minutes)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory(prefix="metarl-soak-") as folder, log.open("wb") as output:
        own = {"PYTHONPATH": path, "TMPDIR": folder, "OMP_NUM_THREADS": "1"}
        training = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **own},
            start_new_session=True,  # an interruption reaches it once, from here
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: training.terminate())
        try:
            samples = watch(training, metrics, options.every)
        finally:
            training.terminate()
        pids = {int(each["name"].split()[-1]) for sample in samples for each in sample["processes"][:-1]}
        leavings = left_behind(Path(folder), pids)
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()] if metrics.exists() else []
    in_training = [sample for sample in samples if sample["env_steps"] < samples[-1]["env_steps"]]
    later = [sample for sample in in_training if sample["seconds"] >= 60 * options.warm_up]
    pace = speed(later, lines) if len(later) > 3 else {}
    if not pace:
        raise SystemExit(f"training ended with status {training.returncode}, too soon for a fit; see {log}")
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    result = {
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "flags": flags,
        "minutes": options.minutes,
        "warm_up_minutes": options.warm_up,
        "processes": fits(later),
        "speed": pace,
        "exit_status": training.returncode,
        "left_behind": leavings,
    }
    print(table(result))
    if options.out:
        options.out.write_text(json.dumps({**result, "samples": samples}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
