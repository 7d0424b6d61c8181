"""Keep what the runs of this comparison gave, and write its tables from what is kept.

`python docs/evidence/tables.py FOLDER ...` adds the ended runs below the folders to runs.csv and, of seeds
that test, their images to images/DATASET_MODEL.csv; without a folder it only writes the tables. Those of this
folder's README.md are whole, the project's has the verdict alone.
"""

import argparse
import csv
import hashlib
import itertools
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from convlora import results
from convlora.announce import console
from convlora.comparison import show, show_difference
from convlora.results import Difference, Estimate, Run
from convlora.run import matters

HERE = Path(__file__).parent
FRONT = HERE.parents[1] / "README.md"  # of the project
FORMS = "evidence/"  # in conf/experiment
CHOOSE, TEST = (0, 1, 2), (10, 11, 12, 13, 14)  # seeds
CHOSEN_ON = ("kvasir", "sam_vit_tiny")
CLAIMS = {
    "ground": "the settings beside the method's, or the frozen weights",
    "images": "the lists of images and their files",
    "steps": "number of training steps",
    "method": "the settings of the method",
    "match": "the size that LoRA is matched to",
}
KEYS = ("dataset", "model", "form", "match", "lr", "seed")
SAID = {
    "kvasir": "polyps",
    "camo": "camouflage",
    "leaf_disease": "leaves",
    "massachusetts_roads": "roads of Japan",
}
COMPARED = {  # seeds that the differences are of
    "kvasir": TEST[:3],
    "camo": TEST[:3],
    "leaf_disease": TEST[:3],
    "massachusetts_roads": TEST,
}
FOLDS = {"massachusetts_roads": 7.2 / 24.8}  # where each seed tests another fold: test over training images
DETECTABLE = 1.4  # half-widths of a 95 % interval that a true difference needs to be seen four times of five
PLAIN = ("lora", "lora_mlp")  # LoRA at the places of Conv-LoRA as released and of the form that was chosen


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
    row |= {"precision": str(run.settings["trainer.precision"]), "images": short(run.images)}
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
    hashed = {"method": method, "ground": kept}
    return {name: short(json.dumps(each, sort_keys=True, default=str)) for name, each in hashed.items()}


