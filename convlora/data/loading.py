"""How the images of any data set are read and batched."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import albumentations as A

from convlora.data.bands import check_channels, check_percentiles
from convlora.data.transforms import Resize, SquareResize

PERCENTILES = (2, 98)


@dataclass(frozen=True)
class Loading:
    """What all data sets of a run share, those that are only tested included.

    Args:
        resize: how an image becomes the network's input.
        augment: of image and mask in training, before the resize.
        batch_size: per device, at least 1.
        num_workers: loader processes per device; 0 loads in the main process.
        seed: of order and augmentation in training, and of the choice of `shots`.
        shots: trains on that many images only; those of a smaller number are among those of a greater one.
        cache: keeps the training images decoded and resized, `ram` in memory or else in the folder so named;
            the resize then comes before the augmentation instead of after it. None reads the files each time.
        channels: numbers, from 1, of the bands of each file that are taken as red, green and blue; None reads
            plain images.
        percentiles: of each of these bands in the training images, between which its values become 0 to 255;
            those of 8 bits stay as they are.

    Raises:
        ValueError: a number is impossible, or there are percentiles but no channels.
    """

    resize: Resize = field(default_factory=lambda: SquareResize(1024))
    augment: A.Compose = field(default_factory=lambda: A.Compose([]))
    batch_size: int = 4
    num_workers: int = 2
    seed: int = 0
    shots: int | None = None
    cache: str | None = None
    channels: Sequence[int] | None = None
    percentiles: Sequence[float] = PERCENTILES

    def __post_init__(self) -> None:
        for key, least in (("batch_size", 1), ("num_workers", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"loading.{key}={getattr(self, key)} must be at least {least}")
        check_percentiles(self.percentiles)
        if self.channels is not None:
            check_channels(self.channels)
        elif tuple(self.percentiles) != PERCENTILES:
            raise ValueError(
                f"loading.percentiles={list(self.percentiles)} scales the bands that loading.channels names, "
                "and there are none; set loading.channels=[4,3,2], or leave it out"
            )
