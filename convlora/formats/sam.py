"""A segmenter as a checkpoint of segment-anything's, what was learnt merged into its weights."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from convlora.adapter import Adapter
from convlora.data.transforms import LongestSideResize
from convlora.formats.folder import full_disk
from convlora.formats.graph import method_of
from convlora.formats.readme import opening
from convlora.heads import PerClassDecoder
from convlora.peft.method import merge
from convlora.sam import checkpoints
from convlora.sam.zoo import Backbone, MobileSam, SamViT, load_backbone
from convlora.schema import make

WAY_OUT = "use format=onnx or torch, which hold all of it, or format=adapter"
IOU_HEAD = "mask_decoder.iou_prediction_head."
TOKENS = "mask_decoder.mask_tokens.weight"
MOBILE = "`mobile_sam` comes from https://github.com/ChaoningZhang/MobileSAM.\n\n"
EPS = 1e-5  # of segment-anything's decoder


def write(adapter: Adapter, folder: Path, weights: str | None) -> str:
    """Write the checkpoint with a README beside it, and return what is to be known of it.

    Segment-anything's decoder has four mask tokens, which attend to one another, and the trained one has one:
    three more change its mask. So there are two checkpoints: an exact one for a decoder of one mask,
    `MaskDecoder(num_multimask_outputs=0)`, whose IoU head is that of the base for this mask; and one of four
    masks, as `sam_model_registry` builds it, whose other tokens and IoU head are those of the base.

    Args:
        adapter: what is exported.
        folder: to write to.
        weights: base weights, where they lie elsewhere than at training.

    Raises:
        OSError: the disk is full.
        ValueError: what was learnt does not fit into the weights of SAM.
    """
    classes = list(adapter.class_colors)
    if len(classes) > 1:
        raise ValueError(f"format=sam holds one mask, the adapter has {len(classes)} classes; {WAY_OUT}")
    decoder = adapter.segmenter.mask_decoder
    if not isinstance(decoder, PerClassDecoder):
        raise ValueError(f"format=sam cannot hold the decoder {type(decoder).__name__}; {WAY_OUT}")
    try:
        encoder = merge(adapter.segmenter.image_encoder)
    except ValueError as error:
        reason = f"{method_of(adapter)} cannot be merged into the weights of SAM"
        raise ValueError(f"format=sam: {reason}; {WAY_OUT}") from error
    backbone: Backbone = make("model", json.loads(adapter.metadata["config"])["model"])
    name, four = f"{backbone.name}.pth", f"{backbone.name}_four_masks.pth"
    state = {
        **{f"image_encoder.{key}": value for key, value in encoder.state_dict().items()},
        **{
            f"prompt_encoder.{key}": value
            for key, value in adapter.segmenter.prompt_encoder.state_dict().items()
        },
        **{f"mask_decoder.{key}": value for key, value in decoder.state_dict().items()},
    }
    base, _ = load_backbone(replace(backbone, weights=weights or backbone.weights))
    untrained = {f"mask_decoder.{key}": value for key, value in base.mask_decoder.state_dict().items()}
    try:
        _save(folder / name, backbone, state | iou_head(untrained))
        _save(folder / four, backbone, state | beside(untrained, state))
    except RuntimeError as error:  # PyTorch's own writer knows no other
        raise full_disk(folder, str(error).splitlines()[0]) from error
    (folder / "README.md").write_text(readme(adapter, backbone, name, four))
    return (
        f"{name} for a decoder of one mask, at {backbone.image_size} px: build it as README.md says; {four} "
        "as sam_model_registry builds it, whose mask differs somewhat, since its other mask tokens are the "
        "base's and were not trained; nor was the IoU head of both, so what it predicts means nothing"
    )


def _save(path: Path, backbone: Backbone, state: Mapping[str, Tensor]) -> None:
    tensors = {key: value.detach().float().contiguous() for key, value in state.items()}
    checkpoints.write(path, backbone.revert(tensors))


def iou_head(untrained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the base's IoU head, of whose last layer the row for the single mask alone."""
    head = {key: value for key, value in untrained.items() if key.startswith(IOU_HEAD)}
    last = max(int(key.removeprefix(IOU_HEAD).split(".")[1]) for key in head)
    return {
        key: value[:1] if key.startswith(f"{IOU_HEAD}layers.{last}.") else value
        for key, value in head.items()
    }


