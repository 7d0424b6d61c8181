"""A training that starts from what was trained on other images."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composed import compose
from conftest import SMALL, Commands, train_in
from PIL import Image
from processes import Training
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from convlora import adapter, train
from convlora.build import make_segmenter
from convlora.schema import make, resolve

JOB = (*SMALL, "logger=csv", "dataset.train_size=8", "dataset.val_size=2", "dataset.test_size=2")
STILL = ("optimizer.lr=0", "trainer.max_epochs=1")  # trains nothing, so that what it starts from is seen
OF_CLASSES = ("mask_decoder.mask_tokens", "mask_decoder.output_hypernetworks_mlps")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_in(tmp_path_factory.mktemp("trained"), *JOB, "trainer.max_epochs=1")


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    """A run that started from the first one, which is called so in its settings."""
    folder = tmp_path_factory.mktemp("started")
    shutil.copytree(trained, folder / "first")
    return train_in(folder, *JOB, *STILL, "seed=5", "init=first")


@pytest.fixture
def init(cli: Commands, trained: Path) -> Path:
    """A copy in the present folder."""
    return Path(shutil.copytree(trained, "first"))


@pytest.fixture
def second(cli: Commands, started: Path) -> Path:
    """A copy in the present folder."""
    return Path(shutil.copytree(started, "run"))


def tensors(run: str | Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(Path(run) / "adapter.safetensors")
    return found


def metadata(run: str | Path) -> dict[str, str]:
    with safe_open(Path(run) / "adapter.safetensors", "pt") as file:
        return dict(file.metadata())


def test_all_that_was_trained_is_taken_and_the_run_says_so(init: Path, second: Path) -> None:
    before, after = tensors(init), tensors(second)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    adapter.keep_threshold(init, 0.4, "dice")  # which makes no other adapter of it
    sha256 = adapter.open_file(init, None, None).identity
    config = json.loads(metadata(second)["config"])
    assert (config["init"], config["init_sha256"]) == ("first", sha256)
    record = (second / "config.yaml").read_text()
    assert "init: first\n" in record
    assert f"init_sha256: {sha256}\n" in record
    assert json.loads((second / "summary.json").read_text())["init_sha256"] == sha256


def plant_classes(root: Path) -> None:
    for split in ("train", "val", "test"):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for i in range(2):
            ids = np.arange(48 * 48).reshape(48, 48) // 800
            Image.fromarray((ids * 80).astype(np.uint8)).convert("RGB").save(root / f"{split}/images/{i}.png")
            Image.fromarray(ids.astype(np.uint8)).save(root / f"{split}/masks/{i}.png")


def test_other_classes_start_anew_and_all_else_does_not(cli: Commands, init: Path) -> None:
    plant_classes(Path("mine"))
    job = [each for each in JOB if not each.startswith("dataset.")]
    other = ("dataset=folder", "data_root=mine", "dataset.class_names=[a,b,c]", "model=sam_tiny",
             "loss=cross_entropy_dice", "metrics=multiclass")  # fmt: skip
    done = cli(train, *other, *job, *STILL, f"init={init}", "run_dir=second")
    assert done.code == 0, done.err
    before, after = tensors(init), tensors("second")
    anew = {name for name in after if name.startswith(OF_CLASSES)}
    assert len(anew) == 1 + 3 * 6  # tokens, and for each class an MLP of three layers
    tokens = after[f"{OF_CLASSES[0]}.weight"]
    assert (tokens == tokens[0]).all()  # SAM's token 0, as of a training that starts from nothing else
    assert (tokens[0] != before[f"{OF_CLASSES[0]}.weight"]).any()
    for layer in {name.split(".", 3)[3] for name in anew if name.startswith(OF_CLASSES[1])}:
        first = f"{OF_CLASSES[1]}.0.{layer}"
        assert not torch.equal(after[first], before[first])
    assert all(torch.equal(after[name], before[name]) for name in after.keys() - anew)
    assert f"{len(after) - len(anew)} of {len(after)} trained tensors" in done.out
    assert f"{OF_CLASSES[0]}, {OF_CLASSES[1]} start anew, since its classes are object" in " ".join(
        done.out.split()
    )


def test_a_run_goes_on_without_the_file_that_it_began_from(cli: Commands, second: Path) -> None:
    before, told = tensors(second), metadata(second)
    record, summary = ((second / name).read_text() for name in ("config.yaml", "summary.json"))
    (second / "adapter.safetensors").unlink()
    done = cli(train, f"resume={second}")
    assert done.code == 0, done.err
    assert "starts from     first\n" in done.out
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors(second).items())
    assert metadata(second) == told
    assert (second / "config.yaml").read_text() == record
    found, expected = json.loads((second / "summary.json").read_text()), json.loads(summary)
    assert {**found, "fit_seconds": 0} == {**expected, "fit_seconds": 0}


def test_a_run_of_another_start_is_not_taken_for_the_same(cli: Commands, init: Path, second: Path) -> None:
    shutil.copytree(init, "other")
    for changed, was in (("init=other", "first, is other"), ("init=null", "first, is None")):
        done = cli(train, f"resume={second}", changed)
        assert done.code == 1
        assert f"resume=run is another run with these settings: init was {was}" in done.err
    (second / "last.ckpt").unlink()  # as if no epoch had ended
    save_file({name: tensor + 1 for name, tensor in tensors(init).items()}, init / "adapter.safetensors",
              metadata(init))  # fmt: skip
    done = cli(train, f"resume={second}")
    assert done.code == 1
    assert "first/adapter.safetensors is another adapter than the run in run began with" in done.err
    assert "put that file back, or train anew in another run_dir" in done.err


def plant_adapter(path: Path, *overrides: str) -> None:
    """Save what a training with these settings starts as, of three classes."""
    composed = compose("train", *overrides)
    config = {name: resolve(composed[name]) for name in adapter.PACKAGES}
    parts = make("model", config["model"]), make("peft", config["peft"]), make("head", config["head"])
    segmenter, identity = make_segmenter(*parts, 3)
    described = adapter.describe(config, {name: [0, 0, 0] for name in "abc"}, identity, "32-true")
    adapter.save(path, segmenter.trainable_state(), described)


@pytest.mark.parametrize(
    ("was", "now", "anew"),
    [
        ("per_class", "query", "mask_tokens output_classifier output_hypernetworks_mlps"),
        ("query", "per_class", "mask_tokens output_hypernetworks_mlps"),
    ],
)
def test_what_belongs_to_another_head_starts_anew_though_its_shapes_fit(
    cli: Commands, was: str, now: str, anew: str
) -> None:
    """As many queries as classes: tokens have one shape, and both heads have a first MLP."""
    plant_classes(Path("mine"))
    other = ("dataset=folder", "data_root=mine", "dataset.class_names=[a,b,c]", "metrics=multiclass")
    job = (*other, "model=sam_tiny", *(each for each in JOB if not each.startswith("dataset.")))
    heads = {
        "per_class": ("head=per_class", "loss=cross_entropy_dice"),
        "query": ("head=query", "head.num_queries=3"),
    }
    plant_adapter(Path("first.safetensors"), *job, *heads[was])
    done = cli(train, *job, *heads[now], "dry_run=true", "init=first.safetensors")
    assert done.code == 0, done.err
    told = " ".join(done.out.split())
    assert f"{', '.join(f'mask_decoder.{part}' for part in anew.split())} start anew;" in told
    kinds = {"per_class": "PerClass", "query": "Query"}
    assert f"differing: head was {kinds[was]}, is {kinds[now]}" in told


def test_an_encoder_of_another_image_size_is_refused_by_it_where_it_was_trained_itself(
    cli: Commands,
) -> None:
    job = [each for each in JOB if "image_size" not in each]
    plant_adapter(Path("first.safetensors"), *job, "peft=full", "model.image_size=64")
    done = cli(train, *job, "peft=full", "model.image_size=32", "dry_run=true", "init=first.safetensors")
    assert done.code == 1
    assert "init=first.safetensors does not fit, " in done.err
    assert ": model.image_size was 64, is 32; set what it was, or train without init" in done.err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["peft=lora"], "peft was ConvLoRA, is LoRA; set what it was, or train without init"),
        (["peft.rank=4"], "peft.rank was 3, is 4"),
        (["peft.targets=[proj]"], "peft.targets was ['qkv'], is ['proj']"),
        (["model.embed_dim=32"], "is of another backbone: model.embed_dim was 16, is 32"),
        (["model=mobile_sam"], "is of another backbone: model was SamViT, is MobileSam"),
        (
            ["dataset=folder", "model=sam_tiny", "loading.channels=[3,2,1]"],
            "was trained with loading.channels=null; set that",
        ),
        (["init=nowhere"], "error: init=nowhere: no adapter at nowhere; a training run leaves one, name"),
        (
            ["init="],
            "error: init= names no adapter; set init=RUN, the folder of a training run, or leave it out",
        ),
        (
            ["model.image_size=128"],
            "is of other random weights, which follow from the size: model.image_size was",
        ),
        (["init=first/last.ckpt"], "is a checkpoint to go on from and no adapter"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_before_anything_is_read(
    cli: Commands, init: Path, settings: list[str], message: str
) -> None:
    group = settings[0].partition("=")[0]
    job = [each for each in JOB if not (group in ("model", "dataset") and each.startswith(f"{group}."))]
    done = cli(train, *job, "dry_run=true", f"init={init}", *settings)
    assert done.code == 1
    assert message in done.err, done.err


def test_settings_that_leave_the_tensors_fitting_are_told(cli: Commands, init: Path) -> None:
    done = cli(train, *JOB, "dry_run=true", f"init={init}", "peft.alpha=16", "peft.b_rate=4")
    assert done.code == 0, done.err
    count = len(tensors(init))
    assert f"starts from     {count} of {count} trained tensors from first/adapter.safetensors" in done.out
    told = " ".join(done.out.split()).partition("differing: ")[2]
    assert "peft.alpha was 32.0, is 16" in told
    assert "peft.b_rate was 1.0, is 4" in told


def test_other_base_weights_are_refused(cli: Commands, init: Path) -> None:
    other: dict[str, Any] = metadata(init) | {"base_sha256": "0" * 64}
    save_file(tensors(init), init / "adapter.safetensors", other)
    done = cli(train, *JOB, *STILL, f"init={init}", "run_dir=second")
    assert done.code == 1
    assert f"was trained on base_sha256 {'0' * 64}, but here it is" in done.err
    assert "or train without init" in done.err
    assert not Path("second").exists()


@pytest.mark.slow
def test_two_devices_start_from_it_alike(init: Path, tmp_path: Path) -> None:
    arguments = (*JOB, *STILL, f"init={init}", "trainer.devices=2", "run_dir=second")
    done = Training(tmp_path, arguments).ended()
    assert done.code == 0, done.err
    before, after = tensors(init), tensors("second")
    assert all(torch.equal(before[name], after[name]) for name in before)
