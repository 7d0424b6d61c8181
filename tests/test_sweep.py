"""Sweeps: every job is told of, none ends the others, and what was cut off goes on."""

import csv
import json
import math
import statistics
from pathlib import Path

import pytest
import torch
import yaml
from composed import compose, names
from conftest import ROOT, SMALL, Commands
from dashboards import dashboards, missing, workspace
from omegaconf import OmegaConf
from processes import Training

from convlora import results, train
from convlora.run import LAST, SUMMARY, write_record
from convlora.sweep import FAILED, Sweep, tabulate

LOGGED = (
    *SMALL,
    "dataset.train_size=4",
    "dataset.val_size=2",
    "dataset.test_size=2",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=1",
    "callbacks.routing.every_n_steps=1",
)
JOB = (*LOGGED, "logger=csv")
GRID = ("-m", *LOGGED, "peft.rank=0,2", "seed=0,1", "sweep_dir=sweep")


def rows(path: str) -> list[dict[str, str]]:
    with Path(path).open() as file:
        return list(csv.DictReader(file))


def test_a_sweep_that_was_killed_goes_on_and_names_what_failed(cli: Commands, tmp_path: Path) -> None:
    def jobs(name: str) -> list[Path]:
        return sorted(path.parent for path in (tmp_path / "sweep").glob(f"*/{name}"))

    killed = Training(tmp_path, GRID).until(lambda: len(jobs(SUMMARY)) == 1 and len(jobs(LAST)) == 2)
    killed.kill()
    [ended], begun = jobs(SUMMARY), jobs(LAST)
    kept = {path: path.read_bytes() for path in ended.iterdir() if path.is_file()}
    epochs = {path: torch.load(path / LAST, weights_only=True)["epoch"] for path in begun}

    done = cli(train, *GRID)
    assert done.code == 1
    assert f"{ended} has ended before" in done.out.replace("sweep/", f"{tmp_path}/sweep/")
    assert {path: path.read_bytes() for path in kept} == kept
    [cut] = set(begun) - {ended}
    logged = [row["step"] for row in rows(str(cut / "metrics.csv")) if row["train/loss"]]
    assert len(logged) == len(set(logged))
    assert epochs[cut] <= torch.load(cut / LAST, weights_only=True)["epoch"] == 1
    assert len(jobs(SUMMARY)) == 2
    assert "2 failed; the same command with sweep_dir=sweep tries them again" in done.out
    failed = jobs("failed.txt")
    assert len(failed) == 2
    for folder in failed:
        reason = (folder / "failed.txt").read_text().strip()
        assert reason.startswith("error: peft.rank=0 must be")
        assert f"failed: sweep/{folder.name}: {reason}" in done.out
    [row] = rows("sweep/sweep.csv")
    values = [run.summary["test"]["dice"] for run in results.find(Path("sweep"))]
    assert (row["runs"], row["score"]) == ("2", "dice")
    assert float(row["test"]) == pytest.approx(statistics.fmean(values))
    assert float(row["test_error"]) == pytest.approx(abs(values[0] - values[1]) / 2)

    logged = {folder: dashboards(folder) for folder in jobs(SUMMARY)}
    assert [len(runs) for runs in logged.values()] == [1, 1]  # although one was logged in two parts
    first, second = (run for runs in logged.values() for run in runs)
    assert first.run_id != second.run_id
    assert {*first.name.split()} ^ {*second.name.split()} == {"seed=0", "seed=1"}
    absent = {"test/confusion", "test/confusion_table", "test/scores_table", "^val/iou_", "^test/[^/]+/iou_"}
    for run in (first, second):
        assert (run.group, run.job_type) == ("synthetic/sam_tiny/conv_lora", "train")
        assert run.tags == ["synthetic", "sam_tiny", "conv_lora"]
        assert missing(workspace(tmp_path), run) == absent
    [resumed] = logged[cut]
    before, after = resumed.steps
    assert 0 < max(before) <= max(after) == 4
    assert min(after) >= 2 * (epochs[cut] + 1) - 1


def plant(folder: str, validation: float, *arguments: str, mode: str = "max") -> None:
    """A run that has ended, as far as a table looks at it."""
    path = Path(folder)
    path.mkdir(parents=True)
    best = {"monitor": "val/dice", "mode": mode}
    write_record(path, list(arguments), {"callbacks": {"best": best}, "metrics": {"primary": "iou"}})
    summary = {"dataset": "synthetic", "test": {"dice": 1 - validation}, "val/dice": validation}
    (path / SUMMARY).write_text(json.dumps(summary))


