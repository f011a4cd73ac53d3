"""Agents: the MAML family, one file a method, and RL²; each is read top to bottom like its paper.

A new method of the family is one file, one member of `AgentConfig` and one entry in `INNER_METHODS`.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal, get_args

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
from metarl.settings import Settings, named_by_default
from metarl.types import AdaptsBy, AgentSpec


class CustomAgentConfig(Settings):
    """Custom agent: yours, built by the function that you give to `metarl.train(config, agent=build)`."""

    name: Literal["custom"] = "custom"


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
    | Rl2Config
    | CustomAgentConfig,
    Field(discriminator="name"),
    BeforeValidator(functools.partial(named_by_default, DEFAULT_AGENT)),
]
"""One member for each agent, discriminated by `name`; `DEFAULT_AGENT` if there is none."""

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
"""The inner method of each agent of the MAML family, by name."""


def agent_configs() -> dict[str, type[Any]]:
    """Return the config class of each built-in agent by its name."""
    members = get_args(get_args(AgentConfig)[0])
    return {config.model_fields["name"].default: config for config in members if config is not CustomAgentConfig}


def adapts_by(config: Any) -> AdaptsBy | None:
    """Return how the agent of a config adapts; None for a custom one, which alone knows."""
    if isinstance(config, CustomAgentConfig):
        return None
    return Rl2.adapts_by if isinstance(config, Rl2Config) else GradientAgent.adapts_by


def build(config: Any, spec: AgentSpec) -> Agent:
    """Return a freshly initialised built-in agent.

    Args:
        config: a member of `AgentConfig`.
        spec: what it is built for.
    """
    if isinstance(config, Rl2Config):
        return Rl2(config, spec)
    return GradientAgent(INNER_METHODS[config.name](config, config.adapted(spec.spaces)), config, spec)
