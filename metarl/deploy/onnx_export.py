"""Writes a controller as one ONNX file (opset 18), checked against torch before it is kept.

The file ends in a hash of all that is before it, by which `metarl.runtime` tells a damaged or a foreign file. Needs the
packages of the extra `onnx`, imported when a file is written.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from metarl.build import horizon_of
from metarl.config.schema import RunConfig, dump_config, hash_of
from metarl.errors import UserError
from metarl.protocols import Controller
from metarl.runs.atomic_files import replace_file
from metarl.runtime import FORMAT, METADATA_KEY, OnnxPolicy, seal
from metarl.spaces import CheckedEnv, Spaces, env_attribute
from metarl.types import Task

if TYPE_CHECKING:
    import gymnasium

OPSET = 18
TOLERANCE = 1e-5
"""Greatest difference to torch, in units of half the action range, at which a file is kept."""

_STEPS = 20  # of the comparison, from a trial's beginning
_BATCH = 3


def describe(
    controller: Controller,
    config: RunConfig,
    spaces: Spaces,
    *,
    trial_episodes: int | None,
    adapted: bool,
    env_steps: int,
    noise_size: int,
    env: gymnasium.Env[Any, Any] | None,
    task: Task | None,
    control_period_s: float | None,
) -> dict[str, Any]:
    """Return the metadata of an exported file.

    Args:
        controller: to be exported.
        config: of its run.
        spaces: that the agent was trained for.
        trial_episodes: L of an agent with a memory; None without.
        adapted: whether the policy was adapted.
        env_steps: of its training.
        noise_size: numbers of noise that an action takes.
        env: names entries of observations and actions, and the control period; None: unknown.
        task: that the policy was adapted to.
        control_period_s: time between two actions; that of `env` if None.

    Returns:
        `{"format", "agent", "adapted", "task", "observation_size", "action_size", "state_size", "observation_names",
        "observation_parts", "image", "action_names", "action_kind", "action_low", "action_high", "noise_size",
        "control_period_s", "reward": {"mean", "std"}, "trial": {"episodes", "horizon"}, "env_steps", "config_sha256",
        "versions"}`, null where unknown. `task` is what it was
        adapted to, `reward` the scale on which the graph reads rewards, which come in the environment's own
        units, `trial` the trials that a memory was trained on: episodes, and steps of an episode, those of `task` or
        else of the run's last stage (null for custom tasks).
    """
    if env is not None and (misfit := spaces.misfit(CheckedEnv(env).spaces)):
        raise ValueError(misfit)
    sizes = {"observation": spaces.observation_size, "action": spaces.action_size}
    names = {field: None if env is None else env_attribute(env, field) for field in (f"{kind}_names" for kind in sizes)}
    for kind, size in sizes.items():
        listed = names[f"{kind}_names"]
        if listed is not None and len(listed) != size:
            raise ValueError(f"the environment names {len(listed)} entries of its {kind}s; the policy has {size}")
    period = env_attribute(env, "dt") if control_period_s is None and env is not None else control_period_s
    if period is not None and not period > 0:
        raise ValueError(f"control_period_s is {period}; expected more than 0")
    of_task = {} if task is None else dict(task.options)  # stages may differ
    horizon = int(of_task["horizon"]) if "horizon" in of_task else horizon_of(config)
    return {
        "format": FORMAT,
        "agent": config.agent.name,
        "adapted": adapted,
        "task": None if task is None else json.loads(task.to_json()),
        **{f"{kind}_size": size for kind, size in sizes.items()},
        **{field: None if listed is None else list(listed) for field, listed in names.items()},
        "observation_parts": [list(part) for part in spaces.observation_parts],
        "image": None if spaces.image is None else list(spaces.image),
        "action_kind": spaces.action_kind,
        "noise_size": noise_size,
        "action_low": list(spaces.action_low),
        "action_high": list(spaces.action_high),
        "control_period_s": None if period is None else float(period),
        "reward": controller.reward_scale,
        "trial": None if trial_episodes is None else {"episodes": trial_episodes, "horizon": horizon},
        "state_size": controller.state_size,
        "env_steps": env_steps,
        "config_sha256": config_hash(config),
        "versions": {name: version(name) for name in ("metarl", "torch", "onnx")},
    }


def config_hash(config: RunConfig) -> str:
    """Return the hash of a run's whole config, as `config.yaml` holds it."""
    return hash_of(dump_config(config).encode())


