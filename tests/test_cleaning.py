"""Masks by another threshold, without small parts, with holes filled: what is scored is what is written."""

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import py_sod_metrics
import pytest
import rasterio
from composed import compose
from conftest import SMALL, Commands, plant_test_set, train_in
from numpy.typing import NDArray
from safetensors import safe_open
from test_scenes import pixels, write_scene

from convlora import adapter, evaluate, predict
from convlora.cleaning import Cleaning, choose_cleaning
from convlora.data.sets.folder import Folder
from convlora.inference import Found
from convlora.metrics.overlap import dice, iou
from convlora.metrics.thresholds import LEVELS, best_threshold, overlap_by_level

QUIET = ("trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "loading.num_workers=0")


def picture(*rows: str) -> NDArray[np.uint8]:
    """A mask of `#` and `.`."""
    return np.array([[sign == "#" for sign in row] for row in rows], np.uint8)


def clean(mask: NDArray[np.uint8], **settings: int) -> NDArray[np.uint8]:
    found, prob = Cleaning(**settings)(mask, np.where(mask, 200, 50).astype(np.uint8))
    assert ((prob >= 128) == found).all()
    return found


PARTS = picture(
    "##......",
    "..#...##",
    "......##",
    "#.......",
)


def test_parts_of_fewer_pixels_are_taken_away_and_corners_join() -> None:
    assert clean(PARTS, smallest=2).tolist() == (PARTS - picture(*["........"] * 3, "#.......")).tolist()
    assert clean(PARTS, smallest=3).sum() == 7  # the three pixels that touch at a corner are one part
    assert clean(PARTS, smallest=4).sum() == 4
    assert clean(PARTS, smallest=5).sum() == 0


HOLES = picture(
    "#####.##",
    "#.#.#.#.",
    "##..####",
    "#####..#",
    ".....###",
)


def test_holes_are_what_is_enclosed_and_corners_part() -> None:
    filled = clean(HOLES, fill_holes=True)
    changed = {(int(row), int(column)) for row, column in np.argwhere(filled != HOLES)}
    assert changed == {(1, 1), (1, 3), (2, 2), (2, 3), (3, 5), (3, 6)}  # and not what reaches the border
    assert {tuple(each) for each in np.argwhere(clean(HOLES, fill_holes=1) != HOLES)} == {(1, 1)}
    assert clean(HOLES, fill_holes=3).tolist() == filled.tolist()
    bay = picture("#.#", "#.#", "###")
    for turns in range(4):
        assert (
            clean(np.ascontiguousarray(np.rot90(bay, turns)), fill_holes=True) == np.rot90(bay, turns)
        ).all()
    full, empty = np.ones((3, 4), np.uint8), np.zeros((3, 4), np.uint8)
    assert clean(full, fill_holes=True).all()
    assert not clean(empty, fill_holes=True, smallest=9).any()


def test_a_part_in_a_hole_goes_before_the_hole_is_filled() -> None:
    ring = picture("#####", "#...#", "#.#.#", "#...#", "#####")
    assert clean(ring, smallest=2, fill_holes=8).tolist() == clean(ring, smallest=2).tolist()
    assert clean(ring, smallest=2, fill_holes=9).all()


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.502, 0.6, 1.0])
def test_a_threshold_moves_only_the_probabilities_that_contradict_the_mask(threshold: float) -> None:
    prob = np.arange(256, dtype=np.uint8).reshape(16, 16)
    found, moved = Cleaning(threshold)((prob >= 128).astype(np.uint8), prob)
    expected = prob / 255 >= threshold - 1e-9
    assert (found == expected).all()
    assert ((moved >= 128) == expected).all()
    agrees = (prob >= 128) == expected
    assert (moved[agrees] == prob[agrees]).all()
    assert set(moved[~agrees].tolist()) <= {127, 128}
    assert (np.diff(moved.ravel().astype(int)) >= 0).all()


def test_scores_of_all_thresholds_are_those_of_each() -> None:
    rng = np.random.default_rng(0)
    masks = [rng.random((9, 7)) < share for share in (0.3, 0.0)]
    for mask in masks:
        prob = rng.integers(0, 200, mask.shape, np.uint8)
        found = overlap_by_level(prob, mask)
        for index, level in enumerate(LEVELS):
            shown = np.where(prob >= level, 255, 0).astype(np.uint8)
            assert found["dice"][index] == pytest.approx(dice(shown, mask))
            assert found["iou"][index] == pytest.approx(iou(shown, mask))


@pytest.mark.parametrize("level", [1, 2, 64, 128, 129, 255])
def test_the_best_threshold_means_its_level(level: int) -> None:
    means = (level == LEVELS).astype(float)
    assert Cleaning(best_threshold(means)).level == level


