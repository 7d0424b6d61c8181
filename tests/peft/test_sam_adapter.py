import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import from_conf
from torch import Tensor, nn

from convlora.peft.sam_adapter import SamAdapter, high_frequencies
from convlora.sam.tiny_vit import TinyViTEncoder
from convlora.sam.zoo import SamViT
from convlora.segmenter import Segmenter


@pytest.mark.parametrize(("size", "ratio"), [((16, 16), 0.25), ((12, 20), 0.3), ((9, 7), 0.5)])
def test_frequencies_below_the_mask_are_gone_and_others_stay(size: tuple[int, int], ratio: float) -> None:
    images = np.random.default_rng(0).normal(size=(2, 3, *size))
    spectrum = np.fft.fft2(images)
    for i in range(size[0]):
        for j in range(size[1]):
            farthest = max(min(i, size[0] - i), min(j, size[1] - j))
            if farthest < math.sqrt(ratio * size[0] * size[1]) / 2:
                spectrum[..., i, j] = 0
    found = high_frequencies(torch.from_numpy(images).float(), ratio)
    np.testing.assert_allclose(found, np.abs(np.fft.ifft2(spectrum).real), atol=1e-5)


def test_frequencies_are_exact_under_autocast() -> None:
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    exact = high_frequencies(images, 0.25)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(high_frequencies(images, 0.25), exact)
    assert high_frequencies(images.bfloat16(), 0.25).dtype == torch.bfloat16


def literal(adapted: Any, images: Tensor, prompted: list[int]) -> Tensor:
    encoder = adapted.base
    x = encoder.patch_embed(images)
    patches = F.unfold(high_frequencies(images, 0.25), 4, stride=4)
    details = adapted.conv.weight.flatten(1) @ patches + adapted.conv.bias[:, None]
    features = adapted.embed(x) + details.transpose(1, 2).reshape(*x.shape[:3], -1)
    x = x + encoder.pos_embed
    for index, block in enumerate(encoder.blocks):
        if index in prompted:
            x = x + adapted.up(F.gelu(adapted.tune[str(index)](features)))
        x = block(x)
    return encoder.neck(x.permute(0, 3, 1, 2))


@pytest.mark.parametrize(("blocks", "prompted"), [(None, [0, 1]), ([-1], [1])])
def test_prompts_enter_the_inputs_of_the_chosen_blocks(
    tiny: SamViT, blocks: list[int] | None, prompted: list[int]
) -> None:
    torch.manual_seed(0)
    adapted = SamAdapter(blocks=blocks).inject(tiny.build().image_encoder)
    nn.init.normal_(adapted.base.pos_embed)
    nn.init.normal_(adapted.up.weight)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(adapted(images), literal(adapted, images, prompted))


def test_vit_h_trains_as_many_parameters_as_the_table_says() -> None:
    with torch.device("meta"):
        segmenter = Segmenter(from_conf("sam_vit_h").build(), SamAdapter())
    assert sum(p.numel() for p in segmenter.parameters() if p.requires_grad) == 3_980_576


def test_tiny_vit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"TinyViTEncoder have grids .* choose peft=adapter or another"):
        SamAdapter().inject(TinyViTEncoder())


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_impossible_mask_ratio_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"peft.mask_ratio={ratio} must be"):
        SamAdapter(mask_ratio=ratio)
