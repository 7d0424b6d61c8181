"""AutoGluon's names for what Conv-LoRA and LoRA learn, the code released with Zhong et al., ICLR 2024."""

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# What an adapted layer learns, `lora_A` and so on, and how that is called here; experts are stacked
LEARNT = {
    "A": "lora_a.weight",
    "B": "lora_b.weight",
    "moe_gating.w_gate": "gate.weight",
    "moe_gating.w_noise": "gate.noise_weight",
}
EXPERT = re.compile(r"moe_experts\.(\d+)\.0\.(weight|bias)")
UNUSED = ("moe_gating.mean", "moe_gating.std")  # 0 and 1
GATE = {"_target_": "convlora.peft.gating.NoisyTopK", "top_k": 1}


def split(
    path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what was put into the encoder, by this library's names in float32, and SAM's own tensors.

    Args:
        path: of the checkpoint, for messages.
        found: its tensors, SAM's by segment-anything's names.
        expected: the tensors of segment-anything's model.

    Raises:
        ValueError: a tensor is neither.
    """
    learnt: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name in found.keys() - expected.keys():
        layer, _, part = name.rpartition(".lora_")
        expert = EXPERT.fullmatch(part)
        is_adapted = layer.startswith("image_encoder.blocks.") and f"{layer}.weight" in expected
        if is_adapted and part in LEARNT:
            learnt[f"{layer}.{LEARNT[part]}"] = found[name].float()
        elif is_adapted and expert:
            experts[f"{layer}.experts.{expert[2]}"][int(expert[1])] = found[name].float()
        elif not is_adapted or part not in UNUSED:
            raise ValueError(
                f"checkpoint={path} holds {name}, which has no place in this model= with Conv-LoRA or LoRA; "
                "set the model= that was trained, or save the model without what the masks do not depend on"
            )
    learnt |= {name: torch.stack([parts[i] for i in sorted(parts)]) for name, parts in experts.items()}
    return learnt, {name: tensor for name, tensor in found.items() if name in expected}


def method_of(learnt: Mapping[str, Tensor], depth: int, alpha: float) -> dict[str, Any]:
    """Return the `peft` section of what an encoder of `depth` blocks learnt, as `split` names it."""
    ranks = {
        name.removeprefix("image_encoder.").removesuffix(".lora_a.weight"): len(tensor)
        for name, tensor in sorted(learnt.items())
        if name.endswith(".lora_a.weight")
    }
    blocks = sorted({int(layer.split(".")[1]) for layer in ranks})
    targets = sorted({layer.rsplit(".", 1)[-1] for layer in ranks})
    if len(ranks) < len(blocks) * len(targets):  # not the same layers in every block
        blocks, targets = list(range(depth)), list(ranks)
    peft = {
        "_target_": "convlora.peft.lora.LoRA",
        "rank": min(ranks.values()),
        "alpha": alpha,
        "targets": targets,
        "blocks": None if len(blocks) == depth else blocks,
    }
    gates = [tensor for name, tensor in learnt.items() if name.endswith(".gate.weight")]
    if not gates:
        return peft
    experts = {"num_experts": gates[0].shape[1], "gate": GATE, "interpolation": "bicubic"}
    return {**peft, "_target_": "convlora.peft.conv_lora.ConvLoRA", **experts}
