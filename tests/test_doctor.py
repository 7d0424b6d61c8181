"""What the doctor finds, and how much memory it says that a training takes."""

import re
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from composed import compose
from conftest import SMALL, Commands
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from torch import Tensor

from convlora import advice, doctor, memory, train
from convlora.build import Parts, make_parts
from convlora.memory import Footprint, Live, footprint
from convlora.peft import conv_experts
from convlora.schema import check_keys, resolve
from convlora.segmenter import Segmenter
from convlora.train import TrainConfig

CHECKPOINTING = "model.activation_checkpointing=true"


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


@pytest.fixture(scope="module")
def plain() -> tuple[Parts, Footprint]:
    """A training, and what it is said to take."""
    parts = parts_of("peft.gate.balance=0", "peft/gate=switch")
    return parts, footprint(parts, "cpu", "32-true")


def test_a_step_is_followed_as_it_happens(plain: tuple[Parts, Footprint]) -> None:
    """What is told of tensors without memory is what tensors with memory take, part by part."""
    parts, told = plain
    segmenter, loss = step_of(parts)
    tensors = [*segmenter.parameters(), *segmenter.buffers()]
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with Live((), tensors, Tensor) as live, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss().backward()
    assert told.weights == sum(t.nbytes for t in tensors)
    trained = [p for p in segmenter.parameters() if p.requires_grad]
    size = sum(p.nbytes for p in trained)
    assert told.gradients == size
    assert 2 * size <= told.optimizer < 2.1 * size
    _, peak = live.at_peak(without=[p.grad for p in trained if p.grad is not None])
    held = told.constants + told.held.sum()
    images = 13 * parts.backbone.image_size**2  # three floats a pixel and a mask, before the step there
    assert held == pytest.approx(peak + images, rel=0.02)
    known = {t.untyped_storage().data_ptr() for t in tensors}
    assert sum(size for address, size in kept.items() if address not in known) < held


def test_what_takes_less_is_said_to_take_less(plain: tuple[Parts, Footprint]) -> None:
    parts, told = plain
    thrifty = replace(parts, backbone=replace(parts.backbone, activation_checkpointing=True))
    assert footprint(thrifty, "cpu", "32-true").held.sum() < 0.9 * told.held.sum()
    assert footprint(parts, "cpu", "32-true", processes=2).gradients == 2 * told.gradients  # to be exchanged


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_only_what_grows_with_the_batch_is_multiplied_by_it(precision: str) -> None:
    """Weights cast to half precision, and gradients of all weights, are held once."""
    parts = parts_of("peft=full", CHECKPOINTING, f"trainer.precision={precision}")
    told = footprint(parts, "cpu", precision)
    segmenter, _ = step_of(parts)
    side = parts.backbone.image_size
    for batch in (1, 3):
        segmenter.zero_grad()
        images = torch.randn(batch, 3, side, side)
        masks = torch.ones(batch, 1, side, side, dtype=torch.uint8)
        with Live((), [*segmenter.parameters(), *segmenter.buffers(), images, masks], Tensor) as live:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
                total = parts.loss(segmenter.outputs(images), masks)
            total.backward()
        gradients = [p.grad for p in segmenter.parameters() if p.grad is not None]
        peak = live.at_peak(without=gradients)[1] + images.nbytes + masks.nbytes
        assert told.constants + batch * told.held.sum() == pytest.approx(peak, rel=0.1)


def test_a_training_after_an_estimate_has_real_constants() -> None:
    """What is made once and kept is made of numbers also where tensors have none."""
    parts = parts_of("model.image_size=80", "peft=multi_scale")
    footprint(parts, "cpu", "32-true")
    segmenter, loss = step_of(parts)
    for name, tensor in segmenter.named_parameters():  # which starts at 0, so that experts change nothing
        if name.endswith("lora_b.weight"):
            torch.nn.init.ones_(tensor)
    after = loss()
    conv_experts._read_off.cache_clear()
    assert loss().item() == after.item()


def test_the_largest_batch_is_the_last_that_fits(plain: tuple[Parts, Footprint]) -> None:
    _, needed = plain
    assert needed.largest_batch(needed.total(7)) == 7
    assert needed.largest_batch(needed.total(1) - 1) == needed.largest_batch(0) == 0
    assert replace(needed, loading=2 * needed.total(7)).total(7) == 2 * needed.total(7)


