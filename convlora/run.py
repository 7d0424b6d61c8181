"""The run folder: held by one process, with its checkpoints, its record and its tables."""

import csv
import fcntl
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_only

from convlora.checkpoint import next_epoch, read_checkpoint
from convlora.segmenter import Segmenter

MEBIBYTE = 2**20
RECORD, LAST, BEST, SUMMARY = "config.yaml", "last.ckpt", "best.ckpt", "summary.json"
METRICS, SCORES = "metrics.csv", "scores.json"
STOPPING = 60  # seconds that one of several processes has to stop in
# What Lightning tells the processes that it starts
LAUNCHED = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
# What a run writes before its first step; all else in its folder is somebody's
OWN = (RECORD, f"{RECORD}.new", "hparams.yaml", METRICS, "wandb", "tensorboard", ".lock")
# Settings in which a resumed run may differ: where things lie, and what is shown of them.
FREE = (
    "command",
    "init_sha256",
    "data_root",
    "run_dir",
    "sweep_dir",
    "output",
    "resume",
    "dry_run",
    "dataset.root",
    "dataset.source",
    "model.weights",
    "model.url",
    "model.activation_checkpointing",
    "loading.num_workers",
    "logger",
    "callbacks.routing",
    "metrics.validate",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
)
# Settings that came later, and what held where the record of a run does not name them
LATER: dict[str, Any] = {
    "init": None,
    "dataset.lists": None,
    "prompts._target_": "convlora.prompts.Prompts",
    "prompts.box": 0.0,
    "loading.channels": None,
    "loading.percentiles": [2, 98],
    "loss.class_weights": None,
    "model.decoder_eps": 1e-5,
    "peft.b_rate": 1.0,
    "peft.gate.sees": "mean",
    "peft.gate.balance": 0.01,
    "peft.gate.schedule": "constant",
}


@contextmanager
def hold(folder: Path, size: int, began: Callable[[], bool]) -> Iterator[None]:
    """Make a run folder and keep other processes out of it; remove what a run that never began left in it.

    Args:
        folder: of the run.
        size: number of trained parameters, for which the disk must have room.
        began: returns whether the run has made anything worth keeping.

    Raises:
        OSError: it cannot be written to, the disk has no room for the checkpoints, or another process trains
            in it. The lock ends with its process, however that ends.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / ".lock"
    made += [] if path.exists() else [path]
    kept = set(folder.iterdir()) if folder.is_dir() else set()
    try:  # from before anything is made, since a signal may come at any moment
        with _lock(folder, path) as lock:
            kept = set(folder.iterdir()) - set(made)
            lock.truncate(0)
            lock.write(
                f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M')}"
            )
            lock.flush()
            check_room(folder, size)
            yield
    except InUseError:
        raise
    except BaseException:
        if not began():
            for path in {folder / name for name in OWN} - kept:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            remove_empty(made)
        raise


class InUseError(OSError):
    """Another process holds the run folder."""


def _lock(folder: Path, path: Path) -> IO[str]:
    """Make a run folder and return its lock file, held until it is closed; raises what `hold` does."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        lock = path.open("a+")
    except OSError as error:
        raise OSError(f"cannot write to the run folder {folder} ({error}); choose another run_dir") from error
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        lock.seek(0)
        raise InUseError(
            f"{folder} is in use by {lock.read().strip() or 'another process'}; wait until it has ended, "
            "stop it, or choose another run_dir"
        ) from error
    return lock


def check_room(folder: Path, size: int) -> None:
    """Refuse to train where the disk has no room for the checkpoints; raises OSError."""
    # Two checkpoints and one being written, each of the weights and Adam's two moments; then the adapter.
    needed = size * 4 * (3 * 3 + 1) + 16 * MEBIBYTE
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"the run folder {folder} has {free / MEBIBYTE:.0f} MiB left on its disk, the checkpoints "
            f"need {needed / MEBIBYTE:.0f} MiB; free some or choose another run_dir"
        )


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove those folders that are empty, in their order."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def interruptible(rank: int) -> Iterator[list[int]]:
    """Let SIGTERM end a run as Ctrl-C does, once: what comes after the first does not disturb the ending.

    In a job of SLURM so does SIGUSR1, by which it announces that its time is up. Only the process that saves
    follows it, since another that left would keep that one waiting; SLURM ends them all. Of several processes
    one that has not stopped after `STOPPING` seconds is ended by an alarm.

    Args:
        rank: of this process.

    Yields:
        The signal that came, once it has come.
    """
    process = os.getpid()
    came: list[int] = []

    def stop(number: int, frame: Any) -> None:
        if os.getpid() == process and not came:  # a loader process is ended by this one
            came.append(number)
            if torch.distributed.is_initialized():  # the end, should this process wait for one that is gone
                signal.alarm(STOPPING)
            while signal.getsignal(signal.SIGCHLD) != child_ended:
                with suppress(RuntimeError):  # torch's, of a loader process that the same signal has ended
                    signal.signal(signal.SIGCHLD, child_ended)
            raise KeyboardInterrupt

    def child_ended(number: int, frame: Any) -> None:
        """Do nothing, unlike SIG_DFL: where that takes a handler's place, Python tells of a race."""

    wanted = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in wanted}
    before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, child_ended)  # Lightning puts this one back
    if slurm_job() and signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:  # not that of hydra's launcher
        before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, signal.SIG_IGN if rank else stop)
    try:
        yield came
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


