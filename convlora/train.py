"""Train: `python -m convlora.train dataset=kvasir model=sam_vit_b peft=conv_lora`."""

import math
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, Logger
from rich.console import Console

from convlora import adapter, run
from convlora.build import (
    Config,
    Parts,
    make,
    make_parts,
    make_segmenter,
    make_trainer,
    missing_devices,
)
from convlora.callbacks import Overlays, finish_wandb, make_progress, render_scores, test_each
from convlora.cli import assign, command, given_overrides
from convlora.task import SegmentationTask

COLUMNS, LABEL = 100, 16  # of what a run says of itself
console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class TrainConfig:
    """The keys of conf/train.yaml, where they are explained."""

    dataset: Config
    loading: Config
    model: Config
    peft: Config
    head: Config
    loss: Config
    metrics: Config
    optimizer: Config
    trainer: Config
    callbacks: dict[str, Config | None]
    logger: Config
    augment: Config
    resize: Config
    test_sets: list[str]
    seed: int
    data_root: str
    run_dir: str
    resume: str | None
    compile: bool
    dry_run: bool


def train(config: TrainConfig) -> float | None:
    """Train, test the best epoch and write the run folder.

    Returns:
        The best validation score, which a sweep can optimise; None for a dry run.
    """
    folder = Path(config.resume or config.run_dir)
    if config.resume is None:
        run.check_unused(folder)
    else:
        run.check_same_settings(folder, asdict(config))
    parts = make_parts("train", config)
    if config.dry_run:
        announce(config, parts, folder, None)
        return None
    parts.data.setup("fit")
    for test in parts.tests:  # a missing test set should not come out after the training
        test.setup("test")
    table = run.ScoreTable()
    callbacks: list[Callback] = [*parts.callbacks.values(), run.RunCheckpoint("last"), run.StayStopped()]
    callbacks += [table, Overlays(table), make_progress(config.trainer["enable_progress_bar"])]
    trainer = make_trainer(config.trainer, callbacks, default_root_dir=str(folder))
    announce(config, parts, folder, trainer)
    if not trainer.is_global_zero:
        return fit_and_test(config, parts, folder, trainer)
    with (
        run.nothing_left(folder, lambda: trainer.global_step > 0),
        run.hold(folder, run.count(parts.outline, trainable=True)),
    ):
        try:
            return fit_and_test(config, parts, folder, trainer)
        finally:
            finish_wandb()


def fit_and_test(config: TrainConfig, parts: Parts, folder: Path, trainer: Trainer) -> float | None:
    """Train on the first data set, test on all, write the run folder; returns the best validation score."""
    data, checkpoint = parts.data, None
    seed_everything(config.seed, workers=True, verbose=False)
    segmenter, identity = make_segmenter(config.model, config.peft, config.head, data.num_classes)
    if config.compile:
        segmenter.compile_encoder()
    metadata = adapter.describe(asdict(config), data, identity, str(trainer.precision))
    facts = {**identity, "training images": data.content("train"), "devices": devices_of(trainer)}
    facts["precision"] = str(trainer.precision)
    task = SegmentationTask(
        segmenter, parts.loss, parts.scores, parts.optimizer, metadata, facts, config.seed
    )
    last = folder / run.LAST
    if last.is_file():  # of the run that is resumed; one that saved nothing yet begins anew
        checkpoint = run.read_checkpoint(last)
        run.check_resumable(checkpoint, task, last)
        data.start_epoch = run.next_epoch(checkpoint)
    trainer.loggers = make_loggers(config.logger, folder, checkpoint)
    if trainer.is_global_zero:
        run.write_record(folder, given_overrides(), asdict(config))
        for logger in trainer.loggers:
            logger.log_hyperparams(run.flatten(asdict(config)))
    try:
        trainer.fit(task, data, ckpt_path=last if checkpoint else None, weights_only=True)
    except BaseException:
        if trainer.global_step > 0:
            say_what_is_kept(folder, trainer)
        raise
    return save_and_test(parts, folder, trainer, task)


