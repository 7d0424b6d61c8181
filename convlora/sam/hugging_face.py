"""Hugging Face's SamModel: its names for what segment-anything's Sam is made of.

The two compute the same, but for the epsilon of some layer norms, `Backbone.decoder_eps`.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from convlora.sam import checkpoints

DECODER_EPS = 1e-6
MASK_TOKENS = "mask_decoder.mask_tokens.weight"
CLASSIFIER = "mask_decoder.output_classifier."  # which AutoGluon adds to a SamModel for several classes

_PART = re.compile(r"(.*?)\b(?:vision_encoder|shared_image_embedding|prompt_encoder|mask_decoder)\.")
_POSITIONS = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
_MLP = r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))"
# Applied one after another
_RENAMED = {
    r"^(?:shared_image_embedding|prompt_encoder\.shared_embedding)\.positional_embedding$": _POSITIONS,
    r"^vision_encoder\.": "image_encoder.",
    r"^image_encoder\.patch_embed\.projection\.": "image_encoder.patch_embed.proj.",
    r"^image_encoder\.layers\.": "image_encoder.blocks.",
    r"^image_encoder\.neck\.conv1\.": "image_encoder.neck.0.",
    r"^image_encoder\.neck\.layer_norm1\.": "image_encoder.neck.1.",
    r"^image_encoder\.neck\.conv2\.": "image_encoder.neck.2.",
    r"^image_encoder\.neck\.layer_norm2\.": "image_encoder.neck.3.",
    r"^prompt_encoder\.point_embed\.": "prompt_encoder.point_embeddings.",
    r"^prompt_encoder\.mask_embed\.conv1\.": "prompt_encoder.mask_downscaling.0.",
    r"^prompt_encoder\.mask_embed\.layer_norm1\.": "prompt_encoder.mask_downscaling.1.",
    r"^prompt_encoder\.mask_embed\.conv2\.": "prompt_encoder.mask_downscaling.3.",
    r"^prompt_encoder\.mask_embed\.layer_norm2\.": "prompt_encoder.mask_downscaling.4.",
    r"^prompt_encoder\.mask_embed\.conv3\.": "prompt_encoder.mask_downscaling.6.",
    r"^(image_encoder\.blocks\.\d+|mask_decoder\.transformer\.layers\.\d+)\.layer_norm": r"\1.norm",
    r"^mask_decoder\.transformer\.layer_norm_final_attn\.": "mask_decoder.transformer.norm_final_attn.",
    r"^mask_decoder\.upscale_conv1\.": "mask_decoder.output_upscaling.0.",
    r"^mask_decoder\.upscale_layer_norm\.": "mask_decoder.output_upscaling.1.",
    r"^mask_decoder\.upscale_conv2\.": "mask_decoder.output_upscaling.3.",
    r"^mask_decoder\.output_classifier_mlps\.": CLASSIFIER,
    rf"{_MLP}\.layers\.0\.": r"\1.layers.1.",
    rf"{_MLP}\.proj_in\.": r"\1.layers.0.",
    rf"{_MLP}\.proj_out\.": r"\1.layers.2.",
}


def sam_name(name: str) -> str:
    """Return segment-anything's name of a tensor of a SamModel; a name of something else stays."""
    for pattern, replacement in _RENAMED.items():
        name = re.sub(pattern, replacement, name)
    return name


def read_sam_model(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a file of a SamModel, whatever it is a part of, by segment-anything's names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or its tensors are of no SamModel, or of several.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}; name the one that holds the tensors, not its folder")
    way_out = (
        "where you trust it, save the tensors alone: torch.save(torch.load(FILE, weights_only=False)"
        "['state_dict'], NEW_FILE)"
    )
    state = checkpoints.read("SamModel", path, way_out)
    prefixes = sorted({found[1] for name in state if (found := _PART.match(name))})
    if len(prefixes) != 1:
        those = f"there are several, below {' and '.join(prefixes)}" if prefixes else "there is none"
        first = f" (first {min(state)})" if state else ""
        raise ValueError(
            f"{path} must hold the tensors of one SamModel, vision_encoder., mask_decoder. and so on below a "
            f"common prefix, but {those} in its {len(state)} tensors{first}"
        )
    # sorted, so that the table of positions that SamModel reads comes after its double of the prompts
    return {sam_name(name.removeprefix(prefixes[0])): tensor for name, tensor in sorted(state.items())}


def as_sam(source: Path, tensors: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Return a model as segment-anything's in float32, whose four masks all get the parts of its first one.

    Args:
        source: of the tensors, for messages.
        tensors: by segment-anything's names.
        expected: all of segment-anything's names.

    Raises:
        ValueError: tensors are missing.
    """
    sources = {name: re.sub(r"(hypernetworks_mlps)\.\d+", r"\1.0", name) for name in expected}
    if missing := sorted(set(sources.values()) - tensors.keys()):
        raise ValueError(
            f"{source} lacks {len(missing)} tensors of the whole model (first {missing[0]}), so that no base "
            "weights can be made of it; take the checkpoint of the whole model, or leave base out"
        )
    state = {name: tensors[other].float() for name, other in sources.items()}
    state[MASK_TOKENS] = state[MASK_TOKENS][:1].repeat(4, 1)
    return state
