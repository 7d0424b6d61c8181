"""Score an adapter: `python -m convlora.evaluate checkpoint=RUN dataset=cvc_clinicdb`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from convlora import adapter, run
from convlora.build import check_classes, make_loss, make_test_sets, make_trainer
from convlora.callbacks import Overlays, make_progress, render_scores, test_each
from convlora.cli import command, refuse_idle
from convlora.data.images import image_size
from convlora.data.module import SegmentationDataModule
from convlora.data.transforms import NativeSize
from convlora.inference import TiledSegmenter
from convlora.losses import is_balanced, takes_outputs
from convlora.routing import Routing
from convlora.schema import Config, make
from convlora.segmenter import Segmenter
from convlora.task import SegmentationTask
from convlora.tiles import check_tile, choose_tiling

IDLE = ("resize", "augment", "shots", "cache", "seed", "channels", "percentiles")  # of `loading`


@dataclass(frozen=True)
class EvaluateConfig:
    """The keys of conf/evaluate.yaml, where they are explained."""

    checkpoint: str
    dataset: Config
    loading: Config
    model: Config
    loss: Config
    metrics: Config
    trainer: Config
    augment: Config
    resize: None
    precision: str | None
    data_root: str
    tiles: bool
    tile: int | None
    overlap: float
    output: str
    test_sets: list[str]
    seed: int


def evaluate(config: EvaluateConfig) -> None:
    """Print the scores on the test images of each data set and write them with tables and pictures.

    Raises:
        OSError: the output cannot be made.
        ValueError: the adapter and a data set differ in their classes, or a setting has no effect.
    """
    refuse_idle(
        "model",
        "augment",
        "resize",
        "trainer.precision",
        *(f"loading.{key}" for key in IDLE),
    )
    trained = adapter.read(config.checkpoint, config.model["weights"], config.precision)
    segmenter, resize, settings, tiling = trained.segmenter, trained.resize, config.loading, None
    if config.tiles:
        tiling = choose_tiling(config.tile, config.overlap, trained.median_side, config.checkpoint)
        tiled = TiledSegmenter(segmenter, resize, tiling, settings["batch_size"])
        segmenter = cast(Segmenter, tiled)  # in whose place it stands, since nothing is trained here
        resize, settings = NativeSize(), {**settings, "batch_size": 1}
    elif config.tile is not None:
        raise ValueError(f"tile={config.tile} has no effect, since no image is cut; add tiles=true")
    loading = make("loading", settings, resize=resize)
    data: SegmentationDataModule = make("dataset", config.dataset, loading=loading)
    tests = [data, *make_test_sets(config.test_sets, "evaluate", data)]
    for test in tests:  # a missing set should not come out after the others
        test.setup("test")
        test.use_bands(trained.bands, "test")
    if config.tile is not None:
        images = [pair.image for pair in data.listed("test")]
        check_tile(config.tile, ((image, image_size(image, trained.bands)) for image in images))
    check_classes(config.checkpoint, list(trained.class_colors), data)
    loss = make_loss(config.loss, trained.segmenter)
    if is_balanced(loss):
        raise ValueError(
            "loss.class_weights=balanced follows from training images; give the numbers that the training "
            "told, as loss.class_weights=[1,2.5], or leave it out"
        )
    if tiling is not None and takes_outputs(loss):
        raise ValueError(
            "this loss is one of the head's outputs, but tiles=true blends the logits of windows; leave loss "
            "out, or tiles"
        )
    table, output = run.ScoreTable(), Path(config.output)
    callbacks = [table, Overlays(table), make_progress(config.trainer["enable_progress_bar"])]
    if tiling is None:  # which cut images do not pass through as wholes
        callbacks.append(Routing())
    trainer = make_trainer(config.trainer, callbacks, precision=trained.precision, enable_checkpointing=False)
    task = SegmentationTask(
        segmenter,
        loss,
        make("metrics", config.metrics, class_names=data.class_names),
        torch.optim.AdamW,
        trained.metadata,
        {},
    )
    if trainer.is_global_zero:
        run.make_folder("output", output)
    with run.own_processes(trainer):
        results = test_each(trainer, task, tests, output)
    if not trainer.is_global_zero:
        return
    counts = {test.name: {"images": len(test.listed("test"))} for test in tests}
    record: dict[str, Any] = {
        "checkpoint": config.checkpoint,
        "dataset": data.name,
        "precision": str(trainer.precision),
        "tile": None if tiling is None else tiling.side,
        **counts[data.name],
        **results[data.name],
    }
    record["test_sets"] = {test.name: counts[test.name] | results[test.name] for test in tests[1:]}
    run.write_json(output / "scores.json", record)
    console = Console(highlight=False, soft_wrap=True)
    if tiling is not None:
        console.print(f"by windows of {tiling.side} px")
    console.print(render_scores(results))
    console.print(f"scores.json, images.csv and pictures in {output}")


main = command("evaluate", EvaluateConfig, evaluate, folder="output")

if __name__ == "__main__":
    main()
