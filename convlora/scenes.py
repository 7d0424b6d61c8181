"""Georeferenced and other large TIFF files, segmented by windows in memory that does not grow with them."""

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from convlora.cleaning import Cleaning
from convlora.data.bands import Bands, load_rasterio, open_raster
from convlora.data.cache import reserve
from convlora.geotiff import read_window, valid_pixels, write_polygons, write_raster
from convlora.inference import Pixels, Predictor, to_found
from convlora.tiles import COLUMNS, Grid, Tiling
from convlora.writing import Item, Job


class Windows(Dataset[Tensor | None]):
    """The windows of a scene as the network takes them; None where a window holds no data.

    Args:
        path: of the scene.
        grid: its windows.
        first: the first that is wanted.
        bands: of the images trained on; None for plain RGB.
        prepare: makes the network's input of RGB pixels [h, w, 3].
    """

    def __init__(
        self, path: Path, grid: Grid, first: int, bands: Bands | None, prepare: Callable[[Pixels], Tensor]
    ):
        self.path = path
        self.windows = grid.windows[first:]
        self.grid = grid
        self.bands = bands
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Tensor | None:
        top, left, height, width = self.windows[index]
        window = load_rasterio().windows.Window(left, top, width, height)
        with open_raster(self.path) as source:
            if not valid_pixels(source, self.bands, window).any():
                return None
            pixels = read_window(source, self.path, self.bands, window)
        return self.prepare(self.grid.padded(pixels))


def predict_scene(item: Item, predictor: Predictor, tiling: Tiling, job: Job) -> None:
    """Write the classes found in a scene, and their probabilities, as GeoTIFF of its size and place.

    Classes are ids, 255 where the scene has no data. A file beside the mask, `NAME.part`, keeps what is done
    row by row of windows. A call that was cut off goes on from there.

    Args:
        item: the scene.
        predictor: that segments windows.
        tiling: how the scene is cut.
        job: further settings.

    Raises:
        OSError: the disk is full or cannot be written to; what is done stays in the part.
        ValueError: the file cannot be decoded, or is not of the kind that was trained on.
    """
    files, colors = item.files(job.output), predictor.class_colors
    rasters = [files[kind] for kind in ("", "probabilities") if kind in files]
    if job.overwrite or not all(file.exists() for file in rasters):
        try:
            part = _segment(item, files[""], predictor, tiling, job)
        except ValueError:  # the scene is damaged, so nothing goes on from here
            Part.forget(files[""])
            raise
        if "probabilities" in files:
            write_raster(item, files["probabilities"], partial(part.read, 1), predictor.bands, None)
        write_raster(item, files[""], partial(part.read, 0), predictor.bands, colors)
        Part.forget(files[""])
    else:
        Part.forget(files[""])  # of a call that ended between the mask and its removal
    if "polygons" in files:
        write_polygons(files[""], files["polygons"], list(colors), item.made_by)


def _segment(item: Item, mask: Path, predictor: Predictor, tiling: Tiling, job: Job) -> "Part":
    path = item.path
    with open_raster(path) as source:
        grid = Grid(source.height, source.width, tiling)
        read_window(source, path, predictor.bands, load_rasterio().windows.Window(0, 0, 1, 1))
    classes = len(predictor.class_colors)
    part = Part(mask, path, grid, classes, item.made_by)
    if part.rows == len(grid.tops):
        return part
    first = grid.first_row(part.rows) * len(grid.lefts)
    windows = Windows(path, grid, first, predictor.bands, predictor.prepare)
    loader = DataLoader(windows, job.batch_size, num_workers=job.num_workers, collate_fn=list)
    tiles = _logits(job.track(loader, path.name), predictor, grid)
    for top, rows in grid.blend(tiles, part.store(), part.rows):
        part.write(top, rows, predictor.cleaning)
    next(tiles, None)  # lets the bar of the progress reach its end
    return part


