"""Attention with relative positions against segment-anything's: `python -m benchmarks.attention`.

ViT-B's width; forward and backward, in fp32 and bf16 on a CPU, on a GPU in bf16 with FlexAttention as a third
way. Each way's memory is the peak of a process of its own on a CPU, of the allocator on a GPU, less what was
held before.
"""

import argparse
import itertools
import multiprocessing
import statistics
from collections.abc import Callable
from typing import Any

import torch
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.measure import MEBIBYTE, alternate, default_device, ratio, report, warm_heap
from convlora.sam import attention
from convlora.sam.attention import RelPosAttention, folded_attention, tiled_attention

DIM, HEADS = 768, 12
GRIDS = {"25 windows of 14 x 14": (25, 14), "one 64 x 64": (1, 64)}
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def flex_attention(q: Tensor, k: Tensor, v: Tensor, row_table: Tensor, col_table: Tensor) -> Tensor:
    """Compute `attend` by FlexAttention, which adds the positions in its kernel."""
    from torch.nn.attention.flex_attention import flex_attention as kernel

    rel_h, rel_w = (t.flatten(1, 2) for t in attention.relative_scores(q, row_table, col_table))
    width = rel_w.shape[-1]

    def add_positions(score: Tensor, _: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + rel_h[head, query, key // width] + rel_w[head, query, key % width]

    flat = (t.flatten(1, 2)[None] for t in (q, k, v))
    compiled = torch.compile(kernel, dynamic=False)
    return compiled(*flat, score_mod=add_positions)[0].view(q.shape)


WAYS: dict[str, Attend | None] = {
    "segment-anything": None,
    "tiled": tiled_attention,
    "folded": folded_attention,
    "flex": flex_attention,
}


def ways(device: str) -> list[str]:
    """Return the ways that make sense on a device."""
    return (
        ["segment-anything", "tiled", "folded"] if device == "cpu" else ["segment-anything", "folded", "flex"]
    )


def precisions(device: str) -> list[str]:
    """Return the precisions in which trainings on a device compute."""
    return ["fp32", "bf16"] if device == "cpu" else ["bf16"]


def step(way: str, grid: str, precision: str, device: str) -> Callable[[], Any]:
    """Return one forward and backward pass of a frozen module."""
    n, side = GRIDS[grid]
    torch.manual_seed(0)
    module: nn.Module = Attention(DIM, HEADS, use_rel_pos=True, input_size=(side, side))
    if WAYS[way] is not None:
        module = RelPosAttention(module)
    module.requires_grad_(False).to(device)
    x = torch.randn(n, side, side, DIM, device=device, requires_grad=True)

    def run() -> None:
        attention.attend = WAYS[way] or attention.attend  # the way that the module takes
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            y = module(x)
        y.sum().backward()

    return run


def memory(way: str, grid: str, precision: str, device: str) -> float:
    """Return what one pass adds to the memory held, MiB."""
    if device == "cuda":
        run = step(way, grid, precision, device)
        run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / MEBIBYTE
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_memory_of_process, (way, grid, precision))


def _memory_of_process(way: str, grid: str, precision: str) -> float:
    run = step(way, grid, precision, "cpu")
    before = measure.memory("VmRSS")
    run()
    return measure.memory("VmHWM") - before


def main() -> None:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = options.device
    warm_heap()
    rows = []
    for grid, precision in itertools.product(GRIDS, precisions(device)):
        steps = {way: step(way, grid, precision, device) for way in ways(device)}
        taken = alternate(steps, options.rounds, device)
        held = {way: memory(way, grid, precision, device) for way in taken}
        for way, times in taken.items():
            rows.append(
                {
                    "tokens": grid,
                    "precision": precision,
                    "way": way,
                    "ms": 1e3 * statistics.median(times),
                    "time over segment-anything": ratio(taken, way, "segment-anything"),
                    "MiB": held[way],
                    "memory over segment-anything": held[way] / held["segment-anything"],
                }
            )
    report("attention", f"attention, {DIM} channels, {HEADS} heads, forward and backward", rows, device)


if __name__ == "__main__":
    main()
