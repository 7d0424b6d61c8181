"""Mona (Yin et al., CVPR 2025, arXiv:2408.08345): adapters that convolve, after both residuals of a block."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlora.peft.method import Adapted, BlockMethod, transformer_blocks, zeroed
from convlora.sam.blocks import attention_half, mlp_half

KERNELS = (3, 5, 7)


class Mona(nn.Module):
    """x + up(dropout(gelu(conv(down(gamma norm(x) + gamma_x x))))) on a grid of tokens.

    conv(t) = u + W u with u = t + the mean of three depthwise convolutions of t. The authors start `up` as
    PyTorch does; here it starts at zero, so that the adapted encoder starts as the frozen one.

    Args:
        dim: channels of the tokens.
        channels: of the bottleneck.
        dropout: probability.
    """

    def __init__(self, dim: int, channels: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))
        self.gamma_x = nn.Parameter(torch.ones(dim))
        self.down = nn.Linear(dim, channels)
        self.depthwise = nn.ModuleList(
            nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels) for size in KERNELS
        )
        self.pointwise = nn.Conv2d(channels, channels, 1)
        self.dropout = nn.Dropout(dropout)
        self.up = zeroed(nn.Linear(channels, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, h, w, dim] to [n, h, w, dim]."""
        t = self.down(self.norm(x) * self.gamma + x * self.gamma_x).permute(0, 3, 1, 2)
        u = t + sum(conv(t) for conv in self.depthwise) / len(KERNELS)
        hidden = self.dropout(F.gelu(u + self.pointwise(u))).permute(0, 2, 3, 1)
        y: Tensor = x + self.up(hidden)
        return y


class MonaBlock(Adapted):
    """A frozen block with one adapter after each of its residuals.

    Args:
        base: a block of SAM's ViT or of TinyViT.
        channels: of the adapters' bottlenecks.
        dropout: probability, in the bottlenecks.
    """

    def __init__(self, base: Any, channels: int, dropout: float):
        super().__init__()
        self.base = base
        dim = base.attn.proj.out_features
        self.after_attention = Mona(dim, channels, dropout)
        self.after_mlp = Mona(dim, channels, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, h, w, c] to [n, h, w, c]."""
        x = self.after_attention(attention_half(self.base, x))
        y: Tensor = self.after_mlp(mlp_half(self.base, x))
        return y


@dataclass(frozen=True, kw_only=True)
class MonaAdapters(BlockMethod):
    """Two convolving adapters in each block.

    Args:
        channels: of the bottlenecks, at least 1.
        dropout: probability, in the bottlenecks.
        blocks: indices of the adapted transformer blocks, negative from the end; None for all.
    """

    width = "channels"
    channels: int = 64
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"peft.dropout={self.dropout} must be at least 0 and below 1")

    def inject(self, encoder: nn.Module) -> nn.Module:
        for name, block in transformer_blocks(encoder, self.blocks).items():
            encoder.set_submodule(name, MonaBlock(block, self.channels, self.dropout), strict=True)
        return encoder
