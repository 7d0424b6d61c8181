"""Get, check or split a data set: `python -m convlora.prepare dataset=isic2017 [action=check]`."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from convlora import draw
from convlora.build import make_test_sets
from convlora.cli import command, given_overrides
from convlora.data.bands import measure
from convlora.data.check import (
    Facts,
    Finding,
    Place,
    examine,
    group_copies,
    judge,
    list_places,
    summarise,
)
from convlora.data.module import SPLITS, Pair, SegmentationDataModule
from convlora.data.sets.folder import Folder
from convlora.data.splitting import draw_split, label
from convlora.fetch import fetch, unpack
from convlora.schema import Config, make

SHEET = 24  # images of a contact sheet
SHEET_SIDE = 320  # px, of the longest side of each

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class PrepareConfig:
    """The keys of conf/prepare.yaml, where they are explained."""

    dataset: Config
    action: str
    data_root: str
    val: float
    test: float
    seed: int
    output: str
    test_sets: list[str]
    loading: Config
    loss: Config
    metrics: Config
    model: Config | None = None


def prepare(config: PrepareConfig) -> None:
    """Download and verify a data set, check what is in it, or draw the split of a folder.

    Raises:
        FileExistsError: the folder has a split.
        ValueError: no such action, or a setting that it has no use for.
        SystemExit: with code 1 where the check found errors.
    """
    settings = config.dataset  # all of it is got and checked, whatever part a training would take
    whole = {"test_subsets": settings["subsets"]} if settings.get("test_subsets") else {}
    for key in config.loading.keys() - {"_target_", "channels", "percentiles"}:
        raise ValueError(f"loading.{key} has no effect here, where images are read as they are; leave it out")
    given = {argument.lstrip("+").partition("=")[0] for argument in given_overrides()}
    idle = ("test_sets", "output") if config.action == "split" else ("val", "test", "seed")
    for key in idle:
        if key in given:
            raise ValueError(f"{key} has no effect with action={config.action}; leave it out")
    if config.action == "download" and settings.get("lists"):
        raise ValueError(
            f"dataset.lists={settings['lists']} has no effect with action=download, which gets the archive "
            "whole; leave it out, or set action=check to look at what they list"
        )
    loading = make("loading", config.loading)
    data: SegmentationDataModule = make("dataset", settings, ["test_subsets"], loading=loading, **whole)
    if config.action == "download":
        download(data)
    elif config.action == "check":
        sets = [data, *make_test_sets(config.test_sets, "prepare", data)]
        if check(sets, Path(config.output)):
            raise SystemExit(1)
    elif config.action == "split":
        split(data, config.val, config.test, config.seed)
    else:
        raise ValueError(f"action={config.action} must be download, check or split")


def download(data: SegmentationDataModule) -> None:
    """Fetch, unpack and verify a data set, as far as that is not done; print what is there.

    A folder that is there but not whole is renamed, see `unpack`. An archive that was there before stays.

    Raises:
        OSError: a person has to fetch it, and the message says how; or the download failed, and what has
            arrived is kept.
        ValueError: the archive, or what is there, is not what was published.
    """
    source = data.source
    try:
        verify(data)
    except OSError as error:
        if source.steps is not None:
            missing = str(error).partition(";")[0]
            raise OSError(f"{missing}, and it has to be fetched by hand. {source.steps}") from error
        if source.url is None:
            raise
        archive = data.root.parent / PurePosixPath(urlsplit(source.url).path).name
        by_hand = archive.is_file()
        fetch(data.name, source.url, archive, source.sha256)
        unpack(data.name, archive, data.root)
        data.forget()
        try:
            verify(data)
        except OSError as incomplete:
            raise OSError(f"{data.name}: {archive} holds another data set; {incomplete}") from incomplete
        if by_hand:
            console.print(f"{archive} was there before and is kept")
        else:
            archive.unlink()
    table = Table("split", "images")
    for split in data.splits:
        table.add_row(split, str(len(data.listed(split))))
    console.print(f"{data.name} is whole, in {data.root}")
    console.print(table)


def verify(data: SegmentationDataModule) -> None:
    """Make sure that all listed files are there, as many as were published.

    Raises:
        OSError: files are missing.
        ValueError: the number of images differs, so that it is another or a part.
    """
    for split in data.splits:
        data.listed(split)
    for complaint in data.incomplete():
        raise ValueError(f"{complaint}; move {data.root} away and run again, or use it as it is")


def check(sets: Sequence[SegmentationDataModule], output: Path) -> bool:
    """Print what is in the data sets and what is wrong, write check.json and contact_sheet.png.

    Returns:
        Whether anything is wrong.

    Raises:
        FileNotFoundError: nothing is there.
    """
    first = sets[0]
    listed, findings = list_places(sets)
    if not listed:
        raise FileNotFoundError(findings[0].message)
    use_bands(sets, listed[0][1])
    output.mkdir(parents=True, exist_ok=True)
    total = sum(len(pairs) for _, pairs in listed)
    found = list(track(examine(listed), "check", total, console=console))
    facts = [each for each in found if isinstance(each, Facts)]
    findings += [each for each in found if isinstance(each, Finding)]
    findings += judge(facts, first.class_names)
    summary = summarise(facts, first.class_names)
    report: dict[str, Any] = {"dataset": first.name, "root": str(first.root), "splits": summary}
    report["findings"] = [asdict(finding) for finding in findings]
    (output / "check.json").write_text(json.dumps(report, indent=2) + "\n")
    written = ["check.json"]
    readable = {(each.place, each.name) for each in facts}
    if pictures := contact_sheet(listed, readable):
        draw.draw_sheet(
            pictures, draw.colors_of(first.class_names, first.class_colors), output / "contact_sheet.png"
        )
        written.append("contact_sheet.png")
    console.print(render(summary))
    for finding in findings:
        console.print(f"{finding.level}: {finding.message}", markup=False)
    errors = sum(finding.level == "error" for finding in findings)
    warnings = len(findings) - errors
    console.print(f"errors: {errors}, warnings: {warnings}; {', '.join(written)} in {output}")
    return errors > 0


def use_bands(sets: Sequence[SegmentationDataModule], pairs: Sequence[Pair]) -> None:
    """Read the images of all data sets by the bands that `loading` names, scaled by those of `pairs`."""
    channels, percentiles = sets[0].loading.channels, sets[0].loading.percentiles
    if channels is not None:
        bands = measure([pair.image for pair in pairs], channels, percentiles, strict=False)
        for data in sets:
            data.use_bands(bands)


def split(data: SegmentationDataModule, val: float, test: float, seed: int) -> None:
    """Draw which images of a folder train, validate and test, write that down and print how it came out.

    Copies and near-copies, as the check finds them, stay together. The splits have about the same share of
    images with each class, and of empty masks.

    Args:
        data: the folder.
        val: share of the images, between 0 and 1.
        test: the same; what is left is for training.
        seed: the same images and seed give the same split.

    Raises:
        FileExistsError: the folder has a split, or a part of one.
        FileNotFoundError: there is no such folder.
        ValueError: the shares are impossible, the data set is no folder of the user's, an image or a mask
            cannot be read, or there are too few.
    """
    if not isinstance(data, Folder):
        raise ValueError(
            f"action=split is for a folder of your own, {data.name} has its splits; leave the action out, or "
            "set dataset=folder data_root=FOLDER"
        )
    for key, share in (("val", val), ("test", test)):
        if not 0 < share < 1:
            raise ValueError(f"{key}={share} must lie between 0 and 1, a share of the images; set {key}=0.2")
    if val + test >= 1:
        raise ValueError(f"val={val} and test={test} leave nothing to train on; their sum must be below 1")
    if seed < 0:
        raise ValueError(f"seed={seed} must be at least 0")
    data.refuse_split()
    pairs = data.listed("test")  # which is all of a folder without splits
    use_bands([data], pairs)
    found = list(track(examine([(Place("all", data, "test"), pairs)]), "read", len(pairs), console=console))
    facts = [each for each in found if isinstance(each, Facts)]
    if unread := [each for each in found if isinstance(each, Finding)]:
        raise ValueError(f"{len(unread)} of {len(pairs)} images cannot be split, first: {unread[0].message}")
    groups, labels = group_copies(facts), label(facts, data.class_names)
    sizes = np.bincount(groups)
    if len(sizes) < len(SPLITS):
        raise ValueError(
            f"{data.name}: {len(pairs)} images, {len(sizes)} that are no copies of others, are too few for "
            f"{len(SPLITS)} splits; add images"
        )
    parts = draw_split(groups, np.column_stack(list(labels.values())), (1 - val - test, val, test), seed)
    names = {
        each: [pair.image.name for pair, part in zip(pairs, parts, strict=True) if part == index]
        for index, each in enumerate(SPLITS)
    }
    data.write_split(names)
    table = Table("", *SPLITS, "all")
    for column in table.columns[1:]:
        column.justify = "right"
    members = [*(parts == index for index in range(len(SPLITS))), parts >= 0]
    table.add_row("images", *(str(own.sum()) for own in members))
    table.add_row("% of images", *(f"{100 * own.mean():.1f}" for own in members))
    for name, shown in labels.items():
        table.add_row(f"{name}, % of them", *(f"{100 * shown[own].mean():.1f}" for own in members))
    console.print(table)
    several = sizes[sizes > 1]
    if several.size:
        console.print(
            f"kept together: {several.sum()} images that are copies or nearly so, in {several.size} "
            f"group{'s' * (several.size > 1)}, the largest of {several.max()}"
        )
    console.print(f"{', '.join(f'{each}.txt' for each in SPLITS)} in {data.root}")


def contact_sheet(
    listed: Sequence[tuple[Place, Sequence[Pair]]], readable: set[tuple[str, str]]
) -> list[tuple[str, draw.Picture]]:
    """Return images with their masks drawn on them, spread over all splits, and what to call them."""
    pictures = []
    for place, pairs in listed:
        names = place.data.names(place.split)
        good = [index for index, name in enumerate(names) if (place.label, name) in readable]
        wanted = max(1, SHEET // len(listed))
        chosen = sorted({good[round(i)] for i in np.linspace(0, len(good) - 1, min(wanted, len(good)))})
        colors = draw.colors_of(place.data.class_names, place.data.class_colors)
        for index in chosen:
            image, mask = (draw.shrink(part, SHEET_SIDE) for part in place.data.read(pairs[index]))
            label = f"{place.label}: {Path(names[index]).stem[-30:]}"
            pictures.append((label, draw.draw_classes(image, mask, colors)))
    return pictures


def render(summary: dict[str, dict[str, Any]]) -> Table:
    """Return a terminal table of the splits."""
    table = Table("", *summary)
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("images", *(str(row["images"]) for row in summary.values()))
    for side in ("width", "height"):
        spans = (row[side] for row in summary.values())
        table.add_row(f"{side}, px", *(str(low) if low == high else f"{low}-{high}" for low, high in spans))
    for name in dict.fromkeys(name for row in summary.values() for name in row["class_shares"]):
        shares = (100 * row["class_shares"].get(name, 0) for row in summary.values())
        table.add_row(f"{name}, % of pixels", *(f"{share:.2f}" for share in shares))
    table.add_row("ignored, % of pixels", *(f"{100 * row['ignored_share']:.2f}" for row in summary.values()))
    table.add_row("empty masks", *(str(row["empty_masks"]) for row in summary.values()))
    return table


main = command("prepare", PrepareConfig, prepare)

if __name__ == "__main__":
    main()
