"""Scores of single images as torchmetrics: sums over images, so that batches and ranks add up exactly."""

import difflib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric, MetricCollection

Gray = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Values = NDArray[np.float64]
Score = Callable[[Gray, Mask], float]


class Sums(Metric, ABC):
    """Scores that follow from sums over images, exactly whatever the batches and ranks.

    Calling it with one image returns that image's own scores; `compute` returns those of all images so far.
    The memory does not grow with the number of images.

    Args:
        size: number of the sums.
    """

    full_state_update = False
    is_differentiable = False
    names: tuple[str, ...]
    """Of the scores."""
    multi_class: bool = False
    """Whether it is for several classes, and not for a foreground."""
    total: Tensor
    count: Tensor

    def __init__(self, size: int):
        super().__init__()
        self.add_state("total", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, classes: Tensor, prob: Tensor, mask: Tensor) -> None:
        """Add one image: predicted class ids, 8-bit probabilities and true class ids, each uint8 [h, w]."""
        found = self.sums(classes.cpu().numpy(), prob.cpu().numpy(), mask.cpu().numpy())
        self.total += torch.as_tensor(found, dtype=torch.float64, device=self.total.device)
        self.count += 1

    def compute(self) -> dict[str, Tensor]:
        """Return the scores by name, and arrays that belong to them."""
        with np.errstate(invalid="ignore", divide="ignore"):
            found = self.scores(self.total.cpu().numpy(), int(self.count))
        return {name: torch.as_tensor(value, device=self.total.device) for name, value in found.items()}

    @abstractmethod
    def sums(self, classes: Gray, prob: Gray, mask: Gray) -> Values | Sequence[float]:
        """Return what is summed of one image, `size` numbers."""

    @abstractmethod
    def scores(self, total: Values, count: int) -> Mapping[str, Any]:
        """Return the scores of `count` images by name; NaN where nothing was counted."""


class ImageMean(Sums):
    """Mean of a score over images, NaN where there were none.

    Args:
        name: of the score.
        score: a pure function of one image's 8-bit probabilities and its mask.
    """

    def __init__(self, name: str, score: Score):
        super().__init__(size=1)
        self.names = (name,)
        self.score = score

    def sums(self, classes: Gray, prob: Gray, mask: Gray) -> Sequence[float]:
        return [self.score(prob, mask == 1)]

    def scores(self, total: Values, count: int) -> Mapping[str, Any]:
        return {self.names[0]: total[0] / np.float64(count)}


class Scores(MetricCollection):
    """The scores of a field.

    Args:
        primary: the one that chooses the best checkpoint and ranks images.
        mode: `max` where a greater primary score is better, else `min`.
        scores: name -> dotted path of a function of one image, whose mean is taken under that name, or of a
            `Sums` class, or a `Sums`, whose scores have their own names; all else is refused by name.
        class_names: of the data set.
        validate: names of the scores that a validation computes beside the primary one; all of them would
            hold up the training.

    Raises:
        ValueError: what is given is no score, two scores have one name, there is no such primary or other
            score, or the scores are not for that many classes.
    """

    names: list[str]

    def __init__(
        self,
        primary: str,
        mode: str,
        scores: Mapping[str, Any],
        class_names: Sequence[str] = ("foreground",),
        validate: Sequence[str] = (),
    ):
        for name, score in scores.items():
            if not isinstance(score, str | Sums):  # what is set of a score that is not there
                others = [other for other in scores if other != name]
                near = difflib.get_close_matches(name, others, n=1)
                hint = f"did you mean metrics.scores.{near[0]}? " if near else ""
                raise ValueError(
                    f"metrics.scores.{name}={score} is no score; {hint}there are {', '.join(others)}, and "
                    f"metrics.scores.{name}=PATH adds another by its dotted path"
                )
        metrics: dict[str, Any] = {name: _metric(name, score, class_names) for name, score in scores.items()}
        for name, metric in metrics.items():
            if metric.multi_class != (len(class_names) > 1):
                several = ("several classes", "metrics=binary")
                one = ("a foreground", "metrics=multiclass loss=cross_entropy_dice")
                kind, way_out = several if metric.multi_class else one
                raise ValueError(
                    f"metrics.scores.{name} is for {kind}, but the data set has {len(class_names)} classes "
                    f"({', '.join(class_names)}); set {way_out}"
                )
        super().__init__(metrics, compute_groups=False)
        self.primary = primary
        self.mode = mode
        self.names = [name for metric in metrics.values() for name in metric.names]
        twice = [name for name in dict.fromkeys(self.names) if self.names.count(name) > 1]
        if twice:
            raise ValueError(f"metrics.scores gives {', '.join(twice)} twice; leave one of the two out")
        if primary not in self.names:
            raise ValueError(f"metrics.primary={primary} is not one of {', '.join(self.names)}")
        for name in validate:
            if name not in self.names:
                raise ValueError(f"metrics.validate: {name} is not one of {', '.join(self.names)}")
        if mode not in ("min", "max"):
            raise ValueError(f"metrics.mode={mode} must be min or max")
        self.validated = {primary, *validate}

    def for_validation(self) -> "Scores":
        """Return those scores that a validation computes, with what is computed along with them."""
        chosen = deepcopy(self)
        metrics: dict[str, Any] = dict(self.items())
        kept = {key: metric for key, metric in metrics.items() if self.validated & {*metric.names}}
        for key in metrics.keys() - kept.keys():
            del chosen[key]
        chosen.names = [name for metric in kept.values() for name in metric.names]
        return chosen


def _metric(name: str, score: str | Sums, class_names: Sequence[str]) -> Sums:
    if isinstance(score, Sums):
        return score
    module, _, attribute = score.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"metrics.scores.{name}: there is no {score}; give the dotted path of a score, such as "
            "convlora.metrics.overlap.dice"
        ) from error
    if not isinstance(found, type):
        return ImageMean(name, found)
    metric = found(class_names) if getattr(found, "needs_class_names", False) else found()
    if not isinstance(metric, Sums):
        raise ValueError(
            f"metrics.scores.{name}: {score} is no score; give a function of one image or a Sums"
        )
    return metric
