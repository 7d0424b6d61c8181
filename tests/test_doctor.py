"""What the doctor finds, and how much memory it says that a training takes."""

import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from composed import compose
from conftest import SMALL, Commands
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from torch import Tensor

from convlora import doctor, memory, train
from convlora.build import Parts, make_parts
from convlora.memory import Live, footprint
from convlora.schema import check_keys, resolve
from convlora.segmenter import Segmenter
from convlora.train import TrainConfig

CHECKPOINTING = "model.activation_checkpointing=true"
DEEP = ("model.depth=6", "model.image_size=128")


def made(*arguments: str) -> tuple[TrainConfig, Parts]:
    """A training's settings, and what is made of them."""
    config = compose("train", *SMALL, *arguments, return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    settings = resolve(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))
    checked = TrainConfig(**check_keys("", TrainConfig, settings))
    return checked, make_parts("train", checked)


def parts_of(*arguments: str) -> Parts:
    return made(*arguments)[1]


def step_of(parts: Parts) -> tuple[Segmenter, Any]:
    """A segmenter with memory, and a function that takes a step of one image."""
    segmenter = Segmenter(parts.backbone.build(), parts.method, parts.head).train()
    side = parts.backbone.image_size
    images, masks = torch.randn(1, 3, side, side), torch.ones(1, 1, side, side, dtype=torch.uint8)
    return segmenter, lambda: parts.loss(segmenter.outputs(images), masks)


def test_a_step_is_followed_as_it_happens() -> None:
    """What is told of tensors without memory is what tensors with memory take, part by part."""
    parts = parts_of("peft.gate.balance=0", "peft/gate=switch")
    told = footprint(parts, "cpu", "32-true")
    segmenter, loss = step_of(parts)
    tensors = [*segmenter.parameters(), *segmenter.buffers()]
    with Live(tensors) as live:
        loss().backward()
    assert told.weights == sum(t.nbytes for t in tensors)
    trained = sum(p.nbytes for p in segmenter.parameters() if p.requires_grad)
    assert told.gradients == trained
    assert 2 * trained <= told.optimizer < 2.1 * trained
    held = told.per_image / (1 + memory.HEAP["cpu"])
    images = 13 * parts.backbone.image_size**2  # made in the step there: three floats a pixel, and its mask
    assert live.peak + images <= held < 1.2 * (live.peak + images)  # constants count, too
    assert footprint(parts, "cpu", "32-true", 2).gradients == 2 * trained


def test_what_is_kept_for_the_backward_pass_counts() -> None:
    parts = parts_of()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    segmenter, loss = step_of(parts)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = loss()
    del total
    known = {t.untyped_storage().data_ptr() for t in (*segmenter.parameters(), *segmenter.buffers())}
    size = sum(size for address, size in kept.items() if address not in known)
    told = footprint(parts, "cpu", "32-true").per_image / (1 + memory.HEAP["cpu"])
    assert size < told < 2 * size


def test_checkpointing_and_half_precision_take_less() -> None:
    plain, thrifty = (footprint(parts_of(*DEEP, *each), "cpu", "32-true") for each in ((), (CHECKPOINTING,)))
    assert thrifty.per_image < 0.8 * plain.per_image
    assert (thrifty.weights, thrifty.optimizer) == (plain.weights, plain.optimizer)
    half = footprint(parts_of(*DEEP), "cpu", "bf16-mixed")
    assert half.per_image < 0.8 * plain.per_image


def test_a_training_after_an_estimate_has_real_constants() -> None:
    """What is made once and kept is made of numbers also where tensors have none."""
    parts = parts_of("model.image_size=80")
    footprint(parts, "cpu", "32-true")
    _, loss = step_of(parts)
    total = loss()
    assert type(total) is Tensor
    assert torch.isfinite(total)


def test_the_largest_batch_is_the_last_that_fits() -> None:
    needed = footprint(parts_of(), "cpu", "32-true")
    room = needed.total(7) + 1
    assert needed.largest_batch(room) == 7
    assert needed.total(7) <= room < needed.total(8)
    assert needed.largest_batch(needed.total_but_images) == 0
    assert needed.largest_batch(0) == 0


