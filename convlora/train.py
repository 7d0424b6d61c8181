"""Train: `python -m convlora.train dataset=kvasir model=sam_vit_b peft=conv_lora`."""

import csv
import pickle
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf
from rich.console import Console
from torch import nn

from convlora.build import (
    Config,
    command,
    is_half,
    make,
    make_loss,
    make_segmenter,
    make_test_sets,
    outline_segmenter,
    save_adapter,
)
from convlora.callbacks import (
    Overlays,
    RunCheckpoint,
    ScoreTable,
    StayStopped,
    finish_wandb,
    render_scores,
    test_each,
    write_json,
)
from convlora.data.module import SegmentationDataModule
from convlora.draw import colors_of
from convlora.metrics.scores import Scores
from convlora.segmenter import Segmenter
from convlora.task import SegmentationTask, check_identity

MEBIBYTE = 2**20
console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class TrainConfig:
    """The keys of conf/train.yaml, where they are explained."""

    dataset: Config
    model: Config
    peft: Config
    head: Config
    loss: Config
    metrics: Config
    optimizer: Config
    trainer: Config
    logger: Config
    augment: Config
    resize: Config
    early_stopping: Config
    test_sets: list[str]
    seed: int
    data_root: str
    run_dir: str
    ckpt_path: str | None
    compile: bool
    dry_run: bool


def train(config: TrainConfig) -> float | None:
    """Train, test the best epoch and write the run folder.

    Returns:
        The best validation score, which a sweep can optimise; None for a dry run.
    """
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    data: SegmentationDataModule = make("dataset", config.dataset)
    outline = outline_segmenter(config.model, config.peft, config.head, data.num_classes)
    if config.dry_run:
        trainer: Trainer = make("trainer", config.trainer, logger=False, enable_checkpointing=False)
        announce(trainer, data, outline, run_dir)
        return None
    ckpt_path = find_checkpoint(config.ckpt_path, run_dir)
    scores: Scores = make("metrics", config.metrics, class_names=data.class_names)
    loss = make_loss(config.loss, outline)
    check_monitor(config, scores)
    check_frozen_dtype(config)
    tests = [data, *make_test_sets(config.test_sets, "train", data)]
    data.setup("fit")
    for test in tests:  # a missing test set should not come out after the training
        test.setup("test")
    check_run_dir(run_dir, outline)
    try:
        return fit_and_test(config, tests, outline, loss, scores, run_dir, ckpt_path)
    finally:
        finish_wandb()


def fit_and_test(
    config: TrainConfig,
    tests: Sequence[SegmentationDataModule],
    outline: Segmenter,
    loss: nn.Module,
    scores: Scores,
    run_dir: Path,
    ckpt_path: Path | None,
) -> float | None:
    """Train on the first data set, test on all, write the run folder; returns the best validation score."""
    data, table = tests[0], ScoreTable()
    stop: EarlyStopping = make("early_stopping", config.early_stopping)
    best = RunCheckpoint(run_dir, "best", stop.monitor, stop.mode)
    callbacks: list[Callback] = [best, RunCheckpoint(run_dir, "last"), stop, StayStopped(), table]
    callbacks.append(Overlays(table))
    if config.trainer.get("enable_progress_bar", True):
        callbacks.append(RichProgressBar())
    trainer: Trainer = make(
        "trainer",
        config.trainer,
        logger=False,  # until it is sure that there will be something to log
        callbacks=callbacks,
        default_root_dir=str(run_dir),
        use_distributed_sampler=False,  # the data module's samplers know the ranks
        enable_model_summary=False,
    )
    if trainer.is_global_zero:
        announce(trainer, data, outline, run_dir)
    seed_everything(config.seed, workers=True, verbose=False)
    segmenter, identity = make_segmenter(config.model, config.peft, config.head, data.num_classes)
    if config.compile:
        segmenter.compile_encoder()
    optimizer = make("optimizer", config.optimizer)
    task = SegmentationTask(segmenter, loss, scores, optimizer, identity, config.seed)
    if ckpt_path is not None:  # refused before anything of the run is written over
        check_resumable(ckpt_path, task)
    trainer.loggers = make_loggers(config.logger, run_dir, ckpt_path)
    if trainer.is_global_zero:
        OmegaConf.save(asdict(config), run_dir / "config.yaml")
        for logger in trainer.loggers:
            logger.log_hyperparams(flatten(asdict(config)))

    start = time.monotonic()
    trainer.fit(task, data, ckpt_path=ckpt_path, weights_only=True)
    fitted = {
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "fit_seconds": round(time.monotonic() - start, 1),
    }
    if best.best_model_path:
        task.load_state_dict(read_checkpoint(Path(best.best_model_path))["state_dict"])
    path = run_dir / "adapter.safetensors"
    if trainer.is_global_zero:  # before the test, which may still meet a damaged image
        save_adapter(
            path, segmenter, asdict(config), colors_of(data.class_names, data.class_colors), identity
        )
    results = test_each(trainer, task, tests, run_dir)
    best_score = None if best.best_model_score is None else best.best_model_score.item()
    if trainer.is_global_zero:
        summary = {
            "dataset": data.name,
            "test": results[data.name],
            "test_sets": {name: scores for name, scores in results.items() if name != data.name},
            stop.monitor: best_score,
            **fitted,
            "trainable_parameters": count(segmenter, trainable=True),
            "total_parameters": count(segmenter),
            **identity,
        }
        write_json(run_dir / "summary.json", summary)
        console.print(render_scores(results))
        console.print(f"adapter: {path}")
    return best_score


