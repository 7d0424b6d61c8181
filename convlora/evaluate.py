"""Score an adapter: `python -m convlora.evaluate checkpoint=RUN dataset=cvc_clinicdb`."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from rich.console import Console

from convlora import adapter, run
from convlora.adapter import Adapter
from convlora.build import (
    check_classes,
    check_frozen_dtype,
    check_precision,
    make_loss,
    make_segmenter,
    make_test_sets,
    make_trainer,
)
from convlora.callbacks import Overlays, make_progress, render_scores, test_each
from convlora.cleaning import Cleaning, check_foreground, choose_cleaning
from convlora.cli import command, given_overrides, refuse_idle
from convlora.data.images import allow_large_images, image_size
from convlora.data.module import Batch, SegmentationDataModule
from convlora.data.transforms import LongestSideResize, NativeSize, Resize
from convlora.heads import SamsOwn
from convlora.inference import Predictor, TiledSegmenter
from convlora.losses import balanced, takes_outputs
from convlora.metrics.thresholds import LEVELS, best_threshold, overlap_by_level
from convlora.peft.selective import DecoderOnly
from convlora.routing import Routing
from convlora.sam.zoo import Backbone
from convlora.schema import Config, make, suggest
from convlora.segmenter import Segmenter
from convlora.task import BoxPrompted, SegmentationTask
from convlora.tiles import check_tile, choose_tiling

PROTOCOLS = ("automatic", "box")
# Keys that the record of SAM as it is leaves out: it has what they come to, or they say nothing of its scores
REPLACED = ("threshold", "smallest", "fill_holes", "precision", "checkpoint", "augment", "output")
IDLE = ("resize", "augment", "shots", "cache", "seed", "channels", "percentiles")  # of `loading`

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateConfig:
    """The keys of conf/evaluate.yaml, where they are explained."""

    checkpoint: str | None
    protocol: str
    dataset: Config
    loading: Config
    model: Config
    loss: Config
    metrics: Config
    trainer: Config
    augment: Config
    resize: Config | None
    precision: str | None
    data_root: str
    threshold: float | str
    smallest: int
    fill_holes: int | bool
    tiles: bool
    tile: int | None
    overlap: float
    output: str
    test_sets: list[str]
    seed: int


def evaluate(config: EvaluateConfig) -> None:
    """Print the scores on the test images of each data set and write them with tables and pictures.

    Raises:
        OSError: the output cannot be made, or holds a run or an evaluation.
        ValueError: the adapter and a data set differ in their classes, or a setting has no effect.
    """
    refuse_idle("augment", "trainer.precision", *(f"loading.{key}" for key in IDLE))
    if config.protocol not in PROTOCOLS:
        raise ValueError(f"protocol={config.protocol}: {suggest(config.protocol, PROTOCOLS)}")
    output = Path(config.output)
    run.check_no_scores(output)
    trained = untrained(config) if config.checkpoint is None else read(config)
    name = config.checkpoint or f"model={trained.metadata['base']}"
    segmenter, resize, settings, tiling = trained.segmenter, trained.resize, config.loading, None
    if config.tiles:
        allow_large_images()
        tiling = choose_tiling(config.tile, config.overlap, trained.median_side, name)
        tiled = TiledSegmenter(segmenter, resize, tiling, settings["batch_size"])
        segmenter = cast(Segmenter, tiled)  # in whose place it stands, since nothing is trained here
        resize, settings = NativeSize(), {**settings, "batch_size": 1}
    elif config.tile is not None:
        raise ValueError(f"tile={config.tile} has no effect, since no image is cut; add tiles=true")
    loading = make("loading", settings, ["resize"], resize=resize)
    data: SegmentationDataModule = make("dataset", config.dataset, loading=loading)
    tests = [data, *make_test_sets(config.test_sets, "evaluate", data)]
    for test in tests:  # a missing set should not come out after the others
        test.setup("test")
        test.use_bands(trained.bands, "test")
    if config.tile is not None and not data.drawn:
        images = [pair.image for pair in data.listed("test")]
        check_tile(config.tile, ((image, image_size(image, trained.bands)) for image in images))
    check_classes(name, list(trained.class_colors), data)
    loss = make_loss(config.loss, trained.segmenter)
    if balanced(loss):
        raise ValueError(
            "class_weights=balanced of the loss follows from training images; give the numbers that the "
            "training told, as loss.class_weights=[1,2.5], or leave it out"
        )
    if tiling is not None and takes_outputs(loss):
        raise ValueError(
            "this loss is one of the head's outputs, but tiles=true blends the logits of windows; leave loss "
            "out, or tiles"
        )
    table = run.ScoreTable()
    callbacks = [table, Overlays(table), make_progress(config.trainer["enable_progress_bar"])]
    if tiling is None:  # which cut images do not pass through as wholes
        callbacks.append(Routing())
    trainer = make_trainer(config.trainer, callbacks, precision=trained.precision, enable_checkpointing=False)
    if config.protocol == "box" and (tiling is not None or data.num_classes > 1):
        reason = "tiles=true cuts images" if tiling is not None else f"{data.name} has several classes"
        raise ValueError(f"protocol=box is for one object in whole images, but {reason}; leave it out")
    kind = BoxPrompted if config.protocol == "box" else SegmentationTask
    task = kind(
        segmenter,
        loss,
        make("metrics", config.metrics, class_names=data.class_names),
        torch.optim.AdamW,
        trained.metadata,
        {},
    )
    threshold = config.threshold
    if threshold == "tune":
        threshold = Cleaning().threshold  # until it is tuned
        trainer.callbacks.append(make_tuning(config, task, data))  # type: ignore[attr-defined]
    given = (threshold, config.smallest, config.fill_holes)
    boxless = Boxless()
    if config.protocol == "box":
        trainer.callbacks.append(boxless)  # type: ignore[attr-defined]
    task.cleaning = choose_cleaning(*given, trained.metadata, list(trained.class_colors), name)
    if trainer.is_global_zero:
        run.make_folder("output", output)
    with run.own_processes(trainer):
        results = test_each(trainer, task, tests, output)
    if not trainer.is_global_zero:
        return
    counts = {name: {"images": count} for name, count in table.counts.items()}
    record: dict[str, Any] = {
        "checkpoint": config.checkpoint,
        "model": trained.metadata["base"],
        "protocol": config.protocol,
        "dataset": data.name,
        "precision": str(trainer.precision),
        "tile": None if tiling is None else tiling.side,
        "cleaning": asdict(task.cleaning),
        "overlap": None if tiling is None else tiling.overlap,
        **counts[data.name],
        **results[data.name],
    }
    record["test_sets"] = {test.name: counts[test.name] | results[test.name] for test in tests[1:]}
    run.write_json(output / run.SCORES, record)
    if config.checkpoint is None:
        keep_for_reports(config, task, data, record["precision"], results, output)
    console = Console(highlight=False, soft_wrap=True)
    if tiling is not None:
        console.print(f"by windows of {tiling.side} px")
    if not task.cleaning.is_idle:
        console.print(
            f"masks of {', '.join(f'{key}={value}' for key, value in asdict(task.cleaning).items())}"
        )
    console.print(render_scores(results))
    if boxless.count:
        verb = "has" if boxless.count == 1 else "have"
        console.print(
            f"{boxless.count} of {sum(table.counts.values())} images {verb} no object and so no box: nothing "
            "is found there, which counts as right, with a Dice of 1"
        )
    console.print(f"{run.SCORES}, images.csv and pictures in {output}")


def read(config: EvaluateConfig) -> Adapter:
    """Return the adapter that is scored; says where its training knew no prompts though it is given some."""
    assert config.checkpoint is not None
    refuse_idle("model", "resize")
    if config.threshold == "tune":
        adapter.check_own(config.checkpoint)
    trained = adapter.read(config.checkpoint, config.model["weights"], config.precision)
    if config.protocol == "box":
        adapter.say_prompts(config.checkpoint, trained.metadata)
    return trained


def untrained(config: EvaluateConfig) -> Adapter:
    """Return SAM as it is: its own mask, that of the token for prompts that leave no doubt.

    Raises:
        ValueError: no model is named, or it does not go with the precision.
    """
    if "_target_" not in config.model:
        raise ValueError("checkpoint=RUN must be given, or model=sam_vit_b to score SAM as it is")
    backbone: Backbone = make("model", config.model)
    size = backbone.image_size
    resize: Resize = LongestSideResize(size) if config.resize is None else make("resize", config.resize)
    if backbone.is_random:
        log.warning(f"{backbone.name} has random weights, so its scores mean nothing")
    precision = config.precision or "32-true"
    check_precision("precision", precision)
    check_frozen_dtype(config.model, "precision", precision)
    segmenter, identity = make_segmenter(backbone, DecoderOnly(), SamsOwn(), 1)
    colors = {"foreground": [255, 255, 255]}
    metadata = adapter.describe({}, colors, identity, precision)
    return Adapter(segmenter.eval(), resize, colors, precision, metadata, None)


class Tuning(Callback):
    """Finds, before the first test, the threshold at which validation images have the greatest mean score.

    It is kept in the adapter's file and taken for the tests. `smallest` and `fill_holes` play no part in it.
    Each device looks at its share of the images.

    Args:
        checkpoint: the adapter.
        data: has validation images.
        score: `dice` or `iou`, a mean over images.
    """

    def __init__(self, checkpoint: str, data: SegmentationDataModule, score: str):
        self.checkpoint = checkpoint
        self.data = data
        self.score = score
        self.is_done = False

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the validation images; raises OSError where one is missing or the file is not writable."""
        if self.is_done:
            return
        assert isinstance(pl_module, SegmentationTask)
        resize, context = self.data.loading.resize, trainer.precision_plugin.forward_context
        predictor = Predictor(pl_module.segmenter, resize, {}, context)
        total = torch.zeros(len(LEVELS), dtype=torch.float64)
        for pair in self.data.listed("val")[trainer.global_rank :: trainer.world_size]:
            image, mask = self.data.read(pair)
            prob = pl_module.found(image, mask, predictor).prob
            total += torch.from_numpy(overlap_by_level(prob, mask == 1)[self.score])
        if trainer.world_size > 1:
            total = trainer.strategy.reduce(total.to(pl_module.device), reduce_op="sum").cpu()
        threshold, self.is_done = best_threshold(total.numpy()), True
        pl_module.cleaning = replace(pl_module.cleaning, threshold=threshold)
        if trainer.is_global_zero:
            found_by = f"{self.score} of {self.data.name}'s validation images"
            adapter.keep_threshold(self.checkpoint, threshold, found_by)