def slurm_job() -> str | None:
    """Return the job of SLURM, or the task of an array of jobs, that this process belongs to."""
    if not SLURMEnvironment.detect():
        return None
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID")


def is_requeued() -> bool:
    """Return whether SLURM has started this job before."""
    return slurm_job() is not None and int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0


def requeue(folder: Path, first: int, is_given: bool) -> str:
    """Let SLURM start this job again later, if it would get further; returns what a user is told of it.

    Args:
        folder: of the run.
        first: epoch, from 0, that the job began with.
        is_given: whether the command names the folder, and so finds it again.
    """
    job, again = slurm_job(), in_shell("resume", folder)
    last = folder / LAST
    if not is_given:
        return f"not requeued: SLURM's job {job} would begin another run; go on with this one by {again}"
    if not last.is_file() or next_epoch(read_checkpoint(last)) <= first:
        return f"not requeued: no epoch has ended in the time of SLURM's job {job}; {again} with more time"
    try:
        subprocess.run(["scontrol", "requeue", str(job)], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"not requeued: {error}; submit a job with {again}"
    return f"requeued: SLURM's job {job} goes on here"


@contextmanager
def watch_ranks(tell: Callable[[], str]) -> Iterator[None]:
    """Tell a user when the process of another device ends, at which Lightning kills this one too, unsaid.

    Args:
        tell: returns what else is to be said.
    """

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            what = record.getMessage().partition(". Forcefully")[0]
            print(f"\n{what}: the others are stopped too\n{tell()}", flush=True)  # noqa: T201

    logger, handler = logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script"), Told()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def own_processes(trainer: Trainer) -> Iterator[None]:
    """Let the processes that Lightning starts for further devices end with the work of this one.

    It leaves them, and what it told them, to the end of the program, where the next job of a sweep would take
    itself for one of them.
    """
    before = {name: os.environ.get(name) for name in LAUNCHED}
    grace = 5.0  # seconds, of those that an error leaves behind
    try:
        yield
        grace = 60.0
    finally:
        launcher = trainer.strategy.launcher
        others = []
        if isinstance(launcher, _SubprocessScriptLauncher):
            others = launcher.procs.copy()
            launcher.procs.clear()  # Lightning watches these, and would end this process with any that fails
        if others:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        for process in others:
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                process.kill()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error tells that memory ran out; on a CPU torch has only words for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def make_folder(key: str, folder: Path) -> None:
    """Make the folder that a key of the command line names; raises OSError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{key}={folder} cannot be made a folder ({error}); choose another {key}") from error


def write_record(folder: Path, command: list[str], config: Mapping[str, Any]) -> None:
    """Write the settings of a run, all of them, and the arguments that gave them."""
    text = yaml.safe_dump({"command": command, **config}, sort_keys=False, allow_unicode=True)
    new = folder / f"{RECORD}.new"
    new.write_text(text)
    new.replace(folder / RECORD)


def read_record(folder: Path) -> dict[str, Any]:
    """Return the settings of a run.

    Raises:
        FileNotFoundError: there is no run in the folder.
    """
    path = folder / RECORD
    if not path.is_file():
        runs = sorted(folder.parent.glob(f"*/{RECORD}"), key=lambda file: file.stat().st_mtime)
        hint = f"; the newest run beside it is {in_shell('resume', runs[-1].parent)}" if runs else ""
        raise FileNotFoundError(f"resume={folder}: no run there (no {RECORD}){hint}")
    record = yaml.safe_load(path.read_text())
    if not isinstance(record, dict) or "command" not in record:
        raise ValueError(f"{path} is no record of a run of this version; train anew in another run_dir")
    return record


@rank_zero_only
def check_unused(folder: Path) -> None:
    """Refuse to begin a run where another has been; raises FileExistsError."""
    if (folder / LAST).is_file() or (folder / RECORD).is_file():
        raise FileExistsError(
            f"{folder} already holds a run; go on with it by {in_shell('resume', folder)} or choose another "
            "run_dir"
        )


@rank_zero_only
def check_no_scores(output: Path) -> None:
    """Refuse to write scores where those of a run or another evaluation are; raises FileExistsError."""
    found = [name for name in (RECORD, LAST, SUMMARY, SCORES) if (output / name).is_file()]
    if found:
        raise FileExistsError(
            f"{in_shell('output', output)} already holds a run or an evaluation ({found[0]}), which would be "
            "overwritten; choose another output, or leave it out for a folder named by the time"
        )


def check_same_settings(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse to resume a run with settings that would make it another one.

    Raises:
        ValueError: with all that differ.
    """
    record, given = LATER | flatten(read_record(folder)), LATER | flatten(config)
    differing = [
        f"{key} was {record.get(key)}, is {given.get(key)}"
        for key in dict.fromkeys([*record, *given])
        if record.get(key) != given.get(key)
        and matters(key)
        and not (key == "loading.cache" and record.get(key) and given.get(key))
    ]
    if differing:
        raise ValueError(
            f"resume={folder} is another run with these settings: {'; '.join(differing)}; leave them out to "
            "go on with the run, or train anew in another run_dir"
        )


def matters(key: str) -> bool:
    """Return whether a run's result may follow from a setting."""
    return not any(key == free or key.startswith(f"{free}.") for free in FREE)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested keys as `peft.rank`, the form that dashboards group and filter by."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


@rank_zero_only
def keep_metrics(logger: CSVLogger, path: Path, step: int) -> None:
    """Hand the rows of an earlier `metrics.csv` on to the logger, which would begin the file anew.

    Rows beyond the checkpoint's step are left out: training logs them again.
    """
    if not path.is_file():
        return
    with path.open(newline="") as file:
        rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    logger.experiment.metrics.extend(
        row for row in rows if row.get("step", "").isdigit() and int(row["step"]) < step
    )
    logger.save()


def read_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what a run logged: name -> pairs of optimiser steps done and value, in their order."""
    curves: dict[str, list[tuple[int, float]]] = {}
    with (folder / METRICS).open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name not in ("epoch", "step") and value:
                    curves.setdefault(name, []).append((int(row["step"]) + 1, float(value)))
    return curves


def what_is_kept(folder: Path, trainer: Trainer, error: BaseException) -> str:
    """Tell a user what is there of a run that an error or a signal stopped, and how to go on."""
    again = f"python -m convlora.train {in_shell('resume', folder)}"
    if not (folder / LAST).is_file():
        stopped = f"stopped in epoch 1 of {trainer.max_epochs}; no epoch had ended, so that nothing is saved"
        known = (folder / RECORD).is_file() and not isinstance(error, FloatingPointError | ValueError)
        return f"\n{stopped}\nbegin again: {again}" if known else f"\n{stopped}"
    epochs = next_epoch(read_checkpoint(folder / LAST))
    where = (
        "the test"
        if trainer.testing
        else f"epoch {min(max(epochs, trainer.current_epoch) + 1, trainer.max_epochs or 1)}"
    )
    lines = [
        f"\nstopped in {where} of {trainer.max_epochs} epochs",
        f"kept: {folder / LAST} after {epochs} epochs, {folder / BEST} of the best of them",
        f"go on: {again}",
        f"use the best so far: python -m convlora.export {in_shell('checkpoint', folder)}",
    ]
    if isinstance(error, FloatingPointError) or is_out_of_memory(error):
        lines.pop(2)  # the resumed run would meet it again
    return "\n".join(lines)


def assign(key: str, value: object) -> str:
    """Return the argument that sets a key to a value, whatever characters the value has."""
    text = str(value)
    is_other = re.fullmatch(r"[\d._e-]+|inf|nan|null|true|false", text, re.IGNORECASE)
    if re.fullmatch(r"[\w./-]+", text) and not is_other:  # a string to hydra, and a word to a shell
        return f"{key}={text}"
    quoted = text.replace("'", "\\'")
    return f"{key}='{quoted}'"


def in_shell(key: str, value: object) -> str:
    """Return the same argument as a shell takes it."""
    argument = assign(key, value)
    if "'" in argument and not set(argument) & set('"$`\\!'):
        return f'"{argument}"'
    return shlex.quote(argument)


class ScoreTable(Callback):
    """Gathers the test scores of each image from all ranks.

    Attributes:
        rows: name -> scores, sorted by name, once the test has ended.
        counts: of the images scored, by data set, of all tests that have ended.
    """

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, float]] = {}
        self.counts: dict[str, int] = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rows = {}

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.rows.update(outputs)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            parts: list[dict[str, dict[str, float]]] = [{}] * trainer.world_size
            torch.distributed.all_gather_object(parts, self.rows)
            self.rows = {name: row for part in parts for name, row in part.items()}
        self.rows = dict(sorted(self.rows.items()))
        self.counts[trainer.datamodule.name] = len(self.rows)  # type: ignore[attr-defined]


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


def count(segmenter: Segmenter, trainable: bool = False) -> int:
    """Return the number of parameters, all or trainable."""
    return sum(p.numel() for p in segmenter.parameters() if p.requires_grad or not trainable)
