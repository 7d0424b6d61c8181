"""Heads: how SAM's mask decoder, mostly without prompts, comes to tell classes apart.

A head is a recipe. The decoder that it builds gives `outputs` for its loss and `logits(outputs)` for
everything else; a loss that needs more than logits is taken at the size of the network's input.
"""

from abc import ABC, abstractmethod
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder as SamMaskDecoder
from torch import Tensor, nn


class MaskDecoder(nn.Module, ABC):
    """What a head builds; trained in full."""

    @abstractmethod
    def outputs(
        self,
        embeddings: Tensor,
        position_encoding: Tensor,
        dense_prompt: Tensor,
        size: tuple[int, int],
        prompts: Tensor | None = None,
    ) -> Any:
        """Return, in float32, what the loss is a function of: logits, or tensors that amount to them.

        Args:
            embeddings: of the images [n, c, h, w].
            position_encoding: of the grid [1, c, h, w].
            dense_prompt: the embedding of "no mask" [1, c, h, w].
            size: of the network's input, which the masks in the outputs have too.
            prompts: tokens [n, p, c] of a box or of points in each image, where it is prompted.
        """

    @abstractmethod
    def logits(self, outputs: Any) -> Tensor:
        """Return the logits [n, num_classes, *size] that outputs amount to."""


class Head(Protocol):
    """A recipe that makes a prompt-free mask decoder of SAM's."""

    def build(self, decoder: SamMaskDecoder, num_classes: int) -> MaskDecoder:
        """Take the decoder's parts over; one class is a foreground, several exclude each other."""


@dataclass(frozen=True)
class PerClass:
    """A mask for each class."""

    def build(self, decoder: SamMaskDecoder, num_classes: int) -> "PerClassDecoder":
        return PerClassDecoder(decoder, num_classes)


class PerClassDecoder(MaskDecoder):
    """One mask token with its hypernetwork MLP per mask, no IoU head; the outputs are the logits.

    Every mask starts from SAM's token 0, the one for unambiguous prompts.

    Args:
        decoder: SAM's decoder; its parts are taken over.
        num_masks: masks to predict.
    """

    def __init__(self, decoder: SamMaskDecoder, num_masks: int):
        super().__init__()
        self.transformer = decoder.transformer
        self.iou_token = decoder.iou_token  # takes part in the attention between tokens
        self.mask_tokens = nn.Embedding(
            num_masks,
            decoder.transformer_dim,
            _weight=decoder.mask_tokens.weight.detach()[:1].repeat(num_masks, 1),
        )
        self.output_upscaling = decoder.output_upscaling
        mlp = decoder.output_hypernetworks_mlps[0]
        self.output_hypernetworks_mlps = nn.ModuleList(deepcopy(mlp) for _ in range(num_masks))

    def outputs(
        self,
        embeddings: Tensor,
        position_encoding: Tensor,
        dense_prompt: Tensor,
        size: tuple[int, int],
        prompts: Tensor | None = None,
    ) -> Tensor:
        """Return mask logits [n, num_masks, *size] in float32."""
        n, c, h, w = embeddings.shape
        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(n, -1, -1)
        if prompts is not None:
            tokens = torch.cat([tokens, prompts], dim=1)
        tokens, features = self.transformer(
            embeddings + dense_prompt, position_encoding.expand(n, -1, -1, -1), tokens
        )
        features = self.output_upscaling(features.transpose(1, 2).reshape(n, c, h, w))
        kernels = [mlp(tokens[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)]
        logits = torch.einsum("nkc,nchw->nkhw", torch.stack(kernels, dim=1), features)
        return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)

    def logits(self, outputs: Tensor) -> Tensor:
        return outputs


@dataclass(frozen=True)
class SamsOwn:
    """SAM's decoder as it is, all of its mask tokens included: they attend to one another."""

    def build(self, decoder: SamMaskDecoder, num_classes: int) -> "SamsOwnDecoder":
        if num_classes > 1:
            raise ValueError(
                f"SAM as it is tells a foreground from the rest and not {num_classes} classes apart; train a "
                "segmenter, checkpoint=RUN"
            )
        return SamsOwnDecoder(decoder)


class SamsOwnDecoder(PerClassDecoder):
    """Gives the mask of SAM's token 0, the one for unambiguous prompts; there to be scored, not trained.

    Args:
        decoder: SAM's decoder; its parts are taken over.
    """

    def __init__(self, decoder: SamMaskDecoder):
        super().__init__(decoder, num_masks=1)
        self.mask_tokens = decoder.mask_tokens
        self.output_hypernetworks_mlps = decoder.output_hypernetworks_mlps

    def outputs(
        self,
        embeddings: Tensor,
        position_encoding: Tensor,
        dense_prompt: Tensor,
        size: tuple[int, int],
        prompts: Tensor | None = None,
    ) -> Tensor:
        return super().outputs(embeddings, position_encoding, dense_prompt, size, prompts)[:, :1]
