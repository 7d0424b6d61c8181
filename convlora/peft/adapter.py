"""Adapters (Houlsby et al., ICML 2019, arXiv:1902.00751): small layers in series after attention and MLP."""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from convlora.peft.method import Adapted, BlockMethod, transformer_blocks, zeroed


class InSeries(Adapted):
    """A frozen attention or MLP with an adapter behind it: h + up(gelu(down(h))), h the frozen output.

    Args:
        base: the frozen part, before the residual.
        dim: channels of its output.
        channels: of the bottleneck.
    """

    def __init__(self, base: nn.Module, dim: int, channels: int):
        super().__init__()
        self.base = base
        self.down = nn.Linear(dim, channels)
        self.up = zeroed(nn.Linear(channels, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., dim] to [..., dim]."""
        h: Tensor = self.base(x)
        y: Tensor = h + self.up(F.gelu(self.down(h)))
        return y


@dataclass(frozen=True, kw_only=True)
class Adapter(BlockMethod):
    """Bottleneck adapters after the attention and after the MLP of each block.

    Args:
        channels: of the bottlenecks, at least 1.
        blocks: indices of the adapted transformer blocks, negative from the end; None for all.
    """

    width = "channels"
    channels: int = 2

    def inject(self, encoder: nn.Module) -> nn.Module:
        blocks: dict[str, Any] = transformer_blocks(encoder, self.blocks)
        for block in blocks.values():
            dim = block.attn.proj.out_features
            block.attn = InSeries(block.attn, dim, self.channels)
            block.mlp = InSeries(block.mlp, dim, self.channels)
        return encoder
