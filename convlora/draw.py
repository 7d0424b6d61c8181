"""Pictures of images, masks and scores."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import cv2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from convlora import IGNORED

Picture = NDArray[np.uint8]
Color = Sequence[int]

MISSED, FALSE = (86, 180, 233), (213, 94, 0)  # of error maps, RGB; Okabe and Ito's, for all eyes
OUTLINE = (0, 255, 255)  # of a foreground; rare in tissue, plants, animals and soil
IGNORED_COLOR = (255, 255, 255)
SHARE_IN_OVERLAYS = 0.45  # of the class colours


@dataclass(frozen=True)
class Row:
    """One image of a page.

    Attributes:
        title: above the image.
        image: [h, w, 3].
        mask: class ids [h, w].
        classes: predicted ids [h, w].
        prob: 8-bit probability [h, w], shown for a binary task.
        score: as text.
    """

    title: str
    image: Picture
    mask: Picture
    classes: Picture
    prob: Picture
    score: str


def colors_of(class_names: Sequence[str], class_colors: Sequence[Color] | None) -> dict[str, list[int]]:
    """Return the colour of each class, where none are given those of a standard palette."""
    if class_colors is not None:
        return {name: list(color) for name, color in zip(class_names, class_colors, strict=True)}
    if len(class_names) == 1:
        return {class_names[0]: list(OUTLINE)}
    spread = matplotlib.colormaps["tab20" if len(class_names) <= 20 else "gist_ncar"]
    places = np.arange(len(class_names)) if len(class_names) <= 20 else np.linspace(0, 1, len(class_names))
    rgb = (np.array([spread(place)[:3] for place in places]) * 255).round().astype(int)
    return dict(zip(class_names, rgb.tolist(), strict=True))


def paint(classes: Picture, colors: Mapping[str, Color]) -> Picture:
    """Return class ids [h, w] in colour [h, w, 3]; of a single class white on black."""
    if len(colors) == 1:
        return np.repeat(((classes == 1) * np.uint8(255))[..., None], 3, axis=2)
    table = np.zeros((IGNORED + 1, 3), np.uint8)
    table[: len(colors)] = list(colors.values())
    table[IGNORED] = IGNORED_COLOR
    return np.asarray(table[classes])


def error_map(image: Picture, mask: Picture, classes: Picture, binary: bool) -> Picture:
    """Return the dimmed image with wrong pixels in orange, of a binary task those missed in blue."""
    picture = image // 3
    picture[(mask != classes) & (mask != IGNORED)] = FALSE
    if binary:
        picture[(mask == 1) & (classes == 0)] = MISSED
    return picture


def draw_contours(image: Picture, found: NDArray[np.bool_], color: Color = OUTLINE) -> Picture:
    """Return the image with the outline of a mask, its inside slightly tinted."""
    picture = image.copy()
    picture[found] = (0.7 * picture[found] + 0.3 * np.array(color)).astype(np.uint8)
    _outline(picture, found, color)
    return picture


def draw_classes(image: Picture, classes: Picture, colors: Mapping[str, Color]) -> Picture:
    """Return the image tinted by class, of a single class its outline; ignored pixels stay as they are."""
    if len(colors) == 1:
        return draw_contours(image, classes == 1, next(iter(colors.values())))
    tint = SHARE_IN_OVERLAYS * paint(classes, colors) + (1 - SHARE_IN_OVERLAYS) * image
    picture = np.where((classes == IGNORED)[..., None], image, tint.astype(np.uint8))
    for index, color in enumerate(colors.values()):
        _outline(picture, classes == index, color)
    return np.asarray(picture)


def _outline(picture: Picture, found: NDArray[np.bool_], color: Color) -> None:
    contours, _ = cv2.findContours(found.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    width = 1 + round(max(picture.shape[:2]) / 600)
    cv2.drawContours(picture, contours, -1, tuple(map(int, color)), width)


def side_by_side(row: Row, colors: Mapping[str, Color]) -> Picture:
    """Return the image, the truth and the prediction of one sample beside each other."""
    return np.concatenate([row.image, paint(row.mask, colors), paint(row.classes, colors)], axis=1)


def shrink(picture: Picture, side: int) -> Picture:
    """Return an image or a mask with its longest side at most `side`, by the nearest pixels."""
    height, width = picture.shape[:2]
    scale = min(1.0, side / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_NEAREST_EXACT))


def add_legend(picture: Picture, colors: Mapping[str, Color]) -> Picture:
    """Return the picture with a strip below it that names the classes' colours."""
    height, width = picture.shape[:2]
    size = max(height, width) / 700  # of OpenCV's font, whose capitals are about 20 px high at 1
    step, line = max(4, round(22 * size)), max(8, round(34 * size))
    places, x, y = [], step, line
    for name in colors:
        length = 2 * step + cv2.getTextSize(name, cv2.FONT_HERSHEY_SIMPLEX, size, 1)[0][0]
        if x > step and x + length > width:
            x, y = step, y + line
        places.append((x, y))
        x += length + step
    strip = np.full((y + line // 2, width, 3), 255, np.uint8)
    for (name, color), (x, y) in zip(colors.items(), places, strict=True):
        corner = (x + step, y - step)
        cv2.rectangle(strip, (x, y), corner, tuple(map(int, color)), cv2.FILLED)
        place = (x + round(1.5 * step), y)
        cv2.putText(
            strip, name, place, cv2.FONT_HERSHEY_SIMPLEX, size, (0, 0, 0), max(1, round(size)), cv2.LINE_AA
        )
    return np.concatenate([picture, strip])


def draw_page(rows: Sequence[Row], colors: Mapping[str, Color], path: Path) -> None:
    """Draw image, truth, prediction and error of each row to a PNG."""
    binary = len(colors) == 1
    figure = Figure(figsize=(12, 3.1 * len(rows) + 0.4 * (not binary)), layout="constrained")
    axes = figure.subplots(len(rows), 4, squeeze=False)
    error = "error: missed blue, false orange" if binary else "error: orange"
    for row, line in zip(rows, axes, strict=True):
        found = row.prob if binary else paint(row.classes, colors)
        panels = (
            (row.title, row.image),
            ("truth", paint(row.mask, colors)),
            (f"prediction, {row.score}", found),
            (error, error_map(row.image, row.mask, row.classes, binary)),
        )
        for axis, (label, picture) in zip(line, panels, strict=True):
            _show(axis, picture, label)
    if not binary:
        _add_legend(figure, colors)
    figure.savefig(path, dpi=75)


def draw_sheet(titled: Sequence[tuple[str, Picture]], colors: Mapping[str, Color], path: Path) -> None:
    """Draw pictures in rows of six to a PNG, with a legend where there are several classes."""
    columns = 6
    lines = -(-len(titled) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.7 * lines + 0.4), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (label, picture) in zip(axes, titled, strict=False):
        _show(axis, picture, label)
    if len(colors) > 1:
        _add_legend(figure, colors)
    figure.savefig(path, dpi=80)


def draw_reliability(bins: NDArray[np.float64], error: float, path: Path) -> None:
    """Draw how often predictions come true against how sure they are.

    Args:
        bins: mean probability, share that came true and share of the pixels [3, bins]; NaN in empty ones.
        error: expected calibration error.
        path: PNG.
    """
    probability, true, share = bins
    figure = Figure(figsize=(5, 5.6), layout="constrained")
    curve, counts = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    curve.plot([0, 1], [0, 1], color="grey", linewidth=1, label="perfectly calibrated")
    seen = share > 0
    curve.plot(probability[seen], true[seen], marker="o", label=f"calibration error {error:.4f}")
    curve.set(ylabel="share that came true", xlim=(0, 1), ylim=(0, 1))
    curve.legend(loc="upper left")
    counts.bar(probability[seen], share[seen], width=0.8 / len(share))
    counts.set(xlabel="predicted probability", ylabel="share of pixels", yscale="log")
    figure.savefig(path, dpi=100)


def draw_confusion(counts: NDArray[np.int64], names: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix [classes, classes] of pixels, rows the truth, as shares of each row."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 2.5 + 0.55 * len(names)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axis = figure.subplots()
    picture = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    places = range(len(names))
    axis.set_xticks(places, names, rotation=45, ha="right")
    axis.set_yticks(places, names)
    axis.set(xlabel="predicted", ylabel="truth")
    for (row, column), value in np.ndenumerate(shares):
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8,
                  color="white" if value > 0.5 else "black")  # fmt: skip
    figure.colorbar(picture, label="share of the true class")
    figure.savefig(path, dpi=100)


def draw_curves(
    curves: Mapping[str, Sequence[tuple[int, float]]], score: str, best: float | None, path: Path
) -> None:
    """Draw how a training went: losses, scores in validation, learning rate.

    Args:
        curves: name -> pairs of step and value, as `train/loss` and `val/dice`.
        score: the one that chose the epoch.
        best: its value there, marked; None where there was none.
        path: PNG.
    """
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    losses, scores, rate = figure.subplots(1, 3)
    for name, points in curves.items():
        axis = rate if name == "train/lr" else losses if name.endswith("loss") else scores
        marker = "o" if name.startswith("val/") else None
        [line] = axis.plot(*zip(*points, strict=True), marker=marker, markersize=3, label=name)
        chosen = [point for point in points if name == score and point[1] == best]
        if chosen:
            axis.plot(*chosen[0], marker="*", markersize=12, color=line.get_color())
            line.set_label(f"{name}, chosen at {best:.4f}")
    for axis, label in ((losses, "loss"), (scores, "score"), (rate, "learning rate")):
        axis.set(xlabel="step", ylabel=label)
        if axis.lines:  # a short run may have logged nothing
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def draw_routing(
    split: Mapping[str, NDArray[np.float64]],
    entropies: Sequence[float],
    scales: Sequence[float],
    points: NDArray[np.float64],
    path: Path,
) -> None:
    """Draw the experts' shares and their entropy by layer, and the scale against the size of the object.

    Args:
        split: layer -> share of its maps by expert.
        entropies: of these, bits.
        scales: of the experts.
        points: share of the image that is object, and mean scale, of each image [images, 2].
        path: PNG.
    """
    figure = Figure(figsize=(12, 2.2 + 0.23 * len(split)), layout="constrained")
    heat, bits, size = figure.subplots(1, 3, width_ratios=[5, 2, 4])
    _heatmap(figure, heat, split, scales)
    bits.barh(range(len(split)), entropies)
    bits.axvline(np.log2(len(scales)), color="grey", linewidth=1)
    bits.set(xlabel="entropy, bits\n(line: all experts alike)", ylim=(len(split) - 0.5, -0.5), yticks=[])
    size.scatter(100 * points[:, 0], points[:, 1], s=12)
    size.set(xlabel="object, % of the image", ylabel="mean scale")
    figure.savefig(path, dpi=100)


def routing_heatmap(split: Mapping[str, NDArray[np.float64]], scales: Sequence[float]) -> Picture:
    """Return the experts' shares by layer as a picture [h, w, 3]; arguments as of `draw_routing`."""
    figure = Figure(figsize=(7, 1.6 + 0.23 * len(split)), dpi=80, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    _heatmap(figure, figure.subplots(), split, scales)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw_choices(
    image: Picture, choices: Mapping[str, NDArray[np.int64]], scales: Sequence[float], path: Path | IO[bytes]
) -> None:
    """Draw for each layer which expert has the say where, on the image, to a PNG.

    Args:
        image: [h, w, 3].
        choices: layer -> index of the expert at each pixel [h, w].
        scales: of the experts.
        path: PNG, or a file that is open.
    """
    colors = np.array(matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(scales))))[:, :3] * 255
    grey = image.mean(axis=2, keepdims=True)  # whose own colours would be taken for the experts'
    columns = min(8, len(choices))
    lines = -(-len(choices) // columns)
    height = 1.9 * image.shape[0] / image.shape[1] + 0.25
    legend = 0.4 if columns == 8 else 1.0  # in one row, or in up to three
    size = (1.9 * max(columns, 2), lines * height + legend)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (name, choice) in zip(axes, choices.items(), strict=False):
        _show(axis, (0.5 * grey + 0.5 * colors[choice]).astype(np.uint8), name)
        axis.title.set_fontsize(7)
    repeated = len(set(scales)) < len(scales)
    labels = [f"{i}: scale {s:g}" if repeated else f"scale {s:g}" for i, s in enumerate(scales, start=1)]
    _add_legend(
        figure,
        {label: color.tolist() for label, color in zip(labels, colors, strict=True)},
    )
    figure.savefig(path, dpi=100)


def _heatmap(
    figure: Figure, axis: Axes, split: Mapping[str, NDArray[np.float64]], scales: Sequence[float]
) -> None:
    shares = np.array(list(split.values()))
    picture = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axis.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales])
    axis.set_yticks(range(len(split)), list(split), fontsize=7)
    axis.set(xlabel="scale of the expert")
    for (row, column), value in np.ndenumerate(shares):
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6,
                  color="white" if value > 0.5 else "black")  # fmt: skip
    figure.colorbar(picture, ax=axis, label="share of the layer's maps", location="top", aspect=40)


def _show(axis: Axes, picture: Picture, label: str) -> None:
    axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
    axis.set_title("\n".join(textwrap.wrap(label, 40, break_long_words=True)), fontsize=9)
    axis.set_axis_off()
    for unseen in (axis.xaxis, axis.yaxis):  # whose ticks would be laid out all the same
        unseen.set_visible(False)


def _add_legend(figure: Figure, colors: Mapping[str, Color]) -> None:
    patches = [Patch(color=np.array(color) / 255, label=name) for name, color in colors.items()]
    across = int(figure.get_figwidth() / 1.2)
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), across, 8), fontsize=9)
