#!/usr/bin/env python
"""Whether a run that is killed again and again ends as one that never was: the same metrics, the same tensors.

Trains a small sequence of stages under EWC and replay, with environment workers, through `metarl train`: once as it is,
and once killed by SIGKILL at random moments, some of them in start-up and some in training, evaluation or saving, and
resumed after each. Then both runs are compared, but for what the clock says. After each kill it looks for checkpoints
that are lost or damaged, and for processes and shared memory that are left behind. Exit status 1 if anything is wrong.

    .venv/bin/python tests/faults/kill_often.py                         # 50 kills, some 8 minutes; on Linux
    .venv/bin/python tests/faults/kill_often.py --kills 8 --seed 1
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event

from metarl.runs.checkpoint import Checkpoint, CorruptCheckpointError, load

ROOT = Path(__file__).resolve().parents[2]
MARK = "METARL_KILL_OFTEN"
"""An environment variable that all processes of a run inherit, by which they are found."""
SHARED = Path("/dev/shm")


def config(iterations: int) -> dict[str, Any]:
    """Return settings of three stages with the given number of iterations each, of a quarter of a second or so."""
    speeds = ([0, 1], [1, 2], [2, 3])
    tasks = {"family": "mujoco", "name": "HalfCheetahVel", "horizon": 40}
    return {
        "num_workers": 2,
        "num_tasks": 4,
        "rollouts_per_task": 4,
        "agent": {"name": "maml_ppo", "hidden_sizes": [32, 32], "outer": {"epochs": 3}},
        "stability": [{"name": "ewc", "fisher_states": 200}, {"name": "replay", "capacity": 24}],
        "checkpoint_every_iterations": 2,
        "evaluation": {"every_iterations": 5, "num_tasks": 4},
        "device": "cpu",
        "stages": [{"name": str(v), "tasks": {**tasks, "velocity": v}, "iterations": iterations} for v in speeds],
    }


def start(run_dir: Path, settings: Path, *, resume: bool, output: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start `metarl train`; returns the process, and the mark that all of its descendants carry."""
    mark = uuid.uuid4().hex
    command = [sys.executable, "-c", "import metarl.cli; metarl.cli.main()", "train", str(settings)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", MARK: mark}
    with output.open("ab") as file:
        return subprocess.Popen(
            [*command, "--run-dir", str(run_dir), *(["--resume"] if resume else [])],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        ), mark


def alive(mark: str) -> list[int]:
    """Return the processes that carry a mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
    return found


def orphans(mark: str, seconds: float = 2.0) -> list[int]:
    """Return the processes that carry a mark when so much time has passed."""
    deadline = time.monotonic() + seconds
    while (found := alive(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def checkpoints(run_dir: Path) -> tuple[dict[int, Checkpoint], list[str]]:
    """Return the checkpoints that can be loaded by their iteration, and why the others cannot."""
    sound, rejected = {}, []
    for path in sorted((run_dir / "checkpoints").glob("[0-9]*")):
        try:
            sound[int(path.name)] = load(path)
        except CorruptCheckpointError as error:
            rejected.append(str(error))
    return sound, rejected


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without what the clock says."""
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in found]


