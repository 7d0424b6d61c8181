import pytest
import torch
import torch.nn.functional as F
from conftest import from_conf
from torch import nn

from convlora.peft.adapter import Adapter, InSeries
from convlora.sam.tiny_vit import TinyViTEncoder
from convlora.sam.zoo import SamViT
from convlora.segmenter import Segmenter


def test_adapter_follows_the_frozen_part() -> None:
    torch.manual_seed(0)
    layer = InSeries(nn.Linear(6, 10), dim=10, channels=3)
    nn.init.normal_(layer.up.weight)
    nn.init.normal_(layer.up.bias)
    x = torch.randn(4, 6)
    h = layer.base(x)
    hidden = F.gelu(h @ layer.down.weight.T + layer.down.bias)
    torch.testing.assert_close(layer(x), h + hidden @ layer.up.weight.T + layer.up.bias)


def test_attention_and_mlp_of_the_chosen_blocks_are_adapted() -> None:
    encoder = Adapter(blocks=[0, -1]).inject(TinyViTEncoder())
    adapted = [name for name, module in encoder.named_modules() if isinstance(module, InSeries)]
    assert adapted == [
        f"stages.{stage}.blocks.{block}.{part}"
        for stage, block in [(1, 0), (3, 1)]
        for part in ("attn", "mlp")
    ]


def test_vit_h_trains_as_many_parameters_as_the_table_says() -> None:
    with torch.device("meta"):
        segmenter = Segmenter(from_conf("sam_vit_h").build(), Adapter())
    assert sum(p.numel() for p in segmenter.parameters() if p.requires_grad) == 3_915_264


def test_no_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"peft.channels=0 must be at least 1"):
        Adapter(channels=0)


def test_empty_blocks_are_refused(tiny: SamViT) -> None:
    with pytest.raises(ValueError, match=r"peft.blocks is empty"):
        Adapter(blocks=[]).inject(tiny.build().image_encoder)
