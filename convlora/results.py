"""What ended runs left in their folders: read, told apart by their arguments, brought together over seeds."""

import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

from convlora.run import LATER, SCORES, SUMMARY, flatten, matters, read_record

CONFIDENCE = 0.95
DRAWS = 2000  # of a bootstrap
IMAGES = "images"  # beside the arguments of a command, where they do not tell


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
        return str(self.settings["callbacks.best.monitor"]).removeprefix("val/")

    @property
    def validation(self) -> float:
        """The best of that score in validation, NaN where there was none."""
        return _number(self.summary.get(f"val/{self.primary}"))

    @property
    def test(self) -> float:
        """The same score on the test set."""
        return self.score(self.primary, self.dataset)

    @property
    def dataset(self) -> str:
        """Name of the data set that it was trained on."""
        return str(self.summary["dataset"])

    @property
    def seed(self) -> int:
        """What its random numbers began with."""
        return int(self.settings["seed"])

    @property
    def images(self) -> str:
        """What tells the images that it learnt from, or if it learnt nothing was tested on, from others.

        A few shots are chosen by the seed; there the validation images tell.
        """
        kinds = ("training images", "validation images", "test images")
        few = self.settings.get("loading.shots") is not None
        return ", ".join(str(self.summary[kind]) for kind in kinds[few:] if kind in self.summary)

    @property
    def root(self) -> str:
        """Where its images lie."""
        return str(self.settings.get("dataset.root", ""))

    @property
    def given_root(self) -> str:
        """The same as the command says it, which may follow from the seed."""
        return " ".join(self.arguments.get(key, "") for key in ("data_root", "dataset.root")).strip()

    @property
    def listing(self) -> str:
        """All else that says what its images are."""
        settings = {**LATER, **self.settings}
        listing = {key: settings[key] for key in settings if key.startswith("dataset.") and matters(key)}
        return json.dumps(listing, default=str)

    @property
    def tests(self) -> dict[str, Mapping[str, Any]]:
        """By test set, that of the data set it was trained on first, the scores by name."""
        return {self.dataset: self.summary["test"], **self.summary.get("test_sets", {})}

    def score(self, name: str, test_set: str) -> float:
        """Return a score on a test set, NaN where there is none."""
        return _number(self.tests.get(test_set, {}).get(name))

    def place(self, test_set: str) -> Path:
        """Return the folder of the tables and pictures of a test set."""
        return self.folder if test_set == self.dataset else self.folder / test_set

    def of_images(self, score: str, test_set: str) -> dict[str, float]:
        """Return a score of each image of a test set by the image's name, as far as images.csv has it."""
        rows = read_rows(self.place(test_set) / "images.csv")
        return {row["image"]: float(row[score]) for row in rows if row.get(score)}


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
        """Return the mean of values, at least one, with its standard error; NaN where one is no number."""
        is_known = len(values) > 1 and all(map(math.isfinite, values))
        error = statistics.stdev(values) / math.sqrt(len(values)) if is_known else math.nan
        return cls(statistics.fmean(values), error)


@dataclass(frozen=True)
class Difference:
    """By how much a score exceeds that of a baseline with the same seeds.

    Attributes:
        mean: over the seeds that both have; NaN where they share none.
        low: end of the confidence interval; NaN where nothing could be drawn anew.
        high: the other end.
        seeds: that both have.
        unpaired: seeds that only one of the two has, which are left out.
        images: number of those that were drawn anew; 0 of a score that is no mean over images.
    """

    mean: float
    low: float
    high: float
    seeds: tuple[int, ...]
    unpaired: tuple[int, ...]
    images: int


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


def find_evaluations(folder: Path) -> list[Path]:
    """Return the folders at or below a folder that hold scores of an adapter, and so no run."""
    found = (path.parent for path in sorted(folder.rglob(SCORES)))
    return [path for path in found if not (path / SUMMARY).is_file()]


def by_setting(runs: Sequence[Run]) -> tuple[list[str], dict[tuple[str, ...], list[Run]]]:
    """Bring runs together that differ by nothing but their seeds.

    Returns:
        The arguments by which they differ otherwise, of those that may change a result, and the runs by the
        values of these, empty where one was not given. Where runs with the same arguments learnt from other
        images, the last argument is `images`, which tells these.
    """
    keys = [
        key
        for key in dict.fromkeys(key for run in runs for key in run.arguments)
        if len({run.arguments.get(key) for run in runs}) > 1 and key != "seed" and matters(key)
    ]
    groups = _by(keys, runs)
    named = [_name_images(group) for group in groups.values()]
    if any(len(set(names)) > 1 for names in named):
        keys.append(IMAGES)
        groups = _by(
            keys,
            [
                replace(run, arguments={**run.arguments, IMAGES: name})
                for group, names in zip(groups.values(), named, strict=True)
                for run, name in zip(group, names, strict=True)
            ],
        )
    return keys, groups


