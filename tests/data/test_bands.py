"""Files of several bands: read, scaled, measured, refused."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray
from PIL import Image
from rasterio.transform import Affine

from convlora.data.bands import PIXELS, Bands, measure
from convlora.data.cache import CachedRead
from convlora.data.images import image_size, read_image
from convlora.data.loading import Loading
from convlora.data.masks import Masks
from convlora.data.samples import Pair, read_pair
from convlora.data.transforms import SquareResize

CHANNELS = (4, 3, 2)
SPAN = ((0.0, 1000.0), (0.0, 2000.0), (0.0, 500.0))


def write(path: Path, values: NDArray[Any], **profile: Any) -> Path:
    """Save values [bands, h, w] as a GeoTIFF."""
    profile = {"crs": "EPSG:32640", "transform": Affine(10, 0, 0, 0, -10, 0)} | profile
    count, height, width = values.shape
    with rasterio.open(
        path, "w", driver="GTiff", height=height, width=width, count=count, dtype=values.dtype, **profile
    ) as file:
        file.write(values)
    return path


def values(dtype: str = "uint16", bands: int = 4, seed: int = 0, side: int = 12) -> NDArray[Any]:
    drawn = np.random.default_rng(seed).integers(0, 1000, (bands, side, side + 3))
    return drawn.astype(dtype)


def refused(path: Path, *words: str, bands: Bands | None = None) -> None:
    with pytest.raises(ValueError, match=r"a\.tif") as error:
        read_image(path, bands)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32", "float64"])
def test_channels_are_counted_from_1_and_scaled_to_their_ranges(tmp_path: Path, dtype: str) -> None:
    drawn = values(dtype)
    image = read_image(write(tmp_path / "a.tif", drawn), Bands(CHANNELS, dtype, SPAN))
    for channel, (number, (_, high)) in enumerate(zip(CHANNELS, SPAN, strict=True)):
        expected = np.clip(np.rint(drawn[number - 1].astype(float) / high * 255), 0, 255)
        assert np.array_equal(image[..., channel], expected)


def test_values_beyond_the_range_are_clipped_and_invalid_ones_black(tmp_path: Path) -> None:
    drawn = np.full((3, 2, 3), 150.0, np.float32)
    drawn[0] = [[50, 100, 150], [200, 300, np.nan]]
    drawn[1, 0] = [-9999, np.inf, 150]
    bands = Bands((1, 2, 3), "float32", ((100, 200), (100, 200), (-20000, 200)))
    image = bands.read(write(tmp_path / "a.tif", drawn, nodata=-9999))
    assert image[..., 0].tolist() == [[0, 0, 128], [255, 255, 0]]
    assert image[0, :, 1].tolist() == [0, 0, 128]
    drawn[2, 0, 0] = -9999
    image = bands.read(write(tmp_path / "a.tif", drawn, nodata=-9999))
    assert image[0, 0, 2] == 0, "what is no data is black also where the range holds it"


def test_8_bits_stay_as_they_are(tmp_path: Path) -> None:
    drawn = np.arange(4 * 256, dtype=np.uint8).reshape(4, 16, 16)
    path = write(tmp_path / "a.tif", drawn)
    bands = measure([path], CHANNELS, (2, 98))
    assert bands.ranges == ((0, 255),) * 3
    assert np.array_equal(bands.read(path), drawn[[3, 2, 1]].transpose(1, 2, 0))


def test_a_fourth_band_that_is_called_alpha_hides_nothing(tmp_path: Path) -> None:
    drawn = values("uint8")
    drawn[3] = 0  # which rasterio labels transparency, since four bands of 8 bits mostly are RGBA
    path = write(tmp_path / "a.tif", drawn)
    image = measure([path], (3, 2, 1), (2, 98)).read(path)
    assert np.array_equal(image, drawn[[2, 1, 0]].transpose(1, 2, 0))


def test_ranges_are_the_percentiles_of_the_valid_pixels_of_all_images(tmp_path: Path) -> None:
    drawn = [values("float32", seed=seed) for seed in range(3)]
    drawn[0][3, 0, 0], drawn[1][2, :3] = np.nan, -1
    paths = [write(tmp_path / f"{i}.tif", each, nodata=-1) for i, each in enumerate(drawn)]
    bands = measure(paths, CHANNELS, (5, 90))
    for number, found in zip(CHANNELS, bands.ranges, strict=True):
        pixels = np.concatenate([each[number - 1].ravel() for each in drawn])
        valid = pixels[np.isfinite(pixels) & (pixels != -1)].astype(float)
        assert found == pytest.approx(tuple(np.percentile(valid, (5, 90))))
    assert measure(paths, CHANNELS, (5, 90)) == bands
    assert Bands.from_json(bands.to_json()) == bands


def test_a_range_is_measured_on_few_pixels_of_few_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = 300
    ramp = np.linspace(0, 10000, side * side, dtype=np.uint16).reshape(1, side, side)
    path = write(tmp_path / "a.tif", np.repeat(ramp, 3, axis=0))
    read: list[int] = []

    class Dataset(rasterio.DatasetReader):  # type: ignore[misc]
        def read(self, *arguments: Any, **keywords: Any) -> Any:
            found = super().read(*arguments, **keywords)
            read.append(found[0].size)
            return found

    monkeypatch.setattr(rasterio, "open", Dataset)
    bands = measure([path] * 1000, (1, 2, 3), (2, 98))
    assert len(read) == 64
    assert max(read) <= PIXELS < side * side
    assert bands.ranges[0] == pytest.approx((200, 9800), abs=50)


def test_images_of_the_end_count_too(tmp_path: Path) -> None:
    dark, bright = (write(tmp_path / f"{k}.tif", values() + np.uint16(k)) for k in (0, 5000))
    assert measure([dark] * 99 + [bright], CHANNELS, (0, 100)).ranges[0][1] > 5000


def test_size_is_read_from_the_head(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", values())
    assert image_size(path, Bands(CHANNELS, "uint16", SPAN)) == (15, 12)


@pytest.mark.parametrize(
    ("bands", "dtype", "channels"),
    [(4, "uint16", "4,3,2"), (5, "uint8", "4,3,2"), (3, "float32", "1,2,3"), (1, "float32", "1,1,1"),
     (13, "float64", "4,3,2"), (3, "uint16", "1,2,3")],
)  # fmt: skip
def test_plain_images_have_no_further_bands_and_the_way_out_works(
    tmp_path: Path, bands: int, dtype: str, channels: str
) -> None:
    path = write(tmp_path / "a.tif", values(dtype, bands))
    refused(path, f"loading.channels=[{channels}]")
    numbers = [int(each) for each in channels.split(",")]
    assert read_image(path, measure([path], numbers, (2, 98))).shape == (12, 15, 3)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_only_a_fourth_band_that_is_said_to_be_alpha_is_left_out(tmp_path: Path, dtype: str) -> None:
    drawn = values(dtype)
    path = write(tmp_path / "a.tif", drawn, photometric="RGB", alpha="NO")
    refused(path, "4 bands", "loading.channels=[4,3,2]")
    write(path, drawn, photometric="RGB", alpha="YES")
    expected = drawn[:3] if dtype == "uint8" else drawn[:3] >> 8
    assert np.array_equal(read_image(path), expected.transpose(1, 2, 0))


def test_files_of_another_kind_than_trained_on_are_refused(tmp_path: Path) -> None:
    bands = Bands(CHANNELS, "uint16", SPAN)
    few = write(tmp_path / "a.tif", values(bands=3))
    refused(few, "has 3 bands", "band 4", bands=bands)
    refused(write(tmp_path / "a.tif", values(bands=1)), "has one band", bands=bands)
    refused(write(tmp_path / "a.tif", values("uint8")), "holds uint8 values", "uint16", bands=bands)
    photo = tmp_path / "a.tif.png"
    Image.fromarray(values("uint8").transpose(1, 2, 0)[..., :3]).save(photo)
    refused(photo, "has 3 bands", bands=bands)
    refused(write(tmp_path / "a.tif", values("complex64")), "complex", bands=bands)


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    bands = Bands(CHANNELS, "uint16", SPAN)
    path = write(tmp_path / "a.tif", values(side=200))
    path.write_bytes(path.read_bytes()[:20000])
    refused(path, "cannot be decoded", "leave it out of the split", bands=bands)
    path.write_text("version https://git-lfs.github.com/spec/v1")
    refused(path, "cannot be decoded", bands=bands)
    refused(path, "cannot be decoded")
    with pytest.raises(FileNotFoundError, match=r"none\.tif"):
        read_image(tmp_path / "none.tif", bands)


def test_training_images_of_two_kinds_are_refused_or_left_out(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.tif", values()), write(tmp_path / "b.tif", values("float32"))]
    with pytest.raises(ValueError, match=r"b\.tif holds float32 values, but .*a\.tif uint16"):
        measure(paths, CHANNELS, (2, 98))
    assert measure(paths, CHANNELS, (2, 98), strict=False) == measure(paths[:1], CHANNELS, (2, 98))
    with pytest.raises(ValueError, match=r"has 4 bands, but channels 5, 3, 2 ask for band 5"):
        measure(paths, (5, 3, 2), (2, 98), strict=False)


@pytest.mark.parametrize(("fill", "message"), [(7, "7 at both percentiles 2, 98"), (-1, "no valid pixel")])
def test_a_band_without_a_range_is_refused(tmp_path: Path, fill: int, message: str) -> None:
    drawn = values("float32")
    drawn[2] = fill
    with pytest.raises(ValueError, match=f"band 3 .*{message}.*loading.channels"):
        measure([write(tmp_path / "a.tif", drawn, nodata=-1)], CHANNELS, (2, 98))


@pytest.mark.parametrize("channels", [(1, 2), (0, 1, 2), (1, 2, 3, 4), (-1, 2, 3), (1, 2, True)])
def test_impossible_channels_are_refused(channels: Sequence[int]) -> None:
    with pytest.raises(ValueError, match=r"loading\.channels=.* three bands, .* loading\.channels=\[4,3,2\]"):
        Loading(channels=channels)


@pytest.mark.parametrize("percentiles", [(2,), (98, 2), (2, 2), (-1, 98), (2, 101), (2, 50, 98)])
def test_impossible_percentiles_are_refused(percentiles: Sequence[float]) -> None:
    with pytest.raises(ValueError, match=r"loading\.percentiles=.* two numbers from 0 to 100"):
        Loading(channels=(1, 2, 3), percentiles=percentiles)


def test_percentiles_without_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"loading\.percentiles=\[1, 99\] .* set loading\.channels"):
        Loading(percentiles=[1, 99])
    assert Loading(percentiles=[2, 98]).channels is None


@pytest.mark.parametrize(
    "text", ["{}", "[]", "no", '{"channels": [1, 2, 3], "dtype": "uint16", "ranges": [[0, 1], [0, 1]]}',
             '{"channels": [1, 2, 3], "dtype": "uint16", "ranges": [[0, 1], [0, 1], [1, NaN]]}',
             '{"channels": [1, 2, 0], "dtype": "uint16", "ranges": [[0, 1], [0, 1], [0, 1]]}']
)  # fmt: skip
def test_a_record_that_is_no_bands_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="cannot be understood"):
        Bands.from_json(text)


def test_a_cache_on_disk_is_of_its_bands(tmp_path: Path) -> None:
    pair = Pair(write(tmp_path / "a.tif", values()), tmp_path / "a.png")
    Image.fromarray(np.zeros((12, 15), np.uint8)).save(pair.mask)
    masks, one = Masks(["object"]), Bands(CHANNELS, "uint16", SPAN)
    seen = {}
    for bands in (one, replace(one, channels=(1, 2, 3)), replace(one, ranges=((0.0, 1.0),) * 3)):
        read = partial(read_pair, masks=masks, bands=bands)
        stored = CachedRead([pair], read, SquareResize(16), str(tmp_path / "cache"), masks, bands)
        seen[stored(pair)[0].tobytes()] = stored.file
    assert len(seen) == len(set(seen.values())) == 3


def test_without_rasterio_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.tif", values())
    monkeypatch.setitem(sys.modules, "rasterio", None)
    for bands in (None, Bands(CHANNELS, "uint16", SPAN)):
        with pytest.raises(ValueError, match=r"pip install 'convlora\[geo\]'"):
            read_image(path, bands)
