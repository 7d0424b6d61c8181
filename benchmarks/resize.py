"""What scaling an image costs next to decoding it, against OpenCV and Pillow: `python -m benchmarks.resize`.

OpenCV by its bicubic, by area where a side shrinks; Pillow by the bicubic that ours equals. Images are JPEGs
in memory of a random field, at the sizes of small and published data sets and of a camera. All times include
the decoding.
"""

import argparse
import io
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import albumentations as A
import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from benchmarks.measure import alternate, ratio, report, warm_heap
from convlora.data.transforms import SquareResize

SIZES = ((264, 352), (256, 256), (536, 622), (768, 1024), (1500, 1500), (3000, 4000))  # height and width, px
SIDES = (256, 512, 1024)


def make_jpeg(height: int, width: int) -> bytes:
    """Return a picture with detail at every scale, so that it takes as long to decode as a photograph."""
    rng = np.random.default_rng(0)
    field = sum(
        ndimage.zoom(
            rng.normal(size=(-(-height // step) + 1, -(-width // step) + 1, 3)), (step, step, 1), order=1
        )[:height, :width]
        for step in (64, 16, 4)
    )
    file = io.BytesIO()
    pixels = np.clip(128 + 30 * field + rng.normal(0, 4, field.shape), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def make_calls(data: bytes, side: int) -> dict[str, Callable[[], Any]]:
    """Return how the square is made in each way, decoding included, and the decoding alone."""
    opencv = A.Compose([A.Resize(side, side, interpolation=cv2.INTER_CUBIC, area_for_downscale="image")])
    ours = A.Compose(SquareResize(side).steps()[:1])

    def decode() -> NDArray[np.uint8]:
        return np.array(Image.open(io.BytesIO(data)).convert("RGB"))

    return {
        "decoding": decode,
        "convlora": lambda: ours(image=decode()),
        "opencv": lambda: opencv(image=decode()),
        "pillow": lambda: np.array(Image.fromarray(decode()).resize((side, side), Image.Resampling.BICUBIC)),
    }


def main() -> None:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    cv2.setNumThreads(0)  # as in the processes that load
    warm_heap()
    rows: list[Mapping[str, Any]] = []
    for height, width in SIZES:
        data = make_jpeg(height, width)
        for side in SIDES:
            taken = alternate(make_calls(data, side), options.rounds, "cpu")
            rows.append(
                {
                    "size": f"{width} x {height}",
                    "side": side,
                    **{f"{name} ms": 1000 * statistics.median(times) for name, times in taken.items()},
                    "/ opencv": ratio(taken, "convlora", "opencv"),
                    "/ pillow": ratio(taken, "convlora", "pillow"),
                }
            )
    report("resize", "decoding and scaling an image to a square", rows, "cpu")


if __name__ == "__main__":
    main()
