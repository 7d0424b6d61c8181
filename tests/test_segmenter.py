from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import from_conf
from literal import as_released
from segment_anything.modeling import ImageEncoderViT

from convlora.data.transforms import LongestSideResize, Resize, SquareResize, eval_transform
from convlora.peft.conv_lora import ConvLoRA
from convlora.peft.dora import DoRA
from convlora.peft.lora import LoRA
from convlora.peft.method import Method, aux_loss
from convlora.peft.selective import BitFit, DecoderOnly, Full, NormTuning
from convlora.peft.ssf import SSF
from convlora.sam.zoo import MobileSam, SamViT
from convlora.segmenter import Segmenter, fit_mask, restore_size, to_prediction


def name_it(name: str) -> Callable[[str], str]:
    return lambda message: f"{name}: {message}"


def trainable(segmenter: Segmenter) -> int:
    return sum(p.numel() for p in segmenter.parameters() if p.requires_grad)


def count(model: str, method: Method) -> int:
    with torch.device("meta"):
        return trainable(Segmenter(from_conf(model).build(), method))


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (DecoderOnly(), 3_505_536),
        (LoRA(), 3_997_056),
        (ConvLoRA(), 4_020_096),
        (DoRA(), 4_119_936),
        (SSF(), 4_410_752),
        (BitFit(), 3_957_888),
        (NormTuning(), 3_670_400),
        (Full(), 640_531_584),
    ],
)
def test_vit_h_trains_as_many_parameters_as_are_told(method: Method, expected: int) -> None:
    assert count("sam_vit_h", method) == expected


@pytest.mark.parametrize(("model", "depth", "dim"), [("sam_vit_b", 12, 768), ("sam_vit_l", 24, 1024)])
@pytest.mark.parametrize(("rank", "experts"), [(3, 8), (5, 4)])
def test_trainable_count_has_its_closed_form(
    model: str, depth: int, dim: int, rank: int, experts: int
) -> None:
    decoder = 3_505_536
    low_rank = depth * rank * (dim + 3 * dim)
    mixture = depth * (experts * (9 * rank * rank + rank) + 2 * rank * experts)
    assert count(model, DecoderOnly()) == decoder
    assert count(model, LoRA(rank=rank)) == decoder + low_rank
    assert count(model, ConvLoRA(rank=rank, num_experts=experts)) == decoder + low_rank + mixture


def test_frozen_modules_stay_in_evaluation_mode(tiny: SamViT) -> None:
    sam = tiny.build()
    frozen = [module for module in sam.image_encoder.modules() if not isinstance(module, ImageEncoderViT)]
    segmenter = Segmenter(sam, ConvLoRA()).train()
    assert not any(module.training for module in frozen)
    assert not segmenter.image_encoder.training
    assert segmenter.image_encoder.blocks[0].attn.qkv.gate.training
    assert segmenter.mask_decoder.transformer.training
    assert not any(module.training for module in segmenter.eval().modules())


def test_trainable_state_carries_a_segmenter_over(tiny: SamViT) -> None:
    torch.manual_seed(0)
    sam_state = tiny.build().state_dict()
    first, second = tiny.build(), tiny.build()
    first.load_state_dict(sam_state)
    second.load_state_dict(sam_state)
    source, target = Segmenter(first, ConvLoRA()), Segmenter(second, ConvLoRA())
    for parameter in source.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    target.load_trainable_state(source.trainable_state())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(source.eval()(images), target.eval()(images))
    assert not any(key.startswith("prompt_encoder") or ".base." in key for key in source.trainable_state())


@pytest.mark.parametrize(
    ("other", "num_classes", "message"),
    [
        (LoRA(), 1, r"unknown \(first image_encoder.blocks.0.attn.qkv.experts.bias\)"),
        (ConvLoRA(rank=4), 1, r"of another shape \(first .* is \[8, 3\] where \[8, 4\] is expected\)"),
        (ConvLoRA(), 2, r"missing \(first mask_decoder.output_hypernetworks_mlps.1.layers.0.bias\)"),
    ],
)
def test_state_of_another_setting_is_refused(
    tiny: SamViT, other: Method, num_classes: int, message: str
) -> None:
    state = Segmenter(tiny.build(), ConvLoRA()).trainable_state()
    with pytest.raises(ValueError, match=message):
        Segmenter(tiny.build(), other, num_classes=num_classes).load_trainable_state(state)


def test_state_of_another_backbone_is_refused(tiny: SamViT) -> None:
    state = Segmenter(tiny.build(), ConvLoRA()).trainable_state()
    with pytest.raises(ValueError, match="another backbone"):
        Segmenter(replace(tiny, depth=1).build(), ConvLoRA()).load_trainable_state(state)


