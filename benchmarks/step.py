"""One training step of each method, as a ratio to the mask decoder alone: `python -m benchmarks.step`.

MobileSAM's architecture with random weights, forward and backward; the methods take turns in every round, so
that whatever else the machine does meets all of them.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from convlora.losses import StructureLoss
from convlora.peft.base import Method, aux_loss
from convlora.peft.conv_lora import ConvLoRA, ConvLoRAEquation
from convlora.peft.lora import LoRA
from convlora.peft.selective import DecoderOnly
from convlora.sam.zoo import MobileSam
from convlora.segmenter import Segmenter

METHODS: dict[str, Method] = {
    "decoder_only": DecoderOnly(),
    "lora": LoRA(),
    "conv_lora": ConvLoRA(),
    "conv_lora_equation": ConvLoRAEquation(),
}


def step(segmenter: Segmenter, images: torch.Tensor, masks: torch.Tensor) -> float:
    """Return the seconds of one forward and backward pass."""
    start = time.perf_counter()
    loss = StructureLoss()(segmenter(images), masks)
    aux = aux_loss(segmenter)
    (loss if aux is None else loss + aux).backward()
    return time.perf_counter() - start


def main() -> None:
    """Measure, print the table and write benchmarks/results/step.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image-size", type=int, default=256, help="pixels")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    size, batch = options.image_size, options.batch_size
    images, masks = torch.randn(batch, 3, size, size), torch.rand(batch, 1, size, size).round()
    segmenters = {
        name: Segmenter(MobileSam("mobile_sam", size).build(), method).train()
        for name, method in METHODS.items()
    }
    for segmenter in segmenters.values():
        step(segmenter, images, masks)
    rounds = [
        {name: step(segmenter, images, masks) for name, segmenter in segmenters.items()}
        for _ in range(options.rounds)
    ]
    record = {
        "setting": f"mobile_sam, {size} px, batch {batch}, {torch.get_num_threads()} threads, fp32",
        "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
        "seconds": {name: statistics.median(r[name] for r in rounds) for name in METHODS},
        "ratio": {name: statistics.median(r[name] / r["decoder_only"] for r in rounds) for name in METHODS},
    }
    table = Table("method", "seconds", "ratio to decoder_only", title=record["setting"], title_justify="left")
    for name in METHODS:
        table.add_row(name, f"{record['seconds'][name]:.3f}", f"{record['ratio'][name]:.2f}")
    Console().print(table)
    path = Path(__file__).parent / "results" / "step.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
