"""Balanced error rate of shadow detection (Vicente et al., ECCV 2016), in percent; less is better."""

from collections.abc import Mapping

import numpy as np

from convlora.metrics.overlap import count
from convlora.metrics.scores import Gray, Mask, Sums, Values


def ber(prob: Gray, mask: Mask) -> float:
    """Balanced error rate of one image: 100 (1 - (hit rate of shadow + hit rate of the rest) / 2).

    Where all is shadow, or nothing, the error rate of the one kind there is.
    """
    return balanced_error_rate(np.array([*count(prob, mask), mask.size], np.float64))


class BalancedErrorRate(Sums):
    """Balanced error rate of all pixels of the data set taken together, the field's convention."""

    names = ("ber",)

    def __init__(self) -> None:
        super().__init__(size=4)

    def sums(self, classes: Gray, prob: Gray, mask: Gray) -> Values:
        return np.array([*count(prob, mask == 1), mask.size], np.float64)

    def scores(self, total: Values, count: int) -> Mapping[str, float]:
        return {"ber": balanced_error_rate(total)}


def balanced_error_rate(counts: Values) -> float:
    """Return the rate from the numbers of shadow pixels found, found falsely, missed, and of all pixels."""
    hits, false, missed, pixels = counts
    shadow, rest = hits + missed, pixels - hits - missed
    errors = [wrong / there for wrong, there in ((missed, shadow), (false, rest)) if there]
    return 100 * float(np.mean(errors)) if errors else float("nan")
