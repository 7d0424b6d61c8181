"""What may be done with a predicted foreground: another threshold, small parts taken away, holes filled."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

HALF = 128  # of 8-bit probabilities, the least that is at least one half
TUNED = "tuned"
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Cleaning:
    """Makes a mask of 8-bit probabilities: by a threshold, then without small parts, then with holes filled.

    Where the mask differs from the one at one half, the probability becomes the nearest one that agrees with
    it, 127 outside and 128 inside; all others stay. So `prob >= 128` is the mask that is written, and every
    score is of that mask: those of the binarised mask (overlap, outlines, centrelines, error rates) entirely,
    those of the probabilities (MAE, S-, E- and weighted F-measure, calibration) by these pixels alone.

    Args:
        threshold: the least probability of foreground, above 0 and at most 1.
        smallest: px; parts of fewer pixels are taken away. Pixels that touch at a corner are of one part.
        fill_holes: px; holes of at most so many pixels become foreground, of any size where True. A hole is
            background that is enclosed: pixels that only touch at a corner are of different holes, and what
            reaches the image's border is none.

    Raises:
        ValueError: a number is impossible.
    """

    threshold: float = 0.5
    smallest: int = 0
    fill_holes: int | bool = False

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} must lie above 0, at most at 1; set threshold=0.5")
        for key in ("smallest", "fill_holes"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 0, in pixels; leave it out")

    @property
    def is_idle(self) -> bool:
        """Whether it leaves every prediction as it is."""
        return self.level == HALF and self.smallest <= 1 and not self.fill_holes

    @property
    def level(self) -> int:
        """The least 8-bit probability of foreground."""
        return math.ceil(255 * self.threshold)

    def __call__(self, classes: Pixels, prob: Pixels) -> tuple[Pixels, Pixels]:
        """Return the prediction of an image, ids and 8-bit probabilities [h, w], as it is to be."""
        if self.is_idle:
            return classes, prob
        mask = (prob >= self.level).astype(np.uint8)
        if self.smallest > 1:
            parts, sizes = _label(mask, connectivity=8)
            mask[(sizes < self.smallest)[parts]] = 0
        if self.fill_holes:
            holes, sizes = _label(1 - mask, connectivity=4)
            is_hole = np.ones(len(sizes), bool) if self.fill_holes is True else sizes <= self.fill_holes
            border = (holes[0], holes[-1], holes[:, 0], holes[:, -1])
            is_hole[np.unique(np.concatenate(border))] = False
            is_hole[0] = False  # all that is no background
            mask[is_hole[holes]] = 1
        return mask, np.where(mask == 1, np.maximum(prob, HALF), np.minimum(prob, HALF - 1)).astype(np.uint8)


def _label(region: Pixels, connectivity: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Number the parts of a region from 1; returns that of each pixel, 0 outside, and the parts' sizes."""
    _, parts = cv2.connectedComponents(region, connectivity=connectivity)
    return parts, np.bincount(parts.ravel())


def choose_cleaning(
    threshold: float | str,
    smallest: int,
    fill_holes: int | bool,
    metadata: Mapping[str, str],
    class_names: Sequence[str],
    checkpoint: str,
) -> Cleaning:
    """Return what the settings of a command ask for.

    Args:
        threshold: a number, or `tuned` for the one that the adapter keeps.
        smallest: as of `Cleaning`, and `fill_holes`.
        fill_holes: see there.
        metadata: of the adapter file.
        class_names: that it tells apart.
        checkpoint: its name.

    Raises:
        ValueError: a number is impossible, no threshold is kept, or there are several classes.
    """
    if isinstance(threshold, str) or not Cleaning(threshold, smallest, fill_holes).is_idle:
        check_foreground(class_names, checkpoint)
    if threshold == TUNED:
        if "threshold" not in metadata:
            raise ValueError(
                f"threshold=tuned, but {checkpoint} keeps none; `python -m convlora.evaluate "
                f"checkpoint={checkpoint} dataset=NAME threshold=tune` finds it on the validation images"
            )
        threshold = float(metadata["threshold"])
    if isinstance(threshold, str):
        raise ValueError(f"threshold={threshold} is not possible here; set a number, as 0.5, or tuned")
    return Cleaning(threshold, smallest, fill_holes)


def check_foreground(class_names: Sequence[str], checkpoint: str) -> None:
    """Refuse to clean what tells several classes apart; raises ValueError."""
    if len(class_names) > 1:
        raise ValueError(
            f"threshold, smallest and fill_holes are for a foreground alone, but {checkpoint} tells "
            f"{len(class_names)} classes apart ({', '.join(class_names)}); leave them out"
        )