def events(run_dir: Path) -> list[tuple[str, int, float]]:
    """Return tag, step and value of each scalar in TensorBoard's files, as often as it is there; not the clock's."""
    found = []
    for path in (run_dir / "tensorboard").iterdir():
        for record in RawEventFileLoader(str(path), detect_file_replacement=False).Load():
            event = Event.FromString(record)
            scalars = (each for each in event.summary.value if each.HasField("simple_value"))
            found += [(each.tag, event.step, each.simple_value) for each in scalars]
    return sorted(each for each in found if not each[0].startswith("time/"))


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of the last checkpoint, by part and name.

    But for the global random streams, which begin anywhere in a new run: metarl draws from none of them.
    """
    sound, _ = checkpoints(run_dir)
    last = sound[max(sound)]
    return {f"{part}.{name}": value for part in last.parts - {"random"} for name, value in last.load(part).items()}


def different(run_dir: Path, other: Path) -> list[str]:
    """Return in what the results of two runs differ."""
    found = []
    for what, read in (("metrics.jsonl", lines), ("tensorboard", events)):
        ours, theirs = read(run_dir), read(other)
        found += [f"{what}: {each}" for each in ours if each not in theirs][:3]
        found += [f"{what}: without {each}" for each in theirs if each not in ours][:3]
        if ours != theirs:
            found.append(f"{what}: {len(ours)} and {len(theirs)} entries")
    ours, theirs = tensors(run_dir), tensors(other)
    found += [f"only one has {name}" for name in sorted(ours.keys() ^ theirs.keys())]
    found += [name for name in sorted(ours.keys() & theirs.keys()) if not _same(ours[name], theirs[name])]
    for name in ("config.yaml", "evaluation/continual.json"):
        files = [folder / name for folder in (run_dir, other) if (folder / name).exists()]
        if len({path.read_bytes() for path in files}) > 1 or len(files) == 1:
            found.append(name)
    return found


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.numpy().tobytes() == right.numpy().tobytes()


def under_way(run_dir: Path, process: subprocess.Popen[bytes], more: int = 1) -> None:
    """Wait until a run has tracked this many more lines, or has ended."""
    metrics = run_dir / "metrics.jsonl"
    least, count = sys.maxsize, 0
    while count < least + more and process.poll() is None:
        time.sleep(0.02)
        count = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        least = min(least, count)  # a run that goes on begins by cutting off some


def kill_often(folder: Path, kills: int, seed: int, iterations: int) -> dict[str, Any]:
    """Train twice in `folder`, with and without kills; returns what was found."""
    settings, output = folder / "config.yaml", folder / "output.txt"
    settings.write_text(yaml.safe_dump(config(iterations), sort_keys=False))
    whole, run_dir, rng = folder / "whole", folder / "killed", np.random.default_rng(seed)
    shared, began = set(SHARED.iterdir()), time.monotonic()
    process, _ = start(whole, settings, resume=False, output=output)
    under_way(whole, process)
    start_up = time.monotonic() - began
    if process.wait():
        raise SystemExit(f"the run that nobody kills ended with status {process.returncode}:\n{output.read_text()}")
    iteration = (time.monotonic() - began - start_up) / (3 * iterations)

    result: dict[str, Any] = {"kills": {True: 0, False: 0}, "rejected": [], "lost": 0, "orphans": 0, "shared": set()}
    newest, status = -1, None
    while status is None:
        process, mark = start(run_dir, settings, resume=(run_dir / "config.yaml").exists(), output=output)
        try:
            if sum(result["kills"].values()) == kills:
                status = process.wait()
            in_training = rng.random() < 0.6
            if in_training:
                under_way(run_dir, process, int(rng.integers(1, 6)))
            status = process.wait(rng.uniform(0, iteration if in_training else start_up))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            result["kills"][in_training] += 1
        result["orphans"] += len(orphans(mark))
        result["shared"] |= {each.name for each in set(SHARED.iterdir()) - shared if str(process.pid) in each.name}
        sound, rejected = checkpoints(run_dir)
        result["rejected"] += rejected
        result["lost"] += max(sound, default=-1) < newest
        newest = max(sound, default=-1)
    messages = re.findall(rb"^.*(?:Traceback|rejected a checkpoint|Error).*$", output.read_bytes(), re.MULTILINE)
    found = events(run_dir)
    return {
        **result,
        "too few": kills - sum(result["kills"].values()),
        "status": status,
        "messages": [line.decode(errors="replace") for line in messages],
        "left": sorted(str(path.relative_to(run_dir)) for path in run_dir.rglob(".*")),
        "differences": different(run_dir, whole),
        "twice": len(found) - len({each[:2] for each in found}),
        "entries": {"lines": len(lines(run_dir)), "scalars": len(found), "tensors": len(tensors(run_dir))},
        "seconds": time.monotonic() - began,
    }


def wrong(result: dict[str, Any]) -> list[str]:
    """Return the names of the findings that should not be."""
    bad = ("too few", "status", "messages", "rejected", "lost", "orphans", "shared", "left", "differences", "twice")
    return [name for name in bad if result[name]]


def table(result: dict[str, Any]) -> str:
    """Return the result as lines to read."""
    compared = ", ".join(f"{count:,} {name}" for name, count in result["entries"].items())
    rows = {
        "kills": f"{result['kills'][False]} in start-up, {result['kills'][True]} in training",
        "checkpoints lost": result["lost"],
        "checkpoints rejected": len(result["rejected"]),
        "processes orphaned": result["orphans"],
        "shared memory left": len(result["shared"]),
        "temporary files left": len(result["left"]),
        "compared": f"{compared}, config.yaml, continual.json",
        "scalars that are there twice": result["twice"],
        "differences": len(result["differences"]),
        "exit status in the end": result["status"],
        "seconds": f"{result['seconds']:.0f}",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Kill, compare and print; returns what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--iterations", type=int, help="of each of three stages; enough for the kills if left out")
    parser.add_argument("--folder", type=Path, help="where both runs are kept; a temporary one if left out")
    options = parser.parse_args(arguments)
    iterations = options.iterations or 4 + options.kills
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="metarl-kills-")))
        folder.mkdir(parents=True, exist_ok=True)
        result = kill_often(folder.resolve(), options.kills, options.seed, iterations)
    print(table(result))
    for name in wrong(result):
        print(f"wrong: {name}: {result[name]}")
    return result


if __name__ == "__main__":
    sys.exit(bool(wrong(main())))
