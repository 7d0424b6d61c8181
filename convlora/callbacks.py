"""What a run shows of itself: progress, costs, pictures in logs and on pages."""

import math
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn
from rich.table import Table

from convlora import draw
from convlora.checkpoint import RunCheckpoint
from convlora.data.module import Batch, SegmentationDataModule, Split
from convlora.inference import Predictor
from convlora.routing import Routing
from convlora.run import MEBIBYTE, ScoreTable, write_rows
from convlora.task import SegmentationTask

FIXED, EXTREME = 4, 2  # samples of an overlay page: always the same ones, and the best and the worst
SIDE = 320  # px, longest of an image in a table

console = Console(highlight=False, soft_wrap=True)


class Vitals(Callback):
    """Logs what a training costs and how steep it is: images a second, memory, norm of the gradient.

    The norm is of all trained parameters before it is clipped.
    """

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count anew, so that what a validation took counts for nothing."""
        self._since, self._images = time.monotonic(), 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._images += len(batch.images) * trainer.world_size

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Log at the steps at which the losses are logged, which alone wait for the device."""
        if (trainer.global_step + 1) % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        pl_module.log("train/grad_norm", torch.nn.utils.get_total_norm(gradients))
        costs = {
            "train/images_per_second": self._images / (time.monotonic() - self._since),
            "train/memory_mib": _memory(pl_module.device),
        }
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):  # metrics.csv is the same of every run with these settings
                logger.log_metrics(costs, trainer.global_step)
        self._since, self._images = time.monotonic(), 0


def _memory(device: torch.device) -> float:
    """Return the peak memory so far, MiB: of the allocator on a GPU, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MEBIBYTE
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (MEBIBYTE if sys.platform == "darwin" else 1024)


def make_progress(enabled: bool) -> Callback:
    """Return a progress bar in a terminal; elsewhere, or where it is not wanted, a line for each epoch."""
    return ProgressBar() if enabled and sys.stdout.isatty() else EpochLines()


class ProgressBar(RichProgressBar):
    """Lightning's bar within 100 columns: short, without its speed and the logger's version number."""

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        description, _, batches, times, _ = super().configure_columns(trainer)
        return [description, BarColumn(bar_width=12), batches, times]

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        shown = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in shown.items() if name != "v_num"}


class EpochLines(Callback):
    """Prints a line after each epoch: time, mean losses, the score that chooses, and the best so far."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start, self.batches = time.monotonic(), 0
        self.sums: dict[str, Any] = defaultdict(float)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Add up the losses, without waiting for the device."""
        self.batches += 1
        for name in ("train/loss", "train/aux_loss"):
            if name in trainer.callback_metrics:
                self.sums[name] += trainer.callback_metrics[name].detach()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        best = next(each for each in trainer.checkpoint_callbacks if isinstance(each, RunCheckpoint))
        values = {name: (total / self.batches).item() for name, total in self.sums.items()}
        shown = [name for name in ("val/loss", str(best.monitor)) if name in trainer.callback_metrics]
        values |= {name: trainer.callback_metrics[name].item() for name in shown}
        parts = [f"{name} {value:.4f}" for name, value in values.items()]
        if best.monitor in values:
            better = max if best.mode == "max" else min
            before = values[best.monitor] if best.best_model_score is None else best.best_model_score.item()
            parts.append(f"best {better(values[best.monitor], before):.4f}")
        seconds = round(time.monotonic() - self.start)
        console.print(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {seconds // 60}:{seconds % 60:02}  "
            + "  ".join(parts)
        )


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


class Overlays(Callback):
    """Draws image, truth, prediction and error: to the logs after each validation, to a page after a test.

    Args:
        table: per-image scores of the same test.

    Attributes:
        path: PNG with a fixed set of test samples and the best and worst by the primary score.
        rankings: by test set, its images from the worst on, with the pictures of those on the page.
    """

    def __init__(self, table: ScoreTable):
        self.path: Path | None = None
        self.rankings: dict[str, dict[str, draw.Picture | None]] = {}
        self.table = table

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send a fixed set of validation samples to W&B and TensorBoard."""
        loggers = [each for each in trainer.loggers if isinstance(each, WandbLogger | TensorBoardLogger)]
        if not loggers or trainer.sanity_checking or not trainer.is_global_zero:
            return
        data = _data(trainer)
        colors = draw.colors_of(data.class_names, data.class_colors)
        names = dict(
            enumerate(["background", *data.class_names] if data.num_classes == 1 else data.class_names)
        )
        samples = [
            _sample(trainer, pl_module, "val", index) for index in _spread(len(data.listed("val")), FIXED)
        ]
        step, tag = trainer.global_step, "val/overlays"
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                layers = [
                    {
                        name: {"mask_data": mask, "class_labels": names}
                        for name, mask in (("truth", sample.mask), ("prediction", sample.classes))
                    }
                    for sample in samples
                ]
                titles = [sample.title for sample in samples]
                logger.log_image(
                    tag, [sample.image for sample in samples], step, caption=titles, masks=layers
                )
            else:
                for number, sample in enumerate(samples):
                    picture = draw.side_by_side(sample, colors)
                    logger.experiment.add_image(f"{tag}/{number}", picture, step, dataformats="HWC")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or not self.table.rows or self.path is None:
            return
        assert isinstance(pl_module, SegmentationTask)
        data, scores = _data(trainer), pl_module.scores_of("test")
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
        rows, colors = [], draw.colors_of(data.class_names, data.class_colors)
        ranking = self.rankings[data.name] = dict.fromkeys(ranked, None)
        for name, roles in titles.items():
            label = f"{', '.join(roles)}: {Path(name).name}"
            score = f"{scores.primary} {self.table.rows[name][scores.primary]:.3f}"
            rows.append(_sample(trainer, pl_module, "test", order[name], label, score))
            ranking[name] = draw.shrink(draw.side_by_side(rows[-1], colors), 3 * SIDE)
        draw.draw_page(rows, colors, self.path)


