"""Georeferenced and other large TIFF files, segmented by windows in memory that does not grow with them."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from convlora.data.bands import Bands, load_rasterio, open_raster, take
from convlora.data.cache import reserve
from convlora.inference import Pixels, Predictor, to_found
from convlora.tiles import COLUMNS, Grid, Tiling
from convlora.writing import MADE_BY, TIFF, whole

NO_DATA = 255  # class id where the scene has no data
BLOCK = 512  # side of a block of the files that are written, px
SMALLEST = 256  # px, of an overview
GDAL_CACHE = 64  # MiB
FEATURES = 1000  # polygons at a time
GEO_KEYS = 34735  # the tag of a TIFF that names its coordinate reference system
EQUAL_AREA = "EPSG:6933"  # in which a polygon's area is measured, whatever the scene's projection
ON_EARTH = "EPSG:4326"  # longitude and latitude, which GeoJSON has by its standard (RFC 7946)


@dataclass(frozen=True)
class Writing:
    """How scenes are read and written.

    Attributes:
        made_by: identifies adapter and settings; a part made by others is not gone on with.
        batch_size: windows at a time.
        num_workers: processes that read windows.
        track: shows the progress of what it is given.
    """

    made_by: str
    batch_size: int
    num_workers: int
    track: Callable[[Iterable[Any]], Iterable[Any]]


def is_scene(path: Path, tiles: bool | None) -> bool:
    """Return whether an image is read and written by windows, as GeoTIFF.

    Args:
        path: of the image.
        tiles: true takes every TIFF, false none, None those with a coordinate reference system.

    Raises:
        ValueError: it may be one, and rasterio is not installed.
    """
    if tiles is False or path.suffix.lower() not in TIFF:
        return False
    if tiles is None and not _has_place(path):
        return False
    load_rasterio()
    try:
        with open_raster(path) as source:
            return tiles is True or source.crs is not None
    except ValueError:  # which is told when it is read
        return False


def _has_place(path: Path) -> bool:
    """Return whether a TIFF may be a GeoTIFF, as far as can be told without rasterio."""
    try:
        with Image.open(path) as image:
            return GEO_KEYS in getattr(image, "tag_v2", {})
    except (OSError, Image.DecompressionBombError):  # of a kind that Pillow does not know
        return True


def scene_size(path: Path) -> tuple[int, int]:
    """Return width and height of a scene, px."""
    with open_raster(path) as source:
        return source.width, source.height


def check_place(path: Path) -> None:
    """Refuse a scene whose polygons would have no place on earth; raises ValueError."""
    with open_raster(path) as source:
        lacking = "coordinate reference system" if source.crs is None else "transform from pixels to it"
        if source.crs is None or source.transform.is_identity:
            raise ValueError(
                f"{path} has no {lacking}, so its polygons have no place on earth; leave polygons out, or "
                "give it one: `rio edit-info --crs EPSG:32640 --transform '[1,0,300000,0,-1,2800000]' FILE`"
            )


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
            if not source.dataset_mask(window=window).any():
                return None
            pixels = read_window(source, self.path, self.bands, window)
        return self.prepare(self.grid.padded(pixels))


def read_window(source: Any, path: Path, bands: Bands | None, window: Any) -> Pixels:
    """Read a part of an open file as RGB [h, w, 3], as training reads whole files.

    Raises:
        ValueError: it is not of the kind that was trained on.
    """
    if bands is not None:
        bands.check(source.count, source.dtypes, path)
        return bands.to_rgb(take(source, bands.channels, window=window))
    kinds = [kind.name for kind in source.colorinterp]
    colours = len(kinds) - (kinds[-1] == "alpha")
    if colours not in (1, 3) or "palette" in kinds or set(source.dtypes) != {"uint8"}:
        raise ValueError(
            f"{path} has {source.count} bands of {source.dtypes[0]}, but the adapter was trained on 8-bit "
            "RGB; give such a file, or train with loading.channels=[3,2,1] on images like this one"
        )
    values = source.read([1, 1, 1] if colours == 1 else [1, 2, 3], window=window)
    return np.ascontiguousarray(values.transpose(1, 2, 0))


def segment_scene(
    path: Path, mask: Path, probs: Path | None, predictor: Predictor, tiling: Tiling, writing: Writing
) -> None:
    """Write the classes found in a scene, and their probabilities, as GeoTIFF of its size and place.

    A file beside the mask, `NAME.part`, keeps what is done row by row of windows. A call that was cut off
    goes on from there.

    Args:
        path: of the scene.
        mask: the file that is written: class ids, 255 where the scene has no data.
        probs: the file of the probabilities, 0 to 255; None writes none.
        predictor: that segments windows.
        tiling: how the scene is cut.
        writing: further settings.

    Raises:
        OSError: the disk is full or cannot be written to; what is done stays in the part.
        ValueError: the file cannot be decoded, or is not of the kind that was trained on.
    """
    with open_raster(path) as source:
        grid = Grid(source.height, source.width, tiling)
        read_window(source, path, predictor.bands, load_rasterio().windows.Window(0, 0, 1, 1))
    classes = len(predictor.class_colors)
    part = Part(mask.with_name(f"{mask.name}.part"), path, grid, classes, writing.made_by)
    if part.rows < len(grid.tops):
        first = grid.first_row(part.rows) * len(grid.lefts)
        windows = Windows(path, grid, first, predictor.bands, predictor.prepare)
        loader = DataLoader(windows, writing.batch_size, num_workers=writing.num_workers, collate_fn=list)
        tiles = _logits(writing.track(loader), predictor, grid)
        for top, rows in grid.blend(tiles, part.store(), part.rows):
            part.write(top, rows)
        next(tiles, None)  # there is none, but the progress is seen to reach its end
    if probs is not None:
        _write_raster(path, probs, partial(part.read, 1), writing.made_by, None)
    _write_raster(path, mask, partial(part.read, 0), writing.made_by, predictor.class_colors)
    part.remove()


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
        path: of the file; beside it a JSON file says what is done, and of what.
        scene: the file that is segmented.
        grid: its windows.
        classes: number of logits of each pixel.
        made_by: identifies adapter and settings.

    Attributes:
        rows: of windows that are done.

    Raises:
        OSError: there is no room on the disk.
    """

    def __init__(self, path: Path, scene: Path, grid: Grid, classes: int, made_by: str):
        self.path, self.grid = path, grid
        self.journal = path.with_name(f"{path.name}.json")
        self.shape = (classes, grid.size[0], grid.width)
        stat = scene.stat()
        self.of = {"made_by": made_by, "size": stat.st_size, "changed": stat.st_mtime_ns}
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

    def write(self, top: int, logits: Tensor) -> None:
        """Keep what the logits [c, h, width] of the next row of windows say."""
        height = logits.shape[1]
        layers = np.empty((2, height, self.grid.width), np.uint8)
        for left in range(0, self.grid.width, COLUMNS):
            found = to_found(logits[:, :, left : left + COLUMNS])
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

    def remove(self) -> None:
        """Delete the files of the part."""
        self.journal.unlink()
        self.path.unlink()

    def _note(self) -> None:
        new = self.journal.with_name(f"{self.journal.name}.new")
        new.write_text(json.dumps({"of": self.of, "rows": self.rows}))
        new.replace(self.journal)


