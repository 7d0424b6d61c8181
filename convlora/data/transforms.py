"""From an image of any size to the network's square input."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import albumentations as A
import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from convlora import IGNORED

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Resize(Protocol):
    """How an image of any size becomes a normalised square."""

    @property
    def image_size(self) -> int:
        """Side of the square, px."""

    def steps(self) -> list[A.BasicTransform]:
        """Return the transforms for uint8 [h, w, 3] -> float32 [image_size, image_size, 3].

        The first alone changes the scale, and leaves what has it already as it is.
        """

    def content(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of the area, at the top left of the square, that the image fills."""


@dataclass(frozen=True)
class SquareResize:
    """Stretches both sides to the square, as the paper does; the aspect ratio is lost."""

    image_size: int

    def steps(self) -> list[A.BasicTransform]:
        return [_Scale(self.content), A.Normalize(IMAGENET_MEAN, IMAGENET_STD)]

    def content(self, height: int, width: int) -> tuple[int, int]:
        return self.image_size, self.image_size


@dataclass(frozen=True)
class LongestSideResize:
    """Scales the longest side to the square's and pads right and below, as SAM does; padding is ignored."""

    image_size: int

    def steps(self) -> list[A.BasicTransform]:
        # SAM pads after normalising, so that the padding is the mean colour and not black
        pad = A.PadIfNeeded(
            self.image_size,
            self.image_size,
            position="top_left",
            border_mode=cv2.BORDER_CONSTANT,
            fill=0,
            fill_mask=IGNORED,
        )
        return [_Scale(self.content), A.Normalize(IMAGENET_MEAN, IMAGENET_STD), pad]

    def content(self, height: int, width: int) -> tuple[int, int]:
        scale = self.image_size / max(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))


@dataclass(frozen=True)
class NativeSize:
    """Leaves an image as it is, 8-bit RGB, for what cuts it into windows of the network's size itself."""

    image_size: int = 0  # there is no square

    def steps(self) -> list[A.BasicTransform]:
        return []

    def content(self, height: int, width: int) -> tuple[int, int]:
        return height, width


def eval_transform(resize: Resize) -> A.Compose:
    """Return the transform for evaluation and prediction: resize, normalise and pad."""
    return A.Compose(resize.steps())


class _Scale(A.DualTransform):  # type: ignore[misc]
    """Scales images [h, w, 3] as Pillow's bicubic does, within rounding, and masks by the nearest pixels.

    PyTorch's antialiased bicubic is that of Pillow before 13 (which takes the height first where that is less
    work): the same kernel, and the same two rounded passes. OpenCV's has another kernel and no antialias.

    Args:
        content: height and width before -> after.
    """

    def __init__(self, content: Callable[[int, int], tuple[int, int]]):
        super().__init__(p=1)
        self.content = content

    def apply(self, img: NDArray[np.uint8], **params: Any) -> NDArray[np.uint8]:
        size = self.content(*img.shape[:2])
        if size == img.shape[:2]:
            return img
        # copied, since PyTorch takes no negative strides;
        # with the batch axis first the strides are those of channels_last, which is the fast path
        images = torch.from_numpy(img.copy())[None].permute(0, 3, 1, 2)
        scaled = F.interpolate(images, size=size, mode="bicubic", antialias=True)
        return np.ascontiguousarray(scaled[0].permute(1, 2, 0).numpy())

    def apply_to_mask(self, mask: NDArray[np.uint8], **params: Any) -> NDArray[np.uint8]:
        height, width = self.content(*mask.shape[:2])
        # of OpenCV's two nearest modes only this one samples at pixel centres; the other shifts masks
        return np.asarray(cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT))
