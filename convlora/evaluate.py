"""Score an adapter: `python -m convlora.evaluate checkpoint=RUN/adapter.safetensors dataset=cvc_clinicdb`."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from lightning import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console

from convlora.build import Config, command, load_adapter, make
from convlora.callbacks import Overlays, ScoreTable, render_scores
from convlora.data.base import SegmentationDataModule
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
    seed: int


def evaluate(config: EvaluateConfig) -> None:
    """Print the scores on the data set's test images and write scores.json, images.csv and overlays.png.

    Raises:
        ValueError: the adapter and the data set differ in their number of classes.
    """
    adapter = load_adapter(config.checkpoint, config.model["weights"], config.precision)
    data: SegmentationDataModule = make("dataset", config.dataset | {"resize": adapter.resize})
    if data.num_classes != len(adapter.class_names):
        raise ValueError(
            f"{config.checkpoint} segments {len(adapter.class_names)} classes "
            f"({', '.join(adapter.class_names)}), {data.name} has {data.num_classes} "
            f"({', '.join(data.class_names)}); choose another dataset="
        )
    output = Path(HydraConfig.get().runtime.output_dir)
    table = ScoreTable()
    progress = [RichProgressBar()] if config.trainer.get("enable_progress_bar", True) else []
    trainer: Trainer = make(
        "trainer",
        config.trainer | {"precision": adapter.precision},
        logger=False,
        callbacks=[table, Overlays(output / "overlays.png", table), *progress],
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    task = SegmentationTask(
        adapter.segmenter,
        make("loss", config.loss),
        make("metrics", config.metrics),
        torch.optim.AdamW,
        adapter.identity,
    )
    scores = trainer.test(task, data, verbose=False)[0]
    if not trainer.is_global_zero:
        return
    means = {name.removeprefix("test/"): value for name, value in scores.items()}
    record = {"dataset": data.name, "images": len(table.rows), "checkpoint": config.checkpoint, **means}
    (output / "scores.json").write_text(json.dumps(record, indent=2) + "\n")
    table.write(output / "images.csv")
    console = Console(highlight=False, soft_wrap=True)
    console.print(render_scores(f"{data.name}, test, {len(table.rows)} images", means))
    console.print(f"scores.json, images.csv, overlays.png in {output}")


main = command("evaluate", EvaluateConfig, evaluate)

if __name__ == "__main__":
    main()