def _write_raster(
    scene: Path,
    target: Path,
    read: Callable[[int, int], NDArray[np.uint8]],
    made_by: str,
    class_colors: Mapping[str, Sequence[int]] | None,
) -> None:
    """Write one 8-bit band as tiled and compressed GeoTIFF with overviews, of a scene's size and place.

    Args:
        scene: the file whose place and missing data it takes over.
        target: the file that is written, whole or not at all.
        read: returns rows [h, width] by their top and height.
        made_by: kept in the file.
        class_colors: name -> RGB of each class, in the order of their ids; None for probabilities.

    Raises:
        OSError: it could not be written.
    """
    rasterio = load_rasterio()
    settings = {"GDAL_CACHEMAX": GDAL_CACHE, "GDAL_TIFF_INTERNAL_MASK": True}
    with whole(target) as new, _one_error(), rasterio.Env(**settings), rasterio.open(scene) as source:
        height, width, is_mask = source.height, source.width, class_colors is not None
        profile = {
            "driver": "GTiff", "dtype": "uint8", "count": 1, "height": height, "width": width,
            "crs": source.crs, "transform": source.transform, "tiled": True, "blockxsize": BLOCK,
            "blockysize": BLOCK, "compress": "deflate", "BIGTIFF": "IF_SAFER",
            "nodata": NO_DATA if is_mask else None,
        }  # fmt: skip
        windows = [
            rasterio.windows.Window(0, top, width, min(BLOCK, height - top))
            for top in range(0, height, BLOCK)
        ]
        with rasterio.open(new, "w", **profile) as written:
            written.update_tags(**{MADE_BY: made_by})
            if class_colors is not None:  # before the pixels, after which the file's kind is settled
                written.write_colormap(1, _colormap(class_colors))
                written.update_tags(CLASSES=json.dumps(list(class_colors)))
            for window in windows:
                found, valid = read(window.row_off, window.height), source.dataset_mask(window=window)
                if not is_mask:
                    written.write_mask(valid, window=window)
                written.write(
                    np.where(valid, found, np.uint8(NO_DATA)) if is_mask else found, 1, window=window
                )
        with rasterio.open(new) as written:  # GDAL tells of a full disk late, or not at all
            for window in windows:
                written.read(1, window=window)
        resampling = rasterio.enums.Resampling
        with rasterio.open(new, "r+") as written:
            factors = [2**power for power in range(1, 16) if max(height, width) >> power >= SMALLEST]
            written.build_overviews(factors, resampling.mode if is_mask else resampling.average)
        for level in range(len(factors)):
            with rasterio.open(new, overview_level=level) as written:
                written.read(1, window=rasterio.windows.Window(0, 0, 1, 1))