def _by(keys: Sequence[str], runs: Sequence[Run]) -> dict[tuple[str, ...], list[Run]]:
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(run.arguments.get(key, "") for key in keys), []).append(run)
    return groups


def _name_images(runs: Sequence[Run]) -> list[str]:
    """Return what the images of each run are called, of runs that have the same arguments but for the folder.

    All have one name where `dataset.lists` follows from the seed, as folds of a cross-validation do; where
    the folder does, its name is what the command says. Others are called by the first folder that they were
    found in, and by their number and hash.
    """
    if len({run.listing for run in runs}) > 1 or len({run.images for run in runs}) == 1:
        return [""] * len(runs)
    roots: dict[str, set[str]] = {}
    first: dict[str, str] = {}
    for run in runs:
        roots.setdefault(run.given_root, set()).add(run.root)
        first.setdefault(run.images, run.root)
    return [
        run.given_root if len(roots[run.given_root]) > 1 else f"{first[run.images]}: {run.images}"
        for run in runs
    ]


def rank(groups: Mapping[tuple[str, ...], Sequence[Run]]) -> list[tuple[str, ...]]:
    """Return the groups' keys: data set by data set, the best mean in validation first."""

    def order(key: tuple[str, ...]) -> tuple[str, str, float]:
        first = groups[key][0]
        sign = -1 if first.settings["callbacks.best.mode"] == "max" else 1
        mean = Estimate.of([run.validation for run in groups[key]]).mean
        return first.summary["dataset"], first.primary, math.inf if math.isnan(mean) else sign * mean

    return sorted(groups, key=order)


def difference(runs: Sequence[Run], baseline: Sequence[Run], score: str, test_set: str) -> Difference:
    """Compare runs with those of a baseline, each with the one of its seed.

    Of a score that is a mean over images the interval is over seeds and images, of another over seeds alone.

    Args:
        runs: one for each seed.
        baseline: one for each seed.
        score: name of what is compared.
        test_set: on which.
    """
    ours, theirs = ({run.seed: run for run in each} for each in (runs, baseline))
    seeds = tuple(sorted(ours.keys() & theirs.keys()))
    unpaired = tuple(sorted(ours.keys() ^ theirs.keys()))
    if not seeds:
        return Difference(math.nan, math.nan, math.nan, seeds, unpaired, 0)
    means = np.array(
        [ours[seed].score(score, test_set) - theirs[seed].score(score, test_set) for seed in seeds]
    )
    tables = [[each[seed].of_images(score, test_set) for seed in seeds] for each in (ours, theirs)]
    names = sorted(set.intersection(*(set(table) for side in tables for table in side)))
    first, second = (np.array([[table[name] for name in names] for table in side]) for side in tables)
    images = first - second
    is_mean = bool(names) and np.allclose(images.mean(axis=1), means, rtol=1e-4, atol=1e-5)
    low, high = interval(images if is_mean else means[:, None])
    return Difference(float(means.mean()), low, high, seeds, unpaired, len(names) if is_mean else 0)


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the confidence interval of the mean over seeds and images [seeds, images], by bootstrap.

    Seeds and images are drawn anew apart from each other, as all seeds are tested on the same images (the
    pigeonhole bootstrap; Owen, Annals of Applied Statistics 2007). Few seeds drawn from themselves vary less
    than new ones would; their means are spread beforehand, so that seeds alone give about Student's interval.

    Returns:
        Its two ends, NaN of a single value or where one is no number.
    """
    if values.size < 2 or not np.isfinite(values).all():
        return math.nan, math.nan
    seeds, images = values.shape
    upper = (1 + CONFIDENCE) / 2
    if seeds > 1:
        means = values.mean(axis=1, keepdims=True)
        spread = math.sqrt(seeds / (seeds - 1)) * t.ppf(upper, seeds - 1) / norm.ppf(upper)
        values = values + (spread - 1) * (means - means.mean())
    generator = np.random.default_rng(0)
    by_seed, by_image = (generator.multinomial(n, np.full(n, 1 / n), DRAWS) / n for n in (seeds, images))
    drawn = ((by_seed @ values) * by_image).sum(axis=1)
    low, high = np.quantile(drawn, (1 - upper, upper))
    return float(low), float(high)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, none where there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
