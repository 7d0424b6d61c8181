import pytest
import torch
import torch.nn.functional as F
from conftest import from_conf
from torch import Tensor, nn

from convlora.peft.adaptformer import AdaptFormer, ParallelMlp
from convlora.sam.tiny_vit import TinyViTEncoder
from convlora.sam.zoo import SamViT
from convlora.segmenter import Segmenter


def narrow(layer: ParallelMlp, tokens: Tensor) -> Tensor:
    hidden = F.relu(tokens @ layer.down.weight.T + layer.down.bias)
    return 0.1 * (hidden @ layer.up.weight.T + layer.up.bias)


def randomised(layer: ParallelMlp) -> ParallelMlp:
    nn.init.normal_(layer.up.weight)
    nn.init.normal_(layer.up.bias)
    return layer


def test_narrow_mlp_reads_what_the_frozen_one_reads(tiny: SamViT) -> None:
    torch.manual_seed(0)
    block = AdaptFormer().inject(tiny.build().image_encoder).blocks[1]
    layer, tokens = randomised(block.mlp), torch.randn(2, 8, 8, 16)
    torch.testing.assert_close(layer(tokens), layer.base(tokens) + narrow(layer, tokens))


def test_narrow_mlp_of_tiny_vit_reads_normalised_tokens() -> None:
    torch.manual_seed(0)
    block = AdaptFormer().inject(TinyViTEncoder()).blocks[-1]
    nn.init.normal_(block.mlp.base.norm.weight)
    layer, x = randomised(block.mlp), torch.randn(2, 49, 320)
    torch.testing.assert_close(layer(x), layer.base(x) + narrow(layer, layer.base.norm(x)))


@pytest.mark.parametrize("channels", [1, 64])
def test_trained_count_has_its_closed_form(channels: int) -> None:
    with torch.device("meta"):
        segmenter = Segmenter(from_conf("sam_vit_h").build(), AdaptFormer(channels=channels))
    expected = 3_505_536 + 32 * (2 * 1280 * channels + channels + 1280)
    assert sum(p.numel() for p in segmenter.parameters() if p.requires_grad) == expected
