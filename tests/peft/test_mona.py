import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import from_conf
from torch import Tensor, nn

from convlora.peft.mona import Mona, MonaAdapters
from convlora.sam.tiny_vit import TinyViTEncoder
from convlora.sam.zoo import SamViT
from convlora.segmenter import Segmenter


def randomised(module: Any) -> Any:
    for mona in module.modules():
        if isinstance(mona, Mona):
            for parameter in mona.parameters():
                nn.init.normal_(parameter, std=0.3)
    return module


def literal(mona: Mona, x: Tensor) -> Tensor:
    """One token after another, convolutions by padded neighbourhoods."""
    t = mona.down(
        F.layer_norm(x, x.shape[-1:], mona.norm.weight, mona.norm.bias) * mona.gamma + x * mona.gamma_x
    )
    mean = torch.zeros_like(t)
    for conv, size in zip(mona.depthwise, (3, 5, 7), strict=True):
        padded = F.pad(t, (0, 0, *[size // 2] * 4))
        for i in range(t.shape[1]):
            for j in range(t.shape[2]):
                patch = padded[:, i : i + size, j : j + size]
                mean[:, i, j] += (torch.einsum("nhwc,chw->nc", patch, conv.weight[:, 0]) + conv.bias) / 3
    u = t + mean
    hidden = F.gelu(u + u @ mona.pointwise.weight[:, :, 0, 0].T + mona.pointwise.bias)
    return x + mona.up(hidden)


def test_adapter_is_the_papers_equation() -> None:
    torch.manual_seed(0)
    mona = randomised(Mona(10, channels=3, dropout=0.1)).eval()
    x = torch.randn(2, 4, 5, 10)
    torch.testing.assert_close(mona(x), literal(mona, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dropout", "differs"), [(0.0, False), (0.5, True)])
def test_dropout_acts_in_training_only(dropout: float, differs: bool) -> None:
    torch.manual_seed(0)
    mona, x = randomised(Mona(10, channels=8, dropout=dropout)), torch.randn(1, 4, 4, 10)
    assert torch.equal(mona.train()(x), mona.eval()(x)) != differs


@pytest.mark.parametrize(("window", "index"), [(4, 0), (3, 0), (4, 1)])  # windows, padded windows, global
def test_adapters_stand_after_both_residuals(tiny: SamViT, window: int, index: int) -> None:
    torch.manual_seed(0)
    block = replace(tiny, window_size=window).build().image_encoder.blocks[index]
    x, after = torch.randn(2, 8, 8, 16), []
    first = copy.deepcopy(block)
    first.mlp.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    encoder = replace(tiny, window_size=window).build().image_encoder
    encoder.blocks[index] = block
    adapted = randomised(MonaAdapters(blocks=[index]).inject(encoder)).eval().blocks[index]
    after = adapted.after_attention(first(x))  # without an MLP, a block ends after attention's residual
    expected = adapted.after_mlp(after + block.mlp(block.norm2(after)))
    torch.testing.assert_close(adapted(x), expected)


@pytest.mark.parametrize("size", [14, 7, 9])
def test_adapters_of_tiny_vit_stand_around_its_mlp(size: int) -> None:
    torch.manual_seed(0)
    encoder = TinyViTEncoder().eval()
    block = encoder.blocks[-1]
    first = copy.deepcopy(block)
    first.mlp.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    adapted = randomised(MonaAdapters(blocks=[-1]).inject(encoder)).eval().blocks[-1]
    x = torch.randn(2, size, size, 320)
    after = adapted.after_attention(first(x))
    expected = adapted.after_mlp(after + block.mlp(after))
    torch.testing.assert_close(adapted(x), expected)


def test_trained_count_has_its_closed_form() -> None:
    with torch.device("meta"):
        segmenter = Segmenter(from_conf("sam_vit_h").build(), MonaAdapters())
    each = 4 * 1280 + (1280 * 64 + 64) + 64 * (9 + 25 + 49 + 3) + (64 * 64 + 64) + (64 * 1280 + 1280)
    expected = 3_505_536 + 32 * 2 * each
    assert sum(p.numel() for p in segmenter.parameters() if p.requires_grad) == expected