def test_of_equal_thresholds_the_one_nearest_to_a_half_is_taken() -> None:
    assert Cleaning(best_threshold(np.ones(255))).level == 128
    assert Cleaning(best_threshold((LEVELS < 100).astype(float))).level == 99


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_in(tmp_path_factory.mktemp("trained"), *SMALL, "logger=csv", "trainer.max_epochs=1")


@pytest.fixture
def run(cli: Commands, trained: Path) -> Path:
    """A copy in the present folder."""
    return Path(shutil.copytree(trained, "run"))


def test_what_is_scored_is_what_is_written(cli: Commands, run: Path) -> None:
    plant_test_set(Path("data/TestDataset/CHAMELEON"), 3)
    [plain] = adapter.load(run).predict(["data/TestDataset/CHAMELEON/Imgs/2.jpg"])
    level = round(float(np.quantile(plain.prob, 0.7)) / 255, 3)
    settings = (f"threshold={level}", "smallest=30", "fill_holes=true")
    done = cli(evaluate, f"checkpoint={run}", "dataset=chameleon", *QUIET, "output=out", *settings)
    assert done.code == 0, done.err
    record = json.loads(Path("out/scores.json").read_text())
    assert record["cleaning"] == {"threshold": level, "smallest": 30, "fill_holes": True}
    assert f"masks of threshold={level}, smallest=30, fill_holes=True" in done.out
    source = "input=data/TestDataset/CHAMELEON/Imgs"
    common = (f"checkpoint={run}", source, "probabilities=true", "num_workers=0")
    assert cli(predict, *common, "output=found", *settings).code == 0
    with Path("out/images.csv").open() as file:
        rows = {Path(row["image"]).stem: row for row in csv.DictReader(file)}
    for name, row in rows.items():
        mask = cv2.imread(f"data/TestDataset/CHAMELEON/GT/{name}.png", cv2.IMREAD_UNCHANGED) > 0
        found = cv2.imread(f"found/{name}.png", cv2.IMREAD_UNCHANGED)
        prob = cv2.imread(f"found/probabilities/{name}.png", cv2.IMREAD_UNCHANGED)
        assert dice(found, mask) == pytest.approx(float(row["dice"]), abs=1e-6)
        score = py_sod_metrics.MAE()
        score.step(prob, mask.astype(np.uint8) * 255)
        assert score.get_results()["mae"] == pytest.approx(float(row["mae"]), abs=1e-6)
    other = cli(predict, *common, "output=found")  # other settings made what is there
    assert "other settings made" in other.err.replace("\n", " ")
    adapter.keep_threshold(run, level, "dice")  # a threshold that is kept makes no other adapter of it
    assert cli(predict, *common, "output=found", *settings).out.startswith("3 of 3 are there already")


def plant_masks(found: Sequence[Found], paths: Sequence[Path]) -> dict[str, float]:
    """Write masks of which another threshold is best by the mean Dice than by the mean IoU; returns both."""
    rng = np.random.default_rng(0)
    while True:
        totals = dict.fromkeys(("dice", "iou"), np.zeros(255))
        masks = [each.prob >= np.quantile(each.prob, rng.uniform(0.1, 0.9)) for each in found]
        for index, (each, mask) in enumerate(zip(found, masks, strict=True)):
            masks[index] = mask ^ (rng.random(mask.shape) < rng.uniform(0, 0.3))
            values = overlap_by_level(each.prob, masks[index])
            totals = {score: total + values[score] for score, total in totals.items()}
        best = {score: best_threshold(total) for score, total in totals.items()}
        if best["dice"] != best["iou"]:
            break
    for mask, path in zip(masks, paths, strict=True):
        cv2.imwrite(str(path), np.uint8(255) * mask)
    return best


def test_a_tuned_threshold_is_kept_and_used_when_asked_for(cli: Commands, run: Path) -> None:
    """It has the greatest mean over images of the Dice or, where IoU is the primary score, of that."""
    for split in ("val", "test"):
        plant_test_set(Path("mine") / split, 3)
        for old, new in (("Imgs", "images"), ("GT", "masks")):
            Path("mine", split, old).rename(Path("mine", split, new))
    common = (f"checkpoint={run}", "dataset=folder", "data_root=mine", *QUIET)
    none = cli(evaluate, *common, "threshold=tuned")
    assert none.code == 1
    assert "threshold=tuned, but run keeps none; `python -m convlora.evaluate" in none.err
    paths = sorted(Path("mine/val/images").iterdir())
    masks = [Path(f"mine/val/masks/{path.stem}.png") for path in paths]
    best = plant_masks(adapter.load(run).predict(paths), masks)
    state = (run / "adapter.safetensors").read_bytes()[-1000:]
    for score, threshold in best.items():
        tune = ("threshold=tune", "smallest=9", f"metrics.primary={score}", f"output={score}")
        done = cli(evaluate, *common, *tune)
        assert done.code == 0, done.err
        with safe_open(run / "adapter.safetensors", "pt") as file:
            kept = file.metadata()
        assert float(kept["threshold"]) == threshold
        assert kept["threshold_by"] == f"{score} of folder's validation images"
        cleaning = json.loads(Path(score, "scores.json").read_text())["cleaning"]
        assert cleaning == {"threshold": threshold, "smallest": 9, "fill_holes": False}
    assert (run / "adapter.safetensors").read_bytes()[-1000:] == state
    assert cli(evaluate, *common, "threshold=tuned", "smallest=9", "output=again").code == 0
    again, first = (json.loads(Path(name, "scores.json").read_text()) for name in ("again", score))
    assert again["dice"] == first["dice"]
    mask = adapter.load(run).predict("mine/test/images/0.jpg").prob / 255 >= threshold
    source = "input=mine/test/images"
    done = cli(predict, f"checkpoint={run}", source, "output=m", "threshold=tuned", "num_workers=0")
    assert done.code == 0, done.err
    assert ((cv2.imread("m/0.png", cv2.IMREAD_UNCHANGED) > 0) == mask).all()


