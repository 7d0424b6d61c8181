"""Windows of an image that is larger than what a network is shown at once, and the blending of their logits.

Neighbouring windows overlap. Where they do, their logits are averaged with weights that fall to nothing at
each window's edge, so that no seam is left.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LEAST = 16  # side of a window, px
COLUMNS = 4096  # that are moved at a time, so that wide images need no more memory than narrow ones


@dataclass(frozen=True)
class Tiling:
    """How images are cut into windows.

    Args:
        side: of a window, px of the image.
        overlap: of neighbours, at least, as a share of the side.

    Raises:
        ValueError: one of them is impossible.
    """

    side: int
    overlap: float = 0.25

    def __post_init__(self) -> None:
        if self.side < LEAST:
            raise ValueError(f"tile={self.side} must be at least {LEAST}, the side of a window in pixels")
        if not 0 < self.overlap <= 0.5:
            raise ValueError(f"overlap={self.overlap} must lie above 0 and be at most 0.5; 0.25 is usual")


def choose_tiling(tile: int | None, overlap: float, median_side: int | None, checkpoint: str) -> Tiling:
    """Return how images are cut, by default into windows as large as the images trained on.

    Args:
        tile: side of a window, px; None takes the median side.
        overlap: of neighbours, as a share of the side.
        median_side: of the images that were trained on, px; None where it is not known.
        checkpoint: the adapter, for the message.

    Raises:
        ValueError: neither side is known, or a number is impossible.
    """
    side = median_side if tile is None else tile
    if side is None:
        raise ValueError(
            f"{checkpoint} does not say how large its training images were; set tile=PIXELS, the side of a "
            "window in which objects look as large as there"
        )
    return Tiling(side, overlap)


def check_tile(tile: int, sizes: Iterable[tuple[Path, tuple[int, int]]]) -> None:
    """Refuse a window that is larger than all images, which are given by path, width and height.

    Raises:
        ValueError: it is.
    """
    seen = []
    for path, (width, height) in sizes:
        if max(width, height) >= tile:
            return
        seen.append(f"{path} has {width} x {height}")
    raise ValueError(
        f"tile={tile} is larger than the images ({seen[0]} pixels); set a smaller tile, or leave it out"
    )


class Window(NamedTuple):
    """A rectangle of an image, px."""

    top: int
    left: int
    height: int
    width: int


class Grid:
    """The windows of one image, evenly spread; an image that one window holds is a single one as it is.

    Args:
        height: of the image, px.
        width: of the image, px.
        tiling: how it is cut.

    Attributes:
        tops: of the rows of windows.
        lefts: of the columns of windows.
        size: height and width of each window, which is not square where a side of the image is too short.
    """

    def __init__(self, height: int, width: int, tiling: Tiling):
        self.height, self.width, self.side = height, width, tiling.side
        self.size = min(height, tiling.side), min(width, tiling.side)
        self.tops, self.lefts = _starts(height, tiling), _starts(width, tiling)
        self._rows = _weights(height, self.tops, self.size[0])
        self._columns = _weights(width, self.lefts, self.size[1])

    @property
    def windows(self) -> list[Window]:
        """All windows, row by row."""
        return [Window(top, left, *self.size) for top in self.tops for left in self.lefts]

    def first_row(self, row: int) -> int:
        """Return the first row of windows that shares pixels with the given one or those after it."""
        return next(index for index, top in enumerate(self.tops) if top + self.size[0] > self.tops[row])

    def padded(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return a window [h, w, 3] as a square, mirrored where the image is too short, so as to keep scale.

        A window that is the whole image stays as it is, as in training.
        """
        height, width = self.size
        if height == width or len(self.tops) == len(self.lefts) == 1:
            return pixels
        mirrored = cv2.copyMakeBorder(
            pixels, 0, self.side - height, 0, self.side - width, cv2.BORDER_REFLECT_101
        )
        return np.asarray(mirrored)

    def blend(
        self, tiles: Iterable[Tensor | None], store: Tensor, row: int = 0
    ) -> Iterator[tuple[int, Tensor]]:
        """Average the windows' logits.

        Args:
            tiles: logits [c, *size] of each window, row by row from row `first_row(row)` on; None of a window
                whose pixels do not matter.
            store: zeros [c, size[0], width], in which the sums are made.
            row: of windows, the first whose pixels are wanted.

        Yields:
            Top and logits [c, h, width] of the pixels that have them all, down to the image's end. They lie
            in the store and hold until the next are asked for.
        """
        tiles, height = iter(tiles), self.size[0]
        for index in range(self.first_row(row), len(self.tops)):
            for column, left in enumerate(self.lefts):
                tile = next(tiles)
                if tile is not None:
                    weights = self._rows[index][:, None] * self._columns[column]
                    place = store[:, :, left : left + self.size[1]]
                    place += tile.to(store.device) * weights.to(store.device)
            top = self.tops[index]
            done = (self.tops[index + 1] if index + 1 < len(self.tops) else self.height) - top
            if index >= row:
                yield top, store[:, :done]
            for start in range(0, self.width, COLUMNS):
                part = store[:, :, start : start + COLUMNS]
                part[:, : height - done] = part[:, done:].clone()
                part[:, height - done :] = 0


def _starts(length: int, tiling: Tiling) -> list[int]:
    """Return where windows start along a side, evenly, with no less overlap than was asked for."""
    rest = length - tiling.side
    if rest <= 0:
        return [0]
    steps = math.ceil(rest / (tiling.side * (1 - tiling.overlap)))
    return [round(index * rest / steps) for index in range(steps + 1)]


def _weights(length: int, starts: list[int], size: int) -> Tensor:
    """Return the weights [n, size] of n windows along a side: of Hann, scaled to add to 1 everywhere."""
    bell = np.sin(np.pi * (np.arange(size) + 0.5) / size) ** 2
    total = np.zeros(length)
    for start in starts:
        total[start : start + size] += bell
    return torch.from_numpy(np.stack([bell / total[start : start + size] for start in starts])).float()
