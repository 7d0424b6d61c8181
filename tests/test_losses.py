from functools import cache

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from composed import names
from conftest import ROOT, golden
from numpy.typing import NDArray
from scipy import ndimage
from skimage.morphology import skeletonize
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from convlora import IGNORED
from convlora.losses import (
    NEIGHBOURHOOD,
    BalancedBceLoss,
    BceDiceLoss,
    CrossEntropyDiceLoss,
    FocalDiceLoss,
    SoftClDiceLoss,
    StructureLoss,
    Weighted,
    balanced,
    local_mean,
    soft_skeleton,
    takes_outputs,
)
from convlora.metrics.roads import cldice
from convlora.schema import make
from convlora.set_loss import SetLoss


def build(name: str) -> nn.Module:
    loss: nn.Module = make("loss", yaml.safe_load((ROOT / f"conf/loss/{name}.yaml").read_text()))
    return loss


OF_LOGITS = [name for name in names("loss") if not takes_outputs(build(name))]
each_loss = pytest.mark.parametrize("name", OF_LOGITS)


@cache
def is_of_several(name: str) -> bool:
    """Whether a loss is for several classes and not for a foreground."""
    try:
        build(name)(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.uint8))
    except ValueError:
        return True
    return False


def sample(name: str, seed: int = 0, n: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    classes = 4 if is_of_several(name) else 1
    logits = torch.randn(n, classes, 40, 33, generator=generator)
    masks = torch.randint(
        0, max(2, classes - 1), (n, 1, 8, 11), generator=generator
    )  # one class is in no mask
    return logits, F.interpolate(masks.to(torch.uint8), (40, 33))


def sure(name: str, masks: Tensor) -> Tensor:
    """Logits that say what the masks do."""
    if is_of_several(name):
        return 60 * F.one_hot(masks[:, 0].long(), 4).movedim(-1, 1).float()
    return 60 * (masks.float() - 0.5)


@pytest.mark.parametrize(("boundary_weighted", "name"), [(True, "as_published"), (False, "as_released")])
def test_structure_loss_equals_reference(boundary_weighted: bool, name: str) -> None:
    arrays = {key: torch.from_numpy(value) for key, value in golden("structure_loss.npz").items()}
    found = StructureLoss(boundary_weighted)(arrays["logits"], arrays["mask"])
    torch.testing.assert_close(found, arrays[name], rtol=0, atol=1e-5)


def soft_dice(probs: Tensor, target: Tensor) -> Tensor:
    """Of one image."""
    return 1 - (2 * (probs * target).sum() + 1) / (probs.sum() + target.sum() + 1)


def test_bce_dice_equals_its_parts() -> None:
    logits, masks = sample("bce_dice")
    target = masks.float()
    dice = [soft_dice(torch.sigmoid(x), t) for x, t in zip(logits, target, strict=True)]
    expected = F.binary_cross_entropy_with_logits(logits, target) + torch.stack(dice).mean()
    torch.testing.assert_close(BceDiceLoss()(logits, masks), expected)


@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (0.0, 0.5), (3.5, 0.9)])
def test_focal_dice_equals_torchvision_and_dice(gamma: float, alpha: float) -> None:
    logits, masks = sample("focal_dice")
    target = masks.float()
    dice = [soft_dice(torch.sigmoid(x), t) for x, t in zip(logits, target, strict=True)]
    expected = sigmoid_focal_loss(logits, target, alpha, gamma, "mean") + torch.stack(dice).mean()
    torch.testing.assert_close(FocalDiceLoss(gamma, alpha)(logits, masks), expected)


@pytest.mark.parametrize(("gamma", "alpha"), [(-1.0, 0.25), (2.0, 1.5)])
def test_focal_parameters_out_of_range_are_refused(gamma: float, alpha: float) -> None:
    with pytest.raises(ValueError, match=rf"loss\.gamma={gamma} .* loss\.alpha={alpha}"):
        FocalDiceLoss(gamma, alpha)


def test_balanced_bce_equals_the_released_formula() -> None:
    """Image by image: the background's weight times PyTorch's loss with the ratio of both as `pos_weight`."""
    logits, masks = sample("balanced_bce")
    images = []
    for x, target in zip(logits, masks.float(), strict=True):
        positive, negative = target.sum(), (1 - target).sum()
        weighted = F.binary_cross_entropy_with_logits(x, target, pos_weight=negative / positive)
        images.append(positive / (positive + negative) * weighted)
    torch.testing.assert_close(BalancedBceLoss()(logits, masks), torch.stack(images).mean())


