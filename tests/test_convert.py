"""What AutoGluon trained in Hugging Face's SamModel gives the same masks as an adapter."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from composed import compose
from conftest import Commands
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sam_models import SIDE, State, change, images, masks_of, told, trained
from segment_anything.modeling import MaskDecoder
from torch import Tensor, nn

from convlora import adapter, convert, predict
from convlora.sam.checkpoints import hash_file
from convlora.sam.hugging_face import DECODER_EPS, sam_name
from convlora.sam.zoo import SamViT
from convlora.schema import resolve

MODEL = (
    "model=sam_tiny",
    "model.embed_dim=16",
    "model.depth=3",
    "model.num_heads=2",
    "model.global_attn_indexes=[1]",
    "model.image_size=64",
    "model.window_size=3",
    "model.decoder_dim=32",
    "model.decoder_mlp_dim=24",
)
TINY = SamViT(
    name="sam_tiny", embed_dim=16, depth=3, num_heads=2, global_attn_indexes=[1], image_size=SIDE,
    patch_size=8, window_size=3, decoder_dim=32, decoder_mlp_dim=24,
)  # fmt: skip


@torch.no_grad()
def masks_by(path: str | Path, weights: str | None = None) -> Tensor:
    logits: Tensor = adapter.load(path, weights=weights, device="cpu").segmenter(images())
    return logits


def assert_same(found: Tensor, name: str = "conv_lora") -> None:
    expected = masks_of(name)
    assert expected.std() > 0.02
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def parts(state: State) -> State:
    """What was trained, as it is saved without the frozen tensors."""
    frozen = "mask_decoder.iou_prediction_head."
    return {
        name: value
        for name, value in state.items()
        if ".lora_" in name or (name.startswith("mask_decoder.") and not name.startswith(frozen))
    }


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        metadata: dict[str, str] = file.metadata()
    return metadata


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the whole model, `model.pth`, converted to `whole.safetensors` on `base.pth`."""
    folder = tmp_path_factory.mktemp("made")
    torch.save(trained(), folder / "model.pth")
    paths = {"checkpoint": "model.pth", "output": "whole.safetensors", "base": "base.pth"}
    config = compose("convert", *MODEL, *(f"{key}={folder / name}" for key, name in paths.items()))
    convert.convert(convert.ConvertConfig(**resolve(config)))
    return folder


@pytest.fixture
def run(cli: Commands, made: Path) -> Commands:
    """Runs commands in a folder with what `made` holds."""
    shutil.copytree(made, Path.cwd(), dirs_exist_ok=True)
    return cli


def test_every_tensor_of_a_sam_model_has_its_place() -> None:
    theirs = {sam_name(name): shape for name, shape in told("shapes").items()}
    assert theirs == {name: [*value.shape] for name, value in TINY.build().state_dict().items()}


def test_every_norm_has_the_epsilon_of_a_sam_model() -> None:
    def epsilons(sam: nn.Module) -> dict[str, float]:
        return {f"{name}.": module.eps for name, module in sam.named_modules() if hasattr(module, "eps")}

    theirs = {sam_name(f"{name}."): eps for name, eps in told("epsilons").items()}
    assert len(theirs) == 20
    assert epsilons(replace(TINY, decoder_eps=DECODER_EPS).build()) == theirs
    differing = theirs.items() - epsilons(TINY.build()).items()
    assert {name for name, _ in differing} == {
        f"mask_decoder.transformer.layers.{layer}.norm{norm}." for layer in (0, 1) for norm in (1, 2, 3, 4)
    }


def test_a_converted_model_gives_the_same_masks(run: Commands) -> None:
    assert_same(masks_by("whole.safetensors"))


@pytest.mark.parametrize(
    ("prefix", "file", "whole"),
    [
        ("", "trained.safetensors", True),
        ("", "trained.bin", False),
        ("model.", "trained.ckpt", True),
        ("model.sam.model.", "trained.safetensors", False),
    ],
)
def test_every_form_of_a_checkpoint_gives_the_same_masks(
    run: Commands, prefix: str, file: str, whole: bool
) -> None:
    state = trained() if whole else parts(trained())
    state = {f"{prefix}{name}": value.clone() for name, value in state.items()}
    if file.endswith("safetensors"):
        save_file(state, file)
    else:
        torch.save({"state_dict": state, "epoch": 3} if file.endswith("ckpt") else state, file)
    done = run(convert, *MODEL, f"checkpoint={file}", "output=a.safetensors", "model.weights=base.pth")
    assert done.code == 0, done.err
    assert "rank 2 with 3 experts, adapter: a.safetensors\nalpha 32, which the file does not hold" in done.out
    assert_same(masks_by("a.safetensors"))


