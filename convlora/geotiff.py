"""GeoTIFF: which images are one, and the writing of masks and polygons that keep their place."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convlora.data.bands import Bands, load_rasterio, open_raster, take
from convlora.data.images import way_out
from convlora.writing import MADE_BY, TIFF, Item, whole

NO_DATA = 255  # class id where the scene has no data
BLOCK = 512  # side of a block of the files that are written, px
SMALLEST = 256  # px, of an overview
GDAL_CACHE = 64  # MiB
FEATURES = 1000  # polygons at a time
GEO_KEYS = 34735  # the tag of a TIFF that names its coordinate reference system
# in which a polygon's area is measured, around the middle of the scene, whatever the scene's projection
EQUAL_AREA = "+proj=laea +lat_0={} +lon_0={} +datum=WGS84 +units=m"
ON_EARTH = "EPSG:4326"  # longitude and latitude, which GeoJSON has by its standard (RFC 7946)


def is_scene(path: Path, tiles: bool | None) -> bool:
    """Return whether an image is read and written by windows, as GeoTIFF.

    Args:
        path: of the image.
        tiles: true takes every TIFF, false none, None those with a coordinate reference system.

    Raises:
        ValueError: it may be one, and rasterio is not installed, or it has its place by control points.
    """
    if tiles is False or path.suffix.lower() not in TIFF:
        return False
    if tiles is None and not _has_place(path):
        return False
    load_rasterio()
    try:
        with open_raster(path) as source:
            points = source.crs is None and bool(source.gcps[0])
            found: bool = tiles is True or source.crs is not None
    except ValueError:  # which is told when it is read
        return False
    if points:
        raise ValueError(
            f"{path} has its place by control points, which no mask could keep; bring it to a grid by "
            "`gdalwarp` first, or set tiles=false for a mask without a place"
        )
    return found


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
    try:
        middle(path)
    except OSError as error:
        raise ValueError(
            f"{path}: its coordinate reference system leads to no longitude and latitude ({error}), which "
            "polygons have; leave polygons out, or bring it to another one by `rio warp --dst-crs EPSG:4326`"
        ) from error


def middle(path: Path) -> tuple[float, float]:
    """Return longitude and latitude of the middle of a scene; raises OSError where it has none."""
    load_rasterio()
    from rasterio import warp

    with open_raster(path) as source, _one_error():
        place = source.transform @ (source.width / 2, source.height / 2)
        [[lon], [lat]] = warp.transform(source.crs, ON_EARTH, *([each] for each in place))[:2]
        if not (np.isfinite(lon) and np.isfinite(lat)):
            raise OSError(f"its middle {place} lies nowhere on earth")
        return lon, lat


def read_window(source: Any, path: Path, bands: Bands | None, window: Any) -> NDArray[np.uint8]:
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
            f"RGB; give such a file, or {way_out(source.count)}"
        )
    values = source.read([1, 1, 1] if colours == 1 else [1, 2, 3], window=window)
    return np.ascontiguousarray(values.transpose(1, 2, 0))


def valid_pixels(source: Any, bands: Bands | None, window: Any) -> NDArray[np.bool_]:
    """Return which pixels [h, w] of a part of an open file hold data.

    Of the bands that are read those with a value that is declared no data, or is not finite, hold none; a
    plain image has none where it is transparent or where all of it is declared no data.
    """
    if bands is None:
        return np.asarray(source.dataset_mask(window=window) > 0)
    values: Any = np.ma.asarray(take(source, bands.channels, window=window))  # type: ignore[no-untyped-call]
    known = ~np.ma.getmaskarray(values) & np.isfinite(np.ma.getdata(values))  # type: ignore[no-untyped-call]
    return np.asarray(known.any(axis=0))


def write_raster(
    item: Item,
    target: Path,
    read: Callable[[int, int], NDArray[np.uint8]],
    bands: Bands | None,
    class_colors: Mapping[str, Sequence[int]] | None,
) -> None:
    """Write one 8-bit band as tiled and compressed GeoTIFF with overviews, of a scene's size and place.

    Args:
        item: the scene, whose place and missing data it takes over.
        target: the file that is written, whole or not at all.
        read: returns rows [h, width] by their top and height.
        bands: of the images trained on; None for plain RGB.
        class_colors: name -> RGB of each class, in the order of their ids; None for probabilities.

    Raises:
        OSError: it could not be written.
    """
    rasterio = load_rasterio()
    settings = {"GDAL_CACHEMAX": GDAL_CACHE, "GDAL_TIFF_INTERNAL_MASK": True}
    with whole(target) as new, _one_error(), rasterio.Env(**settings), rasterio.open(item.path) as source:
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
            written.update_tags(**{MADE_BY: item.made_by})
            if class_colors is not None:  # before the pixels, after which the file's kind is settled
                written.write_colormap(1, _colormap(class_colors))
                written.update_tags(CLASSES=json.dumps(list(class_colors)))
            for window in windows:
                found = read(window.row_off, window.height)
                valid = valid_pixels(source, bands, window)
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

    lon, lat = middle(mask)
    equal_area = EQUAL_AREA.format(lat, lon)
    names = {1: class_names[0]} if len(class_names) == 1 else dict(enumerate(class_names))
    with (
        rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE),
        rasterio.open(mask) as source,
        whole(target) as new,
        _one_error(),
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
            areas = [_area(shape) for shape in warp.transform_geom(source.crs, equal_area, shapes)]
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
