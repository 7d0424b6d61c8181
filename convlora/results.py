"""What ended runs left in their folders: read, told apart by their arguments, brought together over seeds."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convlora.run import SUMMARY, flatten, matters, read_record


@dataclass(frozen=True)
class Run:
    """A run that has ended.

    Attributes:
        folder: of the run.
        arguments: that were given to its command, by their keys.
        settings: all that it followed from, as `peft.rank`.
        summary: what summary.json holds.
    """

    folder: Path
    arguments: Mapping[str, str]
    settings: Mapping[str, Any]
    summary: Mapping[str, Any]

    @property
    def primary(self) -> str:
        """The score by which its epoch was chosen."""
        return str(self.settings["metrics.primary"])

    @property
    def validation(self) -> float:
        """Best primary score in validation, NaN where there was none."""
        return _number(self.summary.get(f"val/{self.primary}"))

    @property
    def test(self) -> float:
        """Primary score on the test set."""
        return _number(self.summary["test"].get(self.primary))


@dataclass(frozen=True)
class Estimate:
    """A mean over runs with its uncertainty.

    Attributes:
        mean: of the runs.
        error: standard error of the mean; NaN of a single run.
    """

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Return the mean of values, at least one, with its standard error."""
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), error)


def read(folder: Path) -> Run | None:
    """Return the run in a folder if it has ended.

    Raises:
        ValueError: its record is of another version.
    """
    if not (folder / SUMMARY).is_file():
        return None
    record = read_record(folder)
    given = (argument.lstrip("+").partition("=") for argument in record["command"] if argument[0] != "-")
    summary = json.loads((folder / SUMMARY).read_text())
    return Run(folder, {key: value for key, _, value in given}, flatten(record), summary)


def find(folder: Path) -> list[Run]:
    """Return all ended runs at or below a folder, in the order of their paths."""
    found = (read(path.parent) for path in sorted(folder.rglob(SUMMARY)))
    return [run for run in found if run is not None]


def differing(runs: Sequence[Run]) -> list[str]:
    """Return the arguments by which runs differ, other than the seed and those that change no result."""
    keys = dict.fromkeys(key for run in runs for key in run.arguments)
    return [
        key
        for key in keys
        if len({run.arguments.get(key) for run in runs}) > 1 and key != "seed" and matters(key)
    ]


def over_seeds(runs: Sequence[Run], keys: Sequence[str]) -> dict[tuple[str, ...], list[Run]]:
    """Bring runs together that have the same arguments `keys`; an argument that was not given is empty."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(run.arguments.get(key, "") for key in keys), []).append(run)
    return groups


def rank(groups: Mapping[tuple[str, ...], Sequence[Run]]) -> list[tuple[str, ...]]:
    """Return the groups' keys: data set by data set, the best mean in validation first."""

    def order(key: tuple[str, ...]) -> tuple[str, str, float]:
        first = groups[key][0]
        sign = -1 if first.settings["metrics.mode"] == "max" else 1
        mean = Estimate.of([run.validation for run in groups[key]]).mean
        return first.summary["dataset"], first.primary, math.inf if math.isnan(mean) else sign * mean

    return sorted(groups, key=order)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
