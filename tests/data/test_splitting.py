"""A split that is drawn once: copies stay together, every part has its share of each class."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from convlora import IGNORED
from convlora.data.check import THUMBNAIL, Facts, group_copies
from convlora.data.splitting import draw_split, label

SHARES = (0.7, 0.1, 0.2)


def many(seed: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Groups of one to four images, and four labels of which the rarest is had by one image in twenty."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(count), rng.integers(1, 5, count))
    labels = rng.random((len(groups), 4)) < [0.05, 0.2, 0.5, 0.9]
    return groups, np.column_stack([labels, ~labels.any(axis=1)])


@pytest.mark.parametrize("seed", range(4))
def test_groups_stay_together_and_each_part_has_its_share_of_every_label(seed: int) -> None:
    groups, labels = many(seed, 150)
    parts = draw_split(groups, labels, SHARES, seed)
    for group in range(150):
        assert len(set(parts[groups == group])) == 1
    for part, share in enumerate(SHARES):
        own = parts == part
        assert own.mean() == pytest.approx(share, abs=0.02)
        # within four images, the largest group, of what its share is of each label
        assert np.abs(labels[own].sum(axis=0) - share * labels.sum(axis=0)).max() <= 6


def test_single_images_of_labels_that_exclude_each_other_are_shared_out_exactly() -> None:
    kinds = np.repeat([0, 1, 2], [10, 30, 60])
    parts = draw_split(np.arange(100), kinds[:, None] == np.arange(3), SHARES, 0)
    found = [[int(((parts == part) & (kinds == kind)).sum()) for kind in range(3)] for part in range(3)]
    assert found == [[7, 21, 42], [1, 3, 6], [2, 6, 12]]


def test_the_seed_alone_decides() -> None:
    groups, labels = many(0, 60)
    first, again, other = (draw_split(groups, labels, SHARES, seed) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("count", [3, 4, 5, 9])
def test_no_part_is_empty_as_long_as_there_are_groups_enough(count: int) -> None:
    for seed in range(5):
        parts = draw_split(np.arange(count), np.ones((count, 1), bool), (0.98, 0.01, 0.01), seed)
        assert set(parts) == {0, 1, 2}
    large = np.repeat([0, 1, 2], [50, 1, 1])
    assert set(draw_split(large, np.ones((52, 1), bool), SHARES, 0)) == {0, 1, 2}


def test_parts_that_lack_alike_are_drawn_between() -> None:
    """Of three images for two halves, the odd one goes now to the one and now to the other."""
    drawn = [draw_split(np.arange(3), np.ones((3, 1), bool), (0.5, 0.5), seed) for seed in range(20)]
    assert {int(parts.sum()) for parts in drawn} == {1, 2}


def facts(seed: int, classes: dict[int, int], bits: int = 0) -> Facts:
    """An image of its own by its seed; `bits` of its perceptual hash are turned."""
    rng = np.random.default_rng(seed)
    counts = np.zeros(IGNORED + 1, np.int64)
    counts[list(classes)] = list(classes.values())
    hashed = rng.random(64) < 0.5
    hashed[:bits] ^= True
    thumbnail = cv2.GaussianBlur(rng.integers(0, 256, (THUMBNAIL, THUMBNAIL, 3), np.uint8), (5, 5), 2)
    return Facts("all", f"{seed}", (60, 40), counts, 0.0, f"{seed} {bits}", hashed, thumbnail)


def test_what_a_chain_of_copies_joins_is_one_group() -> None:
    one, other, third = facts(0, {}), facts(1, {}), facts(2, {})
    near = facts(0, {}, bits=8)
    far = replace(near, content="far", bits=np.concatenate([near.bits[:56], ~near.bits[56:]]))
    groups = group_copies([one, other, near, third, other, far])
    assert groups[0] == groups[2] == groups[5]  # `far` is near to `near` alone
    assert groups[1] == groups[4]
    assert len(set(groups)) == 3


def test_labels_are_the_classes_shown_and_empty_masks() -> None:
    binary = label([facts(0, {0: 9}), facts(1, {0: 5, 1: 4})], ["polyp"])
    assert {name: shown.tolist() for name, shown in binary.items()} == {
        "polyp": [False, True],
        "no foreground": [True, False],
    }
    several = label([facts(0, {0: 9, 2: 1}), facts(1, {IGNORED: 4})], ["land", "road", "roof"])
    assert {name: shown.tolist() for name, shown in several.items()} == {
        "land": [True, False],
        "roof": [True, False],
        "no class": [False, True],
    }
