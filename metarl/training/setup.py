"""Initial state of a run: new, or restored from a checkpoint (resume)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from metarl import stability
from metarl.build import build_agent, common_spaces, stage_managers
from metarl.config.schema import RunConfig, dump_config, load_config
from metarl.deploy.policy import Policy, restore
from metarl.envs.manager import Manager
from metarl.envs.vector.union import UnionOfTasks
from metarl.errors import UserError
from metarl.protocols import Agent, AgentBuilder, StabilityMethod, StoresData, TaskDistribution
from metarl.runs.checkpoint import Checkpoint, CorruptCheckpointError, Entry
from metarl.runs.data_store import DATA, DataStore
from metarl.runs.directory import clear_run_dir, differences, load_to_resume
from metarl.runs.random_state import check_random_state
from metarl.spaces import Spaces
from metarl.training.warm_start import stage_starts, start_from
from metarl.types import Position


@dataclass(frozen=True)
class Start:
    """The state that a run starts from.

    Attributes:
        agent: new, or as it was saved.
        position: of the run.
        stages: entries that the agent takes over from other runs, or from a new agent, at the start of each stage that
            does so and is still to begin.
        config_text: content of the run's config.yaml.
        config_is_new: whether that file is still to be written.
        score: of an evaluation at this position.
        logs: bytes of each log at this position; None for a new run.
        random_state: of the global streams; None for a new run.
        data: files of stored data that belong to the checkpoint; None for a new run.
    """

    agent: Agent
    position: Position
    stages: Mapping[int, Mapping[str, Tensor]]
    config_text: str
    config_is_new: bool = True
    score: float | None = None
    logs: Mapping[str, int] | None = None
    random_state: Mapping[str, Tensor] | None = None
    data: Mapping[str, Entry] | None = None


@dataclass(frozen=True)
class RunParts:
    """What a run is made of, next to its agent.

    Attributes:
        distributions: the tasks of each stage.
        managers: draw the training tasks of each stage.
        methods: stability methods.
        spaces: of all stages.
        training_sources: the tasks that each stage collects on: its own, or those of all in joint training.
    """

    distributions: Sequence[TaskDistribution]
    managers: Sequence[Manager]
    methods: Sequence[StabilityMethod]
    spaces: Spaces
    training_sources: Sequence[TaskDistribution]


def prepare(
    config: RunConfig,
    distributions: Sequence[TaskDistribution],
    methods: Sequence[StabilityMethod] | None,
    run_dir: Path,
) -> RunParts:
    """Return the parts of a run; raises UserError.

    Args:
        config: of the run.
        distributions: the tasks of each stage.
        methods: custom stability methods; None for those that the config names.
        run_dir: where methods keep what does not fit into memory.
    """
    if methods is None:
        methods = [stability.build(method, run_dir) for method in config.stability]
    managers, spaces = stage_managers(config, distributions), common_spaces(distributions)
    joint = config.control == "joint"
    sources = [UnionOfTasks(distributions)] * len(distributions) if joint else distributions
    return RunParts(distributions, managers, methods, spaces, sources)


def begin(
    config: RunConfig, spaces: Spaces, device: torch.device, run_dir: Path, builder: AgentBuilder | None
) -> Start:
    """Start a new run, and overwrite the one that the directory may hold; raises UserError."""
    agent, position = build_agent(config, spaces, device, builder=builder), Position()
    policy = Policy(config, agent, spaces, 0, agent.initial_state(1), builder=builder)
    stages = dict(_stages(policy, position, run_dir))  # before an old run is removed
    if first := stages.pop(0, None):
        start_from(agent, first)  # nothing was trained before: the run starts with it, and saves it
    clear_run_dir(run_dir)
    return Start(agent, position, stages, dump_config(config))


def resume(
    config: RunConfig,
    parts: RunParts,
    device: torch.device,
    run_dir: Path,
    allow_config_change: bool,
    builder: AgentBuilder | None,
) -> Start:
    """Restore a run and the state of its stability methods; raises UserError."""
    checkpoint, position = load_to_resume(run_dir, config, allow_config_change=allow_config_change)
    if checkpoint.spaces != parts.spaces:
        raise UserError(f"{run_dir} was trained for {checkpoint.spaces}; its tasks now have {parts.spaces}")
    policy = restore(config, checkpoint, device, builder)
    load_methods(parts.methods, checkpoint)
    load_stored_data(policy.agent, checkpoint, run_dir)
    stages = _stages(policy, position, run_dir)
    path, manifest = run_dir / "config.yaml", checkpoint.manifest
    changed = bool(differences(load_config(path), config))
    text = dump_config(config) if changed else path.read_bytes().decode()
    logs, random_state = manifest.logs, _random_state(checkpoint)
    return Start(policy.agent, position, stages, text, changed, manifest.score, logs, random_state, manifest.data)


def _random_state(checkpoint: Checkpoint) -> Mapping[str, Tensor] | None:
    """Return the state of the global random streams; raises UserError if they cannot be put into it."""
    try:
        state = checkpoint.load("random")
        if state:
            check_random_state(state)
    except (ValueError, CorruptCheckpointError) as error:
        raise UserError(
            f"{checkpoint.path}: its random streams cannot be restored: {error}; remove it to resume earlier"
        ) from error
    return state or None


def _stages(policy: Policy, position: Position, run_dir: Path) -> Mapping[int, Mapping[str, Tensor]]:
    """Return what the agent takes over at the start of stages that are still to begin."""
    config = policy.config
    if config.control != "scratch":
        return stage_starts(policy, position, run_dir)
    new = build_agent(config, policy.spaces, policy.agent.device, builder=policy.builder).state_dict()
    begun = [(position.stage, position.stage_iteration) > (stage, 0) for stage in range(len(config.stages))]
    return {
        stage: {name: value.clone() for name, value in new.items()}
        for stage in range(len(config.stages))
        if not begun[stage]
    }


def check_protected(agent: Agent, methods: Sequence[StabilityMethod]) -> None:
    """Check that an agent has what stability methods need; raises UserError."""
    needed = ("log_prob", "policy_jacobians", "replay_policy", "hidden_units")
    missing = [name for name in needed if not hasattr(agent, name)]
    if methods and missing:
        raise UserError(
            f"stability: the agent has no {' and no '.join(missing)}, which stability methods need; add them "
            "(metarl.protocols.ProtectedAgent), or train without stability methods"
        )


def load_stored_data(agent: Agent, checkpoint: Checkpoint, run_dir: Path) -> None:
    """Give an agent back the data that it stored up to a checkpoint; raises UserError."""
    if not isinstance(agent, StoresData):
        return
    try:
        agent.load_data(DataStore(run_dir / DATA, checkpoint.manifest.data), list(checkpoint.manifest.data))
    except (ValueError, CorruptCheckpointError) as error:
        raise UserError(
            f"{checkpoint.path}: its data cannot be loaded: {error}; remove it to resume earlier"
        ) from error


def load_methods(methods: Sequence[StabilityMethod], checkpoint: Checkpoint) -> None:
    """Restore the state of stability methods; raises UserError."""
    if "stability" in checkpoint.parts and not methods:
        raise UserError(
            f"{checkpoint.path} was trained with custom stability methods; give the same ones, metarl.train(methods=…)"
        )
    try:
        stability.load_state_dict(methods, checkpoint.load("stability"))
    except (ValueError, CorruptCheckpointError) as error:
        raise UserError(f"{checkpoint.path} does not fit the run's stability methods: {error}") from error
