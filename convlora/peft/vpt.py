"""Visual prompt tuning (Jia et al., ECCV 2022, arXiv:2203.12119): learnt tokens beside those of the image.

Prompts take part in attention without a position. A windowed block gives them to each of its windows and
averages over the windows what they attend to.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import window_partition, window_unpartition
from torch import Tensor, nn

from convlora.peft.method import Adapted, BlockMethod, transformer_blocks


class PromptedBlock(Adapted):
    """A frozen block of SAM's ViT run for the tokens of a grid and for prompts.

    Args:
        base: the frozen block.
        prompts: learnt prompts that enter here [p, c]; None takes those that come with the grid.
        hands_on: whether the prompts go on to the next block.
    """

    def __init__(self, base: nn.Module, prompts: nn.Parameter | None, hands_on: bool):
        super().__init__()
        self.base = base
        self.prompts = prompts
        self.hands_on = hands_on

    def forward(self, x: Any) -> Tensor | tuple[Tensor, Tensor]:
        """Map tokens [n, h, w, c], or a pair of them and prompts [n, p, c], to one of both."""
        block: Any = self.base
        grid: Tensor
        prompts: Tensor
        grid, prompts = x if self.prompts is None else (x, self.prompts.expand(x.shape[0], -1, -1))
        attended, heard = self.attend(block.norm1(grid), block.norm1(prompts))
        grid = grid + attended
        grid = grid + block.mlp(block.norm2(grid))
        if not self.hands_on:
            return grid
        prompts = prompts + heard
        prompts = prompts + block.mlp(block.norm2(prompts))
        return grid, prompts

    def attend(self, grid: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Return what tokens and prompts attend to."""
        block: Any = self.base
        if block.window_size == 0:
            return block.attn.with_prompts(grid, prompts)  # type: ignore[no-any-return]
        windows, padded = window_partition(grid, block.window_size)
        each = windows.shape[0] // grid.shape[0]  # windows of an image lie side by side
        attended, heard = block.attn.with_prompts(windows, prompts.repeat_interleave(each, dim=0))
        attended = window_unpartition(attended, block.window_size, padded, grid.shape[1:3])
        return attended, heard.unflatten(0, (grid.shape[0], each)).mean(dim=1)


@dataclass(frozen=True, kw_only=True)
class DeepPrompts(BlockMethod):
    """VPT-deep: each block has prompts of its own, which leave with it.

    The encoder does not start as the frozen one: prompts take their share of attention from the first step.

    Args:
        num_prompts: of each block, at least 1.
        blocks: indices of the prompted transformer blocks, negative from the end; None for all.
    """

    width = "num_prompts"
    starts_frozen = False
    num_prompts: int = 12

    def inject(self, encoder: nn.Module) -> nn.Module:
        check_encoder(encoder)
        for name, block in transformer_blocks(encoder, self.blocks).items():
            prompts = new_prompts(encoder, self.num_prompts)
            encoder.set_submodule(name, PromptedBlock(block, prompts, hands_on=False), strict=True)
        return encoder


@dataclass(frozen=True, kw_only=True)
class ShallowPrompts(BlockMethod):
    """VPT-shallow: prompts enter at the first block and pass through the others with the image's tokens.

    The encoder does not start as the frozen one: prompts take their share of attention from the first step.

    Args:
        num_prompts: at least 1.
        blocks: indices of the transformer blocks that they pass through, one after another, negative from the
            end; None for all.
    """

    width = "num_prompts"
    starts_frozen = False
    num_prompts: int = 384

    def inject(self, encoder: nn.Module) -> nn.Module:
        check_encoder(encoder)
        names = list(transformer_blocks(encoder))
        passed = sorted(names.index(name) for name in transformer_blocks(encoder, self.blocks))
        first, last = passed[0], passed[-1]
        if len(passed) != last - first + 1:
            raise ValueError(
                f"peft.blocks={passed} leaves out blocks between {first} and {last}, but prompts pass from "
                "each to the next; name neighbours, or choose peft=vpt_deep"
            )
        blocks: Any = encoder.blocks
        for index in passed:
            prompts = new_prompts(encoder, self.num_prompts) if index == first else None
            blocks[index] = PromptedBlock(blocks[index], prompts, hands_on=index < last)
        return encoder


def check_encoder(encoder: nn.Module) -> None:
    """Refuse what has no room for prompts.

    Raises:
        ValueError: the encoder is no ViT of SAM.
    """
    if not isinstance(encoder, ImageEncoderViT):
        raise ValueError(
            f"a prompt token has no place in a window of {type(encoder).__name__}, whose attention is a "
            "table of offsets; choose peft=adapter or a model of SAM's own, as model=sam_vit_b"
        )


def new_prompts(encoder: Any, number: int) -> nn.Parameter:
    """Return prompts [p, c] drawn as the paper does, within the bounds of a patch embedding's filters."""
    patches = encoder.patch_embed.proj
    bound = math.sqrt(6 / (patches.in_channels * math.prod(patches.kernel_size) + patches.out_channels))
    return nn.Parameter(torch.empty(number, patches.out_channels).uniform_(-bound, bound))
