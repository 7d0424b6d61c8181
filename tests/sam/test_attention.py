import copy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from conftest import from_conf
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from convlora.sam import attention as ours
from convlora.sam.attention import (
    RelPosAttention,
    flash_padding,
    folded_attention,
    offset_table,
    tiled_attention,
)
from convlora.sam.zoo import SamViT

SIZES = [(7, 7), (5, 9), (1, 4)]


def reference(size: tuple[int, int]) -> Attention:
    """segment-anything's own module with positions that matter."""
    torch.manual_seed(0)
    module = Attention(24, num_heads=3, use_rel_pos=True, input_size=size)
    nn.init.normal_(module.rel_pos_h)
    nn.init.normal_(module.rel_pos_w)
    return module


def run(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of the fused projection."""
    x = x.detach().requires_grad_()
    y = module(x)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, module.qkv.weight], cotangent)]


@pytest.fixture(params=[False, True], ids=["terms added", "terms folded"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of narrow rows and of wide ones, whatever the precision."""
    monkeypatch.setattr(ours, "is_narrow", lambda q: request.param)


@pytest.mark.parametrize("attend", [tiled_attention, folded_attention, partial(folded_attention, padding=5)])
@pytest.mark.parametrize("size", SIZES)
def test_attention_equals_segment_anything(
    size: tuple[int, int], attend: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "attend", attend)
    theirs = reference(size)
    x = torch.randn(4, *size, 24)
    for found, expected in zip(run(RelPosAttention(theirs), x), run(theirs, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_widths_without_a_flash_backward_pass_are_padded_where_it_is_missing() -> None:
    """PyTorch refuses 193 to 224 on 8.6 to 8.9 and on 12.x; ViT-H at 1024 px has 80 + 64 + 64."""
    for capability in [(8, 6), (8, 7), (8, 9), (12, 0), (12, 1)]:
        assert [flash_padding(width, capability) for width in (192, 200, 208, 224, 232)] == [0, 32, 24, 8, 0]
    for capability in [(0, 0), (7, 5), (8, 0), (9, 0), (10, 0), (11, 0)]:
        assert not any(flash_padding(width, capability) for width in range(257))


def test_attention_on_a_consumer_gpu_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without storage stand for a GPU's."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr(ours, "position_of_keys", ours._position_of_keys.__wrapped__)  # nothing is kept
    widths = []

    class Widths(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is nn.functional.scaled_dot_product_attention:
                widths.extend(tensor.shape[-1] for tensor in args)
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Widths():
        q, table = torch.empty(1, 64, 64, 80, device="cuda"), torch.empty(64, 64, 80, device="cuda")
        assert ours.attend(q, q, q, table, table).shape == q.shape
    assert widths == [232, 232, 232]


@pytest.mark.parametrize(
    ("width", "dtype", "narrow"),
    [(14, torch.bfloat16, True), (32, torch.bfloat16, False), (14, torch.float16, False), (14, None, False)],
)
def test_only_short_rows_of_bfloat16_fold_positions_into_the_product(
    width: int, dtype: torch.dtype | None, narrow: bool
) -> None:
    assert ours.is_narrow(torch.empty(1, 2, width, 4, dtype=dtype)) == narrow


@pytest.mark.usefixtures("both_ways")
def test_second_derivatives_are_right() -> None:
    torch.manual_seed(0)
    shapes = [(2, 3, 2, 3)] * 3 + [(3, 3, 3), (2, 2, 3)]
    inputs = [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradgradcheck(tiled_attention, inputs)


@pytest.mark.usefixtures("both_ways")
def test_tiles_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = reference((7, 7))
    x = torch.randn(4, 7, 7, 24)
    monkeypatch.setattr(ours, "TILE", 49 * 7 * 3)  # three rows of one head at a time
    for found, expected in zip(run(RelPosAttention(theirs), x), run(theirs, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_other_sizes_resample_offsets_as_segment_anything_does() -> None:
    theirs = reference((7, 7))
    x = torch.randn(2, 10, 4, 24)
    torch.testing.assert_close(RelPosAttention(theirs)(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attend", [tiled_attention, folded_attention])
@pytest.mark.parametrize("size", [(7, 7), (2, 40)])
def test_half_precision_stays_near_single(
    size: tuple[int, int], attend: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "attend", attend)
    module = RelPosAttention(reference(size))
    x = torch.randn(2, *size, 24)
    exact = run(module, x)
    with torch.autocast("cpu", torch.bfloat16):
        half = run(module, x)
    for found, expected in zip(half, exact, strict=True):
        assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_no_matrix_of_all_pairs_is_kept_for_backward() -> None:
    module = RelPosAttention(reference((32, 32)))
    largest = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(torch.randn(1, 32, 32, 24, requires_grad=True))
    assert largest < 1024 * 1024


def test_tables_follow_loaded_weights() -> None:
    module = RelPosAttention(reference((5, 5))).requires_grad_(False)
    other = copy.deepcopy(module.state_dict())
    other["rel_pos_h"] += 1
    other["rel_pos_w"] -= 1
    x = torch.randn(1, 5, 5, 24)
    before = module(x)
    module.load_state_dict(other)
    assert not torch.allclose(module(x), before)
    torch.testing.assert_close(module.row_table, offset_table(other["rel_pos_h"], 5))
    assert set(other) == set(reference((5, 5)).state_dict())


@pytest.mark.usefixtures("both_ways")
def test_positions_can_learn() -> None:
    theirs = reference((5, 5))
    module = RelPosAttention(theirs)
    x = torch.randn(1, 5, 5, 24)
    for name in ("rel_pos_h", "rel_pos_w"):
        (found,) = torch.autograd.grad(module(x).square().sum(), getattr(module, name))
        (expected,) = torch.autograd.grad(theirs(x).square().sum(), getattr(theirs, name))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_encoder_equals_segment_anything(tiny: SamViT) -> None:
    torch.manual_seed(0)
    encoder = tiny.build().image_encoder
    for parameter in encoder.parameters():  # positions start at zero
        nn.init.normal_(parameter, std=0.2)
    theirs = copy.deepcopy(encoder)
    for index, block in enumerate(theirs.blocks):
        size = (8, 8) if index in tiny.global_attn_indexes else (4, 4)
        block.attn = Attention(16, num_heads=2, use_rel_pos=True, input_size=size)
    theirs.load_state_dict(encoder.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder(images), theirs(images), rtol=1e-4, atol=1e-4)


def test_vit_b_equals_segment_anything() -> None:
    """Two blocks of two of its twelve heads, one windowed and one global, at 1024 pixels."""
    torch.manual_seed(0)
    vit_b = replace(from_conf("sam_vit_b"), embed_dim=128, num_heads=2, depth=2, global_attn_indexes=[1])
    theirs = ImageEncoderViT(
        embed_dim=128,
        num_heads=2,
        depth=2,
        global_attn_indexes=(1,),
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=14,
    ).requires_grad_(False)
    for name, parameter in theirs.named_parameters():
        if "rel_pos" in name:
            nn.init.normal_(parameter, std=0.1)
    encoder = vit_b.build().image_encoder.requires_grad_(False)
    encoder.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, 1024, 1024)
    torch.testing.assert_close(encoder(images), theirs(images), rtol=1e-4, atol=1e-4)
