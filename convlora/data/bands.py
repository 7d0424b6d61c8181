"""Images of more than three bands or eight bits, as satellites make them: three bands become an RGB image."""

import json
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

IMAGES = 64  # at most, over which a range is measured
PIXELS = 2**16  # of each of them at most


@dataclass(frozen=True)
class Bands:
    """How files of bands become RGB images, in training and afterwards alike.

    Attributes:
        channels: numbers of the bands, from 1, that are taken as red, green and blue.
        dtype: of the files' values, in numpy's words.
        ranges: least and greatest value of each of the three channels, which become 0 and 255.

    Raises:
        ValueError: one of them is impossible.
    """

    channels: tuple[int, int, int]
    dtype: str
    ranges: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        check_channels(self.channels)
        if len(self.ranges) != 3 or not all(
            math.isfinite(low) and math.isfinite(high) and low < high for low, high in self.ranges
        ):
            raise ValueError(f"ranges {self.ranges} must be three pairs of a number and a greater one")

    def __str__(self) -> str:
        """Return what a user reads of them: `4, 3, 2 of uint16 as red 104 to 2310, green ...`."""
        ranges = (
            f"{color} {low:.6g} to {high:.6g}"
            for color, (low, high) in zip(("red", "green", "blue"), self.ranges, strict=True)
        )
        return f"{_listed(self.channels)} of {self.dtype} as {', '.join(ranges)}"

    def to_json(self) -> str:
        """Return the text that `from_json` takes."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Bands":
        """Return the bands that `to_json` wrote.

        Raises:
            ValueError: the text says something else.
        """
        try:
            told = json.loads(text)
            channels = tuple(told["channels"])
            ranges = tuple((float(low), float(high)) for low, high in told["ranges"])
            return cls(channels, str(told["dtype"]), ranges)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"bands {text} cannot be understood ({error})") from error

    def read(self, path: Path) -> NDArray[np.uint8]:
        """Read the three bands of a file as RGB [h, w, 3].

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file cannot be decoded, or what `check` refuses.
        """
        with open_raster(path) as dataset:
            self.check(dataset.count, dataset.dtypes, path)
            return self.to_rgb(take(dataset, self.channels))

    def size(self, path: Path) -> tuple[int, int]:
        """Return width and height of a file, px, from its head alone; raises what `read` does."""
        with open_raster(path) as dataset:
            self.check(dataset.count, dataset.dtypes, path)
            return dataset.width, dataset.height

    def check(self, count: int, dtypes: Sequence[str], path: Path | str) -> None:
        """Refuse an image that is not of the kind that was trained on.

        Args:
            count: of its bands.
            dtypes: the type of values of each of them.
            path: of the image, for messages.

        Raises:
            ValueError: it has too few bands, or values of another type.
        """
        found = dtype_of(self.channels, count, dtypes, path)
        if found != self.dtype:
            raise ValueError(
                f"{path} holds {found} values, but bands {self} are what is trained on; give files of "
                f"{self.dtype} in the same units"
            )

    def to_rgb(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        """Scale the values [3, h, w] of the three channels to RGB [h, w, 3].

        Values beyond the range become 0 or 255; those that are masked or not finite become 0.
        """
        masked: Any = np.ma  # which has no types
        pixels = np.empty((*values.shape[1:], 3), np.uint8)
        for index, (low, high) in enumerate(self.ranges):
            # in double precision, so that 8 bits come out as they went in and great offsets lose nothing
            scaled = (masked.getdata(values[index]).astype(np.float64) - low) / (high - low) * 255
            valid = np.isfinite(scaled) & ~masked.getmaskarray(values[index])
            pixels[..., index] = np.rint(np.clip(np.where(valid, scaled, 0), 0, 255))
        return pixels


def measure(
    images: Sequence[Path], channels: Sequence[int], percentiles: Sequence[float], strict: bool = True
) -> Bands:
    """Find the range of three bands over images, the same each time.

    It is that of 0 to 255 where values have 8 bits. Else it lies between the percentiles of each channel over
    at most `IMAGES` images, spread evenly, and at most `PIXELS` of each, without those that are masked or
    not finite.

    Args:
        images: files of the training images.
        channels: numbers of the bands, from 1, that are taken as red, green and blue.
        percentiles: the lower and the upper one, 0 to 100.
        strict: whether an image that cannot be read is refused; else it is left out.

    Raises:
        FileNotFoundError: an image is not there.
        ValueError: an image cannot be read, has too few bands or another type of values than the others, the
            channels have no range, or rasterio is not installed.
    """
    check_channels(channels)
    red, green, blue = channels
    spread = np.unique(np.linspace(0, len(images) - 1, min(IMAGES, len(images))).round().astype(int))
    dtype, parts = "", [list[NDArray[Any]]() for _ in channels]
    failure: Exception = ValueError("there are no images whose range could be measured")
    for path in (images[index] for index in spread):
        try:
            with open_raster(path) as dataset:
                found = dtype_of(channels, dataset.count, dataset.dtypes, path)
                if dtype not in ("", found):
                    raise ValueError(
                        f"{path} holds {found} values, but {images[0]} {dtype}; export all in one type"
                    )
                dtype = found
                if dtype == "uint8":
                    continue
                values = take(dataset, channels, PIXELS)
        except (OSError, ValueError) as error:
            if strict:
                raise
            failure = error
            continue
        for part, channel in zip(parts, values, strict=True):
            known = np.ma.compressed(channel)
            part.append(known[np.isfinite(known)])
    if not dtype:
        raise failure
    if dtype == "uint8":
        return Bands((red, green, blue), dtype, ((0.0, 255.0),) * 3)
    ranges = [
        _range(np.concatenate(part), number, percentiles)
        for number, part in zip(channels, parts, strict=True)
    ]
    return Bands((red, green, blue), dtype, tuple(ranges))


def _range(values: NDArray[Any], number: int, percentiles: Sequence[float]) -> tuple[float, float]:
    if not len(values):
        raise ValueError(
            f"band {number} of the training images has no valid pixel; choose another in loading.channels"
        )
    low, high = (float(value) for value in np.percentile(values.astype(np.float64), percentiles))
    if low == high:
        raise ValueError(
            f"band {number} of the training images is {low:g} at both percentiles {_listed(percentiles)}, so "
            "that it has no range; widen loading.percentiles, or choose another band in loading.channels"
        )
    return low, high


def take(dataset: Any, channels: Sequence[int], pixels: int | None = None, window: Any = None) -> Any:
    """Read bands of an open file [channels, h, w].

    What the file declares to be no data is masked. A band of transparency masks nothing: software calls the
    fourth band so whatever it holds.

    Args:
        dataset: opened by rasterio.
        channels: numbers of the bands, from 1.
        pixels: how many at most, spread evenly; None takes all.
        window: the part that is read, in rasterio's terms; None is all of it.

    Raises:
        OSError: the file is damaged.
    """
    shape = None
    if pixels is not None and dataset.width * dataset.height > pixels:
        step = math.sqrt(dataset.width * dataset.height / pixels)
        shape = (len(channels), max(1, int(dataset.height / step)), max(1, int(dataset.width / step)))
    flags = {flag.name for number in channels for flag in dataset.mask_flag_enums[number - 1]}
    return dataset.read(list(channels), window=window, out_shape=shape, masked="alpha" not in flags)


@contextmanager
def open_raster(path: Path) -> Iterator[Any]:
    """Open a file of bands with rasterio.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be decoded, also while it is open, or rasterio is not installed.
    """
    rasterio = load_rasterio()
    if not path.is_file():
        raise FileNotFoundError(f"no image at {path}")
    try:
        with rasterio.open(path) as dataset:
            yield dataset
    except rasterio.errors.RasterioError as error:
        raise ValueError(
            f"{path}: cannot be decoded ({error}); fetch or export the file again, or leave it out of "
            "the split"
        ) from error


def describe(path: Path) -> tuple[int, str] | None:
    """Return number of bands and type of values of a file; None where rasterio cannot read it, or is missing.

    Raises:
        ValueError: rasterio is missing, and the file's name says that it might read it.
    """
    try:
        load_rasterio()
    except ValueError as error:
        if path.suffix.lower() not in (".tif", ".tiff"):
            return None
        raise ValueError(f"{path}: cannot be decoded as a plain image; {error}") from error
    try:
        with open_raster(path) as dataset:
            return dataset.count, dataset.dtypes[0]
    except (OSError, ValueError):
        return None


def load_rasterio() -> Any:
    """Import rasterio, which only files of bands need.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import rasterio
        import rasterio.errors
    except ImportError as error:
        raise ValueError(
            "the package rasterio, which reads images of bands, is missing; install it by "
            "pip install 'convlora[geo]'"
        ) from error
    logging.getLogger("rasterio").setLevel(logging.CRITICAL)  # its errors are raised
    # photographs and tiles without a place on earth are images too
    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
    return rasterio


