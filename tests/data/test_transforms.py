import albumentations as A
import numpy as np
import pytest
from numpy.typing import NDArray

from convlora.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    LongestSideResize,
    Resize,
    SquareResize,
    eval_transform,
)

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
