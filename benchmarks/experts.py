"""Convolution experts, forward and backward, against their literal form: `python -m benchmarks.experts`."""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import alternate, default_device, ratio, report, warm_heap
from convlora.peft.conv_experts import ConvExperts
from tests.literal import LiteralExperts

REPEAT = 3  # calls in a row that one timing covers
GRIDS = {"25 windows of 14 x 14": (25, 14), "100 windows of 14 x 14": (100, 14), "one 64 x 64": (1, 64)}


def call(experts: nn.Module, z: Tensor, choice: Tensor) -> Callable[[], Any]:
    """Return one forward and backward pass."""
    gates, cotangent = torch.ones(choice.shape, device=z.device), torch.ones_like(z)
    return lambda: experts(z, choice, gates).backward(cotangent)


def single(device: str, rounds: int) -> list[dict[str, Any]]:
    """Measure each scale alone: against its literal form, and against scale 3."""
    rows = []
    for grid, (n, side) in GRIDS.items():
        z = torch.randn(n, side, side, 3, device=device, requires_grad=True)
        choice = torch.zeros(n, 1, dtype=torch.long, device=device)
        experts = {scale: ConvExperts(3, [scale]).to(device) for scale in range(1, 17)}
        ours = {str(scale): call(module, z, choice) for scale, module in experts.items()}
        flat = alternate(ours, rounds, device, REPEAT)
        for scale, module in experts.items():
            pair = {"ours": ours[str(scale)], "literal": call(LiteralExperts(module), z, choice)}
            taken = alternate(pair, rounds, device, REPEAT)
            rows.append(
                {
                    "maps": grid,
                    "scale": scale,
                    "ours ms": 1e3 * statistics.median(taken["ours"]),
                    "literal ms": 1e3 * statistics.median(taken["literal"]),
                    "literal / ours": ratio(taken, "literal", "ours"),
                    "ours / ours at 3": ratio(flat, str(scale), "3"),
                }
            )
    return rows


def routed(device: str, rounds: int) -> list[dict[str, Any]]:
    """Measure eight experts, one per map at random, against their sparse dispatch."""
    rows = []
    for grid, (n, side) in GRIDS.items():
        z = torch.randn(n, side, side, 3, device=device, requires_grad=True)
        experts = ConvExperts(3, range(1, 9)).to(device)
        literal = LiteralExperts(experts)
        # every scale equally often, also where there are fewer maps than scales
        draws = [(torch.randperm(8 * n, device=device)[:n, None] + i) % 8 for i in range(8)]
        ours_calls, literal_calls = ([call(m, z, draw) for draw in draws] for m in (experts, literal))
        taken = alternate(
            {
                "ours": lambda calls=ours_calls: [c() for c in calls],
                "literal": lambda calls=literal_calls: [c() for c in calls],
            },
            rounds,
            device,
            REPEAT,
        )
        rows.append(
            {
                "maps": grid,
                "ours ms": 1e3 * statistics.median(taken["ours"]) / len(draws),
                "literal ms": 1e3 * statistics.median(taken["literal"]) / len(draws),
                "literal / ours": ratio(taken, "literal", "ours"),
            }
        )
    return rows


def main() -> None:
    """Measure, print the tables and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    warm_heap()
    device, rounds = options.device, options.rounds
    report("experts_routed", "eight experts, top 1, rank 3", routed(device, rounds), device)
    report("experts_single", "one expert, rank 3", single(device, rounds), device)


if __name__ == "__main__":
    main()
