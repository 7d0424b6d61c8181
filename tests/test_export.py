"""Exported forms of small trained segmenters, run by the programs that they are for."""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx as onnx_package
import pytest
import rasterio
import torch
from composed import compose, names
from conftest import SMALL, TINY, Commands, from_conf, train_in
from huggingface_hub import ModelCard
from numpy.typing import NDArray
from PIL import Image

from convlora import adapter, export
from convlora.adapter import Adapter
from convlora.build import make_segmenter
from convlora.data.bands import Bands
from convlora.data.sets.synthetic import draw_scene
from convlora.formats import onnx, program, sam
from convlora.formats.graph import BOUND, RELATIVE, compare, make_trial, record
from convlora.sam.tiny_vit import convert_mobile_sam, revert_mobile_sam
from convlora.sam.zoo import load_backbone
from convlora.schema import make, resolve
from convlora.segmenter import Segmenter

MODEL = {
    "_target_": "convlora.sam.zoo.SamViT", "name": "tiny", "embed_dim": 16, "depth": 2, "num_heads": 2,
    "global_attn_indexes": [1], "image_size": 64, "patch_size": 8, "window_size": 3, "decoder_dim": 32,
    "decoder_mlp_dim": 32, "decoder_eps": 1e-2, "weights": None,
}  # fmt: skip
GATE = {"_target_": "convlora.peft.gating.NoisyTopK", "top_k": 2}
CONV_LORA = {"_target_": "convlora.peft.conv_lora.ConvLoRA", "rank": 2, "num_experts": 3, "gate": GATE}
LORA = {"_target_": "convlora.peft.lora.LoRA", "rank": 2}
PER_CLASS = {"_target_": "convlora.heads.PerClass"}
QUERY = {"_target_": "convlora.heads.Query", "num_queries": 8}
# By parts of a name, how far a tensor of a query head is moved, so that queries differ in their class
MOVED = {"output_classifier": 3.0, "hypernetworks": 1.0, "transformer": 0.05}
ONE = {"thing": [1, 2, 3]}
SEVERAL = {"ground": [0, 0, 0], "leaf": [0, 255, 0], "spot": [255, 0, 0]}
SIZES = ((100, 80), (48, 36))  # of photographs, px
NEAR = 0.01  # share of pixels that rounding may turn: Pillow's bicubic is PyTorch's but for one grey level


def plant(
    folder: Path,
    peft: dict[str, Any],
    resize: str,
    colors: dict[str, list[int]],
    bands: Bands | None = None,
    head: dict[str, Any] = PER_CLASS,
) -> Path:
    """An adapter that has learnt something."""
    side = {"_target_": f"convlora.data.transforms.{resize}", "image_size": 64}
    config = {"model": MODEL, "peft": peft, "head": head, "resize": side}
    torch.manual_seed(0)
    segmenter, identity = make_segmenter(
        make("model", MODEL), make("peft", peft), make("head", head), len(colors)
    )
    moved = MOVED if head is QUERY else {}
    for name, value in segmenter.trainable_state().items():
        usual = 0.3 if name.startswith("mask_decoder.") else 0.1
        alpha = next((alpha for part, alpha in moved.items() if part in name), usual)
        value.add_(torch.randn_like(value), alpha=alpha)
    folder.mkdir(exist_ok=True)
    path = folder / adapter.NAME
    metadata = adapter.describe(config, colors, identity, "32-true", bands=bands)
    adapter.save(path, segmenter.trainable_state(), metadata)
    return path


def photograph(path: Path, size: tuple[int, int], index: int) -> None:
    scene = draw_scene(np.random.default_rng(index), 128)[0]
    Image.fromarray(scene).resize(size).save(path, quality=95)


def snippet_of(folder: Path) -> str:
    found = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def run_fresh(folder: Path, code: str, *without: str) -> None:
    """Run code in a process of its own, in which some packages cannot be imported."""
    barred = "".join(f"sys.modules[{name!r}] = None\n" for name in without)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{barred}{code}"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def masks_of_snippet(folder: Path, *without: str) -> list[NDArray[np.uint8]]:
    """What the README's snippet makes of photographs of two sizes, in one process."""
    code = snippet_of(folder)
    parts = []
    for index, size in enumerate(SIZES):
        photograph(folder / f"photo{index}.jpg", size, index)
        parts.append(code.replace("photo.jpg", f"photo{index}.jpg").replace("mask.png", f"mask{index}.png"))
    run_fresh(folder, "\n".join(parts), *without)
    return [np.asarray(Image.open(folder / f"mask{index}.png")) for index in range(len(SIZES))]


