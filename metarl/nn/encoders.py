"""Convolutional encoders of images, as functions of explicit parameters: adapted, stacked over tasks, differentiated.

Pixels are read between 0 and 1, row by row, channels last: `[..., H · W · C]`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from metarl.errors import UserError
from metarl.settings import Settings

Params = dict[str, Tensor]

PIXEL_SCALE = 255.0
"""Bytes are divided by it before an encoder reads them."""


class EncoderConfig(Settings):
    """What reads images before the rest of a network does; vectors need none."""

    name: Literal["impala_small", "nature_cnn"] = Field(
        "impala_small",
        description="what reads images: impala_small, two stages of a convolution, pooling and a residual block, or "
        "nature_cnn, three strided convolutions, for 36 x 36 pixels and more",
    )
    size: int = Field(128, ge=1, description="features of an image")

    def build(self, image: tuple[int, int, int] | None) -> ImageEncoder | None:
        """Return the encoder of images of a shape; None where observations are vectors."""
        return None if image is None else ImageEncoder(image, self.name, self.size)


_NATURE = ((32, 8, 4), (64, 4, 2), (64, 3, 1))
"""Channels, width and stride of each convolution (Mnih et al. 2015)."""

_IMPALA = (16, 32)
"""Channels of each stage: two of the three of Espeholt et al. (2018), with one residual block each instead of two."""


@dataclass(frozen=True)
class ImageEncoder:
    """From images to features, which are not negative.

    Attributes:
        image: (H, W, C).
        kind: `impala_small` or `nature_cnn`.
        size: features of an image.

    Raises:
        UserError: the image is too small for the kind.
    """

    image: tuple[int, int, int]
    kind: str
    size: int

    def __post_init__(self) -> None:
        if min(self._convolved_shape[:2]) < 1:
            height, width, _ = self.image
            raise UserError(
                f"agent.encoder.name {self.kind} is for larger images than {height} x {width}: impala_small"
            )

    @property
    def _convolved_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of what the convolutions return."""
        height, width, _ = self.image
        if self.kind == "nature_cnn":
            for _, kernel, stride in _NATURE:
                height, width = (height - kernel) // stride + 1, (width - kernel) // stride + 1
            return height, width, _NATURE[-1][0]
        for _ in _IMPALA:
            height, width = -(-height // 2), -(-width // 2)
        return height, width, _IMPALA[-1]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return tuple(f"encoder_{name}_{part}" for name in self._shapes() for part in ("weight", "bias"))

    def init(self, generator: torch.Generator) -> Params:
        """Draw parameters, orthogonal with gain √2, zero biases; their names begin with `encoder_`."""
        params: Params = {}
        for name, shape in self._shapes().items():
            weight = torch.empty(shape)
            torch.nn.init.orthogonal_(weight, math.sqrt(2.0), generator=generator)
            params[f"encoder_{name}_weight"], params[f"encoder_{name}_bias"] = weight, torch.zeros(shape[0])
        return params

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        channels = self.image[2]
        shapes: dict[str, tuple[int, ...]] = {}
        if self.kind == "nature_cnn":
            for layer, (out, kernel, _) in enumerate(_NATURE):
                shapes[f"conv_{layer}"] = out, channels, kernel, kernel
                channels = out
        else:
            for stage, out in enumerate(_IMPALA):
                shapes[f"conv_{stage}"] = out, channels, 3, 3
                shapes |= {f"residual_{stage}_{i}": (out, out, 3, 3) for i in range(2)}
                channels = out
        shapes["features"] = self.size, math.prod(self._convolved_shape)
        return shapes

    def __call__(self, params: Params, pixels: Tensor) -> Tensor:
        """Return features `[..., size]` of pixels `[..., H · W · C]`.

        Args:
            params: from `init`, plain, or stacked over the tasks that come first in `pixels`; others are passed over.
            pixels: between 0 and 1.
        """
        own = {name: value for name, value in params.items() if name.startswith("encoder_")}
        if own["encoder_features_bias"].ndim > 1:
            features: Tensor = torch.func.vmap(self._encode)(own, pixels)
            return features
        return self._encode(own, pixels)

    def _encode(self, params: Params, pixels: Tensor) -> Tensor:
        images = pixels.reshape(-1, *self.image).movedim(-1, 1)
        convolved = self._nature(params, images) if self.kind == "nature_cnn" else self._impala(params, images)
        weight, bias = params["encoder_features_weight"], params["encoder_features_bias"]
        features = F.linear(convolved.flatten(1), weight, bias).relu()
        return features.reshape(*pixels.shape[:-1], self.size)

    def _nature(self, params: Params, hidden: Tensor) -> Tensor:
        for layer, (_, _, stride) in enumerate(_NATURE):
            hidden = _convolve(params, f"conv_{layer}", hidden, stride=stride).relu()
        return hidden

    def _impala(self, params: Params, hidden: Tensor) -> Tensor:
        for stage in range(len(_IMPALA)):
            hidden = F.max_pool2d(_convolve(params, f"conv_{stage}", hidden, padding=1), 3, stride=2, padding=1)
            inner = hidden
            for i in range(2):
                inner = _convolve(params, f"residual_{stage}_{i}", inner.relu(), padding=1)
            hidden = hidden + inner
        return hidden.relu()


def _convolve(params: Params, name: str, inputs: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    weight, bias = params[f"encoder_{name}_weight"], params[f"encoder_{name}_bias"]
    return F.conv2d(inputs, weight, bias, stride, padding)
