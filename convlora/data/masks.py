"""Mask files as class ids, whatever way they are stored."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convlora import IGNORED
from convlora.data.images import open_image

MAX_CLASSES = 255  # ids are 8-bit, and the last one marks ignored pixels
FEW_VALUES = 32  # of a mask; one with more is a picture in grey
_BINARY_VALUES = ({0, 1}, {0, 255}, {0, 65535})


@dataclass(frozen=True)
class Masks:
    """How the mask files of a data set become class ids.

    With one class, the foreground, masks are binary. With several, a file of one channel holds ids; a file of
    three holds the classes' colours where they are given, else ids in equal channels; a file with a palette
    holds colours where all that it uses are the classes', else ids.

    Args:
        class_names: of the foreground alone, or of every class, the background included.
        class_ids: values of the classes in mask files; None for 0, 1, 2, ...
        class_colors: RGB of the classes in coloured mask files.
        ignore_index: of pixels that count for nothing, an id or, in coloured mask files, an RGB colour.
        threshold: of binary masks with grey values; foreground is above it.

    Raises:
        ValueError: the settings contradict each other.
    """

    class_names: Sequence[str]
    class_ids: Sequence[int] | None = None
    class_colors: Sequence[Sequence[int]] | None = None
    ignore_index: int | Sequence[int] | None = None
    threshold: int | None = None

    def __post_init__(self) -> None:
        count = len(self.class_names)
        if not 1 <= count <= MAX_CLASSES or len(set(self.class_names)) < count:
            raise ValueError(
                f"dataset.class_names={list(self.class_names)}: name 1 to {MAX_CLASSES} classes, each once"
            )
        for key, values in (("class_ids", self.class_ids), ("class_colors", self.class_colors)):
            if values is not None and (len(values) != count or len(set(map(str, values))) < count):
                raise ValueError(
                    f"dataset.{key}={_plain(values)} has not one value for each of the {count} classes "
                    f"({', '.join(self.class_names)}); give {count} different ones, or null"
                )
        for color in self.class_colors or ():
            if len(color) != 3 or not all(0 <= channel <= 255 for channel in color):
                raise ValueError(
                    f"dataset.class_colors: {_plain(color)} is no colour; give [r, g, b], 0..255"
                )
        if count == 1 and (self.class_ids is not None or self.ignore_index is not None):
            raise ValueError(
                f"dataset.class_names={list(self.class_names)}: with one class masks are binary and take no "
                "class_ids or ignore_index; name the background too, as in [background, "
                f"{self.class_names[0]}]"
            )
        if count > 1 and self.threshold is not None:
            raise ValueError(
                f"dataset.threshold={self.threshold} makes binary masks, but dataset.class_names has {count} "
                "classes; set threshold=null, or name the foreground alone"
            )
        if self.threshold is not None and not 0 <= self.threshold < 255:
            raise ValueError(f"dataset.threshold={self.threshold} must be 0 to 254, or null")
        if isinstance(self.ignore_index, int) and self.ignore_index in self.ids:
            raise ValueError(
                f"dataset.ignore_index={self.ignore_index} is the id of class "
                f"{self.class_names[self.ids.index(self.ignore_index)]}; take it out of class_names"
            )

    @property
    def ids(self) -> Sequence[int]:
        """Values of the classes in mask files of ids."""
        return range(len(self.class_names)) if self.class_ids is None else self.class_ids

    def read(self, path: Path) -> NDArray[np.uint8]:
        """Read a mask upright as class ids [h, w]: 0 and 1 if binary, else 0, 1, 2, ... and `IGNORED`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file cannot be decoded or holds what is no class.
        """
        if len(self.class_names) == 1:
            return read_binary(path, self.threshold)
        values = _pixels(path, self._colors)
        if values.ndim == 3 and values.shape[2] > 2 and self.class_colors is not None:
            red, green, blue = np.moveaxis(values[..., :3].astype(np.int32), -1, 0)
            return self._look_up(path, (red << 16) + (green << 8) + blue, self._colors)
        kind = "of class ids, or give the classes' colours in dataset.class_colors"
        return self._look_up(path, _single_channel(path, values, kind), self._ids)

    @cached_property
    def _ids(self) -> dict[int, int]:
        known = {value: index for index, value in enumerate(self.ids)}
        return known | ({self.ignore_index: IGNORED} if isinstance(self.ignore_index, int) else {})

    @cached_property
    def _colors(self) -> dict[int, int]:
        known = {_number(color): index for index, color in enumerate(self.class_colors or ())}
        return known | (
            {_number(self.ignore_index): IGNORED} if isinstance(self.ignore_index, Sequence) else {}
        )

    def _look_up(self, path: Path, values: NDArray[Any], known: dict[int, int]) -> NDArray[np.uint8]:
        classes, unknown = np.full(values.shape, IGNORED, np.uint8), np.ones(values.shape, bool)
        for value, index in known.items():
            hit = values == value
            classes[hit] = index
            unknown &= ~hit
        strange = np.unique(values[unknown]).tolist()
        if strange:
            raise ValueError(
                f"{path}: the mask has {_several([self._name(value, known) for value in strange])}, which "
                f"{'is' if len(strange) == 1 else 'are'} none of the {len(self.class_names)} classes "
                f"({_several([self._name(value, known) for value in known])}); mend the mask, or name the "
                "class in dataset.class_names (or in dataset.ignore_index to leave it out)"
            )
        return classes

    def _name(self, value: int, known: dict[int, int]) -> str:
        if known is self._ids:
            return str(value)
        return f"[{value >> 16}, {value >> 8 & 255}, {value & 255}]"


def read_binary(path: Path, threshold: int | None = None) -> NDArray[np.uint8]:
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
    kind = (
        "of class ids, 0 for background and 1 for foreground, or name all classes in dataset.class_names and "
        "their colours in dataset.class_colors"
    )
    values = _single_channel(path, _pixels(path), kind)
    found = np.unique(values)
    if threshold is not None:
        if 0 < found[-1] <= min(1, threshold):
            raise ValueError(
                f"{path}: the mask has the values 0 and 1, none above dataset.threshold={threshold}; leave "
                "the threshold out for such masks"
            )
        return np.asarray(values > threshold, dtype=np.uint8)
    if not any(binary.issuperset(found.tolist()) for binary in _BINARY_VALUES):
        raise ValueError(
            f"{path}: the mask has the values {_several([f'{value:g}' for value in found])}, but a binary "
            f"mask has 0 and 1, or 0 and 255; {_way_out(found)}"
        )
    return np.asarray(values > 0, dtype=np.uint8)


def _way_out(found: NDArray[Any]) -> str:
    """Advise on a mask of other values: a threshold halfway if one is allowed there and splits the mask."""
    least, greatest = float(found[0]), float(found[-1])
    threshold = int(min(254.0, max(0.0, (least + greatest) / 2)))
    if least <= threshold < greatest:
        advice = f"set dataset.threshold={threshold} to take what is brighter as foreground"
    else:
        advice = "save it with 0 for background and 255 for foreground"
    if 2 < len(found) <= FEW_VALUES:
        advice += (
            f", or, if these are {len(found)} classes, name them in dataset.class_names and their values in "
            "dataset.class_ids, and train with metrics=multiclass loss=cross_entropy_dice"
        )
    return advice


def _pixels(path: Path, colors: Collection[int] = ()) -> NDArray[Any]:
    """Read a mask; a palette's colours if all that are used are among `colors`, else its indices."""
    image = open_image(path)
    if image.mode == "P":
        palette = image.getpalette("RGB") or []
        used = [palette[3 * index :][:3] for index in np.unique(np.asarray(image)).tolist()]
        if colors and all(len(color) == 3 and _number(color) in colors for color in used):
            image = image.convert("RGB")
        elif not colors and palette[:6] == [255, 255, 255, 0, 0, 0]:
            raise ValueError(
                f"{path}: a palette mask with white at index 0 and black at 1, which would be taken the "
                "other way round; save it as a grey image"
            )
    return np.asarray(image.convert("RGB") if image.mode in ("CMYK", "YCbCr") else image)


def _single_channel(path: Path, values: NDArray[Any], kind: str) -> NDArray[Any]:
    if values.ndim == 2:
        return values
    alpha = values[..., -1] if values.shape[2] in (2, 4) else None
    colours = values if alpha is None else values[..., :-1]
    if (colours != colours[..., :1]).any():
        raise ValueError(
            f"{path}: a colour mask, but a mask has equal channels; save the mask as one channel {kind}"
        )
    # a mask drawn in the alpha channel alone would otherwise pass for an empty one
    if alpha is not None and np.ptp(alpha) > 0 and np.ptp(colours) == 0:
        raise ValueError(
            f"{path}: the mask differs only in its alpha channel; save that channel as a grey image"
        )
    return colours[..., 0]


def _number(color: Sequence[int]) -> int:
    """Return a colour as one number, so that it can be compared at once."""
    red, green, blue = color
    return (red << 16) + (green << 8) + blue


def _several(values: Sequence[str]) -> str:
    return ", ".join(values[:5]) + (", ..." if len(values) > 5 else "")


def _plain(values: Sequence[Any]) -> list[Any]:
    return [list(value) if isinstance(value, Sequence) else value for value in values]
