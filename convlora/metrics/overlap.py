"""Scores of the overlap between a binarised prediction (probability at least 0.5) and a mask."""

import numpy as np
from numpy.typing import NDArray

THRESHOLD = 128  # of 8-bit probabilities; the least that is at least one half


def dice(prob: NDArray[np.uint8], mask: NDArray[np.bool_]) -> float:
    """Dice coefficient; on an empty mask 1 for an empty prediction and 0 for any other."""
    predicted = prob >= THRESHOLD
    total = int(predicted.sum()) + int(mask.sum())
    return 2 * int((predicted & mask).sum()) / total if total else 1.0


def iou(prob: NDArray[np.uint8], mask: NDArray[np.bool_]) -> float:
    """Intersection over union; on an empty mask 1 for an empty prediction and 0 for any other."""
    predicted = prob >= THRESHOLD
    union = int((predicted | mask).sum())
    return int((predicted & mask).sum()) / union if union else 1.0
