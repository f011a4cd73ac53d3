"""Encoders of images: shapes, stacking over tasks, gradients, and images that are too small."""

import pytest
import torch

from metarl.errors import UserError
from metarl.nn.encoders import EncoderConfig, ImageEncoder

KINDS = [("impala_small", (24, 20, 3)), ("impala_small", (7, 5, 1)), ("nature_cnn", (36, 40, 4))]


def pixels_of(image, *shape, seed=0):
    return torch.rand(*shape, image[0] * image[1] * image[2], generator=torch.Generator().manual_seed(seed))


def parameters_of(encoder, seed=0):
    return encoder.init(torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("kind", "image"), KINDS)
def test_features_have_the_shape_of_their_batch_and_depend_on_the_pixels(kind, image):
    encoder = ImageEncoder(image, kind, 16)
    params, pixels = parameters_of(encoder), pixels_of(image, 2, 3)
    assert tuple(params) == encoder.names
    features = encoder(params, pixels)
    assert features.shape == (2, 3, 16) and (features >= 0).all()
    torch.testing.assert_close(encoder(params, pixels[1, 2]), features[1, 2], rtol=1e-5, atol=1e-6)
    assert (features[0, 0] - features[0, 1]).abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "image"), KINDS)
def test_stacked_parameters_are_those_of_each_task(kind, image):
    encoder = ImageEncoder(image, kind, 8)
    own, pixels = [parameters_of(encoder, seed) for seed in range(3)], pixels_of(image, 3, 4)
    stacked = {name: torch.stack([params[name] for params in own]) for name in own[0]}
    expected = torch.stack([encoder(params, part) for params, part in zip(own, pixels, strict=True)])
    torch.testing.assert_close(encoder(stacked, pixels), expected, rtol=1e-4, atol=1e-5)


def test_second_derivatives_of_stacked_parameters_agree_with_finite_differences():
    encoder = ImageEncoder((6, 6, 1), "impala_small", 4)
    params = {name: value.double()[None] for name, value in parameters_of(encoder).items()}
    pixels = pixels_of((6, 6, 1), 1, 5).double()
    weight = params["encoder_conv_0_weight"].requires_grad_()

    def slope(weight):
        value = encoder({**params, "encoder_conv_0_weight": weight}, pixels).square().sum()
        return torch.autograd.grad(value, weight, create_graph=True)[0]

    assert torch.autograd.gradcheck(slope, (weight,), atol=1e-5)


def test_images_that_are_too_small_are_refused():
    with pytest.raises(UserError, match="nature_cnn is for larger images than 35 x 40"):
        EncoderConfig(name="nature_cnn").build((35, 40, 3))
    assert EncoderConfig().build(None) is None
