"""Prediction on a folder against the model alone: `python -m benchmarks.folder`.

500 images of 512 x 512 as JPEG, a hundred at a time, MobileSAM with random weights. `model` is the same model
on inputs that are in memory, batch by batch, nothing read, restored or written; `predict` is all that
`convlora.predict` does from files to files. Both in one process in turn, after a first that does not count.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks.measure import alternate, default_device, ratio, report, warm_heap
from benchmarks.step import METHODS, Setting, backbone
from convlora.data.transforms import SquareResize
from convlora.inference import Predictor
from convlora.photos import predict_photos
from convlora.segmenter import Segmenter
from convlora.writing import Item, Job

SIDE, BATCH = 512, 4
SETTINGS = (("mobile_sam", 256), ("mobile_sam", 512))


def make_images(folder: Path, count: int) -> list[Item]:
    """Write smooth random images."""
    rng = np.random.default_rng(0)
    for index in range(count):
        coarse = rng.integers(0, 255, (SIDE // 8, SIDE // 8, 3), np.uint8)
        cv2.imwrite(str(folder / f"{index}.jpg"), cv2.resize(coarse, (SIDE, SIDE)))
    return [Item(folder / f"{index}.jpg", str(index), False, [""], "me") for index in range(count)]


def make_calls(
    model: str, side: int, items: list[Item], folder: Path, device: str
) -> dict[str, Callable[[], None]]:
    """Return the model alone on as many inputs as there are images, and the whole prediction."""
    torch.manual_seed(0)
    segmenter = (
        Segmenter(backbone(Setting(model, side, BATCH)).build(), METHODS["conv_lora"]).eval().to(device)
    )
    predictor = Predictor(segmenter, SquareResize(side), {"thing": [255, 0, 0]}, nullcontext)
    inputs = torch.randn(BATCH, 3, side, side, device=device)

    def alone() -> None:
        with torch.inference_mode():
            for _ in range(len(items) // BATCH):
                segmenter(inputs)

    def whole() -> None:
        fresh = folder / f"{time.monotonic_ns()}"
        predict_photos(items, predictor, Job(fresh, True, BATCH, 2, lambda steps, title: steps))

    return {"model": alone, "predict": whole}


def main() -> None:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    warm_heap()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        items = make_images(Path(folder), options.images)
        for model, side in SETTINGS:
            calls = make_calls(model, side, items, Path(folder), options.device)
            taken = alternate(calls, options.rounds, options.device)
            rows.append(
                {
                    "model": model,
                    "px": side,
                    "images/s": options.images / min(taken["predict"]),
                    "of the model's own": ratio(taken, "model", "predict"),
                }
            )
    title = f"prediction on {options.images} images of {SIDE} px, {options.rounds} times"
    report("folder", title, rows, options.device)


if __name__ == "__main__":
    main()
