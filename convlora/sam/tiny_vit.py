"""TinyViT as MobileSAM's image encoder (Wu et al., ECCV 2022, arXiv:2207.10666; Zhang et al., 2023).

The architecture is timm's. Four things differ: the last stage keeps stride 16, SAM's neck follows it, each
window attention holds its bias as one table made once, and each convolution holds the batch norm after it,
which frozen statistics make a scale and an offset.
"""

import torch
import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from timm.models.tiny_vit import Attention, ConvNorm, TinyVit
from torch import Tensor, nn

_HEAD = ("image_encoder.norm_head.", "image_encoder.head.")
_HEAD_SHAPES = {
    "image_encoder.norm_head.weight": (320,),
    "image_encoder.norm_head.bias": (320,),
    "image_encoder.head.weight": (1000, 320),
    "image_encoder.head.bias": (1000,),
}
_NORMED = ("image_encoder.patch_embed.", "image_encoder.layers.")  # where each convolution has a batch norm
_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_NORM_EPS = 1e-5
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
        bias = (self.attention_biases[:, self.attention_bias_idxs] if learnt else self.bias).to(q.dtype)
        if x.device.type == "cpu":  # where masks keep the fused kernel from the backward pass
            x = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + bias).softmax(dim=-1) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        out: Tensor = self.proj(x.transpose(1, 2).reshape(n, l, c))
        return out


def _prepare_again(module: WindowAttention, _: object) -> None:
    module.prepare()


class TinyViTEncoder(nn.Module):
    """TinyViT-5M with SAM's neck: images [n, 3, s, s] to embeddings [n, 256, s / 16, s / 16]."""

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
        for name, module in list(vit.named_modules()):
            if isinstance(module, ConvNorm):
                vit.set_submodule(name, module.fuse())
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
        images = images.contiguous(memory_format=torch.channels_last)  # depthwise convolutions run faster so
        embeddings: Tensor = self.neck(self.stages(self.patch_embed(images)))
        return embeddings


def convert_mobile_sam(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring MobileSAM's checkpoint to `TinyViTEncoder`'s keys; its unused ImageNet head is dropped.

    MobileSAM ends a stage with the downsampling that timm begins the next one with.
    """
    renamed = {_rename(key): value for key, value in state.items() if not key.startswith(_HEAD)}
    return fold_norms(renamed)


def revert_mobile_sam(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring `TinyViTEncoder`'s tensors to MobileSAM's keys, of which `convert_mobile_sam` makes them again.

    Its batch norms do nothing but add the offsets, its unused ImageNet head is zeros.
    """
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        name = _rename_back(key)
        if not name.startswith(_NORMED):
            found[name] = value
        elif value.ndim == 4:
            found[f"{name.removesuffix('.weight')}.c.weight"] = value
        elif state.get(f"{key.removesuffix('.bias')}.weight", value).ndim == 4:
            norm = f"{name.removesuffix('.bias')}.bn"
            ones = torch.ones_like(value)
            parts = (ones, value, torch.zeros_like(value), ones - _NORM_EPS, torch.tensor(0))
            found |= {f"{norm}.{part}": each for part, each in zip(_NORM, parts, strict=True)}
        else:
            found[name] = value
    return found | {name: torch.zeros(shape) for name, shape in _HEAD_SHAPES.items()}


def _rename_back(key: str) -> str:
    for old, new in _RENAMED:
        key = key.replace(new, old)
    parts = key.split(".")
    if parts[:2] == ["image_encoder", "stages"]:
        parts[1] = "layers"
        if parts[3] == "downsample":
            parts[2] = str(int(parts[2]) - 1)
    return ".".join(parts)


def fold_norms(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fold each batch norm `X.bn` into the convolution `X.conv` before it, which becomes `X`."""
    state = dict(state)
    for key in [key for key in state if key.endswith(".bn.running_var")]:
        name = key.removesuffix(".bn.running_var")
        parts = [f"{name}.{part}" for part in ("conv.weight", *(f"bn.{part}" for part in _NORM))]
        if all(part in state for part in parts):
            filters, weight, bias, mean, variance, _ = (state.pop(part) for part in parts)
            scale = weight / (variance + _NORM_EPS) ** 0.5
            state[f"{name}.weight"] = filters * scale[:, None, None, None]
            state[f"{name}.bias"] = bias - mean * scale
    return state


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
