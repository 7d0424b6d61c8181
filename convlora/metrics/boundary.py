"""Scores of the distance between the outlines of a binarised prediction and of a mask.

The outline of a region is its pixels that have one outside it, or the image's border, above, below or beside
them.
"""

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from convlora.metrics.overlap import THRESHOLD
from convlora.metrics.scores import Gray, Mask

PERCENTILE = 95
TOLERANCE = 0.0075  # of the image's diagonal; Csurka et al., BMVC 2013

_CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))


def hd95(prob: Gray, mask: Mask) -> float:
    """Hausdorff distance in pixels: the greater of both directions' 95th percentiles, as MONAI defines it.

    0 where prediction and mask are empty, the image's diagonal where one of them is.
    """
    found = prob >= THRESHOLD
    if not found.any() or not mask.any():
        return 0.0 if found.any() == mask.any() else float(np.hypot(*mask.shape))
    return float(max(np.percentile(distances, PERCENTILE) for distances in _distances(found, mask)))


def boundary_f(prob: Gray, mask: Mask) -> float:
    """F1 score of outline pixels within 0.75 % of the image's diagonal, at least 1 px, of the other's.

    Csurka et al., "What is a good evaluation measure for semantic segmentation?", BMVC 2013. 1 where
    prediction and mask are empty, 0 where one of them is.
    """
    found = prob >= THRESHOLD
    if not found.any() or not mask.any():
        return float(found.any() == mask.any())
    tolerance = max(1.0, TOLERANCE * float(np.hypot(*mask.shape)))
    precision, recall = (float((distances <= tolerance).mean()) for distances in _distances(found, mask))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _distances(found: Mask, mask: Mask) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the distances of the first outline's pixels to the second outline, and the reverse."""
    rows, columns = np.flatnonzero((found | mask).any(axis=1)), np.flatnonzero((found | mask).any(axis=0))
    window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)  # both outlines lie in it
    one, other = _outline(found[window]), _outline(mask[window])
    return ndimage.distance_transform_edt(~other)[one], ndimage.distance_transform_edt(~one)[other]


def _outline(region: Mask) -> Mask:
    pixels = region.astype(np.uint8)
    inside = cv2.erode(pixels, _CROSS, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return np.asarray(pixels > inside)
