"""Look whether a training can run here: `python -m convlora.doctor dataset=kvasir model=sam_vit_b`."""

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from convlora import advice, run
from convlora.announce import console, print_lines
from convlora.build import Parts, has_fast_bf16, make_parts, missing_devices
from convlora.cli import command
from convlora.data.module import Split
from convlora.tracking import wandb_mode
from convlora.train import TrainConfig, find_origin, replay, settle

PACKAGES = ("convlora", "torch", "torchvision", "lightning", "segment-anything", "hydra-core", "wandb")
MODES = {
    "online": "logged in, runs are sent as they go",
    "offline": "not logged in, runs stay in their folders; `wandb login` sends later ones",
}


def doctor(config: TrainConfig) -> None:
    """Print what a training with these settings finds here, and whether it fits; it trains nothing.

    Raises:
        SystemExit: with code 1 where something is missing or does not fit.
        ValueError: no training has such settings.
    """
    config = settle(config)
    if config.resume is None:
        run.check_unused(Path(config.run_dir))
    parts = make_parts("train", config)
    find_origin(config, parts)
    folder = next(each for each in Path(config.run_dir).absolute().parents if each.is_dir())
    told = os.environ.get("WANDB_MODE")
    print_lines(
        {
            "versions": ", ".join(
                [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)]
            ),
            "device": describe(advice.device_of(config)),
            "precision": str(config.trainer["precision"]),
            "disk": f"{advice.spell(shutil.disk_usage(folder).free)} free for {config.run_dir}",
            "W&B": f"{told}, as WANDB_MODE says" if told else MODES[wandb_mode()],
        }
    )
    problems = check_files(parts)
    try:
        run.check_room(folder, run.count(parts.outline, trainable=True))
    except OSError as error:
        problems.append(str(error))
    if shortage := missing_devices(config.trainer):
        problems.append(shortage)
    tell(problems)
    if not shortage:  # of devices that are not here nothing is known
        too_little = check_memory(config, parts)
        tell(too_little)
        problems += too_little
    if problems:
        raise SystemExit(1)
    console.print(
        "it can begin; loader processes, loading.cache=ram and tests of huge images take more memory"
    )


def tell(problems: Sequence[str]) -> None:
    """Print what is in the way of a training."""
    for problem in problems:
        console.print(f"error: {problem}")


def describe(device: str) -> str:
    """Return what the device is, and what it computes fast."""
    if device == "cuda":
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}"
    slow = "" if has_fast_bf16() else ", without instructions for bf16: there 32-true is the fast precision"
    return f"CPU, {torch.get_num_threads()} threads{slow}"


def check_files(parts: Parts) -> list[str]:
    """Print which images and weights are there; returns what is missing, with the way to get it."""
    backbone, problems = parts.backbone, list[str]()
    try:
        backbone.check_weights()
    except FileNotFoundError as error:
        problems.append(str(error))
    lines = {"model": f"{backbone.name} at {backbone.image_size} px, {backbone.weights_source()}"}
    for data in parts.tests:
        splits: tuple[Split, ...] = data.splits if data is parts.data else ("test",)
        try:
            lines[data.name] = ", ".join(f"{len(data.listed(split)):,} {split}" for split in splits)
        except (OSError, ValueError) as error:
            lines[data.name] = "not there"
            problems.append(str(error))
    if parts.data.loading.channels is not None and lines[parts.data.name] != "not there":
        try:
            lines["bands"] = str(parts.data.measure_bands())
        except (OSError, ValueError) as error:
            problems.append(str(error))
    print_lines(lines)
    return problems


def check_memory(config: TrainConfig, parts: Parts) -> list[str]:
    """Print what a training takes at its peak, part by part; returns what to set where that is too much."""
    console.print("following a step of one image, which takes a while ...")
    room, batch = advice.room_of(config), config.loading["batch_size"]
    needed = advice.footprint_of(config, parts)
    shares = {
        "program": needed.program,
        "weights": needed.weights,
        "gradients": needed.gradients,
        "optimiser": needed.optimizer,
        f"activations of {batch} image{'s' * (batch > 1)}": needed.activations(batch),
    }
    if needed.total(batch) == needed.loading:
        shares = {"while the weights are loaded": needed.loading}
    parted = ", ".join(f"{name} {advice.spell(size)}" for name, size in shares.items())
    print_lines(
        {
            "peak memory": f"{advice.spell(needed.total(batch))} a device: {parted}",
            "free memory": f"{advice.spell(room)} a device, enough for a batch of "
            f"{needed.largest_batch(room):,} images",
        }
    )
    return [] if needed.total(batch) <= room else [advice.shortage(config, parts)]


def main() -> None:
    """Look at the training that the command line describes."""
    if {"-m", "--multirun"} & set(sys.argv[1:]):
        sys.exit("error: doctor looks at one training at a time; leave out -m")
    command("train", TrainConfig, doctor, replay=replay)()


if __name__ == "__main__":
    main()
