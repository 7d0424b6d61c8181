"""Several classes from end to end: trained, tested, scored on two ranks, predicted with a palette."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
from conftest import SMALL, Commands, train_in
from dashboards import dashboards, missing, unshown, workspace
from PIL import Image
from ranks import command, together

from convlora import IGNORED, evaluate, predict, train

NAMES = ["grass", "sea", "sand"]
COLORS = [[10, 200, 30], [0, 0, 250], [240, 220, 90]]
CLASSES = (
    f"dataset.class_names=[{','.join(NAMES)}]",
    f"dataset.class_colors={COLORS}".replace(" ", ""),
    "dataset.ignore_index=[1,2,3]",
    "loss=cross_entropy_dice",
    "metrics=multiclass",
    "loading.num_workers=0",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
)
MODEL = ("model=sam_tiny", *(option for option in SMALL if option.startswith(("model.", "optimizer."))))
DATA = ("dataset=folder", "data_root=mine")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classes that differ in their noise, coloured masks with ignored pixels; three test images."""
    folder, rng = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    colors = np.array([*COLORS, [1, 2, 3]], np.uint8)
    for split, count in (("train", 8), ("val", 2), ("test", 3)):
        for kind in ("images", "masks"):
            (folder / "mine" / split / kind).mkdir(parents=True)
        for i in range(count):
            ids = np.repeat(rng.permuted([[0, 1, 2], [2, 0, 1]], axis=1), 24, axis=0).repeat(18, axis=1)
            noise = rng.normal(0, 1, (*ids.shape, 3)) * np.array([0, 30, 120])[ids][..., None]
            image = np.clip(128 + noise, 0, 255).astype(np.uint8)
            ids[:, :6] = 3
            Image.fromarray(image).save(folder / f"mine/{split}/images/{i}.png")
            Image.fromarray(colors[ids]).save(folder / f"mine/{split}/masks/{i}.png")
    return folder


@pytest.fixture
def mine(cli: Commands, place: Path) -> Path:
    """A copy of the images in the present folder."""
    return Path(shutil.copytree(place / "mine", "mine"))


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    options = ("loading.batch_size=2", "optimizer.lr=1e-2", "trainer.max_epochs=15", "logger=wandb")
    return train_in(place, *DATA, *CLASSES, *MODEL, *options)


@pytest.fixture
def run(mine: Path, trained: Path) -> Path:
    """A copy in the present folder."""
    return Path(shutil.copytree(trained, "run", symlinks=True))  # some of W&B lead nowhere


def truth(path: Path) -> np.ndarray:  # type: ignore[type-arg]
    pixels = np.asarray(Image.open(path)).astype(int)
    ids = np.full(pixels.shape[:2], IGNORED)
    for index, color in enumerate(COLORS):
        ids[(pixels == color).all(axis=2)] = index
    return ids


def test_classes_are_learnt_scored_and_predicted_alike(cli: Commands, run: Path) -> None:
    """The written PNGs, scored by scikit-learn, give what training and evaluation say."""
    summary = json.loads((run / "summary.json").read_text())
    assert summary["val/miou"] > 0.3  # of one class everywhere it would be a ninth
    left = {path.name for path in run.iterdir()}
    assert left >= {"overlays.png", "images.csv", "confusion.csv", "confusion.png", "reliability.png"}
    [dashboard] = dashboards(run)
    view, absent = workspace(run), {"test/scores_table", "train/routing", "train/experts", "^routing/"}
    assert missing(view, dashboard) == absent | {"^test/[^/]+/.*measure"}
    assert unshown(view, dashboard) == set()
    assert [row["truth"] for row in dashboard.tables["test/confusion_table"]] == NAMES
    checkpoint = f"checkpoint={run}/adapter.safetensors"
    done = cli(evaluate, checkpoint, *DATA, *CLASSES, "output=out")
    assert done.code == 0, done.err
    assert "iou_sand" in done.out
    record = json.loads(Path("out/scores.json").read_text())
    assert {name: record[name] for name in summary["test"]} == pytest.approx(summary["test"], abs=1e-6)
    found = cli(predict, checkpoint, "input=mine/test/images", "output=found", "overlays=true",
                "probabilities=true", "num_workers=0")  # fmt: skip
    assert found.code == 0, found.err
    true, guessed = [], []
    for i in range(3):
        with Image.open(f"found/{i}.png") as mask, Image.open(f"found/overlays/{i}.png") as overlay:
            assert mask.mode == "P"
            assert mask.getpalette()[:9] == [channel for color in COLORS for channel in color]  # type: ignore[index]
            guessed.append(np.asarray(mask))
            assert overlay.height > mask.height  # for the legend below
        true.append(truth(Path(f"mine/test/masks/{i}.png")))
    valid = np.stack(true) != IGNORED
    expected = sklearn.metrics.jaccard_score(np.stack(true)[valid], np.stack(guessed)[valid], average=None)
    assert record["miou"] == pytest.approx(expected.mean(), abs=1e-6)
    assert record["iou_sea"] == pytest.approx(expected[1], abs=1e-6)
    with Path("out/confusion.csv").open() as file:
        rows = [[int(row[name]) for name in NAMES] for row in csv.DictReader(file)]
    matrix = sklearn.metrics.confusion_matrix(np.stack(true)[valid], np.stack(guessed)[valid])
    assert rows == matrix.tolist()


def test_two_ranks_score_several_classes_as_one_does(cli: Commands, run: Path, tmp_path: Path) -> None:
    # sums of floats depend on what else is in a batch
    common = (f"checkpoint={run}/adapter.safetensors", *DATA, *CLASSES, "loading.batch_size=1")
    done = cli(evaluate, *common, "output=one")
    assert done.code == 0, done.err
    together(command, tmp_path, evaluate.__name__, *common, "output=two")
    one, two = (json.loads(Path(name, "scores.json").read_text()) for name in ("one", "two"))
    assert two["images"] == 3
    assert {k: v for k, v in two.items() if isinstance(v, float)} == pytest.approx(
        {k: v for k, v in one.items() if isinstance(v, float)}, abs=1e-6
    )
    for file in ("confusion.csv", "images.csv"):
        assert Path("two", file).read_text() == Path("one", file).read_text()


def test_a_model_of_other_classes_is_refused(cli: Commands, run: Path) -> None:
    done = cli(evaluate, f"checkpoint={run}/adapter.safetensors", "dataset=synthetic", "output=out")
    assert done.code == 1
    assert "adapter.safetensors has 3 classes (grass, sea, sand), synthetic has 1 (object)" in done.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["metrics=binary"], "metrics.scores.dice is for a foreground, but the data set has 3 classes ("),
        (["loss=structure"], "the loss is for a foreground, here are 3 classes; set loss=cross_entropy_dice"),
        (["model.head=query"], "model.head has another name by now: write head"),
        (["dataset.ignore_index=null"], "[1, 2, 3], which is none of the 3 classes"),
        (["dataset.class_colors=null", "dataset.ignore_index=null"], "give the classes' colours in dataset"),
    ],
)  # fmt: skip
def test_mistakes_are_told_with_the_way_out(
    cli: Commands, mine: Path, changes: list[str], message: str
) -> None:
    done = cli(train, *DATA, *CLASSES, *MODEL, "trainer.max_epochs=1", "logger=csv", "run_dir=run", *changes)
    assert done.code == 1
    assert message in done.err