@pytest.mark.parametrize(
    ("name", "num_experts", "targets", "blocks"),
    [
        ("lora", 0, ["qkv"], None),
        ("blocks", 12, ["qkv"], [1, 2]),
        ("mlp", 3, ["lin2", "qkv"], None),
        ("irregular", 2, ["blocks.0.attn.qkv", "blocks.2.mlp.lin1"], None),
    ],
)
def test_rank_experts_and_layers_are_read_from_the_file(
    cli: Commands, name: str, num_experts: int, targets: list[str], blocks: list[int] | None
) -> None:
    torch.save(trained(name), "model.pth")
    done = cli(convert, *MODEL, "alpha=8", "checkpoint=model.pth", "output=a.safetensors", "base=base.pth")
    assert done.code == 0, done.err
    peft = json.loads(metadata_of(Path("a.safetensors"))["config"])["peft"]
    assert (peft["rank"], peft.get("num_experts", 0)) == (2, num_experts)
    assert (peft["targets"], peft["blocks"]) == (targets, blocks)
    assert peft["_target_"].endswith("ConvLoRA" if num_experts else "lora.LoRA")
    assert_same(masks_by("a.safetensors"), name)


def test_without_the_decoders_epsilon_the_masks_differ(run: Commands) -> None:
    path = Path("whole.safetensors")
    metadata = metadata_of(path)
    config = json.loads(metadata["config"])
    assert config["model"].pop("decoder_eps") == 1e-6
    save_file(load_file(path), path, metadata | {"config": json.dumps(config)})
    assert (masks_by(path) - masks_of("conv_lora")).abs().max() > 1e-4


def test_base_weights_of_the_file_are_those_of_the_adapter(run: Commands) -> None:
    assert metadata_of(Path("whole.safetensors"))["base_sha256"] == hash_file(Path("base.pth"))
    Path("base.pth").rename("moved.pth")
    assert_same(masks_by("whole.safetensors", weights="moved.pth"))


def test_other_frozen_tensors_are_refused_with_a_way_out(run: Commands) -> None:
    torch.save(change(trained(), "other base"), "other.pth")
    other = (*MODEL, "checkpoint=other.pth", "output=a.safetensors")
    refused = run(convert, *other, "model.weights=base.pth")
    assert refused.code == 1
    assert "1 of its 68 frozen tensors (first image_encoder.blocks.1.attn.qkv.weight) are not" in refused.err
    unknown = run(convert, *other)
    assert "model=sam_tiny has no weights of its own; set model.weights=PATH" in unknown.err
    assert not Path("a.safetensors").exists()
    assert run(convert, *other, "base=other_base.pth").code == 0
    assert_same(masks_by("a.safetensors"), "other base")


