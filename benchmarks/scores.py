"""What scoring an image costs, in a test and in validation, by conf/metrics: `python -m benchmarks.scores`.

Images of an object of a fifth of the area with a soft and noisy prediction, at the sizes of CAMO's images
scaled to 352 px and as they are published; of several classes a random field of six.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import yaml
from scipy import ndimage

from benchmarks.measure import alternate, ratio, report
from convlora.build import CONF
from convlora.metrics.scores import Scores
from convlora.schema import make

SIZES = ((264, 352), (768, 1024))  # height and width, px
CAMO = 248  # images
CLASS_NAMES = [f"class {i}" for i in range(6)]


def make_scorings(name: str, height: int, width: int) -> dict[str, Callable[[], Any]]:
    """Return the scoring of one image by conf/metrics/<name>.yaml, and what of it validation needs."""
    several = name == "multiclass"
    config = yaml.safe_load((CONF / f"metrics/{name}.yaml").read_text())
    scores: Scores = make("metrics", config, class_names=CLASS_NAMES if several else ["object"])
    rng = np.random.default_rng(0)
    field = ndimage.gaussian_filter(rng.normal(size=(height, width)), height / 12)
    mask = np.digitize(field, np.quantile(field, np.linspace(0, 1, 7)[1:-1] if several else [0.8])).astype(
        np.uint8
    )
    soft = 255 / (1 + np.exp(-12 * (field - np.quantile(field, 0.8)) / field.std()))
    prob = np.clip(soft + rng.normal(0, 12, mask.shape), 0, 255).astype(np.uint8)
    classes = mask[::-1].copy() if several else (prob >= 128).astype(np.uint8)
    tensors = [torch.from_numpy(part) for part in (classes, prob, mask)]
    fewer = scores.for_validation()
    return {name: lambda: scores(*tensors), f"{name}, validation": lambda: fewer(*tensors)}


def main() -> None:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    names = sorted(path.stem for path in (CONF / "metrics").glob("*.yaml"))
    rows = []
    for height, width in SIZES:
        calls: dict[str, Callable[[], Any]] = {}
        for name in names:
            calls |= make_scorings(name, height, width)
        taken = alternate(calls, options.rounds, "cpu")
        for name in names:
            fewer = f"{name}, validation"
            rows.append(
                {
                    "metrics": name,
                    "size": f"{width} x {height}",
                    "ms an image": 1000 * statistics.median(taken[name]),
                    "ms in validation": 1000 * statistics.median(taken[fewer]),
                    "all / validation": ratio(taken, name, fewer),
                    f"s for {CAMO} images": CAMO * statistics.median(taken[name]),
                    f"s for {CAMO} in validation": CAMO * statistics.median(taken[fewer]),
                }
            )
    report("scores", "scores of one image", rows, "cpu")


if __name__ == "__main__":
    main()