def test_gaps_are_left_by_small_tensors(plain: tuple[Parts, Footprint]) -> None:
    """Beyond a size memory is handed back, so that a greater batch can take less."""
    _, needed = plain
    size = memory.MAPPED // 4
    one = replace(needed, constants=0, held=np.array([size]), freed=np.array([size]), gaps=(1.0, 4.0, 0.5))
    assert [one.activations(batch) / size for batch in (1, 3, 4, 8)] == [2.25, 12.75, 6, 12]
    assert one.largest_batch(one.total(0) + 6 * size) == 4


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/slurm/job", "slurm", ("memory.max", "memory.current", "inactive_file")),
        (
            "5:memory:/job/step",
            "memory/job/step",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
def test_a_process_has_what_the_least_limit_leaves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, folder: str, names: tuple[str, ...]
) -> None:
    """Also that of a group around its own; files in memory, which are given up, do not count."""
    outside = advice.available("cpu")
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text(f"1:name=systemd:/\n{line}\n")
    group = tmp_path / "cgroups" / folder
    group.mkdir(parents=True)
    limit, usage, cache = names
    (group / limit).write_text(f"{2**20 + 5000}\n")
    (group / usage).write_text("9000\n")
    (group / "memory.stat").write_text(f"anon 5000\n{cache} 4000\n")
    monkeypatch.setattr(advice, "PROC", tmp_path)
    monkeypatch.setattr(advice, "CGROUPS", tmp_path / "cgroups")
    assert advice.left_by_limit(group) == 2**20
    assert advice.available("cpu") < min(outside, psutil.Process().memory_info().rss + 2**21)
    (group / limit).write_text("max\n")
    assert advice.left_by_limit(group) is None


def test_what_is_in_place_passes_and_what_is_missing_is_named(cli: Commands) -> None:
    done = cli(doctor, *SMALL)
    assert done.code == 0, done.err
    assert re.search(r"^versions +Python 3\.\d+\.\d+, convlora \S+, torch ", done.out)
    assert re.search(r"^W&B +offline, as WANDB_MODE says$", done.out, re.MULTILINE)
    assert re.search(r"^peak memory +\d\S* \wiB a device: program \S+ .iB, weights ", done.out, re.MULTILINE)
    assert re.search(r"^synthetic +10 train, 3 val, 5 test$", done.out, re.MULTILINE)
    assert "\nit can begin; " in done.out
    assert not list(Path().iterdir()), "it starts nothing"

    tiny = SMALL[:6]
    Path("old").mkdir()
    Path("old/config.yaml").touch()
    assert "old already holds a run; go on with it by resume=old" in cli(doctor, *SMALL, "run_dir=old").err
    done = cli(doctor, *tiny, "dataset=kvasir", "model.weights=none.pth", "loading.batch_size=1000000")
    assert done.code == 1
    errors = [line for line in done.out.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    assert re.search(r"^error: a step of 1000000 images needs about .* GiB are free; set \S+", errors[2])
    assert "no weights file at none.pth; set model.weights=PATH" in errors[0]
    assert "python -m convlora.prepare dataset=kvasir" in errors[1]

    assert "leave out -m" in cli(doctor, "-m", "seed=0,1").err


def test_what_does_not_fit_comes_with_settings_that_do() -> None:
    """The advice is tried."""
    config, parts = made("model.image_size=128", "loading.batch_size=6")
    whole = advice.footprint_of(config, parts)
    room = int(whole.total(0) + 0.5 * (whole.total(1) - whole.total(0)))
    settings = advice.advise(config, parts, room)
    assert all(each in settings for each in (CHECKPOINTING, "model.image_size=64"))
    advised, of_it = made("model.image_size=128", *settings.split())
    batch = advised.loading["batch_size"]
    assert advice.footprint_of(advised, of_it).total(batch) <= room
    assert batch < 6 == batch * advised.trainer["accumulate_grad_batches"]
    assert advice.advise(config, parts, 2**20) == ""


def test_a_training_that_runs_out_of_memory_ends_with_advice(cli: Commands) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    torch.ones(1, requires_grad=True).sum().backward()  # starts its threads, which need memory of their own
    limit = psutil.Process().memory_info().vms + 512 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        done = cli(
            train,
            *SMALL,
            "dataset.train_size=80",
            "model.image_size=256",
            "loading.batch_size=80",
            "logger=csv",
            "run_dir=run",
        )
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert done.code == 1
    assert "Traceback" not in done.err
    told = done.err.splitlines()[-1]
    assert told.startswith("error: memory ran out: a step of 80 images needs about ")
    assert "GiB are free, of which a limit or another program takes a part; set loading.batch_size=" in told
