"""Keep what the runs of this comparison gave, and write its tables from what is kept.

`python docs/evidence/tables.py FOLDER ...` adds the ended runs below the folders to runs.csv and, of seeds
that test, their images to images/DATASET.csv; without a folder it only writes the tables.
"""

import csv
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from convlora import results
from convlora.comparison import show, show_difference
from convlora.results import Difference, Estimate, Run

HERE = Path(__file__).parent
KEYS = ("dataset", "model", "form", "match", "lr", "seed")
CHOOSE, TEST = range(3), range(10, 15)  # seeds
GROUND = ("kvasir", "sam_vit_tiny")  # on which learning rates and forms are chosen
BASELINE = ("lora", "")
IS_TABLE = "<!-- {}: written by docs/evidence/tables.py -->"


@dataclass(frozen=True)
class Kept(Run):
    """A run of which a row is kept.

    Attributes:
        row: of runs.csv.
        by_image: score of each test image by its name.
    """

    row: Mapping[str, str] = field(default_factory=dict)
    by_image: Mapping[str, float] = field(default_factory=dict)

    def of_images(self, score: str, test_set: str) -> dict[str, float]:
        return dict(self.by_image)

    @classmethod
    def of(cls, row: Mapping[str, str], by_image: Mapping[str, float]) -> "Kept":
        """Return the run of a row."""
        summary = {"dataset": row["dataset"], f"val/{row['score']}": float(row["validation"])}
        summary["test"] = {row["score"]: float(row["test"])}
        settings = {"callbacks.best.monitor": f"val/{row['score']}", "seed": row["seed"]}
        return cls(HERE, {}, settings, summary, row, by_image)


def summarize(run: Run) -> dict[str, str]:
    """Return the row of a run."""
    arguments = run.arguments
    row = {"dataset": run.dataset, "model": str(run.settings["model.name"])}
    row |= {"form": arguments["experiment"].removeprefix("evidence/"), "match": arguments.get("match", "")}
    row |= {"lr": f"{run.settings['optimizer.lr']:g}", "seed": str(run.seed)}
    row |= {"precision": str(run.settings["trainer.precision"]), "score": run.primary}
    row |= {"validation": f"{run.validation:.6f}", "test": f"{run.test:.6f}"}
    row |= {"trained": str(run.summary["trainable_parameters"])}
    return row | routing(run.folder)


def routing(folder: Path) -> dict[str, str]:
    """Return the mean entropy of a run's gates, bits, and how the scale follows the object's size.

    The latter is Spearman's correlation over the test images of the mean scale with the object's share of the
    pixels; empty where all images have one scale.
    """
    layers = results.read_rows(folder / "routing.csv")
    images = results.read_rows(folder / "routing_images.csv")
    if not layers:
        return {"entropy": "", "scale_by_size": ""}
    entropy = np.mean([float(row["entropy"]) for row in layers])
    share, scale = ([float(row[key]) for row in images] for key in ("object_share", "mean_scale"))
    follows = f"{spearmanr(share, scale).statistic:.3f}" if np.ptp(scale) > 1e-6 else ""
    return {"entropy": f"{entropy:.3f}", "scale_by_size": follows}


def name(row: Mapping[str, str]) -> str:
    """Return what a run is called among those of its data set."""
    return " ".join(row[key] for key in KEYS[1:] if row[key])


def images_of(dataset: str) -> Path:
    """Return the file that holds the scores of a data set's test images."""
    return HERE / "images" / f"{dataset}.csv"


def keep(folders: Iterable[Path]) -> None:
    """Add the ended runs below folders that are not kept yet."""
    rows = results.read_rows(HERE / "runs.csv")
    there = {tuple(row[key] for key in KEYS) for row in rows}
    for run in (run for folder in folders for run in results.find(folder)):
        row = summarize(run)
        if tuple(row[key] for key in KEYS) in there:
            continue
        rows.append(row)
        if run.seed in TEST:
            path = images_of(run.dataset)
            table = {each.pop("image"): each for each in results.read_rows(path)}
            for image, score in run.of_images(run.primary, run.dataset).items():
                table.setdefault(image, {})[name(row)] = f"{score:.6f}"
            path.parent.mkdir(exist_ok=True)
            write(path, [{"image": image, **table[image]} for image in sorted(table)])
    rows.sort(key=lambda row: (*(row[key] for key in KEYS[:4]), float(row["lr"]), int(row["seed"])))
    write(HERE / "runs.csv", rows)


