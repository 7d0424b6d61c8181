"""The jobs of a sweep: none that fails ends the others, and in the end a table tells of all."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict, read_write
from rich.console import Console
from rich.table import Table

from convlora import results
from convlora.results import Estimate
from convlora.run import in_shell, remove_empty

TABLE, FAILED = "sweep.csv", "failed.txt"
console = Console(highlight=False, soft_wrap=True)


def attempt(folder: Path, job: Callable[[], Any], explain: Callable[[Exception], str]) -> Any:
    """Run a job; one that fails leaves the reason in its folder and lets the others go on.

    Args:
        folder: of the job.
        job: what is done.
        explain: returns the line that tells of an error.

    Returns:
        What the job returns, NaN where it failed.
    """
    (folder / FAILED).unlink(missing_ok=True)
    try:
        return job()
    except Exception as error:  # whatever it is, the others are not to suffer
        reason = explain(error)
        (folder / FAILED).write_text(f"{reason}\n")
        _say(f"{folder}: {reason}")
        return float("nan")


class Sweep(Callback):
    """Tells at the beginning of a sweep how to go on with it, and in the end how its jobs ended."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Let the command's values stand for those of `sweep=`, and tell where the sweep is."""
        given = {each.lstrip("+").partition("=")[0] for each in config.hydra.overrides.task}
        if tried := config.hydra.sweeper.get("params"):
            with read_write(tried), open_dict(tried):
                for key in list(tried):  # Hydra takes key and ++key for two, and would try all values of both
                    if key.lstrip("+") in given:
                        del tried[key]
        folder = config.hydra.sweep.dir
        for path in Path(folder).glob(f"*/{FAILED}"):  # of jobs that this command may not try again
            path.unlink()
            remove_empty([path.parent])
        _say(f"sweep in {folder}; if it is cut off, {_again(folder)} goes on with it")

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Write the table and name the jobs that failed.

        Raises:
            SystemExit: with code 1 where a job failed.
        """
        folder = Path(config.hydra.sweep.dir)
        if rows := tabulate(folder):
            write_table(folder / TABLE, rows)
        failed = sorted(folder.glob(f"*/{FAILED}"))
        for path in failed:
            _say(f"failed: {path.parent}: {path.read_text().strip()}")
        if failed:
            _say(f"{len(failed)} failed; {_again(str(folder))} tries them again")
            raise SystemExit(1)


def tabulate(folder: Path) -> list[dict[str, Any]]:
    """Return a row for each setting that a sweep tried, the best mean in validation first."""
    runs = results.find(folder)
    keys, groups = results.by_setting(runs)
    rows = []
    for key in results.rank(groups):
        members = groups[key]
        validation, test = (
            Estimate.of(values)
            for values in ([run.validation for run in members], [run.test for run in members])
        )
        rows.append(
            dict(zip(keys, key, strict=True))
            | {"runs": len(members), "score": members[0].primary}
            | {"validation": validation.mean, "validation_error": validation.error}
            | {"test": test.mean, "test_error": test.error}
        )
    return rows


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Print rows, and write them as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    table = Table(*rows[0], title=str(path), title_justify="left")
    for row in rows:
        table.add_row(*(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)


def _again(folder: str) -> str:
    return f"the same command with {in_shell('sweep_dir', folder)}"


def _say(text: str) -> None:
    console.print(text, markup=False)
