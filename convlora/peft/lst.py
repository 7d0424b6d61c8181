"""Ladder side-tuning (Sung et al., NeurIPS 2022, arXiv:2206.06522): a small network beside the frozen one.

The side network's state starts as s = down(h_0) of the tokens that enter the first block. Beside block i,
whose output is h_i, s = g s + (1 - g) down_i(h_i) with g = sigmoid(gate_i / 0.1), then s passes through a
small transformer block. In the end up(s) is added to the frozen tokens. No gradient passes through the frozen
blocks, so autograd keeps nothing of them.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import Block
from torch import Tensor, nn

from convlora.peft.method import Adapted, BlockMethod, transformer_blocks, zeroed
from convlora.sam.blocks import walk

TEMPERATURE = 0.1  # of the gates


class FusedAttention(nn.Module):
    """Attention of one head over tokens [n, h, w, c], without positions; keeps no matrix of all pairs."""

    def __init__(self, channels: int):
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        # fused kernels take heads of a multiple of 8 channels
        q, k, v = (F.pad(t, (0, -width % 8))[:, None] for t in self.qkv(x).flatten(1, 2).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, scale=width**-0.5)[..., :width]
        out: Tensor = self.proj(attended.reshape(x.shape))
        return out


class Rung(nn.Module):
    """The part of the side network that stands beside one block.

    Args:
        dim: channels of the frozen block.
        channels: of the side network.
        window_size: of the frozen block; 0 is global.
    """

    def __init__(self, dim: int, channels: int, window_size: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))
        self.down = nn.Linear(dim, channels)
        self.block = Block(channels, num_heads=1, window_size=window_size)
        self.block.attn = FusedAttention(channels)

    def forward(self, state: Tensor, h: Tensor) -> Tensor:
        """Take the frozen tokens [n, h, w, dim] into the state [n, h', w', channels], on the tokens' grid."""
        g = torch.sigmoid(self.gate / TEMPERATURE)
        out: Tensor = self.block(g * resample(state, h) + (1 - g) * self.down(h))
        return out


class LadderEncoder(Adapted):
    """A frozen encoder with its side network.

    Args:
        base: SAM's ViT or TinyViT.
        indices: of the blocks that the side network stands beside.
        channels: of the side network.
    """

    def __init__(self, base: Any, indices: set[int], channels: int):
        super().__init__()
        self.base = base
        blocks: list[Any] = list(transformer_blocks(base).values())
        dims = [block.attn.proj.out_features for block in blocks]
        self.down = nn.Linear(dims[min(indices)], channels)
        self.rungs = nn.ModuleDict(
            {str(i): Rung(dims[i], channels, blocks[i].window_size) for i in sorted(indices)}
        )
        self.up = zeroed(nn.Linear(channels, dims[-1]))

    @property
    def blocks(self) -> Any:
        """The blocks of the frozen encoder."""
        return self.base.blocks

    def forward(self, images: Tensor) -> Tensor:
        """Map images [n, 3, s, s] to embeddings as the frozen encoder does."""
        first = next(iter(self.rungs))
        for index, (before, x) in enumerate(walk(self.base, images)):
            if str(index) == first:
                state = self.down(before)
            if str(index) in self.rungs:
                state = self.rungs[str(index)](state, x)
        x = x + self.up(resample(state, x))
        encoder: Any = self.base
        embeddings: Tensor = encoder.neck(x.permute(0, 3, 1, 2))
        return embeddings


def resample(state: Tensor, like: Tensor) -> Tensor:
    """Bring a state [n, h, w, c] to the grid of other tokens, which TinyViT's stages change."""
    if state.shape[1:3] == like.shape[1:3]:
        return state
    return F.interpolate(state.permute(0, 3, 1, 2), size=like.shape[1:3], mode="bilinear").permute(0, 2, 3, 1)


@dataclass(frozen=True, kw_only=True)
class LadderSideTuning(BlockMethod):
    """A small transformer that reads the frozen blocks' outputs and corrects what enters the neck.

    Args:
        channels: of the side network, at least 1.
        blocks: indices of the transformer blocks that it reads, negative from the end; None for all.
    """

    width = "channels"
    channels: int = 98

    def inject(self, encoder: nn.Module) -> nn.Module:
        names = list(transformer_blocks(encoder))
        read = {names.index(name) for name in transformer_blocks(encoder, self.blocks)}
        return LadderEncoder(encoder, read, self.channels)
