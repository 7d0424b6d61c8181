import csv
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import py_sod_metrics
import pytest
from conftest import SMALL, Commands, plant_test_set, train_in
from PIL import Image
from processes import Training
from ranks import command, together

from convlora import evaluate, predict

TEST_SET = ("dataset=synthetic", "dataset.size=48", "dataset.test_size=5", "loading.num_workers=0")
QUIET = ("trainer.accelerator=cpu", "trainer.enable_progress_bar=false")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_in(tmp_path_factory.mktemp("trained"), *SMALL, "logger=csv")


@pytest.fixture
def run(cli: Commands, trained: Path) -> Path:
    """A copy in the present folder."""
    return Path(shutil.copytree(trained, "run"))


def scores(folder: str | Path) -> dict[str, float]:
    record: dict[str, float] = json.loads((Path(folder) / "scores.json").read_text())
    return {name: value for name, value in record.items() if isinstance(value, int | float)}


def test_adapter_reproduces_its_scores_in_a_new_process(run: Path, tmp_path: Path) -> None:
    arguments = (f"checkpoint={run}/adapter.safetensors", *TEST_SET, *QUIET, "output=again")
    done = Training(tmp_path, arguments, module=evaluate.__name__).ended()
    assert done.code == 0, done.err
    expected = json.loads((run / "summary.json").read_text())["test"]
    found = scores("again")
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert (Path("again") / "overlays.png").is_file()


