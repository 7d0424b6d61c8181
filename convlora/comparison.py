"""What ended runs tell beside each other: settings over seeds, data set by data set."""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from convlora import results
from convlora.results import CONFIDENCE, Difference, Estimate, Run
from convlora.run import in_shell, matters

RANK, EXPERTS = "peft.rank", "peft.num_experts"
EXTREMES = 3  # images of each kind in a table of images
UNKNOWN = "-"


@dataclass(frozen=True)
class Setting:
    """Runs that differ by nothing but their seeds.

    Attributes:
        number: its place in its section, from 1 on.
        arguments: by which it differs from the other settings; empty where one was not given.
        runs: one for each seed.
    """

    number: int
    arguments: Mapping[str, str]
    runs: Sequence[Run]

    @property
    def label(self) -> str:
        """The arguments as a command has them."""
        given = (f"{key}={value}" for key, value in self.arguments.items() if value)
        return " ".join(given) or "defaults"

    @property
    def first(self) -> Run:
        """The run of the least seed."""
        return self.runs[0]

    def estimate(self, score: str, test_set: str) -> Estimate:
        """Return the mean of a score over seeds."""
        return Estimate.of([run.score(score, test_set) for run in self.runs])

    def of_images(self, score: str, test_set: str) -> dict[str, float]:
        """Return the mean over seeds of a score of each image that all seeds were tested on."""
        tables = [run.of_images(score, test_set) for run in self.runs]
        shared = sorted(set.intersection(*map(set, tables)))
        return {name: float(np.mean([table[name] for table in tables])) for name in shared}

    @property
    def parameters(self) -> int:
        """Number of those that are trained."""
        return int(self.first.summary["trainable_parameters"])

    @property
    def seconds(self) -> float:
        """How long a training took, mean over seeds."""
        return float(np.mean([run.summary["fit_seconds"] for run in self.runs]))


@dataclass(frozen=True)
class Section:
    """The settings that were trained on one data set.

    Attributes:
        dataset: its name.
        score: name of the one by which settings are compared.
        settings: the best in validation first.
        baseline: with which the others are compared; None where there is none.
        wanted: arguments of the baseline; None where none is wanted.
        repeated: folders of runs that repeat setting and seed of another, and are left out.
    """

    dataset: str
    score: str
    settings: Sequence[Setting]
    baseline: Setting | None
    wanted: str | None
    repeated: Sequence[Path]

    @property
    def tests(self) -> list[str]:
        """Names of the test sets, that of the data set itself first."""
        return list(dict.fromkeys(name for each in self.settings for run in each.runs for name in run.tests))

    @cached_property
    def differences(self) -> dict[tuple[int, str], Difference]:
        """By number of the setting and test set, the difference to the baseline."""
        if self.baseline is None:
            return {}
        return {
            (each.number, test): results.difference(each.runs, self.baseline.runs, self.score, test)
            for each in self.settings
            for test in self.tests
            if each is not self.baseline
        }

    def scores(self, test_set: str) -> list[str]:
        """Return the names of all scores on a test set, but those of single classes."""
        names = dict.fromkeys(
            name for each in self.settings for run in each.runs for name in run.tests.get(test_set, {})
        )
        return [name for name in names if name not in self.classes(test_set)]

    def classes(self, test_set: str) -> list[str]:
        """Return the names of the scores of single classes, none where there is one class."""
        scores = self.settings[0].first.tests.get(test_set, {})
        return [name for name in scores if name.startswith("iou_")] if "miou" in scores else []


@dataclass(frozen=True)
class Grid:
    """Means of a score by rank and number of experts.

    Attributes:
        title: what else its settings have in common.
        ranks: its rows.
        experts: its columns.
        means: [rows, columns], NaN where there was no run.
    """

    title: str
    ranks: Sequence[int]
    experts: Sequence[int]
    means: Sequence[Sequence[float]]


def compare(runs: Sequence[Run], score: str | None, baseline: str | None) -> list[Section]:
    """Bring runs together, a section for each data set.

    Args:
        runs: at least one.
        score: name of the one to compare by; None for the one by which the epochs were chosen.
        baseline: arguments of the setting to compare with, such as `peft=lora` or only `lora`, or `defaults`;
            None for none.

    Raises:
        ValueError: no setting or several are the baseline, or there is no such score.
    """
    by_dataset: dict[str, list[Run]] = {}
    for run in runs:
        by_dataset.setdefault(run.dataset, []).append(run)
    sections = [_section(members, score, baseline) for _, members in sorted(by_dataset.items())]
    if baseline is not None and all(section.baseline is None for section in sections):
        there = dict.fromkeys(setting.label for section in sections for setting in section.settings)
        choices = ", ".join(in_shell("baseline", label) for label in there)
        raise ValueError(f"baseline={baseline} is none of the settings; there are {choices}")
    return sections


