"""SAM's transformer blocks from outside: half by half, and one after the other.

Tokens are [n, h, w, c]. A backbone with blocks of another kind gets its case in each function here.
"""

from collections.abc import Iterator
from typing import Any

import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Block, window_partition, window_unpartition
from timm.models.tiny_vit import TinyVitBlock
from torch import Tensor

from convlora.sam.tiny_vit import TinyViTEncoder


def attention_half(block: Any, x: Tensor) -> Tensor:
    """Return what a block's MLP half starts from: the tokens after attention and its residual.

    TinyViT's convolution between attention and MLP belongs to it.

    Raises:
        TypeError: a block of a kind that is not known here.
    """
    if isinstance(block, Block):
        tokens = block.norm1(x)
        if block.window_size == 0:
            return x + block.attn(tokens)  # type: ignore[no-any-return]
        windows, padded = window_partition(tokens, block.window_size)
        return x + window_unpartition(block.attn(windows), block.window_size, padded, x.shape[1:3])  # type: ignore[no-any-return]
    if isinstance(block, TinyVitBlock):  # its attention has a norm of its own and sees windows [n, l, c]
        windows, padded = window_partition(x, block.window_size)
        attended = block.attn(windows.flatten(1, 2)).view(windows.shape)
        x = x + window_unpartition(attended, block.window_size, padded, x.shape[1:3])
        convolved: Tensor = block.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return convolved
    raise _unknown(block)


def mlp_half(block: Any, x: Tensor) -> Tensor:
    """Return the tokens after the MLP and its residual; raises what `attention_half` does."""
    if isinstance(block, Block):
        return x + block.mlp(block.norm2(x))  # type: ignore[no-any-return]
    if isinstance(block, TinyVitBlock):
        return x + block.mlp(x)  # type: ignore[no-any-return]
    raise _unknown(block)


def walk(encoder: Any, images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Run an encoder up to its neck and give the tokens that enter and that leave each transformer block.

    Args:
        encoder: SAM's ViT or TinyViT.
        images: [n, 3, s, s].

    Raises:
        TypeError: an encoder of a kind that is not known here.
    """
    if isinstance(encoder, ImageEncoderViT):
        after = encoder.patch_embed(images) + encoder.pos_embed
        for block in encoder.blocks:
            before, after = after, block(after)
            yield before, after
    elif isinstance(encoder, TinyViTEncoder):
        convolutions, *stages = encoder.stages
        maps = convolutions(encoder.patch_embed(images.contiguous(memory_format=torch.channels_last)))
        for stage in stages:
            after = stage.downsample(maps).permute(0, 2, 3, 1)
            for block in stage.blocks:
                before, after = after, block(after)
                yield before, after
            maps = after.permute(0, 3, 1, 2)
    else:
        raise _unknown(encoder)


def _unknown(module: object) -> TypeError:
    return TypeError(f"{type(module).__name__} is not known to {__name__}; add its case there")
