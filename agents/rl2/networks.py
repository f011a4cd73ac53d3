"""The networks of an agent with a memory: encoder → memory → policy and value, which may see the inputs as well.

Must not import environments, training or tracking.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, PositiveInt, model_validator
from torch import Tensor, nn

from metarl.nn.attention import Episodic, Transformer
from metarl.nn.distributions import ActionHead, Distribution
from metarl.nn.encoders import ImageEncoder
from metarl.nn.memory import Memory, State
from metarl.nn.mlp import choose_head, tanh_layers
from metarl.nn.recurrent import Gru, Lstm
from metarl.settings import Settings, as_tuple, named_by_default

Sizes = Annotated[tuple[PositiveInt, ...], BeforeValidator(as_tuple)]

MEMORIES = "gru, lstm, transformer or episodic; another one's settings are shown by --agent.memory.name NAME --help"


class GruConfig(Settings):
    """Gated recurrent units."""

    name: Literal["gru"] = Field("gru", description=MEMORIES)
    size: int = Field(128, ge=1, description="hidden units")


class LstmConfig(Settings):
    """Long short-term memory."""

    name: Literal["lstm"] = Field("lstm", description=MEMORIES)
    size: int = Field(128, ge=1, description="hidden units")


def _check_heads(size: int, heads: int) -> None:
    if size % heads:
        raise ValueError(f"size is {size}, heads is {heads}; expected a multiple")


class TransformerConfig(Settings):
    """A causal transformer with a cache."""

    name: Literal["transformer"] = Field("transformer", description=MEMORIES)
    size: int = Field(64, ge=1, description="width of the layers")
    layers: int = Field(2, ge=1, description="how many")
    heads: int = Field(4, ge=1, description="attention heads of each layer; a divisor of size")
    context: int = Field(256, ge=1, description="steps that a layer attends to, at most the trial")

    @model_validator(mode="after")
    def _heads_divide(self) -> TransformerConfig:
        _check_heads(self.size, self.heads)
        return self


class EpisodicConfig(Settings):
    """A GRU with a memory of facts that is read by attention."""

    name: Literal["episodic"] = Field("episodic", description=MEMORIES)
    size: int = Field(128, ge=1, description="hidden units, and width of what is read")
    heads: int = Field(4, ge=1, description="attention heads, queries at once; a divisor of size")
    context: int = Field(1024, ge=1, description="facts that are kept, the newest, one for each step")

    @model_validator(mode="after")
    def _heads_divide(self) -> EpisodicConfig:
        _check_heads(self.size, self.heads)
        return self


MemoryConfig = Annotated[
    GruConfig | LstmConfig | TransformerConfig | EpisodicConfig,
    Field(discriminator="name"),
    BeforeValidator(functools.partial(named_by_default, "gru")),
]
"""One member for each memory, discriminated by `name`; GRU by default."""


VALUES = "shared, separate or linear; another one's settings are shown by --agent.critic.name NAME --help"


class LearnedCriticConfig(Settings):
    """A learned value function on a memory: that of the policy, or a separate one."""

    name: Literal["shared", "separate"] = Field("shared", description=VALUES)
    sizes: Sizes = Field((128, 128), description="widths of the hidden layers between memory and value")
    loss_coef: float = Field(0.5, gt=0, description="weight of the value loss; returns are normalised for it")


class LinearCriticConfig(Settings):
    """Linear features of observation and time, fitted to each task's trials of an iteration."""

    name: Literal["linear"] = Field("linear", description=VALUES)


CriticConfig = Annotated[
    LearnedCriticConfig | LinearCriticConfig,
    Field(discriminator="name"),
    BeforeValidator(functools.partial(named_by_default, "shared")),
]
"""One member for each critic, discriminated by `name`; a shared one by default."""


def build_memory(
    config: GruConfig | LstmConfig | TransformerConfig | EpisodicConfig, input_size: int, generator: torch.Generator
) -> Memory:
    """Return a memory with freshly drawn weights."""
    if isinstance(config, TransformerConfig):
        return Transformer(input_size, config.size, config.layers, config.heads, config.context, generator)
    if isinstance(config, EpisodicConfig):
        return Episodic(input_size, config.size, config.heads, config.context, generator)
    return (Gru if isinstance(config, GruConfig) else Lstm)(input_size, config.size, generator)


