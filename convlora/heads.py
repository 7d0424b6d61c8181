"""Heads: how SAM's mask decoder, mostly without prompts, comes to tell classes apart.

A head is a recipe. The decoder that it builds gives `outputs`, and `logits(outputs)` for all but the losses
that are functions of the outputs; those are taken at the size of the network's input.
"""

import math
from abc import ABC, abstractmethod
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder as SamMaskDecoder
from torch import Tensor, nn

from convlora.set_loss import Queries

FLOOR = 1e-6  # of what queries say of a class; 255 of them are less than half a step of 8 bits


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
        """Return, in float32, logits or tensors that amount to them, of which a loss may be a function.

        Args:
            embeddings: of the images [n, c, h, w].
            position_encoding: of the grid [1, c, h, w].
            dense_prompt: the embedding of "no mask" [1, c, h, w].
            size: of the network's input.
            prompts: tokens [n, p, c] of a box or of points in each image, where it is prompted.
        """

    @abstractmethod
    def logits(self, outputs: Any) -> Tensor:
        """Return the logits [n, num_classes, *size] that outputs amount to."""


class Head(Protocol):
    """A recipe that makes a mask decoder of SAM's which needs no prompts, but may be given some."""

    def build(self, decoder: SamMaskDecoder, num_classes: int) -> MaskDecoder:
        """Take the decoder's parts over; one class is a foreground, several exclude each other."""


@dataclass(frozen=True)
class PerClass:
    """A mask for each class, which all start from SAM's token 0, the one for unambiguous prompts."""

    def build(self, decoder: SamMaskDecoder, num_classes: int) -> "PerClassDecoder":
        tokens = first_token(decoder).repeat(num_classes, 1)
        return PerClassDecoder(decoder, embedding(tokens), first_mlps(decoder, num_classes))


@dataclass(frozen=True)
class Query:
    """Masks that each learn of which class they are, for several classes; as released with Conv-LoRA.

    Args:
        num_queries: masks, at least as many as classes.
        spread: of the tokens that the masks start from around SAM's token 0, a standard deviation in units of
            that token's; 0, as released, starts all alike, so that they part only slowly.

    Raises:
        ValueError: a number is impossible, or when it builds there is one class, or there are more classes
            than masks.
    """

    num_queries: int = 16
    spread: float = 2.0

    def __post_init__(self) -> None:
        if self.num_queries < 1 or not 0 <= self.spread < math.inf:
            raise ValueError(
                f"head.num_queries={self.num_queries} must be at least 1 and head.spread={self.spread} at "
                "least 0"
            )

    def build(self, decoder: SamMaskDecoder, num_classes: int) -> "QueryDecoder":
        if num_classes == 1:
            raise ValueError("head=query tells several classes apart, here is one; set head=per_class")
        if self.num_queries < num_classes:
            raise ValueError(
                f"head.num_queries={self.num_queries} is less than the {num_classes} classes, each of which "
                f"needs a mask of its own; set head.num_queries={num_classes} or more"
            )
        return QueryDecoder(decoder, self.num_queries, num_classes, self.spread)


