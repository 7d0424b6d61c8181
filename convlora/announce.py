"""What a training says of itself before anything takes time."""

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from rich.console import Console

from convlora.build import Parts, missing_devices
from convlora.data.module import SegmentationDataModule, Split
from convlora.losses import balanced
from convlora.run import count
from convlora.schema import Config

COLUMNS, LABEL = 100, 16  # of a terminal, and of what stands before each line
console = Console(highlight=False, soft_wrap=True, markup=False)


def announce(
    config: Any, parts: Parts, folder: Path, trainer: Trainer | None, origin: str | None = None
) -> None:
    """Print what is about to be trained, as far as it is known.

    Args:
        config: attributes by the names of the groups in conf/.
        parts: what is made of it.
        folder: of the run.
        trainer: that trains; None for a dry run, which needs neither data nor weights nor devices.
        origin: what it starts from, beside the pretrained weights.
    """
    if trainer is not None and not trainer.is_global_zero:
        return
    data, backbone, best = parts.data, parts.backbone, parts.callbacks["best"]
    devices, accumulation = count_devices(config.trainer, trainer), config.trainer["accumulate_grad_batches"]
    size, weights = config.loading["batch_size"], count(parts.outline, trainable=True)
    shortage = missing_devices(config.trainer) if trainer is None else None
    lines = {
        "data": describe_images(data, *data.splits),
        "also tested on": "; ".join(describe_images(test, "test") for test in parts.tests[1:]),
        "bands": describe_bands(data),
        "model": f"{backbone.name} at {backbone.image_size} px, {backbone.weights_source()}",
        "windows": backbone.padding_advice(),
        "parameters": f"{weights:,} trainable of {count(parts.outline):,}",
        "starts from": origin,
        "method": spell(config.peft),
        "match": config.match
        and f"peft.{parts.method.width} is the greatest that trains no more than {config.match:,} parameters",
        "head": spell(config.head),
        "loss": spell(config.loss),
        "class weights": next((term.told(data.class_names) for term in balanced(parts.loss)), None),
        "prompts": f"a box in {parts.prompts.box:.0%} of the steps, none in the others"
        if parts.prompts.box
        else None,
        "scores": f"{', '.join(parts.scores.names)}; {best.monitor} ({best.mode}) chooses the epoch",  # type: ignore[attr-defined]
        "optimiser": f"{spell(config.optimizer)}, lr falling linearly to 0 at each step",
        "schedule": describe_schedule(data, config.trainer, devices, size),
        "augmentation": spell(config.augment),
        "precision": str(config.trainer["precision"] if trainer is None else trainer.precision),
        "devices": devices_of(trainer) if trainer else f"{devices} x {config.trainer['accelerator']}",
        "batch": f"{size * devices * accumulation} = {size} per device x {devices} "
        f"device{'s' * (devices > 1)} x {accumulation} accumulated",
        "run folder": str(folder),
        "warning": shortage,
    }
    print_lines(lines)
    if backbone.is_random and not data.drawn:
        console.print(
            f"WARNING: {backbone.name} HAS RANDOM WEIGHTS, SO THIS TRAINS A TOY ON REAL IMAGES.\n"
            "WARNING: SET model.weights=PATH, OR model=sam_vit_b OR ANOTHER THAT BRINGS WEIGHTS, "
            "FOR RESULTS THAT MEAN ANYTHING.",
            style="bold red",
        )


def print_lines(lines: Mapping[str, str | None]) -> None:
    """Print labels with what there is to say of each, wrapped to the width of a terminal."""
    for label, text in lines.items():
        if text:
            wrapped = textwrap.wrap(text, COLUMNS - LABEL, break_long_words=False, break_on_hyphens=False)
            console.print(f"{label:<{LABEL}}" + f"\n{'':<{LABEL}}".join(wrapped))


def describe_images(data: SegmentationDataModule, *splits: Split) -> str:
    """Return how many images there are, or why none are known."""
    try:
        counts = ", ".join(f"{len(data.listed(split)):,} {split}" for split in splits)
    except (OSError, ValueError) as error:
        return f"not there yet: {error}"
    return f"{data.name}: {counts} images; classes {', '.join(data.class_names)}"


def describe_bands(data: SegmentationDataModule) -> str | None:
    """Return which bands are read and how they are scaled, as far as it is known; None of plain images."""
    if data.bands is not None:
        return str(data.bands)
    if data.loading.channels is None:
        return None
    channels, (low, high) = ", ".join(map(str, data.loading.channels)), data.loading.percentiles
    return (
        f"{channels} as red, green and blue, between the percentiles {low} and {high} of the training images"
    )


def describe_schedule(data: SegmentationDataModule, trainer: Config, devices: int, batch_size: int) -> str:
    """Return epochs and optimiser steps, the latter if the number of images is known."""
    epochs, limit = trainer["max_epochs"], trainer.get("limit_train_batches")
    try:
        images = len(data.listed("train"))
    except (OSError, ValueError):
        return f"{epochs} epochs"
    batches = math.ceil(math.ceil(images / devices) / batch_size)
    if limit is not None:
        batches = int(batches * limit) if isinstance(limit, float) else min(batches, limit)
    steps = math.ceil(batches / trainer["accumulate_grad_batches"])
    return f"{epochs * steps:,} steps in {epochs} epochs of {steps:,}"


def spell(config: Any) -> str:
    """Return a section as the call that it describes, nulls left out."""
    if isinstance(config, list):
        return f"[{', '.join(map(spell, config))}]"
    if not isinstance(config, dict):
        return str(config)
    given = [f"{key}={spell(part)}" for key, part in config.items() if part is not None and key[0] != "_"]
    return f"{config.get('_target_', '').rpartition('.')[2]}({', '.join(given)})"


def count_devices(config: Config, trainer: Trainer | None) -> int:
    """Return the number of processes that train together, without a trainer as far as it is known."""
    if trainer is not None:
        return trainer.num_devices * trainer.num_nodes
    devices, nodes = config["devices"], config.get("num_nodes") or 1
    if isinstance(devices, list):
        return nodes * len(devices)
    known = isinstance(devices, int) and devices > 0
    return int(nodes * (devices if known else max(1, torch.cuda.device_count())))


def devices_of(trainer: Trainer) -> str:
    """Return number and kind of the devices."""
    return f"{trainer.num_devices * trainer.num_nodes} x {trainer.strategy.root_device.type}"
