"""The report as one HTML file that needs nothing else: no network, no script."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from convlora import comparison, figures
from convlora.comparison import Section, Setting
from convlora.results import read_rows
from convlora.run import METRICS, read_curves

PICTURES = 6_000_000  # characters that all pictures together may take, about
WIDTHS = (900, 700, 500, 360, 240)  # px, of which a picture takes the first that its share has room for


@dataclass(frozen=True)
class Tinted:
    """A table of numbers whose cells are coloured by them.

    Attributes:
        title: above it.
        corner: head of the rows' names.
        heads: of the columns.
        rows: name -> numbers as text, each with the share of the colour, 0 to 1.
    """

    title: str
    corner: str
    heads: Sequence[str]
    rows: dict[str, list[tuple[str, float]]]


def render(sections: Sequence[Section]) -> str:
    """Return the page."""
    here = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=here, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    share = PICTURES // sum(len(section.settings) for section in sections)
    parts = [_part(f"s{number}", section, share) for number, section in enumerate(sections, start=1)]
    return environment.get_template("page.html").render(parts=parts)


def _part(name: str, section: Section, share: int) -> dict[str, Any]:
    """Return what the template shows of a section."""
    colors = figures.palette(len(section.settings))
    heads, rows = comparison.table(section)
    return {
        "name": name,
        "section": section,
        "colors": colors,
        "heads": heads,
        "rows": rows,
        "notes": comparison.notes(section),
        "grids": [_grid(section, grid) for grid in comparison.grids(section)],
        "costs": _costs(name, section, colors),
        "curves": _curves(name, section, colors),
        "reliability": _reliability(name, section, colors),
        "routing": [table for each in section.settings if (table := _routing(each))],
        "classes": [table for test in section.tests if (table := _classes(section, test))],
        "scores": {test: _scores(section, test) for test in section.tests},
        "images": comparison.extremes(section),
        "pictures": [
            (each, picture)
            for each in section.settings
            if (picture := shrink(each.first.folder / "overlays.png", share))
        ],
        "unlike": comparison.unlike(section),
    }


def shrink(path: Path, share: int) -> str | None:
    """Return a picture as the address of a JPEG, None where there is none.

    Args:
        path: of the picture.
        share: characters that it may take; the smallest width may take more.
    """
    if not path.is_file():
        return None
    picture, text = Image.open(path).convert("RGB"), ""
    for width in WIDTHS:
        small = picture.copy()
        small.thumbnail((width, picture.height))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=72, optimize=True)
        text = base64.b64encode(buffer.getvalue()).decode()
        if len(text) <= share:
            break
    return f"data:image/jpeg;base64,{text}"


def _tint(values: Sequence[float]) -> list[tuple[str, float]]:
    """Return numbers as text with their places between the least and the greatest of them."""
    there = [value for value in values if value == value]
    low, high = min(there, default=0.0), max(there, default=0.0)
    return [
        (f"{value:.4f}", (value - low) / (high - low or 1)) if value == value else (comparison.UNKNOWN, 0.0)
        for value in values
    ]


def _grid(section: Section, grid: comparison.Grid) -> Tinted:
    cells = iter(_tint([mean for row in grid.means for mean in row]))
    rows = {f"rank {rank}": [next(cells) for _ in grid.experts] for rank in grid.ranks}
    title = f"{section.score}, test{': ' * bool(grid.title)}{grid.title}"
    return Tinted(title, "", [f"{count} experts" for count in grid.experts], rows)


def _costs(name: str, section: Section, colors: Sequence[str]) -> list[str]:
    score = f"{section.score}, test"
    estimates = [(each, each.estimate(section.score, section.dataset)) for each in section.settings]
    costs: dict[str, Sequence[float]] = {
        "trainable parameters": [each.parameters for each in section.settings],
        "seconds of training": [max(each.seconds, 0.1) for each in section.settings],
    }
    return [
        figures.scatter(
            {
                each.number: (cost, found.mean, found.error)
                for (each, found), cost in zip(estimates, values, strict=True)
            },
            colors,
            label,
            score,
            f"{name}-cost{index}",
        )
        for index, (label, values) in enumerate(costs.items())
    ]


def _curves(name: str, section: Section, colors: Sequence[str]) -> list[str]:
    logged = [
        (each.number, read_curves(run.folder))
        for each in section.settings
        for run in each.runs
        if (run.folder / METRICS).is_file()
    ]
    wanted = ["train/loss", "val/loss", *{f"val/{each.first.primary}": None for each in section.settings}]
    drawn = {key: [(number, curves[key]) for number, curves in logged if key in curves] for key in wanted}
    return [
        figures.lines(curves, colors, "step", key, f"{name}-curve{index}")
        for index, (key, curves) in enumerate(drawn.items())
        if curves
    ]


def _reliability(name: str, section: Section, colors: Sequence[str]) -> str | None:
    curves = []
    for each in section.settings:
        rows = read_rows(each.first.folder / "reliability.csv")
        points = [(float(row["probability"]), float(row["true"])) for row in rows if float(row["pixels"]) > 0]
        if points:
            curves.append((each.number, points))
    if not curves:
        return None
    labels = ("predicted probability", "share that came true")
    return figures.lines(curves, colors, *labels, f"{name}-reliability", diagonal=True)


def _routing(setting: Setting) -> Tinted | None:
    rows = read_rows(setting.first.folder / "routing.csv")
    if not rows:
        return None
    experts = [key for key in rows[0] if key.startswith("expert_")]
    cells = {
        row["layer"]: [(f"{float(row[key]):.2f}", float(row[key])) for key in experts]
        + [(f"{float(row['entropy']):.2f}", 0.0)]
        for row in rows
    }
    heads = [*(f"scale {key.rpartition('_')[2]}" for key in experts), "entropy, bits"]
    return Tinted(f"{setting.number}: {setting.label}, seed {setting.first.seed}", "layer", heads, cells)


def _classes(section: Section, test: str) -> Tinted | None:
    names = section.classes(test)
    columns = [_tint([each.estimate(name, test).mean for each in section.settings]) for name in names]
    rows = {
        f"{each.number}: {each.label}": [column[each.number - 1] for column in columns]
        for each in section.settings
    }
    heads = [name.removeprefix("iou_") for name in names]
    return Tinted(f"IoU, {test}", "setting", heads, rows) if names else None


def _scores(section: Section, test: str) -> tuple[list[str], dict[str, list[str]]]:
    names = section.scores(test)
    rows = {
        f"{each.number}: {each.label}": [comparison.show(each.estimate(name, test)) for name in names]
        for each in section.settings
    }
    return names, rows
