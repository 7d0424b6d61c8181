"""SAM-Adapter (Chen et al., ICCV workshops 2023, arXiv:2304.09148): patches and high frequencies as prompts.

Each block's input gets up(gelu(tune_i(F))), where F = embed(patch embedding) + conv(high frequencies of the
image); tune_i is the block's own, the others serve all blocks.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from convlora.peft.method import Adapted, BlockMethod, transformer_blocks, without_autocast, zeroed


class PromptedEncoder(Adapted):
    """SAM's frozen ViT whose blocks' inputs are prompted.

    Args:
        base: the frozen encoder.
        indices: of the prompted blocks.
        channels: of the features F.
        mask_ratio: share of the frequencies, the low ones, that are left out.
    """

    def __init__(self, base: Any, indices: set[int], channels: int, mask_ratio: float):
        super().__init__()
        self.base = base
        self.mask_ratio = mask_ratio
        patches = base.patch_embed.proj
        dim, side = patches.out_channels, patches.kernel_size
        self.embed = nn.Linear(dim, channels)
        self.conv = nn.Conv2d(patches.in_channels, channels, side, stride=side)
        self.tune = nn.ModuleDict({str(index): nn.Linear(channels, channels) for index in sorted(indices)})
        self.up = zeroed(nn.Linear(channels, dim))

    @property
    def blocks(self) -> Any:
        """The blocks of the frozen encoder."""
        return self.base.blocks

    def forward(self, images: Tensor) -> Tensor:
        """Map images [n, 3, s, s] to embeddings as the frozen encoder does."""
        encoder: Any = self.base
        x = encoder.patch_embed(images)
        details = self.conv(high_frequencies(images, self.mask_ratio)).permute(0, 2, 3, 1)
        features = self.embed(x) + details
        x = x + encoder.pos_embed
        for index, block in enumerate(encoder.blocks):
            if str(index) in self.tune:
                x = x + self.up(F.gelu(self.tune[str(index)](features)))
            x = block(x)
        embeddings: Tensor = encoder.neck(x.permute(0, 3, 1, 2))
        return embeddings


def high_frequencies(images: Tensor, mask_ratio: float) -> Tensor:
    """Return images [n, c, h, w] without the square of low frequencies that covers `mask_ratio` of all.

    What is left loses its sign, as in the authors' code.
    """
    h, w = images.shape[-2:]
    with without_autocast(images.device):  # half precision has no FFT of all sizes
        spectrum = torch.fft.rfft2(images.float())
        half = math.sqrt(mask_ratio * h * w) / 2
        rows, columns = (torch.arange(side, device=images.device) for side in (h, w // 2 + 1))
        rows = torch.minimum(rows, h - rows)  # frequencies beyond the half are those below 0
        low = (rows < half)[:, None] & (columns < half)
        details: Tensor = torch.fft.irfft2(spectrum * ~low, s=(h, w)).abs()
    return details.to(images.dtype)


@dataclass(frozen=True, kw_only=True)
class SamAdapter(BlockMethod):
    """Prompts at the input of each block, made from what the patch embedding and a high-pass filter see.

    Args:
        channels: of the features that the prompts are made from, at least 1.
        mask_ratio: share of the frequencies, the low ones, that the filter leaves out, 0 to below 1.
        blocks: indices of the prompted transformer blocks, negative from the end; None for all.
    """

    width = "channels"
    channels: int = 80
    mask_ratio: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mask_ratio < 1:
            raise ValueError(f"peft.mask_ratio={self.mask_ratio} must be at least 0 and below 1")

    def inject(self, encoder: nn.Module) -> nn.Module:
        if not isinstance(encoder, ImageEncoderViT):
            raise ValueError(
                f"SAM-Adapter gives one map of features to all blocks, but those of {type(encoder).__name__} "
                "have grids and widths of their own; choose peft=adapter or another model"
            )
        names = list(transformer_blocks(encoder))
        prompted = {names.index(name) for name in transformer_blocks(encoder, self.blocks)}
        return PromptedEncoder(encoder, prompted, self.channels, self.mask_ratio)
