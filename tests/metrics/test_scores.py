"""Every score against a reference, on random and on degenerate images."""

import warnings
from pathlib import Path

import numpy as np
import py_sod_metrics
import pytest
import sklearn.metrics
import torch
from numpy.typing import NDArray
from ranks import together
from scipy import ndimage
from scipy.spatial.distance import cdist
from scoring import (
    CLASS_NAMES,
    FILES,
    Array,
    Image,
    collection,
    images_for,
    random_classes,
    random_image,
    scalars,
    score_share,
)
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from convlora import IGNORED
from convlora.metrics.boundary import boundary_f, hd95
from convlora.metrics.calibration import Calibration
from convlora.metrics.classes import ClassScores
from convlora.metrics.overlap import Pooled, dice, iou, threshold_jaccard
from convlora.metrics.roads import Relaxed, cldice
from convlora.metrics.saliency import EMeasure, FMeasure, context_measure, mae, s_measure, weighted_f_measure
from convlora.metrics.scores import ImageMean, Scores, Sums
from convlora.metrics.shadow import BalancedErrorRate, ber


def degenerate_images() -> dict[str, Image]:
    prob, mask = random_image(0)
    row, column = np.zeros_like(mask), np.zeros_like(mask)
    row[5, 3:20] = column[4:18, 9] = True
    nothing, everything = np.zeros_like(prob), np.full_like(prob, 255)
    empty, full, pixel = np.zeros_like(mask), np.ones_like(mask), np.zeros_like(mask)
    pixel[0, -1] = True
    return {
        "empty mask": (prob, empty),
        "empty mask, nothing found": (nothing, empty),
        "empty mask, all found": (everything, empty),
        "full mask": (prob, full),
        "full mask, all found": (everything, full),
        "full mask, nothing found": (nothing, full),
        "nothing found": (nothing, mask),
        "all found": (everything, mask),
        "flat map": (np.full_like(prob, 130), mask),
        "a pixel": (prob, pixel),
        "a pixel found": (pixel.astype(np.uint8) * 255, pixel),
        "a pixel at the other corner": (pixel[::-1, ::-1].astype(np.uint8) * 255, pixel),
        "a row": (prob, row),
        "a column": (prob, column),
        "perfect": (mask.astype(np.uint8) * 255, mask),
    }


CASES = {**{f"random {seed}": random_image(seed) for seed in range(1, 6)}, **degenerate_images()}
each_case = pytest.mark.parametrize("case", CASES)


def feed(metric: Sums | Scores, prob: Array, mask: NDArray[np.generic]) -> dict[str, float]:
    """Give a binary image and return its own scores."""
    tensors = (torch.from_numpy(part.astype(np.uint8)) for part in (prob >= 128, prob, mask))
    return {name: value.item() for name, value in metric(*tensors).items() if value.ndim == 0}


def close(found: float, expected: float) -> bool:
    return found == pytest.approx(expected, abs=1e-6, nan_ok=True)


@each_case
def test_saliency_scores_equal_pysodmetrics(case: str) -> None:
    prob, mask = CASES[case]
    truth = mask.astype(np.uint8) * 255
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the deprecated, but original, F-measure
        references = {
            "mae": py_sod_metrics.MAE(),
            "sm": py_sod_metrics.Smeasure(),
            "em": py_sod_metrics.Emeasure(),
            "fm": py_sod_metrics.Fmeasure(),
            "wfm": py_sod_metrics.WeightedFmeasure(),
            "cm": py_sod_metrics.ContextMeasure(),
        }
    expected = {}
    for key, reference in references.items():
        reference.step(prob, truth)
        expected[key] = reference.get_results()[key]
    for score, key in ((mae, "mae"), (s_measure, "sm"), (weighted_f_measure, "wfm"), (context_measure, "cm")):
        if not np.isnan(expected[key]):  # an S-measure of a pixel in the corner
            assert close(score(prob, mask), expected[key]), key
    for metric, key, name in ((EMeasure(), "em", "e_measure"), (FMeasure(), "fm", "f_measure")):
        found = feed(metric, prob, mask)
        assert close(found[name], expected[key]["curve"].mean())
        assert close(found[f"{name}_max"], expected[key]["curve"].max())
        assert close(found[f"{name}_adaptive"], expected[key]["adp"])


