from colorsys import rgb_to_hsv
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from convlora import IGNORED
from convlora.draw import (
    FALSE,
    MISSED,
    OUTLINE,
    Row,
    add_legend,
    colors_of,
    draw_choices,
    draw_classes,
    draw_confusion,
    draw_contours,
    draw_page,
    draw_reliability,
    draw_sheet,
    error_map,
    paint,
    shrink,
)

COLORS = {"land": [10, 20, 30], "sea": [0, 0, 255], "road": [255, 0, 0]}


def test_error_map_of_a_foreground_marks_missed_and_false_pixels() -> None:
    image = np.full((2, 2, 3), 90, np.uint8)
    mask = np.array([[1, 1], [0, 0]], np.uint8)
    classes = np.array([[1, 0], [1, 0]], np.uint8)
    picture = error_map(image, mask, classes, binary=True)
    assert tuple(picture[0, 1]) == MISSED
    assert tuple(picture[1, 0]) == FALSE
    assert (picture[[0, 1], [0, 1]] == 30).all()


# Machado, Oliveira and Fernandes 2009, severity 1, of linear RGB
SIGHT = {
    "normal": np.eye(3),
    "protanopia": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
    "deuteranopia": [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
    "tritanopia": [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
}


def cielab(colors: ArrayLike, sight: ArrayLike) -> NDArray[np.float64]:
    part = np.asarray(colors) / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.asarray(sight).T, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.moveaxis(np.cbrt(seen @ to_xyz.T / to_xyz.sum(axis=1)), -1, 0)  # but for the darkest colours
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


@pytest.mark.parametrize("sight", SIGHT.values(), ids=SIGHT)
def test_missed_and_false_pixels_are_told_apart_by_any_eyes(sight: ArrayLike) -> None:
    missed, false = cielab([MISSED, FALSE], sight)
    assert np.linalg.norm(missed - false) > 80
    assert abs(missed[0] - false[0]) > 9  # also without any colour
    greys = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
    nothing = np.zeros((1, 256), np.uint8)
    dimmed = cielab(error_map(greys, nothing, nothing, binary=True), sight)
    for color in (missed, false):
        assert np.linalg.norm(dimmed - color, axis=-1).min() > 45


def test_titles_name_the_colours_of_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *_, **__: titles.extend(a.get_title() for a in self.axes)
    )
    ids = np.zeros((20, 30), np.uint8)
    row = Row("sample", np.zeros((20, 30, 3), np.uint8), ids, ids, ids, "dice 0.5")
    draw_page([row], {"object": [1, 2, 3]}, tmp_path / "binary.png")
    draw_page([row], COLORS, tmp_path / "classes.png")
    assert [title for title in titles if "error" in title] == [
        "error: missed blue, false orange",
        "error: orange",
    ]
    for color, (least, greatest) in ((MISSED, (190, 250)), (FALSE, (20, 45))):
        assert least < 360 * rgb_to_hsv(*np.array(color) / 255)[0] < greatest


def test_error_map_of_classes_marks_wrong_ones_and_no_ignored_ones() -> None:
    image = np.full((1, 3, 3), 90, np.uint8)
    mask, classes = np.array([[2, 1, IGNORED]], np.uint8), np.array([[2, 0, 0]], np.uint8)
    picture = error_map(image, mask, classes, binary=False)
    assert tuple(picture[0, 1]) == FALSE
    assert (picture[0, [0, 2]] == 30).all()


def test_contours_outline_the_mask_and_leave_the_rest_alone() -> None:
    image = np.full((40, 40, 3), 100, np.uint8)
    found = np.zeros((40, 40), bool)
    found[10:30, 10:30] = True
    picture = draw_contours(image, found)
    assert tuple(picture[10, 15]) == OUTLINE
    assert (picture[:8] == 100).all()
    assert (image == 100).all()


def test_classes_are_painted_in_their_colours() -> None:
    ids = np.array([[0, 1, 2, IGNORED]], np.uint8)
    assert paint(ids, COLORS)[0, :3].tolist() == list(COLORS.values())
    assert paint(ids[:, :2], {"object": [1, 2, 3]}).tolist() == [[[0] * 3, [255] * 3]]


def test_overlays_tint_every_class_but_what_is_ignored() -> None:
    image = np.full((30, 60, 3), 100, np.uint8)
    ids = np.repeat(np.array([[0, 1, IGNORED]], np.uint8), 30, axis=0).repeat(20, axis=1)
    picture = draw_classes(image, ids, COLORS)
    assert (picture[10:20, 45:55] == 100).all()
    assert tuple(picture[15, 30]) == (55, 55, 169)
    assert tuple(picture[15, 20]) == (0, 0, 255)  # outline


@pytest.mark.parametrize("count", [1, 2, 12, 20, 60])
def test_standard_colours_differ(count: int) -> None:
    names = [f"class {i}" for i in range(count)]
    colors = colors_of(names, None)
    assert list(colors) == names
    assert len({tuple(color) for color in colors.values()}) == count
    assert all(0 <= channel <= 255 for color in colors.values() for channel in color)


@pytest.mark.parametrize("size", [(40, 60), (600, 300), (300, 1600)])
def test_legend_names_every_colour_below_the_picture(size: tuple[int, int]) -> None:
    picture = np.full((*size, 3), 7, np.uint8)
    labelled = add_legend(picture, COLORS)
    assert np.array_equal(labelled[: size[0]], picture)
    strip = labelled[size[0] :].reshape(-1, 3)
    for color in COLORS.values():
        assert (strip == color).all(axis=1).any()


def test_shrinking_keeps_class_ids_and_small_pictures() -> None:
    ids = np.random.default_rng(0).choice(np.array([0, 3, IGNORED], np.uint8), (90, 50))
    small = shrink(ids, 30)
    assert small.shape == (30, 17)
    assert set(np.unique(small)) <= {0, 3, IGNORED}
    assert np.array_equal(shrink(ids, 100), ids)


def test_pages_and_plots_are_pictures_that_open(tmp_path: Path) -> None:
    image = np.full((20, 30, 3), 90, np.uint8)
    ids = np.zeros((20, 30), np.uint8)
    row = Row("sample", image, ids, ids, ids, "miou 0.5")
    draw_page([row, row], COLORS, tmp_path / "classes.png")
    draw_page([row], {"object": [1, 2, 3]}, tmp_path / "binary.png")
    draw_sheet([("a", image)] * 7, COLORS, tmp_path / "sheet.png")
    bins = np.array([[0.1, np.nan], [0.2, np.nan], [1.0, 0.0]])
    draw_reliability(bins, 0.1, tmp_path / "reliability.png")
    draw_confusion(np.array([[3, 1], [0, 0]]), ["a", "b"], tmp_path / "confusion.png")
    for name in ("classes", "binary", "sheet", "reliability", "confusion"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 100
            assert len(set(picture.convert("L").tobytes())) > 1


@pytest.mark.parametrize("layers", [1, 2, 6, 12])
@pytest.mark.parametrize("scales", [[0.5, 1, 2, 4], list(range(1, 9)), [2, 2, 2]])
def test_choices_have_a_legend_that_is_whole(tmp_path: Path, layers: int, scales: list[float]) -> None:
    image = np.full((40, 30, 3), 90, np.uint8)
    choices = {f"blocks.{i}.attn.qkv": np.arange(1200).reshape(40, 30) % len(scales) for i in range(layers)}
    draw_choices(image, choices, scales, tmp_path / "choices.png")
    pixels = np.asarray(Image.open(tmp_path / "choices.png").convert("L"))
    assert (pixels[:, [0, -1]] == 255).all(), "its frame reaches the border"
    assert (pixels[[0, -1]] == 255).all()
