"""What prediction writes of an image: where, what marks it, and pictures that are whole or not there."""

import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from convlora import draw
from convlora.data.bands import load_rasterio
from convlora.data.images import list_images
from convlora.prompts import Prompt

MADE_BY = "CONVLORA"  # names the mark in the files
PROMPTED = "-prompted"  # ends the mark of what was made of one prompt
TIFF = (".tif", ".tiff")
GEOJSON = ".geojson"
KINDS = ("probabilities", "overlays", "routing", "polygons")  # of files beside the mask


@dataclass(frozen=True)
class Item:
    """An image and the files that are made of it.

    Attributes:
        path: of the image.
        name: of its files, without ending, relative to their folders.
        is_scene: whether it is read and written by windows, as GeoTIFF.
        kinds: folders in the output's, as `probabilities`; the mask itself is "".
        made_by: marks its files, and tells those of this image, adapter and settings from others.
        prompt: tells the object that is meant; None where all of the foreground is.
    """

    path: Path
    name: str
    is_scene: bool
    kinds: Sequence[str]
    made_by: str
    prompt: Prompt | None = None

    def files(self, output: Path) -> dict[str, Path]:
        """Return the files that are made of the image, by their kind."""
        ends = {"polygons": GEOJSON}
        end = TIFF[0] if self.is_scene else ".png"
        return {kind: output / kind / f"{self.name}{ends.get(kind, end)}" for kind in self.kinds}


@dataclass(frozen=True)
class Job:
    """Settings that all images of a call share.

    Attributes:
        output: folder of what is written.
        overwrite: whether what is there is made anew.
        batch_size: images or windows at a time.
        num_workers: processes that read.
        track: shows the progress of what it is given, under a title.
    """

    output: Path
    overwrite: bool
    batch_size: int
    num_workers: int
    track: Callable[[Iterable[Any], str], Iterable[Any]]


def find_images(source: Path, output: Path) -> dict[Path, str]:
    """Return the images at `source`, each with the name of what is made of it.

    The name is the image's path in the folder without its ending, or with it where images differ in that
    alone. A list, NAME.txt, has the path of an image in each line, relative to its own folder.

    Raises:
        FileNotFoundError: no such file or folder, or no images in it.
        ValueError: the output would overwrite the input.
    """
    if source.suffix == ".txt" and source.is_file():
        paths = _listed(source)
        folder = Path(os.path.commonpath([path.parent for path in paths])) if paths else source.parent
    elif source.is_file():
        paths, folder = [source], source.parent
    elif source.is_dir():
        found, folder = list_images(source, recursive=True), source
        seen = (path for path in found if output.resolve() not in path.resolve().parents)
        paths = [path for path in seen if maker(path) is None]  # nor what was written there before
    else:
        raise FileNotFoundError(f"input={source}: no such file or folder")
    if {"images", "masks"} <= {path.relative_to(folder).parts[0] for path in paths}:
        raise ValueError(f"input={source} holds masks beside images; set input={source / 'images'}")
    if output.resolve() == folder.resolve():
        raise ValueError(f"output={output} is the input's folder, masks would replace images; choose another")
    if not paths:
        raise FileNotFoundError(f"input={source}: no images in it")
    names = {path: path.relative_to(folder) for path in paths}
    stems = Counter(name.with_suffix("") for name in names.values())
    return {
        path: str(name.with_suffix("") if stems[name.with_suffix("")] == 1 else name)
        for path, name in names.items()
    }


def check_targets(items: Sequence[Item], output: Path) -> None:
    """Refuse images of which two would be written to one file, or one over an image; raises ValueError."""
    images = {item.path.resolve() for item in items}
    taken: dict[Path, Path] = {}
    for item in items:
        for file in item.files(output).values():
            other = taken.setdefault(file, item.path)
            if other != item.path:
                raise ValueError(
                    f"{other} and {item.path} would both be written to {file}; rename one of the two"
                )
            if file.resolve() in images:
                raise ValueError(
                    f"{file} is an image of the input, which no mask may replace; choose another output"
                )


def _listed(listing: Path) -> list[Path]:
    try:
        lines = [line.strip() for line in listing.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"input={listing} is no text in UTF-8 ({error}); save it as such") from error
    # resolved, since lines of several kinds may name one image, or lead out of the folder
    paths = list(dict.fromkeys((listing.parent / line).resolve() for line in lines if line))
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"input={listing} lists {len(missing)} files that are not there (first {missing[0]}); paths are "
            "absolute or relative to the list's folder"
        )
    return paths


