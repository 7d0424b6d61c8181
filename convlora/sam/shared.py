"""A frozen backbone on a device, held once for all segmenters that are made of it."""

import copy
from dataclasses import replace
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import nn

from convlora.sam import checkpoints
from convlora.sam.zoo import Backbone, Sam, load_backbone


class SharedSam:
    """A backbone with its pretrained weights, which nothing writes to.

    Attributes:
        backbone: its recipe, less where the weights come from and what only concerns training.
        sha256: of the weights, as `load_backbone` tells it.
        device: on which it lies.
        source: file that the weights were read from; None of random ones.
    """

    def __init__(self, backbone: Backbone, device: torch.device):
        self.source = backbone.weights_path
        self.backbone = architecture(backbone)
        sam, self.sha256 = load_backbone(backbone)
        self.device = device
        self._sam = sam.requires_grad_(False)
        # not the prompt encoder, whose positions a GPU would round otherwise than the training did
        for part in (sam.image_encoder, sam.mask_decoder):
            part.to(device)

    @property
    def identity(self) -> dict[str, str]:
        """Name and SHA-256 of the weights."""
        return {"base": self.backbone.name, "base_sha256": self.sha256}

    def take(self) -> Sam:
        """Return a backbone of its own modules and parameters, whose tensors lie where this one's do."""
        shared: dict[int, object] = {
            id(p): nn.Parameter(p.detach(), requires_grad=False) for p in self._sam.parameters()
        }
        shared |= {id(buffer): buffer for buffer in self._sam.buffers()}
        return copy.deepcopy(self._sam, shared)


_held: WeakValueDictionary[tuple[str, str, str], SharedSam] = WeakValueDictionary()


def share_backbone(
    backbone: Backbone, sha256: str, device: torch.device, is_given: bool = False
) -> SharedSam:
    """Return a backbone that is in use on the device already, or else read its file.

    It is held as long as anyone has it.

    Args:
        backbone: the recipe.
        sha256: of the weights that are wanted; another file's are not looked for, but returned for what they
            are.
        device: to lie on.
        is_given: whether a user named the file, which then must be that of the backbone in use.

    Raises:
        Exception: what `load_backbone` raises.
    """
    path = backbone.weights_path
    held = _held.get((repr(architecture(backbone)), sha256, str(device)))
    if held is not None and (not is_given or path == held.source or _has_hash(path, sha256)):
        return held
    made = SharedSam(backbone, device)
    _held[repr(made.backbone), made.sha256, str(device)] = made
    return made


def architecture(backbone: Backbone) -> Backbone:
    """Return the recipe less where the weights come from and what only concerns training."""
    return replace(backbone, weights=None, url=None, activation_checkpointing=False)


def _has_hash(path: Path | None, sha256: str) -> bool:
    return path is not None and path.is_file() and checkpoints.hash_file(path) == sha256
