"""Scores of camouflaged and salient object detection, as PySODMetrics defines them.

The field's convention stretches each map to the full range (its least value to 0, its largest to 1) before it
is scored, and so does PySODMetrics; these functions follow it so that numbers compare with published ones.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import py_sod_metrics

from convlora.metrics.scores import Gray, Mask, Sums, Values

LEVELS = 256  # thresholds of a curve
THINNEST = 1e-12  # variance across an object, as a part of that along it
F_BETA = 0.3  # beta^2 of the F-measure; Achanta et al., CVPR 2009


def mae(prob: Gray, mask: Mask) -> float:
    """Mean absolute error; on an empty mask the mean of the stretched map."""
    return _last(py_sod_metrics.MAE(), prob, mask).maes[-1].item()  # type: ignore[no-any-return]


def s_measure(prob: Gray, mask: Mask) -> float:
    """Structure measure, alpha 0.5 (Fan et al., ICCV 2017); on an empty mask 1 - mean of the map."""
    return float(_last(_Smeasure(), prob, mask).sms[-1])


def weighted_f_measure(prob: Gray, mask: Mask) -> float:
    """Weighted F-measure with beta^2 = 1 (Margolin et al., CVPR 2014); 0 on an empty mask."""
    return float(_last(py_sod_metrics.WeightedFmeasure(), prob, mask).weighted_fms[-1])


def context_measure(prob: Gray, mask: Mask) -> float:
    """Context-measure with beta^2 = 1, alpha 6 (Wang et al. 2025, arXiv:2512.07076); 0 on an empty mask."""
    return float(_last(_ContextMeasure(), prob, mask).scores[-1])


class _Smeasure(py_sod_metrics.Smeasure):  # type: ignore[misc]
    """Where an object's centre lies on the last row or column, a quarter is empty and has the weight 0."""

    def ssim(self, pred: Values, gt: Mask) -> float:
        return float(super().ssim(pred, gt)) if pred.size else 0.0


class _ContextMeasure(py_sod_metrics.ContextMeasure):  # type: ignore[misc]
    """The pixels of a slanting line have no covariance across it, where the original divides by zero."""

    def _compute_y_params(self, Y: Mask) -> tuple[Values, int, int]:  # noqa: N803
        covariance, height, width = super()._compute_y_params(Y)
        if np.linalg.det(covariance) <= THINNEST * np.trace(covariance) ** 2:
            covariance = covariance + THINNEST * np.trace(covariance) * np.eye(2)
        return covariance, height, width


class Curve(Sums):
    """A measure at every threshold: mean and maximum of the curve that is the mean over images, and adaptive.

    The adaptive threshold of an image is twice the mean of its map.
    """

    def __init__(self) -> None:
        super().__init__(size=LEVELS + 1)

    def scores(self, total: Values, count: int) -> Mapping[str, float]:
        curve, adaptive = total[:LEVELS] / count, total[LEVELS] / np.float64(count)
        return dict(zip(self.names, (curve.mean(), curve.max(), adaptive), strict=True))


class EMeasure(Curve):
    """Enhanced alignment measure (Fan et al., IJCAI 2018).

    On an empty mask each threshold scores the share of pixels left empty.
    """

    names = ("e_measure", "e_measure_max", "e_measure_adaptive")

    def sums(self, classes: Gray, prob: Gray, mask: Gray) -> Values:
        """Return the curve and the adaptive measure of one image."""
        last = _last(py_sod_metrics.Emeasure(), prob, mask == 1)
        return np.append(last.changeable_ems[-1], last.adaptive_ems[-1])


class FMeasure(Curve):
    """F-measure with beta^2 = 0.3 (Achanta et al., CVPR 2009); 0 on an empty mask."""

    names = ("f_measure", "f_measure_max", "f_measure_adaptive")

    def sums(self, classes: Gray, prob: Gray, mask: Gray) -> Values:
        """Return the curve and the adaptive measure of one image."""
        handler = py_sod_metrics.FmeasureHandler(
            beta=F_BETA, with_dynamic=True, with_adaptive=True, with_binary=False
        )
        _last(py_sod_metrics.FmeasureV2({"f": handler}), prob, mask == 1)
        return np.append(handler.dynamic_results[-1], handler.adaptive_results[-1])


def _last(score: Any, prob: Gray, mask: Mask) -> Any:
    score.step(pred=prob, gt=mask.astype(np.uint8) * 255)
    return score
