from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from convlora.data.images import list_images, read_image
from convlora.data.masks import read_binary

ORIENTATION, TURN_LEFT = 0x0112, 8  # shown upright after a quarter turn to the left


@pytest.fixture
def rgb() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def save(path: Path, array: NDArray[np.generic], mode: str | None = None, exif: int | None = None) -> Path:
    image = Image.fromarray(array)
    image = image if mode is None else image.convert(mode)
    tags = Image.Exif()
    if exif is not None:
        tags[ORIENTATION] = exif
    image.save(path, exif=tags)
    return path


def test_rgb_is_read_as_it_is(tmp_path: Path, rgb: NDArray[np.uint8]) -> None:
    assert np.array_equal(read_image(save(tmp_path / "a.png", rgb)), rgb)


def test_grey_is_replicated(tmp_path: Path, rgb: NDArray[np.uint8]) -> None:
    image = read_image(save(tmp_path / "a.png", rgb[..., 0]))
    assert np.array_equal(image, np.repeat(rgb[..., :1], 3, axis=2))


def test_alpha_is_dropped_not_blended(tmp_path: Path, rgb: NDArray[np.uint8]) -> None:
    rgba = np.dstack([rgb, np.zeros_like(rgb[..., 0])])
    assert np.array_equal(read_image(save(tmp_path / "a.png", rgba)), rgb)


def test_palette_gives_its_colours(tmp_path: Path) -> None:
    colours = np.array([[[255, 0, 0], [0, 0, 255]]], dtype=np.uint8)
    assert np.array_equal(read_image(save(tmp_path / "a.png", colours, "P")), colours)


def test_cmyk_gives_its_colours(tmp_path: Path) -> None:
    colours = np.full((8, 8, 3), (255, 0, 0), dtype=np.uint8)
    assert np.array_equal(read_image(save(tmp_path / "a.tif", colours, "CMYK")), colours)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_16_bits_keep_their_order_in_8(tmp_path: Path, dtype: type[np.generic]) -> None:
    values = np.array([[0, 255, 256, 30000, 65535]], dtype=dtype)
    image = read_image(save(tmp_path / "a.tif", values))
    assert image[0, :, 0].tolist() == [0, 0, 1, 117, 255]


@pytest.mark.parametrize("value", [-1, 65536])
def test_integers_beyond_16_bits_are_refused(tmp_path: Path, value: int) -> None:
    path = save(tmp_path / "a.tif", np.array([[0, value]], dtype=np.int32))
    with pytest.raises(ValueError, match=r"a\.tif: pixels from .* scale it to 0\.\.255"):
        read_image(path)


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", np.array([[0.0, 0.5]], dtype=np.float32))
    with pytest.raises(ValueError, match=r"a\.tif: pixels of Pillow's mode F.*save it as RGB"):
        read_image(path)


def test_exif_turns_image_and_mask_alike(tmp_path: Path, rgb: NDArray[np.uint8]) -> None:
    image = read_image(save(tmp_path / "a.png", rgb, exif=TURN_LEFT))
    binary = (rgb[..., 0] > 127).astype(np.uint8)
    mask = read_binary(save(tmp_path / "b.png", binary * 255, exif=TURN_LEFT))
    assert np.array_equal(image, np.rot90(rgb))
    assert np.array_equal(mask, np.rot90(binary))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_truncated_file_is_named(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path / f"a{suffix}", noise)
    path.write_bytes(path.read_bytes()[:2000])
    for read in (read_image, read_binary):
        with pytest.raises(ValueError, match=rf"a\{suffix}: cannot be decoded .* leave it out of the split"):
            read(path)


def test_text_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"a\.png: cannot be decoded"):
        read_image(path)


def test_missing_file_stays_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.png"):
        read_image(tmp_path / "a.png")


def test_images_are_listed_in_natural_order_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("10.png", "2.JPG", "a1.png", "._2.png", "notes.txt", "sub/3.png", ".cache/4.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in list_images(tmp_path)] == ["2.JPG", "10.png", "a1.png"]
    assert tmp_path / "sub/3.png" in list_images(tmp_path, recursive=True)
    assert tmp_path / ".cache/4.png" not in list_images(tmp_path, recursive=True)


def test_missing_folder_is_no_empty_list(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        list_images(tmp_path / "none")
