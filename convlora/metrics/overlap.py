"""Scores of the overlap between a binarised prediction (probability at least 0.5) and a mask."""

from collections.abc import Mapping, Sequence

import numpy as np

from convlora.metrics.scores import Gray, Mask, Sums, Values

THRESHOLD = 128  # of 8-bit probabilities; the least that is at least one half
ISIC_THRESHOLD = 0.65  # below this Jaccard index a segmentation counts as failed; ISIC 2018, arXiv:1902.03368


def dice(prob: Gray, mask: Mask) -> float:
    """Dice coefficient; on an empty mask 1 for an empty prediction and 0 for any other."""
    hits, false, missed = count(prob, mask)
    return 2 * hits / (2 * hits + false + missed) if hits + false + missed else 1.0


def iou(prob: Gray, mask: Mask) -> float:
    """Intersection over union, also Jaccard index; on an empty mask 1 for an empty prediction, else 0."""
    hits, false, missed = count(prob, mask)
    return hits / (hits + false + missed) if hits + false + missed else 1.0


def threshold_jaccard(prob: Gray, mask: Mask) -> float:
    """Jaccard index, 0 where it is below 0.65 (ISIC 2018)."""
    jaccard = iou(prob, mask)
    return jaccard if jaccard >= ISIC_THRESHOLD else 0.0


def count(prob: Gray, mask: Mask) -> tuple[int, int, int]:
    """Return the numbers of foreground pixels found, found falsely and missed."""
    found = prob >= THRESHOLD
    hits = int(np.count_nonzero(found & mask))
    return hits, int(np.count_nonzero(found)) - hits, int(np.count_nonzero(mask)) - hits


class Pooled(Sums):
    """Dice and IoU of all pixels of the data set taken together; 1 where there is no foreground at all."""

    names = ("dice_pooled", "iou_pooled")

    def __init__(self) -> None:
        super().__init__(size=3)

    def sums(self, classes: Gray, prob: Gray, mask: Gray) -> Sequence[float]:
        return count(prob, mask == 1)

    def scores(self, total: Values, count: int) -> Mapping[str, float]:
        hits, wrong = total[0], total[1] + total[2]
        if hits + wrong == 0:
            return dict.fromkeys(self.names, 1.0 if count else np.nan)
        return {"dice_pooled": 2 * hits / (2 * hits + wrong), "iou_pooled": hits / (hits + wrong)}
