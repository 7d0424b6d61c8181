import albumentations as A
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from convlora.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    LongestSideResize,
    Resize,
    SquareResize,
    eval_transform,
)

RESIZES = {"square": SquareResize, "longest_side": LongestSideResize}
SIZES = [(32, 32), (17, 40), (40, 17), (1, 300), (300, 2), (31, 64), (9, 6), (100, 75), (33, 64)]


def transformed(resize: Resize, height: int, width: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    # white and foreground everywhere: whatever is 0 in the output is padding
    image, mask = np.full((height, width, 3), 255, np.uint8), np.ones((height, width), np.uint8)
    out = eval_transform(resize)(image=image, mask=mask)
    return out["image"], out["mask"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resize", [SquareResize(32), LongestSideResize(32)], ids=["square", "longest_side"])
def test_content_is_exactly_what_the_pixels_show(resize: Resize, size: tuple[int, int]) -> None:
    image, mask = transformed(resize, *size)
    height, width = resize.content(*size)
    expected = np.zeros((32, 32), dtype=bool)
    expected[:height, :width] = True
    assert np.array_equal((image != 0).all(axis=2), expected)
    assert np.array_equal(image.any(axis=2), expected)
    assert np.array_equal(mask == 1, expected)


def test_content_agrees_with_albumentations_at_every_ratio() -> None:
    resize = LongestSideResize(24)
    scale = A.Compose(resize.steps()[:1])
    for side in range(1, 80):
        out = scale(image=np.zeros((side, 79, 3), np.uint8))["image"]
        assert resize.content(side, 79) == out.shape[:2]


def test_longest_side_keeps_the_aspect_ratio_and_square_does_not() -> None:
    assert LongestSideResize(64).content(100, 200) == (32, 64)
    assert SquareResize(64).content(100, 200) == (64, 64)


def test_pixels_are_normalised_by_imagenet_statistics() -> None:
    image = np.full((8, 8, 3), (10, 100, 200), np.uint8)
    out = eval_transform(SquareResize(8))(image=image)["image"]
    expected = (np.array([10, 100, 200]) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    np.testing.assert_allclose(out, np.broadcast_to(expected, out.shape), atol=1e-6)
    assert out.dtype == np.float32


def test_resized_mask_stays_binary_and_centred_on_its_image() -> None:
    mask = np.zeros((90, 90), np.uint8)
    mask[30:60, 30:60] = 1
    out = eval_transform(SquareResize(32))(image=np.zeros((90, 90, 3), np.uint8), mask=mask)["mask"]
    assert set(np.unique(out)) == {0, 1}
    # a symmetric mask stays symmetric; OpenCV's plain nearest mode moves it
    assert np.array_equal(out, out[::-1, ::-1])


def scale(resize: Resize, image: NDArray[np.uint8]) -> NDArray[np.int64]:
    out = A.Compose(resize.steps()[:1])(image=image)["image"]
    assert out.dtype == np.uint8
    return np.asarray(out, np.int64)


@pytest.mark.parametrize("side", [24, 64, 150])
@pytest.mark.parametrize("size", [*SIZES, (352, 283), (1, 1)])
@pytest.mark.parametrize("kind", RESIZES.values(), ids=RESIZES)
def test_images_are_scaled_as_by_pillow(kind: type[SquareResize], size: tuple[int, int], side: int) -> None:
    resize, image = kind(side), np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    height, width = resize.content(*size)
    wide = Image.fromarray(image).resize(
        (width, size[0]), Image.Resampling.BICUBIC
    )  # the order of the passes
    error = np.abs(scale(resize, image) - np.asarray(wide.resize((width, height), Image.Resampling.BICUBIC)))
    assert error.max() <= 2  # each pass rounds
    assert error.mean() < 0.02


@pytest.mark.parametrize("height", [4, 16, 40, 100])
def test_a_ramp_repeats_no_pixels_where_one_side_grows_and_the_other_shrinks(height: int) -> None:
    ramp = np.arange(0, 256, 17, dtype=np.uint8)[None, :, None].repeat(height, axis=0).repeat(3, axis=2)
    for image in (
        scale(SquareResize(64), ramp),
        scale(SquareResize(64), ramp.transpose(1, 0, 2)).swapaxes(0, 1),
    ):
        assert (np.diff(image[:, 2:-2], axis=1) > 0).all()  # at the ends the kernel overshoots and is cut off


@pytest.mark.parametrize("side", [24, 64, 150])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", RESIZES.values(), ids=RESIZES)
def test_flipped_images_are_scaled_to_flipped_ones(
    kind: type[SquareResize], size: tuple[int, int], side: int
) -> None:
    resize, image = kind(side), np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    for axis in (0, 1):
        flipped = np.flip(scale(resize, np.flip(image, axis)), axis)
        np.testing.assert_allclose(flipped, scale(resize, image), atol=1)


@pytest.mark.parametrize("side", [37, 64, 90, 150])
@pytest.mark.parametrize("kind", RESIZES.values(), ids=RESIZES)
def test_edges_of_image_and_mask_stay_together(kind: type[SquareResize], side: int) -> None:
    apart = 0
    for edge in range(30, 61):
        mask = np.zeros((91, 91), np.uint8)
        mask[:edge, edge:] = 1
        image = (mask * np.uint8(255))[..., None].repeat(3, axis=2)
        out = A.Compose(kind(side).steps()[:1])(image=image, mask=mask)
        apart += int(((out["image"][..., 0] > 127) != out["mask"]).sum())
    assert apart <= 3  # corners