class Boxless(Callback):
    """Counts the images of all tests in whose masks there is no object that a box could prompt for.

    Attributes:
        count: over all devices, once a test has ended.
    """

    def __init__(self) -> None:
        self.count = 0
        self.own = 0

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.own = 0

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, *_: int
    ) -> None:
        self.own += sum(not bool((mask == 1).any()) for mask in batch.masks)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        own = torch.tensor(self.own, device=pl_module.device)
        self.count += int(trainer.strategy.reduce(own, reduce_op="sum"))


def make_tuning(config: EvaluateConfig, task: SegmentationTask, data: SegmentationDataModule) -> Tuning:
    """Return what tunes the threshold by the mean Dice of images.

    Where the primary score is an IoU or Jaccard index, even a pooled one, it is the mean IoU of images.

    Raises:
        FileNotFoundError: validation images are missing.
        ValueError: there are several classes, no adapter, or prompts.
    """
    check_foreground(data.class_names, config.checkpoint or data.name)
    if config.checkpoint is None or config.protocol != "automatic":
        raise ValueError(
            "threshold=tune is for an adapter without prompts, and keeps it in the file; set a number, as "
            "threshold=0.5"
        )
    data.setup("validate")
    data.use_bands(data.bands, "val")
    primary = task.scores_of("test").primary
    return Tuning(config.checkpoint, data, "iou" if "iou" in primary or "jaccard" in primary else "dice")


def keep_for_reports(
    config: EvaluateConfig,
    task: SegmentationTask,
    data: SegmentationDataModule,
    precision: str,
    results: Mapping[str, Any],
    output: Path,
) -> None:
    """Write the scores of an untrained model as those of a run, which a report shows beside others."""
    scores, [first, *others] = task.scores_of("test"), results
    settings = {key: value for key, value in asdict(config).items() if key not in REPLACED}
    settings["trainer"] = {**config.trainer, "precision": precision}
    settings["cleaning"] = asdict(task.cleaning)
    settings["callbacks"] = {"best": {"monitor": f"val/{scores.primary}", "mode": scores.mode}}
    run.write_record(output, ["peft=none", *given_overrides()], settings)
    summary = {
        "dataset": first,
        "test": results[first],
        "test_sets": {name: results[name] for name in others},
        "fit_seconds": 0.0,
        "trainable_parameters": 0,
        "total_parameters": run.count(task.segmenter),
        "test images": data.content("test"),
    }
    run.write_json(output / run.SUMMARY, summary)


main = command("evaluate", EvaluateConfig, evaluate, folder="output")

if __name__ == "__main__":
    main()