def test_no_threshold_is_kept_in_a_file_of_the_hub(cli: Commands) -> None:
    """It is told before the hub is asked for the file."""
    done = cli(evaluate, "checkpoint=user/repo@v1", "dataset=synthetic", *QUIET, "threshold=tune")
    assert done.code == 1
    told = " ".join(done.err.split())
    assert "`hf download user/repo adapter.safetensors --revision v1 --local-dir repo` copies it" in told
    assert told.endswith("then set checkpoint=repo")


def test_scenes_take_a_threshold_but_nothing_that_needs_the_whole_mask(cli: Commands, run: Path) -> None:
    write_scene(Path("scenes/a.tif"), pixels(64, 96))
    common = (f"checkpoint={run}", "input=scenes", "tile=48", "num_workers=0", "probabilities=true")
    assert cli(predict, *common, "output=plain").code == 0
    prob = cv2.imread("plain/probabilities/a.tif", cv2.IMREAD_UNCHANGED)
    level = round(float(np.quantile(prob, 0.7)) / 255, 3)
    done = cli(predict, *common, "output=masks", f"threshold={level}")
    assert done.code == 0, done.err
    with rasterio.open("masks/a.tif") as file:
        found = file.read(1)
    assert (found == (prob >= Cleaning(level).level)).all()
    assert 0 < found.mean() < 1
    for setting in ("smallest=9", "fill_holes=true"):
        refused = cli(predict, *common, "output=other", setting)
        assert refused.code == 1
        assert "needs the whole mask, but scenes/a.tif is written by windows" in refused.err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((0, 0, False), "threshold=0 must lie above 0"),
        ((1.5, 0, False), "threshold=1.5 must lie above 0"),
        (("half", 0, False), "threshold=half is not possible here; set a number"),
        ((0.5, -1, False), "smallest=-1 must be at least 0, in pixels"),
        ((0.5, 0, -1), "fill_holes=-1 must be at least 0, in pixels"),
    ],
)
def test_impossible_settings_are_refused(settings: tuple[Any, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_cleaning(*settings, {}, ["a"], "RUN")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("threshold=half", "threshold=half is not possible here; set a number"),
        ("fill_holes=some", "fill_holes=some is not possible"),
    ],
)
def test_both_commands_refuse_impossible_settings(
    cli: Commands, run: Path, setting: str, message: str
) -> None:
    plant_test_set(Path("data/TestDataset/CHAMELEON"), 1)
    done = cli(evaluate, f"checkpoint={run}", "dataset=chameleon", *QUIET, "output=out", setting)
    assert (done.code, message in done.err) == (1, True), done.err
    source = "input=data/TestDataset/CHAMELEON/Imgs"
    done = cli(predict, f"checkpoint={run}", source, "output=found", setting)
    assert (done.code, message in done.err) == (1, True), done.err


def test_several_classes_take_none_of_it() -> None:
    assert choose_cleaning(0.5, 0, False, {}, ["a", "b"], "RUN").is_idle
    for settings in (
        (0.4, 0, False),
        (0.5, 9, False),
        (0.5, 0, True),
        ("tuned", 0, False),
        ("tune", 0, False),
    ):
        with pytest.raises(ValueError, match="are for a foreground alone, but RUN tells 2 classes apart"):
            choose_cleaning(*settings, {}, ["a", "b"], "RUN")
    composed = compose("evaluate", "dataset=synthetic", "checkpoint=RUN", "threshold=tune", "output=out")
    config = evaluate.EvaluateConfig(
        **{key: composed[key] for key in evaluate.EvaluateConfig.__annotations__}
    )
    data = Folder(name="mine", root=Path(), class_names=["a", "b"])
    with pytest.raises(ValueError, match=r"but RUN tells 2 classes apart \(a, b\); leave them out"):
        evaluate.make_tuning(config, None, data)  # type: ignore[arg-type]  # which it does not get to
