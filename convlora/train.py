"""Train: `python -m convlora.train dataset=kvasir model=sam_vit_b peft=conv_lora`."""

import traceback
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from signal import SIGUSR1
from typing import Any

from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, Logger
from rich.console import Console

from convlora import adapter, advice, draw, results, run
from convlora.announce import announce, devices_of
from convlora.build import Parts, is_folder_given, make_parts, make_segmenter, make_trainer, match_width
from convlora.callbacks import (
    Overlays,
    Vitals,
    make_progress,
    render_scores,
    test_each,
)
from convlora.checkpoint import (
    RunCheckpoint,
    StayStopped,
    WholeFiles,
    check_resumable,
    next_epoch,
    read_checkpoint,
)
from convlora.cli import command, given_overrides
from convlora.draw import colors_of
from convlora.losses import balanced
from convlora.origin import Origin, read_origin
from convlora.schema import Config, make
from convlora.task import SegmentationTask
from convlora.tracking import finish_wandb, publish

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
    prompts: Config
    match: int | None
    data_root: str
    run_dir: str
    sweep_dir: str
    init: str | None
    resume: str | None
    compile: bool
    dry_run: bool


def train(config: TrainConfig) -> float | None:
    """Train, test the best epoch and write the run folder.

    Returns:
        The best validation score, which a sweep can optimise; None for a dry run.
    """
    folder, config = Path(config.resume or config.run_dir), settle(config)
    if config.resume is None:
        run.check_unused(folder)
    else:
        run.check_same_settings(folder, asdict(config))
    parts = make_parts("train", config)
    origin = find_origin(config, parts)
    told = origin.told if origin else config.init
    if config.dry_run:
        announce(config, parts, folder, None, told)
        return None
    parts.data.setup("fit")
    for test in parts.tests:  # a missing test set should not come out after the training
        test.setup("test")
    bands = parts.data.measure_bands()
    parts.data.use_bands(bands, "train", "val")
    for test in parts.tests:  # nor an image of another kind
        test.use_bands(bands, "test")
    if terms := balanced(parts.loss):
        shares = parts.data.class_shares()
        for term in terms:
            term.balance(shares)
    table = run.ScoreTable()
    callbacks: list[Callback] = [*parts.callbacks.values(), RunCheckpoint("last"), StayStopped()]
    callbacks += [table, Overlays(table), Vitals(), make_progress(config.trainer["enable_progress_bar"])]
    trainer = make_trainer(config.trainer, callbacks, default_root_dir=str(folder))
    trainer.strategy.checkpoint_io = WholeFiles()
    announce(config, parts, folder, trainer, told)
    with ExitStack() as stack:
        came = stack.enter_context(run.interruptible(trainer.global_rank))
        stack.enter_context(run.watch_ranks(lambda: run.what_is_kept(folder, trainer, ChildProcessError())))
        try:
            if trainer.is_global_zero:
                size = run.count(parts.outline, trainable=True)
                stack.enter_context(run.hold(folder, size, lambda: trainer.global_step > 0))
            if config.resume is None:  # nor has another been here since
                run.check_unused(folder)
            with run.own_processes(trainer):
                return fit_and_test(config, parts, folder, trainer, origin)
        except BaseException as error:
            is_told = trainer.global_step > 0 or isinstance(error, KeyboardInterrupt | SystemExit)
            if trainer.is_global_zero and is_told:
                console.print(run.what_is_kept(folder, trainer, error), markup=False)
            if run.is_out_of_memory(error) and trainer.is_global_zero:
                traceback.clear_frames(error.__traceback__)  # which hold what takes the memory
                told = f"memory ran out: {advice.shortage(config, parts)}"
                raise OSError(f"{told}; resume=RUN takes checkpointing, all else is another run") from error
            if SIGUSR1 in came:
                console.print(run.requeue(folder, parts.data.start_epoch, is_folder_given()), markup=False)
            if "DataLoader worker (pid" in str(error):  # torch's word for a loader process that was killed
                raise OSError(f"{error}; if memory ran out, lower loading.num_workers") from error
            if trainer.world_size > 1 and "by peer" in str(error):  # gloo's word for a process that has ended
                raise OSError("the process of another device has ended; see above") from error
            raise
        finally:
            with suppress(RuntimeError):  # torch's, of a loader process that the same signal has ended
                finish_wandb()


def settle(config: TrainConfig) -> TrainConfig:
    """Return the config with the width of the method that `match` asks for."""
    return config if config.match is None else replace(config, peft=match_width(config))


def rejoin(config: TrainConfig) -> float | None:
    """Go on with a sweep's run, as `train` does, unless it has ended; returns its best validation score.

    Raises:
        ValueError: it is another run than these settings make.
    """
    folder = Path(config.run_dir)
    ended = results.read(folder)
    if ended is None:
        return train(config)
    run.check_same_settings(folder, asdict(settle(config)))
    console.print(f"{folder} has ended before", markup=False)
    return ended.validation


def find_origin(config: TrainConfig, parts: Parts) -> Origin | None:
    """Read the adapter that `init` names, unless the run goes on from a checkpoint of its own.

    Raises:
        FileNotFoundError: there is none.
        ValueError: what `read_origin` refuses, or another file than the run began with.
    """
    if config.init is None or (config.resume and (Path(config.resume) / run.LAST).is_file()):
        return None
    origin = read_origin(config.init, parts)
    if config.resume:
        began = run.read_record(Path(config.resume))["init_sha256"]
        if began != origin.sha256:
            raise ValueError(
                f"{origin.path} is another adapter than the run in {config.resume} began with (init_sha256 "
                f"{origin.sha256}, not {began}); put that file back, or train anew in another run_dir"
            )
    return origin


