import pytest
import torch
from segment_anything.modeling.common import LayerNorm2d
from torch import nn

from convlora.peft.method import merge
from convlora.peft.selective import BitFit, Full, NormTuning, Selective
from convlora.sam.tiny_vit import TinyViTEncoder
from convlora.sam.zoo import SamViT


@pytest.mark.parametrize("kind", ["vit", "tiny_vit"])
@pytest.mark.parametrize("method", [BitFit(), NormTuning(), Full()])
def test_what_learns_is_what_the_method_is_called_after(method: Selective, kind: str, tiny: SamViT) -> None:
    encoder = (tiny.build().image_encoder if kind == "vit" else TinyViTEncoder()).requires_grad_(False)
    parameters = dict(encoder.named_parameters())
    norms = {
        name for name, module in encoder.named_modules() if isinstance(module, nn.LayerNorm | LayerNorm2d)
    }
    expected = {
        BitFit: {name for name in parameters if name.endswith(".bias")},
        NormTuning: {name for name in parameters if name.rpartition(".")[0] in norms},
        Full: set(parameters),
    }
    method.inject(encoder)
    assert {name for name, p in parameters.items() if p.requires_grad} == expected[type(method)]


@pytest.mark.parametrize("kind", ["vit", "tiny_vit"])
def test_tables_of_positions_that_learnt_hold_after_merging(kind: str, tiny: SamViT) -> None:
    """Frozen attention reads what it prepared of them, trained attention the tables themselves."""
    torch.manual_seed(0)
    encoder = tiny.build().image_encoder if kind == "vit" else TinyViTEncoder()
    adapted = Full().inject(encoder.requires_grad_(False))
    side = 32 if kind == "vit" else 64
    images = torch.randn(1, 3, side, side)
    before = adapted(images)
    for name, parameter in adapted.named_parameters():
        if "rel_pos" in name or "attention_biases" in name:
            nn.init.normal_(parameter)
    after = adapted(images)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(merge(adapted).requires_grad_(False)(images), after, rtol=0, atol=1e-5)