def test_means_are_those_of_the_image_table_which_no_other_takes_the_place_of(
    cli: Commands, run: Path
) -> None:
    done = cli(evaluate, f"checkpoint={run}/adapter.safetensors", *TEST_SET, *QUIET, "output=out",
               "loading.batch_size=2")  # fmt: skip
    assert done.code == 0, done.err
    with Path("out/images.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    for name in ("dice", "iou", "mae", "s_measure", "e_measure", "weighted_f_measure"):
        assert np.mean([float(row[name]) for row in rows]) == pytest.approx(scores("out")[name], abs=1e-6)
        assert f"{scores('out')[name]:.4f}" in done.out
    for output in ("out", "run"):
        before = {path: path.read_bytes() for path in Path(output).iterdir() if path.is_file()}
        refused = cli(evaluate, "checkpoint=nowhere", *TEST_SET, *QUIET, f"output={output}")
        assert f"output={output} already holds a run or an evaluation" in refused.err
        assert {path: path.read_bytes() for path in Path(output).iterdir() if path.is_file()} == before


def test_two_ranks_tune_and_score_odd_sets_as_one_does(cli: Commands, run: Path, tmp_path: Path) -> None:
    odd = ("dataset.val_size=3", "threshold=tune")
    common = (f"checkpoint={run}/adapter.safetensors", *TEST_SET, *odd, *QUIET)
    done = cli(evaluate, *common, "output=one")
    assert done.code == 0, done.err
    together(command, tmp_path, evaluate.__name__, *common, "output=two")
    assert scores("two")["images"] == 5
    assert scores("two") == pytest.approx(scores("one"), abs=1e-6)
    assert Path("two/images.csv").read_text() == Path("one/images.csv").read_text()
    one, two = (json.loads(Path(name, "scores.json").read_text())["cleaning"] for name in ("one", "two"))
    assert one == two
    assert one["threshold"] != 0.5


def test_written_masks_score_the_same_by_pysodmetrics(cli: Commands, run: Path, tmp_path: Path) -> None:
    """Predict a folder of images, then score the PNGs without any of this library's scores."""
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (tmp_path / "mine" / kind).mkdir(parents=True)
    for i, (height, width) in enumerate([(40, 40), (70, 50), (33, 90)]):
        cv2.imwrite(f"mine/images/{i}.png", rng.integers(0, 255, (height, width, 3), np.uint8))
        mask = np.zeros((height, width), np.uint8)
        mask[8:30, 10:35] = 255
        cv2.imwrite(f"mine/masks/{i}.png", mask)
    checkpoint = f"checkpoint={run}/adapter.safetensors"
    folder = ("dataset=folder", "data_root=mine", "loading.num_workers=0")
    assert cli(evaluate, checkpoint, *folder, *QUIET, "output=out").code == 0
    done = cli(
        predict, checkpoint, "input=mine/images", "output=found", "probabilities=true", "num_workers=0"
    )
    assert done.code == 0, done.err
    s, e, f, mae = (py_sod_metrics.Smeasure(), py_sod_metrics.Emeasure(), py_sod_metrics.WeightedFmeasure(),
                    py_sod_metrics.MAE())  # fmt: skip
    overlap = py_sod_metrics.FmeasureV2({
        "dice": py_sod_metrics.DICEHandler(with_dynamic=False, with_adaptive=False, with_binary=True,
                                           sample_based=True),
        "iou": py_sod_metrics.IOUHandler(with_dynamic=False, with_adaptive=False, with_binary=True,
                                         sample_based=True),
    })  # fmt: skip
    for i in range(3):
        mask = cv2.imread(f"mine/masks/{i}.png", cv2.IMREAD_GRAYSCALE)
        prob = cv2.imread(f"found/probabilities/{i}.png", cv2.IMREAD_UNCHANGED)
        binary = cv2.imread(f"found/{i}.png", cv2.IMREAD_UNCHANGED)
        for score in (s, e, f, mae):
            score.step(prob, mask)
        overlap.step(binary, mask)
    expected = {
        "s_measure": s.get_results()["sm"],
        "e_measure": e.get_results()["em"]["curve"].mean(),
        "weighted_f_measure": f.get_results()["wfm"],
        "mae": mae.get_results()["mae"],
        "dice": overlap.get_results()["dice"]["binary"],
        "iou": overlap.get_results()["iou"]["binary"],
    }
    found = scores("out")
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_dataset_must_be_named(cli: Commands, run: Path) -> None:
    done = cli(evaluate, f"checkpoint={run}/adapter.safetensors")
    assert done.code == 1
    assert "dataset" in done.err


def test_sam_as_it_is_held_in_half_precision_is_not_multiplied_in_single(cli: Commands) -> None:
    done = cli(evaluate, "model=sam_tiny", "model.frozen_dtype=bfloat16", *TEST_SET, *QUIET)
    assert done.code == 1
    assert "model.frozen_dtype=bfloat16 does not go with precision=32-true, which" in done.err
    assert "; set precision=bf16-mixed" in done.err


def test_several_test_sets_have_a_row_each(cli: Commands, run: Path) -> None:
    plant_test_set(Path("sets/TestDataset/NC4K"), 3)
    plant_test_set(Path("sets/TestDataset/COD10K"), 2)
    checkpoint = f"checkpoint={run}/adapter.safetensors"
    common = ("data_root=sets", "loading.num_workers=0", *QUIET)
    done = cli(evaluate, checkpoint, "dataset=nc4k", "test_sets=[cod10k]", "loading.batch_size=2", *common,
               "output=both")  # fmt: skip
    assert done.code == 0, done.err
    assert cli(evaluate, checkpoint, "dataset=cod10k", *common, "output=alone").code == 0
    record = json.loads(Path("both/scores.json").read_text())
    assert record["dataset"] == "nc4k"
    assert record["images"] == 3
    assert record["test_sets"]["cod10k"]["images"] == 2
    alone = scores("alone")
    assert {name: record["test_sets"]["cod10k"][name] for name in alone} == pytest.approx(alone, abs=1e-6)
    with Path("both/scores.csv").open() as file:
        rows = {row["dataset"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["nc4k", "cod10k"]
    assert float(rows["cod10k"]["s_measure"]) == pytest.approx(alone["s_measure"], abs=1e-6)
    for file in ("images.csv", "overlays.png", "reliability.png"):
        assert Path("both", file).is_file()
        assert Path("both/cod10k", file).is_file()
    assert "nc4k, test" in done.out
    assert "cod10k, test" in done.out


def test_further_test_sets_are_read_with_the_first_ones_threshold(cli: Commands, run: Path) -> None:
    for name, count in (("NC4K", 3), ("COD10K", 2)):
        plant_test_set(Path("sets/TestDataset") / name, count)
        for file in Path("sets/TestDataset", name, "GT").iterdir():
            mask = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)
            cv2.imwrite(str(file), np.where(mask > 0, 200, 40).astype(np.uint8))
    sets = ("dataset=nc4k", "test_sets=[cod10k]", "data_root=sets", "dataset.threshold=127")
    done = cli(evaluate, f"checkpoint={run}/adapter.safetensors", *sets, *QUIET, "loading.num_workers=0")
    assert done.code == 0, done.err
    assert "cod10k, test" in done.out


def test_a_missing_further_test_set_is_told_before_anything_is_scored(cli: Commands, run: Path) -> None:
    done = cli(
        evaluate, f"checkpoint={run}/adapter.safetensors", *TEST_SET, *QUIET, "test_sets=[nc4k]", "output=o"
    )
    assert done.code == 1
    assert (
        "nc4k: no Imgs under data/TestDataset/NC4K; run `python -m convlora.prepare dataset=nc4k`" in done.err
    )
    assert not Path("o/scores.json").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("[synthetic]", "synthetic is tested already"),
        ("[aerial]", "aerial has 6 (building"),
        ("[nc5k]", "nc5k"),
        ("nc4k", "input should be a valid list; write test_sets=[nc4k]"),
    ],
)
def test_further_test_sets_that_make_no_sense_are_refused(
    cli: Commands, run: Path, names: str, message: str
) -> None:
    done = cli(evaluate, f"checkpoint={run}/adapter.safetensors", *TEST_SET, *QUIET, f"test_sets={names}")
    assert done.code == 1
    assert message in done.err