def check_masks(folder: Path, trained: Path, masks: list[NDArray[np.uint8]]) -> None:
    predictor = adapter.load(trained, device="cpu")
    for index, mask in enumerate(masks):
        expected = predictor.predict(folder / f"photo{index}.jpg").classes
        found = mask if len(predictor.class_colors) > 1 else mask // 255
        assert found.shape == expected.shape
        assert len(np.unique(expected)) > 1
        assert (found != expected).mean() <= NEAR


@pytest.fixture(scope="module")
def as_onnx(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An adapter of several classes, with queries whose masks are sure of themselves, as ONNX."""
    folder = tmp_path_factory.mktemp("onnx")
    trained = plant(folder, CONV_LORA, "LongestSideResize", SEVERAL, head=QUERY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export", f"checkpoint={trained}", "format=onnx"])
        export.main()
    return trained, folder / "onnx"


def test_onnx_equals_pytorch_at_other_batch_sizes_than_the_recorded(as_onnx: tuple[Path, Path]) -> None:
    trained, folder = as_onnx
    segmenter = adapter.read(trained).segmenter
    model = onnx.open_model(folder / onnx.NAME)
    for batch in (1, 4, 7):
        images = torch.randn(batch, 3, 64, 64)
        with torch.no_grad():
            expected = segmenter(images)
        assert expected.std() > 0.1
        bound = max(BOUND, RELATIVE * expected.abs().max().item())
        torch.testing.assert_close(model(images), expected, atol=bound, rtol=0)


def test_onnx_says_what_it_is_and_how_far_it_was_off(as_onnx: tuple[Path, Path]) -> None:
    _, folder = as_onnx
    model = onnx_package.load(folder / onnx.NAME)
    [images], [logits] = model.graph.input, model.graph.output
    axes = [axis.dim_param or axis.dim_value for axis in images.type.tensor_type.shape.dim]
    assert (images.name, axes, logits.name) == ("images", ["batch", 3, 64, 64], "logits")
    facts = {each.key: each.value for each in model.metadata_props}
    assert json.loads(facts["class_names"]) == list(SEVERAL)
    assert 0 < float(facts["largest_difference"]) < 10 * BOUND  # which grows with the logits
    assert (
        f"{float(facts['largest_difference']):.1e}, on 6 synthetic scenes"
        in (folder / "README.md").read_text()
    )


def test_the_snippet_of_onnx_finds_the_masks_of_predict(as_onnx: tuple[Path, Path]) -> None:
    trained, folder = as_onnx
    check_masks(folder, trained, masks_of_snippet(folder, "torch", "convlora", "segment_anything"))


def test_a_program_finds_the_masks_of_predict_without_this_library(tmp_path: Path) -> None:
    trained = plant(tmp_path / "run", CONV_LORA, "SquareResize", ONE)
    loaded = adapter.read(trained)
    images = tmp_path / "images"
    images.mkdir()
    photograph(images / "a.png", SIZES[0], 5)
    program.write(loaded, tmp_path, make_trial(loaded, images))
    assert "on 1 of the 1 images given" in (tmp_path / "README.md").read_text()
    check_masks(tmp_path, trained, masks_of_snippet(tmp_path, "convlora", "segment_anything", "timm"))


def test_a_checkpoint_of_segment_anything_gives_the_same_logits(tmp_path: Path) -> None:
    trained = adapter.read(plant(tmp_path, LORA, "LongestSideResize", ONE))
    said = sam.write(trained, tmp_path, None)
    assert "its other mask tokens are the base's and were not trained; nor was the IoU head" in said
    photograph(tmp_path / "photo.jpg", (64, 64), 3)
    Image.open(tmp_path / "photo.jpg").save(tmp_path / "photo.png")
    code = snippet_of(tmp_path).replace("photo.jpg", "photo.png")
    run_fresh(tmp_path, f"{code}\nnp.save('logits.npy', low_res_logits)", "convlora")
    pixels = np.asarray(Image.open(tmp_path / "photo.png"))
    inputs = torch.from_numpy(
        ((pixels / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)).astype(np.float32)
    )
    segmenter = trained.segmenter
    with torch.no_grad():
        embeddings = segmenter.image_encoder(inputs.permute(2, 0, 1)[None])
        fixed = (segmenter.position_encoding, segmenter.dense_prompt)
        expected = segmenter.mask_decoder.outputs(embeddings, *fixed, (32, 32))
    assert expected.std() > 0.1
    torch.testing.assert_close(
        torch.from_numpy(np.load(tmp_path / "logits.npy"))[None], expected, atol=1e-4, rtol=0
    )


def test_a_checkpoint_of_four_masks_has_the_trained_one_first(tmp_path: Path) -> None:
    trained = adapter.read(plant(tmp_path, LORA, "SquareResize", ONE))
    sam.write(trained, tmp_path, None)
    state = torch.load(tmp_path / "tiny_four_masks.pth", weights_only=True)
    base = make("model", MODEL)
    built, _ = load_backbone(base)
    untrained = {key: value.clone() for key, value in built.mask_decoder.state_dict().items()}
    built.load_state_dict(state)  # strictly, in segment-anything's own shapes
    head, decoder = trained.segmenter.mask_decoder, built.mask_decoder
    assert torch.equal(decoder.mask_tokens.weight[:1], head.mask_tokens.weight)
    assert torch.equal(decoder.mask_tokens.weight[1:], untrained["mask_tokens.weight"][1:])
    for key, value in decoder.state_dict().items():
        if "output_hypernetworks_mlps.0." in key or key.startswith("transformer."):
            assert torch.equal(value, head.state_dict()[key])
        elif "output_hypernetworks_mlps." in key or key.startswith("iou_prediction_head."):
            assert torch.equal(value, untrained[key])


def test_the_snippet_of_an_adapter_of_bands_reads_them(tmp_path: Path) -> None:
    bands = Bands((3, 1, 2), "uint16", ((100.0, 4000.0), (0.0, 3000.0), (50.0, 5000.0)))
    path = plant(tmp_path, LORA, "SquareResize", ONE, bands)
    trained = adapter.read(path)
    program.write(trained, tmp_path, make_trial(trained, None))
    values = np.random.default_rng(0).integers(0, 6000, (4, 11, 13)).astype(np.uint16)
    values = values.repeat(6, axis=1).repeat(6, axis=2)[:, :60, :72]
    with rasterio.open(tmp_path / "scene.tif", "w", driver="GTiff", count=4, height=60, width=72,
                       dtype="uint16") as file:  # fmt: skip
        file.write(values)
    assert "bands 3, 1, 2 of uint16 as red 100 to 4000" in (tmp_path / "README.md").read_text()
    run_fresh(tmp_path, snippet_of(tmp_path), "convlora")
    found = np.asarray(Image.open(tmp_path / "mask.png"))
    expected = adapter.load(path).predict(tmp_path / "scene.tif").classes * 255
    assert 0.05 < (expected > 0).mean() < 0.95
    assert (found != expected).mean() <= NEAR


def test_tensors_of_mobile_sam_go_to_its_own_keys_and_back() -> None:
    backbone = from_conf("mobile_sam")
    state = {key: torch.randn_like(value) for key, value in backbone.build().state_dict().items()}
    reverted = revert_mobile_sam(state)
    assert reverted["image_encoder.layers.0.downsample.conv1.bn.running_var"].shape == (128,)
    again = convert_mobile_sam(reverted)
    assert again.keys() == state.keys()
    for key, value in state.items():
        torch.testing.assert_close(again[key], value)


def test_tensors_of_mobile_sam_have_the_keys_and_shapes_of_its_checkpoint(shared: Path) -> None:
    public = torch.load(shared / "weights/mobile_sam.pt", weights_only=True)
    reverted = revert_mobile_sam(from_conf("mobile_sam").build().state_dict())
    assert {key: value.shape for key, value in reverted.items()} == {
        key: value.shape for key, value in public.items()
    }


@pytest.mark.parametrize(
    ("peft", "colors", "reason"),
    [
        (CONV_LORA, ONE, r"ConvLoRA cannot be merged into the weights of SAM; use format=onnx or torch"),
        (LORA, SEVERAL, r"holds one mask, the adapter has 3 classes; use format=onnx or torch"),
    ],
)
def test_what_segment_anything_cannot_hold_is_refused(
    tmp_path: Path, peft: dict[str, Any], colors: dict[str, list[int]], reason: str
) -> None:
    trained = adapter.read(plant(tmp_path, peft, "SquareResize", colors))
    with pytest.raises(ValueError, match=reason):
        sam.write(trained, tmp_path, None)


@cache
def untrained(method: str, model: str) -> Adapter:
    """A method of conf/peft on a small SAM, every trained tensor moved a little."""
    config = resolve(compose("train", f"peft={method}", "dataset=synthetic", f"model={model}").peft)
    one_block = replace(TINY, depth=1, global_attn_indexes=())
    backbone = one_block if model == "sam_tiny" else replace(from_conf(model), image_size=64)
    torch.manual_seed(0)
    sam = backbone.build()
    if model == "mobile_sam":
        for stage in sam.image_encoder.stages:  # which differ, and their blocks do not
            stage.blocks = stage.blocks[:1]
    segmenter = Segmenter(sam, make("peft", config))
    for value in segmenter.trainable_state().values():
        value.add_(torch.randn_like(value), alpha=0.05)
    segmenter.image_encoder.load_state_dict(segmenter.image_encoder.state_dict())
    metadata = {"config": json.dumps({"peft": config}), "base": "", "base_sha256": "", "precision": "32-true"}
    side = make(
        "resize", {"_target_": "convlora.data.transforms.SquareResize", "image_size": backbone.image_size}
    )
    return Adapter(segmenter, side, ONE, "32-true", metadata)


@pytest.mark.parametrize("method", names("peft"))
def test_every_method_is_one_graph_for_batches_of_any_size(method: str) -> None:
    """Of the part that methods adapt; programs are written from it, and ONNX models translated."""
    trained = untrained(method, "sam_tiny")
    encoder = trained.segmenter.image_encoder
    recorded = record(replace(trained, segmenter=encoder)).module()  # type: ignore[arg-type]
    assert compare("torch", encoder, recorded, make_trial(trained, None)) < 1e-4


@pytest.mark.slow
def test_mobile_sam_can_be_exported(tmp_path: Path) -> None:
    trained = untrained("conv_lora", "mobile_sam")
    assert "largest difference" in onnx.write(trained, tmp_path, make_trial(trained, None))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = ("trainer.max_epochs=1", "peft.num_experts=2", "dataset.train_size=4", "dataset.val_size=1")
    return train_in(tmp_path_factory.mktemp("run"), *SMALL, *small)


def test_the_model_card_says_what_the_run_scored(cli: Commands, run: Path) -> None:
    done = cli(export, f"checkpoint={run}", "format=hub", "output=hub", "license=cc-by-4.0")
    assert done.code == 0, done.err
    assert "hf upload USER/REPO hub" in done.out
    card = ModelCard.load(Path("hub/README.md"))
    test = json.loads((run / "summary.json").read_text())["test"]
    found = {result.metric_type: result for result in card.data.eval_results or []}
    assert found.keys() == {name for name, value in test.items() if value is not None} - {"loss"}
    assert found["dice"].metric_value == round(test["dice"], 4)
    assert found["dice"].dataset_args == {"num_images": 5}
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "cc-by-4.0", "convlora", "image-segmentation",
    )  # fmt: skip
    settings = json.loads(Path("hub/config.json").read_text())["config"]
    assert settings["peft"]["num_experts"] == 2


def test_a_folder_for_the_hub_is_read_as_the_run_is(cli: Commands, run: Path) -> None:
    assert cli(export, f"checkpoint={run}", "format=hub", "output=hub").code == 0
    photograph(Path("photo.png"), (50, 40), 1)
    expected, found = (adapter.load(each, device="cpu").predict("photo.png") for each in (run, "hub"))
    assert np.array_equal(found.prob, expected.prob)


def test_a_path_to_weights_does_not_go_to_the_hub(tmp_path: Path, cli: Commands) -> None:
    backbone = make("model", MODEL)
    torch.save(backbone.build().state_dict(), tmp_path / "own.pth")
    config = MODEL | {"weights": str(tmp_path / "own.pth")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODEL, "weights", config["weights"])
        path = plant(tmp_path / "a", LORA, "SquareResize", ONE)
    assert cli(export, f"checkpoint={path}", "format=hub").code == 0
    for file in (tmp_path / "a/hub").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()
    assert 'load("USER/REPO", weights="own.pth")' in (tmp_path / "a/hub/README.md").read_text()
    adapter.read(tmp_path / "a/hub", weights=str(tmp_path / "own.pth"))


def test_of_a_stopped_run_the_best_epoch_so_far_is_exported(cli: Commands, run: Path) -> None:
    shutil.copytree(run, "stopped")
    Path("stopped/summary.json").unlink()
    Path("stopped/adapter.safetensors").write_bytes(b"of an earlier epoch")
    done = cli(export, "checkpoint=stopped", "format=hub")
    assert done.code == 0, done.err
    assert "epoch 1, the best so far of a run that has not ended" in done.out
    assert "no scores" in done.out
    state = adapter.read("stopped/hub").segmenter.trainable_state()
    for name, value in adapter.read(run).segmenter.trainable_state().items():
        assert torch.equal(value, state[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("format=onx", "format=onx: there is none of that name; did you mean 'onnx'? there are adapter,"),
        ("format=sam", "format=sam: ConvLoRA cannot be merged into the weights of SAM; use format=onnx"),
        ("format=sam images=pictures", "images=pictures has no effect on format=sam; leave it out"),
        ("format=hub output=there", "output=there is there already; choose another output or remove it"),
        ("format=hub output=a.onnx", "output=a.onnx is to be a folder; write output=a"),
        ("format=hub output=there/file/hub", "output=there/file/hub cannot be made (Not a directory); "),
        ("format=torch images=nowhere", "nowhere is not a folder; name one that holds images"),
        ("format=torch images=pictures", "images=pictures holds no image; name a folder that does"),
        ("format=torch model.image_size=64", "model.image_size has no effect here"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_nothing(
    cli: Commands, run: Path, arguments: str, message: str
) -> None:
    Path("there").mkdir()
    Path("pictures").mkdir()
    Path("there/file").write_text("kept")
    before = sorted(run.iterdir())
    done = cli(export, f"checkpoint={run}", *arguments.split())
    assert done.code == 1
    assert done.err.startswith(f"error: {message}")
    assert len(done.err.splitlines()) == 1
    assert sorted(path.name for path in Path().iterdir()) == ["pictures", "there"]
    assert [path.name for path in Path("there").iterdir()] == ["file"]
    assert sorted(run.iterdir()) == before


def test_missing_packages_are_told_before_anything_is_made(
    cli: Commands, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    done = cli(export, f"checkpoint={run}", "format=onnx", "output=out")
    assert "onnxscript is missing; install it by pip install 'convlora[onnx]'" in done.err
    assert not Path("out").exists()


def test_a_form_that_is_further_off_than_rounding_is_refused(tmp_path: Path) -> None:
    loaded = adapter.read(plant(tmp_path, LORA, "SquareResize", ONE))
    trial, right = make_trial(loaded, None), loaded.segmenter
    with torch.no_grad():
        largest = right(trial.images).abs().max().item()
    assert largest < 10
    assert compare("torch", right, lambda x: right(x) + 5e-5, trial) == pytest.approx(5e-5, rel=0.1)
    for wrong in (2e-4, float("nan")):
        with pytest.raises(
            ValueError, match=r"format=torch differs from PyTorch by (2\.0e-04|nan) in the logits"
        ):
            compare("torch", right, lambda x, wrong=wrong: right(x) + wrong, trial)  # type: ignore[misc]


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("form", ["hub", "sam"])
def test_a_disk_that_fills_up_leaves_no_half_folder(cli: Commands, tmp_path: Path, form: str) -> None:
    path = plant(tmp_path / "a", LORA, "SquareResize", ONE)
    with small_disk(20_000):
        done = cli(export, f"checkpoint={path}", f"format={form}")
    assert re.search(r"error: the disk of \S+ is full \(.*\); free some, or choose another output", done.err)
    assert sorted(each.name for each in path.parent.iterdir()) == [adapter.NAME]
