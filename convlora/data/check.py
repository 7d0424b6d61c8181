"""What is in a data set, and what is wrong with it."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import cv2
import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from convlora import IGNORED
from convlora.data.module import Pair, SegmentationDataModule, Split

HASH_BITS = 64
SAME_HASH = 8  # bits in which the perceptual hashes of one image, encoded twice, may differ
THUMBNAIL = 24  # px
SAME_THUMBNAIL = 4.0  # grey levels by which its thumbnails may differ on average
INVERTED_BORDER = 0.9  # share of the border's pixels that are foreground in a mask that looks inverted
ROWS = 1024  # of the table of all pairs that are compared at once


@dataclass(frozen=True)
class Place:
    """A split of a data set; `label` names it in messages."""

    label: str
    data: SegmentationDataModule
    split: Split


@dataclass(frozen=True)
class Facts:
    """What one image and its mask show.

    Attributes:
        place: label of the split.
        name: of the image.
        size: width and height, px.
        classes: number of pixels by class id.
        border: share of the mask's border that is foreground.
        content: hash of the decoded pixels.
        bits: perceptual hash.
        thumbnail: the image very small.
    """

    place: str
    name: str
    size: tuple[int, int]
    classes: NDArray[np.int64]
    border: float
    content: str
    bits: NDArray[np.bool_]
    thumbnail: NDArray[np.uint8]


@dataclass(frozen=True)
class Finding:
    """Something to look at; an error makes numbers wrong, a warning may be meant."""

    level: str
    kind: str
    message: str
    files: list[str] = field(default_factory=list)


def list_places(
    sets: Sequence[SegmentationDataModule],
) -> tuple[list[tuple[Place, list[Pair]]], list[Finding]]:
    """List every split of the data sets, with what is wrong where one cannot be listed.

    The first data set's splits go by their own names, those of others by `<data set>/<split>`.
    """
    listed: list[tuple[Place, list[Pair]]] = []
    findings: list[Finding] = []
    for data in sets:
        for split in data.splits:
            place = Place(split if data is sets[0] else f"{data.name}/{split}", data, split)
            try:
                listed.append((place, data.listed(split)))
            except (OSError, ValueError) as error:
                findings.append(Finding("error", "listing", str(error)))
        if sum(place.data is data for place, _ in listed) == len(data.splits):  # a part of it may be meant
            findings += [Finding("warning", "incomplete", complaint) for complaint in data.incomplete()]
    return listed, findings


def examine(listed: Iterable[tuple[Place, Sequence[Pair]]]) -> Iterator[Facts | Finding]:
    """Read all pairs in order; yields the facts of each, or what is wrong with one that cannot be read."""

    def look(place: Place, pair: Pair, name: str) -> Facts | Finding:
        try:
            return _look(place, pair, name)
        except (OSError, ValueError) as error:
            return Finding("error", "unreadable", str(error), [name])

    names = [
        (place, *each)
        for place, pairs in listed
        for each in zip(pairs, place.data.names(place.split), strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(look, *zip(*names, strict=True))


def judge(facts: Sequence[Facts], class_names: Sequence[str]) -> list[Finding]:
    """Find the same image twice, empty and inverted masks, and classes that never occur."""
    return [*_find_copies(facts), *_judge_masks(facts, class_names)]


def group_copies(facts: Sequence[Facts]) -> NDArray[np.int64]:
    """Return the group of each image [n]: those of one are joined by a chain of copies and near-copies."""
    first: dict[str, int] = {}
    contents = np.array([first.setdefault(each.content, len(first)) for each in facts], np.int64)
    different = [facts[index] for index in np.unique(contents, return_index=True)[1]]
    rows, columns = np.array(_near_copies(different), np.int64).reshape(-1, 2).T
    joined = coo_array((np.ones(len(rows)), (rows, columns)), (len(first), len(first)))
    groups: NDArray[np.int64] = connected_components(joined, directed=False)[1][contents]
    return groups


def summarise(facts: Sequence[Facts], class_names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return for each split the number of images, their sizes, pixel shares by class, and empty masks."""
    summary = {}
    for place in dict.fromkeys(each.place for each in facts):
        own = [each for each in facts if each.place == place]
        pixels = np.sum([each.classes for each in own], axis=0)
        scored = max(1, int(pixels[:IGNORED].sum()))
        shares = pixels[:IGNORED] / scored
        names = class_names if len(class_names) > 1 else ["background", *class_names]
        widths, heights = zip(*(each.size for each in own), strict=True)
        summary[place] = {
            "images": len(own),
            "width": [min(widths), max(widths)],
            "height": [min(heights), max(heights)],
            "class_shares": {name: round(float(shares[index]), 5) for index, name in enumerate(names)},
            "ignored_share": round(float(pixels[IGNORED] / max(1, pixels.sum())), 5),
            "empty_masks": sum(_is_empty(each, class_names) for each in own),
        }
    return summary


