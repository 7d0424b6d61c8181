"""Pairs of images and masks, found in folders or listed in a CSV."""

import csv
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from convlora.data.images import list_images
from convlora.data.samples import Pair


def matched(name: str, images: Path, masks: Path, suffix: str = "") -> list[Pair]:
    """Pair the images of a folder with the masks whose stem is the image's followed by `suffix`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: an image has no mask or the reverse, or a stem stands for two files.
    """
    image_of, mask_of = by_stem(name, images), by_stem(name, masks)
    mask_stems = {stem + suffix for stem in image_of}
    folder = images.parent
    refuse(
        name,
        f"{folder}: images without a mask",
        [stem for stem in image_of if stem + suffix not in mask_of],
    )
    refuse(name, f"{folder}: masks without an image", [stem for stem in mask_of if stem not in mask_stems])
    return [Pair(image, mask_of[stem + suffix]) for stem, image in image_of.items()]


def by_stem(name: str, folder: Path) -> dict[str, Path]:
    """List the images of a folder by stem; raises what `matched` does."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{name}: no folder {folder}; images and masks lie in folders so named")
    files = list_images(folder)
    found = {file.stem: file for file in files}
    double = [file.name for file in files if found[file.stem] is not file]
    refuse(name, f"{folder}: files that share their stem with another", double)
    return found


def refuse(name: str, complaint: str, files: Sequence[str]) -> None:
    """Raise ValueError if there are any files to complain of."""
    if files:
        raise ValueError(
            f"{name}: {complaint} ({len(files)}): {', '.join(files[:3])}; add or remove files so that each "
            "image has one mask of its stem"
        )


def refuse_overlap(name: str, split: str, images: Mapping[str, Collection[str]]) -> None:
    """Raise ValueError if an image of a split is in another one too.

    Args:
        name: of the data set.
        split: whose images are held against the others'.
        images: what names the images of each split.
    """
    for other in images:
        both = sorted({*images[split]} & {*images[other]}) if other != split else []
        if both:
            raise ValueError(
                f"{name}: images in both {split} and {other} ({len(both)}), first {both[0]}; list each image "
                "in one split only"
            )


def csv_pairs(csv_path: Path, root: Path | None = None) -> list[Pair]:
    """List the pairs of a CSV with the columns `image` and `label`.

    Args:
        csv_path: of the file.
        root: folder to which the paths in it are relative; None is the file's own.

    Raises:
        ValueError: a column is missing, or a row has no value in one.
    """
    with csv_path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        if not {"image", "label"} <= set(columns):
            raise ValueError(
                f"{csv_path} has the columns {', '.join(columns)}; name its two columns image and label"
            )
        rows = list(reader)
    for number, row in enumerate(rows, start=1):
        if not (row["image"] and row["label"]):
            raise ValueError(
                f"{csv_path}: row {number} lacks an image or a label; fill it in or delete the row"
            )
    root = csv_path.parent if root is None else root
    return [Pair(root / row["image"], root / row["label"]) for row in rows]