def _section(runs: Sequence[Run], score: str | None, baseline: str | None) -> Section:
    dataset, primaries = runs[0].dataset, sorted({run.primary for run in runs})
    there = [set(run.tests[dataset]) for run in runs]
    shared = ", ".join(sorted(set.intersection(*there)))
    if score is None and len(primaries) > 1:
        raise ValueError(
            f"the runs on {dataset} chose their epochs by {' and '.join(primaries)}; set score to one of "
            f"{shared}"
        )
    score = score or primaries[0]
    if not all(score in names for names in there):
        raise ValueError(f"score={score} is not what all runs on {dataset} have; they have {shared}")
    keys, groups = results.by_setting(runs)
    settings, repeated = [], []
    for number, key in enumerate(results.rank(groups), start=1):
        by_seed: dict[int, Run] = {}
        for run in groups[key]:
            if run.seed in by_seed:
                repeated.append(run.folder)
            by_seed.setdefault(run.seed, run)
        members = [by_seed[seed] for seed in sorted(by_seed)]
        settings.append(Setting(number, dict(zip(keys, key, strict=True)), members))
    return Section(dataset, score, settings, _find_baseline(settings, baseline), baseline, repeated)


def _find_baseline(settings: Sequence[Setting], wanted: str | None) -> Setting | None:
    """Return the setting that the arguments name, None where there is none; raises what `compare` does."""
    if wanted is None:
        return None
    words = set(wanted.split())
    found = [each for each in settings if each.label == wanted] or [
        each
        for each in settings
        if words
        <= {word for key, value in each.first.arguments.items() for word in (value, f"{key}={value}")}
    ]
    if len(found) > 1:
        labels = "; ".join(each.label for each in found)
        raise ValueError(f"baseline={wanted} is several settings; name one of {labels}")
    return found[0] if found else None


def unlike(section: Section) -> dict[str, list[str]]:
    """Return the resolved settings in which a section's settings differ: key -> a value for each."""
    configs = [each.first.settings for each in section.settings]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = {
        key: [str(config.get(key, UNKNOWN)) for config in configs]
        for key in keys
        if matters(key) and key != "seed"
    }
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def grids(section: Section) -> list[Grid]:
    """Return the means by rank and number of experts, a grid for each choice of the other arguments."""
    groups: dict[str, dict[tuple[int, int], float]] = {}
    for each in section.settings:
        settings = each.first.settings
        if RANK in settings and EXPERTS in settings:
            title = " ".join(
                f"{key}={value}"
                for key, value in each.arguments.items()
                if value and key not in (RANK, EXPERTS)
            )
            place = (int(settings[RANK]), int(settings[EXPERTS]))
            groups.setdefault(title, {})[place] = each.estimate(section.score, section.dataset).mean
    made = []
    for title, cells in groups.items():
        ranks, experts = (sorted(set(side)) for side in zip(*cells, strict=True))
        means = [[cells.get((row, column), math.nan) for column in experts] for row in ranks]
        if len(cells) > 1:
            made.append(Grid(title, ranks, experts, means))
    return made


def extremes(section: Section) -> dict[str, list[tuple[str, list[float]]]]:
    """Return test images that tell most: kind -> pairs of name and the score in each setting.

    They are the lowest and the highest by the baseline, or without one by the first setting, and those in
    which another setting differs most from it.
    """
    tables = [each.of_images(section.score, section.dataset) for each in section.settings]
    base = section.baseline or section.settings[0]
    own = tables[base.number - 1]
    names = [name for name in own if all(name in table for table in tables) and math.isfinite(own[name])]

    def change(name: str, choose: Callable[[list[float]], float]) -> float:
        return choose([table[name] - own[name] for table in tables if math.isfinite(table[name])])

    ranked = sorted(names, key=own.__getitem__)
    orders = {
        "lowest": ranked,
        "highest": ranked[::-1],
        "greatest rise": sorted(
            (name for name in names if change(name, max) > 0), key=lambda name: -change(name, max)
        ),
        "greatest fall": sorted(
            (name for name in names if change(name, min) < 0), key=lambda name: change(name, min)
        ),
    }
    return {
        kind: [(name, [table[name] for table in tables]) for name in order[:EXTREMES]]
        for kind, order in orders.items()
        if order
    }


