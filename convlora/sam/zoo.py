"""Builders of Segment Anything backbones and the loading of their public checkpoints, strictly by key.

A backbone is a frozen dataclass that extends `Backbone`: `build()` makes the architecture with random
weights, `convert()` renames and resamples a public checkpoint to it. `load_backbone` does both and returns
the hash by which an adapter recognises the weights it was trained on.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling.common import MLPBlock
from segment_anything.modeling.image_encoder import PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from convlora.sam import checkpoints
from convlora.sam.attention import RelPosAttention, resample_offsets
from convlora.sam.tiny_vit import TinyViTEncoder, convert_mobile_sam, revert_mobile_sam

FROZEN_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Sam(nn.Module):
    """The three parts of a Segment Anything Model under the names that public checkpoints use.

    Args:
        image_encoder: its transformer blocks are `.blocks`.
        prompt_encoder: of segment-anything.
        mask_decoder: of segment-anything.
        activation_checkpointing: whether the blocks are to be checkpointed once they are adapted.
    """

    def __init__(
        self,
        image_encoder: nn.Module,
        prompt_encoder: PromptEncoder,
        mask_decoder: MaskDecoder,
        activation_checkpointing: bool,
    ):
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder


@dataclass(frozen=True, kw_only=True)
class Backbone(ABC):
    """A SAM variant at one input size.

    Args:
        name: what adapters and messages call it.
        image_size: side of the square input in pixels, a multiple of `patch_size`.
        weights: checkpoint file; None takes the one at `url`, or random weights where that is None too.
        url: official checkpoint; None where there is none.
        frozen_dtype: of the frozen image encoder's matrices, float32 or bfloat16; the latter halves their
            memory and needs autocast to bfloat16, which rounds them so anyway.
        activation_checkpointing: keep only the input of each block of the image encoder for the backward
            pass, and run the block again there; less memory, more time.
        decoder_eps: of the layer norms in the blocks of the mask decoder's transformer: segment-anything has
            1e-5, Hugging Face's SamModel 1e-6; in all other norms the two agree.

    Raises:
        ValueError: one of them is impossible.
    """

    name: str
    image_size: int = 1024
    weights: str | None = None
    url: str | None = None
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    activation_checkpointing: bool = False
    decoder_eps: float = 1e-5

    # Of the architecture; no fields, unless a variant makes them its own.
    patch_size = 16  # side of a patch in pixels
    window_size = 14  # side in tokens of the widest window, which the others' divide; 0 where there is none
    decoder_dim = 256  # channels of the neck, the prompt encoder and the mask decoder
    decoder_mlp_dim = 2048  # hidden channels of the decoder's transformer

    def __post_init__(self) -> None:
        size, patch = self.image_size, self.patch_size
        if size <= 0 or size % patch:
            raise ValueError(
                f"{self.name}: model.image_size={size} is not a positive multiple of the patch size {patch}; "
                f"try model.image_size={max(1, round(size / patch)) * patch}"
            )
        if not 0 < self.decoder_eps < 1:
            raise ValueError(
                f"{self.name}: model.decoder_eps={self.decoder_eps} must lie between 0 and 1; it is 1e-5, or "
                "1e-6 for a mask decoder that Hugging Face's SamModel trained"
            )

    @abstractmethod
    def build_encoder(self) -> nn.Module:
        """Return the image encoder with random weights; its transformer blocks are `.blocks`."""

    @abstractmethod
    def convert(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a public checkpoint under the keys and shapes of `build()` at this image size."""

    def revert(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of `build()` under a public checkpoint's keys, in the shapes of this image size."""
        return state

    def build(self) -> Sam:
        """Return the architecture with random weights; also works under `torch.device("meta")`."""
        encoder = self.build_encoder()
        grid = self.image_size // self.patch_size
        prompt_encoder = PromptEncoder(
            embed_dim=self.decoder_dim,
            image_embedding_size=(grid, grid),
            input_image_size=(self.image_size, self.image_size),
            mask_in_chans=16,
        )
        transformer = TwoWayTransformer(
            depth=2, embedding_dim=self.decoder_dim, mlp_dim=self.decoder_mlp_dim, num_heads=8
        )
        for layer in transformer.layers:
            for norm in (layer.norm1, layer.norm2, layer.norm3, layer.norm4):
                norm.eps = self.decoder_eps
        mask_decoder = MaskDecoder(transformer_dim=self.decoder_dim, transformer=transformer)
        return Sam(encoder, prompt_encoder, mask_decoder, self.activation_checkpointing).eval()

    @property
    def weights_path(self) -> Path | None:
        """Checkpoint file, which need not be there yet; None of random weights."""
        if self.weights is not None:
            return Path(self.weights).expanduser()
        return None if self.url is None else checkpoints.cached(self.url)

    @property
    def is_random(self) -> bool:
        """Whether there are no weights to load."""
        return self.weights_path is None

    def weights_source(self) -> str:
        """Say where the weights come from, and whether they are there."""
        path = self.weights_path
        if path is None:
            return "random weights"
        absent = "no such file" if self.weights is not None else f"to be downloaded from {self.url}"
        return f"weights {path}" if path.is_file() else f"weights {path} ({absent})"

    def check_weights(self) -> None:
        """Refuse a file of weights that is not there; raises FileNotFoundError."""
        if self.weights is not None and self.weights_path is not None and not self.weights_path.is_file():
            raise FileNotFoundError(
                f"{self.name}: no weights file at {self.weights_path}; set model.weights=PATH"
            )

    def padding_advice(self) -> str | None:
        """Say by how much tokens are padded to fill their windows, if they are, and which sizes need none."""
        size, tokens, window = self.image_size, self.image_size // self.patch_size, self.window_size
        if not window or tokens % window == 0:
            return None
        fewer, step = tokens // window, self.patch_size * window
        padded = (fewer + 1) * window
        sizes = [str(step * times) for times in range(fewer, fewer + 3) if times]
        return (
            f"{size} px: {tokens} x {tokens} tokens are padded to {padded} x {padded} in windows of "
            f"{window}, {(padded / tokens) ** 2 - 1:.0%} more work there; {', '.join(sizes)} fit"
        )


@dataclass(frozen=True, kw_only=True)
class SamViT(Backbone):
    """SAM with a plain ViT: windowed blocks, and global blocks at `global_attn_indexes`.

    Args:
        embed_dim: channels of the encoder.
        depth: number of blocks.
        num_heads: attention heads.
        global_attn_indexes: blocks with attention over the whole grid.
        patch_size: side of a patch in pixels.
        window_size: side of a window in tokens, 0 makes all blocks global.
        decoder_dim: channels of the neck, the prompt encoder and the mask decoder.
        decoder_mlp_dim: hidden channels of the decoder's transformer.
    """

    embed_dim: int
    depth: int
    num_heads: int
    global_attn_indexes: Sequence[int]
    patch_size: int = 16
    window_size: int = 14
    decoder_dim: int = 256
    decoder_mlp_dim: int = 2048

    def build_encoder(self) -> nn.Module:
        """Return segment-anything's encoder with attention that keeps no matrix of all pairs of tokens."""
        encoder = ImageEncoderViT(
            img_size=self.image_size,
            patch_size=self.patch_size,
            embed_dim=self.embed_dim,
            depth=self.depth,
            num_heads=self.num_heads,
            out_chans=self.decoder_dim,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=self.window_size,
            global_attn_indexes=tuple(self.global_attn_indexes),
        )
        for block in encoder.blocks:
            block.attn = RelPosAttention(block.attn)
        return encoder  # type: ignore[no-any-return]

    def padding_advice(self) -> str | None:
        return super().padding_advice() if set(range(self.depth)) - set(self.global_attn_indexes) else None

    def convert(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the checkpoint with its position tables resampled to this image size."""
        grid = self.image_size // self.patch_size
        state = dict(state)
        key = "image_encoder.pos_embed"
        if key in state and state[key].ndim == 4:
            state[key] = resample_grid(state[key], grid)
        for index in self.global_attn_indexes:
            for axis in ("h", "w"):
                key = f"image_encoder.blocks.{index}.attn.rel_pos_{axis}"
                if key in state and state[key].ndim == 2:
                    state[key] = resample_offsets(state[key], 2 * grid - 1)
        return state


@dataclass(frozen=True, kw_only=True)
class MobileSam(Backbone):
    """MobileSAM: TinyViT-5M distilled from SAM's ViT-H, with SAM's own prompt encoder and mask decoder.

    Zhang et al., "Faster Segment Anything", 2023, arXiv:2306.14289.
    """

    def build_encoder(self) -> nn.Module:
        return TinyViTEncoder()

    def convert(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the checkpoint under this encoder's names; it has no tables that depend on the size."""
        return convert_mobile_sam(state)

    def revert(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return revert_mobile_sam(state)


def load_backbone(backbone: Backbone) -> tuple[Sam, str]:
    """Build a backbone and fill it with its weights.

    Returns:
        The model and the SHA-256 (hex) of the weights: of the checkpoint file, or of the tensors where the
        weights are random. Random weights are the same in every process.

    Raises:
        FileNotFoundError: no file at `backbone.weights`.
        OSError: the download failed.
        ValueError: the file is truncated, holds code, or does not fit the backbone.
    """
    path = backbone.weights_path
    if path is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            sam = backbone.build()
        _favour_texture(sam.image_encoder)
        sha256 = checkpoints.hash_tensors(sam.state_dict())
    else:
        if backbone.weights is None and backbone.url is not None:
            checkpoints.fetch(backbone.name, backbone.url)
        backbone.check_weights()
        state = backbone.convert(checkpoints.read(backbone.name, path))
        sam = backbone.build()
        checkpoints.check_fit(backbone.name, path, state, sam.state_dict())
        sam.load_state_dict(state)
        sha256 = checkpoints.hash_file(path)
    hold_frozen(sam.image_encoder, backbone.frozen_dtype)
    return sam, sha256


def checkpoint_blocks(blocks: Iterable[nn.Module]) -> None:
    """Make each block keep its input only for the backward pass and run again there, noise included."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def hold_frozen(encoder: nn.Module, dtype: str) -> None:
    """Convert the matrices and filters of an encoder, its bulk; norms, biases' tables and positions stay."""
    for module in encoder.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(FROZEN_DTYPES[dtype])


def resample_grid(table: Tensor, grid: int) -> Tensor:
    """Resample absolute position embeddings [1, h, w, c] to [1, grid, grid, c], bicubic."""
    if table.shape[1:3] == (grid, grid):
        return table
    maps = F.interpolate(table.permute(0, 3, 1, 2), size=(grid, grid), mode="bicubic", align_corners=False)
    return maps.permute(0, 2, 3, 1)


@torch.no_grad()
def _favour_texture(encoder: nn.Module) -> None:
    """Make random features worth adapting: they answer to texture, where PyTorch's answer to brightness.

    Patch filters lose their mean, and all weights around a GELU grow until it rectifies: frozen features then
    measure the energy of random bands.
    """
    for module in encoder.modules():
        if isinstance(module, PatchEmbed):
            filters = module.proj.weight
            filters.sub_(filters.mean(dim=(2, 3), keepdim=True)).mul_(3)
        elif isinstance(module, MLPBlock):
            module.lin1.weight.mul_(3)
            module.lin2.weight.mul_(3)
