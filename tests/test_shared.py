"""Several predictors on one backbone: read once, held once, none disturbs another."""

import gc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composed import compose, names
from conftest import TINY
from torch import Tensor, nn

from convlora import adapter
from convlora.adapter import LoadedPredictor, load
from convlora.build import make_segmenter
from convlora.inference import Predictor
from convlora.schema import Config, make, resolve

VIT: Config = {
    "_target_": "convlora.sam.zoo.SamViT", "name": "tiny", "embed_dim": 16, "depth": 2, "num_heads": 2,
    "global_attn_indexes": [1], "image_size": 32, "patch_size": 4, "window_size": 4, "decoder_dim": 32,
    "decoder_mlp_dim": 32, "weights": "base.pth",
}  # fmt: skip
MOBILE: Config = {
    "_target_": "convlora.sam.zoo.MobileSam",
    "name": "mobile",
    "image_size": 64,
    "weights": None,
}
HEAD = {"_target_": "convlora.heads.PerClass"}
IMAGE = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)

Save = Callable[..., str]


@cache
def method(name: str) -> Config:
    return resolve(compose(f"peft/{name}").peft)


@pytest.fixture
def save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Save:
    """Makes an adapter of random numbers in the present folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    torch.save(TINY.build().state_dict(), "base.pth")

    def save(file: str, peft: str, model: Config = VIT, classes: int = 1, **changes: Any) -> str:
        config = {"model": model | changes, "peft": method(peft), "head": HEAD}
        config["resize"] = {
            "_target_": "convlora.data.transforms.SquareResize",
            "image_size": config["model"]["image_size"],
        }
        parts = (make(section, config[section]) for section in ("model", "peft", "head"))
        segmenter, identity = make_segmenter(*parts, classes)
        generator = torch.Generator().manual_seed(ord(file[-1]))
        for tensor in segmenter.trainable_state().values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.05)
        colors = {str(index): [index, 0, 0] for index in range(classes)}
        metadata = adapter.describe(config, colors, identity, "32-true")
        adapter.save(Path(f"{file}.safetensors"), segmenter.trainable_state(), metadata)
        return f"{file}.safetensors"

    return save


def probs(predictor: Predictor) -> Tensor:
    """Logits of an image."""
    pixels = predictor.prepare(IMAGE)
    with torch.inference_mode():
        logits: Tensor = predictor.segmenter(pixels[None])
    return logits


def near(one: Tensor, other: Tensor) -> bool:
    """Whether logits are the same to rounding, which on some CPUs depends on where in memory they lie."""
    return torch.allclose(one, other, atol=1e-5, rtol=0)


def alone(path: str) -> Tensor:
    """Logits of an adapter that shares nothing."""
    read = adapter.read(path)
    return probs(Predictor(read.segmenter, read.resize, read.class_colors, torch.inference_mode))


def frozen(predictor: Predictor) -> dict[str, Tensor]:
    """The tensors of the image encoder that were not trained, by what they hold."""
    encoder: nn.Module = predictor.segmenter.image_encoder
    tensors = [p for p in encoder.parameters() if not p.requires_grad]
    tensors += [buffer for buffer in encoder.buffers() if buffer.numel() > 1]
    return {str(hash(tensor.detach().numpy().tobytes())): tensor for tensor in tensors}


def base_state(predictor: LoadedPredictor) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in predictor.base.take().state_dict().items()}


@pytest.mark.parametrize("how", ["with_adapter", "load"])
@pytest.mark.parametrize(("one", "other"), [("lora", "conv_lora"), ("full", "lora"), ("bitfit", "full")])
def test_a_second_predictor_shares_what_is_frozen_and_leaves_the_first_as_it_was(
    save: Save, how: str, one: str, other: str
) -> None:
    paths = save("one", one), save("two", other, classes=3)
    expected = alone(paths[0]), alone(paths[1])
    first = load(paths[0], device="cpu")
    before, base = probs(first), base_state(first)
    Path("base.pth").unlink()
    second = first.with_adapter(paths[1]) if how == "with_adapter" else load(paths[1], device="cpu")
    assert near(probs(second), expected[1])
    assert near(before, expected[0])
    assert near(probs(first), before)
    assert second.base is first.base
    assert all(torch.equal(tensor, base[name]) for name, tensor in base_state(first).items())
    here, there = frozen(first), frozen(second)
    common = here.keys() & there.keys()
    assert all(here[key].data_ptr() == there[key].data_ptr() for key in common)
    if "full" not in (one, other):
        assert {len(here[key]) for key in common} > {48}, "of the matrices above all"
    trained = [p for each in (first, second) for p in each.segmenter.trainable_state().values()]
    assert len({p.data_ptr() for p in trained}) == len(trained), "nothing that was trained is shared"
    held = {p.data_ptr() for p in first.base.take().parameters()}
    assert not held & {p.data_ptr() for p in trained}


@pytest.mark.parametrize(("peft", "kind"), [*((name, "vit") for name in names("peft")), ("full", "mobile")])
def test_every_method_computes_on_a_shared_backbone_what_it_does_alone(
    save: Save, peft: str, kind: str
) -> None:
    path = save("one", peft, VIT if kind == "vit" else MOBILE)
    first = load(path, device="cpu")
    base = base_state(first)
    second = first.with_adapter(path)
    expected = alone(path)
    assert near(probs(first), expected)
    assert near(probs(second), expected)
    second.segmenter.requires_grad_(False)
    assert near(probs(second), expected), "tables made of trained tensors are those of this adapter"
    assert all(torch.equal(tensor, base[name]) for name, tensor in base_state(first).items())


def test_a_backbone_is_read_once_while_any_predictor_holds_it(save: Save) -> None:
    path = save("one", "lora")
    first = load(path, device="cpu")
    torch.manual_seed(4)
    torch.save(TINY.build().state_dict(), "base.pth")
    second = load(path, device="cpu")
    assert near(probs(first), probs(second))
    assert load(path, "base.pth", device="cpu").base is first.base
    del first
    gc.collect()
    third = load(path, device="cpu")
    assert third.base is second.base
    del second, third
    gc.collect()
    with pytest.raises(ValueError, match=r"trained on base_sha256 [0-9a-f]{64}, but here it is"):
        load(path, device="cpu")


def test_other_weights_are_refused_also_where_the_right_ones_are_in_use(save: Save) -> None:
    path = save("one", "lora")
    first = load(path, device="cpu")
    torch.manual_seed(4)
    torch.save(TINY.build().state_dict(), "other.pth")
    with pytest.raises(ValueError, match=r"trained on base_sha256 .* set model.weights=PATH"):
        load(path, "other.pth", device="cpu")
    with pytest.raises(FileNotFoundError, match=r"no weights file at nowhere\.pth"):
        load(path, "nowhere.pth", device="cpu")
    Path("copy.pth").write_bytes(Path("base.pth").read_bytes())
    assert load(path, "copy.pth", device="cpu").base is first.base


@pytest.mark.parametrize(
    ("changes", "precision", "message"),
    [
        ({"weights": None}, None, "trained on base_sha256 .*, but here it is"),
        ({"name": "small"}, None, "trained on base small, but here it is tiny"),
        ({"image_size": 64}, None, r"needs model\.image_size=64 and not 32"),
        ({"frozen_dtype": "bfloat16"}, "bf16-mixed", r"needs model\.frozen_dtype=bfloat16 and not float32"),
        ({"decoder_eps": 1e-6}, None, r"needs model\.decoder_eps=1e-06 and not 1e-05"),
    ],
)
def test_an_adapter_of_another_backbone_is_refused_by_name(
    save: Save, changes: Config, precision: str | None, message: str
) -> None:
    first = load(save("one", "lora"), device="cpu")
    before = probs(first)
    other = save("two", "lora", **changes)
    with pytest.raises(
        ValueError, match=rf"adapter two\.safetensors .*{message}.*load\('two\.safetensors'\)"
    ):
        first.with_adapter(other, precision)
    assert near(probs(first), before)
    second = load(other, precision=precision, device="cpu")
    assert second.base is not first.base
    assert np.isfinite(probs(second) if precision is None else 0).all()


def test_several_images_are_segmented_in_batches(save: Save) -> None:
    predictor = load(save("one", "conv_lora", classes=3), device="cpu")
    sizes: list[int] = []
    predictor.segmenter.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 255, (20 + i, 30 - i, 3), np.uint8) for i in range(5)]
    singly = [predictor.predict(image) for image in images]
    assert sizes == [1] * 5
    sizes.clear()
    found = predictor.predict(images, batch_size=2)
    assert sizes == [2, 2, 1]
    for one, other, image in zip(found, singly, images, strict=True):
        assert one.classes.shape == image.shape[:2]
        assert np.abs(one.prob.astype(int) - other.prob).max() <= 1
    stacked = np.stack([IMAGE, 255 - IMAGE])
    pair = predictor.predict(stacked)
    assert isinstance(pair, list)
    for one, image in zip(pair, stacked, strict=True):
        assert np.abs(one.prob.astype(int) - predictor.predict(image).prob).max() <= 1
    assert predictor.predict([]) == []
    assert len(predictor.predict((IMAGE,))) == 1
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        predictor.predict(images, batch_size=0)
    with pytest.raises(ValueError, match=r"the image is float64 \[20, 30, 3\]"):
        predictor.predict([images[0] / 255])
