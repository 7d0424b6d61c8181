"""Make an adapter of AutoGluon's: `python -m convlora.convert checkpoint=FILE model=sam_vit_h output=FILE`.

Its Conv-LoRA, the code that Zhong et al. released (ICLR 2024, arXiv:2401.17868), is part of Hugging Face's
SamModel.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from omegaconf import OmegaConf
from rich.console import Console
from torch import Tensor

from convlora import adapter, run
from convlora.build import CONF, make_outline, make_segmenter
from convlora.cli import command
from convlora.draw import colors_of
from convlora.sam import checkpoints
from convlora.sam.hugging_face import DECODER_EPS, MASK_TOKENS, read_sam_model, sam_name, write_as_sam
from convlora.sam.zoo import Backbone, SamViT
from convlora.schema import Config, make

# What an adapted layer learns, `lora_A` and so on, and how that is called here; experts are stacked
LEARNT = {
    "A": "lora_a.weight",
    "B": "lora_b.weight",
    "moe_gating.w_gate": "gate.weight",
    "moe_gating.w_noise": "gate.noise_weight",
}
EXPERT = re.compile(r"moe_experts\.(\d+)\.0\.(weight|bias)")
UNUSED = ("moe_gating.mean", "moe_gating.std")  # 0 and 1
IOU_HEAD = "mask_decoder.iou_prediction_head."  # takes no part
HEAD = {"_target_": "convlora.heads.PerClass"}
GATE = {"_target_": "convlora.peft.gating.NoisyTopK", "top_k": 1}


@dataclass(frozen=True)
class ConvertConfig:
    """The keys of conf/convert.yaml, where they are explained."""

    checkpoint: str
    output: str
    base: str | None
    model: Config
    resize: Config
    alpha: float
    class_names: list[str]


def convert(config: ConvertConfig) -> None:
    """Write the adapter, and the base weights where they are asked for.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: it is none, of another model, of several classes or on other base weights, or a file that
            is to be written is there already.
    """
    path, output = Path(config.checkpoint), new_file("output", config.output, ".safetensors")
    base = None if config.base is None else new_file("base", config.base, ".pth")
    if len(config.class_names) != 1:
        raise ValueError(f"class_names={config.class_names} must be one name, that of the foreground")
    model = {**config.model, "decoder_eps": DECODER_EPS}
    backbone: Backbone = make("model", model)
    found = read_sam_model(path)
    depth = check_model(path, found, backbone)
    with torch.device("meta"):
        expected = backbone.build().state_dict()
    learnt, kept = split(path, found, expected)
    decoder = {name: tensor.float() for name, tensor in kept.items() if name.startswith("mask_decoder.")}
    trained = learnt | {name: tensor for name, tensor in decoder.items() if not name.startswith(IOU_HEAD)}
    frozen = backbone.convert({name: tensor for name, tensor in kept.items() if name not in decoder})
    peft = method_of(learnt, depth, config.alpha)
    method, head = make("peft", peft), make("head", HEAD)
    make_outline(backbone, method, head, num_classes=1).check_trainable_state(trained)
    checkpoints.check_fit("checkpoint", path, frozen, {name: expected[name] for name in frozen})
    if base is not None:
        run.make_folder("base", base.parent)
        write_as_sam(base, path, kept, expected)
        model["weights"] = str(base)
        backbone = replace(backbone, weights=str(base))
    segmenter, identity = make_segmenter(replace(backbone, frozen_dtype="float32"), method, head, 1)
    check_frozen(path, frozen, segmenter.state_dict(), backbone)
    settings = {"model": model, "peft": peft, "head": HEAD, "resize": config.resize}
    colors = colors_of(config.class_names, None)
    run.make_folder("output", output.parent)
    adapter.save(
        output, trained, adapter.describe(settings, colors, backbone.image_size, identity, "32-true")
    )
    experts = f" with {peft['num_experts']} experts" if "num_experts" in peft else ""
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"rank {peft['rank']}{experts}, alpha {config.alpha:g}, adapter: {output}")


def new_file(key: str, name: str, suffix: str) -> Path:
    """Return the path of a file that does not exist yet; raises ValueError."""
    path = Path(name)
    if path.suffix != suffix:
        raise ValueError(f"{key}={path} must be a file name that ends in {suffix}")
    if path.exists():
        raise ValueError(f"{key}={path} is there already; choose another name or remove it")
    return path


def check_model(path: Path, found: Mapping[str, Tensor], backbone: Backbone) -> int:
    """Return the number of the encoder's blocks.

    Raises:
        ValueError: nothing is adapted, the encoder is of another width, or the decoder has several masks.
    """
    sides = [tensor.shape[-1] for key, tensor in found.items() if key.endswith(".lora_A")]
    sides += [tensor.shape[0] for key, tensor in found.items() if key.endswith(".lora_B")]
    if not sides:
        raise ValueError(
            f"checkpoint={path} holds neither Conv-LoRA nor LoRA (no .lora_A); name one that AutoGluon "
            "trained with optim.peft=conv_lora or lora"
        )
    width = min(sides)  # those within attention and MLP are multiples
    if not isinstance(backbone, SamViT) or backbone.embed_dim != width:
        confs = [OmegaConf.load(file) for file in (CONF / "model").glob("*.yaml")]
        names = {OmegaConf.select(conf, "embed_dim"): OmegaConf.select(conf, "name") for conf in confs}
        right = f"set model={names[width]}" if width in names else "no model= here has so many"
        raise ValueError(
            f"checkpoint={path} adapts an encoder of {width} channels, model={backbone.name} has another; "
            f"{right}"
        )
    masks = len(found.get(MASK_TOKENS, [0]))
    if masks > 1 or any("output_classifier_mlps" in key or "hypernetworks_mlps.1." in key for key in found):
        raise ValueError(
            f"checkpoint={path} predicts several masks ({masks} mask tokens), as of several classes, which "
            "cannot be converted yet; take one that was trained on a foreground alone"
        )
    return backbone.depth


def split(
    path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what was put into the encoder, by this library's names, and SAM's own tensors, by its names.

    Args:
        path: of the checkpoint, for messages.
        found: its tensors.
        expected: the tensors of segment-anything's model.

    Raises:
        ValueError: a tensor is neither.
    """
    learnt: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = defaultdict(dict)
    # sorted, so that the table of positions that SamModel reads comes after its double of the prompts
    for key, tensor in sorted(found.items()):
        name = sam_name(key)
        layer, _, part = name.rpartition(".lora_")
        expert = EXPERT.fullmatch(part)
        is_adapted = layer.startswith("image_encoder.blocks.") and f"{layer}.weight" in expected
        if name in expected:
            kept[name] = tensor
        elif is_adapted and part in LEARNT:
            learnt[f"{layer}.{LEARNT[part]}"] = tensor.float()
        elif is_adapted and expert:
            experts[f"{layer}.experts.{expert[2]}"][int(expert[1])] = tensor.float()
        elif not is_adapted or part not in UNUSED:
            raise ValueError(
                f"checkpoint={path} holds {key}, which is no part of a Conv-LoRA or LoRA in this model= and "
                "would be lost; take it out of the file if the masks do not depend on it"
            )
    learnt |= {name: torch.stack([parts[i] for i in sorted(parts)]) for name, parts in experts.items()}
    return learnt, kept


