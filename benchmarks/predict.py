"""Prediction without gradients, images per second: `python -m benchmarks.predict`.

From normalised images to 8-bit maps of the images' size, as `convlora.predict` computes them; files are
neither read nor written. `released` is the released form of the same model.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import alternate, default_device, ratio, report, warm_heap
from benchmarks.step import METHODS, Setting, backbone
from convlora.sam.zoo import hold_frozen
from convlora.segmenter import Segmenter, restore_size, to_prediction
from tests.literal import as_released

FORMS = ("released", "conv_lora", "lora")
CPU = [Setting("sam_vit_b", 1024, 1), Setting("mobile_sam", 512, 4)]
GPU = [Setting(f"sam_vit_{kind}", 1024, size, "bf16", device="cuda") for kind in "blh" for size in (1, 8)]


def make_prediction(setting: Setting, name: str) -> Callable[[], Any]:
    """Return the prediction of one batch."""
    torch.manual_seed(0)
    segmenter = Segmenter(backbone(setting).build(), METHODS[name]).eval()
    if name == "released":
        as_released(segmenter.image_encoder)
    elif setting.precision == "bf16":
        hold_frozen(segmenter.image_encoder, "bfloat16")
    device, side = setting.device, setting.image_size
    segmenter.to(device)
    images = torch.randn(setting.batch_size, 3, side, side, device=device)

    def predict() -> None:
        half = setting.precision == "bf16"
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=half):
            for logits in segmenter(images):
                to_prediction(restore_size(logits, (side, side), (600, 800))).prob.cpu()

    return predict


def main() -> None:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warm_heap()
    rows = []
    for setting in CPU if options.device == "cpu" else GPU:
        calls = {name: make_prediction(setting, name) for name in FORMS}
        taken = alternate(calls, options.rounds, options.device)
        for name, times in taken.items():
            rows.append(
                {
                    "model": setting.model,
                    "px": setting.image_size,
                    "batch": setting.batch_size,
                    "precision": setting.precision,
                    "form": name,
                    "images/s": setting.batch_size / statistics.median(times),
                    "time / released": ratio(taken, name, "released"),
                }
            )
    report("predict", "prediction", rows, options.device)


if __name__ == "__main__":
    main()