class Trunk(nn.Module):
    """Encoder and memory. The features may hold the inputs as well, so that a reactive policy can bypass the memory.

    Where the first inputs are the pixels of an image, a convolutional encoder reads them first, and its features stand
    in their place.

    Args:
        input_size: I.
        encoder_sizes: widths of the tanh layers before the memory; none: it reads the inputs.
        memory: its settings.
        skip: whether the features hold the inputs, behind the rest.
        image_encoder: reads the pixels; None: there are none.
        generator: draws the initial weights.
    """

    def __init__(
        self,
        input_size: int,
        encoder_sizes: tuple[int, ...],
        memory: GruConfig | LstmConfig | TransformerConfig | EpisodicConfig,
        skip: bool,
        image_encoder: ImageEncoder | None,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self._skip, self._image_encoder = skip, image_encoder
        self.image_parameters = nn.ParameterDict()
        if image_encoder is not None:
            self.image_parameters.update(image_encoder.init(generator))
            input_size += image_encoder.size - math.prod(image_encoder.image)
        sizes = (input_size, *encoder_sizes)
        self.encoder = (
            nn.Sequential(tanh_layers(sizes, math.sqrt(2.0), generator), nn.Tanh()) if encoder_sizes else nn.Identity()
        )
        self.memory = build_memory(memory, sizes[-1], generator)
        self.output_size = self.memory.output_size + skip * input_size

    def initial(self, batch: int) -> State:
        """The state of the memory of `batch` trials that have not begun."""
        return self.memory.initial(batch)

    def without_pixels(self, inputs: Tensor) -> Tensor:
        """Return inputs `[..., I]` with the features of an image in place of its pixels."""
        if self._image_encoder is None:
            return inputs
        pixels = math.prod(self._image_encoder.image)
        features = self._image_encoder(dict(self.image_parameters.items()), inputs[..., :pixels])
        return torch.cat([features, inputs[..., pixels:]], -1)

    def step(self, inputs: Tensor, state: State, active: Tensor | None = None) -> tuple[Tensor, State]:
        """Read one step: inputs `[B, I]` → features `[B, F]` and the next state."""
        inputs = self.without_pixels(inputs)
        outputs, state = self.memory.step(self.encoder(inputs), state, active)
        return torch.cat([outputs, inputs], -1) if self._skip else outputs, state

    def scan(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """Read T steps: inputs `[B, T, I]` → features `[B, T, F]` and the state after them."""
        inputs = self.without_pixels(inputs)
        outputs, state = self.memory.scan(self.encoder(inputs), state)
        return torch.cat([outputs, inputs], -1) if self._skip else outputs, state


class PolicyHead(nn.Module):
    """From features to a distribution of actions: outputs are linear in the features, deviations can be.

    Args:
        feature_size: F.
        head: what makes the distribution.
        state_dependent: whether the deviation depends on the features.
        generator: draws the initial weights; the outputs start near 0.
        stage_id: which features choose, one-hot, one of as many output layers; None: there is one.
    """

    def __init__(
        self,
        feature_size: int,
        head: ActionHead,
        state_dependent: bool,
        generator: torch.Generator,
        stage_id: slice | None = None,
    ) -> None:
        super().__init__()
        self._head, self._stage_id = head, stage_id
        heads = 1 if stage_id is None else stage_id.stop - stage_id.start
        self.mean = tanh_layers((feature_size, head.output_size * heads), 0.01, generator)
        for name, value in head.init().items():
            self.register_parameter(name, nn.Parameter(value))
        size = head.deviation_size if state_dependent else 0
        self.deviation = tanh_layers((feature_size, size), 0.01, generator) if size else None

    def forward(self, features: Tensor) -> Distribution:
        """Return the distribution of actions, `[...]`, at features `[..., F]`."""
        outputs: Tensor = self.mean(features)
        if self._stage_id is not None:
            outputs = choose_head(outputs, features[..., self._stage_id])
        deviations = None if self.deviation is None else self.deviation(features)
        return self._head(outputs, self._parameters_by_name(), deviations).expanded()

    def keep_within_bounds(self) -> None:
        """Bring free parameters that an optimiser's step has carried past their bounds back."""
        if self.deviation is None:
            self._head.keep_within_bounds(self._parameters_by_name())

    def _parameters_by_name(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self._head.free_parameters}


class Policy(nn.Module):
    """Trunk and head.

    Args:
        trunk: reads the inputs.
        head: of the trunk's features.
    """

    def __init__(self, trunk: Trunk, head: PolicyHead) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def snapshot(self) -> Policy:
        """Return a copy on the CPU that no training changes."""
        return copy.deepcopy(self).cpu().requires_grad_(False).eval()


class Critic(nn.Module):
    """A value function, learned on returns that are normalised by their running mean and standard deviation.

    A shared critic reads the policy's memory and trains it: where the features were cut off from the value's gradient,
    memories stayed untrained.

    Args:
        feature_size: F.
        sizes: widths of the hidden layers.
        trunk: a separate one; None: the critic reads the policy's features.
        generator: draws the initial weights.
    """

    def __init__(
        self, feature_size: int, sizes: tuple[int, ...], trunk: Trunk | None, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = tanh_layers((feature_size, *sizes, 1), 1.0, generator)
        self.scale: Tensor
        # Mean, standard deviation, updates seen; before the first update values are 0 at any scale of rewards.
        self.register_buffer("scale", torch.zeros(3))

    def forward(self, features: Tensor) -> Tensor:
        """Normalised values `[...]` of features `[..., F]`."""
        values: Tensor = self.head(features).squeeze(-1)
        return values

    def values(self, features: Tensor) -> Tensor:
        """Values in units of return."""
        values: Tensor = self(features) * self.scale[1] + self.scale[0]
        return values

    def normalized(self, returns: Tensor) -> Tensor:
        """Returns as targets."""
        return (returns - self.scale[0]) / self.scale[1]

    def rescale(self, returns: Tensor) -> None:
        """Follow the returns of an iteration."""
        mean, std, seen = self.scale
        weight = 1.0 / (seen + 1.0).clamp(max=20.0)
        mean = (1 - weight) * mean + weight * returns.mean()
        std = (1 - weight) * std + weight * returns.std().clamp_min(1e-6)
        self.scale = torch.stack([mean, std, seen + 1.0])
