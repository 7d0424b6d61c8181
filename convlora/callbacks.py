"""Overlays, scores per image and the W&B logger."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import torch
import wandb
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.table import Table

from convlora.data.base import Batch, SegmentationDataModule, Split
from convlora.segmenter import Segmenter, restore_size, to_gray

matplotlib.use("agg")

FIXED, EXTREME = 4, 2  # samples of an overlay page: always the same ones, and the best and the worst
TRUTH, PREDICTION = (0, 255, 0), (255, 64, 0)  # contour colours, RGB


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


def render_scores(title: str, scores: Mapping[str, float]) -> Table:
    """Return a terminal table of mean scores."""
    table = Table("score", "mean", title=title, title_justify="left")
    table.columns[1].justify = "right"
    for name, value in scores.items():
        table.add_row(name, f"{value:.4f}")
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
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            columns = list(next(iter(self.rows.values())))
            writer.writerow(["image", *columns])
            writer.writerows([name, *row.values()] for name, row in self.rows.items())


class Overlays(Callback):
    """Draws image, truth, prediction and error: to W&B after each validation, to a page after the test.

    Args:
        path: PNG with a fixed set of test samples and the best and worst by Dice.
        table: per-image scores of the same test.
    """

    def __init__(self, path: Path, table: ScoreTable):
        self.path = path
        self.table = table

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send a fixed set of validation samples to W&B."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        if not loggers or trainer.sanity_checking or not trainer.is_global_zero:
            return
        names = {0: "background", 1: _data(trainer).class_names[0]}
        images = []
        for index in _spread(len(_data(trainer).listed("val")), FIXED):
            name, image, mask, prob = _predict(trainer, pl_module, "val", index)
            masks = {"truth": mask, "prediction": (prob >= 128).astype(np.uint8)}
            layers = {key: {"mask_data": value, "class_labels": names} for key, value in masks.items()}
            images.append(wandb.Image(image, masks=layers, caption=name))
        for logger in loggers:
            logger.experiment.log({"val/overlays": images, "trainer/global_step": trainer.global_step})

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page."""
        if not trainer.is_global_zero or not self.table.rows:
            return
        data = _data(trainer)
        order = {name: index for index, name in enumerate(data.names("test"))}
        scored = list(self.table.rows)
        ranked = sorted(scored, key=lambda name: self.table.rows[name].get("dice", 0.0))
        chosen = [("sample", scored[i]) for i in _spread(len(scored), FIXED)]
        chosen += [("best", name) for name in ranked[: -EXTREME - 1 : -1]]
        chosen += [("worst", name) for name in ranked[:EXTREME]]
        rows = [
            (title, self.table.rows[name], *_predict(trainer, pl_module, "test", order[name]))
            for title, name in chosen
        ]
        draw_page(rows, self.path)


def draw_page(
    rows: list[tuple[str, dict[str, float], str, NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]],
    path: Path,
) -> None:
    """Draw one row per sample: title, scores, name, image [h, w, 3], mask of 0/1, 8-bit probability."""
    figure = Figure(figsize=(12, 3.1 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 4, squeeze=False)
    for (title, scores, name, image, mask, prob), line in zip(rows, axes, strict=True):
        panels = (
            (f"{title}: {Path(name).name}", image),
            ("truth", mask * 255),
            (f"prediction, dice {scores.get('dice', float('nan')):.3f}", prob),
            ("error: missed green, false red", error_map(image, mask, prob)),
        )
        for axis, (label, picture) in zip(line, panels, strict=True):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
            axis.set_title(label, fontsize=9)
            axis.set_axis_off()
    figure.savefig(path, dpi=75)


def error_map(
    image: NDArray[np.uint8], mask: NDArray[np.uint8], prob: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Return the dimmed image with missed pixels in green and falsely found ones in red."""
    picture = image // 3
    found = prob >= 128
    picture[(mask == 1) & ~found] = TRUTH
    picture[(mask == 0) & found] = PREDICTION
    return picture


def draw_contours(image: NDArray[np.uint8], found: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return the image with the outline of a predicted mask, its inside slightly tinted."""
    picture = image.copy()
    picture[found] = (0.7 * picture[found] + 0.3 * np.array(PREDICTION)).astype(np.uint8)
    contours, _ = cv2.findContours(found.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    width = max(1, round(max(image.shape[:2]) / 400))
    cv2.drawContours(picture, contours, -1, PREDICTION, width)
    return picture


def _predict(
    trainer: Trainer, pl_module: LightningModule, split: Split, index: int
) -> tuple[str, NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """Return name, image, mask and 8-bit probability of one sample at its own size."""
    data = _data(trainer)
    image, mask = data.read(data.listed(split)[index])
    batch: Batch = data.batch(split, [index])
    segmenter = pl_module.segmenter
    assert isinstance(segmenter, Segmenter)
    with torch.inference_mode(), trainer.precision_plugin.forward_context():
        logits = segmenter(batch.images.to(pl_module.device))[0]
        prob = to_gray(restore_size(logits, batch.contents[0], (mask.shape[0], mask.shape[1])))
    return batch.names[0], image, mask, prob[0].cpu().numpy()


def _data(trainer: Trainer) -> SegmentationDataModule:
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, SegmentationDataModule)
    return data


def _spread(total: int, wanted: int) -> list[int]:
    """Return up to `wanted` different indices spread evenly over `total`."""
    return sorted({round(i) for i in np.linspace(0, total - 1, min(wanted, total))})
