"""What `metarl doctor` finds out: versions, devices, and whether each family's simulator runs here."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import numpy as np

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


def findings() -> Iterator[tuple[str, str, bool]]:
    """Yield what was looked at, what was found, and whether it is as it should be."""
    yield "python", f"{platform.python_version()} on {platform.platform()}", True
    for name in LIBRARIES:
        try:
            yield name, version(name), True
        except PackageNotFoundError:
            yield name, f"missing: pip install {name}", False
    import torch

    from metarl.envs.vector import usable_cores

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none; updates run on the CPU"
    yield "gpu", gpu, True
    yield "cpu cores", f"{usable_cores()} usable, {torch.get_num_threads()} torch threads", True
    for family, options in (
        ("navigation", {}),
        ("mujoco", {"name": "HalfCheetahDir"}),
        ("metaworld", {"benchmark": "ML1", "name": "reach-v3"}),
    ):
        try:
            yield family, f"{_steps_per_second(family, options):,.0f} env steps/s in one process", True
        except Exception as error:  # whatever is wrong with an installation, the doctor reports it
            yield family, f"{type(error).__name__}: {error}", False


def _steps_per_second(family: str, options: dict[str, str]) -> float:
    from metarl.envs import distribution, make

    env = make(distribution(family, **options).train_tasks[0])
    env.reset(seed=0)
    action = np.zeros(env.action_space.shape or (), dtype=np.float32)
    steps, began = 0, time.perf_counter()
    while time.perf_counter() - began < 0.5:
        _, _, terminated, truncated, _ = env.step(action)
        steps += 1
        if terminated or truncated:
            env.reset(seed=0)
    rate = steps / (time.perf_counter() - began)
    env.close()
    return rate