def beside(untrained: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the base's other mask tokens behind the trained one, their MLPs, and the base's IoU head."""
    return {
        TOKENS: torch.cat([state[TOKENS], untrained[TOKENS][1:].to(state[TOKENS])]),
        **{key: value for key, value in untrained.items() if key not in state},
    }


def readme(adapter: Adapter, backbone: Backbone, name: str, four: str) -> str:
    """Return the README of a checkpoint, with a snippet that segments an image."""
    package = "mobile_sam" if isinstance(backbone, MobileSam) else "segment_anything"
    size = backbone.image_size
    origin = "" if package == "segment_anything" else MOBILE
    [label] = adapter.class_colors
    if isinstance(adapter.resize, LongestSideResize):
        shape = "`SamPredictor` brings images to this size as the training did, the longest side first."
    else:
        shape = (
            "It was trained on images that were stretched to a square, and `SamPredictor` keeps their shape: "
            "the snippet stretches them before."
        )
    return f"""# {label}: a checkpoint of segment-anything's

`{name}`: {adapter.metadata["base"]}, fine-tuned by convlora with {method_of(adapter)}, which is
merged into the weights, by `{package}`'s own keys. It finds {label} without prompts, at {size} x {size}
pixels. {shape}

{origin}It is for a decoder of one mask, which the code below builds, and gives the trained masks exactly.
`{four}` is for a decoder of four, as `sam_model_registry` builds it (for 1024 pixels): there three more
mask tokens, the base's and untrained, take part in the attention, so that the mask differs somewhat; it is
the first, that of `multimask_output=False`. The IoU head of both is that of the base and was not trained:
what it predicts says nothing. Prompts change the mask in ways that nobody trained.

```python
{snippet(adapter, backbone, name, package)}
```
"""


def snippet(adapter: Adapter, backbone: Backbone, name: str, package: str) -> str:
    """Return code that builds the model of a checkpoint and segments an image."""
    size, grid, dim = backbone.image_size, backbone.image_size // backbone.patch_size, backbone.decoder_dim
    if isinstance(backbone, SamViT):
        first = "from functools import partial\n\n"
        module, before, after = "image_encoder import ImageEncoderViT", "", ""
        encoder = (
            f"ImageEncoderViT(\n        img_size={size}, patch_size={backbone.patch_size}, "
            f"embed_dim={backbone.embed_dim}, depth={backbone.depth}, num_heads={backbone.num_heads},\n"
            f"        out_chans={dim}, use_rel_pos=True, window_size={backbone.window_size}, "
            f"global_attn_indexes={list(backbone.global_attn_indexes)},\n"
            "        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),\n    )"
        )
    else:
        first, module = "", "tiny_vit_sam import TinyViT"
        after = "  # after loading, since it makes tables of the weights"
        before = f"""class Encoder(TinyViT):
    def forward(self, x):  # MobileSAM's own is for 1024 pixels alone
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.neck(x.transpose(1, 2).reshape(len(x), -1, {grid}, {grid}))

"""
        encoder = (
            f"Encoder(\n        img_size={size}, num_classes=1000, embed_dims=[64, 128, 160, 320], "
            "depths=[2, 2, 6, 2],\n        num_heads=[2, 4, 5, 10], window_sizes=[7, 7, 14, 7], "
            "drop_path_rate=0.0,\n    )"
        )
    eps = (
        ""
        if backbone.decoder_eps == EPS
        else f"""
for layer in sam.mask_decoder.transformer.layers:
    for norm in (layer.norm1, layer.norm2, layer.norm3, layer.norm4):
        norm.eps = {backbone.decoder_eps}  # as in training"""
    )
    shown = "image" if isinstance(adapter.resize, LongestSideResize) else f"image.resize(({size}, {size}))"
    imports, opened = opening(adapter)
    restored = "" if shown == "image" else ".resize(image.size)"
    return f"""{first}import numpy as np
import torch
{imports}
from {package} import SamPredictor
from {package}.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from {package}.modeling.{module}

{before}sam = Sam(
    {encoder},
    PromptEncoder({dim}, ({grid}, {grid}), ({size}, {size}), mask_in_chans=16),
    MaskDecoder(
        num_multimask_outputs=0, transformer_dim={dim},
        transformer=TwoWayTransformer(2, {dim}, 8, {backbone.decoder_mlp_dim}),
    ),
)
sam.load_state_dict(torch.load("{name}", weights_only=True)){eps}
sam.eval(){after}
predictor = SamPredictor(sam)
{opened}
predictor.set_image(np.asarray({shown}))
masks, _, low_res_logits = predictor.predict(multimask_output=False)
Image.fromarray(masks[0]){restored}.save("mask.png")"""
