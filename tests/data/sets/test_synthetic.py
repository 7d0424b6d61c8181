import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from convlora.data.loading import Loading
from convlora.data.module import SPLITS
from convlora.data.sets.synthetic import Synthetic, draw_scene
from convlora.data.transforms import SquareResize

SIZE = 256
Image = NDArray[np.uint8]
Scenes = list[tuple[Image, Image]]


def synthetic(seed: int = 0, scene_seed: int = 0, num_workers: int = 0) -> Synthetic:
    return Synthetic(
        train_size=4,
        val_size=3,
        test_size=5,
        size=64,
        class_names=["object"],
        loading=Loading(SquareResize(64), batch_size=2, num_workers=num_workers, seed=seed),
        scene_seed=scene_seed,
    )


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return [draw_scene(np.random.default_rng([7, index]), SIZE) for index in range(400)]


@pytest.fixture(scope="module")
def with_objects(scenes: Scenes) -> Scenes:
    return [(image, mask) for image, mask in scenes if mask.any()]


def test_scene_depends_only_on_scene_seed_split_and_index() -> None:
    one, other = synthetic(seed=0), synthetic(seed=1)
    for pair in reversed(one.pairs("test")):
        for drawn, again in zip(one.read(pair), other.read(pair), strict=True):
            np.testing.assert_array_equal(drawn, again)


def test_another_scene_seed_draws_other_scenes() -> None:
    one, other = synthetic(scene_seed=0), synthetic(scene_seed=1)
    pair = one.pairs("test")[0]
    assert not np.array_equal(one.read(pair)[0], other.read(pair)[0])


def test_no_two_scenes_of_any_splits_are_equal() -> None:
    data = synthetic()
    images = [data.read(pair)[0].tobytes() for split in SPLITS for pair in data.pairs(split)]
    assert len(set(images)) == len(images) == 4 + 3 + 5


def test_masks_are_0_or_1_at_the_size_of_the_image(scenes: Scenes) -> None:
    for image, mask in scenes:
        assert image.shape == (SIZE, SIZE, 3)
        assert image.dtype == mask.dtype == np.uint8
        assert mask.shape == (SIZE, SIZE)
        assert mask.max() <= 1


def test_object_diameters_span_a_factor_of_30(with_objects: Scenes) -> None:
    diameters = np.array([2 * np.sqrt(mask.sum() / np.pi) / SIZE for _, mask in with_objects])
    assert diameters.max() / diameters.min() > 30
    # of every size there are enough to learn from and to score
    assert (np.histogram(diameters, [0.02, 0.06, 0.15, 0.4, 0.9])[0] > 0.1 * len(diameters)).all()


def test_few_masks_are_empty(scenes: Scenes) -> None:
    assert 0.02 < np.mean([not mask.any() for _, mask in scenes]) < 0.08


def test_some_scenes_have_several_objects(scenes: Scenes) -> None:
    counts = np.array([cv2.connectedComponents(mask)[0] - 1 for _, mask in scenes])
    assert 0.1 < (counts > 1).mean() < 0.4


def test_no_threshold_on_color_finds_the_objects(with_objects: Scenes) -> None:
    # the best channel, threshold and side of it, chosen for each image with its mask in hand
    assert np.mean([best_threshold_dice(image, mask) for image, mask in with_objects]) < 0.3


def test_texture_differs_between_object_and_ground(with_objects: Scenes) -> None:
    large = [(image, mask) for image, mask in with_objects if 0.05 < mask.mean() < 0.6][:100]
    assert np.mean([texture_distance(image, mask) > 3 for image, mask in large]) > 0.95


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loaders_give_the_drawn_scenes(num_workers: int) -> None:
    data = synthetic(num_workers=num_workers)
    data.setup("test")
    masks = [mask.numpy() for batch in data.test_dataloader() for mask in batch.masks]
    for mask, pair in zip(masks, data.pairs("test"), strict=True):
        np.testing.assert_array_equal(mask, data.read(pair)[1])
    data.setup("fit")
    assert sum(len(batch.masks) for batch in data.train_dataloader()) == 4


def best_threshold_dice(image: Image, mask: Image) -> float:
    best = 0.0
    for channel in np.moveaxis(image, -1, 0):
        below = np.bincount(channel.ravel(), minlength=256).cumsum()
        object_below = np.bincount(channel[mask == 1], minlength=256).cumsum()
        area = object_below[-1]
        dark = 2 * object_below / (below + area)
        bright = 2 * (area - object_below) / (below[-1] - below + area)
        best = max(best, dark.max(), bright.max())
    return best


def texture_distance(image: Image, mask: Image) -> float:
    """Largest difference, in octaves, of the energy in any orientation or scale between object and ground."""
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    inside = cv2.erode(mask, np.ones((9, 9), np.uint8), borderValue=0) == 1
    outside = cv2.dilate(mask, np.ones((9, 9), np.uint8)) == 0
    distances = []
    for wavelength in (5, 8, 13):
        for angle in np.linspace(0, np.pi, 4, endpoint=False):
            kernel = cv2.getGaborKernel((25, 25), wavelength / 2, angle, wavelength, 1)
            energy = cv2.filter2D(gray, -1, kernel - kernel.mean()) ** 2
            distances.append(abs(np.log2(energy[inside].mean() / energy[outside].mean())))
    return float(max(distances))


def test_scenes_are_not_kept_in_a_folder() -> None:
    with pytest.raises(
        ValueError, match=r"synthetic: loading\.cache=/tmp/a is for files, .* set ram or null"
    ):
        Synthetic(
            train_size=1,
            val_size=1,
            test_size=1,
            size=64,
            class_names=["object"],
            loading=Loading(cache="/tmp/a"),
        )