def short(text: str) -> str:
    """Return a short hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


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
    found = {run.folder: (run, summarize(run)) for folder in folders for run in ended(folder)}
    known = len(rows)
    for folder, (_, row) in found.items():
        kept = rows.setdefault(identity(row), row)
        if kept != row:
            other = ", ".join(f"{key} {row[key]} for {kept[key]}" for key in row if row[key] != kept.get(key))
            raise ValueError(
                f"{folder}: a run of this setting and seed is kept, which gave another row: {other}"
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
    if found:
        console.print(f"{len(rows) - known} runs added, {len(found) - len(rows) + known} were kept before")


def ended(folder: Path) -> list[Run]:
    """Return the runs at or below a folder that have ended; raises ValueError where there is none."""
    found = results.find(folder)
    if not found:
        raise ValueError(
            f"{folder}: no run has ended there, or there is no such folder; name that of a sweep"
        )
    return found


def check(rows: Iterable[Mapping[str, str]]) -> None:
    """Refuse rows that a table would compare and that differ in more than it tells; raises ValueError."""
    alike: dict[tuple[str, ...], tuple[str, Mapping[str, str]]] = {}
    for row in rows:
        place = (row["dataset"], row["model"])
        lists = (*place, row["seed"] if row["dataset"] in FOLDS else "")
        claims = [("ground", *place), ("images", *lists), ("steps", *lists)]
        claims.append(("method", *place, row["form"], row["match"]))
        if row["form"] == PLAIN[0] and row["match"]:
            claims.append(("match", *place))
        for claim in claims:
            value, first = alike.setdefault(claim, (row[claim[0]], row))
            if value != row[claim[0]]:
                both = " and ".join(" ".join(filter(None, identity(each))) for each in (first, row))
                raise ValueError(
                    f"{both} have different {claim[0]} ({CLAIMS[claim[0]]}), and cannot stand in one table; "
                    "train by the sweeps of conf/sweep/evidence with the same weights, or name other folders"
                )


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
    natural = (run for run in runs if not run.row["match"] and run.seed in CHOOSE)
    return [run for run in natural if identity(run.row)[:2] == CHOSEN_ON]


def best_rates(runs: Iterable[Kept]) -> dict[str, str]:
    """Return by form the best learning rate in validation of the first seed, of those that were tried."""
    tried: dict[str, dict[str, float]] = {}
    for run in chosen_among(runs):
        if run.seed == CHOOSE[0]:
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


def ranked(runs: Sequence[Kept]) -> list[list[Kept]]:
    """Return the runs of all seeds of each form at its best learning rate, the best in validation first."""
    best = best_rates(runs)
    whole = [
        members
        for (_, _, form, _, lr), members in by_setting(chosen_among(runs)).items()
        if lr == best.get(form) and seeds_of(members) == CHOOSE
    ]
    return sorted(whole, key=lambda members: -sum(run.validation for run in members))


def seeds_of(runs: Iterable[Kept]) -> tuple[int, ...]:
    """Return the seeds of runs in their order."""
    return tuple(sorted(run.seed for run in runs))


def forms(runs: Sequence[Kept]) -> list[str]:
    """Return the validation scores of the forms that have all seeds, the best first, and its lead."""
    rows = [["form", "learning rate", "trained parameters", "validation", "behind the first"]]
    ordered = ranked(runs)
    for members in ordered:
        values, first = [run.validation for run in members], members[0]
        lead = [best.validation - value for best, value in zip(ordered[0], values, strict=True)]
        cells = [first.label, first.row["lr"], f"{int(first.row['trained']):,}", show(Estimate.of(values))]
        rows.append([*cells, show(Estimate.of(lead)) if members is not ordered[0] else ""])
    return markdown(rows)


def gates(runs: Sequence[Kept]) -> list[str]:
    """Return what the gates of each setting have learnt: mean evenness, and the ends of the correlation."""
    rows = [["data set", "model", "form", "learning rate", "seeds", "evenness", "scale by size"]]
    for members in by_setting(run for run in runs if run.row["evenness"]).values():
        first = members[0]
        evenness = np.mean([float(run.row["evenness"]) for run in members])
        rho = [float(run.row["scale_by_size"]) for run in members if run.row["scale_by_size"]]
        ends = " to ".join(dict.fromkeys(f"{end:z.2f}" for end in (min(rho), max(rho)))) if rho else "alike"
        place = [SAID[first.dataset], first.row["model"], first.label, first.row["lr"]]
        rows.append([*place, str(len(members)), f"{evenness:.2f}", ends])
    return markdown(rows)


def tests(runs: Iterable[Kept]) -> list[str]:
    """Return the test scores of each setting."""
    rows = [["data set", "model", "form", "learning rate", "trained parameters", "seeds", "score", "test"]]
    for members in by_setting(run for run in runs if run.seed in TEST).values():
        first = members[0]
        cells = [SAID[first.dataset], first.row["model"], first.label, first.row["lr"]]
        cells += [f"{int(first.row['trained']):,}", str(len(members)), first.primary]
        rows.append([*cells, show(Estimate.of([run.test for run in members]))])
    return markdown(rows)


def compared(runs: Iterable[Kept]) -> dict[tuple[str, ...], list[Kept]]:
    """Return the settings that were run with all the seeds that their data set is compared on."""
    tested = by_setting(run for run in runs if run.seed in COMPARED[run.dataset])
    return {key: members for key, members in tested.items() if seeds_of(members) == COMPARED[key[0]]}


def difference(runs: Sequence[Kept], base: Sequence[Kept]) -> Difference:
    """Compare two settings with the same seeds.

    Folds share most of their training images. There the variance of a mean over k of them is 1 + k times the
    test over the training images as great (Nadeau and Bengio, Machine Learning 2003), and the interval wider.

    Raises:
        ValueError: the images that are kept do not give the scores of the runs.
    """
    dataset, seeds = base[0].dataset, len(base)
    found = results.difference(runs, base, base[0].primary, dataset)
    if (found.images == 0) != (dataset in FOLDS):
        columns = " and ".join(" ".join(filter(None, identity(each[0].row)[:-1])) for each in (runs, base))
        raise ValueError(
            f"{columns}: the images in {images_of(base[0].row)[0]} do not give the test scores in runs.csv; "
            "take both from one commit"
        )
    wider = math.sqrt(1 + seeds * FOLDS.get(dataset, 0))
    low, high = (found.mean + wider * (end - found.mean) for end in (found.low, found.high))
    return replace(found, low=low, high=high)


def verdict(found: Difference) -> str:
    """Tell whether a form is ahead of another, behind, or which difference would have been seen."""
    if found.low > 0 or found.high < 0:
        return "ahead" if found.low > 0 else "behind"
    return f"undecided ({DETECTABLE * (found.high - found.low) / 2:.4f})"


def differences(runs: Sequence[Kept]) -> list[str]:
    """Return by how much each setting exceeds each one of plain LoRA."""
    rows = [["data set", "model", "form", "learning rate", "to", "learning rate", "difference", "verdict"]]
    for (key, members), (other, base) in itertools.permutations(compared(runs).items(), 2):
        is_twin = key[2] in PLAIN and key < other  # told the other way round
        if key[:2] == other[:2] and other[2] in PLAIN and not is_twin:
            found = difference(members, base)
            names = [members[0].label, key[-1], base[0].label, other[-1]]
            rows.append([SAID[key[0]], key[1], *names, show_difference(found), verdict(found)])
    return markdown(rows)


def measured(runs: Sequence[Kept]) -> list[str]:
    """Return how Conv-LoRA as released and the chosen form stand to LoRA, in validation and in tests."""
    best, order = best_rates(runs), ranked(runs)
    chosen = next((each[0].row["form"] for each in order if each[0].row["evenness"]), "conv_lora")
    sides = dict.fromkeys([("conv_lora", ""), (chosen, ""), (chosen, PLAIN[1])])
    validations = [
        f"{each[0].label} {show(Estimate.of([run.validation for run in each]))}"
        for each in order
        if each[0].row["form"] in ("conv_lora", chosen, *PLAIN)
    ]
    lines = [f"- {SAID[CHOSEN_ON[0]]}, in validation: {'; '.join(validations)}"] if validations else []
    for dataset, said in SAID.items():
        at = {
            (form, match != ""): members
            for (place, model, form, match, lr), members in compared(runs).items()
            if (place, model) == (dataset, CHOSEN_ON[1]) and lr == best.get(form)
        }
        base = at.get((PLAIN[0], True))
        if base:
            mean = Estimate.of([run.test for run in base]).mean
            told = [f"{base[0].primary} {mean:.3f} with LoRA of equal size"]
            for form, other in sides:
                members, than = at.get((form, False)), at.get((other, False)) if other else base
                if members and than:
                    found = difference(members, than)
                    name = f"`{form}`{f' to `{other}`' if other else ''}"
                    told.append(f"{name} {show_difference(found)}, {verdict(found)}")
            lines.append(f"- {said}: {'; '.join(told)}")
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", metavar="FOLDER", nargs="*", type=Path, help="of a sweep or a run")
    try:
        keep(parser.parse_args().folders)
        runs, page = read(), HERE / "README.md"
        fill(page, "learning rates", learning_rates(runs))
        fill(page, "forms", forms(runs))
        fill(page, "gates", gates(runs))
        fill(page, "tests", tests(runs))
        fill(page, "differences", differences(runs))
        fill(page, "verdict", measured(runs))
        fill(FRONT, "measured", measured(runs))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