def method_of(learnt: Mapping[str, Tensor], depth: int, alpha: float) -> Config:
    """Return the `peft` section of what an encoder of `depth` blocks learnt."""
    ranks = {
        name.removeprefix("image_encoder.").removesuffix(".lora_a.weight"): len(tensor)
        for name, tensor in learnt.items()
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


def check_frozen(
    path: Path, frozen: Mapping[str, Tensor], state: Mapping[str, Tensor], backbone: Backbone
) -> None:
    """Compare the frozen tensors of a checkpoint with those of an adapted model.

    Raises:
        ValueError: they differ by more than half precision rounds.
    """
    base = {name.replace(".base.", "."): tensor for name, tensor in state.items()}
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    differing = [
        name
        for name, tensor in frozen.items()
        if not any(torch.equal(tensor.float(), base[name].to(dtype).float()) for dtype in dtypes)
    ]
    if differing:
        raise ValueError(
            f"checkpoint={path}: {len(differing)} of its {len(frozen)} frozen tensors (first {differing[0]}) "
            f"are not those of {backbone.weights_source()}; add base=NAME.pth, which writes them as base "
            "weights, or set model.weights=PATH to those that were adapted"
        )


main = command("convert", ConvertConfig, convert)

if __name__ == "__main__":
    main()
