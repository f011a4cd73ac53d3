"""Warm starts: a stage takes over the agent of the run that its `init_from` names.

An agent of another class gives the entries that both have; nothing in a run directory is ever executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from metarl.config.schema import load_config
from metarl.deploy.policy import Policy, load
from metarl.errors import UserError
from metarl.protocols import Agent
from metarl.types import Position


def stage_starts(policy: Policy, position: Position, run_dir: Path) -> dict[int, dict[str, Tensor]]:
    """Return the entries that the agent takes over from other runs, for each stage that is still to begin.

    All are read before training starts, so that the entries that were checked are the ones that are used.

    Args:
        policy: the agent to be trained.
        position: of its run.
        run_dir: the directory of its run.

    Raises:
        UserError: there is no run, it cannot be loaded, or its agent does not fit ours; the message names the entry.
    """
    starts = {}
    for number, stage in enumerate(policy.config.stages):
        begun = (position.stage, position.stage_iteration) > (number, 0)
        if stage.init_from is None or begun:
            continue
        try:
            if Path(stage.init_from).resolve() == run_dir.resolve():
                raise UserError(f"{run_dir} is the directory of this run; name another run")
            source = load(stage.init_from, agent=policy.builder if _is_custom(stage.init_from) else None)
            starts[number] = taken_over(policy, source, stage.init_from)
        except UserError as error:
            raise UserError(f"stages.{number}.init_from: {error}") from error
    return starts


def _is_custom(run_dir: str) -> bool:
    """Whether a run has a custom agent; of what is no run, False: loading says so."""
    config = Path(run_dir) / "config.yaml"
    return config.is_file() and load_config(config).agent.name == "custom"


def taken_over(policy: Policy, source: Policy, name: str) -> dict[str, Tensor]:
    """Return the entries of the source's state that both agents have: what was learned, not the state of optimisers.

    The policy and the normaliser of its observations must be there and fit as a whole. Of the rest (a value function,
    learned inner rates) the agent takes what has the same name.

    Args:
        policy: the agent to be trained.
        source: the agent that it starts from, of the same or another class.
        name: of the source, for messages.

    Raises:
        UserError: the agents are of other sizes, or their networks of another kind.
    """
    expected, found = ((each.spaces.observation_size, each.spaces.action_size) for each in (policy, source))
    if found != expected:
        raise UserError(
            f"{name} was trained for (observation, action) sizes {found}; the tasks of this run have {expected}"
        )
    ours, theirs = (
        {key: value for key, value in each.agent.state_dict().items() if _is_learned(key)} for each in (policy, source)
    )
    for key in sorted(ours.keys() | theirs.keys()):
        if (key in ours and key in theirs) or key.startswith(("policy.", "normalizer.")):
            shapes = [f"shape {tuple(state[key].shape)}" if key in state else "nothing" for state in (theirs, ours)]
            if shapes[0] != shapes[1]:
                raise UserError(
                    f"{name}: {key!r}: found {shapes[0]}, expected {shapes[1]}; train both with the same networks"
                )
    activations = [getattr(each.config.agent, "activation", None) for each in (source, policy)]
    if activations[0] != activations[1]:
        raise UserError(
            f"{name}: agent.activation: found {activations[0]!r}, expected {activations[1]!r}; train both with the same"
        )
    return {key: value for key, value in theirs.items() if key in ours}


def start_from(agent: Agent, start: Mapping[str, Tensor]) -> None:
    """Put entries of another agent into an agent; its optimisers start afresh. Doing so twice changes nothing."""
    kept = {key: value for key, value in agent.state_dict().items() if not _is_optimizer_state(key)}
    agent.load_state_dict({**kept, **start})


def _is_optimizer_state(key: str) -> bool:
    return "optimizer" in key.split(".")


def _is_learned(key: str) -> bool:
    """Whether an entry is a parameter or a statistic, `<group>.<name>`; counters and seeds are not grouped."""
    return "." in key and not _is_optimizer_state(key)
