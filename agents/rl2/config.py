"""The settings of RL²."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, model_validator

from metarl.agents.rl2.networks import CriticConfig, GruConfig, LearnedCriticConfig, MemoryConfig, Sizes
from metarl.nn.distributions import ActionHead, GaussianHead, action_head
from metarl.nn.encoders import EncoderConfig
from metarl.settings import Settings, as_tuple
from metarl.spaces import Spaces


class Rl2Config(Settings):
    """RL²: a memory that is kept through the episodes of a trial, trained by PPO over whole trials."""

    name: Literal["rl2"] = "rl2"
    trial_episodes: int = Field(2, ge=1, description="episodes of a trial; the memory is kept through all of them")
    memory: MemoryConfig = Field(default_factory=GruConfig)
    encoder: EncoderConfig = Field(default_factory=EncoderConfig)
    encoder_sizes: Sizes | tuple[()] = Field((128,), description="widths of the tanh layers before the memory")
    skip_inputs: bool = Field(
        True, description="whether policy and value see the inputs next to the memory; in the original they do not"
    )
    init_std: float = Field(1.0, gt=0, description="initial action standard deviation; actions span ±1")
    min_std: float = Field(0.1, gt=0, description="lower bound of the standard deviation")
    max_std: float = Field(1.5, gt=0, description="upper bound of the standard deviation")
    state_dependent_std: bool = Field(False, description="whether the deviation depends on what the policy sees")
    observation_entries: Annotated[tuple[NonNegativeInt, ...] | None, BeforeValidator(as_tuple)] = Field(
        None, min_length=1, description="which entries of the observation the agent sees; none: all"
    )
    input_differences: bool = Field(
        True, description="whether the agent reads the changes of observation and reward since the last step"
    )
    input_time: bool = Field(False, description="whether the agent reads the step of the episode")
    normalizer_floor: float = Field(1e-3, gt=0, description="smallest scale of an input, in its units")
    critic: CriticConfig = Field(default_factory=LearnedCriticConfig)
    gamma: float = Field(0.99, ge=0, le=1, description="discount a step")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="GAE's trade-off: 0 one-step, 1 Monte Carlo")
    success_bonus: float = Field(
        0.0, ge=0, description="added to the training reward of a solved step; the agent reads the plain reward"
    )
    free_episodes: int = Field(
        0, ge=0, description="first episodes of a trial whose rewards do not count in training (E-RL²)"
    )
    lr: float = Field(1e-3, gt=0, description="Adam's learning rate")
    lr_decay_iterations: int = Field(
        0, ge=0, description="iterations over which the rate falls linearly to a tenth; 0: it is constant"
    )
    epochs: int = Field(5, ge=1, description="passes over the trials of an iteration")
    minibatches: int = Field(4, ge=1, description="parts of the trials, each a step of Adam")
    bptt_steps: int | None = Field(
        None, ge=1, description="steps of a chunk that gradients flow through; none: the whole trial"
    )
    clip_eps: float = Field(0.2, gt=0, description="PPO clip range")
    max_kl: float = Field(0.05, gt=0, description="an iteration's steps end when KL(old‖new) of a minibatch exceeds it")
    entropy_coef: float = Field(0.0, ge=0, description="weight of the policy's entropy, a bonus")
    max_grad_norm: float = Field(0.5, gt=0, description="the gradient is scaled down to this norm")
    saturation_coef: float = Field(
        0.0, ge=0, description="weight of max(0, |mean| − 1)²: a mean far beyond the bounds can hardly be unlearned"
    )
    normalizer_iterations: int | None = Field(
        None, ge=0, description="iterations in which the normaliser of inputs learns; none: all; 0: inputs stay raw"
    )

    def head(self, spaces: Spaces) -> ActionHead:
        """Return what makes a distribution of the policy's outputs."""
        return action_head(spaces, self.init_std, self.min_std, self.max_std)

    @model_validator(mode="after")
    def _bounds(self) -> Rl2Config:
        GaussianHead(1, self.init_std, self.min_std, self.max_std)
        if self.observation_entries and len(set(self.observation_entries)) < len(self.observation_entries):
            raise ValueError(f"observation_entries {self.observation_entries} name one twice; each counts once")
        if self.free_episodes >= self.trial_episodes:
            raise ValueError(
                f"free_episodes is {self.free_episodes} of trial_episodes {self.trial_episodes}; one must count"
            )
        return self
