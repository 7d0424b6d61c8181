"""TinyViT as MobileSAM's image encoder (Wu et al., ECCV 2022, arXiv:2207.10666; Zhang et al., 2023).

The architecture is timm's. Three things differ: the last stage keeps stride 16, SAM's neck follows it, and
each window attention holds its bias as one table made once.
"""

import torch
import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from timm.models.tiny_vit import Attention, TinyVit
from torch import Tensor, nn

_HEAD = ("image_encoder.norm_head.", "image_encoder.head.")
_RENAMED = (
    ("image_encoder.patch_embed.seq.0.", "image_encoder.patch_embed.conv1."),
    ("image_encoder.patch_embed.seq.2.", "image_encoder.patch_embed.conv2."),
)


class WindowAttention(nn.Module):
    """Attention over the tokens of a window [n, l, c] with TinyViT's learnt bias per offset.

    timm gathers the bias table at the first call and keeps it; made during validation, that copy is an
    inference tensor, which the next training step cannot save for its backward pass. Here it is a buffer,
    gathered when weights are loaded.
    """

    bias: Tensor

    def __init__(self, attention: Attention):
        super().__init__()
        self.num_heads = attention.num_heads
        self.norm = attention.norm
        self.qkv = attention.qkv
        self.proj = attention.proj
        self.attention_biases = attention.attention_biases
        self.register_buffer("attention_bias_idxs", attention.attention_bias_idxs, persistent=False)
        self.register_buffer("bias", None, persistent=False)
        self.prepare()
        self.register_load_state_dict_post_hook(_prepare_again)  # type: ignore[no-untyped-call]

    def prepare(self) -> None:
        """Spread the biases of offsets over pairs of tokens [heads, l, l]; again after weights are loaded."""
        self.bias = self.attention_biases.detach()[:, self.attention_bias_idxs]

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [n, l, c] to [n, l, c]."""
        n, l, c = x.shape  # noqa: E741
        q, k, v = self.qkv(self.norm(x)).view(n, l, self.num_heads, 3, -1).permute(3, 0, 2, 1, 4)
        learnt = self.attention_biases.requires_grad
        bias = self.attention_biases[:, self.attention_bias_idxs] if learnt else self.bias
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        out: Tensor = self.proj(x.transpose(1, 2).reshape(n, l, c))
        return out


def _prepare_again(module: WindowAttention, _: object) -> None:
    module.prepare()


class TinyViTEncoder(nn.Module):
    """TinyViT-5M with SAM's neck: images [n, 3, s, s] to embeddings [n, 256, s / 16, s / 16]."""

    stride = 16

    def __init__(self) -> None:
        super().__init__()
        vit = TinyVit(
            embed_dims=(64, 128, 160, 320),
            depths=(2, 2, 6, 2),
            num_heads=(2, 4, 5, 10),
            window_sizes=(7, 7, 14, 7),
            drop_path_rate=0.0,
            num_classes=0,
        )
        vit.stages[3].downsample.conv2.conv.stride = (1, 1)
        for stage in vit.stages[1:]:
            for block in stage.blocks:
                block.attn = WindowAttention(block.attn)
        self.patch_embed = vit.patch_embed
        self.stages = vit.stages
        self.neck = nn.Sequential(
            nn.Conv2d(320, 256, kernel_size=1, bias=False),
            LayerNorm2d(256),
            nn.Conv2d(256, 256, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(256),
        )

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of all stages, first to last."""
        return [block for stage in self.stages for block in stage.blocks]

    def forward(self, images: Tensor) -> Tensor:
        """Encode images."""
        images = images.contiguous(memory_format=torch.channels_last)  # depthwise convolutions run faster so
        embeddings: Tensor = self.neck(self.stages(self.patch_embed(images)))
        return embeddings


def convert_mobile_sam(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename MobileSAM's checkpoint to `TinyViTEncoder`'s keys; its unused ImageNet head is dropped.

    MobileSAM ends a stage with the downsampling that timm begins the next one with.
    """
    return {_rename(key): value for key, value in state.items() if not key.startswith(_HEAD)}


def _rename(key: str) -> str:
    if not key.startswith("image_encoder."):
        return key
    for old, new in _RENAMED:
        key = key.replace(old, new)
    parts = ["conv" if part == "c" else part for part in key.split(".")]
    if parts[1] == "layers":
        parts[1] = "stages"
        if parts[3] == "downsample":
            parts[2] = str(int(parts[2]) + 1)
    return ".".join(parts)