@pytest.fixture
def container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Sets how many bytes a container has left."""

    def leave(free: int) -> None:
        (tmp_path / "memory.max").write_text(f"{free + 1000}\n")
        (tmp_path / "memory.current").write_text("1000\n")

    monkeypatch.setattr(memory, "CONTAINER", tmp_path)
    return leave


def test_a_container_has_what_its_limit_leaves(container: Any) -> None:
    outside = memory.available("cpu")
    container(2**20)
    own = psutil.Process().memory_info().rss
    assert memory.available("cpu") == pytest.approx(own + 2**20, rel=0.05)
    assert memory.available("cpu") < outside
    (memory.CONTAINER / "memory.max").write_text("max\n")
    assert memory.available("cpu") == pytest.approx(outside, rel=0.2)


def test_what_is_in_place_passes_and_what_is_missing_is_named(cli: Commands) -> None:
    done = cli(doctor, *SMALL)
    assert done.code == 0, done.err
    assert re.search(r"^versions +Python 3\.\d+\.\d+, convlora \S+, torch ", done.out)
    assert re.search(r"^W&B +offline$|^W&B +not logged in", done.out, re.MULTILINE)
    assert re.search(r"^peak memory +\d\S* \wiB a device: program \S+ .iB, weights ", done.out, re.MULTILINE)
    assert re.search(r"^synthetic +10 train, 3 val, 5 test$", done.out, re.MULTILINE)
    assert done.out.endswith("nothing is missing, and it fits\n")
    assert not list(Path().iterdir()), "it starts nothing"

    tiny = SMALL[:6]
    done = cli(doctor, *tiny, "dataset=kvasir", "model.weights=none.pth", "trainer.max_epochs=1")
    assert done.code == 1
    errors = [line for line in done.out.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert "no weights file at none.pth; set model.weights=PATH" in errors[0]
    assert "python -m convlora.prepare dataset=kvasir" in errors[1]

    done = cli(doctor, *SMALL, "loading.batch_size=1000000")
    assert done.code == 1
    assert re.search("^error: a step of 1000000 images needs about .*; set ", done.out, re.MULTILINE)
    assert "leave out -m" in cli(doctor, "-m", "seed=0,1").out


@pytest.mark.parametrize("images", [12.0, 2.0, 0.5])
def test_what_does_not_fit_comes_with_settings_that_do(images: float) -> None:
    """The advice is tried, in memory for so many images of a training with checkpointing."""
    config, parts = made(*DEEP, "loading.batch_size=12")
    thrifty = footprint(made(*DEEP, CHECKPOINTING)[1], "cpu", "32-true")
    room = int(thrifty.total_but_images + images * thrifty.per_image)
    assert memory.footprint_of(config, parts).total(12) > room
    advice = memory.advise(config, parts, room)
    config, parts = made(*DEEP, "loading.batch_size=12", *advice.split())
    batch, parts_of_it = config.loading["batch_size"], config.trainer["accumulate_grad_batches"]
    assert memory.footprint_of(config, parts).total(batch) <= room
    assert batch * parts_of_it == 12
    assert parts_of_it == {12.0: 1, 2.0: 12, 0.5: 12}[images]
    assert parts.backbone.activation_checkpointing == (images != 2)
    assert parts.backbone.image_size == (64 if images < 1 else 128)


def test_nothing_is_advised_where_nothing_fits() -> None:
    config, parts = made()
    assert memory.advise(config, parts, 2**20) == ""


def test_a_training_that_runs_out_of_memory_ends_with_advice(cli: Commands) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = psutil.Process().memory_info().vms + 64 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        done = cli(
            train, *SMALL, "model.image_size=256", "loading.batch_size=10", "logger=csv", "run_dir=run"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert done.code == 1
    assert "Traceback" not in done.err
    told = done.err.splitlines()[-1]
    assert told.startswith("error: memory ran out: a step of 10 images needs about ")
    assert told.endswith("GiB are free; set model.activation_checkpointing=true")
