"""`metarl doctor`: versions, devices, what can be drawn, and whether each family's simulator runs."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, NamedTuple

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
"""The optional extras: the packages of each, and what needs them."""


def doctor(arguments: list[str]) -> int:
    """Check this machine."""
    Parser(
        "metarl doctor",
        description="Check versions, devices, drawing and simulators on this machine. What is marked -- is optional.",
    ).parse_args(arguments)

    healthy = True
    for name, found, state in findings():
        print(f"{state:<4}{name:<20}{found}", flush=True)
        healthy &= state != "BAD"
    return 0 if healthy else 1


class Finding(NamedTuple):
    """One thing that was looked at.

    Attributes:
        name: of it.
        found: what was found, or how to mend it.
        state: `ok`; `BAD` for what metarl does not work without; `--` for what is missing but optional.
    """

    name: str
    found: str
    state: Literal["ok", "BAD", "--"] = "ok"


def findings() -> Iterator[Finding]:
    """Look at one thing after another."""
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    for name in LIBRARIES:
        try:
            yield Finding(name, version(name))
        except PackageNotFoundError:
            yield Finding(name, f"missing: pip install {name}", "BAD")
    for extra, (packages, purpose) in EXTRAS.items():
        yield _extra(extra, packages, purpose)
    yield _drawing()
    import torch

    from metarl.envs import FAMILIES
    from metarl.envs.vector.serial import usable_cores

    if torch.cuda.is_available():
        yield Finding("gpu", f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}; --device auto is cuda")
    else:
        yield Finding("gpu", "none that PyTorch can use; --device auto is cpu")
    yield Finding("cpu cores", f"{usable_cores()} usable, {torch.get_num_threads()} torch threads")
    for name, family in FAMILIES.items():
        try:
            yield Finding(name, f"{_steps_per_second(name, family.example):,.0f} env steps/s in one process")
        except Exception as error:  # whatever is wrong with an installation, the doctor reports it
            yield Finding(name, f"{type(error).__name__}: {error}", "BAD")


def _extra(name: str, packages: tuple[str, ...], purpose: str) -> Finding:
    found, missing = [], []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        return Finding(f"extra {name}", f'no {", ".join(missing)} ({purpose}): pip install "metarl[{name}]"', "--")
    return Finding(f"extra {name}", ", ".join(found))


def _drawing() -> Finding:
    from metarl.envs.drawing import rendering

    try:
        backend = rendering.choose_gl()
    except UserError as error:
        return Finding("drawing", str(error), "--")
    if not rendering.gl_works(backend):
        return Finding("drawing", f"OpenGL by {backend} (MUJOCO_GL) does not work here; unset MUJOCO_GL", "--")
    return Finding("drawing", f"OpenGL by {backend}")


def _steps_per_second(family: str, options: Mapping[str, str]) -> float:
    from metarl.collect import run_episode
    from metarl.envs import distribution, make

    env = make(distribution(family, **options).train_tasks[0])
    action = np.zeros(env.action_space.shape or (), dtype=np.float32)
    steps, began = 0, time.perf_counter()
    while time.perf_counter() - began < 0.5:
        steps += sum(1 for _ in run_episode(env, lambda *_: action, seed=0))
    rate = steps / (time.perf_counter() - began)
    env.close()
    return rate
