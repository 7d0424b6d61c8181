"""Scores of roads and other thin things: relaxed precision and recall, centreline Dice."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.morphology import skeletonize

from convlora.metrics.overlap import THRESHOLD
from convlora.metrics.scores import Gray, Mask, Sums, Values


class Relaxed(Sums):
    """Precision, recall and F1 that forgive small shifts (Mnih and Hinton, ECCV 2010), over all pixels.

    A predicted pixel is right if a true one lies within `buffer`, and a true one found if a predicted one
    does. Where nothing is predicted precision is 1, where nothing is true recall is.

    Args:
        buffer: Euclidean distance, px.
    """

    names = ("relaxed_precision", "relaxed_recall", "relaxed_f1")

    def __init__(self, buffer: float = 3):
        if buffer < 0:
            raise ValueError(f"buffer={buffer} must be at least 0, in pixels")
        super().__init__(size=4)
        self.buffer = buffer

    def sums(self, classes: Gray, prob: Gray, mask: Gray) -> Sequence[int]:
        """Return the numbers of predicted pixels that are right and of all, of true ones found and of all."""
        found, true = prob >= THRESHOLD, mask == 1
        return [
            int(np.count_nonzero(found & widen(true, self.buffer))),
            int(np.count_nonzero(found)),
            int(np.count_nonzero(true & widen(found, self.buffer))),
            int(np.count_nonzero(true)),
        ]

    def scores(self, total: Values, count: int) -> Mapping[str, float]:
        """Return precision, recall and their harmonic mean."""
        right, found, hit, true = total
        precision, recall = right / found if found else 1.0, hit / true if true else 1.0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        return dict(zip(self.names, (precision, recall, f1) if count else [np.nan] * 3, strict=True))


def cldice(prob: Gray, mask: Mask) -> float:
    """Centreline Dice (Shit et al., "clDice", CVPR 2021, arXiv:2003.07311).

    The harmonic mean of the share of the prediction's skeleton that lies in the mask, and of the mask's
    skeleton that lies in the prediction; on an empty mask 1 for an empty prediction and 0 for any other.
    """
    found = prob >= THRESHOLD
    if not found.any() or not mask.any():
        return float(found.any() == mask.any())
    right, hit = mask[skeletonize(found)].mean(), found[skeletonize(mask)].mean()
    return float(2 * right * hit / (right + hit)) if right + hit else 0.0


def widen(region: Mask, buffer: float) -> NDArray[np.bool_]:
    """Return the pixels within `buffer` px of a region."""
    if not region.any():
        return region
    return np.asarray(ndimage.distance_transform_edt(~region) <= buffer)
