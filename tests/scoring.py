"""Images to score, and their scoring by one of several processes."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import yaml
from conftest import ROOT
from numpy.typing import NDArray
from scipy import ndimage

from convlora import IGNORED
from convlora.metrics.scores import Scores
from convlora.schema import make

Array = NDArray[np.uint8]
Image = tuple[Array, NDArray[np.bool_]]
FILES = sorted(path.stem for path in (ROOT / "conf/metrics").glob("*.yaml"))
CLASS_NAMES = ("land", "Open Water", "road", "roof")
EMPTY = np.zeros((24, 30), bool)


def random_image(seed: int, height: int = 24, width: int = 30) -> Image:
    rng = np.random.default_rng(seed)
    mask = ndimage.gaussian_filter(rng.normal(size=(height, width)), 3) > 0.05
    prob = np.clip(
        150 * ndimage.gaussian_filter(mask.astype(float), 1) + rng.normal(40, 35, mask.shape), 0, 255
    )
    return prob.astype(np.uint8), mask


def random_classes(seed: int) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 3, (25, 17), np.uint8)  # the fourth class is in no mask
    classes = np.where(rng.random(mask.shape) < 0.6, mask, rng.integers(0, 4 - seed % 2, mask.shape)).astype(
        np.uint8
    )
    mask[rng.random(mask.shape) < 0.1] = IGNORED
    return classes, rng.integers(64, 255, mask.shape, np.uint8), mask


def collection(name: str) -> Scores:
    config = yaml.safe_load((ROOT / f"conf/metrics/{name}.yaml").read_text())
    scores: Scores = make("metrics", config, class_names=CLASS_NAMES if name == "multiclass" else ["object"])
    return scores


def images_for(name: str) -> list[tuple[Array, Array, Array]]:
    if name == "multiclass":
        return [random_classes(seed) for seed in range(7)]
    binary = [random_image(seed, 20 + seed, 40 - 3 * seed) for seed in range(6)] + [
        (random_image(9)[0], EMPTY)
    ]
    return [((prob >= 128).astype(np.uint8), prob, mask.astype(np.uint8)) for prob, mask in binary]


def scalars(values: Mapping[str, torch.Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in values.items() if value.ndim == 0}


def score_share(rank: int, folder: Path) -> None:
    """Score every second image and write what this rank computes with the states of both."""
    found = {}
    for name in FILES:
        scores = collection(name)
        for image in images_for(name)[rank::2]:
            scores.update(*map(torch.from_numpy, image))
        found[name] = dict(scores.compute())
    torch.save(found, folder / f"{rank}.pt")
