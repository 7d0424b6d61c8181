"""Keep what the runs of this comparison gave, and write its tables from what is kept.

`python docs/evidence/tables.py FOLDER ...` adds the ended runs below the folders to runs.csv and, of seeds
that test, their images to images/DATASET_MODEL.csv; without a folder it only writes the tables. Those of this
folder's README.md are whole, the project's has a line for each data set.
"""

import csv
import hashlib
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from convlora import results
from convlora.comparison import show, show_difference
from convlora.results import Estimate, Run
from convlora.run import matters

HERE = Path(__file__).parent
FRONT = HERE.parents[1] / "README.md"  # of the project
FORMS = "evidence/"  # in conf/experiment
CHOOSE, TEST = (0, 1, 2), (10, 11, 12, 13, 14)  # seeds
ENOUGH = 3  # seeds that a verdict needs
CHOSEN_ON = ("kvasir", "sam_vit_tiny")
KEYS = ("dataset", "model", "form", "match", "lr", "seed")
SAID = {
    "kvasir": "polyps",
    "camo": "camouflage",
    "leaf_disease": "leaves",
    "massachusetts_roads": "roads of Japan",
}
FOLDS = ("massachusetts_roads",)  # data sets of which each seed tests another fold
POWER = 1.4  # half-widths of a 95 % interval that a true difference needs to be seen four times of five


@dataclass(frozen=True)
class Kept(Run):
    """A run of which a row is kept.

    Attributes:
        row: of runs.csv.
        by_image: the score that chose its epoch, of each test image by its name.
    """

    row: Mapping[str, str] = field(default_factory=dict)
    by_image: Mapping[str, float] = field(default_factory=dict)

    def of_images(self, score: str, test_set: str) -> dict[str, float]:
        """Return what is kept of the images, the one score on the one test set."""
        return dict(self.by_image)

    @classmethod
    def of(cls, row: Mapping[str, str], by_image: Mapping[str, float]) -> "Kept":
        """Return the run of a row."""
        summary = {"dataset": row["dataset"], f"val/{row['score']}": float(row["validation"])}
        summary["test"] = {row["score"]: float(row["test"] or "nan")}
        config = {"callbacks.best.monitor": f"val/{row['score']}", "seed": row["seed"]}
        return cls(HERE, {}, config, summary, row, by_image)

    @property
    def label(self) -> str:
        """What a table calls its form."""
        size = f" `match={self.row['match']}`" if self.row["match"] else ""
        return f"`{self.row['form']}`{size}"


def summarize(run: Run) -> dict[str, str]:
    """Return the row of a run.

    Raises:
        ValueError: it is no run of this comparison.
    """
    form = run.arguments.get("experiment", "")
    if not form.startswith(FORMS) or run.dataset not in SAID or run.seed not in CHOOSE + TEST:
        raise ValueError(
            f"{run.folder}: experiment={form or 'null'} dataset={run.dataset} seed={run.seed} is no run of "
            f"the comparison, whose experiments are {FORMS}NAME, data sets {', '.join(SAID)} and seeds "
            f"{', '.join(map(str, CHOOSE + TEST))}; name other folders"
        )
    lists = run.settings.get("dataset.lists")
    if (run.dataset in FOLDS) != (lists is not None):
        raise ValueError(
            f"{run.folder}: dataset.lists={lists or 'null'}, but {run.dataset} is tested "
            f"{'on the folds of road_folds' if lists is None else 'on its own lists'}"
        )
    if run.settings["callbacks.best.mode"] != "max" or not math.isfinite(run.validation):
        raise ValueError(
            f"{run.folder}: val/{run.primary} is {run.validation}, here the greatest one is best"
        )
    match = run.settings.get("match")
    row = {"dataset": run.dataset, "model": str(run.settings["model.name"])}
    row |= {"form": form.removeprefix(FORMS), "match": "" if match is None else str(match)}
    row |= {"lr": f"{run.settings['optimizer.lr']:g}", "seed": str(run.seed), "score": run.primary}
    row |= {"validation": f"{run.validation:.6f}", "test": f"{run.test:.6f}" if run.seed in TEST else ""}
    row |= {"trained": str(run.summary["trainable_parameters"]), "steps": str(run.summary["steps"])}
    row |= {"precision": str(run.settings["trainer.precision"])}
    return row | fingerprints(run) | routing(run.folder)


