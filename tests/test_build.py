import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from convlora.build import load_adapter, make, make_segmenter, save_adapter

MODEL = {
    "_target_": "convlora.sam.zoo.SamViT", "name": "tiny", "embed_dim": 16, "depth": 2, "num_heads": 2,
    "global_attn_indexes": [1], "image_size": 32, "patch_size": 4, "window_size": 4, "decoder_dim": 32,
    "decoder_mlp_dim": 32, "weights": None,
}  # fmt: skip
PEFT = {"_target_": "convlora.peft.conv_lora.ConvLoRA", "rank": 2, "num_experts": 3}
HEAD = {"_target_": "convlora.heads.PerClass"}
RESIZE = {"_target_": "convlora.data.transforms.SquareResize", "image_size": 32}
CONFIG = {"model": MODEL, "peft": PEFT, "head": HEAD, "resize": RESIZE, "trainer": {"precision": "32-true"}}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    segmenter, identity = make_segmenter(MODEL, PEFT, HEAD, num_classes=1)
    for value in segmenter.trainable_state().values():
        value.normal_(std=0.1)
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, segmenter, CONFIG, {"thing": [1, 2, 3]}, identity)
    return path


def rewrite(path: Path, **changes: str) -> None:
    """Change an adapter's metadata."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata={**metadata, **changes})


def test_adapter_restores_the_segmenter(adapter: Path) -> None:
    loaded = load_adapter(adapter)
    assert loaded.class_names == ["thing"]
    assert loaded.class_colors == [[1, 2, 3]]
    state = load_file(adapter)
    assert all(torch.equal(value, state[name]) for name, value in loaded.segmenter.trainable_state().items())
    assert not loaded.segmenter.training


def test_adapter_of_other_base_weights_is_refused(adapter: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    torch.save(make("model", MODEL).build().state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"trained on base_sha256 [0-9a-f]{64}, but here it is"):
        load_adapter(adapter, weights=str(tmp_path / "other.pth"))


def test_adapter_of_another_backbone_is_refused(adapter: Path) -> None:
    rewrite(adapter, config=json.dumps(CONFIG | {"model": {**MODEL, "name": "small"}}))
    with pytest.raises(ValueError, match=r"trained on base tiny, but here it is small"):
        load_adapter(adapter)


def test_adapter_of_another_rank_is_refused(adapter: Path) -> None:
    rewrite(adapter, config=json.dumps(CONFIG | {"peft": {**PEFT, "rank": 4}}))
    with pytest.raises(ValueError, match="another backbone, method, rank or number of classes"):
        load_adapter(adapter)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "convlora.build.load_adapter",
        "convlora.peft.method.replace_linears",
        "convlora.sam.zoo.torch.hub.load",
        "convlora.sam.zoo.torch.load",
        "convlora.sam.checkpoints.Path",
    ],
)
@pytest.mark.parametrize("section", ["model", "peft", "head", "resize"])
def test_adapter_cannot_ask_for_other_code(adapter: Path, section: str, target: str) -> None:
    rewrite(adapter, config=json.dumps(CONFIG | {section: {"_target_": target}}))
    with pytest.raises(ValueError, match=rf"asks for {target}, which is no {section} of this library"):
        load_adapter(adapter)


@pytest.mark.parametrize(
    "extra", [{"targets": [{"_target_": "os.system"}]}, {"_partial_": True}, {"_args_": [1]}]
)
def test_adapter_cannot_hide_calls_in_arguments(adapter: Path, extra: dict[str, object]) -> None:
    rewrite(adapter, config=json.dumps(CONFIG | {"peft": PEFT | extra}))
    with pytest.raises(ValueError, match="hides calls in its peft section"):
        load_adapter(adapter)


def test_adapter_cannot_choose_what_is_downloaded(adapter: Path) -> None:
    rewrite(adapter, config=json.dumps(CONFIG | {"model": {**MODEL, "url": "http://127.0.0.1:9/evil.pth"}}))
    with pytest.raises(ValueError, match=r"asks to download http://127.0.0.1:9/evil.pth"):
        load_adapter(adapter)


def test_truncated_adapter_is_refused(adapter: Path) -> None:
    adapter.write_bytes(adapter.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"no adapter file or is damaged .*; use RUN/adapter.safetensors"):
        load_adapter(adapter)


def test_lightning_checkpoint_is_no_adapter(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"use RUN/adapter.safetensors"):
        load_adapter(tmp_path / "last.ckpt")


def test_other_safetensors_are_no_adapter(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is no convlora-adapter-2 file"):
        load_adapter(tmp_path / "other.safetensors")


def test_missing_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no adapter at nowhere"):
        load_adapter("nowhere")


def test_unknown_key_names_its_section_and_the_nearest_key() -> None:
    with pytest.raises(
        ValueError, match=r"peft: unknown key 'ranks'; did you mean 'rank'\? it takes rank, alpha"
    ):
        make("peft", {**PEFT, "ranks": 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": "abc"}, r"^peft: convlora.peft.conv_lora.ConvLoRA: "),
        ({"_target_": "convlora.peft.nothing.Here"}, r"^peft: there is no convlora.peft.nothing.Here"),
    ],
)
def test_wrong_types_and_targets_name_their_section(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("peft", {**PEFT, **changes})


def test_what_a_target_raises_reaches_the_user_unwrapped() -> None:
    with pytest.raises(ValueError, match=r"^peft.rank=0 must be at least 1$"):
        make("peft", {**PEFT, "rank": 0})


@pytest.mark.parametrize(
    "path", sorted((ROOT / "conf").glob("*/**/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_every_config_file_is_short_and_explained(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("#"), "say what it is or where it comes from"
    assert len(text.splitlines()) <= 20
    if path.parent.name != "loading":  # which are merged into others
        assert yaml.safe_load(text).keys() & {"_target_", "defaults"}