def write_onnx(controller: Controller, path: Path, metadata: dict[str, Any]) -> None:
    """Write a controller with its metadata; see `Policy.export`."""
    data = seal(_serialized(controller, metadata))
    _compare(controller, OnnxPolicy(data), metadata)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another file") from error


def _serialized(controller: Any, metadata: dict[str, Any]) -> bytes:
    """Return the model of a controller, any number of rows at a time."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime would send names and sizes of models over the net
    try:
        import onnx
        import onnxruntime  # noqa: F401  (the comparison needs it: said before the work is done)
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise UserError(f'exporting needs {error.name}: pip install "metarl[onnx]"') from error
    kind = torch.float32 if metadata["image"] is None else torch.uint8
    observations = torch.zeros(_BATCH, metadata["observation_size"], dtype=kind)
    noise = torch.zeros(_BATCH, metadata["noise_size"])
    inputs, outputs = {"observations": observations}, ["actions"]
    if metadata["state_size"]:
        inputs |= {"rewards": torch.zeros(_BATCH), "episode_start": torch.zeros(_BATCH, dtype=torch.bool)}
        inputs["state"] = torch.zeros(_BATCH, metadata["state_size"])
        outputs.append("next_state")
    inputs["noise"] = noise
    batch = torch.export.Dim("batch")
    with _quiet():
        program = torch.onnx.export(
            controller,
            tuple(inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=tuple({0: batch} for _ in inputs),
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    # The default noise is 0, which gives the mean. Its single row is broadcast over the batch.
    noise_input = next(each for each in model.graph.input if each.name == "noise")
    noise_input.type.tensor_type.shape.dim[0].dim_param = "noise_rows"
    del model.graph.value_info[:]  # in between all rows were taken for as many
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((1, noise.shape[1]), np.float32), "noise"))
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(metadata)})
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes on itself from the user."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _compare(controller: Any, exported: OnnxPolicy, metadata: dict[str, Any]) -> None:
    """Raise RuntimeError if the exported model does anything else than the controller on random inputs."""
    for rows, noisy in ((_BATCH, True), (1, False)):
        difference = _difference(controller, exported, metadata, rows, noisy)
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"the exported model differs from torch by {difference:.1e} of half the action range on random inputs; "
                f"expected at most {TOLERANCE}. No file was written"
            )


@torch.inference_mode()
def _difference(controller: Any, exported: OnnxPolicy, metadata: dict[str, Any], rows: int, noisy: bool) -> float:
    """Return the greatest difference between their actions in trials of random inputs, in halves of the range."""
    rng = np.random.default_rng(0)
    half_range = (np.array(metadata["action_high"]) - np.array(metadata["action_low"])) / 2
    mean, deviation = controller.observation_scale  # what a policy meets lies there
    scale = controller.reward_scale or {"mean": 0.0, "std": 1.0}
    sizes = metadata["observation_size"], metadata["noise_size"]
    if metadata["action_kind"] != "box":
        half_range = np.ones_like(half_range)
    state = torch.zeros(rows, metadata["state_size"])
    theirs: NDArray[np.float32] | None = None
    differences = []
    for step in range(_STEPS):
        normal, noise = (rng.standard_normal((rows, size), np.float32) for size in sizes)
        observations = (mean + deviation * normal).astype(np.float32)
        if metadata["image"] is not None:
            observations = rng.integers(0, 256, observations.shape, np.uint8)
        rewards = (scale["mean"] + scale["std"] * rng.standard_normal(rows)).astype(np.float32)
        rewards[rng.uniform(size=rows) < 0.2] = np.nan
        start = rng.uniform(size=rows) < (1.0 if step == 0 else 0.2)
        inputs = [torch.from_numpy(observations)]
        if metadata["state_size"]:
            inputs += [torch.from_numpy(rewards), torch.from_numpy(start), state]
        expected = controller(*inputs, torch.from_numpy(noise) if noisy else None)
        if metadata["state_size"]:
            expected, state = expected
        actions, theirs = exported.run(observations, theirs, start, noise if noisy else None, rewards)
        differences.append(np.abs((actions - expected.numpy()) / half_range).max())
    return float(np.max(differences))  # NaN if any is
