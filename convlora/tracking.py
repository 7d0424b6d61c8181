"""W&B: one run for each run folder, with all that the folder holds."""

import csv
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import wandb
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray
from wandb.sdk.lib.runid import generate_id

from convlora.checkpoint import RunCheckpoint
from convlora.run import METRICS

Ranking = Mapping[str, NDArray[Any] | None]
"""The images of a test from the worst on, with the picture [h, w, 3] of those that are shown."""


def login() -> bool:
    """Return whether the machine is logged in to W&B, without asking for it."""
    _silence()
    return wandb.login(prompt=False)


def wandb_mode() -> str:
    """Return what a run does with W&B: the variable WANDB_MODE, or online where the machine is logged in."""
    return os.environ.get("WANDB_MODE") or ("online" if login() else "offline")


def wandb_logger(
    project: str, group: str, name: str, job_type: str, tags: Sequence[str], save_dir: str
) -> WandbLogger:
    """Return a logger that is online where the machine is logged in to W&B and offline elsewhere.

    It never asks for a login; the variable WANDB_MODE overrides the choice. A run that goes on in the same
    folder goes on with the same run of W&B.

    Args:
        project: of W&B's.
        group: of runs.
        name: of the run, which says what differs from others of its group.
        job_type: of the run.
        tags: of the run.
        save_dir: the run's folder.
    """
    _silence()
    kept = Path(save_dir, "wandb", "run_id.txt")
    identity = kept.read_text() if kept.is_file() else generate_id()
    _keep(kept, identity)
    return WandbLogger(
        project=project,
        group=group,
        name=name,
        job_type=job_type,
        tags=list(tags),
        id=identity,
        save_dir=Path(save_dir).absolute(),  # W&B's process may have begun elsewhere
        mode=wandb_mode(),  # the logger's own `offline` sets a variable that wandb may have read
    )


def _silence() -> None:
    os.environ.setdefault("WANDB_SILENT", "true")
    logging.getLogger().addFilter(_matters)


def _matters(record: logging.LogRecord) -> bool:
    """Return whether a message is more than wandb's about pictures of several sizes, which it shows well."""
    return not record.getMessage().startswith("Images sizes do not match")


@rank_zero_only
def _keep(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def publish(
    loggers: Sequence[Logger],
    folder: Path,
    summary: Mapping[str, Any],
    best: RunCheckpoint,
    rankings: Mapping[str, Ranking],
) -> None:
    """Show in W&B what a run's folder holds: its pictures, its tables, its scores, and what sums it up.

    What belongs to a test set is told by its name: a score as `test/kvasir/dice`, a picture by its caption, a
    row of a table by its first column. The score that chose the epoch is also there as `score/val` and
    `score/test`, by which runs with other scores stand beside each other.

    Args:
        loggers: of the run.
        folder: of the run, below which each test set but the first has a folder of its own.
        summary: as in summary.json.
        best: what chose the epoch.
        rankings: by test set, its images.
    """
    tests = {summary["dataset"]: summary["test"], **summary["test_sets"]}
    chosen = str(best.monitor)
    values = {"score/val": summary[chosen], "score/test": summary["test"].get(chosen.removeprefix("val/"))}
    values |= {f"test/{name}/{key}": score for name, scores in tests.items() for key, score in scores.items()}
    places = {name: folder if number == 0 else folder / name for number, name in enumerate(tests)}
    for logger in loggers:
        if not isinstance(logger, WandbLogger):
            continue
        shown: dict[str, Any] = {key: value for key, value in values.items() if value is not None}
        for stem in sorted({path.stem for place in places.values() for path in place.glob("*.png")}):
            files = {name: place / f"{stem}.png" for name, place in places.items()}
            shown[f"test/{stem}"] = [
                wandb.Image(str(file), caption=name) for name, file in files.items() if file.is_file()
            ]
        tables = {file.name for place in places.values() for file in place.glob("*.csv")} - {METRICS}
        for name in sorted(tables):
            shown[f"test/{Path(name).stem}_table"] = _table(name, places, rankings)
        logger.experiment.log(shown)
        # Lightning logs the scores of all test sets under the same names, of which the last ones would stay.
        first = {f"test/{key}": score for key, score in summary["test"].items()}
        plain = {key: value for key, value in summary.items() if not isinstance(value, Mapping)}
        logger.experiment.summary.update(first | plain)


def _table(name: str, places: Mapping[str, Path], rankings: Mapping[str, Ranking]) -> wandb.Table:
    """Return a CSV file of all test sets as one table in which numbers are numbers.

    That of the scores of each image begins with the worst and has the pictures that there are.
    """

    def number(text: str) -> float | str | None:
        try:
            return float(text) if text else None
        except ValueError:
            return text

    columns: list[str | int] = []
    data: list[list[Any]] = []
    for test, place in places.items():
        if not (place / name).is_file():
            continue
        with (place / name).open(newline="") as file:
            header, *lines = csv.reader(file)
        rows: list[list[Any]] = [[line[0], *map(number, line[1:])] for line in lines]
        if name == "images.csv":
            pictures = rankings[test]
            order = {image: rank for rank, image in enumerate(pictures)}
            rows.sort(key=lambda row: order[row[0]])
            header.insert(1, "picture")
            for row in rows:
                picture = pictures[row[0]]
                row.insert(1, None if picture is None else wandb.Image(picture))
        if header[0] != "dataset":
            header = ["dataset", *header]
            rows = [[test, *row] for row in rows]
        columns, data = [*header], data + rows
    return wandb.Table(columns=columns, data=data)


def log_histogram(logger: WandbLogger, name: str, shares: NDArray[Any], step: int) -> None:
    """Log shares of sum 1 as a histogram, whose bar `i` is that of the i-th, from 1 on."""
    bars = wandb.Histogram(np_histogram=(shares, np.arange(len(shares) + 1) + 0.5))
    logger.experiment.log({name: bars, "trainer/global_step": step})


def finish_wandb() -> None:
    """End the W&B run of this job, so that a multirun logs every job."""
    wandb.finish()
