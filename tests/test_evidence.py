"""Whether the tables of docs/evidence say what its rows say, and the rows what the runs did."""

import importlib.util
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from ended import drawn, plant

from convlora.results import Estimate, read_rows
from convlora.run import write_rows

HERE = Path(__file__).parents[1] / "docs/evidence"


@pytest.fixture
def tables(tmp_path: Path) -> ModuleType:
    """The script, in a copy of its folder without rows."""
    folder = tmp_path / "evidence"
    folder.mkdir()
    for name in ("tables.py", "README.md"):
        shutil.copy(HERE / name, folder)
    spec = importlib.util.spec_from_file_location("tables", folder / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tables"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def ended(
    folder: Path, form: str, seed: int, images: Sequence[float], lr: float = 1e-3, match: str = ""
) -> None:
    """A run of a form in a folder."""
    settings = {
        "model": {"name": "sam_vit_tiny"},
        "optimizer": {"lr": lr},
        "trainer": {"precision": "32-true"},
    }
    arguments = f"experiment=evidence/{form}" + (f" match={match}" if match else "")
    path = folder / f"{form}{match}_{lr}_{seed}"
    plant(path, arguments, seed, images, settings)


def cells(page: str, title: str) -> list[list[str]]:
    """The rows of the table with a title, the heads apart."""
    table = page.partition(f"<!-- {title}:")[2].partition("\n\n")[0].splitlines()[3:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def run(tables: ModuleType, monkeypatch: pytest.MonkeyPatch, *folders: Path) -> str:
    monkeypatch.setattr(sys, "argv", ["tables.py", *map(str, folders)])
    tables.main()
    return (tables.HERE / "README.md").read_text()


def test_the_committed_tables_follow_from_the_committed_rows(
    tables: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(HERE / "runs.csv", tables.HERE)
    if (HERE / "images").is_dir():
        shutil.copytree(HERE / "images", tables.HERE / "images")
    assert run(tables, monkeypatch) == (HERE / "README.md").read_text()
    assert (tables.HERE / "runs.csv").read_text() == (HERE / "runs.csv").read_text()


def test_the_best_learning_rate_and_the_forms_in_order_of_validation(
    tables: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for lr, score in ((3e-4, 0.5), (1e-3, 0.7), (3e-3, 0.6)):
        ended(tmp_path / "runs", "lora", 0, [score] * 4, lr)
    for seed in (0, 1, 2):
        ended(tmp_path / "runs", "mona", seed, [0.72 + 0.03 * seed] * 4)
    for seed in (1, 2):
        ended(tmp_path / "runs", "lora", seed, [0.8] * 4)
    page = run(tables, monkeypatch, tmp_path / "runs")
    assert cells(page, "learning rates") == [["`lora`", "0.5000", "**0.7000**", "0.6000"]]
    forms = cells(page, "forms")
    assert [row[:2] for row in forms] == [["`lora`", "0.001"], ["`mona`", "0.001"]]
    errors = (Estimate.of([0.7, 0.8, 0.8]), Estimate.of([0.72, 0.75, 0.78]))
    assert [row[3] for row in forms] == [f"{each.mean:.4f} ± {each.error:.4f}" for each in errors]


def test_a_verdict_needs_an_interval_apart_from_zero(
    tables: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shifts = {"lora": 0.0, "conv_lora": 0.1, "mona": -0.1, "layer": 0.0}
    for form, shift in shifts.items():
        for seed in range(10, 15):
            noise = np.random.default_rng(seed).normal(0, 0.02, 12) if form == "layer" else 0
            ended(tmp_path, form, seed, (np.array(drawn(seed)) + shift + noise).tolist())
    ended(tmp_path, "lora", 0, [0.0] * 12)  # a seed that chooses is no test
    rows = {row[2]: row for row in cells(run(tables, monkeypatch, tmp_path), "tests")}
    assert [rows[f"`{form}`"][-1] for form in ("lora", "conv_lora", "mona")] == ["", "ahead", "behind"]
    assert rows["`conv_lora`"][-2] == "+0.1000 [+0.1000, +0.1000]"
    low, high = map(float, re.findall(r"[+-]\d\.\d+", rows["`layer`"][-2])[1:])
    assert low < 0 < high
    assert rows["`layer`"][-1] == f"undecided; {(high - low) / 2:.3f} would have shown"


def test_runs_are_kept_once_and_stay_kept(
    tables: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    ended(first, "lora", 10, drawn(10))
    ended(second, "lora", 10, drawn(11))
    ended(second, "lora", 10, drawn(12), match="3000000")
    run(tables, monkeypatch, first)
    before = read_rows(tables.HERE / "runs.csv")
    run(tables, monkeypatch, second)
    after = read_rows(tables.HERE / "runs.csv")
    assert after[0] == before[0]
    assert [row["match"] for row in after] == ["", "3000000"]
    table = read_rows(tables.HERE / "images/kvasir.csv")
    for name, seed in (("sam_vit_tiny lora 0.001 10", 10), ("sam_vit_tiny lora 3000000 0.001 10", 12)):
        assert [float(row[name]) for row in table] == pytest.approx(drawn(seed), abs=1e-6)


def test_what_gates_learnt_is_told(
    tables: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ended(tmp_path, "conv_lora", 10, drawn(10))
    folder = next(tmp_path.glob("conv_lora*"))
    write_rows(folder / "routing.csv", "layer", {"a": {"entropy": 1.0}, "b": {"entropy": 2.0}})
    images = {f"{i}.png": {"object_share": i / 10, "mean_scale": 8.0 - i**2} for i in range(3)}
    write_rows(folder / "routing_images.csv", "image", images)
    run(tables, monkeypatch, tmp_path)
    row = read_rows(tables.HERE / "runs.csv")[0]
    assert (row["entropy"], row["scale_by_size"]) == ("1.500", "-1.000")
