import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from convlora import IGNORED
from convlora.data.masks import FEW_VALUES, Masks, read_binary

IDS = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
NAMES = ["land", "water", "road"]
COLORS = [[60, 16, 152], [0, 0, 0], [255, 255, 255]]


def save(path: Path, pixels: NDArray[np.generic]) -> Path:
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("high", [1, 255])
def test_any_binary_coding_gives_the_same_mask(tmp_path: Path, high: int) -> None:
    binary = np.eye(4, dtype=np.uint8)
    coded = binary * np.uint8(high)
    files = [
        save(tmp_path / "grey.png", coded),
        save(tmp_path / "rgb.png", np.dstack([coded] * 3)),
        save(tmp_path / "rgba.png", np.dstack([coded] * 3 + [np.full_like(coded, 255)])),
        save(tmp_path / "bit.png", binary.astype(bool)),
        save(tmp_path / "wide.png", binary.astype(np.uint16) * 65535),
    ]
    for file in files:
        assert np.array_equal(read_binary(file), binary), file.name


def test_palette_mask_is_read_by_index(tmp_path: Path) -> None:
    binary = np.eye(4, dtype=np.uint8)
    image = Image.fromarray(binary).copy()
    image = Image.frombytes("P", image.size, binary.tobytes())
    image.putpalette([255, 255, 0, 0, 0, 128])  # the background is the brighter colour
    image.save(tmp_path / "a.png")
    assert np.array_equal(read_binary(tmp_path / "a.png"), binary)


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (1, 1), (255, 1)])
def test_constant_mask_is_all_background_or_all_foreground(tmp_path: Path, value: int, expected: int) -> None:
    mask = read_binary(save(tmp_path / "a.png", np.full((3, 4), value, dtype=np.uint8)))
    assert np.array_equal(mask, np.full((3, 4), expected))


def test_grey_mask_is_refused_with_its_values_and_the_way_out(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.array([[0, 3, 128, 255]], dtype=np.uint8))
    with pytest.raises(ValueError, match=r"a\.png: .* 0, 3, 128, 255, .*dataset\.threshold=127"):
        read_binary(path)


@pytest.mark.parametrize(
    "values",
    [
        np.array([0, 127], np.uint8),
        np.array([127, 255], np.uint8),
        np.array([254, 255], np.uint8),
        np.array([0, 1, 2], np.uint8),
        np.arange(18, dtype=np.uint8),  # as JPEG leaves a dark foreground
        np.array([0, 128], np.uint16),
        np.array([0, 300], np.uint16),
        np.array([0, 32768], np.uint16),
        np.array([200, 40000, 65535], np.uint16),
        np.array([-7, 3], np.int32),
        np.array([0, 0.5], np.float32),
    ],
    ids=str,
)
def test_the_threshold_that_is_advised_splits_the_mask(tmp_path: Path, values: NDArray[np.generic]) -> None:
    path = save(tmp_path / "a.tif", values[None])
    with pytest.raises(ValueError, match=r"dataset\.threshold=\d+ to take what is brighter") as caught:
        read_binary(path)
    (threshold,) = re.findall(r"dataset\.threshold=(\d+)", str(caught.value))
    mask = Masks(["object"], threshold=int(threshold)).read(path)
    assert mask[0, 0] == 0
    assert mask[0, -1] == 1
    several = 2 < len(values) <= FEW_VALUES
    assert (
        f"if these are {len(values)} classes, name them in dataset.class_names" in str(caught.value)
    ) == several


def test_a_picture_in_grey_is_not_taken_for_classes(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.arange(FEW_VALUES + 1, dtype=np.uint8)[None])
    with pytest.raises(ValueError, match=r"dataset\.threshold=16 to take what is brighter as foreground$"):
        read_binary(path)


@pytest.mark.parametrize(
    "values",
    [
        np.array([127], np.uint8),
        np.array([300, 65535], np.uint16),
        np.array([-9, -2], np.int32),
        np.array([0.2, 0.7], np.float32),
        np.array([0, np.nan], np.float32),
    ],
    ids=str,
)
def test_no_threshold_is_advised_where_none_splits_the_mask(
    tmp_path: Path, values: NDArray[np.generic]
) -> None:
    with pytest.raises(ValueError, match="; save it with 0 for background and 255 for foreground"):
        read_binary(save(tmp_path / "a.tif", values[None]))


def test_1_and_255_are_no_binary_mask(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.array([[1, 255]], dtype=np.uint8))
    with pytest.raises(ValueError, match="the mask has the values 1, 255"):
        read_binary(path)


def test_threshold_takes_what_is_strictly_above(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.array([[0, 127, 128, 255]], dtype=np.uint8))
    assert read_binary(path, threshold=127).tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("threshold", [None, 127])
def test_colour_mask_is_refused(tmp_path: Path, threshold: int | None) -> None:
    path = save(tmp_path / "a.png", np.array([[[255, 0, 0], [0, 0, 0]]], dtype=np.uint8))
    with pytest.raises(ValueError, match=r"a\.png: a colour mask, .* class ids"):
        read_binary(path, threshold)


def test_mask_in_the_alpha_channel_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.array([[[0, 0, 0, 255], [0, 0, 0, 0]]], dtype=np.uint8))
    with pytest.raises(ValueError, match=r"a\.png: the mask differs only in its alpha channel"):
        read_binary(path)


def palette(path: Path, ids: NDArray[np.uint8]) -> Path:
    image = Image.frombytes("P", ids.shape[::-1], ids.tobytes())
    image.putpalette([9, 9, 9, 9, 9, 9, 200, 0, 0])
    image.save(path)
    return path


