"""One training step, forward and backward, of each form: `python -m benchmarks.step`.

`released` is Conv-LoRA as its authors run it, with eager attention and literal experts dispatched one by one;
the others are ours. Random weights of the real architecture. On a CPU each form's memory is the peak of a
process of its own, with all that it loads; on a GPU that of the allocator.
"""

import argparse
import multiprocessing
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import MEBIBYTE, alternate, default_device, memory, ratio, report, warm_heap
from convlora.build import CONF
from convlora.losses import StructureLoss
from convlora.peft.conv_lora import ConvLoRA
from convlora.peft.lora import LoRA
from convlora.peft.method import Method, aux_loss
from convlora.peft.selective import DecoderOnly
from convlora.sam.zoo import Backbone, hold_frozen
from convlora.schema import Config
from convlora.segmenter import Segmenter
from tests.literal import as_released

METHODS: dict[str, Method] = {
    "released": ConvLoRA(),
    "conv_lora": ConvLoRA(),
    "lora": LoRA(),
    "decoder_only": DecoderOnly(),
}


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        model: file in conf/model.
        image_size: pixels.
        batch_size: images.
        precision: fp32 or bf16, the latter by autocast and with frozen weights held in it.
        checkpointing: of activations.
        device: cpu or cuda.
    """

    model: str
    image_size: int
    batch_size: int
    precision: str = "fp32"
    checkpointing: bool = False
    device: str = "cpu"


CPU = [
    Setting("sam_vit_b", 1024, 1),
    Setting("sam_vit_b", 512, 1),
    Setting("mobile_sam", 512, 4),
]
GPU = [
    Setting(f"sam_vit_{kind}", 1024, batch_size, "bf16", checkpointing, "cuda")
    for kind in "blh"
    for batch_size in (1, 4, 8)
    for checkpointing in (False, True)
]


def label(setting: Setting) -> dict[str, Any]:
    """Say in one column what is measured."""
    extra = ", checkpointing" if setting.checkpointing else ""
    text = f"{setting.model}, {setting.image_size} px x {setting.batch_size}, {setting.precision}{extra}"
    return {"setting": text}


def backbone(setting: Setting) -> Backbone:
    """Return the architecture that a setting names."""
    config: Config = OmegaConf.to_container(OmegaConf.load(CONF / f"model/{setting.model}.yaml"))
    config.pop("defaults", None)
    made: Backbone = instantiate(config)
    return replace(made, image_size=setting.image_size, activation_checkpointing=setting.checkpointing)


def make_step(setting: Setting, method: Method, released: bool = False) -> Callable[[], Any]:
    """Return a method's training step, less the optimiser's; Conv-LoRA's perhaps as its authors run it."""
    torch.manual_seed(0)
    segmenter = Segmenter(backbone(setting).build(), method).train()
    if released:
        as_released(segmenter.image_encoder)
    elif setting.precision == "bf16":
        hold_frozen(segmenter.image_encoder, "bfloat16")
    device, side = setting.device, setting.image_size
    segmenter.to(device)
    images = torch.randn(setting.batch_size, 3, side, side, device=device)
    masks = torch.rand(setting.batch_size, 1, side, side, device=device).round()
    loss = StructureLoss()

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=setting.precision == "bf16"):
            total = loss(segmenter(images), masks)
        aux = aux_loss(segmenter)
        (total if aux is None else total + aux).backward()

    return step


def memory_on_cpu(setting: Setting, method: Method, released: bool = False) -> float:
    """Return the peak of a process that takes two steps, MiB."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_memory_of_process, (setting, method, released))


def _memory_of_process(setting: Setting, method: Method, released: bool) -> float:
    step = make_step(setting, method, released)
    for _ in range(2):
        step()
    return memory("VmHWM")


def on_cpu(setting: Setting, names: list[str], rounds: int) -> list[dict[str, Any]]:
    """Measure the forms in turn."""
    steps = {name: make_step(setting, METHODS[name], name == "released") for name in names}
    taken = alternate(steps, rounds, "cpu")
    rows = []
    for name in names:
        peak = memory_on_cpu(setting, METHODS[name], name == "released")
        row = {"form": name, "s": statistics.median(taken[name]), "MiB": peak}
        rows.append(label(setting) | row | {f"over {to}": ratio(taken, name, to) for to in names})
    return rows


def on_gpu(setting: Setting, names: list[str], rounds: int, ceiling: float) -> list[dict[str, Any]]:
    """Measure the forms one after another, since not all fit at once."""
    rows = []
    for name in names:
        row: dict[str, Any] = label(setting) | {"form": name}
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            step = make_step(setting, METHODS[name], name == "released")
            for _ in range(2):
                step()
            taken = statistics.median(alternate({name: step}, rounds, "cuda")[name])
            row |= {
                "images/s": setting.batch_size / taken,
                "MiB": torch.cuda.max_memory_allocated() / MEBIBYTE,
            }
            row |= {"syncs": count_syncs(step), "of matmul peak": flops(setting) / taken / ceiling}
        except torch.cuda.OutOfMemoryError:
            row |= {"images/s": "out of memory", "MiB": "-", "syncs": "-", "of matmul peak": "-"}
        rows.append(row)
    return rows


def count_syncs(step: Callable[[], Any]) -> int:
    """Return how often a step waits for the GPU."""
    import warnings

    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def flops(setting: Setting) -> int:
    """Count what the model itself asks for: a forward pass, and as much for the gradients of its activations.

    Frozen weights need no gradient, and no product is counted twice that checkpointing or attention repeat.
    """
    with torch.device("meta"):
        segmenter = Segmenter(backbone(replace(setting, checkpointing=False)).build(), LoRA())
        as_released(segmenter.image_encoder)
        images = torch.empty(setting.batch_size, 3, setting.image_size, setting.image_size)
    with FlopCounterMode(display=False) as counter:
        segmenter(images)
    return 2 * counter.get_total_flops()


def matmul_peak() -> float:
    """Return the FLOP/s of a large product in bfloat16, the ceiling that utilisation is named against."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    taken = alternate({"product": lambda: a @ a}, 20, "cuda")["product"]
    return 2 * 8192**3 / statistics.median(taken)


def main() -> None:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--model", help="one model only")
    parser.add_argument("--image-size", type=int, help="one size only")
    parser.add_argument("--forms", nargs="+", default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    chosen = [
        setting
        for setting in (CPU if options.device == "cpu" else GPU)
        if options.model in (None, setting.model) and options.image_size in (None, setting.image_size)
    ]
    warm_heap()
    rows: list[dict[str, Any]] = []
    ceiling = matmul_peak() if options.device == "cuda" else 0.0
    for setting in chosen:
        if setting.device == "cuda":
            rows += on_gpu(setting, options.forms, options.rounds, ceiling)
        else:
            rows += on_cpu(setting, options.forms, options.rounds)
    title = f"training step; product peak {ceiling / 1e12:.0f} TFLOP/s" if ceiling else "training step"
    report("step", title, rows, options.device)


if __name__ == "__main__":
    main()
