import copy
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from hydra.utils import instantiate
from torch import nn

from convlora.peft.conv_lora import ConvLoRA
from convlora.peft.lora import LoRA, LoRALinear
from convlora.peft.method import Method, aux_loss
from convlora.sam.tiny_vit import TinyViTEncoder
from convlora.sam.zoo import SamViT
from convlora.segmenter import Segmenter


@pytest.fixture(params=sorted((ROOT / "conf" / "peft").glob("*.yaml")), ids=lambda path: path.stem)
def method(request: pytest.FixtureRequest) -> Method:
    path: Path = request.param
    made: Method = instantiate(yaml.safe_load(path.read_text()), _convert_="all")
    return made


def test_adapted_equals_frozen_at_start(method: Method, tiny: SamViT) -> None:
    encoder = tiny.build().image_encoder.requires_grad_(False)
    frozen = copy.deepcopy(encoder)
    adapted = method.inject(encoder).train()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(adapted(images), frozen(images), rtol=0, atol=0)


def test_only_what_the_method_creates_is_trainable(method: Method, tiny: SamViT) -> None:
    encoder = tiny.build().image_encoder.requires_grad_(False)
    frozen = {id(p) for p in encoder.parameters()}
    adapted = method.inject(encoder)
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad == (id(parameter) not in frozen), name


def test_every_trainable_tensor_learns_from_a_step(method: Method, tiny: SamViT) -> None:
    torch.manual_seed(0)
    segmenter = Segmenter(tiny.build(), method).train()
    for module in segmenter.modules():
        if isinstance(module, LoRALinear):  # B = 0 keeps what lies before it from the first step's gradient
            nn.init.normal_(module.lora_b.weight)
    loss = segmenter(torch.randn(8, 3, 32, 32)).square().mean()
    aux = aux_loss(segmenter)
    (loss if aux is None else loss + aux).backward()
    for name, parameter in segmenter.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_balance_loss_sums_over_layers(tiny: SamViT) -> None:
    encoder = ConvLoRA(num_experts=4).inject(tiny.build().image_encoder.requires_grad_(False)).train()
    encoder(torch.randn(2, 3, 32, 32))
    single = [block.attn.qkv.gate.aux_loss for block in encoder.blocks]
    found = aux_loss(encoder)
    assert found is not None
    assert len(single) == 2
    torch.testing.assert_close(found, single[0] + single[1])


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


def test_nothing_is_kept_before_the_first_adapted_block(tiny: SamViT) -> None:
    encoder = ConvLoRA(blocks=[-1]).inject(tiny.build().image_encoder.requires_grad_(False)).train()
    learns: list[bool] = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, inputs, output: learns.append(output.requires_grad))
    encoder(torch.randn(1, 3, 32, 32))
    assert learns == [False, True]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [([2], "there is no block 2.* has 2"), ([], "is empty"), ("all", "must list indices")],
)
def test_blocks_that_do_not_exist_are_refused(blocks: list[int] | str, message: str, tiny: SamViT) -> None:
    with pytest.raises(ValueError, match=f"peft.blocks.*{message}"):
        LoRA(blocks=blocks).inject(tiny.build().image_encoder)


def test_impossible_rank_is_refused() -> None:
    with pytest.raises(ValueError, match=r"peft.rank=0 must be at least 1"):
        LoRA(rank=0)
