"""Memory and time of prediction on large GeoTIFF: `python -m benchmarks.scenes`.

The scenes are repeated random pixels; the model is one convolution, or MobileSAM with random weights. What is
told is the peak of the resident memory beyond that before the first window. Each takes a process of its own.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import rasterio
import torch
from rasterio.transform import from_origin
from rasterio.windows import Window
from torch import Tensor, nn

from benchmarks.measure import memory, report
from benchmarks.step import METHODS, Setting, backbone
from convlora.data.transforms import SquareResize
from convlora.inference import Predictor
from convlora.scenes import predict_scene
from convlora.segmenter import Segmenter
from convlora.tiles import Tiling
from convlora.writing import Item, Job

BLOCK = 512
CASES = (("one convolution", 2000), ("one convolution", 20000), ("mobile_sam", 4000))


class Convolution(nn.Module):
    """A segmenter of one 3 x 3 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 1, 3, padding=1)
        self.register_buffer("dense_prompt", torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [n, 1, s, s]."""
        return cast(Tensor, self.layer(images))


def make_scene(path: Path, side: int) -> None:
    """Write a georeferenced image of three bands, block by block."""
    pixels = np.random.default_rng(0).integers(0, 255, (3, BLOCK, side), np.uint8)
    profile = {
        "driver": "GTiff", "dtype": "uint8", "count": 3, "height": side, "width": side, "crs": "EPSG:32640",
        "transform": from_origin(300000, 2800000, 0.5, 0.5), "tiled": True, "photometric": "RGB",
        "BIGTIFF": "IF_SAFER",
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as file:
        for top in range(0, side, BLOCK):
            height = min(BLOCK, side - top)
            file.write(pixels[:, :height], window=Window(0, top, side, height))


def measure(model: str, side: int, folder: Path) -> dict[str, Any]:
    """Segment a scene in windows of 512 px; returns a row of the table."""
    torch.manual_seed(0)
    if model == "mobile_sam":
        segmenter = Segmenter(backbone(Setting(model, 256, 4)).build(), METHODS["conv_lora"]).eval()
    else:
        segmenter = cast(Segmenter, Convolution())
    predictor = Predictor(segmenter, SquareResize(256), {"thing": [255, 0, 0]}, nullcontext)
    predictor.predict(np.zeros((512, 512, 3), np.uint8))
    before, start = memory("VmRSS"), time.perf_counter()
    item = Item(
        folder / f"{side}.tif", f"{side}_mask", is_scene=True, kinds=["", "probabilities"], made_by="me"
    )
    job = Job(folder, True, 4, 0, lambda steps, title: steps)
    predict_scene(item, predictor, Tiling(512), job)
    taken = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"model": model, "px": side, "MiB beyond the model": peak - before, "seconds": taken}


def main() -> None:
    """Measure, print the table and write the results."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model, side in CASES:
            scene = Path(folder) / f"{side}.tif"
            make_scene(scene, side)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows.append(pool.apply(measure, (model, side, Path(folder))))
            scene.unlink()
    report("scenes", "prediction on GeoTIFF", rows, "cpu")


if __name__ == "__main__":
    main()
