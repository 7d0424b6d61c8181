import pytest
import torch
from torch import nn

from convlora.peft.lora import LoRA, LoRALinear
from convlora.sam.tiny_vit import TinyViTEncoder
from convlora.sam.zoo import SamViT


def test_lora_update_has_the_rank_and_scale_asked_for() -> None:
    layer = LoRALinear(nn.Linear(10, 12), rank=2, alpha=6)
    nn.init.normal_(layer.lora_b.weight)
    update = layer(torch.eye(10)) - layer.base(torch.eye(10))
    torch.testing.assert_close(update.T, 3 * layer.lora_b.weight @ layer.lora_a.weight)
    assert torch.linalg.matrix_rank(update, rtol=1e-4) == 2


def test_targets_that_match_nothing_name_what_there_is(tiny: SamViT) -> None:
    with pytest.raises(ValueError, match=r"peft.targets: 'qvk' names no linear layer .* has .*qkv"):
        LoRA(targets=["qvk"]).inject(tiny.build().image_encoder)


def test_no_targets_are_refused(tiny: SamViT) -> None:
    with pytest.raises(ValueError, match=r"peft.targets is empty"):
        LoRA(targets=[]).inject(tiny.build().image_encoder)


def test_targets_may_overlap(tiny: SamViT) -> None:
    encoder = LoRA(targets=["qkv", "blocks.0.attn.qkv"]).inject(tiny.build().image_encoder)
    assert sum(isinstance(module, LoRALinear) for module in encoder.modules()) == 2


def test_targets_choose_single_layers(tiny: SamViT) -> None:
    encoder = LoRA(targets=["blocks.0.attn.qkv", "lin1"]).inject(tiny.build().image_encoder)
    adapted = [name for name, module in encoder.named_modules() if isinstance(module, LoRALinear)]
    assert adapted == ["blocks.0.attn.qkv", "blocks.0.mlp.lin1", "blocks.1.mlp.lin1"]


def test_blocks_choose_where_to_adapt() -> None:
    encoder = LoRA(blocks=[1, -1]).inject(TinyViTEncoder())
    adapted = [name for name, module in encoder.named_modules() if isinstance(module, LoRALinear)]
    assert adapted == ["stages.1.blocks.1.attn.qkv", "stages.3.blocks.1.attn.qkv"]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [([2], "there is no block 2.* has 2"), ([], "is empty")],
)
def test_blocks_that_do_not_exist_are_refused(blocks: list[int] | str, message: str, tiny: SamViT) -> None:
    with pytest.raises(ValueError, match=f"peft.blocks.*{message}"):
        LoRA(blocks=blocks).inject(tiny.build().image_encoder)


def test_impossible_rank_is_refused() -> None:
    with pytest.raises(ValueError, match=r"peft.rank=0 must be at least 1"):
        LoRA(rank=0)
