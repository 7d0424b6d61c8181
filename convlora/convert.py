"""Make an adapter of AutoGluon's: `python -m convlora.convert checkpoint=FILE model=sam_vit_h output=FILE`.

Its Conv-LoRA, the code that Zhong et al. released (ICLR 2024, arXiv:2401.17868), is part of Hugging Face's
SamModel.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from convlora import adapter, run
from convlora.build import make_outline, settings_of
from convlora.cli import command
from convlora.data.masks import Masks
from convlora.draw import colors_of
from convlora.peft.autogluon import method_of, split
from convlora.sam import checkpoints
from convlora.sam.hugging_face import CLASSIFIER, DECODER_EPS, MASK_TOKENS, as_sam, read_sam_model
from convlora.sam.zoo import Backbone, SamViT, load_backbone
from convlora.schema import Config, make

IOU_HEAD = "mask_decoder.iou_prediction_head."  # takes no part
PER_CLASS = {"_target_": "convlora.heads.PerClass"}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # that a checkpoint may have been rounded to


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
        ValueError: it is none, of another model, of another number of classes than there are names or on
            other base weights, or a file that is to be written is there already.
    """
    path, output = Path(config.checkpoint), new_file("output", config.output, ".safetensors")
    base = None if config.base is None else new_file("base", config.base, ".pth")
    if not 0 < config.alpha < math.inf:
        raise ValueError(f"alpha={config.alpha} must be positive; 32 is the released value")
    if base is not None and config.model["weights"] is not None:
        raise ValueError(f"base={base} makes base weights of the checkpoint; leave model.weights out")
    Masks(config.class_names)  # which names each class once
    if config.model["decoder_eps"] not in (SamViT.decoder_eps, DECODER_EPS):
        raise ValueError(f"model.decoder_eps is {DECODER_EPS} in all that AutoGluon trained; leave it out")
    model = {**config.model, "decoder_eps": DECODER_EPS}
    backbone: Backbone = make("model", model)
    found = read_sam_model(path)
    backbone = check_model(path, found, backbone)
    head = head_of(path, found, config.class_names)
    classifier = {name: found.pop(name).float() for name in list(found) if name.startswith(CLASSIFIER)}
    with torch.device("meta"):
        expected = backbone.build().state_dict()
    learnt, kept = split(path, found, expected)
    decoder = {name: tensor.float() for name, tensor in kept.items() if name.startswith("mask_decoder.")}
    trained = learnt | {name: tensor for name, tensor in decoder.items() if not name.startswith(IOU_HEAD)}
    trained |= classifier
    peft = method_of(learnt, backbone.depth, config.alpha)
    outline = make_outline(backbone, make("peft", peft), make("head", head), len(config.class_names))
    check_trained(path, trained, outline.trainable_state())
    if base is None:
        sha256 = load_backbone(backbone)[1]
        check_frozen(path, {name: kept[name] for name in kept.keys() - decoder.keys()}, backbone)
    else:
        state = as_sam(path, kept, expected)
        checkpoints.check_fit("checkpoint", path, backbone.convert(state), expected)
        run.make_folder("base", base.parent)
        checkpoints.write(base, state)
        sha256, model["weights"] = checkpoints.hash_file(base), str(base.resolve())
    settings = {"model": model, "peft": peft, "head": head, "resize": config.resize}
    identity = {"base": backbone.name, "base_sha256": sha256}
    colors = colors_of(config.class_names, None)
    run.make_folder("output", output.parent)
    adapter.save(output, trained, adapter.describe(settings, colors, identity, "32-true"))
    experts = f" with {peft['num_experts']} experts" if "num_experts" in peft else ""
    console = Console(highlight=False, soft_wrap=True)
    said = f"rank {peft['rank']}{experts}, adapter: {output}"
    console.print(
        f"{said}\nalpha {config.alpha:g}, which the file does not hold: alpha=... if it was trained otherwise"
    )


def new_file(key: str, name: str, suffix: str) -> Path:
    """Return the path of a file that does not exist yet; raises ValueError."""
    path = Path(name)
    if path.suffix != suffix:
        raise ValueError(f"{key}={path} must be a file name that ends in {suffix}")
    if path.exists():
        raise ValueError(f"{key}={path} is there already; choose another name or remove it")
    return path