def fingerprints(run: Run) -> dict[str, str]:
    """Return short hashes of all settings of the method, and of all others that may change a result."""
    kept = {key: value for key, value in run.settings.items() if matters(key) and not key.endswith("seed")}
    if kept.get("dataset.lists"):
        kept["dataset.lists"] = str(Path(kept["dataset.lists"]).parent)  # folds, named by the seed
    method = {key: kept.pop(key) for key in list(kept) if key.startswith("peft.")}
    for key in ("optimizer.lr", "match"):
        kept.pop(key, None)
    kept["weights"] = run.summary["base_sha256"]
    texts = (json.dumps(each, sort_keys=True, default=str) for each in (method, kept))
    return dict(
        zip(("method", "ground"), (hashlib.sha256(t.encode()).hexdigest()[:8] for t in texts), strict=True)
    )


def routing(folder: Path) -> dict[str, str]:
    """Return how evenly a run's layers use their experts, and how the scale follows the object's size.

    The first is the entropy of the shares of all maps of the test that the experts take, over that of equal
    shares, a mean over layers. The second is Spearman's correlation over the test images of the mean scale
    with the object's share of the pixels. Empty without experts, and the second where all scales are alike.
    """
    layers = results.read_rows(folder / "routing.csv")
    if not layers:
        return {"evenness": "", "scale_by_size": ""}
    experts = sum(key.startswith("expert_") for key in layers[0])
    evenness = np.mean([float(row["entropy"]) for row in layers]) / math.log2(experts)
    images = results.read_rows(folder / "routing_images.csv")
    share, scale = ([float(row[key]) for row in images] for key in ("object_share", "mean_scale"))
    follows = f"{spearmanr(share, scale).statistic:.3f}" if np.ptp(scale) > 1e-3 and np.ptp(share) else ""
    return {"evenness": f"{evenness:.3f}", "scale_by_size": follows}


def identity(row: Mapping[str, str]) -> tuple[str, ...]:
    """Return what tells a run from all others."""
    return tuple(row[key] for key in KEYS)


def images_of(row: Mapping[str, str]) -> tuple[Path, str]:
    """Return the file and the column that hold the scores of a run's test images."""
    column = " ".join(row[key] for key in KEYS[2:] if row[key])
    return HERE / "images" / f"{row['dataset']}_{row['model']}.csv", column


def keep(folders: Iterable[Path]) -> None:
    """Add the ended runs below folders.

    Raises:
        ValueError: one is no run of this comparison, or is not to be compared with those that are kept.
    """
    rows = {identity(row): row for row in results.read_rows(HERE / "runs.csv")}
    found = {run.folder: (run, summarize(run)) for folder in folders for run in results.find(folder)}
    for folder, (_, row) in found.items():
        if rows.setdefault(identity(row), row) != row:
            raise ValueError(
                f"{folder}: another run of this setting and seed is kept, which gave another row"
            )
    check(rows.values())
    for run, row in found.values():
        if run.seed in TEST:
            path, column = images_of(row)
            table = {each.pop("image"): each for each in results.read_rows(path)}
            for image, score in run.of_images(run.primary, run.dataset).items():
                table.setdefault(image, {})[column] = f"{score:.6f}"
            path.parent.mkdir(exist_ok=True)
            write_csv(path, [{"image": image, **table[image]} for image in sorted(table)])
    ordered = sorted(rows.values(), key=lambda row: (*identity(row)[:4], float(row["lr"]), int(row["seed"])))
    write_csv(HERE / "runs.csv", ordered)


def check(rows: Iterable[Mapping[str, str]]) -> None:
    """Refuse rows that a table would compare and that differ in more than it tells; raises ValueError."""
    alike: dict[tuple[str, ...], tuple[str, Mapping[str, str]]] = {}
    for row in rows:
        place = (row["dataset"], row["model"])
        claims = [("ground", *place), ("score", *place), ("method", *place, row["form"], row["match"])]
        if int(row["seed"]) in TEST and row["form"] == "lora" and row["match"]:
            claims.append(("match", *place))
        for claim in claims:
            value, first = alike.setdefault(claim, (row[claim[0]], row))
            if value != row[claim[0]]:
                both = " and ".join(" ".join(filter(None, identity(each))) for each in (first, row))
                raise ValueError(f"{both} have different {claim[0]}, and cannot stand in one table")