def test_each(
    trainer: Trainer, task: SegmentationTask, sets: Sequence[SegmentationDataModule], folder: Path
) -> dict[str, dict[str, float]]:
    """Score a model on several test sets.

    The first one's pictures and tables go to `folder`, those of the others to a folder in it by their name,
    and of several sets `scores.csv` has a row for each.

    Args:
        trainer: with a `ScoreTable` and `Overlays` among its callbacks.
        task: the model.
        sets: to test on.
        folder: of the run or the evaluation.

    Returns:
        By data set, the scores by name.
    """
    [table] = [callback for callback in trainer.callbacks if isinstance(callback, ScoreTable)]  # type: ignore[attr-defined]
    [overlays] = [callback for callback in trainer.callbacks if isinstance(callback, Overlays)]  # type: ignore[attr-defined]
    routings = [callback for callback in trainer.callbacks if isinstance(callback, Routing)]  # type: ignore[attr-defined]
    results = {}
    for number, data in enumerate(sets):
        place = folder if number == 0 else folder / data.name
        if trainer.is_global_zero:
            place.mkdir(parents=True, exist_ok=True)
        overlays.path = place / "overlays.png"
        for routing in routings:
            routing.folder = place
        [scores] = trainer.test(task, data, verbose=False)
        results[data.name] = {name.removeprefix("test/"): value for name, value in scores.items()}
        if trainer.is_global_zero:
            write_rows(place / "images.csv", "image", table.rows)
            write_curves(task.arrays, results[data.name], data.class_names, place)
            if len(sets) > 1:  # after each, so that an image that cannot be read costs only its own set
                write_rows(folder / "scores.csv", "dataset", results)
    return results


def write_curves(
    arrays: Mapping[str, NDArray[Any]], scores: Mapping[str, float], class_names: Sequence[str], folder: Path
) -> None:
    """Draw what the scores of a test hold besides numbers: reliability, confusion matrix."""
    if "reliability" in arrays:
        bins = arrays["reliability"]
        draw.draw_reliability(bins, scores["ece"], folder / "reliability.png")
        columns = ("probability", "true", "pixels")
        rows = {
            str(number): dict(zip(columns, values, strict=True))
            for number, values in enumerate(bins.T.tolist(), start=1)
        }
        write_rows(folder / "reliability.csv", "bin", rows)
    if "confusion" in arrays:
        confusion = arrays["confusion"].astype(int)
        draw.draw_confusion(confusion, class_names, folder / "confusion.png")
        rows = {
            name: dict(zip(class_names, row, strict=True))
            for name, row in zip(class_names, confusion.tolist(), strict=True)
        }
        write_rows(folder / "confusion.csv", "truth", rows)


def _sample(
    trainer: Trainer, pl_module: LightningModule, split: Split, index: int, title: str = "", score: str = ""
) -> draw.Row:
    """Return one sample of a split with its prediction, at its own size."""
    data = _data(trainer)
    assert isinstance(pl_module, SegmentationTask)
    context = trainer.precision_plugin.forward_context
    colors = draw.colors_of(data.class_names, data.class_colors)
    image, mask = data.read(data.listed(split)[index])
    cleaning = pl_module.cleaning
    predictor = Predictor(pl_module.segmenter, data.loading.resize, colors, context, cleaning=cleaning)
    found = pl_module.found(image, mask, predictor)
    return draw.Row(title or data.names(split)[index], image, mask, found.classes, found.prob, score)


def _data(trainer: Trainer) -> SegmentationDataModule:
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, SegmentationDataModule)
    return data


def _spread(total: int, wanted: int) -> list[int]:
    """Return up to `wanted` different indices spread evenly over `total`."""
    return sorted({round(i) for i in np.linspace(0, total - 1, min(wanted, total))})