def test_images_cut_into_windows_are_scored_as_they_are_predicted(cli: Commands, run: Path) -> None:
    """What `predict tiles=true` writes of large images has the scores that `evaluate tiles=true` tells."""
    plant_test_set(Path("data/TestDataset/CHAMELEON"), 3)
    large = Path("data/TestDataset/CHAMELEON/Imgs/0.jpg")
    Image.open(large).resize((150, 100)).save(large)
    Image.open("data/TestDataset/CHAMELEON/GT/0.png").resize((150, 100), 0).save(
        "data/TestDataset/CHAMELEON/GT/0.png"
    )
    cut = ("tiles=true", "tile=56")
    arguments = (f"checkpoint={run}", "dataset=chameleon", *QUIET, "loading.num_workers=0")
    done = cli(evaluate, *arguments, "output=cut", *cut)
    assert done.code == 0, done.err
    assert "by windows of 56 px" in done.out
    assert cli(evaluate, *arguments, "output=whole").code == 0
    with Path("cut/images.csv").open() as file:
        rows = {Path(row["image"]).stem: float(row["mae"]) for row in csv.DictReader(file)}
    predicted = cli(predict, f"checkpoint={run}", f"input={large.parent}", "output=masks", *cut,
                    "probabilities=true", "num_workers=0")  # fmt: skip
    assert predicted.code == 0, predicted.err
    for name, mae in rows.items():
        prob = cv2.imread(f"masks/probabilities/{name}.png", cv2.IMREAD_UNCHANGED)
        mask = cv2.imread(f"data/TestDataset/CHAMELEON/GT/{name}.png", cv2.IMREAD_GRAYSCALE)
        score = py_sod_metrics.MAE()
        score.step(prob, mask)
        assert score.get_results()["mae"] == pytest.approx(mae, abs=1e-6)
    record = json.loads(Path("cut/scores.json").read_text())
    assert record["tile"] == 56
    assert (Path("cut") / "overlays.png").is_file()
    assert scores("cut")["mae"] != pytest.approx(scores("whole")["mae"], abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tile=32",), "tile=32 has no effect, since no image is cut; add tiles=true"),
        (("tiles=true", "tile=500"), "tile=500 is larger than the images"),
        (("tiles=true", "overlap=0"), "overlap=0 must lie above 0"),
    ],
)
def test_impossible_windows_are_refused(
    cli: Commands, run: Path, arguments: tuple[str, ...], message: str
) -> None:
    plant_test_set(Path("data/TestDataset/CHAMELEON"), 1)
    done = cli(evaluate, f"checkpoint={run}", "dataset=chameleon", *QUIET, "output=out", *arguments)
    assert (done.code, message in done.err) == (1, True), done.err
