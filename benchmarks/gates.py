"""What gates, scales and places cost: a training step of each form of Conv-LoRA over one of plain LoRA there.

`python -m benchmarks.gates`. Two forms at the size that SAM is trained for, all of them at a smaller one.
"""

import argparse
import statistics
from typing import Any

from benchmarks.measure import alternate, default_device, ratio, report, warm_heap
from benchmarks.step import Setting, label, make_step
from convlora.peft.conv_lora import ConvLoRA
from convlora.peft.gating import Layer, NoisyTopK, Soft, Switch, Uniform
from convlora.peft.lora import LoRA
from convlora.peft.method import Method

PLACES = ("qkv", "mlp_in")


def forms(place: str) -> dict[str, Method]:
    """Return plain LoRA and the forms of Conv-LoRA at a place."""
    at = {"targets": [place]}
    gates = {"noisy_top_k": NoisyTopK(), "top_2": NoisyTopK(top_k=2), "switch": Switch(), "soft": Soft()}
    gates |= {"layer": Layer(), "uniform": Uniform()}
    return {
        "lora": LoRA(**at),
        **{name: ConvLoRA(**at, gate=gate) for name, gate in gates.items()},
        "scales 0.5, 1, 2, 4": ConvLoRA(**at, scales=[0.5, 1, 2, 4], num_experts=4),
    }


def measure(setting: Setting, place: str, names: list[str] | None, rounds: int) -> list[dict[str, Any]]:
    """Time the forms at a place in turn; `names` of None takes all."""
    chosen = {name: method for name, method in forms(place).items() if names is None or name in names}
    taken = alternate(
        {name: make_step(setting, method) for name, method in chosen.items()}, rounds, setting.device
    )
    return [
        label(setting)
        | {"targets": place, "form": name, "s": statistics.median(taken[name])}
        | {"over lora": ratio(taken, name, "lora")}
        for name in chosen
    ]


def main() -> None:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    precision = "bf16" if options.device == "cuda" else "fp32"
    full, small = (Setting("sam_vit_b", size, 1, precision, device=options.device) for size in (1024, 448))
    warm_heap()
    rows = measure(full, "qkv", ["lora", "noisy_top_k"], options.rounds)
    rows += measure(full, "mlp_in", ["lora", "switch"], options.rounds)
    for place in PLACES:
        rows += measure(small, place, None, options.rounds)
    report("gates", "training step, over plain LoRA at the same place", rows, options.device)


if __name__ == "__main__":
    main()
