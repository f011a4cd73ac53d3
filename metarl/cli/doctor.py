"""`metarl doctor`: checks versions, devices, rendering and the simulator of each task family."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, NamedTuple

import numpy as np

from metarl.cli.arguments import Parser
from metarl.errors import UserError

LIBRARIES = (
    "metarl",
    "torch",
    "gymnasium",
    "metaworld",
    "mujoco",
    "stable-baselines3",
    "tensorboard",
    "numpy",
    "pydantic",
    "safetensors",
)


EXTRAS = {
    "onnx": (("onnx", "onnxruntime", "onnxscript"), "metarl export, OnnxPolicy"),
    "video": (("imageio-ffmpeg",), "metarl play as MP4"),
}
"""Each optional extra: its packages, and what requires them."""


def doctor(arguments: list[str]) -> int:
    """Check the installation."""
    Parser(
        "metarl doctor",
        description="Check versions, devices, rendering and simulators on this machine. Items marked -- are optional.",
    ).parse_args(arguments)

    healthy = True
    for name, detail, state in findings():
        print(f"{state:<4}{name:<20}{detail}", flush=True)
        healthy &= state != "BAD"
    return 0 if healthy else 1


class Finding(NamedTuple):
    """The result of one check.

    Attributes:
        name: the name of the check.
        detail: the version or value, or how to fix the problem.
        state: `ok`; `BAD` if metarl does not work without it; `--` if it is missing but optional.
    """

    name: str
    detail: str
    state: Literal["ok", "BAD", "--"] = "ok"


def findings() -> Iterator[Finding]:
    """Run the checks one by one."""
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    for name in LIBRARIES:
        try:
            yield Finding(name, version(name))
        except PackageNotFoundError:
            yield Finding(name, f"missing: pip install {name}", "BAD")
    for extra, (packages, purpose) in EXTRAS.items():
        yield _extra(extra, packages, purpose)
    yield _rendering()
    import torch

    from metarl.envs import FAMILIES
    from metarl.envs.vector.serial import usable_cores

    if torch.cuda.is_available():
        yield Finding("gpu", f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}; --device auto is cuda")
    else:
        yield Finding("gpu", "none available to PyTorch; --device auto is cpu")
    yield Finding("cpu cores", f"{usable_cores()} usable, {torch.get_num_threads()} torch threads")
    for name, family in FAMILIES.items():
        try:
            yield Finding(name, f"{_steps_per_second(name, family.example):,.0f} env steps/s in one process")
        except Exception as error:  # any fault of an installation is a finding
            yield Finding(name, f"{type(error).__name__}: {error}", "BAD")


def _extra(name: str, packages: tuple[str, ...], purpose: str) -> Finding:
    versions, missing = [], []
    for package in packages:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        return Finding(f"extra {name}", f'no {", ".join(missing)} ({purpose}): pip install "metarl[{name}]"', "--")
    return Finding(f"extra {name}", ", ".join(versions))


def _rendering() -> Finding:
    from metarl.envs.drawing import rendering

    try:
        backend = rendering.choose_gl()
    except UserError as error:
        return Finding("rendering", str(error), "--")
    if not rendering.gl_works(backend):
        return Finding("rendering", f"OpenGL with MUJOCO_GL={backend} does not work here; unset MUJOCO_GL", "--")
    return Finding("rendering", f"OpenGL with {backend}")


def _steps_per_second(family: str, options: Mapping[str, Any]) -> float:
    from metarl.collect import run_episode
    from metarl.envs import distribution, make
    from metarl.spaces import CheckedEnv

    env = CheckedEnv(make(distribution(family, **options).train_tasks[0]))
    action = env.env_action(np.zeros(env.spaces.action_size))
    steps, began = 0, time.perf_counter()
    while time.perf_counter() - began < 0.5:
        steps += sum(1 for _ in run_episode(env, lambda *_: action, seed=0))
    rate = steps / (time.perf_counter() - began)
    env.close()
    return rate
