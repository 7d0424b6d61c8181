"""Scores of exported forms beside PyTorch's: `python -m benchmarks.exports RUN IMAGES MASKS`.

The adapter of a run is exported to ONNX and to a program of torch.export; each form segments the images of a
folder, whose masks, of the same stems, lie in another. Told are the mean Dice over images (of several classes
the mean IoU of those in a mask), and the number of pixels that differ from PyTorch's.
"""

import argparse
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.measure import report
from convlora import adapter
from convlora.data.images import list_images
from convlora.formats import onnx, program
from convlora.formats.graph import make_trial
from convlora.inference import Predictor
from convlora.segmenter import restore_size, to_prediction


def mean_score(found: NDArray[np.uint8], mask: NDArray[np.uint8], several: bool) -> float:
    """Return the Dice of a foreground, or the mean IoU of the classes in the mask."""
    if not several:
        found, mask = found == 1, mask > 0
        total = found.sum() + mask.sum()
        return float(2 * (found & mask).sum() / total) if total else 1.0
    pairs = [(found == index, mask == index) for index in np.unique(mask)]
    return float(np.mean([(a & b).sum() / (a | b).sum() for a, b in pairs]))


def main() -> None:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("images", type=Path)
    parser.add_argument("masks", type=Path)
    parser.add_argument("--weights")
    options = parser.parse_args()
    images = list_images(options.images)
    masks = {path.stem: path for path in list_images(options.masks)}
    with tempfile.TemporaryDirectory() as folder:
        trained = adapter.read(options.checkpoint, options.weights, "32-true")
        trial = make_trial(trained, options.images)
        for form in (onnx, program):
            print(form.write(trained, Path(folder), trial))
        exported = torch.export.load(Path(folder) / program.NAME).module()
        forms: dict[str, Callable[[Tensor], Tensor]] = {
            "pytorch": trained.segmenter,
            "onnx": onnx.open_model(Path(folder) / onnx.NAME),
            "torch": exported,
        }
        predictor = Predictor(
            trained.segmenter, trained.resize, trained.class_colors, nullcontext, trained.bands
        )
        several = len(trained.class_colors) > 1
        scores: dict[str, list[float]] = {name: [] for name in forms}
        pixels = dict.fromkeys(forms, 0)
        for path in images:
            image, mask = predictor.read(path), np.asarray(Image.open(masks[path.stem]))
            size = image.shape[0], image.shape[1]
            content, first = trained.resize.content(*size), None
            for name, form in forms.items():
                with torch.no_grad():
                    logits = form(predictor.prepare(image)[None])[0]
                found = to_prediction(restore_size(logits, content, size)).classes.numpy()
                first = found if first is None else first
                scores[name].append(mean_score(found, mask, several))
                pixels[name] += int((found != first).sum())
    score = "mean IoU" if several else "Dice"
    rows: list[dict[str, Any]] = [
        {"form": name, "images": len(images), score: float(np.mean(values)), "differing pixels": pixels[name]}
        for name, values in scores.items()
    ]
    report(f"exports_{trained.metadata['base']}_{len(trained.class_colors)}", "exported forms", rows, "cpu")


if __name__ == "__main__":
    main()
