"""Scores of several classes, from their confusion matrix over all pixels of the data set."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from convlora import IGNORED
from convlora.metrics.scores import Gray, Sums, Values


class ClassScores(Sums):
    """IoU of each class and their mean, accuracy over pixels and over classes, and the confusion matrix.

    Ignored pixels do not count. A class that is neither in the masks nor in the predictions has no IoU (NaN)
    and is left out of the mean; one that is in no mask is left out of the mean accuracy.

    Args:
        class_names: in the order of their ids.
    """

    multi_class = True
    needs_class_names = True

    def __init__(self, class_names: Sequence[str]):
        super().__init__(size=len(class_names) ** 2)
        self.num_classes = len(class_names)
        self.iou_names = tuple(f"iou_{name.lower().replace(' ', '_')}" for name in class_names)
        self.names = ("miou", "accuracy", "mean_accuracy", *self.iou_names)

    def sums(self, classes: Gray, prob: Gray, mask: Gray) -> Values:
        valid = mask != IGNORED
        pairs = mask[valid].astype(np.int64) * self.num_classes + classes[valid]
        return np.bincount(pairs, minlength=self.num_classes**2).astype(np.float64)

    def scores(self, total: Values, count: int) -> Mapping[str, Any]:
        """Return the scores and, as `confusion`, the matrix [classes, classes], rows the truth."""
        confusion = total.reshape(self.num_classes, self.num_classes)
        hits, true, found = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
        ious, recalls = hits / (true + found - hits), hits / true
        return {
            "miou": _mean(ious),
            "accuracy": hits.sum() / true.sum(),
            "mean_accuracy": _mean(recalls),
            **dict(zip(self.iou_names, ious, strict=True)),
            "confusion": confusion,
        }


def _mean(values: Values) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if there.size else float("nan")
