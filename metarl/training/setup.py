"""With what a run starts: a new agent, or what its last checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from metarl import stability
from metarl.build import build_agent
from metarl.config.schema import RunConfig, dump_config, load_config
from metarl.deploy.policy import Policy, restore
from metarl.errors import UserError
from metarl.protocols import Agent, StabilityMethod
from metarl.runs.checkpoint import Checkpoint, CorruptCheckpointError
from metarl.runs.directory import clear_run_dir, differences, load_to_resume
from metarl.runs.random_state import check_random_state
from metarl.training.warm_start import stage_starts, start_from
from metarl.types import Position, Spaces


@dataclass(frozen=True)
class Start:
    """Where a run begins or goes on.

    Attributes:
        agent: new, or as it was saved.
        position: of the run.
        stages: what the agent takes over from other runs, or from a new agent, at the start of each stage that does so
            and is still to begin.
        config_text: what the run's config.yaml holds, or is going to.
        config_is_new: it is going to.
        score: of an evaluation at this position.
        logs: how many bytes of each log were written up to here; None for a new run.
        random_state: of the global streams; None for a new run.
    """

    agent: Agent
    position: Position
    stages: Mapping[int, Mapping[str, Tensor]]
    config_text: str
    config_is_new: bool = True
    score: float | None = None
    logs: Mapping[str, int] | None = None
    random_state: Mapping[str, Tensor] | None = None


def begin(config: RunConfig, spaces: Spaces, device: torch.device, run_dir: Path) -> Start:
    """Start a new run, and throw away one that the directory may hold; raises UserError."""
    agent, position = build_agent(config, spaces, device), Position()
    stages = dict(_stages(config, spaces, device, run_dir, agent, position))  # before an old run is thrown away
    if first := stages.pop(0, None):
        start_from(agent, first)  # nothing was trained before: it is what the run starts with, and saves
    clear_run_dir(run_dir)
    return Start(agent, position, stages, dump_config(config))


def resume(
    config: RunConfig,
    spaces: Spaces,
    device: torch.device,
    run_dir: Path,
    methods: Sequence[StabilityMethod],
    allow_config_change: bool,
) -> Start:
    """Go on with a run, and give its stability methods back what they knew; raises UserError."""
    checkpoint, position = load_to_resume(run_dir, config, allow_config_change=allow_config_change)
    if checkpoint.spaces != spaces:
        raise UserError(f"{run_dir} was trained for {checkpoint.spaces}; its tasks now have {spaces}")
    agent = restore(config, checkpoint, device).agent
    load_methods(methods, checkpoint)
    stages = _stages(config, spaces, device, run_dir, agent, position)
    path, manifest = run_dir / "config.yaml", checkpoint.manifest
    changed = bool(differences(load_config(path), config))
    text = dump_config(config) if changed else path.read_bytes().decode()
    return Start(agent, position, stages, text, changed, manifest.score, manifest.logs, _random_state(checkpoint))


def _random_state(checkpoint: Checkpoint) -> Mapping[str, Tensor] | None:
    """Return the state of the global random streams; raises UserError if they cannot be put into it."""
    try:
        state = checkpoint.load("random")
        if state:
            check_random_state(state)
    except (ValueError, CorruptCheckpointError) as error:
        raise UserError(
            f"{checkpoint.path} holds random streams that cannot go on: {error}; remove it to go on with the one before"
        ) from error
    return state or None


def _stages(
    config: RunConfig, spaces: Spaces, device: torch.device, run_dir: Path, agent: Agent, position: Position
) -> Mapping[int, Mapping[str, Tensor]]:
    """Return what the agent takes over at the start of stages that are still to begin."""
    if config.control == "scratch":
        new = build_agent(config, spaces, device).state_dict()
        begun = [(position.stage, position.stage_iteration) > (stage, 0) for stage in range(len(config.stages))]
        return {
            stage: {name: value.clone() for name, value in new.items()}
            for stage in range(len(config.stages))
            if not begun[stage]
        }
    policy = Policy(config, agent, spaces, position.env_steps, agent.initial_state(1))
    return stage_starts(policy, position, run_dir)


def load_methods(methods: Sequence[StabilityMethod], checkpoint: Checkpoint) -> None:
    """Give stability methods back what they knew; raises UserError."""
    if "stability" in checkpoint.parts and not methods:
        raise UserError(f"{checkpoint.path} was trained with stability methods of your own; give the same ones again")
    try:
        stability.load_state_dict(methods, checkpoint.load("stability"))
    except (ValueError, CorruptCheckpointError) as error:
        raise UserError(f"{checkpoint.path} does not fit the run's stability methods: {error}") from error