def table(section: Section) -> tuple[list[str], list[list[str]]]:
    """Return the heads and the rows of the table that people read."""
    score, several = section.score, len(section.tests) > 1
    heads = ["#", "setting", "seeds", f"val/{section.settings[0].first.primary}"]
    for test in section.tests:
        heads.append(f"{score}, {test}" if several else f"{score}, test")
        if section.baseline is not None:
            heads.append(f"difference, {test}" if several else "difference")
    heads += ["trainable parameters", "seconds"]
    rows = []
    for each in section.settings:
        cells = [str(each.number), each.label, str(len(each.runs))]
        cells.append(show(Estimate.of([run.validation for run in each.runs])))
        for test in section.tests:
            cells.append(show(each.estimate(score, test)))
            if each is section.baseline:
                cells.append("baseline")
            elif section.baseline is not None:
                cells.append(show_difference(section.differences[each.number, test]))
        rows.append([*cells, f"{each.parameters:,}", f"{each.seconds:,.0f}"])
    return heads, rows


def notes(section: Section) -> list[str]:
    """Return what a reader must know of the numbers of a section."""
    lines = [
        "± is the standard error over seeds; what has none is a single run. Settings are in the order of "
        f"their best validation score, {section.settings[0].first.primary}."
    ]
    if any(results.IMAGES in each.arguments for each in section.settings):
        lines.append(
            "Settings with other images= learnt from other images; their scores can be compared only if they "
            "were tested on the same ones."
        )
    if section.wanted is not None and section.baseline is None:
        lines.append(f"No run here is of the baseline, {section.wanted}.")
    if section.baseline is not None and section.differences:
        lines.append(
            f"Differences to {section.baseline.label} are paired by seed, with their {CONFIDENCE:.0%} "
            "confidence interval by bootstrap over seeds and test images."
        )
    found = {key: each for key, each in section.differences.items() if each.seeds}
    label = {each.number: each.label for each in section.settings}
    alone = [label[number] for number, test in found if len(found[number, test].seeds) == 1]
    if alone:
        lines.append(
            f"A single seed, so that the interval is over images only: {'; '.join(dict.fromkeys(alone))}."
        )
    if any(each.images == 0 for each in found.values()):
        lines.append(
            f"Where {section.score} is no mean over images, the interval is over seeds only, and there is "
            "none of a single seed."
        )
    for (number, test), each in section.differences.items():
        if each.unpaired and test == section.dataset:
            seeds = ", ".join(map(str, each.unpaired))
            lines.append(
                f"{label[number]}: only one of the two has seed {seeds}, left out of the difference."
            )
    if section.repeated:
        folders = ", ".join(map(str, section.repeated))
        lines.append(f"Left out, since they repeat setting and seed of another run: {folders}.")
    return lines


def show(estimate: Estimate) -> str:
    """Return a mean with its standard error as text."""
    if math.isnan(estimate.mean):
        return UNKNOWN
    error = "" if math.isnan(estimate.error) else f" ± {estimate.error:.4f}"
    return f"{estimate.mean:.4f}{error}"


def show_difference(found: Difference) -> str:
    """Return a difference with its interval as text."""
    if math.isnan(found.mean):
        return UNKNOWN
    ends = "" if math.isnan(found.low) else f" [{found.low:+.4f}, {found.high:+.4f}]"
    return f"{found.mean:+.4f}{ends}"


def write_csv(sections: Sequence[Section], path: Path) -> None:
    """Write a row for each setting, in full precision."""
    rows = [_row(section, each) for section in sections for each in section.settings]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def _row(section: Section, setting: Setting) -> dict[str, Any]:
    primary = setting.first.primary
    validation = Estimate.of([run.validation for run in setting.runs])
    row: dict[str, Any] = {"dataset": section.dataset, "setting": setting.label, **setting.arguments}
    row |= {"seeds": " ".join(str(run.seed) for run in setting.runs)}
    row |= {"trainable_parameters": setting.parameters, "fit_seconds": setting.seconds}
    row |= {f"val/{primary}": validation.mean, f"val/{primary}_error": validation.error}
    for test in section.tests:
        for score in section.scores(test) + section.classes(test):
            estimate = setting.estimate(score, test)
            row |= {f"{test}/{score}": estimate.mean, f"{test}/{score}_error": estimate.error}
        if found := section.differences.get((setting.number, test)):
            name = f"{test}/{section.score}_difference"
            row |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
            row |= {f"{name}_seeds": " ".join(map(str, found.seeds))}
    return row


def markdown(sections: Sequence[Section]) -> str:
    """Return the tables as Markdown."""
    lines = ["# Runs compared"]
    for section in sections:
        heads, rows = table(section)
        lines += ["", f"## {section.dataset}", ""]
        for cells in (heads, ["---"] * len(heads), *rows):
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines += ["", *(f"- {note}" for note in notes(section))]
    return "\n".join(lines) + "\n"