def save_and_test(parts: Parts, folder: Path, trainer: Trainer, task: SegmentationTask) -> float | None:
    """Save the best epoch as an adapter, test it and summarise the run; returns its validation score."""
    best = next(each for each in trainer.checkpoint_callbacks if isinstance(each, run.RunCheckpoint))
    fitted = {
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "fit_seconds": round(task.fit_seconds, 1),
    }
    if best.best_model_path:
        task.load_state_dict(run.read_checkpoint(Path(best.best_model_path))["state_dict"])
    path = folder / adapter.NAME
    if trainer.is_global_zero:  # before the test, which may still meet a damaged image
        adapter.save(path, task.state_dict(), task.metadata)
    results = test_each(trainer, task, parts.tests, folder)
    score = None if best.best_model_score is None else best.best_model_score.item()
    if trainer.is_global_zero:
        first = parts.data.name
        summary = {
            "dataset": first,
            "test": results[first],
            "test_sets": {name: scores for name, scores in results.items() if name != first},
            str(best.monitor): score,
            **fitted,
            "trainable_parameters": run.count(task.segmenter, trainable=True),
            "total_parameters": run.count(task.segmenter),
            **task.facts,
        }
        run.write_json(folder / "summary.json", summary)
        console.print(render_scores(results))
        console.print(f"adapter: {path}")
    return score


def announce(config: TrainConfig, parts: Parts, folder: Path, trainer: Trainer | None) -> None:
    """Print what is about to be trained, before anything takes time; for a dry run there is no trainer."""
    if trainer is not None and not trainer.is_global_zero:
        return
    data, backbone, scores = parts.data, parts.backbone, parts.scores
    best = parts.callbacks["best"]
    settings = config.trainer
    devices, accumulation = count_devices(settings, trainer), settings["accumulate_grad_batches"]
    size, trainable = config.loading["batch_size"], run.count(parts.outline, trainable=True)
    lines = {
        "data": describe_images(data, data.splits),
        "also tested on": "; ".join(describe_images(test, ("test",)) for test in parts.tests[1:]),
        "model": f"{backbone.name} at {backbone.image_size} px, {backbone.weights_source()}",
        "parameters": f"{trainable:,} trainable of {run.count(parts.outline):,}",
        "method": spell(config.peft),
        "head": spell(config.head),
        "loss": spell(config.loss),
        "scores": f"{', '.join(scores.names)}; {best.monitor} ({best.mode}) chooses the epoch",  # type: ignore[attr-defined]
        "optimiser": f"{spell(config.optimizer)}, lr falling linearly to 0 at each step",
        "schedule": describe_schedule(data, settings, devices, size),
        "augmentation": spell(config.augment),
        "precision": str(settings["precision"] if trainer is None else trainer.precision),
        "devices": f"{devices}, accelerator {settings['accelerator']}"
        if trainer is None
        else devices_of(trainer),
        "batch": f"{size * devices * accumulation} = {size} per device x {devices} "
        f"device{'s' * (devices > 1)} x {accumulation} accumulated",
        "run folder": str(folder),
        "": backbone.padding_advice() or "",
    }
    for label, text in lines.items():
        if text:
            first, *more = textwrap.wrap(
                text, COLUMNS - LABEL, break_long_words=False, break_on_hyphens=False
            )
            console.print(f"{label:<{LABEL}}{first}", markup=False)
            for line in more:
                console.print(" " * LABEL + line, markup=False)
    if trainer is None and (shortage := missing_devices(settings)):
        console.print(f"warning: {shortage}", markup=False)
    if backbone.is_random and not data.drawn:
        console.print(
            f"WARNING: {backbone.name} HAS RANDOM WEIGHTS, SO THIS TRAINS A TOY ON REAL IMAGES.\n"
            "WARNING: SET model=sam_vit_b, OR ANOTHER THAT HAS WEIGHTS, FOR RESULTS THAT MEAN ANYTHING.",
            style="bold red",
        )