def test_balanced_bce_equals_the_weights_of_hed() -> None:
    """One pixel of shadow against three."""
    masks = torch.tensor([[[[1, 0], [0, 0]]]], dtype=torch.uint8)
    logits = torch.tensor([[[[0.3, -1.0], [2.0, 0.5]]]])
    each = F.binary_cross_entropy_with_logits(logits, masks.float(), reduction="none")[0, 0]
    expected = (0.75 * each[0, 0] + 0.25 * (each[0, 1] + each[1, 0] + each[1, 1])) / 4
    torch.testing.assert_close(BalancedBceLoss()(logits, masks), expected)


@pytest.mark.parametrize("value", [0, 1])
def test_balanced_bce_of_one_kind_of_pixels_is_nothing(value: int) -> None:
    logits, masks = sample("balanced_bce")
    assert BalancedBceLoss()(logits, torch.full_like(masks, value)) == 0


def test_cross_entropy_dice_equals_pytorch_and_dice_over_the_classes_there() -> None:
    logits, masks = sample("cross_entropy_dice")
    masks[0, 0, :5] = IGNORED
    images = []
    for x, m in zip(logits, masks[:, 0].long(), strict=True):
        valid = m != IGNORED
        probs = torch.softmax(x, 0)[:, valid]
        dice = [soft_dice(probs[c], (m[valid] == c).float()) for c in m[valid].unique().tolist()]
        entropy = F.cross_entropy(x[None], m[None], ignore_index=IGNORED)
        images.append(entropy + torch.stack(dice).mean())
    torch.testing.assert_close(CrossEntropyDiceLoss()(logits, masks), torch.stack(images).mean())


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0, 1.0], [0.5, 3.0, 0.0, 7.0]])
def test_class_weights_are_those_of_pytorchs_cross_entropy(weights: list[float]) -> None:
    """Image by image; the Dice loss has none."""
    logits, masks = sample("cross_entropy_dice")
    masks[0, 0, :5] = IGNORED
    dice = CrossEntropyDiceLoss()(logits, masks) - mean_cross_entropy(logits, masks, [1.0] * 4)
    found = CrossEntropyDiceLoss(weights)(logits, masks) - dice
    torch.testing.assert_close(found, mean_cross_entropy(logits, masks, weights))


def mean_cross_entropy(logits: Tensor, masks: Tensor, weights: list[float]) -> Tensor:
    weight = torch.tensor(weights)
    images = zip(logits, masks.long(), strict=True)
    each = [F.cross_entropy(x[None], m, weight=weight, ignore_index=IGNORED) for x, m in images]
    return torch.stack(each).mean()


def test_balanced_weights_are_the_median_share_over_each_classs_own() -> None:
    loss, logits = CrossEntropyDiceLoss("balanced"), sample("cross_entropy_dice")
    assert balanced(loss) == [loss]
    torch.testing.assert_close(loss(*logits), CrossEntropyDiceLoss()(*logits))  # until they are known
    loss.balance([0.5, 0.1, 0.0, 0.2])
    torch.testing.assert_close(loss.weights_of(4, torch.device("cpu")), torch.tensor([0.4, 2.0, 1.0, 1.0]))
    assert loss.told(["sky", "sea", "sand", "sun"]) == "sky 0.4, sea 2, sand 1, sun 1"
    torch.testing.assert_close(loss(*logits), CrossEntropyDiceLoss([0.4, 2.0, 1.0, 1.0])(*logits))
    other = CrossEntropyDiceLoss([1.0, 2.0])
    assert balanced(other) == balanced(BceDiceLoss()) == []
    assert balanced(Weighted({"a": other, "b": loss}, {"a": 1, "b": 1})) == [loss]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, -1.0], r"loss.class_weights=\[1.0, -1.0\] must be numbers of at least 0"),
        ([0.0, 0.0], r"loss.class_weights=\[0.0, 0.0\] weigh nothing; set one to more than 0"),
        ([1.0, 2.0], r"loss.class_weights=\[1.0, 2.0\] are 2 numbers for 4 classes; give one for each"),
    ],
)
def test_impossible_class_weights_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossEntropyDiceLoss(weights)(*sample("cross_entropy_dice"))


@each_loss
def test_loss_vanishes_for_a_sure_and_right_prediction(name: str) -> None:
    _, masks = sample(name)
    assert build(name)(sure(name, masks), masks) < 1e-6


@each_loss
def test_loss_is_the_mean_over_images(name: str) -> None:
    logits, masks = sample(name)
    loss = build(name)
    each = [loss(logits[i : i + 1], masks[i : i + 1]) for i in range(len(logits))]
    torch.testing.assert_close(loss(logits, masks), torch.stack(each).mean())


