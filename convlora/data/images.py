"""Image files as arrays, whatever way they are stored."""

import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from convlora.data.bands import Bands, describe

T = TypeVar("T")

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})

# Tags of TIFF, and the values of the first that mean alpha
EXTRA_SAMPLES, SAMPLES_PER_PIXEL, ALPHA = 338, 277, {1, 2}
_COLOUR_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)


def read_image(path: Path, bands: Bands | None = None) -> NDArray[np.uint8]:
    """Read an image as RGB [h, w, 3].

    Args:
        path: of the file.
        bands: which of its bands are read, and how they are scaled. None reads a plain image upright: grey is
            replicated, alpha is dropped, 16 bits keep their high byte.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be decoded, or its pixels have no 8-bit or 16-bit range; or what
            `Bands.check` refuses.
    """
    if bands is not None:
        return bands.read(path)
    image, count = _decode(path, lambda image: (ImageOps.exif_transpose(image), _unlabelled(image)))
    if count:
        raise ValueError(_several_bands(path, count, "8- or 16-bit"))
    return to_rgb(image, path)


def to_rgb(image: Image.Image, name: Path | str) -> NDArray[np.uint8]:
    """Return a plain image, upright, as RGB [h, w, 3]; what `read_image` does with one.

    Args:
        image: of Pillow's.
        name: for messages.

    Raises:
        ValueError: its pixels have no 8-bit or 16-bit range.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"{name}: pixels from {values.min()} to {values.max()}, but an image has 8 or 16 bits a "
                f"channel; scale it to 0..255 and save it again, or {way_out(1)}"
            )
        high_byte = (values >> 8).astype(np.uint8)  # what Pillow itself does to 16-bit RGB
        return np.repeat(high_byte[..., None], 3, axis=2)
    if image.mode not in _COLOUR_MODES:
        raise ValueError(
            f"{name}: pixels of Pillow's mode {image.mode}, but an image has 8 or 16 bits a channel; "
            f"scale it to 0..255 and save it as RGB, or {way_out(1)}"
        )
    return np.array(image.convert("RGB"))


def image_size(path: Path, bands: Bands | None = None) -> tuple[int, int]:
    """Return width and height of an image file as it is stored, px, from its head alone.

    Args:
        path: of the file.
        bands: those that will be read of it, which the file must have; None of a plain image.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be decoded, or what `Bands.check` refuses.
    """
    if bands is not None:
        return bands.size(path)
    return _decode(path, lambda image: image.size)


def allow_large_images() -> None:
    """Let images be decoded that are larger than Pillow takes to be honest, from now on in this process."""
    Image.MAX_IMAGE_PIXELS = None


def open_image(path: Path) -> Image.Image:
    """Decode an image file and turn it upright.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be decoded.
    """
    return _decode(path, ImageOps.exif_transpose)


def _decode(path: Path, take: Callable[[Image.Image], T]) -> T:
    try:
        with Image.open(path) as image:
            return take(image)
    except FileNotFoundError:
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}; set tiles=true, which cuts images into windows") from error
    except _DECODER_ERRORS as error:
        found = describe(path) if isinstance(error, UnidentifiedImageError) else None
        if found is not None:
            raise ValueError(_several_bands(path, *found)) from error
        raise ValueError(
            f"{path}: cannot be decoded ({error}); fetch or export the file again, or leave it out of "
            "the split"
        ) from error


def _unlabelled(image: Image.Image) -> int:
    """Return the number of bands of a TIFF of which one is neither grey nor colour nor alpha, else 0."""
    tags = getattr(image, "tag_v2", {})
    extra = tags.get(EXTRA_SAMPLES, ())
    return int(tags.get(SAMPLES_PER_PIXEL, 0)) if set(extra) - ALPHA else 0


def _several_bands(path: Path, count: int, dtype: str) -> str:
    return (
        f"{path} has {count} band{'s' * (count > 1)} of {dtype} values, but a plain image is grey or RGB of "
        f"8 or 16 bits; {way_out(count)}"
    )


def way_out(count: int) -> str:
    """Return how a file of so many bands, or of values of another type, can be read."""
    channels = "4,3,2" if count > 3 else "1,2,3" if count == 3 else "1,1,1"
    return f"train with loading.channels=[{channels}], which chooses bands as red, green and blue, from 1 on"


def list_images(folder: Path, recursive: bool = False) -> list[Path]:
    """List the image files of a folder, hidden ones left out, `2.png` before `10.png`.

    Raises:
        NotADirectoryError: there is no such folder.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder; name one that holds images")
    found = (
        path for path in folder.glob("**/*" if recursive else "*") if path.suffix.lower() in IMAGE_SUFFIXES
    )
    return sorted((path for path in found if not _hidden(path.relative_to(folder))), key=_natural)


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in path.parts)


def _natural(path: Path) -> list[tuple[int, int, str]]:
    parts = re.findall(r"\d+|\D+", path.as_posix())
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts]