def check_model(path: Path, found: Mapping[str, Tensor], backbone: Backbone) -> SamViT:
    """Return the backbone, which must be of the kind and width that is adapted.

    Raises:
        ValueError: it is not, or nothing is adapted.
    """
    if any(name.endswith(".lora_a.weight") for name in found):
        raise ValueError(f"{path} is an adapter already; give it to predict or evaluate as checkpoint={path}")
    encoder = {name: tensor for name, tensor in found.items() if name.startswith("image_encoder.")}
    sides = [tensor.shape[-1] for name, tensor in encoder.items() if name.endswith(".lora_A")]
    sides += [tensor.shape[0] for name, tensor in encoder.items() if name.endswith(".lora_B")]
    if not sides:
        raise ValueError(
            f"checkpoint={path} holds neither Conv-LoRA nor LoRA in the image encoder (no .lora_A); name one "
            "that AutoGluon trained with optim.peft=conv_lora or lora"
        )
    width = min(sides)  # those within attention and MLP are multiples
    if not isinstance(backbone, SamViT) or backbone.embed_dim != width:
        names = {conf.get("embed_dim"): conf["name"] for conf in settings_of("model")}
        right = f"set model={names[width]}" if width in names else "no model= here has so many"
        raise ValueError(
            f"checkpoint={path} adapts an encoder of {width} channels, model={backbone.name} has another; "
            f"{right}"
        )
    return backbone


def head_of(path: Path, found: Mapping[str, Tensor], class_names: Sequence[str]) -> Config:
    """Return the `head` section of a checkpoint; of several classes it is one of queries.

    Raises:
        ValueError: it is of another number of classes than there are names, has fewer mask tokens than
            classes, or several of what AutoGluon's decoder has one of.
    """
    tokens, classes = len(found.get(MASK_TOKENS, [0])), len(found.get(f"{CLASSIFIER}bias", [0, 0])) - 1
    more = [name for name in found if re.search(r"hypernetworks_mlps\.[1-9]", name)]
    if more or (classes == 1 and tokens > 1):
        what = (
            more[0] if more else f"{tokens} mask tokens, and no output_classifier_mlps that tells their class"
        )
        raise ValueError(
            f"checkpoint={path} holds {what}; take one as AutoGluon trains it, with a mask token for a "
            "foreground, or several with the classifier of their classes"
        )
    if classes != len(class_names):
        names = "the foreground alone" if classes == 1 else f"{classes} classes, in the order of their ids"
        raise ValueError(
            f"checkpoint={path} was trained on {names}, but class_names={list(class_names)}; name them"
        )
    if classes == 1:
        return PER_CLASS
    if tokens < classes:
        raise ValueError(
            f"checkpoint={path} has {tokens} mask tokens for {classes} classes, but here each class needs a "
            f"mask of its own; train with model.sam.num_mask_tokens={classes} or more"
        )
    return {"_target_": "convlora.heads.Query", "num_queries": tokens}


def check_trained(path: Path, trained: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are missing, of another shape, or no numbers.

    Raises:
        ValueError: there are such.
    """
    if problems := checkpoints.mismatches(trained, expected):
        raise ValueError(
            f"checkpoint={path} is incomplete or no Conv-LoRA as released: of the trained tensors, by this "
            f"library's names, {problems}; save the whole model"
        )
    for name, tensor in trained.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"checkpoint={path} has values in {name} that are no numbers; take another epoch"
            )


def check_frozen(path: Path, frozen: Mapping[str, Tensor], backbone: Backbone) -> None:
    """Compare the frozen tensors of a checkpoint with the base weights, as both are stored.

    Raises:
        ValueError: they differ by more than half precision rounds, or there are no base weights.
    """
    weights = backbone.weights_path
    if weights is None:
        raise ValueError(
            f"model={backbone.name} has no weights of its own; set model.weights=PATH to those that were "
            "adapted, or base=NAME.pth where the checkpoint holds the whole model"
        )
    base = checkpoints.read(backbone.name, weights)
    differing = [
        name
        for name, tensor in frozen.items()
        if not any(torch.equal(tensor.float(), base[name].to(dtype).float()) for dtype in DTYPES)
    ]
    if differing:
        raise ValueError(
            f"checkpoint={path}: {len(differing)} of its {len(frozen)} frozen tensors (first {differing[0]}) "
            f"are not those of {backbone.weights_source()}; set model.weights=PATH to those that were "
            "adapted, or where the checkpoint holds the whole model add base=NAME.pth, which writes them"
        )


main = command("convert", ConvertConfig, convert)

if __name__ == "__main__":
    main()
