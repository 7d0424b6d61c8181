"""Image and mask files as arrays, whatever way they are stored."""

import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})

_COLOUR_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
_BINARY_VALUES = ({0, 1}, {0, 255}, {0, 65535})


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read an image upright as RGB [h, w, 3].

    Grey is replicated, alpha is dropped, 16 bits keep their high byte.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be decoded, or its pixels have no 8-bit or 16-bit range.
    """
    image = _open(path)
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


def read_mask(path: Path, threshold: int | None = None) -> NDArray[np.uint8]:
    """Read a mask upright as 0 and 1 [h, w].

    Args:
        path: its values are 0 and one of 1, 255 and 65535, in one channel or several equal ones; of a palette
            image the indices count.
        threshold: if given, any values are accepted and those above it are foreground.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be decoded, is coloured, has grey values and no threshold is given, or
            has only 0 and 1, which a threshold would make empty.
    """
    values = _single_channel(path)
    found = np.unique(values)
    if threshold is not None:
        if 0 < found[-1] <= min(1, threshold):
            raise ValueError(
                f"{path}: the mask has the values 0 and 1, none above dataset.threshold={threshold}; leave "
                "the threshold out for such masks"
            )
        return np.asarray(values > threshold, dtype=np.uint8)
    if not any(binary.issuperset(found.tolist()) for binary in _BINARY_VALUES):
        some = ", ".join(f"{value:g}" for value in found[:5]) + (", ..." if len(found) > 5 else "")
        raise ValueError(
            f"{path}: the mask has the values {some}, but a binary mask has 0 and 1, or 0 and 255; set "
            "dataset.threshold=127 to take what is brighter as foreground"
        )
    return np.asarray(values > 0, dtype=np.uint8)


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


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}; cut the image into tiles") from error
    except _DECODER_ERRORS as error:
        raise ValueError(
            f"{path}: cannot be decoded ({error}); fetch or export the file again, or leave it out of "
            "the split"
        ) from error


def _single_channel(path: Path) -> NDArray[Any]:
    image = _open(path)
    if image.mode in ("CMYK", "YCbCr"):
        image = image.convert("RGB")
    values = np.asarray(image)
    if values.ndim == 2:
        return values
    alpha = values[..., -1] if image.mode in ("LA", "PA", "RGBA") else None
    colours = values if alpha is None else values[..., :-1]
    if (colours != colours[..., :1]).any():
        raise ValueError(
            f"{path}: a colour mask, but a binary mask has equal channels; save the mask as one channel of "
            "class ids, 0 for background and 1 for foreground"
        )
    # a mask drawn in the alpha channel alone would otherwise pass for an empty one
    if alpha is not None and np.ptp(alpha) > 0 and np.ptp(colours) == 0:
        raise ValueError(
            f"{path}: the mask differs only in its alpha channel; save that channel as a grey image"
        )
    return colours[..., 0]


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in path.parts)


def _natural(path: Path) -> list[tuple[int, int, str]]:
    parts = re.findall(r"\d+|\D+", path.as_posix())
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts]