def _logits(
    batches: Iterable[list[Tensor | None]], predictor: Predictor, grid: Grid
) -> Iterator[Tensor | None]:
    """Return the logits [c, *size] of each window, as they come."""
    height, width = grid.size
    size = (height, width) if len(grid.tops) == len(grid.lefts) == 1 else (grid.side, grid.side)
    for batch in batches:
        seen = [tile for tile in batch if tile is not None]
        logits = iter(predictor.logits(seen, [size] * len(seen)))
        for tile in batch:
            yield None if tile is None else next(logits)[:, :height, :width]


class Part:
    """What is done of a scene, on the disk: classes, probabilities, and room for the sums of logits.

    Args:
        mask: file beside which the part lies; beside that a JSON file says what is done, and of what.
        scene: the file that is segmented.
        grid: its windows.
        classes: number of logits of each pixel.
        made_by: identifies adapter and settings.

    Attributes:
        rows: of windows that are done.

    Raises:
        OSError: there is no room on the disk.
    """

    def __init__(self, mask: Path, scene: Path, grid: Grid, classes: int, made_by: str):
        self.grid = grid
        self.path, self.journal = self.files(mask)
        path = self.path
        self.shape = (classes, grid.size[0], grid.width)
        self.of = made_by
        self.pixels = grid.height * grid.width
        self.rows = 0
        if path.is_file() and self.journal.is_file():
            done = json.loads(self.journal.read_text())
            if done["of"] == self.of:
                self.rows = done["rows"]
                return
        path.parent.mkdir(parents=True, exist_ok=True)
        size = self._store_at + 4 * int(np.prod(self.shape))
        try:
            reserve(path, size)
        except OSError as error:
            raise OSError(
                f"{path.parent}: no room for {path.name}, {size / 2**20:.0f} MiB in which {scene} is "
                f"segmented ({error}); free some, or choose another output"
            ) from error
        self._note()

    @property
    def _store_at(self) -> int:
        return -(-2 * self.pixels // 8) * 8  # aligned

    def store(self) -> Tensor:
        """Return zeros [c, height of a window, width of the scene], on the disk."""
        store = np.memmap(self.path, np.float32, "r+", self._store_at, self.shape)
        store[:] = 0
        return torch.from_numpy(store)

    def write(self, top: int, logits: Tensor, cleaning: Cleaning) -> None:
        """Keep what the logits [c, h, width] of the next row of windows say, cleaned pixel by pixel."""
        height = logits.shape[1]
        layers = np.empty((2, height, self.grid.width), np.uint8)
        for left in range(0, self.grid.width, COLUMNS):
            found = to_found(logits[:, :, left : left + COLUMNS], cleaning)
            layers[0, :, left : left + COLUMNS], layers[1, :, left : left + COLUMNS] = found
        with self.path.open("r+b") as file:
            for layer in (0, 1):
                file.seek(layer * self.pixels + top * self.grid.width)
                file.write(layers[layer].tobytes())
        self.rows += 1
        self._note()

    def read(self, layer: int, top: int, height: int) -> NDArray[np.uint8]:
        """Return rows [height, width] of the classes (layer 0) or probabilities (1)."""
        width = self.grid.width
        with self.path.open("rb") as file:
            file.seek(layer * self.pixels + top * width)
            return np.frombuffer(file.read(height * width), np.uint8).reshape(height, width)

    @staticmethod
    def files(mask: Path) -> tuple[Path, Path]:
        """Return the files of the part of a mask: the data, and what is done of it."""
        return mask.with_name(f"{mask.name}.part"), mask.with_name(f"{mask.name}.part.json")

    @classmethod
    def forget(cls, mask: Path) -> None:
        """Delete the part of a mask, if there is one."""
        for file in cls.files(mask)[::-1]:
            file.unlink(missing_ok=True)

    def _note(self) -> None:
        new = self.journal.with_name(f"{self.journal.name}.new")
        new.write_text(json.dumps({"of": self.of, "rows": self.rows}))
        new.replace(self.journal)
