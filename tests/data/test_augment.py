"""The augmentations of conf/augment move image and mask together and invent no labels."""

from random import Random

import albumentations as A
import cv2
import numpy as np
import pytest
import yaml
from conftest import ROOT
from numpy.typing import NDArray

from convlora import IGNORED
from convlora.schema import make

FILES = sorted(path.stem for path in (ROOT / "conf/augment").glob("*.yaml"))
GREY = 60  # by which class ids become an image


def build(name: str, still: bool = False) -> A.Compose:
    augment: A.Compose = make("augment", yaml.safe_load((ROOT / f"conf/augment/{name}.yaml").read_text()))
    if still:  # geometry alone
        return A.Compose([step for step in augment.transforms if isinstance(step, A.DualTransform)])
    return augment


def blocks() -> NDArray[np.uint8]:
    ids = np.random.default_rng(0).integers(0, 4, (5, 6), np.uint8)
    return ids.repeat(30, axis=0).repeat(31, axis=1)


def draws(
    augment: A.Compose, image: NDArray[np.uint8], mask: NDArray[np.uint8]
) -> list[dict[str, NDArray[np.uint8]]]:
    found = []
    for seed in range(40):
        augment.set_random_state(np.random.default_rng(seed), Random(seed))
        found.append(augment(image=image, mask=mask))
    return found


def away_from_edges(mask: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Two pixels at least, so that interpolation between classes is left out."""
    around = np.ones((5, 5), np.uint8)
    same = (cv2.erode(mask, around) == mask) & (cv2.dilate(mask, around) == mask)
    same[:2] = same[-2:] = same[:, :2] = same[:, -2:] = False
    return np.asarray(same)


@pytest.mark.parametrize("name", FILES)
def test_image_and_mask_stay_on_each_other(name: str) -> None:
    """An image drawn from its mask still is, but within two pixels of an edge, where it is interpolated."""
    ids = blocks()
    image = np.repeat((ids * GREY)[..., None], 3, axis=2)
    for out in draws(build(name, still=True), image, ids):
        mask = out["mask"]
        inside = away_from_edges(mask) & (mask != IGNORED)
        assert inside.mean() > 0.3
        assert np.array_equal(out["image"][inside][:, 0], mask[inside] * GREY)


@pytest.mark.parametrize("name", FILES)
def test_masks_keep_to_their_classes_and_ignored_pixels(name: str) -> None:
    ids = blocks()
    ids[:40, :40] = IGNORED
    image = np.full((*ids.shape, 3), 128, np.uint8)
    for out in draws(build(name), image, ids):
        assert out["mask"].dtype == np.uint8
        assert set(np.unique(out["mask"])) <= {0, 1, 2, 3, IGNORED}
        assert out["image"].shape[:2] == out["mask"].shape == ids.shape


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("strong")])
def test_what_comes_from_beyond_the_border_is_ignored(name: str) -> None:
    ids = np.zeros((120, 150), np.uint8)
    image = np.full((*ids.shape, 3), 250, np.uint8)
    beyond = 0
    for out in draws(build(name, still=True), image, ids):
        inside = out["mask"] != IGNORED
        beyond += int((~inside).sum())
        assert (out["image"][inside & away_from_edges(out["mask"])] == 250).all()
    assert beyond > 0


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("strong")])
def test_strong_augmentations_change_what_an_image_looks_like(name: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    found = draws(build(name), image, np.zeros((60, 60), np.uint8))
    assert len({out["image"].tobytes() for out in found}) > 35
