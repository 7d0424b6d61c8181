import pytest
import torch
from segment_anything.modeling.common import LayerNorm2d
from torch import nn

from convlora.peft.ssf import SSF, ScaleShift
from convlora.sam.tiny_vit import TinyViTEncoder
from convlora.sam.zoo import SamViT

LAYERS = {
    "linear": (nn.Linear(6, 8), (2, 5, 6), -1),
    "norm of tokens": (nn.LayerNorm(8), (2, 5, 8), -1),
    "convolution": (nn.Conv2d(6, 8, kernel_size=3, padding=1), (2, 6, 8, 8), 1),
    "depthwise convolution": (nn.Conv2d(8, 8, kernel_size=3, padding=1, groups=8), (2, 8, 8, 8), 1),
    "norm of maps": (LayerNorm2d(8), (2, 8, 8, 8), 1),
}


def moved(base: nn.Module) -> ScaleShift:
    """A layer that has learnt something."""
    layer = ScaleShift(base)
    nn.init.normal_(layer.scale)
    assert layer.shift is not None
    nn.init.normal_(layer.shift)
    return layer


@pytest.mark.parametrize("kind", LAYERS)
def test_channels_are_scaled_and_shifted_each_by_its_own(kind: str) -> None:
    """Maps are as high and wide as they have channels, so that a wrong axis does not show in the shape."""
    base, size, axis = LAYERS[kind]
    layer, x = moved(base), torch.randn(size)
    found, frozen = layer(x).movedim(axis, 0), base(x).movedim(axis, 0)
    for channel in range(8):
        expected = layer.scale[channel] * frozen[channel] + layer.shift[channel]
        torch.testing.assert_close(found[channel], expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_that_have_a_bias_take_scale_and_shift_into_their_weights(kind: str) -> None:
    base, size, _ = LAYERS[kind]
    layer, x = moved(base), torch.randn(size)
    merged = layer.merged()
    assert type(merged) is type(base)
    torch.testing.assert_close(merged(x), layer(x), rtol=0, atol=1e-5)


def test_layers_without_bias_are_scaled_alone_and_merged() -> None:
    layer, x = ScaleShift(nn.Conv2d(3, 4, kernel_size=1, bias=False)), torch.randn(2, 3, 5, 5)
    nn.init.normal_(layer.scale)
    assert layer.shift is None
    torch.testing.assert_close(layer(x), layer.base(x) * layer.scale[:, None, None])
    torch.testing.assert_close(layer.merged()(x), layer(x))


@pytest.mark.parametrize("kind", ["vit", "tiny_vit"])
def test_every_layer_of_the_encoder_is_adapted_once(kind: str, tiny: SamViT) -> None:
    encoder = tiny.build().image_encoder if kind == "vit" else TinyViTEncoder()
    weighted = {name.rpartition(".")[0] for name, p in encoder.named_parameters() if name.endswith(".weight")}
    adapted = SSF().inject(encoder)
    assert {name for name, module in adapted.named_modules() if isinstance(module, ScaleShift)} == weighted
