"""Whether the tables of docs/evidence say what its rows say, and the rows what the runs did."""

import importlib.util
import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from composed import compose
from conftest import ROOT
from ended import drawn, plant

from convlora.results import Estimate, interval, read_rows
from convlora.run import SUMMARY, write_json, write_rows

HERE = ROOT / "docs/evidence"
INHERIT = {
    "switch": "conv_lora",
    "layer": "conv_lora",
    "scales": "conv_lora",
    "switch_scales_mlp": "conv_lora_mlp",
}
CHOOSE, TEST = range(3), range(10, 15)
COMPARED = TEST[:3]  # but of roads
ROADS: dict[str, Any] = {"dataset": "massachusetts_roads", "folds": True}
Write = Callable[..., str]


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, in a copy of its folder without rows, below the project's page."""
    folder = tmp_path / "docs/evidence"
    folder.mkdir(parents=True)
    for name in ("tables.py", "README.md"):
        shutil.copy(HERE / name, folder)
    shutil.copy(ROOT / "README.md", tmp_path)
    spec = importlib.util.spec_from_file_location("tables", folder / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tables", module)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def write(tables: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Run the script on folders; returns the page."""

    def call(*folders: Path) -> str:
        monkeypatch.setattr(sys, "argv", ["tables.py", *map(str, folders)])
        tables.main()
        return (tables.HERE / "README.md").read_text()

    return call


def ended(
    folder: Path,
    form: str,
    seed: int,
    images: Sequence[float] = (0.5,) * 4,
    lr: float = 1e-3,
    match: int | None = None,
    dataset: str = "kvasir",
    model: str = "sam_vit_tiny",
    epochs: int = 5,
    folds: bool = False,
    settings: Mapping[str, object] | None = None,
    summary: Mapping[str, object] | None = None,
    **more: Any,
) -> Path:
    """A run of a form in a folder; the last settings and facts take the place of others."""
    given = {"model": {"name": model}, "optimizer": {"lr": lr}, "match": match, "peft": {"name": form}}
    given |= {"trainer": {"precision": "32-true", "max_epochs": epochs}}
    given |= {"dataset": {"lists": f"folds/{seed}" if folds else None}, **(settings or {})}
    path = folder / f"{dataset}_{model}_{form}_{match}_{lr}_{seed}"
    plant(path, f"experiment=evidence/{form}", seed, images, given, dataset, **more)
    facts = json.loads((path / SUMMARY).read_text())
    write_json(path / SUMMARY, {**facts, **(summary or {})})
    return path


def best(score: str, mode: str = "max") -> dict[str, object]:
    """Settings by which another score chooses the epoch."""
    return {"callbacks": {"best": {"monitor": f"val/{score}", "mode": mode}}}


def cells(page: str, title: str) -> list[list[str]]:
    """The rows of the table with a title, the heads apart."""
    table = re.search(rf"<!-- {title}: .*\n((?:\|.*\n)+)", page)
    assert table is not None
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()[2:]]


def test_the_committed_tables_follow_from_the_committed_rows(tables: ModuleType, write: Write) -> None:
    shutil.copy(HERE / "runs.csv", tables.HERE)
    if (HERE / "images").is_dir():
        shutil.copytree(HERE / "images", tables.HERE / "images")
    assert write() == (HERE / "README.md").read_text()
    assert tables.FRONT.read_text() == (ROOT / "README.md").read_text()
    assert (tables.HERE / "runs.csv").read_text() == (HERE / "runs.csv").read_text()
    for run in tables.read():
        if run.seed in TEST:
            assert np.mean([*run.by_image.values()]) == pytest.approx(run.test, abs=1e-5), run.row


def test_each_form_has_the_best_learning_rate_of_its_family(tables: ModuleType) -> None:
    shutil.copy(HERE / "runs.csv", tables.HERE)
    best = tables.best_rates(tables.read())
    assert {"lora", "conv_lora"} <= {*best}
    for path in (ROOT / "conf/experiment/evidence").glob("*.yaml"):
        given = compose("train", f"experiment=evidence/{path.stem}").optimizer.lr
        assert f"{given:g}" == best[INHERIT.get(path.stem, path.stem)], path.stem


