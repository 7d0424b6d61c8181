from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from conftest import from_conf
from segment_anything.modeling.image_encoder import window_partition, window_unpartition
from torch import Tensor, nn

from convlora.peft.method import Method
from convlora.peft.vpt import DeepPrompts, ShallowPrompts
from convlora.sam import attention
from convlora.sam.attention import RelPosAttention, offset_table, prompted_attention
from convlora.sam.tiny_vit import TinyViTEncoder
from convlora.sam.zoo import SamViT
from convlora.segmenter import Segmenter

METHODS = [DeepPrompts(num_prompts=5), ShallowPrompts(num_prompts=5)]


def dense_attention(attn: RelPosAttention, grid: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """One matrix of all pairs; positions are added where query and key both have one."""
    n, h, w, c = grid.shape
    tokens = torch.cat([grid.reshape(n, h * w, c), prompts], dim=1)
    q, k, v = attn.qkv(tokens).view(n, -1, 3, attn.num_heads, c // attn.num_heads).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    rows, columns = offset_table(attn.rel_pos_h, h), offset_table(attn.rel_pos_w, w)
    for i in range(h * w):
        for j in range(h * w):
            offset = rows[i // w, j // w] + columns[i % w, j % w]
            scores[:, :, i, j] += q[:, :, i] @ offset
    out = attn.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(n, -1, c))
    return out[:, : h * w].view(grid.shape), out[:, h * w :]


def literal(block: Any, grid: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """A block with prompts, image by image and window by window."""
    tokens, beside = block.norm1(grid), block.norm1(prompts)
    if block.window_size:
        windows, padded = window_partition(tokens, block.window_size)
        each = len(windows) // len(grid)
        seen = [
            dense_attention(block.attn, one[None], beside[i // each][None]) for i, one in enumerate(windows)
        ]
        attended = torch.cat([tokens for tokens, _ in seen])
        attended = window_unpartition(attended, block.window_size, padded, grid.shape[1:3])
        means = [
            sum(heard[0] for _, heard in seen[i * each : (i + 1) * each]) / each for i in range(len(grid))
        ]
        heard = torch.stack(means)
    else:
        attended, heard = dense_attention(block.attn, tokens, beside)
    grid, prompts = grid + attended, prompts + heard
    return grid + block.mlp(block.norm2(grid)), prompts + block.mlp(block.norm2(prompts))


def build(tiny: SamViT, window: int = 4) -> nn.Module:
    torch.manual_seed(0)
    encoder = replace(tiny, window_size=window).build().image_encoder
    for block in encoder.blocks:
        nn.init.normal_(block.attn.rel_pos_h)
        nn.init.normal_(block.attn.rel_pos_w)
        block.attn.prepare()
    return encoder.requires_grad_(False)


@pytest.mark.parametrize("padding", [0, 5])
def test_prompted_attention_equals_the_dense_one(
    padding: int, tiny: SamViT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "prompted_attention", partial(wider, padding))
    attn = build(tiny).blocks[1].attn
    x, prompts = torch.randn(3, 5, 7, 16), torch.randn(3, 4, 16)
    for found, expected in zip(attn.with_prompts(x, prompts), dense_attention(attn, x, prompts), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def wider(padding: int, *arguments: Any) -> Tensor:
    return prompted_attention(*arguments[:-1], padding)


def test_attention_without_prompts_is_that_of_the_grid(tiny: SamViT) -> None:
    attn = build(tiny).blocks[1].attn
    x = torch.randn(2, 8, 8, 16)
    torch.testing.assert_close(attn.with_prompts(x, x.new_zeros(2, 0, 16))[0], attn(x))


@pytest.mark.parametrize("window", [4, 3])  # the grid of 8 x 8 is padded to windows of 3
def test_deep_prompts_are_fresh_in_each_block(tiny: SamViT, window: int) -> None:
    encoder = DeepPrompts(num_prompts=5).inject(build(tiny, window))
    images = torch.randn(2, 3, 32, 32)
    x = encoder.patch_embed(images) + encoder.pos_embed
    for block in encoder.blocks:
        x, _ = literal(block.base, x, block.prompts.expand(2, -1, -1))
    expected = encoder.neck(x.permute(0, 3, 1, 2))
    torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [4, 3])
def test_shallow_prompts_live_through_all_blocks(tiny: SamViT, window: int) -> None:
    encoder = ShallowPrompts(num_prompts=5).inject(build(tiny, window))
    images = torch.randn(2, 3, 32, 32)
    x, prompts = encoder.patch_embed(images) + encoder.pos_embed, encoder.blocks[0].prompts.expand(2, -1, -1)
    for block in encoder.blocks:
        x, prompts = literal(block.base, x, prompts)
    expected = encoder.neck(x.permute(0, 3, 1, 2))
    torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [DeepPrompts(), ShallowPrompts()])
def test_vit_h_trains_as_many_parameters_as_lora(method: Method) -> None:
    with torch.device("meta"):
        segmenter = Segmenter(from_conf("sam_vit_h").build(), method)
    assert sum(p.numel() for p in segmenter.parameters() if p.requires_grad) == 3_997_056


@pytest.mark.parametrize("method", METHODS)
def test_tiny_vit_is_refused(method: Method) -> None:
    with pytest.raises(ValueError, match=r"a prompt token has no place in a window of TinyViT.*choose"):
        method.inject(TinyViTEncoder())


def test_shallow_prompts_cannot_jump(tiny: SamViT) -> None:
    encoder = replace(tiny, depth=4).build().image_encoder
    with pytest.raises(ValueError, match=r"peft.blocks=\[0, 2, 3\] leaves out blocks between 0 and 3"):
        ShallowPrompts(blocks=[2, 0, -1]).inject(encoder)


def test_shallow_prompts_pass_through_the_blocks_named(tiny: SamViT) -> None:
    encoder = ShallowPrompts(blocks=[-2, 1]).inject(build(replace(tiny, depth=4)))
    assert [name for name, _ in encoder.named_parameters() if "prompts" in name] == ["blocks.1.prompts"]
    images = torch.randn(2, 3, 32, 32)
    x = encoder.blocks[0](encoder.patch_embed(images) + encoder.pos_embed)
    prompts = encoder.blocks[1].prompts.expand(2, -1, -1)
    for block in encoder.blocks[1:3]:
        x, prompts = literal(block.base, x, prompts)
    expected = encoder.neck(encoder.blocks[3](x).permute(0, 3, 1, 2))
    torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-4)


def test_prompts_are_drawn_as_far_as_the_paper_draws_them(tiny: SamViT) -> None:
    """Uniform within sqrt(6 / (3 * 4 * 4 + 16)), for patches of 4 pixels and 16 channels."""
    torch.manual_seed(0)
    encoder = DeepPrompts(num_prompts=500).inject(build(tiny))
    bound = (6 / 64) ** 0.5
    drawn = [block.prompts.detach() for block in encoder.blocks]
    for prompts in drawn:
        assert 0.99 * bound < prompts.abs().max() <= bound
        assert prompts.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not torch.equal(*drawn)


def test_no_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"peft.num_prompts=0 must be at least 1"):
        DeepPrompts(num_prompts=0)