@pytest.mark.parametrize(("mode", "order"), [("max", ["8", "2", ""]), ("min", ["", "2", "8"])])
def test_the_best_mean_in_validation_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, order: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    scores = {"peft.rank=2": (0.5, 0.7), "peft.rank=8": (0.65, 0.75), "trainer.devices=1": (0.1, 0.9)}
    for setting, values in scores.items():
        for seed, value in enumerate(values):
            plant(
                f"sweep/{setting}{seed}",
                value,
                f"++{setting}",
                f"seed={seed}",
                "--config-dir=mine",
                mode=mode,
            )
    (Path("sweep") / "begun").mkdir()
    table = tabulate(Path("sweep"))
    assert [row["peft.rank"] for row in table] == order
    assert "seed" not in table[0]
    by_rank = {row["peft.rank"]: row for row in table}
    assert by_rank["2"]["validation"] == pytest.approx(0.6)
    assert by_rank["2"]["validation_error"] == pytest.approx(0.1)
    assert by_rank["8"]["test"] == pytest.approx(0.3)


def test_a_job_in_the_folder_of_another_run_is_refused(cli: Commands) -> None:
    numbered = ("-m", *JOB, "trainer.max_epochs=1", "sweep_dir=sweep", "hydra.sweep.subdir=${hydra.job.num}")
    assert cli(train, *numbered, "peft.rank=2").code == 0
    done = cli(train, *numbered, "peft.rank=3")
    assert done.code == 1
    assert "error: resume=" in done.out
    assert "peft.rank was 2, is 3" in done.out


@pytest.mark.parametrize("name", names("sweep"))
def test_a_sweep_of_conf_tries_settings_that_there_are(cli: Commands, name: str) -> None:
    params = compose("train", f"sweep={name}", return_hydra_config=True).hydra.sweeper.params
    tried = math.prod(len(values.split(",")) for key, values in params.items() if key != "seed")
    given = ["model=sam_tiny", *(["dataset=synthetic"] if name != "data_sets" else [])]
    given += ["seed=0"] if params.get("seed") == "0,1,2" else []
    done = cli(train, "-m", *given, f"sweep={name}", "dry_run=true", "sweep_dir=sweep")
    assert done.code == 0, done.err
    assert done.out.count("run folder") == tried
    alone = cli(train, f"sweep={name}", "dry_run=true")
    assert (alone.code, alone.err.splitlines()[-1]) == (1, "error: sweep=... is for several runs; add -m")


@pytest.mark.parametrize("plus", ["", "++"])
def test_values_of_the_command_stand_for_those_of_the_sweep(cli: Commands, tmp_path: Path, plus: str) -> None:
    (tmp_path / "own/sweep").mkdir(parents=True)
    params = {"peft": "lora,conv_lora", f"{plus}optimizer.lr": "1,2,3"}
    own = f"# @package _global_\n{yaml.safe_dump({'hydra': {'sweeper': {'params': params}}})}"
    (tmp_path / "own/sweep/rates.yaml").write_text(own)
    given = ("optimizer.lr=0.25,0.5", "peft=lora", "dataset=synthetic", "dry_run=true", "sweep_dir=sweep")
    done = cli(train, "-m", "--config-dir", "own", "sweep=rates", *given)
    assert done.code == 0, done.err
    assert [done.out.count(each) for each in ("run folder", "AdamW(lr=0.25", "AdamW(lr=0.5")] == [2, 1, 1]


def test_the_search_of_wandb_varies_settings_that_there_are(cli: Commands) -> None:
    search = yaml.safe_load((ROOT / "docs/wandb_sweep.yaml").read_text())
    assert search["metric"] == {"name": "val/dice", "goal": "maximize"}
    for end in (0, -1):
        values = {
            k: p.get("values", [p.get("min"), p.get("max")])[end] for k, p in search["parameters"].items()
        }
        done = cli(
            train, "dataset=kvasir", "dry_run=true", *(f"{key}={value}" for key, value in values.items())
        )
        assert done.code == 0, done.err
        assert "val/dice (max) chooses the epoch" in done.out


def test_a_sweep_forgets_failures_of_jobs_that_it_does_not_try(tmp_path: Path) -> None:
    for name, kept in (("old", False), ("older", True)):
        (tmp_path / name).mkdir()
        (tmp_path / name / FAILED).write_text("error: of another command\n")
        if kept:
            (tmp_path / name / "notes.txt").touch()
    hydra = {"sweep": {"dir": str(tmp_path)}, "sweeper": {}, "overrides": {"task": []}}
    Sweep().on_multirun_start(OmegaConf.create({"hydra": hydra}))
    left = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")]
    assert left == ["older", "older/notes.txt"]
