"""Overlays, scores per image and the W&B logger."""

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import wandb
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from numpy.typing import NDArray
from rich.table import Table

from convlora import draw
from convlora.data.module import Batch, SegmentationDataModule, Split
from convlora.metrics.scores import Scores
from convlora.segmenter import Prediction, Segmenter, restore_size, to_prediction
from convlora.task import SegmentationTask

FIXED, EXTREME = 4, 2  # samples of an overlay page: always the same ones, and the best and the worst


def wandb_logger(project: str, group: str, save_dir: str) -> WandbLogger:
    """Return a logger that is online where the machine is logged in to W&B and offline elsewhere.

    It never asks for a login; the variable WANDB_MODE overrides the choice.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    # Told in so many words: the logger's own `offline` sets a variable that wandb may have read already.
    mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
    return WandbLogger(project=project, group=group, save_dir=save_dir, mode=mode)


def finish_wandb() -> None:
    """End the W&B run of this job, so that a multirun logs every job."""
    wandb.finish()


def render_scores(tests: Mapping[str, Mapping[str, float]]) -> Table:
    """Return a terminal table, a row for each score and a column for each test set."""
    table = Table("score", *(f"{name}, test" for name in tests))
    for column in table.columns[1:]:
        column.justify = "right"
    for score in dict.fromkeys(score for scores in tests.values() for score in scores):
        table.add_row(
            score, *(f"{scores[score]:.4f}" if score in scores else "" for scores in tests.values())
        )
    return table


class RunCheckpoint(ModelCheckpoint):
    """A checkpoint under one name in the run folder, which may have been moved since it was saved."""

    def __init__(self, folder: Path, name: str, monitor: str | None = None, mode: str = "min"):
        super().__init__(
            folder, name, monitor, mode=mode, enable_version_counter=False, save_on_train_epoch_end=True
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score so far; the files lie in the present folder."""

        def moved(path: str) -> str:
            return str(Path(str(self.dirpath), Path(path).name)) if path else ""

        paths = {key: moved(state_dict[key]) for key in state_dict if key.endswith("_path")}
        scores = {moved(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "dirpath": self.dirpath, "best_k_models": scores})


class StayStopped(Callback):
    """Ends a resumed run at once that early stopping had ended; Lightning would train another epoch."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what early stopping restored."""
        stops = (callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping))  # type: ignore[attr-defined]
        if any(stop.stopped_epoch > 0 for stop in stops):
            trainer.should_stop = True


class ScoreTable(Callback):
    """Gathers the test scores of each image from all ranks.

    Attributes:
        rows: name -> scores, sorted by name, once the test has ended.
    """

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, float]] = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier test."""
        self.rows = {}

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Take the scores of one batch."""
        self.rows.update(outputs)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the ranks."""
        if trainer.world_size > 1:
            parts: list[dict[str, dict[str, float]]] = [{}] * trainer.world_size
            torch.distributed.all_gather_object(parts, self.rows)
            self.rows = {name: row for part in parts for name, row in part.items()}
        self.rows = dict(sorted(self.rows.items()))

    def write(self, path: Path) -> None:
        """Write a CSV with one line per image."""
        write_rows(path, "image", self.rows)


class Overlays(Callback):
    """Draws image, truth, prediction and error: to W&B after each validation, to a page after a test.

    Args:
        table: per-image scores of the same test.

    Attributes:
        path: PNG with a fixed set of test samples and the best and worst by the primary score.
    """

    def __init__(self, table: ScoreTable):
        self.path: Path | None = None
        self.table = table

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send a fixed set of validation samples to W&B."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        if not loggers or trainer.sanity_checking or not trainer.is_global_zero:
            return
        data = _data(trainer)
        names = {0: "background", 1: data.class_names[0]}
        if data.num_classes > 1:
            names = dict(enumerate(data.class_names))
        images = []
        for index in _spread(len(data.listed("val")), FIXED):
            name, image, mask, found = _predict(trainer, pl_module, "val", index)
            layers = {
                key: {"mask_data": value, "class_labels": names}
                for key, value in (("truth", mask), ("prediction", _array(found.classes)))
            }
            images.append(wandb.Image(image, masks=layers, caption=name))
        for logger in loggers:
            logger.experiment.log({"val/overlays": images, "trainer/global_step": trainer.global_step})

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page."""
        if not trainer.is_global_zero or not self.table.rows or self.path is None:
            return
        data, scores = _data(trainer), _scores(pl_module)
        order = {name: index for index, name in enumerate(data.names("test"))}
        names = list(self.table.rows)

        def goodness(name: str) -> float:
            value = self.table.rows[name][scores.primary]
            if math.isnan(value):
                return -math.inf
            return value if scores.mode == "max" else -value

        ranked = sorted(names, key=goodness)
        titles = {names[i]: ["sample"] for i in _spread(len(names), FIXED)}
        for title, extremes in (("best", ranked[: -EXTREME - 1 : -1]), ("worst", ranked[:EXTREME])):
            for name in extremes:
                titles.setdefault(name, []).append(title)
        rows = []
        for name, roles in titles.items():
            _, image, mask, found = _predict(trainer, pl_module, "test", order[name])
            score = f"{scores.primary} {self.table.rows[name][scores.primary]:.3f}"
            label = f"{', '.join(roles)}: {Path(name).name}"
            rows.append(draw.Row(label, image, mask, _array(found.classes), _array(found.prob), score))
        draw.draw_page(rows, draw.colors_of(data.class_names, data.class_colors), self.path)