class TokenDecoder(MaskDecoder):
    """SAM's decoder with mask tokens and hypernetwork MLPs of another number, without its IoU head.

    Args:
        decoder: SAM's decoder; its other parts are taken over.
        tokens: the mask tokens.
        mlps: the hypernetwork MLPs.
    """

    def __init__(self, decoder: SamMaskDecoder, tokens: nn.Embedding, mlps: nn.ModuleList):
        super().__init__()
        self.transformer = decoder.transformer
        self.iou_token = decoder.iou_token  # takes part in the attention between tokens
        self.mask_tokens = tokens
        self.output_upscaling = decoder.output_upscaling
        self.output_hypernetworks_mlps = mlps

    def attend(
        self, embeddings: Tensor, position_encoding: Tensor, dense_prompt: Tensor, prompts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return what mask tokens [n, tokens, c] and image [n, c / 8, 4 h, 4 w] become; see `outputs`."""
        n, c, h, w = embeddings.shape
        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(n, -1, -1)
        if prompts is not None:
            tokens = torch.cat([tokens, prompts], dim=1)
        tokens, features = self.transformer(
            embeddings + dense_prompt, position_encoding.expand(n, -1, -1, -1), tokens
        )
        tokens = tokens[:, 1 : 1 + len(self.mask_tokens.weight)]
        return tokens, self.output_upscaling(features.transpose(1, 2).reshape(n, c, h, w))


class PerClassDecoder(TokenDecoder):
    """One mask token with its hypernetwork MLP per mask; the outputs are the logits."""

    def outputs(
        self,
        embeddings: Tensor,
        position_encoding: Tensor,
        dense_prompt: Tensor,
        size: tuple[int, int],
        prompts: Tensor | None = None,
    ) -> Tensor:
        """Return mask logits [n, num_masks, *size] in float32."""
        tokens, features = self.attend(embeddings, position_encoding, dense_prompt, prompts)
        kernels = [mlp(tokens[:, i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)]
        logits = torch.einsum("nkc,nchw->nkhw", torch.stack(kernels, dim=1), features)
        return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)

    def logits(self, outputs: Tensor) -> Tensor:
        return outputs


class QueryDecoder(TokenDecoder):
    """Mask tokens that share a hypernetwork MLP, and a linear layer that tells the class of each, or none.

    Args:
        decoder: SAM's decoder; its other parts are taken over.
        num_queries: masks to predict.
        num_classes: of which each mask is one, or none.
        spread: of the tokens around SAM's token 0, in units of its standard deviation.
    """

    def __init__(self, decoder: SamMaskDecoder, num_queries: int, num_classes: int, spread: float):
        tokens = first_token(decoder).repeat(num_queries, 1)
        tokens = tokens + spread * tokens.std() * torch.randn_like(tokens)
        super().__init__(decoder, embedding(tokens), first_mlps(decoder, 1))
        self.output_classifier = nn.Linear(tokens.shape[1], num_classes + 1)

    def outputs(
        self,
        embeddings: Tensor,
        position_encoding: Tensor,
        dense_prompt: Tensor,
        size: tuple[int, int],
        prompts: Tensor | None = None,
    ) -> Queries:
        """Return logits of classes and of masks, the latter four times as fine as the embeddings."""
        tokens, features = self.attend(embeddings, position_encoding, dense_prompt, prompts)
        masks = torch.einsum("nqc,nchw->nqhw", self.output_hypernetworks_mlps[0](tokens), features)
        return Queries(self.output_classifier(tokens).float(), masks.float(), size)

    def logits(self, outputs: Queries) -> Tensor:
        """Return the logarithm of what the queries together say of each class in each pixel.

        That sum over queries of softmax(class) x sigmoid(mask), from 0 to their number, is what is compared
        in the paper's prediction; the logarithm keeps the order. The softmax of these logits is each class's
        share of the sum over classes, a probability. `FLOOR` is added to the sum: where no query sees
        anything all classes are alike, and logits stay within a range in which a pixel, or a window of
        several, that is sure of nothing does not outweigh its neighbours when logits are interpolated and
        blended. An 8-bit probability does not show it.
        """
        masks = F.interpolate(outputs.masks, size=outputs.size, mode="bilinear", align_corners=False)
        with torch.autocast(masks.device.type, enabled=False):
            classes = outputs.classes.softmax(dim=-1)[..., :-1]
            # the sigmoid; ONNX Runtime's own is up to 2e-7 off, which the logarithm near FLOOR makes 0.1
            present = torch.exp(-F.softplus(-masks))
            said = torch.einsum("nqc,nqhw->nchw", classes, present)
        return torch.log(said + FLOOR)


def first_token(decoder: SamMaskDecoder) -> Tensor:
    """Return SAM's mask token for unambiguous prompts [1, c]."""
    tokens: Tensor = decoder.mask_tokens.weight.detach()[:1]
    return tokens


def first_mlps(decoder: SamMaskDecoder, count: int) -> nn.ModuleList:
    """Return copies of the hypernetwork MLP of that token."""
    return nn.ModuleList(deepcopy(decoder.output_hypernetworks_mlps[0]) for _ in range(count))


def embedding(tokens: Tensor) -> nn.Embedding:
    """Return tokens [t, c] to be learnt."""
    return nn.Embedding(len(tokens), tokens.shape[1], _weight=tokens)


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
        decoder: SAM's decoder; all its parts but the IoU head are taken over.
    """

    def __init__(self, decoder: SamMaskDecoder):
        super().__init__(decoder, decoder.mask_tokens, decoder.output_hypernetworks_mlps)

    def outputs(
        self,
        embeddings: Tensor,
        position_encoding: Tensor,
        dense_prompt: Tensor,
        size: tuple[int, int],
        prompts: Tensor | None = None,
    ) -> Tensor:
        return super().outputs(embeddings, position_encoding, dense_prompt, size, prompts)[:, :1]
