"""Whether the tables of docs/evidence say what its rows say, and the rows what the runs did."""

import importlib.util
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from composed import compose
from conftest import ROOT
from ended import drawn, plant

from convlora.results import Estimate, interval, read_rows
from convlora.run import write_rows

HERE = ROOT / "docs/evidence"
INHERIT = {
    "switch": "conv_lora",
    "layer": "conv_lora",
    "scales": "conv_lora",
    "switch_scales_mlp": "conv_lora_mlp",
}
CHOOSE, TEST = range(3), range(10, 15)
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
    **more: Any,
) -> Path:
    """A run of a form in a folder."""
    settings = {"model": {"name": model}, "optimizer": {"lr": lr}, "match": match, "peft": {"name": form}}
    settings |= {"trainer": {"precision": "32-true", "max_epochs": epochs}}
    settings["dataset"] = {"lists": f"folds/{seed}" if folds else None}
    path = folder / f"{dataset}_{model}_{form}_{match}_{lr}_{seed}"
    plant(path, f"experiment=evidence/{form}", seed, images, settings, dataset, **more)
    return path


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
        family = INHERIT.get(path.stem, path.stem)
        if family in best:  # else nothing has been tried yet
            assert f"{given:g}" == best[family], path.stem


def test_learning_rates_and_forms_are_chosen_by_validation_alone(write: Write, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for lr, validation in ((3e-4, 0.5), (1e-3, 0.7), (3e-3, 0.6)):
        ended(runs, "lora", 0, [1 - validation] * 4, lr, validation=validation)
    for seed in CHOOSE:
        ended(runs, "mona", seed, [0.9] * 4, validation=0.72 + 0.03 * seed)
    for seed in (1, 2):
        ended(runs, "lora", seed, validation=0.8)
        ended(runs, "layer", seed, validation=0.99)  # lacks a seed
    ended(runs, "lora", 0, lr=1e-4, dataset="camo", validation=0.99)
    ended(runs, "lora", 0, lr=1e-4, model="mobile_sam", validation=0.99)
    ended(runs, "lora", 10, lr=1e-4, validation=0.99)
    ended(runs, "mona", 10, validation=0.0)
    page = write(runs)
    assert cells(page, "learning rates") == [["`lora`", "0.5000", "**0.7000**", "0.6000"]]
    forms = cells(page, "forms")
    errors = (Estimate.of([0.7, 0.8, 0.8]), Estimate.of([0.72, 0.75, 0.78]))
    scores = [f"{each.mean:.4f} ± {each.error:.4f}" for each in errors]
    assert [(row[0], row[1], row[3]) for row in forms] == [
        ("`lora`", "0.001", scores[0]),
        ("`mona`", "0.001", scores[1]),
    ]
    kept = read_rows(tmp_path / "docs/evidence/runs.csv")
    assert all((row["test"] != "") == (row["seed"] == "10") for row in kept)


def test_a_verdict_needs_an_interval_apart_from_zero(write: Write, tmp_path: Path) -> None:
    shifts = {"conv_lora": 0.1, "mona": -0.1, "layer": 0.0, "lora": 0.0}
    for form, shift in shifts.items():
        for seed in TEST:
            noise = np.random.default_rng(seed).normal(0, 0.02, 12) if form == "layer" else 0
            ended(tmp_path, form, seed, (np.array(drawn(seed)) + shift + noise).tolist())
    for seed in TEST:
        ended(tmp_path, "lora", seed, (np.array(drawn(seed)) + 0.2).tolist(), match=3_000_000)
        ended(tmp_path, "lora", seed, (np.array(drawn(seed)) + 0.3).tolist(), lr=1e-4)  # not the chosen one
        ended(tmp_path, "lora", seed, (np.array(drawn(seed)) + 0.4).tolist(), lr=1e-4, match=3_000_000)
    for form, count in (("switch", 3), ("scales", 2)):
        for seed in list(TEST)[:count]:
            ended(tmp_path, form, seed, (np.array(drawn(seed)) + 0.1).tolist())
    for lr, validation in ((1e-3, 0.3), (1e-4, 0.2)):
        ended(tmp_path, "lora", 0, [0.0] * 12, lr, validation=validation)  # a seed that chooses is no test
    written = cells(write(tmp_path), "tests")
    rows = {row[2]: row[4:] for row in written if row[3] == "0.001"}
    forms = ["conv_lora", "layer", "lora", "lora` `match=3000000", "mona", "scales", "switch"]
    assert [*rows] == [f"`{form}`" for form in forms]
    others = [(row[2], *row[-3:-1]) for row in written if row[3] == "0.0001"]
    ahead = {
        shift: f"+{shift} [+{shift}, +{shift}], ahead" for shift in ("0.1000", "0.2000", "0.3000", "0.4000")
    }
    assert others == [
        ("`lora`", ahead["0.3000"], ahead["0.1000"]),
        ("`lora` `match=3000000`", ahead["0.4000"], ahead["0.2000"]),
    ]
    of_equal_rate = [row[-1] for row in written if row[-1]]
    assert of_equal_rate == [ahead["0.1000"]]  # LoRA of greater size at 1e-4
    to_lora = {form: row[-3] for form, row in rows.items()}
    assert to_lora["`lora`"] == ""
    assert to_lora["`conv_lora`"] == "+0.1000 [+0.1000, +0.1000], ahead"
    assert to_lora["`mona`"] == "-0.1000 [-0.1000, -0.1000], behind"
    assert to_lora["`switch`"] == "+0.1000 [+0.1000, +0.1000], ahead, 3 of 5 seeds"
    assert to_lora["`scales`"] == "+0.1000 [+0.1000, +0.1000], 2 of 5 seeds"
    low, high, seen = map(float, re.findall(r"[+-]?\d\.\d+", to_lora["`layer`"])[1:])
    assert low < 0 < high
    assert seen == pytest.approx(0.7 * (high - low), abs=1e-4)
    matched = {form: row[-2] for form, row in rows.items()}
    assert matched["`lora` `match=3000000`"] == ""
    assert matched["`conv_lora`"] == "-0.1000 [-0.1000, -0.1000], behind"
    everything = np.array([drawn(seed) for seed in TEST]).mean(axis=1)
    assert rows["`lora`"][1:4] == [
        "5",
        "dice",
        f"{everything.mean():.4f} ± {Estimate.of(everything).error:.4f}",
    ]


def test_the_front_page_tells_of_the_form_that_validation_chose(
    tables: ModuleType, write: Write, tmp_path: Path
) -> None:
    scores = {"lora": 0.5, "conv_lora": 0.6, "switch": 0.7, "scales": 0.65, "mona": 0.9, "layer": 0.99}
    for form, score in scores.items():
        for seed in CHOOSE if form != "layer" else (0, 1):
            folder = ended(tmp_path, form, seed, validation=score)
            if form not in ("lora", "mona"):
                write_rows(
                    folder / "routing.csv", "layer", {"0": {"expert_1": 1.0, "expert_2": 0.0, "entropy": 0}}
                )
                write_rows(
                    folder / "routing_images.csv", "image", {"0": {"object_share": 0.1, "mean_scale": 1}}
                )
    for dataset, seeds in (("leaf_disease", TEST), ("kvasir", (10, 11))):
        for form, shift in {
            "lora": 0.0,
            "conv_lora": 0.1,
            "switch": -0.1,
            "scales": 0.2,
            "mona": 0.3,
        }.items():
            for seed in seeds:
                images = (np.array(drawn(seed)) + shift).tolist()
                ended(tmp_path, form, seed, images, dataset=dataset, validation=0.5)
                ended(tmp_path, form, seed, images, dataset=dataset, validation=0.5, model="mobile_sam")
                low = (np.array(images) - 0.05).tolist()
                ended(tmp_path, form, seed, low, 1e-4, dataset=dataset, validation=0.5)
                if form == "lora":
                    equal = (np.array(images) + 0.02).tolist()
                    ended(tmp_path, form, seed, equal, dataset=dataset, match=3_000_000)
                    ended(tmp_path, form, seed, low, 1e-4, dataset=dataset, match=3_000_000)
    write(tmp_path)
    written = tables.FRONT.read_text().partition("tables.py -->\n")[2].partition("\n\n")[0]
    means = [np.mean([drawn(seed) for seed in seeds]) for seeds in ((10, 11), TEST)]
    assert written.splitlines() == [
        f"- polyps: dice {means[0] + 0.02:.3f} with LoRA; `conv_lora` +0.0800 [+0.0800, +0.0800], "
        "2 of 5 seeds; `switch` -0.1200 [-0.1200, -0.1200], 2 of 5 seeds",
        f"- leaves: dice {means[1] + 0.02:.3f} with LoRA; `conv_lora` +0.0800 [+0.0800, +0.0800], ahead; "
        "`switch` -0.1200 [-0.1200, -0.1200], behind",
    ]


def test_models_and_data_sets_are_compared_apart(write: Write, tmp_path: Path) -> None:
    for place, score in (
        (("kvasir", "sam_vit_tiny"), 0.2),
        (("kvasir", "mobile_sam"), 0.5),
        (("camo", "sam_vit_tiny"), 0.7),
    ):
        for seed in TEST:
            dataset, model = place
            ended(tmp_path, "lora", seed, np.full(8, score).tolist(), dataset=dataset, model=model)
            ended(tmp_path, "mona", seed, np.full(8, score + 0.01).tolist(), dataset=dataset, model=model)
    ended(tmp_path, "lora", 0)
    rows = cells(write(tmp_path), "tests")
    assert [row[:2] for row in rows[::2]] == [
        ["camouflage", "sam_vit_tiny"],
        ["polyps", "mobile_sam"],
        ["polyps", "sam_vit_tiny"],
    ]
    assert [row[7] for row in rows[::2]] == ["0.7000 ± 0.0000", "0.5000 ± 0.0000", "0.2000 ± 0.0000"]
    assert {row[8] for row in rows[1::2]} == {"+0.0100 [+0.0100, +0.0100], ahead"}


def test_folds_are_compared_over_seeds(write: Write, tmp_path: Path) -> None:
    for seed in TEST:
        for form, shift in (("lora", 0.0), ("mona", 0.01 * seed)):
            roads = {"dataset": "massachusetts_roads", "folds": True}
            folder = ended(tmp_path, form, seed, (np.array(drawn(seed)) + shift).tolist(), **roads)
            table = (folder / "images.csv").read_text()
            (folder / "images.csv").write_text(re.sub(r"(?m)^(\d+\.png)", rf"{seed}_\1", table))
    ended(tmp_path, "lora", 0)
    row = cells(write(tmp_path), "tests")[1]
    shifts = np.array([[0.01 * seed] for seed in TEST])
    low, high = interval(shifts)
    assert row[8] == f"+0.1200 [{low:+.4f}, {high:+.4f}], ahead"


def test_runs_are_kept_once_and_stay_kept(tables: ModuleType, write: Write, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    ended(first, "lora", 10, drawn(10))
    ended(second, "lora", 10, drawn(12), match=3_000_000)
    write(first)
    before = read_rows(tables.HERE / "runs.csv")
    write(first, second)
    after = read_rows(tables.HERE / "runs.csv")
    assert after[0] == before[0]
    assert [row["match"] for row in after] == ["", "3000000"]
    table = read_rows(tables.HERE / "images/kvasir_sam_vit_tiny.csv")
    for name, seed in (("lora 0.001 10", 10), ("lora 3000000 0.001 10", 12)):
        assert [float(row[name]) for row in table] == pytest.approx(drawn(seed), abs=1e-6)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"form": "lora", "seed": 10, "images": drawn(11)}, "another run of this setting and seed"),
        ({"form": "mona", "seed": 10, "epochs": 6}, "different ground"),
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
    ended(tmp_path / "first", "lora", 10, drawn(10))
    write(tmp_path / "first")
    before = (tables.HERE / "runs.csv").read_text()
    ended(tmp_path / "second", **other)
    with pytest.raises(ValueError, match=told):
        write(tmp_path / "second")
    assert (tables.HERE / "runs.csv").read_text() == before