def test_restored_logits_cover_the_image_and_not_the_padding() -> None:
    """A wide image filled the upper half of the input; what lies below must not come back."""
    logits = torch.full((1, 32, 32), -5.0)
    logits[:, :16, :16] = 5.0
    native = restore_size(logits, content=(16, 32), size=(40, 80))
    assert native.shape == (1, 40, 80)
    assert (native[:, :, :38] > 0).all()
    assert (native[:, :, 42:] < 0).all()


@pytest.mark.parametrize("resize", [SquareResize(32), LongestSideResize(32)])
@pytest.mark.parametrize("size", [(40, 80), (71, 53), (20, 11)])
def test_fitted_masks_are_those_of_training(resize: Resize, size: tuple[int, int]) -> None:
    mask = np.random.default_rng(0).integers(0, 5, size, np.uint8)
    expected = eval_transform(resize)(image=np.zeros((*size, 3), np.uint8), mask=mask)["mask"]
    assert fit_mask(torch.from_numpy(mask), resize.content(*size), 32).tolist() == expected.tolist()


def test_foreground_is_found_exactly_where_its_probability_is_at_least_one_half() -> None:
    found = to_prediction(torch.tensor([[[-20.0, -1e-3, 0.0, 1e-3, 20.0]]]))
    assert found.prob.tolist() == [[0, 127, 128, 128, 255]]
    assert found.classes.tolist() == [[0, 0, 1, 1, 1]]


def test_of_several_classes_the_likeliest_is_found_with_its_probability() -> None:
    logits = torch.tensor([[0.0, 3.0], [0.0, 0.0], [9.0, 0.0]])[:, None]
    found = to_prediction(logits)
    assert found.classes.tolist() == [[2, 0]]
    expected = (torch.softmax(logits, 0).amax(0) * 255).round().to(torch.uint8)
    assert torch.equal(found.prob, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "tiny_vit"])
def test_encoder_compiles_as_one_graph_that_runs_its_blocks_again(kind: str, tiny: SamViT) -> None:
    torch.manual_seed(0)
    backbone = tiny if kind == "vit" else MobileSam(name="mobile_sam", image_size=64)
    sam = replace(backbone, activation_checkpointing=True).build()
    if kind == "tiny_vit":
        for stage in sam.image_encoder.stages:
            stage.blocks = stage.blocks[:1]
    segmenter = Segmenter(sam, ConvLoRA(num_experts=4)).train()
    images = torch.randn(2, 3, backbone.image_size, backbone.image_size)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        loss, aux = segmenter(images).square().mean(), aux_loss(segmenter)
        assert aux is not None
        (loss + aux).backward()
        trained = {name: p.grad for name, p in segmenter.named_parameters() if p.requires_grad}
        results.append({"loss": loss, "aux": aux, **trained})
        segmenter.zero_grad()
        segmenter.compile_encoder(backend="aot_eager")
    eager, compiled = results
    assert eager.keys() == compiled.keys()
    for name, expected in eager.items():
        assert expected is not None, name
        limit = 1e-4 * max(expected.abs().max().item(), 1e-3)
        torch.testing.assert_close(
            compiled[name], expected, rtol=0, atol=limit, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("kind", ["vit", "tiny_vit"])
def test_segmenter_equals_its_released_form(kind: str, tiny: SamViT) -> None:
    torch.manual_seed(0)
    backbone = tiny if kind == "vit" else MobileSam(name="mobile_sam", image_size=64)
    segmenter = Segmenter(backbone.build(), ConvLoRA(num_experts=8)).train()
    for name, parameter in segmenter.named_parameters():
        if "lora_b" in name or "rel_pos" in name or "attention_biases" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    segmenter.image_encoder.load_state_dict(segmenter.image_encoder.state_dict())  # tables follow
    images = torch.randn(2, 3, backbone.image_size, backbone.image_size)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        logits = segmenter(images)
        logits.square().mean().backward()
        trained = {name: p.grad for name, p in segmenter.named_parameters() if p.requires_grad}
        results.append({"logits": logits.detach(), **trained})
        segmenter.zero_grad()
        as_released(segmenter.image_encoder)
    ours, released = results
    assert ours.keys() == released.keys()
    for name, expected in released.items():
        found = ours[name]
        assert expected is not None, name
        assert found is not None, name
        limit = 1e-3 * max(expected.abs().max().item(), 1e-3)  # rounding adds up through the depth
        torch.testing.assert_close(
            found, expected, rtol=0, atol=limit, msg=lambda m, name=name: f"{name}: {m}"
        )
