"""Runs on files of four bands of 16 bits: trained, resumed, scored, checked and used from Python."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from conftest import SMALL, Commands, train_in
from numpy.typing import NDArray
from PIL import Image
from rasterio.transform import Affine
from safetensors import safe_open

from convlora import doctor, evaluate, prepare, run, train
from convlora.adapter import load
from convlora.data.bands import Bands
from convlora.data.sets.synthetic import draw_scene

MODEL = [each for each in SMALL if not each.startswith("dataset.")]
CHANNELS = "loading.channels=[3,2,1]"
SCALE = 39  # of 8 bits to the values of a satellite


def save(path: Path, values: NDArray[Any]) -> None:
    """Write values [bands, h, w] as a GeoTIFF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"crs": "EPSG:32640", "transform": Affine(10, 0, 0, 0, -10, 0)}
    with rasterio.open(path, "w", driver="GTiff", height=values.shape[1], width=values.shape[2],
                       count=len(values), dtype=values.dtype, **profile) as file:  # fmt: skip
        file.write(values)


def plant(root: Path) -> None:
    """Scenes as blue, green, red and a fourth band."""
    for number, (split, count) in enumerate({"train": 6, "val": 2, "test": 3}.items()):
        for i in range(count):
            image, mask = draw_scene(np.random.default_rng([number, i]), 40 + 8 * i)
            values = np.concatenate([image[..., ::-1], image[..., :1] // 2], axis=2).transpose(2, 0, 1)
            save(root / split / f"images/{i}.tif", values.astype(np.uint16) * np.uint16(SCALE))
            (root / split / "masks").mkdir(exist_ok=True)
            Image.fromarray(mask * np.uint8(255)).save(root / split / f"masks/{i}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bands")
    plant(made / "mine")
    data = ("dataset=folder", "model=sam_tiny", f"data_root={made}/mine", CHANNELS, "loading.cache=ram")
    train_in(made, *data, *MODEL, "logger=csv")
    return made


@pytest.fixture
def data(folder: Path) -> tuple[str, ...]:
    return ("dataset=folder", f"data_root={folder}/mine", "loading.num_workers=0")


def bands_of(path: Path) -> Bands:
    with safe_open(path / "adapter.safetensors", "pt") as file:
        return Bands.from_json(file.metadata()["bands"])


def test_the_range_is_that_of_the_training_images_and_on_record(folder: Path) -> None:
    bands, images = bands_of(folder / "run"), sorted(folder.glob("mine/train/images/*.tif"))
    assert (bands.channels, bands.dtype) == ((3, 2, 1), "uint16")
    for number, found in zip(bands.channels, bands.ranges, strict=True):
        pixels = []
        for path in images:
            with rasterio.open(path) as file:
                pixels.append(file.read(number).ravel())
        assert found == pytest.approx(tuple(np.percentile(np.concatenate(pixels), (2, 98))))
    settings = run.read_record(folder / "run")["loading"]
    assert (settings["channels"], settings["percentiles"]) == ([3, 2, 1], [2, 98])
    summary = json.loads((folder / "run/summary.json").read_text())
    assert Bands.from_json(summary["bands"]) == bands


def test_an_evaluation_scales_as_the_training_did(cli: Commands, folder: Path, data: tuple[str, ...]) -> None:
    quiet = ("trainer.accelerator=cpu", "trainer.enable_progress_bar=false")
    done = cli(evaluate, f"checkpoint={folder}/run", *data, *quiet, "output=again")
    assert done.code == 0, done.err
    expected = json.loads((folder / "run/summary.json").read_text())["test"]
    found = json.loads(Path("again/scores.json").read_text())
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    for idle in ("loading.channels=[3,2,1]", "loading.percentiles=[2,98]"):
        refused = cli(evaluate, f"checkpoint={folder}/run", *data, idle)
        assert "has no effect here, the adapter brings its own" in refused.err


def test_python_reads_files_and_their_values_alike(folder: Path) -> None:
    predictor = load(folder / "run", device="cpu")
    assert predictor.bands == bands_of(folder / "run")
    paths = sorted(folder.glob("mine/test/images/*.tif"))
    values = []
    for path in paths:
        with rasterio.open(path) as file:
            values.append(file.read().transpose(1, 2, 0))
    found = predictor.predict(paths)
    for one, other, each in zip(found, predictor.predict(values), values, strict=True):
        assert one.classes.shape == each.shape[:2]
        assert np.array_equal(one.prob, other.prob)
    photo = np.zeros((20, 20, 3), np.uint8)
    with pytest.raises(ValueError, match=r"the image holds uint8 values, but .* uint16"):
        predictor.predict(photo)
    with pytest.raises(ValueError, match="the image has 2 bands, but channels 3, 2, 1"):
        predictor.predict(values[0][..., :2])
    with pytest.raises(ValueError, match=r"pixels are \[h, w, bands\]"):
        predictor.predict(values[0][..., 0])
    with pytest.raises(ValueError, match="the image holds uint8"):
        predictor.predict(Image.fromarray(photo))


def test_a_resumed_run_keeps_its_range_and_refuses_others(cli: Commands, folder: Path) -> None:
    shutil.copytree(folder / "run", "run")
    Path("run/adapter.safetensors").unlink()
    again = cli(train, "resume=run")
    assert again.code == 0, again.err
    bands = bands_of(folder / "run")
    assert bands_of(Path("run")) == bands
    assert f"bands {bands}" in " ".join(again.out.split())
    refused = cli(train, "resume=run", "loading.channels=[4,3,2]", "loading.percentiles=[1,99]")
    for key in (
        "loading.channels was [3, 2, 1], is [4, 3, 2]",
        "loading.percentiles was [2, 98], is [1, 99]",
    ):
        assert key in refused.err


def test_data_are_checked_before_anything_is_trained(cli: Commands, tmp_path: Path) -> None:
    plant(tmp_path / "mine")
    job = ("dataset=folder", "data_root=mine", "model=sam_tiny", *MODEL, "logger=csv", "run_dir=run")
    told = cli(train, *job, CHANNELS, "dry_run=true")
    assert "3, 2, 1 as red, green and blue, between the percentiles 2 and 98" in " ".join(told.out.split())
    looked = cli(doctor, *job, CHANNELS, "trainer.accelerator=gpu", "trainer.devices=99")
    assert "bands 3, 2, 1 of uint16 as red" in " ".join(looked.out.split())
    refusals = {
        "loading.channels=[5,3,2]": "has 4 bands, but channels 5, 3, 2 ask for band 5",
        "seed=0": r"4 bands of uint16 values, but .* train with loading\.channels=\[4,3,2\]",
    }
    for setting, message in refusals.items():
        refused = cli(train, *job, setting)
        assert refused.code == 1
        assert re.search(message, refused.err), refused.err
        assert refused.err.count("\n") <= 1
    refused = cli(train, *SMALL, CHANNELS, "run_dir=run")
    assert "loading.channels=[3, 2, 1] is for files, but scenes are drawn" in refused.err
    save(tmp_path / "mine/test/images/2.tif", np.zeros((4, 56, 56), np.float32))
    refused = cli(train, *job, CHANNELS)
    assert re.search(r"test/images/2\.tif holds float32 values", refused.err)
    assert not Path("run").exists()


def test_an_adapter_of_plain_images_refuses_bands(cli: Commands, tmp_path: Path) -> None:
    few = ("trainer.max_epochs=1", "dataset.train_size=2", "dataset.val_size=1", "dataset.test_size=1")
    assert cli(train, *SMALL, *few, "logger=csv", "run_dir=plain").code == 0
    plant(tmp_path / "mine")
    predictor = load("plain", device="cpu")
    assert predictor.bands is None
    with pytest.raises(ValueError, match=r"0\.tif has 4 bands of uint16 values, but a plain image"):
        predictor.predict("mine/test/images/0.tif")
    quiet = ("trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "loading.num_workers=0")
    refused = cli(evaluate, "checkpoint=plain", "dataset=folder", "data_root=mine", *quiet)
    assert re.search(r"0\.tif has 4 bands of uint16 values, but a plain image", refused.err)


def test_a_data_set_of_bands_is_checked(cli: Commands, tmp_path: Path) -> None:
    plant(tmp_path / "mine")
    job = ("dataset=folder", "data_root=mine", "action=check", "output=check")
    done = cli(prepare, *job, CHANNELS)
    assert done.code == 0, done.out + done.err
    report = json.loads(Path("check/check.json").read_text())
    assert {name: split["images"] for name, split in report["splits"].items()} == {
        "train": 6, "val": 2, "test": 3
    }  # fmt: skip
    sheet = np.asarray(Image.open("check/contact_sheet.png"))
    assert sheet.std() > 20, "the pictures have contrast"
    (tmp_path / "mine/train/images/0.tif").write_bytes(b"II*")
    damaged = cli(prepare, *job, CHANNELS)
    assert damaged.code == 1
    assert "train/images/0.tif: cannot be decoded" in damaged.out
    assert "errors: 1," in damaged.out
    assert "GDAL" not in damaged.out
    without = cli(prepare, *job)
    assert "train with loading.channels=[4,3,2]" in without.out
    refused = cli(prepare, *job, "loading.batch_size=2")
    assert "loading.batch_size has no effect here" in refused.err