def check_channels(channels: Sequence[int]) -> None:
    """Refuse what cannot be the numbers of three bands; raises ValueError."""
    numbers = all(isinstance(number, int) and not isinstance(number, bool) for number in channels)
    if len(channels) != 3 or not numbers or min(channels) < 1:
        raise ValueError(
            f"loading.channels={list(channels)} must be the numbers, from 1, of three bands, those taken as "
            "red, green and blue, as in loading.channels=[4,3,2]; a number may be there more than once"
        )


def check_percentiles(percentiles: Sequence[float]) -> None:
    """Refuse what cannot be a lower and an upper percentile; raises ValueError."""
    if len(percentiles) != 2 or not 0 <= percentiles[0] < percentiles[1] <= 100:
        raise ValueError(
            f"loading.percentiles={list(percentiles)} must be two numbers from 0 to 100, the lower first, as "
            "in loading.percentiles=[2,98]"
        )


def dtype_of(channels: Sequence[int], count: int, dtypes: Sequence[str], path: Path | str) -> str:
    """Return the type of the values of an image's channels.

    Args:
        channels: numbers of the bands, from 1.
        count: of the image's bands.
        dtypes: the type of values of each of them.
        path: of the image, for messages.

    Raises:
        ValueError: it lacks one of the channels, or their values are complex or not of one type.
    """
    if max(channels) > count:
        bands = "one band" if count == 1 else f"{count} bands"
        raise ValueError(
            f"{path} has {bands}, but channels {_listed(channels)} ask for band {max(channels)}, counted "
            "from 1; give images that have it, or train with other loading.channels"
        )
    kinds = sorted({str(dtypes[number - 1]) for number in channels})
    if len(kinds) > 1 or "complex" in kinds[0]:
        raise ValueError(
            f"{path}: its channels {_listed(channels)} hold {' and '.join(kinds)} values, but they are real "
            "numbers of one type; convert them"
        )
    return kinds[0]


def _listed(values: Sequence[float]) -> str:
    return ", ".join(map(str, values))