def test_learning_rates_and_forms_are_chosen_by_validation_alone(write: Write, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for lr, validation in ((3e-4, 0.5), (1e-3, 0.7), (3e-3, 0.6)):
        ended(runs, "lora", 0, [1 - validation] * 4, lr, validation=validation)
    for seed in CHOOSE:
        ended(runs, "mona", seed, [0.9] * 4, validation=0.72 + 0.03 * seed)
    for seed in (1, 2):
        ended(runs, "lora", seed, validation=0.8)
        ended(runs, "layer", seed, validation=0.99)  # lacks a seed
    for seed in CHOOSE:
        ended(runs, "mona", seed, lr=3e-3, validation=0.71 + 0.1 * seed)  # worse with the first
    ended(runs, "lora", 0, lr=1e-4, match=3_000_000, validation=0.99)
    ended(runs, "lora", 0, lr=1e-4, dataset="camo", validation=0.99)
    ended(runs, "lora", 0, lr=1e-4, model="mobile_sam", validation=0.99)
    ended(runs, "lora", 10, lr=1e-4, validation=0.99)
    ended(runs, "mona", 10, validation=0.0)
    page = write(runs)
    assert cells(page, "learning rates") == [
        ["`lora`", "0.5000", "**0.7000**", "0.6000"],
        ["`mona`", "", "**0.7200**", "0.7100"],
    ]
    forms = cells(page, "forms")
    errors = (Estimate.of([0.7, 0.8, 0.8]), Estimate.of([0.72, 0.75, 0.78]))
    scores = [f"{each.mean:.4f} ± {each.error:.4f}" for each in errors]
    behind = Estimate.of([-0.02, 0.05, 0.02])
    assert [(row[0], row[1], *row[3:]) for row in forms] == [
        ("`lora`", "0.001", scores[0], ""),
        ("`mona`", "0.001", scores[1], f"{behind.mean:.4f} ± {behind.error:.4f}"),
    ]
    kept = read_rows(tmp_path / "docs/evidence/runs.csv")
    assert all((row["test"] != "") == (row["seed"] == "10") for row in kept)


def test_a_verdict_needs_an_interval_apart_from_zero(write: Write, tmp_path: Path) -> None:
    for form, shift in {"conv_lora": 0.1, "mona": -0.1, "layer": 0.0, "lora": 0.0, "lora_mlp": 0.05}.items():
        for seed in COMPARED:
            noise = np.random.default_rng(seed).normal(0, 0.02, 12) if form == "layer" else 0
            ended(tmp_path, form, seed, (np.array(drawn(seed)) + shift + noise).tolist())
    for seed in COMPARED:
        ended(tmp_path, "lora", seed, (np.array(drawn(seed)) + 0.2).tolist(), match=3_000_000)
    for seed in COMPARED[:2]:
        ended(tmp_path, "switch", seed, (np.array(drawn(seed)) + 0.1).tolist())  # lacks a seed
    ended(tmp_path, "conv_lora", 13, [0.0] * 12)  # a seed that the others lack
    ended(tmp_path, "lora", 0, [0.0] * 12)  # a seed that chooses is no test
    page = write(tmp_path)
    rows = {(row[2], row[4]): row[-2:] for row in cells(page, "differences")}
    low, high, seen = map(float, re.findall(r"[+-]?\d\.\d+", " ".join(rows.pop(("`layer`", "`lora`"))))[1:])
    assert low < 0 < high
    assert seen == pytest.approx(0.7 * (high - low), abs=1e-4)
    both = {"`lora`": 0.0, "`lora` `match=3000000`": 0.2, "`lora_mlp`": 0.05}
    forms = {"`conv_lora`": 0.1, "`mona`": -0.1}
    twins = [("`lora_mlp`", "`lora`"), ("`lora_mlp`", "`lora` `match=3000000`")]
    wanted = [(form, base) for form in forms for base in both]
    wanted += [*twins, ("`lora` `match=3000000`", "`lora`")]
    assert {pair for pair in rows if "`layer`" not in pair} == set(wanted)
    for form, base in wanted:
        shift = {**both, **forms}[form] - both[base]
        told = "ahead" if shift > 0 else "behind"
        assert rows[form, base] == [f"{shift:+.4f} [{shift:+.4f}, {shift:+.4f}]", told]
    scores = {row[2]: row[5:] for row in cells(page, "tests")}
    everything = np.array([drawn(seed) for seed in COMPARED]).mean(axis=1)
    mean = f"{everything.mean():.4f} ± {Estimate.of(everything).error:.4f}"
    assert scores["`lora`"] == ["3", "dice", mean]
    assert [scores[f"`{form}`"][0] for form in ("conv_lora", "switch")] == ["4", "2"]


def test_the_front_page_tells_of_the_form_that_validation_chose(
    tables: ModuleType, write: Write, tmp_path: Path
) -> None:
    scores = {"lora": 0.5, "conv_lora": 0.6, "switch_mlp": 0.7, "scales": 0.65, "mona": 0.9, "layer": 0.99}
    for form, score in {**scores, "lora_mlp": 0.8}.items():
        for seed in CHOOSE if form != "layer" else (0, 1):
            folder = ended(tmp_path, form, seed, validation=score)
            if form not in ("lora", "lora_mlp", "mona"):
                write_rows(
                    folder / "routing.csv", "layer", {"0": {"expert_1": 1.0, "expert_2": 0.0, "entropy": 0}}
                )
                write_rows(
                    folder / "routing_images.csv", "image", {"0": {"object_share": 0.1, "mean_scale": 1}}
                )
    shifts = {
        "lora": -0.3,
        "conv_lora": 0.1,
        "switch_mlp": -0.1,
        "scales": 0.2,
        "mona": 0.3,
        "lora_mlp": -0.2,
    }
    for dataset, seeds in (("leaf_disease", COMPARED), ("kvasir", COMPARED), ("camo", COMPARED[:2])):
        for (form, shift), seed in itertools.product(shifts.items(), seeds):
            images = (np.array(drawn(seed)) + shift).tolist()
            low = (np.array(images) - 0.05).tolist()
            if (dataset, form) != ("leaf_disease", "lora_mlp"):
                ended(tmp_path, form, seed, images, dataset=dataset, validation=0.5)
            ended(tmp_path, form, seed, images, dataset=dataset, validation=0.5, model="mobile_sam")
            ended(tmp_path, form, seed, low, 1e-4, dataset=dataset, validation=0.5)
        for seed in seeds:
            for lr, shift in ((1e-3, 0.0), (1e-4, 0.5)):
                images = (np.array(drawn(seed)) + shift).tolist()
                ended(tmp_path, "lora", seed, images, lr, match=3_000_000, dataset=dataset)
    write(tmp_path)
    written = tables.FRONT.read_text().partition("tables.py -->\n")[2].partition("\n\n")[0]
    mean = np.mean([drawn(seed) for seed in COMPARED])
    leaves = (
        f"dice {mean:.3f} with LoRA of equal size; `conv_lora` +0.1000 [+0.1000, +0.1000], ahead; "
        "`switch_mlp` -0.1000 [-0.1000, -0.1000], behind"
    )
    polyps = f"{leaves}; `switch_mlp` to `lora_mlp` +0.1000 [+0.1000, +0.1000], ahead"
    chosen = "`lora_mlp` 0.8000 ± 0.0000; `switch_mlp` 0.7000 ± 0.0000; `conv_lora` 0.6000 ± 0.0000"
    assert written.splitlines() == [
        f"- polyps, in validation: {chosen}; `lora` 0.5000 ± 0.0000",
        f"- polyps: {polyps}",
        f"- leaves: {leaves}",
    ]


def test_models_and_data_sets_are_compared_apart(write: Write, tmp_path: Path) -> None:
    places = {("camo", "sam_vit_tiny"): 0.7, ("kvasir", "mobile_sam"): 0.5, ("kvasir", "sam_vit_tiny"): 0.2}
    for ((dataset, model), score), seed in itertools.product(places.items(), COMPARED):
        ended(tmp_path, "lora", seed, np.full(8, score).tolist(), dataset=dataset, model=model)
        ended(tmp_path, "mona", seed, np.full(8, score + 0.01).tolist(), dataset=dataset, model=model)
    ended(tmp_path, "lora", 0)
    page = write(tmp_path)
    rows = cells(page, "tests")
    said = [["camouflage", "sam_vit_tiny"], ["polyps", "mobile_sam"], ["polyps", "sam_vit_tiny"]]
    assert [row[:2] for row in rows[::2]] == said
    assert [row[7] for row in rows[::2]] == [f"{score:.4f} ± 0.0000" for score in places.values()]
    found = cells(page, "differences")
    assert [row[:2] for row in found] == said
    assert {row[6] for row in found} == {"+0.0100 [+0.0100, +0.0100]"}


def test_folds_are_compared_over_seeds_that_share_training_images(write: Write, tmp_path: Path) -> None:
    for seed in TEST:
        for form, shift in (("lora", 0.0), ("mona", 0.01 * seed)):
            images = (np.array(drawn(seed)) + shift).tolist()
            road(ended(tmp_path, form, seed, images, **ROADS), seed)
    ended(tmp_path, "lora", 0)
    (row,) = cells(write(tmp_path), "differences")
    low, high = interval(np.array([[0.01 * seed] for seed in TEST]))
    wider = np.sqrt(1 + 5 * 7.2 / 24.8)
    low, high = (0.12 + wider * (end - 0.12) for end in (low, high))
    assert row[6] == f"+0.1200 [{low:+.4f}, {high:+.4f}]"


def road(folder: Path, seed: int) -> None:
    """Let a run be one that tested images of its own."""
    table = (folder / "images.csv").read_text()
    (folder / "images.csv").write_text(re.sub(r"(?m)^(\d+\.png)", rf"{seed}_\1", table))


def test_scores_of_images_that_are_not_those_of_the_runs_are_refused(
    tables: ModuleType, write: Write, tmp_path: Path
) -> None:
    for form, seed in itertools.product(("lora", "mona"), COMPARED):
        ended(tmp_path, form, seed, drawn(seed + (form == "mona")))
    write(tmp_path)
    path = tables.HERE / "images/kvasir_sam_vit_tiny.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1].rpartition(",")[0] + ",", *lines[2:]]) + "\n")
    with pytest.raises(
        SystemExit, match=r"mona 0.001 and .* lora 0.001: the images in .*kvasir_sam_vit_tiny.csv"
    ):
        write()


def test_runs_are_kept_once_and_stay_kept(
    tables: ModuleType, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    ended(first, "lora", 10, drawn(10))
    ended(second, "lora", 10, drawn(12), match=3_000_000)
    write(first)
    before = read_rows(tables.HERE / "runs.csv")
    assert capsys.readouterr().out == "1 runs added, 0 were kept before\n"
    write(first, second)
    assert capsys.readouterr().out == "1 runs added, 1 were kept before\n"
    after = read_rows(tables.HERE / "runs.csv")
    assert after[0] == before[0]
    assert [row["match"] for row in after] == ["", "3000000"]
    table = read_rows(tables.HERE / "images/kvasir_sam_vit_tiny.csv")
    for name, seed in (("lora 0.001 10", 10), ("lora 3000000 0.001 10", 12)):
        assert [float(row[name]) for row in table] == pytest.approx(drawn(seed), abs=1e-6)


@pytest.mark.parametrize("name", ["nothing", "empty", "file"])
def test_a_folder_without_a_run_is_refused(write: Write, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=f"error: .*/{name}: no run has ended there"):
        write(tmp_path / name)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"form": "lora", "seed": 10, "images": drawn(11)}, "another row: validation"),
        ({"form": "mona", "seed": 10, "epochs": 6}, "different ground"),
        ({"form": "mona", "seed": 10, "summary": {"base_sha256": "1f"}}, "different ground"),
        ({"form": "mona", "seed": 11, "training": "9 (2f)"}, "different images"),
        ({"form": "mona", "seed": 10, "summary": {"steps": 7}}, "different steps"),
        (
            {"form": "mona", "seed": 10, "settings": best("iou"), "summary": {"val/iou": 1}},
            "different ground",
        ),
        ({"form": "lora", "seed": 11, "settings": {"peft": {"rank": 4}}}, "different method"),
        ({"form": "lora", "seed": 11, "match": 4_000_000}, "different match"),
        ({"form": "mona", "seed": 10, "settings": best("dice", "min")}, "here the greatest one is best"),
        (
            {"form": "mona", "seed": 11, **ROADS, "settings": {"dataset": {"lists": "b/11"}}},
            "different ground",
        ),
        ({"form": "mona", "seed": 10, **ROADS, "training": "9 (2f)"}, "different images"),
        ({"form": "lora", "seed": 7}, "is no run of the comparison"),
        (
            {"form": "lora", "seed": 10, "dataset": "aerial"},
            "dataset=aerial seed=10 is no run of the comparison",
        ),
        ({"form": "lora", "seed": 11, "folds": True}, "folds/11, but kvasir is tested on its own lists"),
        ({"form": "lora", "seed": 11, "dataset": "massachusetts_roads"}, "is tested on the folds"),
        ({"form": "../mona", "seed": 10, "validation": float("nan")}, "val/dice is nan"),
    ],
)
def test_what_cannot_stand_beside_the_others_is_refused(
    tables: ModuleType, write: Write, tmp_path: Path, other: dict[str, Any], told: str
) -> None:
    for match, place in itertools.product((None, 3_000_000), ({}, ROADS)):
        ended(tmp_path / "first", "lora", 10, drawn(10), match=match, **place)
    ended(tmp_path / "first", "lora", 11, drawn(11), training="9 (3f)", **ROADS)  # another fold
    write(tmp_path / "first")
    before = (tables.HERE / "runs.csv").read_text()
    ended(tmp_path / "second", **other)
    with pytest.raises(SystemExit, match=told):
        write(tmp_path / "second")
    assert (tables.HERE / "runs.csv").read_text() == before


