"""Figures as SVG that stand in a page and take its colour of text, whether it is light or dark."""

import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Points = Sequence[tuple[float, float]]

INK = "#123456"  # stands for the page's colour of text until the figure is written
SIZE = (4.6, 3.2)  # inches; fits the width of a phone almost unscaled
WIDE = 10  # greatest cost as a multiple of the least, beyond which its axis is logarithmic
LIMIT = 200  # points of a curve
PARTS = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")


def palette(count: int) -> list[str]:
    """Return so many colours that can be read on white and on black, as #rrggbb."""
    if count <= 10:
        return [to_hex(matplotlib.colormaps["tab10"](i)) for i in range(count)]
    return [to_hex(matplotlib.colormaps["turbo"](0.08 + 0.84 * i / (count - 1))) for i in range(count)]


def scatter(
    places: Mapping[int, tuple[float, float, float]], colors: Sequence[str], x: str, y: str, name: str
) -> str:
    """Draw a score against a cost.

    Args:
        places: number of the setting -> cost, score and its standard error, NaN where it has none.
        colors: of the settings, that of number 1 first.
        x: label.
        y: label.
        name: of the figure, unlike that of others in its page.
    """
    with _figure() as (figure, axis):
        for number, (cost, score, error) in places.items():
            color = colors[number - 1]
            axis.errorbar(
                cost, score, yerr=error if error == error else None, fmt="o", color=color, capsize=3
            )
            axis.annotate(str(number), (cost, score), (5, 4), textcoords="offset points", fontsize=9)
        axis.set(xlabel=x, ylabel=y)
        costs = [cost for cost, _, _ in places.values()]
        if max(costs) > WIDE * min(costs):
            axis.set(xscale="log")
        else:
            axis.xaxis.set_major_locator(MaxNLocator(4))
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        return _svg(figure, name, f"{y} against {x}, a point for each setting by its number")


def lines(
    curves: Sequence[tuple[int, Points]],
    colors: Sequence[str],
    x: str,
    y: str,
    name: str,
    diagonal: bool = False,
) -> str:
    """Draw curves, several of one colour where they belong to one setting.

    Args:
        curves: number of the setting and points.
        colors: of the settings, that of number 1 first.
        x: label.
        y: label.
        name: of the figure, unlike that of others in its page.
        diagonal: whether the unit square and its diagonal are shown.
    """
    with _figure() as (figure, axis):
        if diagonal:
            axis.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
            axis.set(xlim=(0, 1), ylim=(0, 1))
        for number, points in curves:
            shown = [*points[:: -(-len(points) // LIMIT)], points[-1]]
            color, marker = colors[number - 1], "." if len(shown) < 30 else None
            axis.plot(*zip(*shown, strict=True), color=color, linewidth=1.2, marker=marker, alpha=0.9)
            axis.annotate(str(number), shown[-1], (3, 0), textcoords="offset points", fontsize=8, color=color)
        axis.set(xlabel=x, ylabel=y)
        return _svg(figure, name, f"{y} over {x}, a curve for each run by the number of its setting")


@contextmanager
def _figure() -> Iterator[tuple[Figure, Axes]]:
    with matplotlib.rc_context(
        {**dict.fromkeys(PARTS, INK), "svg.fonttype": "path", "svg.hashsalt": "convlora"}
    ):
        figure = Figure(figsize=SIZE, layout="constrained")
        axis = figure.subplots()
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color=INK, alpha=0.15, linewidth=0.6)
        yield figure, axis


def _svg(figure: Figure, name: str, description: str) -> str:
    """Return a figure as an element of a page; its parts have names that no other figure uses."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)
