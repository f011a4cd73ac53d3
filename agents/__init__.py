"""Agents: the MAML family, one file a method, and RL²; each is read top to bottom like its paper.

A new method of the family is one file, one member of `AgentConfig` and one entry in `INNER_METHODS`.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, get_args

import torch
from pydantic import BeforeValidator, Field

from metarl.agents.maml.agent import GradientAgent
from metarl.agents.maml.anil import Anil, AnilConfig
from metarl.agents.maml.fomaml import Fomaml, FomamlConfig
from metarl.agents.maml.imaml import Imaml, ImamlConfig
from metarl.agents.maml.maml import Maml, MamlPpoConfig, MamlTrpoConfig, MamlVpgConfig
from metarl.agents.maml.meta_curvature import MetaCurvature, MetaCurvatureConfig
from metarl.agents.maml.meta_dropout import MetaDropout, MetaDropoutConfig
from metarl.agents.maml.meta_sgd import MetaSgd, MetaSgdConfig
from metarl.agents.maml.multi_task import MultiTask, MultiTaskConfig
from metarl.agents.maml.reptile import Reptile, ReptileConfig
from metarl.agents.rl2.agent import Rl2
from metarl.agents.rl2.config import Rl2Config
from metarl.protocols import Agent
from metarl.settings import named_by_default

DEFAULT_AGENT = "maml_ppo"

AgentConfig = Annotated[
    MamlPpoConfig
    | MamlTrpoConfig
    | MamlVpgConfig
    | FomamlConfig
    | ReptileConfig
    | MetaSgdConfig
    | MetaCurvatureConfig
    | ImamlConfig
    | AnilConfig
    | MetaDropoutConfig
    | MultiTaskConfig
    | Rl2Config,
    Field(discriminator="name"),
    BeforeValidator(functools.partial(named_by_default, DEFAULT_AGENT)),
]
"""One member an agent, told apart by `name`; `DEFAULT_AGENT` if there is none."""

INNER_METHODS: dict[str, Any] = {
    "maml_ppo": Maml,
    "maml_trpo": Maml,
    "maml_vpg": Maml,
    "fomaml": Fomaml,
    "reptile": Reptile,
    "meta_sgd": MetaSgd,
    "meta_curvature": MetaCurvature,
    "imaml": Imaml,
    "anil": Anil,
    "meta_dropout": MetaDropout,
    "multi_task": MultiTask,
}
"""What each method of the MAML family does differently, by name."""


def agent_configs() -> dict[str, type[Any]]:
    """Return the config class of each agent by its name."""
    return {config.model_fields["name"].default: config for config in get_args(get_args(AgentConfig)[0])}


def build(
    config: Any,
    observation_size: int,
    action_size: int,
    device: torch.device,
    seed: int,
    cues: int = 0,
    heads: bool = False,
) -> Agent:
    """Return a freshly initialised agent.

    Args:
        config: a member of `AgentConfig`.
        observation_size: O.
        action_size: A.
        device: where updates are computed.
        seed: of the initial parameters.
        cues: how many entries at the end of an observation tell the stage, one-hot; they are not normalised.
        heads: whether the policy has an output layer for each stage, which the cue chooses.
    """
    sizes = observation_size, action_size, device, seed, cues, heads
    if isinstance(config, Rl2Config):
        return Rl2(config, *sizes)
    return GradientAgent(INNER_METHODS[config.name](config, config.adapted), config, *sizes)