def write_csv(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write rows, empty where one has no value."""
    with path.open("w", newline="") as file:
        names = dict.fromkeys([*KEYS] if not rows else [key for row in rows for key in row])
        writer = csv.DictWriter(file, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read() -> list[Kept]:
    """Return all runs that are kept."""
    runs = []
    for row in results.read_rows(HERE / "runs.csv"):
        path, column = images_of(row)
        by_image = {
            each["image"]: float(each[column]) for each in results.read_rows(path) if each.get(column)
        }
        runs.append(Kept.of(row, by_image))
    return runs


def by_setting(runs: Iterable[Kept]) -> dict[tuple[str, ...], list[Kept]]:
    """Bring runs together that differ by their seeds alone."""
    found: dict[tuple[str, ...], list[Kept]] = {}
    for run in runs:
        found.setdefault(identity(run.row)[:-1], []).append(run)
    return found


def chosen_among(runs: Iterable[Kept]) -> list[Kept]:
    """Return the runs by which learning rates and forms are chosen."""
    return [run for run in runs if identity(run.row)[:2] == CHOSEN_ON and run.seed in CHOOSE]


def best_rates(runs: Iterable[Kept]) -> dict[str, str]:
    """Return by form the best learning rate in validation of the first seed, of those that were tried."""
    tried: dict[str, dict[str, float]] = {}
    for run in chosen_among(runs):
        if run.seed == CHOOSE[0] and not run.row["match"]:
            tried.setdefault(run.row["form"], {})[run.row["lr"]] = run.validation
    return {form: max(scores, key=scores.__getitem__) for form, scores in tried.items()}


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown, whose first row is its head."""
    return [f"| {' | '.join(cells)} |" for cells in (rows[0], ["---"] * len(rows[0]), *rows[1:])]


def learning_rates(runs: Sequence[Kept]) -> list[str]:
    """Return the validation score of the first seed by form and learning rate, where several were tried."""
    first = {(run.row["form"], run.row["lr"]): run for run in chosen_among(runs) if run.seed == CHOOSE[0]}
    rates = sorted({lr for _, lr in first}, key=float)
    rows = [["form", *rates]]
    for form, best in best_rates(runs).items():
        scores = {lr: f"{first[form, lr].validation:.4f}" for lr in rates if (form, lr) in first}
        cells = {lr: f"**{score}**" if lr == best else score for lr, score in scores.items()}
        if len(cells) > 1:
            rows.append([f"`{form}`", *(cells.get(lr, "") for lr in rates)])
    return markdown(rows)


def ranked(runs: Iterable[Kept]) -> list[tuple[Estimate, Kept]]:
    """Return the validation scores of the forms that have all seeds, with a run of each, the best first."""
    whole = [
        (Estimate.of([run.validation for run in members]), members[0])
        for members in by_setting(chosen_among(runs)).values()
        if sorted(run.seed for run in members) == [*CHOOSE]
    ]
    return sorted(whole, key=lambda each: -each[0].mean)


def forms(runs: Sequence[Kept]) -> list[str]:
    """Return the validation scores of the forms that have all seeds, the best first."""
    rows = [["form", "learning rate", "trained parameters", "validation"]]
    for estimate, first in ranked(runs):
        rows.append([first.label, first.row["lr"], f"{int(first.row['trained']):,}", show(estimate)])
    return markdown(rows)


def gates(runs: Sequence[Kept]) -> list[str]:
    """Return what the gates of each setting have learnt, means over its seeds."""
    rows = [["data set", "model", "form", "learning rate", "seeds", "evenness", "scale by size"]]
    for members in by_setting(run for run in runs if run.row["evenness"]).values():
        first = members[0]
        means = []
        for column in ("evenness", "scale_by_size"):
            values = [float(run.row[column]) for run in members if run.row[column]]
            means.append(f"{np.mean(values):.2f}" if values else "one scale")
        place = [SAID[first.dataset], first.row["model"], first.label, first.row["lr"]]
        rows.append([*place, str(len(members)), *means])
    return markdown(rows)


def verdict(runs: Sequence[Kept], base: Sequence[Kept]) -> str:
    """Tell whether a form is ahead of another, behind, or which difference could have been seen."""
    found = results.difference(runs, base, base[0].primary, base[0].dataset)
    told = [show_difference(found)]
    if len(found.seeds) >= ENOUGH:
        apart = found.low > 0 or found.high < 0
        seen = f"undecided ({POWER * (found.high - found.low) / 2:.4f})"
        told.append(("ahead" if found.low > 0 else "behind") if apart else seen)
    if found.seeds != TEST:
        told.append(f"{len(found.seeds)} of {len(TEST)} seeds")
    return ", ".join(told)


def lora(runs: Sequence[Kept], dataset: str, model: str, lr: str, of_equal_size: bool) -> list[Kept]:
    """Return the tested runs of plain LoRA, of its natural size or of the best form's."""
    key = (dataset, model, "lora", lr, of_equal_size)
    tested = [run for run in runs if run.seed in TEST]
    return [run for run in tested if (*identity(run.row)[:3], run.row["lr"], bool(run.row["match"])) == key]


def tests(runs: Sequence[Kept]) -> list[str]:
    """Return the test scores of the forms on each data set beside those of plain LoRA."""
    heads = ["data set", "model", "form", "learning rate", "trained parameters", "seeds", "score", "test"]
    rows = [[*heads, "to `lora`", "to `lora` of equal size", "to `lora` of equal learning rate"]]
    best = best_rates(runs).get("lora", "")
    for (dataset, model, *_), members in by_setting(run for run in runs if run.seed in TEST).items():
        first, lr = members[0], members[0].row["lr"]
        cells = [SAID[dataset], model, first.label, lr, f"{int(first.row['trained']):,}"]
        cells += [str(len(members)), first.primary, show(Estimate.of([run.test for run in members]))]
        bases = [lora(runs, dataset, model, best, of_equal_size) for of_equal_size in (False, True)]
        bases.append(lora(runs, dataset, model, lr, of_equal_size=False) if lr != best else [])
        cells += [verdict(members, base) if base not in ([], members) else "" for base in bases]
        rows.append(cells)
    return markdown(rows)


def measured(runs: Sequence[Kept]) -> list[str]:
    """Return how Conv-LoRA as released and the form of it that was chosen stand to LoRA of equal size."""
    chosen = next((run.row["form"] for _, run in ranked(runs) if run.row["evenness"]), "conv_lora")
    best, groups = best_rates(runs), by_setting(run for run in runs if run.seed in TEST)
    lines = []
    for dataset, said in SAID.items():
        base = lora(runs, dataset, CHOSEN_ON[1], best.get("lora", ""), of_equal_size=True)
        if base:
            cells = [f"{base[0].primary} {Estimate.of([run.test for run in base]).mean:.3f} with LoRA"]
            for form in dict.fromkeys(["conv_lora", chosen]):
                members = groups.get((dataset, CHOSEN_ON[1], form, "", best.get(form, "")))
                cells += [f"{members[0].label} {verdict(members, base)}"] if members else []
            lines.append(f"- {said}: {'; '.join(cells)}")
    return lines


def fill(page: Path, title: str, lines: Iterable[str]) -> None:
    """Write lines into a page, in place of those that follow the mark of their title up to an empty one.

    Raises:
        ValueError: the page has no such mark.
    """
    mark = f"<!-- {title}: written by docs/evidence/tables.py -->\n"
    before, found, after = page.read_text().partition(mark)
    if not found:
        raise ValueError(f"{page} has no place for {title!r}; add the line {mark}")
    rest = re.sub(r"\A(.+\n)*", "", after)
    page.write_text(before + mark + "".join(f"{line}\n" for line in lines) + rest)


def main() -> None:
    """Keep the runs below the folders that are given, and write the tables."""
    keep(map(Path, sys.argv[1:]))
    runs, page = read(), HERE / "README.md"
    fill(page, "learning rates", learning_rates(runs))
    fill(page, "forms", forms(runs))
    fill(page, "gates", gates(runs))
    fill(page, "tests", tests(runs))
    fill(FRONT, "measured", measured(runs))


if __name__ == "__main__":
    main()