@each_case
def test_overlap_and_error_rate_equal_scikit_learn(case: str) -> None:
    prob, mask = CASES[case]
    found, true = prob.ravel() >= 128, mask.ravel()
    nothing = not (found.any() or true.any())
    assert close(dice(prob, mask), sklearn.metrics.f1_score(true, found, zero_division=float(nothing)))
    jaccard = sklearn.metrics.jaccard_score(true, found, zero_division=float(nothing))
    assert close(iou(prob, mask), jaccard)
    assert close(threshold_jaccard(prob, mask), jaccard if jaccard >= 0.65 else 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # where there is one kind of pixels only
        assert close(ber(prob, mask), 100 * (1 - sklearn.metrics.balanced_accuracy_score(true, found)))


def test_pooled_scores_equal_scikit_learn_over_all_pixels_at_once() -> None:
    images = [random_image(seed, 20 + seed, 31) for seed in range(5)]
    pooled, rate = Pooled(), BalancedErrorRate()
    for prob, mask in images:
        feed(pooled, prob, mask)
        feed(rate, prob, mask)
    found = np.concatenate([prob.ravel() >= 128 for prob, _ in images])
    true = np.concatenate([mask.ravel() for _, mask in images])
    results = {name: value.item() for name, value in {**pooled.compute(), **rate.compute()}.items()}
    assert close(results["dice_pooled"], sklearn.metrics.f1_score(true, found))
    assert close(results["iou_pooled"], sklearn.metrics.jaccard_score(true, found))
    assert close(results["ber"], 100 * (1 - sklearn.metrics.balanced_accuracy_score(true, found)))
    assert not close(results["ber"], np.mean([ber(prob, mask) for prob, mask in images]))


def test_pooled_scores_of_nothing_in_nothing_are_perfect() -> None:
    prob, mask = CASES["empty mask, nothing found"]
    assert feed(Pooled(), prob, mask) == {"dice_pooled": 1, "iou_pooled": 1}
    assert feed(BalancedErrorRate(), prob, mask) == {"ber": 0}


def outline(region: NDArray[np.bool_]) -> NDArray[np.intp]:
    return np.argwhere(region & ~ndimage.binary_erosion(region))


@each_case
def test_distances_of_outlines_equal_brute_force(case: str) -> None:
    """Each outline pixel against each of the other's; erosion and distances by scipy."""
    prob, mask = CASES[case]
    one, other = outline(prob >= 128), outline(mask)
    diagonal = float(np.hypot(*mask.shape))
    if len(one) == 0 or len(other) == 0:
        same = len(one) == len(other)
        assert hd95(prob, mask) == (0 if same else diagonal)
        assert boundary_f(prob, mask) == same
        return
    table = cdist(one, other)
    there, back = table.min(axis=1), table.min(axis=0)
    assert close(hd95(prob, mask), max(np.percentile(there, 95), np.percentile(back, 95)))
    tolerance = max(1, 0.0075 * diagonal)
    precision, recall = (there <= tolerance).mean(), (back <= tolerance).mean()
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0
    assert close(boundary_f(prob, mask), f1)


def test_a_shifted_square_is_as_far_as_it_was_shifted() -> None:
    mask = np.zeros((60, 60), bool)
    mask[10:30, 10:30] = True
    prob = np.roll(mask, 7, axis=1).astype(np.uint8) * 255
    assert hd95(prob, mask) == 7


@pytest.mark.parametrize("buffer", [0, 1, 3, 4.5])
@each_case
def test_relaxed_scores_equal_brute_force(case: str, buffer: float) -> None:
    prob, mask = CASES[case]
    one, other = np.argwhere(prob >= 128), np.argwhere(mask)
    table = cdist(one, other) if len(one) and len(other) else np.full((len(one), len(other)), np.inf)
    near = table <= buffer
    precision = near.any(axis=1).mean() if len(one) else 1
    recall = near.any(axis=0).mean() if len(other) else 1
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0
    found = feed(Relaxed(buffer), prob, mask)
    expected = {"relaxed_precision": precision, "relaxed_recall": recall, "relaxed_f1": f1}
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_class_scores_equal_scikit_learn(seed: int) -> None:
    classes, prob, mask = random_classes(seed)
    values = ClassScores(CLASS_NAMES)(*map(torch.from_numpy, (classes, prob, mask)))
    valid = mask != IGNORED
    true, found = mask[valid], classes[valid]
    ids = range(len(CLASS_NAMES))
    assert np.array_equal(
        values["confusion"].numpy(), sklearn.metrics.confusion_matrix(true, found, labels=ids)
    )
    there = [i for i in ids if i in true or i in found]
    ious = sklearn.metrics.jaccard_score(true, found, labels=there, average=None)
    assert close(values["miou"].item(), ious.mean())
    assert close(values["iou_open_water"].item(), ious[1])
    assert values["iou_roof"].isnan().item() == (3 not in there)
    assert close(values["accuracy"].item(), sklearn.metrics.accuracy_score(true, found))
    recalls = sklearn.metrics.recall_score(true, found, labels=np.unique(true), average=None)
    assert close(values["mean_accuracy"].item(), recalls.mean())


def test_class_scores_of_ignored_pixels_alone_are_no_numbers() -> None:
    classes = torch.zeros(4, 4, dtype=torch.uint8)
    values = ClassScores(CLASS_NAMES)(classes, classes, classes + IGNORED)
    assert all(value.isnan() for value in values.values() if value.ndim == 0)
    assert values["confusion"].sum() == 0


@pytest.mark.parametrize("num_bins", [7, 13, 16])
@pytest.mark.parametrize("seed", range(3))
def test_calibration_error_equals_torchmetrics(seed: int, num_bins: int) -> None:
    """But for probabilities of exactly 1, which torchmetrics puts into a bin of their own."""
    classes, prob, mask = random_classes(seed)
    tensors = [torch.from_numpy(part) for part in (classes, prob, mask)]
    found = Calibration(CLASS_NAMES, num_bins)(*tensors)["ece"].item()
    valid = tensors[2] != IGNORED
    sure = tensors[1][valid].double()[:, None] / 255
    probs = ((1 - sure) / 4).repeat(
        1, 5
    )  # the rest is spread evenly, so that the class found stays the likeliest
    probs.scatter_(1, tensors[0][valid].long()[:, None], sure)
    expected = multiclass_calibration_error(probs, tensors[2][valid].long(), 5, num_bins)
    assert close(found, expected.item())
    prob, mask_ = random_image(seed)
    prob = prob.clip(0, 254)
    expected = binary_calibration_error(
        torch.from_numpy(prob / 255), torch.from_numpy(mask_.astype(np.int64)), num_bins
    )
    assert close(feed(Calibration(num_bins=num_bins), prob, mask_)["ece"], expected.item())


@each_case
def test_calibration_error_equals_its_definition(case: str) -> None:
    prob, mask = CASES[case]
    sure = prob.ravel() / 255
    bins = np.minimum(prob.ravel().astype(int) * 10 // 255, 9)
    expected = sum(
        (bins == b).mean() * abs(sure[bins == b].mean() - mask.ravel()[bins == b].mean())
        for b in np.unique(bins)
    )
    assert close(feed(Calibration(num_bins=10), prob, mask)["ece"], expected)


def test_reliability_is_the_identity_where_probabilities_are_shares() -> None:
    rng = np.random.default_rng(0)
    prob = rng.integers(0, 256, (400, 400), np.uint8)
    values = Calibration()(
        *map(torch.from_numpy, (prob, prob, (rng.random(prob.shape) < prob / 255).astype(np.uint8)))
    )
    confidence, correct, share = values["reliability"].numpy()
    assert np.allclose(confidence, correct, atol=0.03)
    assert share.sum() == pytest.approx(1)
    assert values["ece"] < 0.01


@pytest.mark.parametrize("corner", [(0, 0), (0, -1), (-1, 0), (-1, -1)])
def test_s_measure_of_a_pixel_is_the_same_number_in_every_corner(corner: tuple[int, int]) -> None:
    mask = np.zeros((24, 30), bool)
    mask[corner] = True
    perfect, opposite = mask.astype(np.uint8) * 255, mask[::-1, ::-1].astype(np.uint8) * 255
    assert s_measure(perfect, mask) > 0.9
    assert 0 <= s_measure(opposite, mask) < 0.7


@pytest.mark.parametrize("slope", [(1, 1), (1, -1), (2, 1), (1, 3)])
@pytest.mark.parametrize("length", [2, 3, 7])
def test_context_measure_of_a_slanting_line_is_a_share(slope: tuple[int, int], length: int) -> None:
    """Its covariance is singular, or less than that by rounding."""
    mask = np.zeros((40, 50), bool)
    steps = np.arange(length)
    mask[3 + slope[0] * steps, 25 + slope[1] * steps] = True
    perfect = context_measure(mask.astype(np.uint8) * 255, mask)
    assert 0 < context_measure(random_image(0, 40, 50)[0], mask) < perfect <= 1.01


def test_saliency_scores_stretch_the_map_as_the_field_does() -> None:
    prob, mask = random_image(1)
    faint = (prob // 4).astype(np.uint8)
    stretched = (faint - faint.min()) / (faint.max() - faint.min())
    assert mae(faint, mask) == pytest.approx(np.abs(stretched - mask).mean())
    assert dice(faint, mask) == 0  # the overlap takes probabilities at their word


def test_best_threshold_is_that_of_the_mean_curve_not_of_each_image() -> None:
    metric, own = FMeasure(), []
    for seed in range(4):
        prob, mask = random_image(seed)
        own.append(feed(metric, (prob // (seed + 1)).astype(np.uint8), mask)["f_measure_max"])
    assert metric.compute()["f_measure_max"].item() < np.mean(own)


@pytest.mark.parametrize("name", FILES)
def test_scores_do_not_depend_on_how_images_are_split(name: str) -> None:
    """Over two parts, as over two ranks, whose states are added up."""
    whole, parts = collection(name), (collection(name), collection(name))
    for index, image in enumerate(images_for(name)):
        tensors = [torch.from_numpy(part) for part in image]
        own = scalars(whole(*tensors))
        assert scalars(parts[index % 2](*tensors)) == pytest.approx(own, nan_ok=True)
    for key, metric in parts[0].items():
        other = parts[1][key]
        assert isinstance(metric, Sums)
        assert isinstance(other, Sums)
        metric.total += other.total
        metric.count += other.count
        metric._computed = None
        assert all(reduce.__name__ == "dim_zero_sum" for reduce in metric._reductions.values())
    expected = scalars(whole.compute())
    assert scalars(parts[0].compute()) == pytest.approx(expected, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("name", FILES)
def test_memory_does_not_grow_with_the_images(name: str) -> None:
    scores = collection(name)
    before = [metric.total.numel() + metric.count.numel() for metric in scores.values()]
    for image in images_for(name):
        scores(*map(torch.from_numpy, image))
    assert [metric.total.numel() + metric.count.numel() for metric in scores.values()] == before
    assert all(
        not isinstance(state, list) for metric in scores.values() for state in metric.metric_state.values()
    )


@pytest.mark.parametrize("name", FILES)
def test_scores_have_the_names_they_announce(name: str) -> None:
    scores = collection(name)
    image = [torch.from_numpy(part) for part in images_for(name)[0]]
    assert set(scalars(scores(*image))) == set(scores.names)
    cloned = scores.clone(prefix="val/")
    assert isinstance(cloned, Scores)
    assert cloned.primary in cloned.names
    assert set(scalars(cloned(*image))) == {f"val/{each}" for each in scores.names}


@pytest.mark.parametrize("name", FILES)
def test_a_validation_computes_the_primary_score_and_those_asked_for(name: str) -> None:
    scores = collection(name)
    chosen = scores.for_validation()
    assert {scores.primary, *scores.validated} <= set(chosen.names)
    for metric in chosen.values():
        assert isinstance(metric, Sums)
        assert scores.validated & set(metric.names), "nothing else is computed"
    image = [torch.from_numpy(part) for part in images_for(name)[0]]
    every = scalars(scores(*image))
    own = {key: every[key] for key in chosen.names}
    assert scalars(chosen(*image)) == pytest.approx(own, nan_ok=True)
    assert len(own) < len(every)


def test_cldice_counts_centrelines_and_not_widths() -> None:
    mask, thick, half, wrong = (np.zeros((40, 100), bool) for _ in range(4))
    mask[19:22, 10:90] = True
    thick[16:25, 7:93] = True
    half[19:22, 10:50] = True
    wrong[30:33, 10:90] = True
    assert cldice(mask * np.uint8(255), mask) == 1
    assert cldice(thick * np.uint8(255), mask) == pytest.approx(1, abs=0.05)
    assert cldice(half * np.uint8(255), mask) == pytest.approx(2 / 3, abs=0.02)  # precise, half is found
    both = mask | wrong
    assert cldice(both * np.uint8(255), mask) == pytest.approx(2 / 3, abs=0.02)  # all is found, half is wrong
    assert cldice(wrong * np.uint8(255), mask) == 0


def test_cldice_of_nothing() -> None:
    nothing, something = np.zeros((9, 9), bool), np.eye(9, dtype=bool)
    assert cldice(nothing * np.uint8(255), nothing) == 1
    assert cldice(something * np.uint8(255), nothing) == 0
    assert cldice(nothing * np.uint8(255), something) == 0


def test_no_image_gives_no_number() -> None:
    for metric in (
        ImageMean("dice", dice),
        Pooled(),
        BalancedErrorRate(),
        Relaxed(),
        EMeasure(),
        Calibration(),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torchmetrics', that nothing was added
            values = metric.compute()
        assert all(value.isnan() for value in values.values() if value.ndim == 0), type(metric)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": {"dice": "convlora.metrics.overlap.dcie"}}, r"scores\.dice: there is no convlora.*dcie"),
        (
            {"scores": {"relaxed": "convlora.metrics.roads.Relaxed", "relaxd": {"buffer": 3}}},
            r"^metrics\.scores\.relaxd={'buffer': 3} is no score; did you mean metrics\.scores\.relaxed\?",
        ),
        ({"scores": {"dice": "pathlib.Path"}}, r"scores\.dice: pathlib\.Path is no score"),
        (
            {"scores": dict.fromkeys(("a", "b"), "convlora.metrics.overlap.Pooled")},
            r"metrics\.scores gives dice_pooled, iou_pooled twice",
        ),
        ({"primary": "iou"}, r"metrics\.primary=iou is not one of dice"),
        ({"validate": ["iou"]}, r"metrics\.validate: iou is not one of dice"),
        ({"mode": "best"}, r"metrics\.mode=best must be min or max"),
        ({"class_names": ["a", "b"]}, r"scores\.dice is for a foreground, but .* 2 classes \(a, b\)"),
        ({"scores": {"classes": "convlora.metrics.classes.ClassScores"}, "class_names": ["a"]},
         r"scores\.classes is for several classes.*set metrics=binary"),
    ],
)  # fmt: skip
def test_mistakes_in_the_configuration_are_named(changes: dict, message: str) -> None:  # type: ignore[type-arg]
    settings = {
        "primary": "dice",
        "mode": "max",
        "scores": {"dice": "convlora.metrics.overlap.dice"},
    } | changes
    with pytest.raises(ValueError, match=message):
        Scores(**settings)


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    together(score_share, tmp_path)
    for name in FILES:
        alone, images = collection(name), images_for(name)
        assert len(images) % 2 == 1
        for image in images:
            alone.update(*map(torch.from_numpy, image))
        expected = dict(alone.compute())
        for rank in range(2):
            found = torch.load(tmp_path / f"{rank}.pt")[name]
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-12, equal_nan=True, msg=key)