@each_loss
def test_ignored_pixels_count_for_nothing(name: str) -> None:
    """They have no gradient, and neither their logits nor, far enough away, their number matter."""
    logits, masks = sample(name)
    masks[:, :, 30:] = IGNORED
    loss = build(name)
    logits.requires_grad_()
    loss(logits, masks).backward()
    assert logits.grad is not None
    assert (logits.grad[:, :, 30:] == 0).all()
    assert (logits.grad[:, :, :30] != 0).any()
    other = logits.detach().clone()
    other[:, :, 30:] += 100
    torch.testing.assert_close(loss(other, masks), loss(logits, masks).detach())
    looks_beyond = (StructureLoss, SoftClDiceLoss)  # by weights and skeletons
    if not any(isinstance(part, looks_beyond) for part in loss.modules()):
        cropped = loss(logits[:, :, :30], masks[:, :, :30])
        torch.testing.assert_close(loss(logits, masks), cropped)


@each_loss
@pytest.mark.parametrize("value", [0, 1, IGNORED])
def test_degenerate_masks_give_finite_losses_and_gradients(name: str, value: int) -> None:
    logits, masks = sample(name)
    logits.requires_grad_()
    found = build(name)(logits, torch.full_like(masks, value))
    found.backward()
    assert logits.grad is not None
    assert torch.isfinite(found)
    assert torch.isfinite(logits.grad).all()
    if value == IGNORED:
        assert found == 0
        assert (logits.grad == 0).all()


@each_loss
def test_loss_is_computed_in_full_precision(name: str) -> None:
    logits, masks = sample(name)
    big = F.interpolate(logits, (512, 512)).half()  # whose sums overflow half precision
    found = build(name)(big, F.interpolate(masks, (512, 512)))
    assert found.dtype == torch.float32
    assert torch.isfinite(found)


@each_loss
def test_wrong_number_of_classes_is_named_with_the_way_out(name: str) -> None:
    other = "structure" if is_of_several(name) else "cross_entropy_dice"
    with pytest.raises(ValueError, match=f"set loss={other}"):
        build(name)(*sample(other))


@pytest.mark.parametrize("boundary_weighted", [True, False])
def test_structure_loss_sees_no_boundary_at_ignored_pixels(boundary_weighted: bool) -> None:
    """A full mask whose lower half is ignored costs what a full mask of the upper half's weights does."""
    logits, masks = torch.randn(1, 1, 80, 60), torch.ones(1, 1, 80, 60, dtype=torch.uint8)
    masks[:, :, 40:] = IGNORED
    loss = StructureLoss(boundary_weighted)
    weights = 1 + 5 * (local_mean(torch.ones(1, 1, 80, 60, dtype=torch.bool)) - 1).abs()[:, :, :40]
    upper = logits[:, :, :40]
    entropy = F.binary_cross_entropy_with_logits(upper, torch.ones_like(upper), reduction="none")
    probs = torch.sigmoid(upper)
    expected = (weights * entropy).sum() / weights.sum() if boundary_weighted else entropy.mean()
    overlap, total = (weights * probs).sum(), (weights * (probs + 1)).sum()
    expected = expected + 1 - (overlap + 1) / (total - overlap + 1)
    torch.testing.assert_close(loss(logits, masks), expected)


def test_structure_loss_of_an_empty_mask_falls_with_the_false_area() -> None:
    mask = torch.zeros(1, 1, 40, 40)
    quiet, loud = torch.full_like(mask, -8), torch.full_like(mask, -8)
    loud[..., :20, :] = 8
    assert StructureLoss()(quiet, mask) < 0.5 < StructureLoss()(loud, mask)


@pytest.mark.parametrize("size", [(37, 50), (8, 40), (1, 1)])
def test_local_mean_equals_the_square_window(size: tuple[int, int]) -> None:
    masks = torch.rand(2, 3, *size) > 0.5
    half = NEIGHBOURHOOD // 2
    expected = torch.nn.functional.avg_pool2d(masks.float(), NEIGHBOURHOOD, stride=1, padding=half)
    torch.testing.assert_close(local_mean(masks), expected)


def lines(seed: int) -> NDArray[np.uint8]:
    """Thin crossing curves [120, 120] of 1."""
    rng, image = np.random.default_rng(seed), np.zeros((120, 120), np.uint8)
    for _ in range(3):
        points = rng.integers(10, 110, (4, 2)).astype(np.int32)
        cv2.polylines(image, [points.reshape(-1, 1, 2)], False, 1, thickness=int(rng.integers(3, 8)))
    return image