@contextmanager
def _one_error() -> Iterator[None]:
    """Raise OSError for all that GDAL raises while it writes, which has no class in common."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(str(error)) from error


def _colormap(class_colors: Mapping[str, Sequence[int]]) -> dict[int, tuple[int, int, int]]:
    """Return the colours of class ids; a foreground alone is 1, on black."""
    colors = [(int(r), int(g), int(b)) for r, g, b in class_colors.values()]
    return dict(enumerate([(0, 0, 0), *colors] if len(colors) == 1 else colors))


def write_polygons(mask: Path, target: Path, class_names: Sequence[str], made_by: str) -> None:
    """Write the areas of a mask as GeoJSON: longitude and latitude, properties `class` and `area_m2`.

    Args:
        mask: GeoTIFF of class ids; a foreground alone is 1, and its background gets no polygons.
        target: the file that is written, whole or not at all.
        class_names: in the order of their ids.
        made_by: kept in the file.

    Raises:
        OSError: it could not be written.
    """
    rasterio = load_rasterio()
    from rasterio import features, warp

    names = {1: class_names[0]} if len(class_names) == 1 else dict(enumerate(class_names))
    with (
        rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE),
        rasterio.open(mask) as source,
        whole(target) as new,
        new.open("w") as file,
    ):
        found = features.shapes(rasterio.band(source, 1), transform=source.transform)
        kept = ((shape, names[int(value)]) for shape, value in found if int(value) in names)
        head = json.dumps({"type": "FeatureCollection", MADE_BY: made_by})
        file.write(f'{head[:-1]}, "features": [')
        separator = "\n"
        while few := list(islice(kept, FEATURES)):
            shapes = [shape for shape, _ in few]
            placed = warp.transform_geom(source.crs, ON_EARTH, shapes, precision=7)
            areas = [_area(shape) for shape in warp.transform_geom(source.crs, EQUAL_AREA, shapes)]
            for (_, name), geometry, area in zip(few, placed, areas, strict=True):
                properties = {"class": name, "area_m2": round(area, 2)}
                feature = {"type": "Feature", "properties": properties, "geometry": geometry}
                file.write(separator + json.dumps(feature))
                separator = ",\n"
        file.write("\n]}\n")


def _area(polygon: Mapping[str, Any]) -> float:
    """Return the area of a polygon in the units of its coordinates, squared; holes are left out."""
    first, *holes = (_ring_area(np.asarray(ring)) for ring in polygon["coordinates"])
    return float(first - sum(holes))


def _ring_area(ring: NDArray[np.float64]) -> float:
    x, y = (ring - ring[0]).T  # near the origin, where products lose nothing
    return abs(float(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1]))) / 2
