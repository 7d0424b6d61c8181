"""Score an adapter: `python -m convlora.evaluate checkpoint=RUN/adapter.safetensors dataset=cvc_clinicdb`."""

from dataclasses import dataclass
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from lightning import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console

from convlora.build import Config, check_classes, command, load_adapter, make, make_loss, make_test_sets
from convlora.callbacks import Overlays, ScoreTable, render_scores, test_each, write_json
from convlora.data.module import SegmentationDataModule
from convlora.task import SegmentationTask


@dataclass(frozen=True)
class EvaluateConfig:
    """The keys of conf/evaluate.yaml, where they are explained."""

    checkpoint: str
    dataset: Config
    model: Config
    loss: Config
    metrics: Config
    trainer: Config
    augment: Config
    resize: None
    precision: str | None
    data_root: str
    output: str
    test_sets: list[str]
    seed: int


def evaluate(config: EvaluateConfig) -> None:
    """Print the scores on the test images of each data set and write them with tables and pictures.

    Raises:
        ValueError: the adapter and a data set differ in their classes.
    """
    adapter = load_adapter(config.checkpoint, config.model["weights"], config.precision)
    data: SegmentationDataModule = make("dataset", config.dataset | {"resize": adapter.resize})
    tests = [data, *make_test_sets(config.test_sets, "evaluate", data)]
    for test in tests:  # a missing set should not come out after the others
        test.setup("test")
    check_classes(config.checkpoint, adapter.class_names, data)
    output = Path(HydraConfig.get().runtime.output_dir)
    table = ScoreTable()
    progress = [RichProgressBar()] if config.trainer.get("enable_progress_bar", True) else []
    trainer: Trainer = make(
        "trainer",
        config.trainer | {"precision": adapter.precision},
        logger=False,
        callbacks=[table, Overlays(table), *progress],
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    task = SegmentationTask(
        adapter.segmenter,
        make_loss(config.loss, adapter.segmenter),
        make("metrics", config.metrics, class_names=data.class_names),
        torch.optim.AdamW,
        adapter.identity,
    )
    results = test_each(trainer, task, tests, output)
    if not trainer.is_global_zero:
        return
    images = {test.name: {"images": len(test.listed("test"))} for test in tests}
    record = {
        "checkpoint": config.checkpoint,
        "dataset": data.name,
        **images[data.name],
        **results[data.name],
    }
    record["test_sets"] = {test.name: images[test.name] | results[test.name] for test in tests[1:]}
    write_json(output / "scores.json", record)
    console = Console(highlight=False, soft_wrap=True)
    console.print(render_scores(results))
    console.print(f"scores.json, images.csv and pictures in {output}")


main = command("evaluate", EvaluateConfig, evaluate)

if __name__ == "__main__":
    main()