def _look(place: Place, pair: Pair, name: str) -> Facts:
    image, mask = place.data.read(pair)
    height, width = mask.shape
    border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    return Facts(
        place.label,
        name,
        (width, height),
        np.bincount(mask.ravel(), minlength=IGNORED + 1),
        float((border == 1).mean()),
        hashlib.sha256(f"{width} {height}".encode() + image.tobytes()).hexdigest(),
        imagehash.phash(Image.fromarray(image)).hash.ravel(),
        cv2.resize(image, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA),
    )


def _find_copies(facts: Sequence[Facts]) -> list[Finding]:
    findings = []
    for kind, pairs in (
        ("same", _exact_copies(facts)),
        ("nearly the same", _near_copies(facts)),
    ):
        leaks: dict[tuple[str, str], list[str]] = defaultdict(list)
        for i, j in pairs:
            a, b = facts[i], facts[j]
            leaks[a.place, b.place].append(f"{a.name} = {b.name}")
        for (one, other), files in leaks.items():
            listing = f"{len(files)} of them ({kind}): {_first(files)}"
            if one == other:
                message = f"{one} has images twice, {listing}; keep one of each"
                findings.append(Finding("warning", "duplicate", message, files))
            else:
                message = (
                    f"{one} and {other} share images, {listing}; take them out of one, or scores mislead"
                )
                findings.append(Finding("error", "leak", message, files))
    return findings


def _exact_copies(facts: Sequence[Facts]) -> list[tuple[int, int]]:
    by_content: dict[str, list[int]] = defaultdict(list)
    for index, each in enumerate(facts):
        by_content[each.content].append(index)
    return [pair for group in by_content.values() for pair in combinations(group, 2)]


def _near_copies(facts: Sequence[Facts]) -> list[tuple[int, int]]:
    """Return pairs whose perceptual hashes and thumbnails agree, those of the same pixels left out."""
    if not facts:
        return []
    signs = np.array([each.bits for each in facts], np.float32) * 2 - 1
    thumbnails = np.array([each.thumbnail for each in facts], np.int16)
    copies = []
    for start in range(0, len(facts), ROWS):
        distance = (HASH_BITS - signs[start : start + ROWS] @ signs.T) / 2
        rows, columns = np.nonzero(distance <= SAME_HASH)
        rows += start
        keep = rows < columns
        for i, j in zip(rows[keep].tolist(), columns[keep].tolist(), strict=True):
            close = np.abs(thumbnails[i] - thumbnails[j]).mean() <= SAME_THUMBNAIL
            if close and facts[i].content != facts[j].content:
                copies.append((i, j))
    return copies


def _judge_masks(facts: Sequence[Facts], class_names: Sequence[str]) -> list[Finding]:
    findings = []
    empty = [each.name for each in facts if _is_empty(each, class_names)]
    if empty:
        message = (
            f"{len(empty)} masks of {len(facts)} are empty: {_first(empty)}; is nothing there to be found?"
        )
        findings.append(Finding("warning", "empty mask", message, empty))
    if len(class_names) == 1:
        inverted = [each.name for each in facts if each.border >= INVERTED_BORDER and each.classes[0] > 0]
        if inverted:
            message = (
                f"{len(inverted)} masks of {len(facts)} look inverted, foreground all along the border: "
                f"{_first(inverted)}; foreground is what is not 0"
            )
            findings.append(Finding("warning", "inverted mask", message, inverted))
    elif facts:
        pixels = np.sum([each.classes for each in facts], axis=0)[: len(class_names)]
        for index in np.flatnonzero(pixels == 0):
            message = f"class {class_names[index]} is in no mask; is dataset.class_names right?"
            findings.append(Finding("warning", "absent class", message))
    sizes = Counter(min(each.size) for each in facts)
    if tiny := sum(count for size, count in sizes.items() if size < THUMBNAIL):
        findings.append(
            Finding("warning", "tiny image", f"{tiny} images are less than {THUMBNAIL} px wide or high")
        )
    return findings


def _is_empty(facts: Facts, class_names: Sequence[str]) -> bool:
    """Tell masks without foreground or, of several classes, without any pixel that counts."""
    return int(facts.classes[len(class_names) == 1 : IGNORED].sum()) == 0


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
