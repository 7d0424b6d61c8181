"""From an image of any size to the network's square input."""

from dataclasses import dataclass
from typing import Protocol

import albumentations as A
import cv2

from convlora import IGNORED

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# OpenCV's bicubic does not antialias, so images are scaled down by area instead. Of its two nearest modes
# only the exact one samples at pixel centres, as bicubic does; the other shifts masks against their images.
_IMAGE_INTERPOLATION = cv2.INTER_CUBIC
_MASK_INTERPOLATION = cv2.INTER_NEAREST_EXACT


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
        """See `Resize`."""
        resize = A.Resize(
            self.image_size,
            self.image_size,
            interpolation=_IMAGE_INTERPOLATION,
            mask_interpolation=_MASK_INTERPOLATION,
            area_for_downscale="image",
        )
        return [resize, A.Normalize(IMAGENET_MEAN, IMAGENET_STD)]

    def content(self, height: int, width: int) -> tuple[int, int]:
        """See `Resize`; the whole square."""
        return self.image_size, self.image_size


@dataclass(frozen=True)
class LongestSideResize:
    """Scales the longest side to the square's and pads right and below, as SAM does; padding is ignored."""

    image_size: int

    def steps(self) -> list[A.BasicTransform]:
        """See `Resize`."""
        scale = A.LongestMaxSize(
            self.image_size,
            interpolation=_IMAGE_INTERPOLATION,
            mask_interpolation=_MASK_INTERPOLATION,
            area_for_downscale="image",
        )
        # SAM pads after normalising, so that the padding is the mean colour and not black
        pad = A.PadIfNeeded(
            self.image_size,
            self.image_size,
            position="top_left",
            border_mode=cv2.BORDER_CONSTANT,
            fill=0,
            fill_mask=IGNORED,
        )
        return [scale, A.Normalize(IMAGENET_MEAN, IMAGENET_STD), pad]

    def content(self, height: int, width: int) -> tuple[int, int]:
        """See `Resize`."""
        scale = self.image_size / max(height, width)  # in albumentations' order, so that rounding agrees
        return max(1, round(height * scale)), max(1, round(width * scale))


def eval_transform(resize: Resize) -> A.Compose:
    """Return the transform for evaluation and prediction: resize, normalise and pad."""
    return A.Compose(resize.steps())
