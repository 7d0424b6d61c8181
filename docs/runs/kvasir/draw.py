"""Draw methods beside each other: `python docs/runs/kvasir/draw.py CSV OUTPUT.jpg TITLE=RUN [TITLE=RUN ...]`.

The rows are every n-th image of the CSV from the first on, so that there are `ROWS` of them. Before the runs
comes the SAM that they started from, as it is.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

from matplotlib.figure import Figure

from convlora.adapter import load, open_file
from convlora.build import make_segmenter
from convlora.data.images import read_image
from convlora.data.listing import csv_pairs
from convlora.data.masks import read_binary
from convlora.draw import draw_contours
from convlora.heads import SamsOwn
from convlora.inference import Predictor
from convlora.metrics.overlap import dice
from convlora.peft.selective import DecoderOnly

ROWS = 4


def as_it_is(run: str) -> Predictor:
    """Return SAM without what a run has trained, at the same size."""
    file = open_file(run, None, None)
    segmenter, _ = make_segmenter(file.backbone, DecoderOnly(), SamsOwn(), 1)
    return Predictor(segmenter.eval(), file.resize, file.class_colors, nullcontext)


def main() -> None:
    """Draw image, truth, and what SAM and each run find with its Dice."""
    listing, output, *runs = sys.argv[1:]
    folders = dict(each.rsplit("=", 1) for each in runs)
    predictors: dict[str, Predictor] = {"SAM as it is": as_it_is(next(iter(folders.values())))}
    predictors |= {title: load(folder) for title, folder in folders.items()}
    pairs = csv_pairs(Path(listing))
    chosen = pairs[:: len(pairs) // ROWS][:ROWS]
    columns = 2 + len(predictors)
    figure = Figure(figsize=(2.4 * columns, 2.65 * len(chosen) + 0.3), layout="constrained")
    grid = figure.subplots(len(chosen), columns, squeeze=False)
    for pair, axes in zip(chosen, grid, strict=True):
        image, mask = read_image(pair.image), read_binary(pair.mask) == 1
        panels = [("", image), ("", draw_contours(image, mask))]
        for predictor in predictors.values():
            found = predictor.predict(image)
            label = f"Dice {dice(found.prob, mask):.2f}"
            panels.append((label, draw_contours(image, found.classes == 1)))
        for axis, (label, picture) in zip(axes, panels, strict=True):
            axis.imshow(picture)
            axis.set_title(label, fontsize=15)
            axis.set_axis_off()
    for axis, title in zip(grid[0], ["image", "truth", *predictors], strict=True):
        axis.set_title(f"{title}\n{axis.get_title()}", fontsize=17)
    figure.savefig(output, dpi=90, pil_kwargs={"quality": 80})


if __name__ == "__main__":
    main()
