"""AdaptFormer (Chen et al., NeurIPS 2022, arXiv:2205.13535): a small MLP parallel to the frozen one."""

import math
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from convlora.peft.method import Adapted, BlockMethod, transformer_blocks, zeroed


class ParallelMlp(Adapted):
    """A frozen MLP and a narrow one beside it: mlp(t) + scale * up(relu(down(t))), t the normalised tokens.

    Args:
        base: the frozen MLP; one that has a norm of its own, as TinyViT's, lends it to the narrow one.
        dim: channels of the tokens.
        channels: of the narrow MLP.
        scale: of its output.
    """

    def __init__(self, base: nn.Module, dim: int, channels: int, scale: float):
        super().__init__()
        self.base = base
        self.scale = scale
        self.down = nn.Linear(dim, channels)
        self.up = zeroed(nn.Linear(channels, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., dim] to [..., dim]."""
        norm = getattr(self.base, "norm", None)
        tokens = x if norm is None else norm(x)
        y: Tensor = self.base(x) + self.scale * self.up(F.relu(self.down(tokens)))
        return y


@dataclass(frozen=True, kw_only=True)
class AdaptFormer(BlockMethod):
    """A narrow MLP parallel to that of each block.

    Args:
        channels: of the narrow MLPs, at least 1.
        scale: of their output.
        blocks: indices of the adapted transformer blocks, negative from the end; None for all.
    """

    width = "channels"
    channels: int = 64
    scale: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale == 0 or not math.isfinite(self.scale):
            raise ValueError(f"peft.scale={self.scale} must be a number other than 0")

    def inject(self, encoder: nn.Module) -> nn.Module:
        blocks: dict[str, Any] = transformer_blocks(encoder, self.blocks)
        for block in blocks.values():
            block.mlp = ParallelMlp(block.mlp, block.attn.proj.out_features, self.channels, self.scale)
        return encoder