def describe_images(data: Any, splits: Any) -> str:
    """Return how many images there are, or why none are known."""
    try:
        counts = ", ".join(f"{len(data.listed(split)):,} {split}" for split in splits)
    except (OSError, ValueError) as error:
        return f"not there yet: {error}"
    return f"{data.name}: {counts} images; classes {', '.join(data.class_names)}"


def describe_schedule(data: Any, trainer: Config, devices: int, batch_size: int) -> str:
    """Return epochs and optimiser steps, as far as the number of images is known."""
    epochs = trainer["max_epochs"]
    try:
        images = len(data.listed("train"))
    except (OSError, ValueError):
        return f"{epochs} epochs"
    batches, limit = math.ceil(math.ceil(images / devices) / batch_size), trainer.get("limit_train_batches")
    if limit is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    steps = math.ceil(batches / trainer["accumulate_grad_batches"])
    return f"{epochs} epochs of {steps:,} steps, {epochs * steps:,} in all"


def spell(config: Config) -> str:
    """Return a section as the call that it describes, nulls left out."""

    def value(part: Any) -> str:
        if isinstance(part, dict):
            return spell(part)
        return f"[{', '.join(map(value, part))}]" if isinstance(part, list) else str(part)

    arguments = [f"{key}={value(part)}" for key, part in config.items() if part is not None and key[0] != "_"]
    return f"{str(config.get('_target_', '')).rpartition('.')[2]}({', '.join(arguments)})"


def count_devices(config: Config, trainer: Trainer | None) -> int:
    """Return the number of processes that train together, without a trainer as far as it is known."""
    if trainer is not None:
        return trainer.num_devices * trainer.num_nodes
    devices = config["devices"]
    if isinstance(devices, list):
        return len(devices)
    return devices if isinstance(devices, int) and devices > 0 else max(1, torch.cuda.device_count())


def devices_of(trainer: Trainer) -> str:
    """Return number and kind of the devices."""
    return f"{trainer.num_devices * trainer.num_nodes} x {trainer.strategy.root_device.type}"


def say_what_is_kept(folder: Path, trainer: Trainer) -> None:
    """Tell a user whose run was stopped what is there and how to go on."""
    if not trainer.is_global_zero:
        return
    console.print(f"\nstopped in epoch {trainer.current_epoch + 1} of {trainer.max_epochs}")
    if not (folder / run.LAST).is_file():
        console.print(f"no epoch had ended, so that nothing is saved; begin again: {resume_command(folder)}")
        return
    done = run.next_epoch(run.read_checkpoint(folder / run.LAST))
    console.print(f"kept: {folder / run.LAST} after {done} epochs, {folder / run.BEST} of the best of them")
    console.print(f"go on: {resume_command(folder)}")
    console.print(f"use the best so far: python -m convlora.export {quoted('checkpoint', folder)}")


def resume_command(folder: Path) -> str:
    """Return the command that goes on with a run."""
    return f"python -m convlora.train {quoted('resume', folder)}"


def quoted(key: str, folder: Path) -> str:
    """Return an argument as a shell takes it."""
    argument = assign(key, folder)
    return argument if "'" not in argument else '"' + argument.replace('"', '\\"') + '"'


def make_loggers(config: Config, folder: Path, checkpoint: dict[str, Any] | None) -> list[Logger]:
    """Return the CSV logger and the chosen one; a resumed run keeps the curves it had."""
    table = CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)
    if checkpoint is not None:
        run.keep_metrics(table, folder / "metrics.csv", checkpoint["global_step"])
    chosen: Logger = make("logger", config, save_dir=str(folder))
    return [table] if isinstance(chosen, CSVLogger) else [table, chosen]


def replay(folder: str) -> list[str]:
    """Return the arguments of the run in a folder."""
    command: list[str] = run.read_record(Path(folder))["command"]
    return command


main = command("train", TrainConfig, train, folder="run_dir", replay=replay)

if __name__ == "__main__":
    main()