@torch.no_grad()
def test_queries_of_several_classes_give_what_the_released_code_does(cli: Commands) -> None:
    """Its masks are those of segment-anything's decoder with these tokens and one MLP."""
    generator = torch.Generator().manual_seed(0)
    tokens, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((6, 32), (4, 32), (4,)))
    classifier = {"weight": weight, "bias": bias}
    several = trained() | {"mask_decoder.mask_tokens.weight": 0.1 * tokens}
    several |= {f"mask_decoder.output_classifier_mlps.{key}": value for key, value in classifier.items()}
    torch.save(several, "model.pth")
    names = ("class_names=[sky,sea,sand]",)
    done = cli(convert, *MODEL, *names, "checkpoint=model.pth", "output=a.safetensors", "base=base.pth")
    assert done.code == 0, done.err
    again = cli(
        convert, *MODEL, *names, "checkpoint=model.pth", "output=b.safetensors", "model.weights=base.pth"
    )
    assert again.code == 0, again.err
    segmenter = adapter.load("a.safetensors", device="cpu").segmenter
    sam = replace(TINY, decoder_eps=DECODER_EPS).build()
    reference = MaskDecoder(
        transformer_dim=32, transformer=sam.mask_decoder.transformer, num_multimask_outputs=5
    )
    state = {sam_name(name).removeprefix("mask_decoder."): value for name, value in several.items()}
    kept = [name for name in reference.state_dict() if not name.startswith("iou_prediction_head")]
    reference.load_state_dict(
        {name: state[re.sub(r"mlps\.\d", "mlps.0", name)] for name in kept}, strict=False
    )
    found: list[Tensor] = []
    reference.transformer.register_forward_hook(lambda *call: found.append(call[2][0][:, 1:]))
    sparse = torch.empty(1, 0, 32)
    embeddings, position, dense = (
        segmenter.image_encoder(images()), segmenter.position_encoding, segmenter.dense_prompt
    )  # fmt: skip
    masks = torch.cat(
        [reference.predict_masks(each[None], position, sparse, dense)[0] for each in embeddings]
    )
    masks = F.interpolate(masks, (SIDE, SIDE), mode="bilinear").sigmoid()
    classes = F.linear(torch.cat(found), weight, bias).softmax(-1)[..., :3]
    expected = (classes[..., None, None] * masks[:, :, None]).sum(1)
    assert expected.std() > 0.02
    torch.testing.assert_close(segmenter(images()).exp(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(masks_by("b.safetensors").exp(), expected, atol=1e-5, rtol=1e-4)
    assert json.loads(metadata_of(Path("a.safetensors"))["class_names"]) == ["sky", "sea", "sand"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_widened(run: Commands, dtype: str) -> None:
    torch.save(change(trained(), dtype), "half.pth")
    half = (*MODEL, "checkpoint=half.pth")
    other = ("model.frozen_dtype=bfloat16", "model.image_size=48")
    smaller = run(convert, *half, *other, "output=small.safetensors", "model.weights=base.pth")
    assert smaller.code == 0, smaller.err
    rounded = run(convert, *half, "output=rounded.safetensors", "model.weights=base.pth")
    assert rounded.code == 0, rounded.err
    assert {value.dtype for value in load_file("rounded.safetensors").values()} == {torch.float32}
    assert run(convert, *half, "output=exact.safetensors", "base=half_base.pth").code == 0
    base = torch.load("half_base.pth", weights_only=True)
    assert {value.dtype for value in base.values()} == {torch.float32}
    assert_same(masks_by("exact.safetensors"), dtype)


def test_predict_takes_it_like_any_other_from_any_folder(
    run: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("checkpoint=model.pth", "output=a.safetensors", "base=b.pth", "class_names=[leaf]")
    made = run(convert, *MODEL, *given)
    assert made.code == 0, made.err
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    Image.effect_noise((50, 40), 90).convert("RGB").save("photo.png")
    adapted = "checkpoint=../a.safetensors"
    done = run(predict, adapted, "input=photo.png", "output=masks", "routing=true", "num_workers=0")
    assert done.code == 0, done.err
    assert Image.open("masks/photo.png").size == (50, 40)
    metadata = metadata_of(Path("../a.safetensors"))
    assert json.loads(metadata["class_names"]) == ["leaf"]
    assert json.loads(metadata["config"])["resize"]["_target_"] == compose("train").resize._target_
    assert "median_side" not in metadata


def test_the_table_of_positions_is_the_one_that_a_sam_model_reads(cli: Commands) -> None:
    state = trained()
    state["prompt_encoder.shared_embedding.positional_embedding"] *= 2
    torch.save(state, "model.pth")
    assert cli(convert, *MODEL, "checkpoint=model.pth", "output=a.safetensors", "base=base.pth").code == 0
    assert_same(masks_by("a.safetensors"))


def spoil(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Checkpoints that cannot be converted, by file name."""
    plain = {name: value for name, value in state.items() if ".lora_" not in name}
    tokens = "mask_decoder.mask_tokens.weight"
    part = "mask_decoder.output_classifier_mlps"
    classes = {f"{part}.weight": torch.zeros(4, 32), f"{part}.bias": torch.zeros(4)}
    layer = "vision_encoder.layers.0.attn.qkv"
    wide = {f"{layer}.lora_A": torch.zeros(2, 1280), f"{layer}.lora_B": torch.zeros(3840, 2)}
    return {
        "plain.pth": plain,
        "huge.pth": wide,
        "odd.pth": {f"{layer}.lora_A": torch.zeros(2, 17)},
        "classes.pth": state | classes,
        "few.pth": state | classes | {tokens: torch.zeros(2, 32)},
        "bias.pth": state | classes | {tokens: torch.zeros(4, 32), f"{part}.weight": torch.zeros(5, 32)},
        "deep.pth": state | classes | {tokens: torch.zeros(4, 32), f"{part}.1.weight": torch.zeros(4, 32)},
        "mlps.pth": state | {"mask_decoder.output_hypernetworks_mlps.1.proj_in.bias": torch.zeros(32)},
        "tokens.pth": state | {tokens: torch.zeros(4, 32)},
        "more.pth": state | {"vision_encoder.extra.weight": torch.zeros(1)},
        "ia3.pth": state | {f"{layer}.lora_b": torch.zeros(48, 1)},
        "decoder.pth": state | {"mask_decoder.upscale_conv1.lora_A": torch.zeros(2, 8)},
        "history.pth": state | {f"{layer}.lora_moe_gating.history": torch.zeros(4)},
        "less.pth": {name: value for name, value in state.items() if "layer_norm3" not in name},
        "expert.pth": {name: value for name, value in state.items() if "experts.2.0.bias" not in name},
        "nan.pth": state | {"mask_decoder.upscale_conv1.bias": torch.full((8,), torch.nan)},
        "iou.pth": state | {"mask_decoder.iou_prediction_head.proj_out.weight": torch.zeros(1, 32)},
        "none.pth": {},
        "two.pth": {f"{prefix}.{name}": value for prefix in "ab" for name, value in state.items()},
        "other.pth": {"fc.weight": torch.zeros(1)},
        "grid.pth": state | {"vision_encoder.neck.conv2.weight": torch.zeros(8, 8, 3, 3)},
    }


class Code:
    """What a pickle must not bring to life."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("harmed"),)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("checkpoint=nowhere.pth", "no file at nowhere.pth; name the one that holds the tensors, not its fo"),
        ("checkpoint=code.pth", "SamModel: code.pth is not a plain file of tensors (truncated, or a pickle "),
        ("checkpoint=cut.pth", "SamModel: cut.pth is truncated or damaged; fetch it again."),
        ("checkpoint=cut.safetensors", "SamModel: cut.safetensors is truncated or damaged; fetch it again."),
        ("checkpoint=plain.pth", "checkpoint=plain.pth holds neither Conv-LoRA nor LoRA in the image encod"),
        ("checkpoint=huge.pth", "checkpoint=huge.pth adapts an encoder of 1280 channels, model=sam_tiny "
         "has another; set model=sam_vit_h"),
        ("checkpoint=odd.pth", "checkpoint=odd.pth adapts an encoder of 17 channels, model=sam_tiny has "
         "another; no model= here has so many"),
        ("checkpoint=classes.pth", "checkpoint=classes.pth was trained on 3 classes, in the order of the"),
        ("checkpoint=few.pth class_names=[a,b,c]", "checkpoint=few.pth has 2 mask tokens for 3 classes, bu"),
        ("checkpoint=bias.pth class_names=[a,b,c]", "checkpoint=bias.pth is incomplete or no Conv-LoRA as "),
        ("checkpoint=deep.pth class_names=[a,b,c]", "checkpoint=deep.pth is incomplete or no Conv-LoRA as "),
        ("checkpoint=mlps.pth", "checkpoint=mlps.pth holds mask_decoder.output_hypernetworks_mlps.1.layers"),
        ("checkpoint=tokens.pth", "checkpoint=tokens.pth holds 4 mask tokens, and no output_classifier_mlps"),
        ("checkpoint=more.pth", "checkpoint=more.pth holds image_encoder.extra.weight, which has no place"),
        ("checkpoint=ia3.pth", "checkpoint=ia3.pth holds image_encoder.blocks.0.attn.qkv.lora_b, which ha"),
        ("checkpoint=decoder.pth", "checkpoint=decoder.pth holds mask_decoder.output_upscaling.0.lora_A, wh"),
        ("checkpoint=less.pth", "checkpoint=less.pth is incomplete or no Conv-LoRA as released: of the tra"),
        ("checkpoint=two.pth", "two.pth must hold the tensors of one SamModel, vision_encoder., mask_decoder."
         " and so on below a common prefix, but there are several, below a. and b. in its"),
        ("checkpoint=other.pth", "other.pth must hold the tensors of one SamModel, vision_encoder., mask_de"),
        ("checkpoint=grid.pth", "checkpoint=grid.pth: 1 of its 68 frozen tensors (first image_encoder.neck."),
        ("checkpoint=grid.pth base=b.pth", "checkpoint: grid.pth holds another model; of "),
        ("checkpoint=iou.pth base=b.pth", "checkpoint: iou.pth holds another model; of "),
        ("checkpoint=expert.pth", "checkpoint=expert.pth is incomplete or no Conv-LoRA as released"),
        ("checkpoint=nan.pth", "checkpoint=nan.pth has values in mask_decoder.output_upscaling.0.bias that "),
        ("checkpoint=none.pth", "none.pth must hold the tensors of one SamModel, vision_encoder., mask_deco"),
        ("checkpoint=history.pth", "checkpoint=history.pth holds image_encoder.blocks.0.attn.qkv.lora_moe_g"),
        ("checkpoint=model.pth alpha=nan", "alpha=nan must be positive; 32 is the released value"),
        ("checkpoint=model.pth alpha=0", "alpha=0 must be positive; 32 is the released value"),
        ("checkpoint=model.pth base=b.pth model.weights=base.pth", "base=b.pth makes base weights of the ch"),
        ("checkpoint=whole.safetensors", "whole.safetensors is an adapter already; give it to predict or "),
        ("checkpoint=model.pth model.decoder_eps=1e-3", "model.decoder_eps is 1e-06 in all that AutoGluon t"),
        ("checkpoint=model.pth output=a.pth", "output=a.pth must be a file name that ends in .safetensors"),
        ("checkpoint=model.pth output=whole.safetensors", "output=whole.safetensors is there already; choos"),
        ("checkpoint=model.pth base=base.pth", "base=base.pth is there already; choose another name or remo"),
        ("checkpoint=model.pth base=b.safetensors", "base=b.safetensors must be a file name that ends in .p"),
        ("checkpoint=parts.pth base=b.pth", "parts.pth lacks "),
        ("checkpoint=model.pth class_names=[a,b]", "checkpoint=model.pth was trained on the foreground alon"),
        ("", "checkpoint must be given; write checkpoint=VALUE"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_told_in_one_line(run: Commands, arguments: str, message: str) -> None:
    state = trained()
    for name, spoilt in spoil(state).items():
        if name in arguments:
            torch.save(spoilt, name)
    torch.save(parts(trained()), "parts.pth")
    torch.save({"state_dict": state, "run": Code()}, "code.pth")
    Path("cut.pth").write_bytes(Path("model.pth").read_bytes()[:-100])
    Path("cut.safetensors").write_bytes(Path("whole.safetensors").read_bytes()[:-100])
    given = [] if "output=" in arguments else ["output=a.safetensors"]
    given += [] if "base=" in arguments else ["model.weights=base.pth"]
    done = run(convert, *MODEL, *given, *arguments.split())
    assert done.code == 1
    assert "Traceback" not in done.err
    assert done.err.strip().splitlines()[-1].startswith(f"error: {message}")
    assert not {"a.safetensors", "a.pth", "b.pth", "b.safetensors", "harmed"} & {
        path.name for path in Path.cwd().iterdir()
    }


def test_a_model_of_another_kind_is_refused(run: Commands) -> None:
    done = run(convert, "model=mobile_sam", "checkpoint=model.pth", "output=a.safetensors")
    assert "adapts an encoder of 16 channels, model=mobile_sam has another; no model= here" in done.err
    assert run(convert, "checkpoint=model.pth").err.startswith("error: model=NAME must be given; there are ")