def fit_and_test(
    config: TrainConfig, parts: Parts, folder: Path, trainer: Trainer, origin: Origin | None
) -> float | None:
    """Train on the first data set, test on all, write the run folder; returns the best validation score."""
    data, checkpoint = parts.data, None
    seed_everything(config.seed, workers=True, verbose=False)
    segmenter, identity = make_segmenter(parts.backbone, parts.method, parts.head, data.num_classes)
    if origin is not None:
        origin.give(segmenter, identity)
    if config.compile:
        segmenter.compile_encoder()
    settings = asdict(config) | {"run_dir": str(folder), "resume": None}
    del settings["sweep_dir"]  # of a sweep, not of its runs
    if config.init is not None:
        settings["init_sha256"] = origin.sha256 if origin else run.read_record(folder)["init_sha256"]
    colors = colors_of(data.class_names, data.class_colors)
    precision, side, bands = str(trainer.precision), data.median_side(), data.bands
    metadata = adapter.describe(settings, colors, identity, precision, side, bands)
    facts = {
        **identity,
        "training images": data.content("train"),
        "validation images": data.content("val"),
        "devices": devices_of(trainer),
        "precision": precision,
        **({} if bands is None else {"bands": bands.to_json()}),
        **({"class weights": terms[0].told(data.class_names)} if (terms := balanced(parts.loss)) else {}),
        **({} if config.init is None else {"init_sha256": settings["init_sha256"]}),
    }
    task = SegmentationTask(
        segmenter, parts.loss, parts.scores, parts.optimizer, metadata, facts, config.seed, parts.prompts
    )
    last = folder / run.LAST
    if config.resume and last.is_file():  # a run that saved nothing yet begins anew
        checkpoint = read_checkpoint(last)
        check_resumable(checkpoint, task, last)
        data.start_epoch = next_epoch(checkpoint)
    trainer.loggers = make_loggers(config.logger, folder, checkpoint)
    if trainer.is_global_zero:
        run.write_record(folder, given_overrides(), settings)
        for logger in trainer.loggers:
            logger.log_hyperparams(run.flatten(settings))
    trainer.fit(task, data, ckpt_path=last if checkpoint else None, weights_only=True)
    return save_and_test(parts, folder, trainer, task)


def save_and_test(parts: Parts, folder: Path, trainer: Trainer, task: SegmentationTask) -> float | None:
    """Save the best epoch as an adapter, test it and summarise the run; returns its validation score."""
    best = next(each for each in trainer.checkpoint_callbacks if isinstance(each, RunCheckpoint))
    fitted = {
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "fit_seconds": round(task.fit_seconds, 1),
    }
    stopping = [each for each in trainer.early_stopping_callbacks if each.stopped_epoch]
    if trainer.is_global_zero and stopping:
        console.print(
            f"stopped after epoch {trainer.current_epoch} of {trainer.max_epochs} by "
            f"callbacks.early_stopping, which follows {stopping[0].monitor}"
        )
    if best.best_model_path:
        task.load_state_dict(read_checkpoint(Path(best.best_model_path))["state_dict"])
    path = folder / adapter.NAME
    if trainer.is_global_zero:  # before the test, which may still meet a damaged image
        adapter.save(path, task.state_dict(), task.metadata)
    overlays = next(each for each in trainer.callbacks if isinstance(each, Overlays))  # type: ignore[attr-defined]
    results = test_each(trainer, task, parts.tests, folder)
    score = None if best.best_model_score is None else best.best_model_score.item()
    if trainer.is_global_zero:
        first, settings = parts.data.name, run.flatten(run.read_record(folder))
        summary = {
            "dataset": first,
            "test": results[first],
            "test_sets": {name: scores for name, scores in results.items() if name != first},
            str(best.monitor): score,
            **fitted,
            "trainable_parameters": run.count(task.segmenter, trainable=True),
            "total_parameters": run.count(task.segmenter),
            **task.facts,
            "settings": {key: value for key, value in settings.items() if run.matters(key)},
        }
        shown = ("train/loss", "train/aux_loss", "train/lr", "val/")
        curves = {name: points for name, points in run.read_curves(folder).items() if name.startswith(shown)}
        draw.draw_curves(curves, str(best.monitor), score, folder / "curves.png")
        run.write_json(folder / run.SUMMARY, summary)
        publish(trainer.loggers, folder, summary, best, overlays.rankings)
        console.print(render_scores(results))
        console.print(f"adapter: {path}")
    return score


def make_loggers(config: Config, folder: Path, checkpoint: dict[str, Any] | None) -> list[Logger]:
    """Return the CSV logger and the chosen one; a resumed run keeps the curves it had."""
    table = CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)
    if checkpoint is not None:
        run.keep_metrics(table, folder / run.METRICS, checkpoint["global_step"])
    chosen: Logger = make("logger", config, save_dir=str(folder))
    return [table] if isinstance(chosen, CSVLogger) else [table, chosen]


def replay(folder: str) -> list[str]:
    """Return the arguments of the run in a folder."""
    command: list[str] = run.read_record(Path(folder))["command"]
    return command


main = command("train", TrainConfig, train, folder="run_dir", replay=replay, rejoin=rejoin)

if __name__ == "__main__":
    from convlora.train import main as command_of_train  # of __main__, nothing can be sent to other processes

    command_of_train()