def announce(trainer: Trainer, data: SegmentationDataModule, outline: Segmenter, run_dir: Path) -> None:
    """Print what is about to be trained, before anything takes time."""
    devices = trainer.num_devices * trainer.num_nodes
    accumulation = trainer.accumulate_grad_batches
    console.print(
        f"parameters      {count(outline, trainable=True):,} trainable of {count(outline):,}\n"
        f"image size      {data.resize.image_size} x {data.resize.image_size}\n"
        f"effective batch {data.batch_size * devices * accumulation} = {data.batch_size} per device x "
        f"{devices} device{'s' * (devices > 1)} x {accumulation} accumulated\n"
        f"run folder      {run_dir}"
    )


def make_loggers(config: Config, run_dir: Path, ckpt_path: Path | None) -> list[Logger]:
    """Return the CSV logger and the chosen one; a resumed run keeps the curves it had."""
    table = CSVLogger(run_dir, name="", version="", flush_logs_every_n_steps=1)
    if ckpt_path is not None:
        keep_metrics(table, run_dir / "metrics.csv", ckpt_path)
    chosen: Logger = make("logger", config, save_dir=str(run_dir))
    return [table] if isinstance(chosen, CSVLogger) else [table, chosen]


@rank_zero_only
def keep_metrics(logger: CSVLogger, path: Path, ckpt_path: Path) -> None:
    """Hand the rows of an earlier `metrics.csv` on to the logger, which would begin the file anew.

    Rows beyond the checkpoint are left out: training logs them again.
    """
    if not path.is_file():
        return
    step = read_checkpoint(ckpt_path)["global_step"]
    with path.open(newline="") as file:
        rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    logger.experiment.metrics.extend(row for row in rows if int(row["step"]) < step)
    logger.save()


def find_checkpoint(ckpt_path: str | None, run_dir: Path) -> Path | None:
    """Return the Lightning checkpoint to resume from.

    Raises:
        FileNotFoundError: there is none.
        FileExistsError: the run folder holds a run, which starting anew would overwrite.
    """
    if ckpt_path is None:
        if (run_dir / "last.ckpt").is_file():
            raise FileExistsError(
                f"{run_dir} already holds a run; resume it with ckpt_path=last or choose another run_dir"
            )
        return None
    path = run_dir / "last.ckpt" if ckpt_path == "last" else Path(ckpt_path)
    if not path.is_file():
        runs = sorted(run_dir.parent.glob("*/last.ckpt"), key=lambda file: file.stat().st_mtime)
        hint = f" The newest run with one is run_dir={runs[-1].parent}" if runs else ""
        raise FileNotFoundError(
            f"ckpt_path={ckpt_path}: no checkpoint at {path}; name the run to resume by run_dir=FOLDER.{hint}"
        )
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a Lightning checkpoint of this library, without running code.

    Raises:
        ValueError: the file is damaged or no such checkpoint.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{path} is no checkpoint or is damaged; resume from another ckpt_path") from error
    if not isinstance(checkpoint, dict) or "identity" not in checkpoint:
        raise ValueError(f"{path} is no checkpoint of a convlora run; resume from RUN/last.ckpt")
    return checkpoint


def check_resumable(ckpt_path: Path, task: SegmentationTask) -> None:
    """Refuse a checkpoint of other base weights or other trained tensors; raises ValueError."""
    checkpoint = read_checkpoint(ckpt_path)
    check_identity(checkpoint["identity"], task.identity)
    task.segmenter.check_trainable_state(checkpoint["state_dict"])


def check_monitor(config: TrainConfig, scores: Scores) -> None:
    """Refuse to watch a score that no validation gives; raises ValueError."""
    known = [f"val/{name}" for name in ("loss", *scores.names)]
    if config.early_stopping["monitor"] not in known:
        raise ValueError(
            f"early_stopping.monitor={config.early_stopping['monitor']} is not one of {', '.join(known)}"
        )


def check_frozen_dtype(config: TrainConfig) -> None:
    """Refuse half-precision frozen weights in single-precision training; raises ValueError."""
    held, precision = config.model.get("frozen_dtype", "float32"), str(config.trainer["precision"])
    if held != "float32" and not is_half(precision):
        raise ValueError(
            f"model.frozen_dtype={held} does not go with trainer.precision={precision}, which multiplies in "
            "single precision; set trainer.precision=bf16-mixed"
        )


def check_run_dir(run_dir: Path, segmenter: Segmenter) -> None:
    """Make sure, before training, that the run folder can take the run.

    Raises:
        OSError: it cannot be written to, or the disk has no room for the checkpoints.
    """
    try:
        with tempfile.TemporaryFile(dir=run_dir):
            pass
    except OSError as error:
        raise OSError(
            f"cannot write to the run folder {run_dir} ({error}); choose another run_dir"
        ) from error
    # Two checkpoints and one being written, each of the weights and Adam's two moments; then the adapter.
    needed = count(segmenter, trainable=True) * 4 * (3 * 3 + 1) + 16 * MEBIBYTE
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise OSError(
            f"the run folder {run_dir} has {free / MEBIBYTE:.0f} MiB left on its disk, the checkpoints need "
            f"{needed / MEBIBYTE:.0f} MiB; free some or choose another run_dir"
        )


def count(segmenter: Segmenter, trainable: bool = False) -> int:
    """Return the number of parameters, all or trainable."""
    return sum(p.numel() for p in segmenter.parameters() if p.requires_grad or not trainable)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested keys as `peft.rank`, the form that dashboards group and filter by."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


main = command("train", TrainConfig, train)

if __name__ == "__main__":
    main()
