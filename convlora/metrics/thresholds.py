"""Scores at every threshold of 8-bit probabilities, to choose one by."""

import numpy as np

from convlora.metrics.overlap import THRESHOLD
from convlora.metrics.scores import Gray, Mask, Values

LEVELS = np.arange(1, 256)  # the least probabilities of foreground that there may be


def overlap_by_level(prob: Gray, mask: Mask) -> dict[str, Values]:
    """Return `dice` and `iou` of one image [255] at each of `LEVELS`; on empty masks as in overlap."""
    total, true = (np.bincount(prob[chosen], minlength=256) for chosen in (np.ones_like(mask), mask))
    found, hits = (np.cumsum(counts[::-1])[::-1][1:] for counts in (total, true))
    size = int(np.count_nonzero(mask))
    with np.errstate(invalid="ignore"):
        dice, iou = 2 * hits / (found + size), hits / (found + size - hits)
    return {name: np.where(found + size == 0, 1.0, value) for name, value in (("dice", dice), ("iou", iou))}


def best_threshold(means: Values) -> float:
    """Return the threshold of the level [255] whose mean is greatest, of several the one nearest to 0.5.

    It lies halfway between the level and the one below, so that rounding changes nothing.
    """
    best = LEVELS[means >= means.max() - 1e-12]
    level = best[np.argmin(np.abs(best - THRESHOLD))]
    return round((float(level) - 0.5) / 255, 3)
