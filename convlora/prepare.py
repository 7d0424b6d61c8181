"""Get a data set, or check one: `python -m convlora.prepare dataset=isic2017 [action=check]`."""

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
from convlora.cli import command
from convlora.data.bands import measure
from convlora.data.check import Facts, Finding, Place, examine, judge, list_places, summarise
from convlora.data.module import Pair, SegmentationDataModule
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
    output: str
    test_sets: list[str]
    loading: Config
    loss: Config
    metrics: Config
    model: Config | None = None


def prepare(config: PrepareConfig) -> None:
    """Download and verify a data set, or check what is in it.

    Raises:
        ValueError: no such action.
        SystemExit: with code 1 where the check found errors.
    """
    settings = config.dataset  # all of it is got and checked, whatever part a training would take
    whole = {"test_subsets": settings["subsets"]} if settings.get("test_subsets") else {}
    for key in config.loading.keys() - {"_target_", "channels", "percentiles"}:
        raise ValueError(f"loading.{key} has no effect here, where images are read as they are; leave it out")
    loading = make("loading", config.loading)
    data: SegmentationDataModule = make("dataset", settings, ["test_subsets"], loading=loading, **whole)
    if config.action == "download":
        download(data)
    elif config.action == "check":
        sets = [data, *make_test_sets(config.test_sets, "prepare", data)]
        if check(sets, Path(config.output)):
            raise SystemExit(1)
    else:
        raise ValueError(f"action={config.action} must be download or check")


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
    channels, percentiles = first.loading.channels, first.loading.percentiles
    if channels is not None:
        images = [pair.image for pair in listed[0][1]]
        bands = measure(images, channels, percentiles, strict=False)
        for data in sets:
            data.use_bands(bands)
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