def test_ids_are_read_from_one_channel_equal_channels_or_a_palette(tmp_path: Path) -> None:
    files = [
        save(tmp_path / "grey.png", IDS),
        save(tmp_path / "wide.png", IDS.astype(np.uint16)),
        save(tmp_path / "rgb.png", np.dstack([IDS] * 3)),
        palette(tmp_path / "palette.png", IDS),
    ]
    for file in files:
        assert np.array_equal(Masks(NAMES).read(file), IDS), file.name


def test_colours_stand_for_their_classes_with_and_without_alpha(tmp_path: Path) -> None:
    coloured = np.array(COLORS, np.uint8)[IDS]
    alpha = np.dstack([coloured, np.full(IDS.shape, 255, np.uint8)])
    for pixels in (coloured, alpha):
        found = Masks(NAMES, class_colors=COLORS).read(save(tmp_path / "a.png", pixels))
        assert np.array_equal(found, IDS)


def test_a_palette_of_the_classes_colours_is_read_by_colour_in_whatever_order(tmp_path: Path) -> None:
    """As image editors reduce a coloured mask."""
    coloured = Image.fromarray(np.array(COLORS, np.uint8)[IDS])
    coloured.quantize(3).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P"
    assert np.array_equal(Masks(NAMES, class_colors=COLORS).read(tmp_path / "a.png"), IDS)


def test_a_binary_palette_the_other_way_round_is_refused(tmp_path: Path) -> None:
    image = Image.frombytes("P", (2, 1), bytes([0, 1]))
    image.putpalette([255, 255, 255, 0, 0, 0])
    image.save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"white at index 0 .* save it as a grey image"):
        read_binary(tmp_path / "a.png")


def test_with_colours_a_single_channel_still_holds_ids(tmp_path: Path) -> None:
    assert np.array_equal(Masks(NAMES, class_colors=COLORS).read(save(tmp_path / "a.png", IDS)), IDS)


def test_ids_of_ones_own_become_consecutive(tmp_path: Path) -> None:
    file = save(tmp_path / "a.png", np.array([7, 40, 3], np.uint8)[IDS])
    assert np.array_equal(Masks(NAMES, class_ids=[7, 40, 3]).read(file), IDS)


@pytest.mark.parametrize("ignore", [9, 255])
def test_ignored_ids_get_the_one_id_that_is_no_class(tmp_path: Path, ignore: int) -> None:
    values = IDS.copy()
    values[0, 0] = ignore
    found = Masks(NAMES, ignore_index=ignore).read(save(tmp_path / "a.png", values))
    assert found[0, 0] == IGNORED
    assert np.array_equal(found[1], IDS[1])


def test_an_ignored_colour_gets_it_too(tmp_path: Path) -> None:
    coloured = np.array(COLORS, np.uint8)[IDS]
    coloured[0, 0] = [1, 2, 3]
    masks = Masks(NAMES, class_colors=COLORS, ignore_index=[1, 2, 3])
    assert masks.read(save(tmp_path / "a.png", coloured))[0, 0] == IGNORED


def test_classes_are_never_guessed(tmp_path: Path) -> None:
    """A mask of the first class alone, and one with an id too many."""
    assert Masks(NAMES).read(save(tmp_path / "a.png", np.zeros((2, 2), np.uint8))).max() == 0
    file = save(tmp_path / "b.png", np.array([[0, 1, 3, 255]], np.uint8))
    with pytest.raises(
        ValueError, match=r"b\.png: the mask has 3, 255, which are none of the 3 classes \(0, 1, 2\)"
    ):
        Masks(NAMES).read(file)


def test_an_unknown_colour_is_named(tmp_path: Path) -> None:
    file = save(tmp_path / "a.png", np.array([[[60, 16, 152], [60, 16, 153]]], np.uint8))
    with pytest.raises(
        ValueError, match=r"the mask has \[60, 16, 153\], which is none of the 3 classes \(\[60, 16"
    ):
        Masks(NAMES, class_colors=COLORS).read(file)


def test_a_colour_mask_without_colours_is_told_the_way_out(tmp_path: Path) -> None:
    file = save(tmp_path / "a.png", np.array(COLORS, np.uint8)[IDS])
    with pytest.raises(
        ValueError, match=r"a colour mask, .* give the classes' colours in dataset\.class_colors"
    ):
        Masks(NAMES).read(file)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_names": []}, r"class_names=\[\]: name 1 to 255 classes"),
        ({"class_names": ["a", "a"]}, "each once"),
        (
            {"class_names": ["a", "b"], "class_ids": [1]},
            r"class_ids=\[1\] has not one value for each of the 2",
        ),
        ({"class_names": ["a", "b"], "class_colors": [[0, 0, 0], [0, 0, 0]]}, "give 2 different ones"),
        (
            {"class_names": ["a", "b"], "class_colors": [[0, 0, 0], [0, 0, 256]]},
            r"\[0, 0, 256\] is no colour",
        ),
        ({"class_names": ["a"], "ignore_index": 255}, r"name the background too, as in \[background, a\]"),
        ({"class_names": ["a"], "class_ids": [1]}, "with one class masks are binary"),
        ({"class_names": ["a"], "threshold": 255}, "threshold=255 must be 0 to 254"),
        ({"class_names": ["a", "b"], "threshold": 127}, "threshold=127 makes binary masks"),
        ({"class_names": ["a", "b"], "ignore_index": 1}, "ignore_index=1 is the id of class b"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        Masks(**settings)
