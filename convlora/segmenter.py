"""The segmenter: what is trained, predicted with and exported. It needs no prompts, but may be given some."""

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlora import IGNORED
from convlora.cleaning import HALF
from convlora.heads import Head, PerClass
from convlora.losses import takes_outputs
from convlora.peft.method import Method
from convlora.sam.checkpoints import mismatches
from convlora.sam.zoo import Sam, checkpoint_blocks

NOTHING = -20.0  # logit where no object is asked for; its probability is 0 in 8 bits


class Segmenter(nn.Module):
    """A frozen SAM with an adapted image encoder and a trained mask decoder, which works without prompts.

    Args:
        sam: the backbone; taken over, not copied.
        method: how the frozen image encoder is adapted.
        head: how the mask decoder tells classes apart.
        num_classes: classes that exclude each other; 1 is a foreground.
    """

    dense_prompt: Tensor
    position_encoding: Tensor

    def __init__(self, sam: Sam, method: Method, head: Head = PerClass(), num_classes: int = 1):  # noqa: B008
        super().__init__()
        sam.requires_grad_(False)
        self._frozen = [*sam.image_encoder.modules(), *sam.prompt_encoder.modules()]
        self.image_encoder = method.inject(sam.image_encoder)
        if sam.activation_checkpointing:
            blocks: Any = self.image_encoder.blocks
            checkpoint_blocks(blocks)
        self.prompt_encoder = sam.prompt_encoder
        self.mask_decoder = head.build(sam.mask_decoder, num_classes).requires_grad_(True)
        _, dense_prompt = self.prompt_encoder(points=None, boxes=None, masks=None)
        self.register_buffer("dense_prompt", dense_prompt.contiguous(), persistent=False)
        self.register_buffer("position_encoding", self.prompt_encoder.get_dense_pe(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of normalised images [n, 3, s, s]."""
        return self.logits(self.outputs(images))

    def outputs(self, images: Tensor, boxes: Tensor | None = None) -> Any:
        """Return what the head gives; see `MaskDecoder.outputs`.

        Args:
            images: normalised [n, 3, s, s].
            boxes: of the object that is meant in each image [n, 4], px of the input; None means all.
        """
        prompts = None if boxes is None else self.embed(boxes[:, None])
        return self._decode(self.image_encoder(images), (images.shape[2], images.shape[3]), prompts)

    def prompted(self, images: Tensor, prompts: Sequence[Sequence[Tensor]]) -> list[Iterator[Tensor]]:
        """Return the logits of each object that prompts tell; the image encoder sees each image once.

        Args:
            images: normalised [n, 3, s, s].
            prompts: of each image, tokens [1, p, c] of each object, as `embed` gives them.

        Returns:
            Of each image, the logits of its objects [1, s, s], in float32. Each is decoded when it is asked
            for, so that memory does not grow with their number.
        """
        size = images.shape[2], images.shape[3]
        return [
            self._objects(embedding[None], size, objects)
            for embedding, objects in zip(self.image_encoder(images), prompts, strict=True)
        ]

    def united(self, images: Tensor, prompts: Sequence[Sequence[Tensor]]) -> Tensor:
        """Return the logits [n, 1, s, s] of all objects of each image together; arguments as of `prompted`.

        They are the greatest of those of the objects, of none `NOTHING`.
        """
        nothing = images.new_full((1, *images.shape[2:]), NOTHING, dtype=torch.float32)
        objects = self.prompted(images, prompts)
        return torch.stack([reduce(torch.maximum, each, next(each, nothing)) for each in objects])

    def embed(
        self,
        boxes: Tensor | None = None,
        points: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Return the tokens [n, p, c] of prompts.

        Args:
            boxes: [n, 1, 4], px of the input; None where there are points alone.
            points: [n, p, 2], px of the input; None where there is a box alone.
            labels: of the points [n, p], 1 in the object and 0 beside it.
        """
        pairs = None if points is None or labels is None else (points, labels)
        with torch.autocast(self.dense_prompt.device.type, enabled=False):  # which would blur positions
            tokens: Tensor = self.prompt_encoder(points=pairs, boxes=boxes, masks=None)[0]
        return tokens

    def _objects(
        self, embedding: Tensor, size: tuple[int, int], prompts: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        for tokens in prompts:
            yield self.logits(self._decode(embedding, size, tokens))[0]

    def _decode(self, embeddings: Tensor, size: tuple[int, int], prompts: Tensor | None) -> Any:
        position, dense = self.position_encoding, self.dense_prompt
        return self.mask_decoder.outputs(embeddings, position, dense, size, prompts)

    def logits(self, outputs: Any) -> Tensor:
        """Return the logits [n, num_classes, s, s], in float32, that outputs amount to."""
        return self.mask_decoder.logits(outputs).float()

    def for_loss(self, loss: nn.Module, outputs: Any) -> Any:
        """Return what a loss is a function of: the outputs or the logits that they amount to."""
        return outputs if takes_outputs(loss) else self.logits(outputs)

    def train(self, mode: bool = True) -> "Segmenter":
        """Switch what is trained; the frozen modules stay in evaluation mode (statistics, dropout)."""
        super().train(mode)
        for module in self._frozen:
            module.training = False
        return self

    def compile_encoder(self, backend: str = "inductor") -> None:
        """Compile the image encoder as one graph when it first runs; its names and weights stay."""
        torch._dynamo.reset()  # the sizes of an earlier job would make this one's dynamic
        # A gate records its loss in the forward pass; running a block again need not record it once more.
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
        self.image_encoder.compile(fullgraph=True, backend=backend)

    def trainable_state(self) -> dict[str, Tensor]:
        """Return the trained tensors by name; they are all that an adapter file holds."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what `trainable_state` gave, strictly; raises what `check_trainable_state` does."""
        self.check_trainable_state(state)
        self.load_state_dict(dict(state), strict=False)

    def take_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put tensors in the place of the trained ones, which are not written to: others may hold them too.

        Raises what `check_trainable_state` does.
        """
        self.check_trainable_state(state)
        for name, trained in self.trainable_state().items():
            owner, _, key = name.rpartition(".")
            value = state[name].to(trained.device, trained.dtype)
            # by its owner alone, so that the tables that attention makes of frozen weights stay shared
            self.get_submodule(owner).load_state_dict({key: value}, strict=False, assign=True)

    def check_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Compare trained tensors with this segmenter's.

        Raises:
            ValueError: names or shapes differ: another backbone, method, rank or number of classes.
        """
        if problems := mismatches(state, self.trainable_state()):
            raise ValueError(
                f"the checkpoint's trained tensors do not fit: {problems}; it was made with another "
                "backbone, method, rank or number of classes: use the settings it was trained with"
            )


def restore_size(logits: Tensor, content: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Bring logits back to an image's own size.

    Args:
        logits: of one network input [c, s, s].
        content: height and width that the image fills at the input's top left.
        size: height and width of the image.

    Returns:
        Logits [c, height, width], bilinear.
    """
    filled = logits[None, :, : content[0], : content[1]]
    return F.interpolate(filled, size=size, mode="bilinear", align_corners=False)[0]


def fit_mask(mask: Tensor, content: tuple[int, int], size: int) -> Tensor:
    """Bring a mask [h, w] of an image's own size to the network's input [size, size], as training does.

    Args:
        mask: class ids, uint8.
        content: height and width that the image fills at the input's top left; what is beside it is ignored.
        size: side of the input.
    """
    filled = F.interpolate(mask[None, None], size=content, mode="nearest-exact")[0, 0]
    return F.pad(filled, (0, size - content[1], 0, size - content[0]), value=IGNORED)


class Prediction(NamedTuple):
    """What is found in an image, in the form in which it is scored and written.

    Attributes:
        classes: ids [h, w] uint8, of a binary task 0 and 1.
        prob: 8-bit probability [h, w] uint8, of the foreground or, of several classes, of the one found.
    """

    classes: Tensor
    prob: Tensor


def to_prediction(logits: Tensor) -> Prediction:
    """Return what logits [c, h, w] say: by the sigmoid of one, by the softmax over several."""
    logits = logits.float()
    if len(logits) == 1:
        prob = _to_8_bits(torch.sigmoid(logits[0]))
        return Prediction((prob >= HALF).to(torch.uint8), prob)
    best, classes = torch.softmax(logits, dim=0).max(dim=0)
    return Prediction(classes.to(torch.uint8), _to_8_bits(best))


def _to_8_bits(probs: Tensor) -> Tensor:
    return (probs * 255).round().to(torch.uint8)