def test_what_gates_learnt_is_told(tables: ModuleType, write: Write, tmp_path: Path) -> None:
    shares = {"expert_1": 0.5, "expert_2": 0.5, "expert_3": 0.0, "expert_4": 0.0}
    for seed, entropies, scales in ((10, (1.0, 1.5), (1.4, 1.2, 1.0)), (11, (2.0, 2.0), (2.0, 2.0, 2.0))):
        folder = ended(tmp_path, "scales", seed)
        write_rows(folder / "routing.csv", "layer", {str(e): {**shares, "entropy": e} for e in entropies})
        images = {f"{i}.png": {"object_share": i / 10, "mean_scale": scale} for i, scale in enumerate(scales)}
        write_rows(folder / "routing_images.csv", "image", images)
    collapsed = ended(tmp_path, "scales", 0, lr=3e-3)
    for name in ("routing.csv", "routing_images.csv"):
        shutil.copy(folder / name, collapsed)
    turned = ended(tmp_path, "scales", 12)
    shutil.copy(folder / "routing.csv", turned)
    images = {f"{i}.png": {"object_share": i / 10, "mean_scale": 1 + i} for i in range(3)}
    write_rows(turned / "routing_images.csv", "image", images)
    same = ended(tmp_path, "scales", 1, lr=3e-3)
    shutil.copy(folder / "routing.csv", same)
    images = {f"{i}.png": {"object_share": 0.1, "mean_scale": 1 + i} for i in range(3)}
    write_rows(same / "routing_images.csv", "image", images)
    ended(tmp_path, "lora", 10)
    page = write(tmp_path)
    rows = read_rows(tables.HERE / "runs.csv")
    found = [(row["evenness"], row["scale_by_size"]) for row in rows]
    even = ("1.000", "")
    assert found == [("", ""), ("0.625", "-1.000"), even, ("1.000", "1.000"), even, even]
    assert cells(page, "gates") == [
        ["polyps", "sam_vit_tiny", "`scales`", "0.001", "3", "0.88", "-1.00 to 1.00"],
        ["polyps", "sam_vit_tiny", "`scales`", "0.003", "2", "1.00", "alike"],
    ]
