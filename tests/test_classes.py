"""Several classes from end to end: trained, tested, scored on two ranks, predicted with a palette."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
from composed import loss_of, names
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
    "metrics=multiclass",
    "loading.num_workers=0",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
)
MODEL = ("model=sam_tiny", *(option for option in SMALL if option.startswith(("model.", "optimizer."))))
DATA = ("dataset=folder", "data_root=mine")
PER_CLASS = "loss=cross_entropy_dice"


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


@pytest.fixture(scope="module", params=names("head"))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, place: Path) -> Path:
    options = (
        "loading.batch_size=2",
        "optimizer.lr=1e-2",
        "trainer.max_epochs=15",
        "logger=wandb",
        "trainer.check_val_every_n_epoch=5",
    )
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "mine").symlink_to(place / "mine")
    own = (f"head={request.param}", f"loss={loss_of(request.param)}")
    return train_in(folder, *DATA, *CLASSES, *MODEL, *options, *own)


@pytest.fixture
def loss(request: pytest.FixtureRequest) -> str:
    """The loss of the training."""
    return f"loss={loss_of(request.node.callspec.params['trained'])}"


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


def test_classes_are_learnt_scored_and_predicted_alike(cli: Commands, run: Path, loss: str) -> None:
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
    done = cli(evaluate, checkpoint, *DATA, *CLASSES, loss, "output=out")
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


def test_two_ranks_score_several_classes_as_one_does(
    cli: Commands, run: Path, tmp_path: Path, loss: str
) -> None:
    # sums of floats depend on what else is in a batch
    common = (f"checkpoint={run}/adapter.safetensors", *DATA, *CLASSES, loss, "loading.batch_size=1")
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


def test_windows_are_blended_and_scored_by_the_loss_of_logits(cli: Commands, run: Path) -> None:
    """So is a whole image, whatever the head, where no loss of its outputs is asked for."""
    common = (f"checkpoint={run}/adapter.safetensors", *DATA, *CLASSES)
    cut = ("tiles=true", "tile=40")
    found = {}
    for name, options in (("whole", ()), ("cut", cut)):
        done = cli(evaluate, *common, PER_CLASS, *options, f"output={name}")
        assert done.code == 0, done.err
        found[name] = json.loads(Path(name, "scores.json").read_text())
    assert 0 < found["whole"]["loss"] < 4
    assert found["cut"]["loss"] < 6
    refused = cli(evaluate, *common, "loss=set", *cut, "output=out")
    assert refused.code == 1
    assert "this loss is one of the head's outputs, but" in refused.err or "set head=query" in refused.err


def test_balanced_weights_are_measured_told_and_kept(cli: Commands, mine: Path) -> None:
    """Of the training masks alone, without the pixels that are ignored."""
    counts = np.zeros(3)
    for path in sorted((mine / "train/masks").iterdir()):
        own = np.array([(truth(path) == index).sum() for index in range(3)])
        counts += own / own.sum() / 8
    job = (*DATA, *CLASSES, *MODEL, "head=query", "loss.class_weights=balanced", "logger=csv")
    done = cli(train, *job, "trainer.max_epochs=1", "run_dir=run")
    assert done.code == 0, done.err
    expected = dict(zip(NAMES, np.median(counts) / counts, strict=True))
    told = json.loads(Path("run/summary.json").read_text())["class weights"]
    assert {word.split()[0]: float(word.split()[1]) for word in told.split(", ")} == pytest.approx(expected)
    assert told in " ".join(done.out.split())
    weighted = (
        *("loss=bce_dice_cldice", "loss.weights.bce_dice=0", "loss.weights.cldice=0", "+loss.weights.a=1"),
        "+loss.terms.a._target_=convlora.losses.CrossEntropyDiceLoss",
        "+loss.terms.a.class_weights=balanced",
    )
    dry = cli(train, *DATA, *CLASSES, *MODEL, *weighted, "dry_run=true", "run_dir=dry")
    assert dry.code == 0, dry.err
    assert "the median share of the pixels over each class's own" in " ".join(dry.out.split())
    lone = cli(
        evaluate, "checkpoint=run", *DATA, *CLASSES, "loss=set", "loss.class_weights=balanced", "output=o"
    )
    assert lone.code == 1
    assert "class_weights=balanced of the loss follows from training images; give the numbers" in lone.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["metrics=binary"], "metrics.scores.dice is for a foreground, but the data set has 3 classes ("),
        (["loss=structure"], "the loss is for a foreground, here are 3 classes; set loss=cross_entropy_dice"),
        (["loss=set"], "loss=set is for a head of queries, and this one gives logits; set head=query, or"),
        (["head=query", "head.num_queries=2"], "head.num_queries=2 is less than the 3 classes, each of whi"),
        (["loss.class_weights=[1,2]"], "loss.class_weights=[1.0, 2.0] are 2 numbers for 3 classes; give one"),
        (["loss.class_weights=equal"], "loss.class_weights=equal must be numbers"),
        (["model.head=query"], "model.head has another name by now: write head"),
        (["dataset.ignore_index=null"], "[1, 2, 3], which is none of the 3 classes"),
        (["dataset.class_colors=null", "dataset.ignore_index=null"], "give the classes' colours in dataset"),
    ],
)  # fmt: skip
def test_mistakes_are_told_with_the_way_out(
    cli: Commands, mine: Path, changes: list[str], message: str
) -> None:
    done = cli(
        train,
        *DATA,
        *CLASSES,
        PER_CLASS,
        *MODEL,
        "trainer.max_epochs=1",
        "logger=csv",
        "run_dir=run",
        *changes,
    )
    assert done.code == 1
    assert message in done.err
