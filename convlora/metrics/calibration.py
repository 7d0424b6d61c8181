"""Whether predicted probabilities are the shares of predictions that come true."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from convlora import IGNORED
from convlora.metrics.scores import Gray, Sums, Values

LEVELS = 256  # of 8-bit probabilities


class Calibration(Sums):
    """Expected calibration error over all pixels (Naeini et al., AAAI 2015; Guo et al., ICML 2017).

    Pixels are binned by probability, and the error is the mean over pixels of the difference between a bin's
    mean probability and the share in it that came true: of a foreground that the pixel is foreground, of
    several classes that it has the class found. Bins are closed on the left, the last one on both sides.

    Args:
        class_names: of the data set.
        num_bins: of equal width, 1 to 255.
    """

    names = ("ece",)
    needs_class_names = True

    def __init__(self, class_names: Sequence[str] = ("foreground",), num_bins: int = 15):
        if not 1 <= num_bins < LEVELS:
            raise ValueError(f"num_bins={num_bins} must be 1 to {LEVELS - 1}")
        super().__init__(size=2 * LEVELS)
        self.multi_class = len(class_names) > 1
        self.num_bins = num_bins

    def sums(self, classes: Gray, prob: Gray, mask: Gray) -> Values:
        """Return, for each 8-bit probability, the number of pixels and of those where it came true."""
        true = (mask == classes) if self.multi_class else (mask == 1)
        valid = mask != IGNORED
        return np.concatenate(
            [np.bincount(prob[chosen], minlength=LEVELS) for chosen in (valid, valid & true)]
        ).astype(np.float64)

    def scores(self, total: Values, count: int) -> Mapping[str, Any]:
        """Return the error and, as `reliability`, the bins' mean probability, share true, share of pixels."""
        level = np.arange(LEVELS)
        bins = np.minimum(level * self.num_bins // (LEVELS - 1), self.num_bins - 1)
        pixels, true, probs = (
            np.bincount(bins, weights, minlength=self.num_bins)
            for weights in (total[:LEVELS], total[LEVELS:], total[:LEVELS] * level / (LEVELS - 1))
        )
        error = np.abs(probs - true).sum() / pixels.sum()
        return {"ece": error, "reliability": np.stack([probs / pixels, true / pixels, pixels / pixels.sum()])}
