import numpy as np
import py_sod_metrics
import pytest
import torch
from numpy.typing import NDArray

from convlora.metrics.base import ImageMean, image_means
from convlora.metrics.overlap import dice, iou
from convlora.metrics.saliency import e_measure, mae, s_measure, weighted_f_measure

EMPTY = np.zeros((24, 30), bool)
FULL = ~EMPTY
NOTHING = np.zeros((24, 30), np.uint8)
EVERYTHING = np.full((24, 30), 255, np.uint8)


def sample(seed: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    rng = np.random.default_rng(seed)
    mask = np.zeros((24, 30), bool)
    mask[4:17, 6 + seed : 20 + seed] = True
    prob = np.clip(150 * mask + rng.normal(60, 40, mask.shape), 0, 255).astype(np.uint8)
    return prob, mask


@pytest.mark.parametrize("seed", range(4))
def test_overlap_equals_pysodmetrics(seed: int) -> None:
    prob, mask = sample(seed)
    options = {"with_dynamic": False, "with_adaptive": False, "with_binary": True, "sample_based": True}
    reference = py_sod_metrics.FmeasureV2(
        {"dice": py_sod_metrics.DICEHandler(**options), "iou": py_sod_metrics.IOUHandler(**options)}
    )
    reference.step(np.where(prob >= 128, 255, 0).astype(np.uint8), mask.astype(np.uint8) * 255)
    expected = reference.get_results()
    assert dice(prob, mask) == pytest.approx(expected["dice"]["binary"], abs=1e-9)
    assert iou(prob, mask) == pytest.approx(expected["iou"]["binary"], abs=1e-9)


def test_perfect_predictions_score_best() -> None:
    mask = sample(0)[1]
    prob = mask.astype(np.uint8) * 255
    assert dice(prob, mask) == iou(prob, mask) == 1
    assert mae(prob, mask) == 0
    for score in (s_measure, e_measure, weighted_f_measure):
        assert score(prob, mask) == pytest.approx(1, abs=0.01)


def test_empty_mask_found_empty() -> None:
    assert dice(NOTHING, EMPTY) == iou(NOTHING, EMPTY) == 1
    assert mae(NOTHING, EMPTY) == 0
    assert s_measure(NOTHING, EMPTY) == 1
    assert e_measure(NOTHING, EMPTY) == pytest.approx(1, abs=5e-3)  # but at the threshold 0
    assert weighted_f_measure(NOTHING, EMPTY) == 0  # PySODMetrics' convention, whatever the prediction


def test_empty_mask_with_a_false_find() -> None:
    """A single false pixel costs all of the overlap, the false area of the other scores."""
    prob = NOTHING.copy()
    prob[:12] = 255
    assert dice(prob, EMPTY) == iou(prob, EMPTY) == 0
    assert mae(prob, EMPTY) == 0.5
    assert s_measure(prob, EMPTY) == 0.5
    assert e_measure(prob, EMPTY) == pytest.approx(0.5, abs=0.01)
    assert weighted_f_measure(prob, EMPTY) == 0


def test_full_mask() -> None:
    assert dice(EVERYTHING, FULL) == iou(EVERYTHING, FULL) == 1
    assert dice(NOTHING, FULL) == iou(NOTHING, FULL) == 0
    assert s_measure(NOTHING, FULL) == 0


def test_saliency_scores_stretch_the_map_as_the_field_does() -> None:
    prob, mask = sample(1)
    faint = (prob // 4).astype(np.uint8)
    stretched = (faint - faint.min()) / (faint.max() - faint.min())
    assert mae(faint, mask) == pytest.approx(np.abs(stretched - mask).mean())
    assert dice(faint, mask) == 0  # the overlap takes probabilities at their word


def test_mean_does_not_depend_on_batches_or_ranks() -> None:
    images = [sample(seed) for seed in range(5)]
    whole, first, second = ImageMean(dice), ImageMean(dice), ImageMean(dice)
    for i, (prob, mask) in enumerate(images):
        for metric in (whole, (first, second)[i % 2]):
            value = metric(torch.from_numpy(prob), torch.from_numpy(mask))
            assert value == pytest.approx(dice(prob, mask))
    expected = np.mean([dice(*image) for image in images])
    assert whole.compute().item() == pytest.approx(expected, abs=1e-12)
    assert ((first.total + second.total) / (first.count + second.count)).item() == pytest.approx(
        expected, abs=1e-12
    )
    assert all(
        reduce is torch.sum or reduce.__name__ == "dim_zero_sum" for reduce in whole._reductions.values()
    )


def test_unknown_score_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"metrics.scores.dice: there is no function convlora.metrics.overlap.dcie"
    ):
        image_means({"dice": "convlora.metrics.overlap.dcie"})