def test_each(
    trainer: Trainer, task: SegmentationTask, sets: Sequence[SegmentationDataModule], folder: Path
) -> dict[str, dict[str, float]]:
    """Score a model on several test sets.

    The first one's pictures and tables go to `folder`, those of the others to a folder in it by their name,
    and of several sets `scores.csv` has a row for each.

    Returns:
        By data set, the scores by name.
    """
    [table] = [callback for callback in trainer.callbacks if isinstance(callback, ScoreTable)]  # type: ignore[attr-defined]
    [overlays] = [callback for callback in trainer.callbacks if isinstance(callback, Overlays)]  # type: ignore[attr-defined]
    results = {}
    for number, data in enumerate(sets):
        place = folder if number == 0 else folder / data.name
        place.mkdir(parents=True, exist_ok=True)
        overlays.path = place / "overlays.png"
        [scores] = trainer.test(task, data, verbose=False)
        results[data.name] = {name.removeprefix("test/"): value for name, value in scores.items()}
        if trainer.is_global_zero:
            table.write(place / "images.csv")
            write_curves(task.arrays, results[data.name], data.class_names, place)
            if len(sets) > 1:  # after each, so that an image that cannot be read costs only its own set
                write_rows(folder / "scores.csv", "dataset", results)
    return results


def write_curves(
    arrays: Mapping[str, NDArray[Any]], scores: Mapping[str, float], class_names: Sequence[str], folder: Path
) -> None:
    """Draw what the scores of a test hold besides numbers: reliability, confusion matrix."""
    if "reliability" in arrays:
        draw.draw_reliability(arrays["reliability"], scores["ece"], folder / "reliability.png")
    if "confusion" in arrays:
        confusion = arrays["confusion"].astype(int)
        draw.draw_confusion(confusion, class_names, folder / "confusion.png")
        rows = {
            name: dict(zip(class_names, row, strict=True))
            for name, row in zip(class_names, confusion.tolist(), strict=True)
        }
        write_rows(folder / "confusion.csv", "truth", rows)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record; what is no number, as the IoU of a class that is nowhere, becomes null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(part) for key, part in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    path.write_text(json.dumps(plain(record), indent=2, allow_nan=False) + "\n")


def write_rows(path: Path, key: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    """Write a CSV with a line for each name, `key` heading the names."""
    with path.open("w", newline="") as file:
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        writer = csv.DictWriter(file, [key, *columns])
        writer.writeheader()
        writer.writerows({key: name, **row} for name, row in rows.items())


def _predict(
    trainer: Trainer, pl_module: LightningModule, split: Split, index: int
) -> tuple[str, draw.Picture, draw.Picture, Prediction]:
    """Return name, image, mask and prediction of one sample at its own size."""
    data = _data(trainer)
    image, mask = data.read(data.listed(split)[index])
    batch: Batch = data.batch(split, [index])
    segmenter = pl_module.segmenter
    assert isinstance(segmenter, Segmenter)
    with torch.inference_mode(), trainer.precision_plugin.forward_context():
        logits = segmenter(batch.images.to(pl_module.device))[0]
        found = to_prediction(restore_size(logits, batch.contents[0], (mask.shape[0], mask.shape[1])))
    return batch.names[0], image, mask, found


def _array(tensor: torch.Tensor) -> draw.Picture:
    return np.asarray(tensor.cpu().numpy())


def _data(trainer: Trainer) -> SegmentationDataModule:
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, SegmentationDataModule)
    return data


def _scores(pl_module: LightningModule) -> Scores:
    assert isinstance(pl_module, SegmentationTask)
    return pl_module.scores_of("test")


def _spread(total: int, wanted: int) -> list[int]:
    """Return up to `wanted` different indices spread evenly over `total`."""
    return sorted({round(i) for i in np.linspace(0, total - 1, min(wanted, total))})
