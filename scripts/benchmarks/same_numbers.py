"""Prove that a change of the code changes no number: hashes of small runs, recorded once and compared later.

Trains every embedded config, and every agent, memory and stability method that no config names, for a few shrunken
iterations, evaluates each run on held-out tasks, and hashes

    metrics   metrics.jsonl without its `time/…` scalars
    tensors   every tensor of the last checkpoint, by name
    report    the numbers in the report of `metarl evaluate`

    python -m scripts.benchmarks.same_numbers record --metarl ../before/.venv/bin/metarl   # before a change
    python -m scripts.benchmarks.same_numbers compare                                      # after it

The numbers depend on the processor and on the versions of libraries. The file of hashes names both, and `compare` says
when they differ: record both sides on one machine then.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
RECORDED = Path(__file__).with_suffix(".json")

SMALL = ["--num-tasks", "4", "--device", "cpu", "--num-workers", "1", "--evaluation.num-tasks", "2"]
"""What makes a run small, whatever its config."""

STABILITY = ["--stability", "ewc", "replay", "l2", "mas", "mer"]

METHODS = [
    "maml_trpo",
    "maml_vpg",
    "fomaml",
    "reptile",
    "meta_curvature",
    "imaml",
    "anil",
    "meta_dropout",
    "multi_task",
]

MEMORIES = ["lstm", "transformer", "episodic"]

CASES: dict[str, list[str]] = {
    **{path.stem: [path.stem] for path in sorted((ROOT / "configs").glob("*.yaml"))},
    **{f"agent_{name}": ["navigation_maml_ppo", "--agent.name", name] for name in METHODS},
    **{f"memory_{name}": ["navigation_rl2", "--agent.memory.name", name] for name in MEMORIES},
    "learned_baseline": ["navigation_maml_ppo", "--agent.baseline", "learned"],
    "separate_critic": ["navigation_rl2", "--agent.critic.name", "separate"],
    "stability_maml_ppo": ["continual_rotated_cued_wedges_maml_ppo", *STABILITY],
    "stability_rl2": ["continual_cued_wedges_rl2", *STABILITY],
    "heads_maml_ppo": ["continual_rotated_cued_wedges_maml_ppo", "--stage-cue", "head"],
    "heads_rl2": ["continual_cued_wedges_rl2", "--stage-cue", "head", "--agent.skip-inputs", "true"],
    "joint": ["continual_cued_wedges_rl2", "--control", "joint"],
    "scratch": ["continual_cued_wedges_rl2", "--control", "scratch"],
    "curriculum": ["navigation_rl2", "--stages.0.curriculum.iterations", "2"],
}
"""Name of a case → the config and flags of `metarl train`."""


def flags_of(case: list[str]) -> list[str]:
    """Return the flags that make a case small: two iterations a stage, short episodes, few trials."""
    config = yaml.safe_load((ROOT / "configs" / f"{case[0]}.yaml").read_text())
    by_memory = config["agent"]["name"] == "rl2"
    flags = [*SMALL, "--rollouts-per-task", "2" if by_memory else "3"]
    if by_memory:
        flags += ["--agent.trial-episodes", "2"]
    for number, stage in enumerate(config["stages"]):
        horizon = "20" if stage["tasks"]["family"] == "navigation" else "45"
        flags += [f"--stages.{number}.iterations", "2", f"--stages.{number}.tasks.horizon", horizon]
    return [*flags, "--max-iterations", "5"]


def hash_metrics(path: Path) -> str:
    """Return the hash of a metrics.jsonl without what the clock says."""
    digest = hashlib.sha256()
    for line in path.read_text().splitlines():
        entry = {name: value for name, value in json.loads(line).items() if not name.startswith(("time", "wall"))}
        digest.update(json.dumps(entry, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def hash_tensors(folder: Path) -> str:
    """Return the hash of a checkpoint's tensors, each with its name and shape; the global streams start anywhere."""
    digest = hashlib.sha256()
    for path in sorted(set(folder.glob("*.safetensors")) - {folder / "random.safetensors"}):
        with safe_open(path, "numpy") as tensors:
            for name in sorted(tensors.keys()):
                value = tensors.get_tensor(name)
                digest.update(f"{path.stem}/{name} {value.dtype} {value.shape}\n".encode() + value.tobytes())
    return digest.hexdigest()[:16]


def hash_report(path: Path) -> str:
    """Return the hash of all numbers of a JSON report, each with its place."""
    digest = hashlib.sha256()

    def add(place: str, value: Any) -> None:
        if isinstance(value, dict | list):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                add(f"{place}/{key}", item)
        elif not isinstance(value, str):
            digest.update(f"{place} {value!r}\n".encode())

    add("", json.loads(path.read_text()))
    return digest.hexdigest()[:16]


def numbers_of(metarl: Path, name: str) -> dict[str, str]:
    """Train and evaluate one case; returns its hashes. Raises RuntimeError if a command fails."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        run_dir, report = Path(folder) / "run", Path(folder) / "report.json"
        commands = [
            ["train", case[0], *flags_of(case), *case[1:], "--run-dir", str(run_dir)],
            ["evaluate", str(run_dir), "--num-tasks", "2", "--json", str(report)],
        ]
        for command in commands:
            done = subprocess.run(
                [str(metarl), *command],
                cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise RuntimeError(f"{name}: metarl {' '.join(command)}\n{done.stderr.strip()}")
        newest = max(path for path in (run_dir / "checkpoints").iterdir() if path.name.isdigit())
        return {
            "metrics": hash_metrics(run_dir / "metrics.jsonl"),
            "tensors": hash_tensors(newest),
            "report": hash_report(report),
        }


def machine() -> dict[str, str]:
    """Return what the numbers depend on beside the code."""
    fields = dict(
        (part.strip() for part in line.split(":", 1))
        for line in reversed(Path("/proc/cpuinfo").read_text().splitlines())
        if ":" in line
    )
    named = [fields.get(name, "?") for name in ("model name", "cpu family", "model")]
    return {
        "processor": "{} family {} model {}".format(*named),  # processors of one name may differ
        **{name: version(name) for name in ("torch", "numpy", "mujoco", "metaworld")},
    }


def main() -> None:
    """Record or compare; exits with 1 if a number differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("--metarl", type=Path, default=Path(sys.executable).with_name("metarl"), help="the program")
    parser.add_argument("--file", type=Path, default=RECORDED, help="where the hashes are")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="some of the cases")
    options = parser.parse_args()
    with ThreadPoolExecutor(2) as pool:
        found = dict(
            zip(options.only, pool.map(lambda name: numbers_of(options.metarl, name), options.only), strict=True)
        )
    if options.action == "record":
        options.file.write_text(json.dumps({"machine": machine(), "cases": found}, indent=1) + "\n")
        print(f"recorded {len(found)} cases in {options.file}")
        return
    recorded = json.loads(options.file.read_text())
    if recorded["machine"] != machine():
        print(f"recorded on {recorded['machine']}; this is {machine()}: hashes may differ without a change of the code")
    differing = 0
    for name, hashes in found.items():
        different = [part for part in hashes if hashes[part] != recorded["cases"][name][part]]
        differing += bool(different)
        print(f"{name:<45} {'same' if not different else 'DIFFERENT: ' + ', '.join(different)}")
    print(f"{len(found) - differing} of {len(found)} cases have the same numbers")
    raise SystemExit(bool(differing))


if __name__ == "__main__":
    main()
