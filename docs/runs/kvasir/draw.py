"""Draw methods beside each other: `python docs/runs/kvasir/draw.py CSV OUTPUT.jpg TITLE=RUN [TITLE=RUN ...]`.

The rows are every n-th image of the CSV from the first on, so that there are `ROWS` of them.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from convlora.adapter import load
from convlora.data.images import read_image
from convlora.data.listing import csv_pairs
from convlora.data.masks import read_binary
from convlora.draw import draw_contours
from convlora.metrics.overlap import dice

ROWS = 4


def main() -> None:
    """Draw image, truth, and what each run finds with its Dice."""
    listing, output, *runs = sys.argv[1:]
    predictors = {title: load(run) for title, run in (each.rsplit("=", 1) for each in runs)}
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