@pytest.mark.parametrize("seed", range(4))
def test_soft_skeleton_of_a_mask_is_its_morphological_one(seed: int) -> None:
    """The union of what the openings of its erosions leave over, by scipy."""
    mask = lines(seed) > 0
    expected, eroded = np.zeros_like(mask), mask
    while eroded.any():
        smaller = ndimage.binary_erosion(eroded, border_value=1)
        opened = ndimage.binary_dilation(smaller, np.ones((3, 3)))
        expected |= eroded & ~opened
        eroded = smaller
    found = soft_skeleton(torch.from_numpy(mask).float()[None, None], iterations=10)[0, 0].numpy()
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("seed", range(4))
def test_soft_skeleton_runs_along_the_thinned_one(seed: int) -> None:
    """It is near skimage's skeleton everywhere, and the reverse."""
    mask = lines(seed)
    soft = soft_skeleton(torch.from_numpy(mask).float()[None, None], iterations=10)[0, 0].numpy() > 0
    thin = skeletonize(mask > 0)
    for one, other in ((soft, thin), (thin, soft)):
        assert (ndimage.distance_transform_edt(~other)[one] <= 2.3).mean() > 0.95


def test_soft_skeleton_of_probabilities_equals_the_published_algorithm() -> None:
    """Algorithm 1, by scipy's grey morphology."""
    probs = ndimage.gaussian_filter(np.random.default_rng(0).random((50, 60)), 1.5)
    probs = (probs - probs.min()) / np.ptp(probs)
    cross, square = ndimage.generate_binary_structure(2, 1), np.ones((3, 3), bool)

    def erode(image: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(ndimage.grey_erosion(image, footprint=cross, mode="constant", cval=np.inf))

    def ridge(image: NDArray[np.float64]) -> NDArray[np.float64]:
        opened = ndimage.grey_dilation(erode(image), footprint=square, mode="constant", cval=-np.inf)
        return np.maximum(image - opened, 0)

    image, expected = probs, ridge(probs)
    for _ in range(4):
        image = erode(image)
        expected = expected + np.maximum(ridge(image) - expected * ridge(image), 0)
    found = soft_skeleton(torch.from_numpy(probs)[None, None], iterations=4)[0, 0].numpy()
    assert np.abs(found - expected).max() < 1e-12


def test_soft_cldice_is_that_of_the_skeletons() -> None:
    """For sure predictions it is close to one minus the score, which takes skimage's skeletons."""
    for seed in range(3):
        mask, found = lines(seed), np.roll(lines(seed), 2, axis=0)
        found[:, 60:] = 0
        loss = SoftClDiceLoss(10)(
            60 * (torch.from_numpy(found).float() - 0.5)[None, None], torch.from_numpy(mask)[None, None]
        )
        assert 1 - loss == pytest.approx(cldice(found * np.uint8(255), mask > 0), abs=0.1)
        assert 0.1 < loss < 0.9


def test_soft_cldice_misses_a_gap_more_than_a_thick_line() -> None:
    mask = torch.zeros(1, 1, 60, 60, dtype=torch.uint8)
    mask[..., 28:31, 5:55] = 1
    broken, thick = mask.clone(), mask.clone()
    broken[..., 25:35] = 0
    thick[..., 26:33, 5:55] = 1
    loss = SoftClDiceLoss(10)
    assert loss(60 * (thick.float() - 0.5), mask) < 0.1 < loss(60 * (broken.float() - 0.5), mask)


def test_weighted_sums_its_terms_by_name() -> None:
    logits, masks = sample("bce_dice")
    bce, cldice_term = BceDiceLoss(), SoftClDiceLoss(3)
    loss = Weighted({"a": bce, "b": cldice_term}, {"b": 0.25, "a": 2.0})
    expected = 2 * bce(logits, masks) + 0.25 * cldice_term(logits, masks)
    torch.testing.assert_close(loss(logits, masks), expected)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, r"loss\.weights has , but loss\.terms a; give each term its weight"),
        ({"a": 1, "b": 1}, r"loss\.weights has a, b, but loss\.terms a"),
        ({"a": -1}, r"loss\.weights\.a=-1 must be a number of at least 0"),
        ({"a": float("nan")}, r"loss\.weights\.a=nan must be a number of at least 0"),
        ({"a": float("inf")}, r"loss\.weights\.a=inf must be a number of at least 0"),
    ],
)
def test_weights_that_fit_no_terms_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Weighted({"a": BceDiceLoss()}, weights)


def test_terms_of_logits_and_of_the_heads_outputs_do_not_mix() -> None:
    terms, weights = {"set": SetLoss(), "entropy": CrossEntropyDiceLoss()}, {"set": 1.0, "entropy": 1.0}
    with pytest.raises(
        ValueError, match=r"outputs \(set\) and of logits \(entropy\), .*; leave out those of"
    ):
        Weighted(terms, weights)
    assert takes_outputs(Weighted({"set": SetLoss()}, {"set": 1}))


def test_soft_skeleton_without_iterations_is_refused() -> None:
    with pytest.raises(ValueError, match="iterations=0 must be at least 1"):
        SoftClDiceLoss(0)
