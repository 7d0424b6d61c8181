"""The wrapper that makes a torchmetrics `Metric` of a per-image score."""

import importlib
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric, MetricCollection

Score = Callable[[NDArray[np.uint8], NDArray[np.bool_]], float]


class ImageMean(Metric):
    """Mean of a score over images; its states are sums, so batches and ranks add up exactly.

    Calling it with one image returns that image's score; `compute` returns the mean over all images so far,
    NaN where there were none.

    Args:
        score: a pure function of one image's 8-bit probabilities and its mask.
    """

    full_state_update = False
    is_differentiable = False
    total: Tensor
    count: Tensor

    def __init__(self, score: Score):
        super().__init__()
        self.score = score
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prob: Tensor, mask: Tensor) -> None:
        """Add one image: `prob` uint8 [h, w], `mask` of 0 and 1 [h, w]."""
        self.total += self.score(prob.cpu().numpy(), mask.cpu().numpy().astype(bool))
        self.count += 1

    def compute(self) -> Tensor:
        """Return the mean."""
        return self.total / self.count


def image_means(scores: Mapping[str, str]) -> MetricCollection:
    """Return a collection of per-image means.

    Args:
        scores: name in tables and logs -> dotted path of the score function.

    Raises:
        ValueError: a path names no function.
    """
    return MetricCollection(
        {name: ImageMean(_find(name, path)) for name, path in scores.items()}, compute_groups=False
    )


def _find(name: str, path: str) -> Score:
    module, _, function = path.rpartition(".")
    try:
        score: Score = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"metrics.scores.{name}: there is no function {path}; give the dotted path of a score, such as "
            "convlora.metrics.overlap.dice"
        ) from error
    return score
