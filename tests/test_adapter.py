import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from convlora import adapter
from convlora.build import make_segmenter
from convlora.schema import make

MODEL = {
    "_target_": "convlora.sam.zoo.SamViT", "name": "tiny", "embed_dim": 16, "depth": 2, "num_heads": 2,
    "global_attn_indexes": [1], "image_size": 32, "patch_size": 4, "window_size": 4, "decoder_dim": 32,
    "decoder_mlp_dim": 32, "weights": None,
}  # fmt: skip
GATE = {"_target_": "convlora.peft.gating.NoisyTopK", "top_k": 2}
PEFT = {"_target_": "convlora.peft.conv_lora.ConvLoRA", "rank": 2, "num_experts": 3, "gate": GATE}
RESIZE = {"_target_": "convlora.data.transforms.SquareResize", "image_size": 32}
HEAD = {"_target_": "convlora.heads.PerClass"}
CONFIG = {"model": MODEL, "peft": PEFT, "head": HEAD, "resize": RESIZE}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    segmenter, identity = make_segmenter(make("model", MODEL), make("peft", PEFT), make("head", HEAD), 1)
    for value in segmenter.trainable_state().values():
        value.normal_(std=0.1)
    metadata = adapter.describe(CONFIG, {"thing": [1, 2, 3]}, identity, "32-true", median_side=40)
    adapter.save(tmp_path / "adapter.safetensors", segmenter.trainable_state(), metadata)
    return tmp_path / "adapter.safetensors"


def rewrite(path: Path, **changes: str) -> None:
    """Change an adapter's metadata."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata={**metadata, **changes})


def test_adapter_restores_the_segmenter(path: Path) -> None:
    loaded = adapter.read(path)
    assert loaded.class_colors == {"thing": [1, 2, 3]}
    assert loaded.metadata["median_side"] == "40"
    state = load_file(path)
    assert all(torch.equal(value, state[name]) for name, value in loaded.segmenter.trainable_state().items())
    assert not loaded.segmenter.training


def test_an_adapter_is_its_tensors_and_metadata_without_a_kept_threshold(path: Path) -> None:
    def identity() -> str:
        return adapter.open_file(path, None, None).identity

    first = identity()
    for threshold in (0.3, 0.5):
        adapter.keep_threshold(path, threshold, "dice")
        assert adapter.read(path).metadata["threshold"] == str(threshold)
        assert identity() == first
    rewrite(path, median_side="41")
    assert identity() != first
    rewrite(path, median_side="40")
    assert identity() == first
    state = load_file(path)
    state[min(state)].view(-1)[0] += 1
    with safe_open(path, "pt") as file:
        save_file(state, path, metadata=file.metadata())
    assert identity() != first


def test_adapter_of_other_base_weights_is_refused(path: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    torch.save(make("model", MODEL).build().state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"trained on base_sha256 [0-9a-f]{64}, but here it is"):
        adapter.read(path, weights=str(tmp_path / "other.pth"))


def test_adapter_of_another_backbone_is_refused(path: Path) -> None:
    rewrite(path, config=json.dumps(CONFIG | {"model": {**MODEL, "name": "small"}}))
    with pytest.raises(ValueError, match=r"trained on base tiny, but here it is small"):
        adapter.read(path)


def test_adapter_of_another_rank_is_refused(path: Path) -> None:
    rewrite(path, config=json.dumps(CONFIG | {"peft": {**PEFT, "rank": 4}}))
    with pytest.raises(ValueError, match="another backbone, method, rank or number of classes"):
        adapter.read(path)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "convlora.adapter.read",
        "convlora.peft.method.aux_loss",
        "convlora.sam.zoo.torch.hub.load",
        "convlora.sam.zoo.torch.load",
        "convlora.sam.checkpoints.Path",
    ],
)
@pytest.mark.parametrize("section", ["model", "peft", "head", "resize"])
def test_adapter_cannot_ask_for_other_code(path: Path, section: str, target: str) -> None:
    rewrite(path, config=json.dumps(CONFIG | {section: {"_target_": target}}))
    with pytest.raises(ValueError, match=rf"asks for {target}, which is no {section} of this library"):
        adapter.read(path)


def test_adapter_of_a_newer_version_says_so(path: Path) -> None:
    rewrite(path, config=json.dumps(CONFIG | {"peft": {"_target_": "convlora.peft.later.Method"}}))
    with pytest.raises(ValueError, match=r"needs convlora.peft.later.Method, which this version lacks"):
        adapter.read(path)


def test_adapter_cannot_ask_for_other_code_as_a_part(path: Path) -> None:
    gate = GATE | {"top_k": {"_target_": "os.system"}}
    rewrite(path, config=json.dumps(CONFIG | {"peft": {**PEFT, "gate": gate}}))
    with pytest.raises(ValueError, match=r"asks for os.system, which is no peft of this library"):
        adapter.read(path)


@pytest.mark.parametrize(
    "extra", [{"targets": [{"_target_": "os.system"}]}, {"_partial_": True}, {"_args_": [1]}]
)
def test_adapter_cannot_hide_calls_in_arguments(path: Path, extra: dict[str, object]) -> None:
    rewrite(path, config=json.dumps(CONFIG | {"peft": PEFT | extra}))
    with pytest.raises(ValueError, match="hides calls in its peft section"):
        adapter.read(path)


def test_adapter_cannot_choose_what_is_downloaded(path: Path) -> None:
    rewrite(path, config=json.dumps(CONFIG | {"model": {**MODEL, "url": "http://127.0.0.1:9/evil.pth"}}))
    with pytest.raises(ValueError, match=r"asks to download http://127.0.0.1:9/evil.pth"):
        adapter.read(path)


def test_truncated_adapter_is_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"no adapter file or is damaged .*; use RUN/adapter.safetensors"):
        adapter.read(path)


def test_lightning_checkpoint_is_no_adapter(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "last.ckpt")
    with pytest.raises(
        ValueError, match=rf"no adapter; `python -m convlora.export checkpoint={tmp_path}` makes"
    ):
        adapter.read(tmp_path / "last.ckpt")


def test_other_safetensors_are_no_adapter(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is no convlora-adapter-3 file"):
        adapter.read(tmp_path / "other.safetensors")


def test_missing_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no adapter at nowhere"):
        adapter.read("nowhere")