def write(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write rows as CSV, empty where one has no value."""
    with path.open("w", newline="") as file:
        names = dict.fromkeys(key for row in rows for key in row)
        writer = csv.DictWriter(file, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read() -> list[Kept]:
    """Return all runs that are kept."""
    rows = results.read_rows(HERE / "runs.csv")
    images = {row["dataset"]: results.read_rows(images_of(row["dataset"])) for row in rows}
    return [
        Kept.of(
            row,
            {each["image"]: float(each[name(row)]) for each in images[row["dataset"]] if each.get(name(row))},
        )
        for row in rows
    ]


def settings(runs: Iterable[Kept]) -> dict[tuple[str, str, str], list[Kept]]:
    """Bring runs together that differ by their seeds alone, by form, size to match and learning rate."""
    found: dict[tuple[str, str, str], list[Kept]] = {}
    for run in runs:
        found.setdefault((run.row["form"], run.row["match"], run.row["lr"]), []).append(run)
    return found


def validation(runs: Sequence[Kept]) -> Estimate:
    """Return the mean score in validation."""
    return Estimate.of([run.validation for run in runs])


def learning_rates(runs: Sequence[Kept]) -> list[list[str]]:
    """Return the validation score of the first seed by form and learning rate, the best of each form bold."""
    first = settings(run for run in runs if run.seed == CHOOSE[0])
    rates = sorted({lr for _, _, lr in first}, key=float)
    rows = [["form", *rates]]
    for form in dict.fromkeys(form for form, _, _ in first):
        scores = [first[form, "", lr][0].validation if (form, "", lr) in first else math.nan for lr in rates]
        best = np.nanmax(scores)
        cells = ["" if math.isnan(each) else f"{each:.4f}" for each in scores]
        if sum(map(bool, cells)) > 1:
            bold = (f"**{cell}**" if each == best else cell for cell, each in zip(cells, scores, strict=True))
            rows.append([f"`{form}`", *bold])
    return rows


def forms(runs: Sequence[Kept]) -> list[list[str]]:
    """Return the forms with all seeds that choose, the best in validation first."""
    groups = settings(run for run in runs if run.seed in CHOOSE)
    whole = [key for key, each in groups.items() if len(each) == len(CHOOSE)]
    rows = [["form", "learning rate", "trained", "validation", "entropy, bits", "scale by size"]]
    for key in sorted(whole, key=lambda key: -validation(groups[key]).mean):
        first = groups[key][0].row
        cells = [f"`{key[0]}`", key[2], f"{int(first['trained']):,}", show(validation(groups[key]))]
        rows.append([*cells, *(mean(groups[key], column) for column in ("entropy", "scale_by_size"))])
    return rows


def mean(runs: Sequence[Kept], column: str) -> str:
    """Return the mean of a column over runs, empty where one has no value."""
    values = [run.row[column] for run in runs]
    return f"{np.mean([float(each) for each in values]):.2f}" if all(values) else ""


@dataclass(frozen=True)
class Compared:
    """A form on one data set beside plain LoRA.

    Attributes:
        runs: of the form, seeds that test.
        difference: of its test score to plain LoRA's with the same seeds; None of that itself.
    """

    runs: Sequence[Kept]
    difference: Difference | None

    @property
    def verdict(self) -> str:
        """Say whether it is ahead of LoRA, behind, or how large a difference would have been seen."""
        found = self.difference
        if found is None or math.isnan(found.low):
            return ""
        if found.low > 0 or found.high < 0:
            return "ahead" if found.low > 0 else "behind"
        return f"undecided; {(found.high - found.low) / 2:.3f} would have shown"


def compare(runs: Sequence[Kept]) -> list[Compared]:
    """Compare the forms on one data set with plain LoRA, which comes first."""
    groups = settings(run for run in runs if run.seed in TEST)
    base = next((each for key, each in groups.items() if key[:2] == BASELINE), None)
    if base is None:
        return []
    score, dataset = base[0].primary, base[0].dataset
    others = [each for each in groups.values() if each is not base]
    return [Compared(base, None)] + [
        Compared(each, results.difference(each, base, score, dataset)) for each in others
    ]


def domains(runs: Sequence[Kept]) -> dict[tuple[str, str], list[Compared]]:
    """Return by data set and model what was compared there."""
    keys = dict.fromkeys((run.dataset, run.row["model"]) for run in runs)
    found = {key: compare([run for run in runs if (run.dataset, run.row["model"]) == key]) for key in keys}
    return {key: each for key, each in found.items() if each}


def tests(runs: Sequence[Kept]) -> list[list[str]]:
    """Return the forms on each data set with the seeds that test."""
    heads = [
        "data set",
        "model",
        "form",
        "trained",
        "seeds",
        "score",
        "test",
        "difference to LoRA",
        "verdict",
    ]
    rows = [heads]
    for (dataset, model), members in domains(runs).items():
        for each in members:
            first = each.runs[0].row
            form = f"`{first['form']}`" + (f" `match={first['match']}`" if first["match"] else "")
            cells = [dataset, model, form, f"{int(first['trained']):,}", str(len(each.runs)), first["score"]]
            test = show(Estimate.of([run.test for run in each.runs]))
            difference = "" if each.difference is None else show_difference(each.difference)
            rows.append([*cells, test, difference, each.verdict])
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first row holds the heads."""
    heads, *others = rows
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *others])


def chosen(runs: Sequence[Kept]) -> list[Kept]:
    """Return the runs that choose learning rates and forms."""
    return [run for run in runs if (run.dataset, run.row["model"]) == GROUND and run.seed in CHOOSE]


def fill(text: str, title: str, table: str) -> str:
    """Return a page with the table of a title anew: what stands between its mark and the next empty line."""
    mark = IS_TABLE.format(title)
    before, found, after = text.partition(f"{mark}\n")
    if not found:
        raise ValueError(f"there is no place for {title!r}; add {mark}")
    return f"{before}{found}{table}\n\n{after.partition(chr(10) * 2)[2]}"


def main() -> None:
    """Keep the runs below the folders that are given, and write the tables."""
    keep(map(Path, sys.argv[1:]))
    runs = read()
    page = HERE / "README.md"
    text = page.read_text()
    text = fill(text, "learning rates", markdown(learning_rates(chosen(runs))))
    text = fill(text, "forms", markdown(forms(chosen(runs))))
    page.write_text(fill(text, "tests", markdown(tests(runs))))


if __name__ == "__main__":
    main()