def test_what_gates_learnt_is_told(tables: ModuleType, write: Write, tmp_path: Path) -> None:
    shares = {"expert_1": 0.5, "expert_2": 0.5, "expert_3": 0.0, "expert_4": 0.0}
    for seed, entropies, scales in ((10, (1.0, 1.5), (8.0, 7.0, 4.0)), (11, (2.0, 2.0), (2.0, 2.0, 2.0))):
        folder = ended(tmp_path, "scales", seed)
        write_rows(folder / "routing.csv", "layer", {str(e): {**shares, "entropy": e} for e in entropies})
        images = {f"{i}.png": {"object_share": i / 10, "mean_scale": scale} for i, scale in enumerate(scales)}
        write_rows(folder / "routing_images.csv", "image", images)
    collapsed = ended(tmp_path, "scales", 0, lr=3e-3)
    for name in ("routing.csv", "routing_images.csv"):
        shutil.copy(folder / name, collapsed)
    ended(tmp_path, "lora", 10)
    page = write(tmp_path)
    rows = read_rows(tables.HERE / "runs.csv")
    found = [(row["evenness"], row["scale_by_size"]) for row in rows]
    assert found == [("", ""), ("0.625", "-1.000"), ("1.000", ""), ("1.000", "")]
    assert cells(page, "gates") == [
        ["polyps", "sam_vit_tiny", "`scales`", "0.001", "2", "0.81", "-1.00"],
        ["polyps", "sam_vit_tiny", "`scales`", "0.003", "1", "1.00", "one scale"],
    ]
