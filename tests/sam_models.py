"""Checkpoints as AutoGluon leaves them, with the masks that Hugging Face's SamModel makes of them.

The masks are kept in golden/sam_model.npz, since torchmetrics imports a transformers that is installed in
every process. `pip install transformers`, then `python tests/sam_models.py` makes the file anew.
"""

import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FILE = Path(__file__).with_name("golden") / "sam_model.npz"
SIDE, DEPTH, WIDTH, RANK = 64, 3, 16, 2
QKV = [f"layers.{block}.attn.qkv" for block in range(DEPTH)]
MLP = [f"layers.{block}.mlp.lin2" for block in range(DEPTH)]
IRREGULAR = ["layers.0.attn.qkv", "layers.2.mlp.lin1"]
ADAPTED = {  # experts, layers, alpha
    "conv_lora": (3, QKV, 32.0),
    "lora": (0, QKV, 8.0),
    "blocks": (12, QKV[1:], 8.0),
    "mlp": (3, [*QKV, *MLP], 8.0),
    "irregular": (2, IRREGULAR, 8.0),
}
CHANGED = "vision_encoder.layers.1.attn.qkv.weight"
CHANGES = ("other base", "float16", "bfloat16")
State = dict[str, Tensor]


def told(key: str) -> dict[str, list[int] | float]:
    """What is known of SamModel: `shapes` of its tensors, `epsilons` of its norms."""
    with np.load(FILE) as arrays:
        found: dict[str, list[int] | float] = json.loads(str(arrays[key]))
    return found


def trained(name: str = "conv_lora") -> State:
    """A SamModel's tensors after a training that is in `ADAPTED`, with values that make every part count."""
    num_experts, layers, _ = ADAPTED[name]
    return draw(told("shapes"), num_experts, layers)


def draw(shapes: dict[str, list[int]], num_experts: int, layers: Sequence[str]) -> State:
    """Values for a SamModel of those shapes left with one mask, and for what is put into its layers."""
    shapes = {name: shape for name, shape in shapes.items() if not re.search(r"networks_mlps\.[1-9]", name)}
    shapes |= {"mask_decoder.mask_tokens.weight": [1, 32]}
    for layer in layers:
        wide, narrow = shapes[f"vision_encoder.{layer}.weight"]
        parts = {"A": [RANK, narrow], "B": [wide, RANK]}
        if num_experts:
            parts |= {f"moe_gating.{kind}": [RANK, num_experts] for kind in ("w_gate", "w_noise")}
            parts |= {"moe_gating.mean": [1], "moe_gating.std": [1]}
        for expert in range(num_experts):
            parts |= {
                f"moe_experts.{expert}.0.weight": [RANK, RANK, 3, 3],
                f"moe_experts.{expert}.0.bias": [RANK],
            }
        shapes |= {f"vision_encoder.{layer}.lora_{part}": shape for part, shape in parts.items()}
    return {name: value(name, shape) for name, shape in shapes.items()}


def value(name: str, shape: Sequence[int]) -> Tensor:
    if name.endswith(("gating.mean", "gating.std")):
        return torch.full(shape, float(name.endswith("std")))
    source = name.replace("prompt_encoder.shared_embedding", "shared_image_embedding")  # one table, twice
    spread = np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.2
    if name.endswith("positional_embedding"):
        spread = 1.0
    around = float("norm" in name and name.endswith("weight"))
    generator = np.random.RandomState(zlib.crc32(source.encode()))  # whose numbers are those of any version
    drawn = generator.normal(around, spread, shape)
    if "lora_B" in name or "token" in name or (name.startswith("mask_decoder.") and "bias" in name):
        drawn *= 0.02  # as small as trained ones are, so that epsilons count
    return torch.from_numpy(drawn.astype(np.float32))


def change(state: State, how: str) -> State:
    """What `CHANGES` make of a model, in their own precision."""
    if how == "other base":
        return state | {CHANGED: state[CHANGED] * 1.01}
    return {name: tensor.to(getattr(torch, how)) for name, tensor in state.items()}


def images() -> Tensor:
    drawn = np.random.RandomState(1).normal(size=(3, 3, SIDE, SIDE))
    return torch.from_numpy(drawn.astype(np.float32))


def masks_of(name: str) -> Tensor:
    """What SamModel makes of `images`, for each name of `ADAPTED` and `CHANGES`."""
    with np.load(FILE) as arrays:
        masks = torch.from_numpy(arrays[name])
    return F.interpolate(masks, (SIDE, SIDE), mode="bilinear", align_corners=False)


def main() -> None:
    from literal import ReleasedLoRALinear
    from torch import nn
    from transformers import SamConfig, SamModel, __version__

    config = SamConfig(
        vision_config={
            "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 2,
            "global_attn_indexes": [1], "image_size": SIDE, "patch_size": 8, "window_size": 3,
            "output_channels": 32, "num_pos_feats": 16,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": SIDE, "patch_size": 8},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 24},
    )  # fmt: skip
    whole = SamModel(config)
    shapes = {name: list(tensor.shape) for name, tensor in whole.state_dict().items()}
    epsilons = {name: module.eps for name, module in whole.named_modules() if hasattr(module, "eps")}

    @torch.no_grad()
    def masks(state: State, num_experts: int, layers: Sequence[str], alpha: float) -> Tensor:
        sam = SamModel(config)
        decoder = sam.mask_decoder
        decoder.num_mask_tokens = 1
        decoder.mask_tokens = nn.Embedding(1, 32)
        decoder.output_hypernetworks_mlps = decoder.output_hypernetworks_mlps[:1]
        for layer in layers:
            linear = sam.vision_encoder.get_submodule(layer)
            sam.vision_encoder.set_submodule(layer, ReleasedLoRALinear(linear, RANK, alpha, num_experts))
        sam.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        found: Tensor = sam.eval()(images(), multimask_output=False).pred_masks[:, 0]
        return found

    made = {
        name: masks(draw(shapes, num_experts, layers), num_experts, layers, alpha)
        for name, (num_experts, layers, alpha) in ADAPTED.items()
    }
    first = ADAPTED["conv_lora"]
    made |= {how: masks(change(draw(shapes, *first[:2]), how), *first) for how in CHANGES}
    known = {"shapes": json.dumps(shapes), "epsilons": json.dumps(epsilons), "transformers": __version__}
    np.savez_compressed(FILE, **known, **{name: tensor.numpy() for name, tensor in made.items()})


if __name__ == "__main__":
    main()