def left_to_do(items: Sequence[Item], output: Path, overwrite: bool) -> list[Item]:
    """Return the images whose files are not all there.

    Raises:
        FileExistsError: files are there that another adapter or other settings made, of another image, or
            something else.
    """
    if overwrite:
        return list(items)
    marks = [(item, [maker(file) for file in item.files(output).values() if file.exists()]) for item in items]
    strange = [item for item, found in marks if set(found) - {item.made_by}]
    if strange:
        file = next(file for file in strange[0].files(output).values() if file.exists())
        raise FileExistsError(
            f"output={output} holds files of {len(strange)} of these images that another adapter or other "
            f"settings made, or of other images of these names (as {file}); choose another output, or set "
            "overwrite=true to replace them"
        )
    return [item for item, found in marks if len(found) < len(item.kinds)]


def remove_stale(items: Sequence[Item], output: Path) -> None:
    """Delete what others made of images and is not about to be written, as overlays of other masks.

    Of images with prompts these are also the masks of further prompts, that an earlier file has told.
    """
    for item in items:
        files = replace(item, kinds=KINDS).files(output)
        for kind, file in files.items():
            if kind not in item.kinds and file.exists() and maker(file) != item.made_by:
                file.unlink()
    for file in list(_of_prompts(items, output)):
        if (maker(file) or "").endswith(PROMPTED):
            file.unlink()


def _of_prompts(items: Sequence[Item], output: Path) -> Iterator[Path]:
    """Yield the files that are called as those of prompts of the items' images and are not the items'."""
    names = {item.name for item in items if item.prompt is not None}
    images = {name.rpartition("_")[0] for name in names}
    parents = {Path(name).parent for name in names}
    for folder in (output / kind for kind in ("", *KINDS)):
        for file in (file for parent in parents for file in (folder / parent).glob("*_*.png")):
            name = str(file.relative_to(folder).with_suffix(""))
            image, _, number = name.rpartition("_")
            if image in images and number.isdecimal() and name not in names:
                yield file


def maker(file: Path) -> str | None:
    """Return what identifies the adapter and the settings that made a file; None of a file from elsewhere."""
    try:
        if file.suffix == GEOJSON:
            with file.open() as lines:
                return str(json.loads(f"{lines.readline()}]}}")[MADE_BY])
        if file.suffix in TIFF:
            with load_rasterio().open(file) as raster:
                found: str | None = raster.tags().get(MADE_BY)
                return found
        with Image.open(file) as picture:
            return picture.info.get(MADE_BY)
    except (OSError, ValueError, KeyError, Image.DecompressionBombError):
        return None


def save(picture: Image.Image, file: Path, made_by: str) -> None:
    """Write a picture as PNG, whole or not at all.

    Raises:
        OSError: it could not be written.
    """
    mark = PngInfo()
    mark.add_text(MADE_BY, made_by)
    with whole(file) as new:
        # runs alone: masks become smaller in half the time, probabilities a tenth larger in a quarter of it
        picture.save(new, "png", pnginfo=mark, compress_type=zlib.Z_RLE)


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Give the name of a file to write, which becomes `file` in the end, or vanishes where writing fails.

    Raises:
        OSError: it could not be written.
    """
    new = file.with_name(f"{file.name}.{os.getpid()}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield new
        new.replace(file)
    except OSError as error:
        raise OSError(
            f"could not write {file} ({error}); is there room on the disk? The same command goes on after "
            "what is done"
        ) from error
    finally:
        new.unlink(missing_ok=True)


def as_mask(classes: NDArray[np.uint8], colors: Mapping[str, Sequence[int]]) -> Image.Image:
    """Return 0 and 255 for a foreground alone, else the class ids with a palette of the classes' colours."""
    if len(colors) == 1:
        return Image.fromarray(classes * np.uint8(255))
    picture = Image.fromarray(classes)
    picture.putpalette([channel for color in colors.values() for channel in color])
    return picture


def as_overlay(
    image: NDArray[np.uint8], classes: NDArray[np.uint8], colors: Mapping[str, Sequence[int]]
) -> Image.Image:
    """Return the classes drawn on the image, of several with a legend below."""
    picture = draw.draw_classes(image, classes, colors)
    return Image.fromarray(picture if len(colors) == 1 else draw.add_legend(picture, colors))
