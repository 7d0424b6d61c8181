from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT

from convlora.build import check_trained_dtype, say_precision
from convlora.peft.dora import DoRA
from convlora.peft.method import Method
from convlora.peft.selective import BitFit, Full, NormTuning
from convlora.peft.ssf import SSF
from convlora.sam.zoo import SamViT, load_backbone
from convlora.schema import make
from convlora.segmenter import Segmenter

GATE = {"_target_": "convlora.peft.gating.NoisyTopK", "top_k": 2}
PEFT = {"_target_": "convlora.peft.conv_lora.ConvLoRA", "rank": 2, "num_experts": 3, "gate": GATE}


def test_unknown_key_names_its_section_and_the_nearest_key() -> None:
    with pytest.raises(
        ValueError, match=r"peft: unknown key 'ranks'; did you mean 'rank'\? it takes targets, blocks, rank"
    ):
        make("peft", {**PEFT, "ranks": 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": "abc"}, r"^peft.rank=abc is not possible: input should be a valid integer"),
        ({"interpolation": "nearest"}, r"^peft.interpolation=nearest is not possible: .*'bicubic' or 'bili"),
        ({"rank": "3"}, r"^peft.rank='3' is not possible: it is read as 3; write peft.rank=3$"),
        ({"rank": 3.0}, r"^peft.rank=3.0 is not possible: it is read as 3; write peft.rank=3$"),
        ({"targets": 5}, r"^peft.targets=5 is not possible: "),
        ({"targets": "qkv"}, r"^peft.targets=qkv is not possible: .*; write peft.targets=\[qkv\]"),
        ({"blocks": "all"}, r"^peft.blocks=all is not possible: .*; write peft.blocks=\[all\]"),
        ({"_target_": "convlora.peft.nothing.Here"}, r"^peft: there is no convlora.peft.nothing.Here"),
    ],
)
def test_wrong_types_and_targets_name_their_section(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("peft", {**PEFT, **changes})


@pytest.mark.parametrize(
    ("key", "value"), [("frozen_dtype", "int8"), ("activation_checkpointing", "maybe"), ("image_size", 3.5)]
)
def test_a_backbones_settings_have_types(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^model.{key}={value} is not possible: input should be "):
        make("model", {"_target_": "convlora.sam.zoo.MobileSam", "name": "mobile_sam", key: value})


@pytest.mark.parametrize("method", [BitFit(), Full()])
def test_methods_that_train_what_is_held_in_half_precision_are_refused(method: Method, tiny: SamViT) -> None:
    sam, _ = load_backbone(replace(tiny, frozen_dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"^model.frozen_dtype=bfloat16 .*first image_encoder.patch_embed"):
        check_trained_dtype(Segmenter(sam, method), "bfloat16", "X")


@pytest.mark.parametrize("method", [NormTuning(), DoRA(), SSF()])
def test_methods_that_train_beside_it_are_not(method: Method, tiny: SamViT) -> None:
    sam, _ = load_backbone(replace(tiny, frozen_dtype="bfloat16"))
    check_trained_dtype(Segmenter(sam, method), "bfloat16", "X")


def test_what_a_target_raises_reaches_the_user_unwrapped() -> None:
    with pytest.raises(ValueError, match=r"^peft.rank=0 must be at least 1$"):
        make("peft", {**PEFT, "rank": 0})
    with pytest.raises(ValueError, match=r"^peft.gate.top_k=0 must be at least 1$"):
        make("peft", {**PEFT, "gate": GATE | {"top_k": 0}})


@pytest.mark.parametrize(
    "path", sorted((ROOT / "conf").glob("*/**/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_every_config_file_is_short_and_explained(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("#"), "say what it is or where it comes from"
    assert len(text.splitlines()) <= 20
    if "@package _global_" not in text and path.parent.name != "callbacks":
        assert yaml.safe_load(text).keys() & {"_target_", "defaults"}


@pytest.mark.parametrize(
    ("supported", "device", "precision", "is_said"),
    [
        (False, "cpu", "bf16-mixed", True),
        (False, "cpu", "32-true", False),
        (False, "cuda", "bf16-mixed", False),
        (True, "cpu", "bf16-mixed", False),
        (None, "cpu", "bf16-mixed", False),  # of a build that cannot tell
    ],
)
def test_a_cpu_without_half_precision_instructions_is_told(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    supported: bool | None,
    device: str,
    precision: str,
    is_said: bool,
) -> None:
    told = {} if supported is None else {"_is_mkldnn_bf16_supported": lambda: supported}
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**told))
    say_precision(precision, precision, torch.device(device))
    assert ("32-true is the fast one here" in caplog.text) == is_said
