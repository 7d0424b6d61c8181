"""Scores of camouflaged and salient object detection, as PySODMetrics defines them.

The field's convention stretches each map to the full range (its least value to 0, its largest to 1) before it
is scored, and so does PySODMetrics; these functions follow it so that numbers compare with published ones.
"""

from typing import Any

import numpy as np
import py_sod_metrics
from numpy.typing import NDArray

Gray = NDArray[np.uint8]
Mask = NDArray[np.bool_]


def mae(prob: Gray, mask: Mask) -> float:
    """Mean absolute error; on an empty mask the mean of the stretched map."""
    return _last(py_sod_metrics.MAE(), prob, mask).maes[-1].item()  # type: ignore[no-any-return]


def s_measure(prob: Gray, mask: Mask) -> float:
    """Structure measure, alpha 0.5 (Fan et al., ICCV 2017); on an empty mask 1 - mean of the map."""
    return float(_last(py_sod_metrics.Smeasure(), prob, mask).sms[-1])


def e_measure(prob: Gray, mask: Mask) -> float:
    """Enhanced alignment measure, mean over all thresholds (Fan et al., IJCAI 2018).

    On an empty mask each threshold scores the share of pixels left empty.
    """
    return float(_last(py_sod_metrics.Emeasure(), prob, mask).changeable_ems[-1].mean())


def weighted_f_measure(prob: Gray, mask: Mask) -> float:
    """Weighted F-measure with beta^2 = 1 (Margolin et al., CVPR 2014); 0 on an empty mask."""
    return float(_last(py_sod_metrics.WeightedFmeasure(), prob, mask).weighted_fms[-1])


def _last(score: Any, prob: Gray, mask: Mask) -> Any:
    score.step(pred=prob, gt=mask.astype(np.uint8) * 255)
    return score
