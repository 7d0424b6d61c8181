"""Image files as arrays, whatever way they are stored."""

import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from convlora.data.bands import Bands

T = TypeVar("T")

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})

_COLOUR_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)


def read_image(path: Path, bands: "Bands | None" = None) -> NDArray[np.uint8]:
    """Read an image upright as RGB [h, w, 3].

    Grey is replicated, alpha is dropped, 16 bits keep their high byte.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be decoded, or its pixels have no 8-bit or 16-bit range.
    """
    if bands is not None:
        return bands.read(path)
    image = open_image(path)
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"{path}: pixels from {values.min()} to {values.max()}, but an image has 8 or 16 bits a "
                "channel; scale it to 0..255 and save it again"
            )
        high_byte = (values >> 8).astype(np.uint8)  # what Pillow itself does to 16-bit RGB
        return np.repeat(high_byte[..., None], 3, axis=2)
    if image.mode not in _COLOUR_MODES:
        raise ValueError(
            f"{path}: pixels of Pillow's mode {image.mode}, but an image has 8 or 16 bits a channel; "
            "scale it to 0..255 and save it as RGB"
        )
    return np.array(image.convert("RGB"))


def image_size(path: Path) -> tuple[int, int]:
    """Return width and height of an image file as it is stored, px, from its head alone.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be decoded.
    """
    return _decode(path, lambda image: image.size)


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
        raise ValueError(f"{path}: {error}; cut the image into tiles") from error
    except _DECODER_ERRORS as error:
        raise ValueError(
            f"{path}: cannot be decoded ({error}); fetch or export the file again, or leave it out of "
            "the split"
        ) from error


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
