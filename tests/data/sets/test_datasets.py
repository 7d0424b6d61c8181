"""Every data set of conf/dataset loads from a tree with the layout of its publication."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT
from PIL import Image

from convlora.data.loading import Loading
from convlora.data.module import SPLITS, SegmentationDataModule, Source
from convlora.data.transforms import SquareResize
from convlora.schema import make

NAMES = sorted(path.stem for path in (ROOT / "conf/dataset").glob("*.yaml"))
SIZES = {"train": 5, "val": 2, "test": 3}
Draw = Callable[[int], np.ndarray]  # type: ignore[type-arg]


def config(name: str, data_root: Path) -> dict:  # type: ignore[type-arg]
    text = (ROOT / f"conf/dataset/{name}.yaml").read_text().replace("${data_root}", str(data_root))
    return {key: value for key, value in yaml.safe_load(text).items() if key != "defaults"}


def build(
    name: str, data_root: Path, shots: int | None = None, seed: int = 0, **changes: object
) -> SegmentationDataModule:
    loading = Loading(SquareResize(16), num_workers=0, shots=shots, seed=seed)
    data: SegmentationDataModule = make(f"dataset={name}", config(name, data_root) | changes, loading=loading)
    return data


def binary(index: int) -> np.ndarray:  # type: ignore[type-arg]
    mask = np.zeros((12, 15), np.uint8)
    mask[2 : 5 + index % 3, 3:9] = 255
    return mask


def write(image: Path, mask: Path, pixels: np.ndarray) -> None:  # type: ignore[type-arg]
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(str(image))).integers(0, 255, (*pixels.shape[:2], 3), np.uint8)
    Image.fromarray(noise).save(image)
    Image.fromarray(pixels).save(mask)


def listed(root: Path, csv_name: str, folder: str, images: str, masks: str, count: int, draw: Draw) -> None:
    """A CSV with an index column, as one of the archives has it, and the files that it names."""
    rows = []
    for i in range(count):
        rows.append([i, f"{folder}/{images}/{i}.jpg", f"{folder}/{masks}/{i}.png"])
        write(root / rows[-1][1], root / rows[-1][2], draw(i))
    with (root / csv_name).open("w", newline="") as file:
        csv.writer(file).writerows([["", "image", "label"], *rows])


def archive(folder: str, draw: Draw = binary) -> Callable[[Path], None]:
    def plant(data_root: Path) -> None:
        for split, count in SIZES.items():
            listed(data_root / folder, f"{split}.csv", split, "images", "masks", count, draw)

    return plant


def by_source(folder: str, source: str, images: str, masks: str) -> Callable[[Path], None]:
    def plant(data_root: Path) -> None:
        root = data_root / folder
        listed(root, "train.csv", "TrainDataset", images, masks, SIZES["train"], binary)
        listed(root, "val.csv", "ValDataset", images, masks, SIZES["val"], binary)
        listed(root, f"test_{source}.csv", f"TestDataset/{source}", images, masks, SIZES["test"], binary)

    return plant


def only_tested(folder: str) -> Callable[[Path], None]:
    def plant(data_root: Path) -> None:
        for i in range(SIZES["test"]):
            root = data_root / folder
            write(root / f"Imgs/animal-{i}.jpg", root / f"GT/animal-{i}.png", binary(i))

    return plant


def trans10k_v1(data_root: Path) -> None:
    """Colour masks; easy and hard images apart in validation and test."""
    colors = np.array([[0, 0, 0], [255, 0, 0], [255, 255, 255]], np.uint8)
    for folder, count in (("train", 5), ("validation/easy", 1), ("validation/hard", 1), ("test/easy", 1),
                          ("test/hard", 2)):  # fmt: skip
        for i in range(count):
            part = data_root / "Trans10K" / folder
            ids = np.arange(180).reshape(12, 15) % (3 if i else 1)  # one mask is black all over
            write(part / f"images/{i}.jpg", part / f"masks/{i}_mask.png", colors[ids])


def trans10k_v2(data_root: Path) -> None:
    for folder, count in (("train", 5), ("validation", 2), ("test", 3)):
        for i in range(count):
            part = data_root / "Trans10K_cls12" / folder
            ids = (np.arange(180).reshape(12, 15) % 12).astype(np.uint8)
            write(part / f"images/{i}.jpg", part / f"masks_12/{i}_mask.png", ids)


def six_classes(index: int) -> np.ndarray:  # type: ignore[type-arg]
    return ((np.arange(180).reshape(12, 15) + index) % 6).astype(np.uint8)


TREES: dict[str, Callable[[Path], None]] = {
    "kvasir": by_source("polyp", "Kvasir", "images", "masks"),
    "cvc_clinicdb": by_source("polyp", "CVC-ClinicDB", "images", "masks"),
    "camo": by_source("camo_sem_seg", "CAMO", "Imgs", "GT"),
    "cod10k": only_tested("TestDataset/COD10K"),
    "chameleon": only_tested("TestDataset/CHAMELEON"),
    "nc4k": only_tested("TestDataset/NC4K"),
    "sbu": archive("SBU-shadow"),
    "isic2017": archive("isic2017"),
    "leaf_disease": archive("leaf_disease_segmentation"),
    "massachusetts_roads": archive("road_segmentation"),
    "aerial": archive("aerial_multiclass", six_classes),
    "trans10k_v1": trans10k_v1,
    "trans10k_v2": trans10k_v2,
    "folder": lambda root: archive(".")(root),
    "synthetic": lambda root: None,
}


@pytest.mark.parametrize("name", NAMES)
def test_data_set_loads_from_its_real_layout(name: str, tmp_path: Path) -> None:
    TREES[name](tmp_path)
    changes = {f"{split}_size": SIZES[split] for split in SPLITS} if name == "synthetic" else {}
    data = build(name, tmp_path, **changes)
    for split in data.splits:
        assert len(data.listed(split)) == SIZES[split], split
        for pair in data.listed(split):
            image, mask = data.read(pair)
            assert image.shape[:2] == mask.shape
            assert mask.max() < max(2, data.num_classes)
    names = [name for split in data.splits for name in data.names(split)]
    assert len(set(names)) == len(names)
    batch = next(iter(data.test_dataloader()))
    assert batch.images.shape == (3, 3, 16, 16)
    if "train" in data.splits:
        assert len(next(iter(data.train_dataloader())).masks) == min(data.loading.batch_size, SIZES["train"])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("folder", "synthetic")])
def test_absent_data_set_names_itself_and_the_way_out(name: str, tmp_path: Path) -> None:
    message = rf"{name}: no .* run `python -m convlora\.prepare dataset={name}`, or set data_root="
    with pytest.raises(FileNotFoundError, match=message):
        build(name, tmp_path).setup("test")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("folder", "synthetic")])
def test_source_says_how_to_get_the_data(name: str, tmp_path: Path) -> None:
    source = build(name, tmp_path).source
    assert (source.url is None) != (source.steps is None)
    assert source.images or name == "aerial"  # of which no split was published


def test_trans10k_tests_the_subset_that_is_asked_for(tmp_path: Path) -> None:
    trans10k_v1(tmp_path)
    hard = build("trans10k_v1", tmp_path, test_subsets=["hard"])
    assert hard.names("test") == ["test/hard/images/0.jpg", "test/hard/images/1.jpg"]
    with pytest.raises(ValueError, match=r"trans10k_v1 has no subset hrad; choose among easy, hard"):
        build("trans10k_v1", tmp_path, test_subsets=["hrad"]).setup("test")


def test_trans10k_colours_are_things_and_stuff(tmp_path: Path) -> None:
    trans10k_v1(tmp_path)
    data = build("trans10k_v1", tmp_path)
    ids = [data.read(pair)[1] for pair in data.listed("train")]
    assert (ids[0] == 0).all()
    assert np.array_equal(ids[1], np.arange(180).reshape(12, 15) % 3)


def test_a_test_set_has_nothing_to_train_on(tmp_path: Path) -> None:
    only_tested("TestDataset/NC4K")(tmp_path)
    with pytest.raises(ValueError, match=r"nc4k is a test set .* dataset=camo test_sets=\[nc4k\]"):
        build("nc4k", tmp_path).setup("fit")


def test_few_shots_are_fixed_by_the_seed_and_nested(tmp_path: Path) -> None:
    root = tmp_path / "polyp"
    listed(root, "train.csv", "TrainDataset", "images", "masks", 40, binary)
    names = {
        (shots, seed): build("kvasir", tmp_path, shots=shots, seed=seed).names("train")
        for shots in (1, 10, 20)
        for seed in (0, 1)
    }
    for (shots, seed), few in names.items():
        assert len(few) == shots
        assert few == build("kvasir", tmp_path, shots=shots, seed=seed).names("train")
    assert set(names[1, 0]) < set(names[10, 0]) < set(names[20, 0])
    assert names[10, 0] != names[10, 1]


@pytest.mark.parametrize("shots", [0, 41, 2.5])
def test_shots_beyond_the_training_images_are_refused(tmp_path: Path, shots: float) -> None:
    listed(tmp_path / "polyp", "train.csv", "TrainDataset", "images", "masks", 40, binary)
    with pytest.raises(ValueError, match=rf"loading\.shots={shots} must be 1 to 40"):
        build("kvasir", tmp_path, shots=shots).names("train")


def test_incomplete_splits_are_counted_together_where_published_together(tmp_path: Path) -> None:
    TREES["kvasir"](tmp_path)
    source = {"_target_": "convlora.data.module.Source", "images": {"train+val": 7, "test": 4}}
    assert build("kvasir", tmp_path, source=source).incomplete() == [
        "kvasir: test has 3 images, 4 were published"
    ]
    assert Source().images == {}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("kvasir", (798, 80, 120)),
        ("camo", (500, 60, 248)),
        ("leaf_disease", (70, 15, 15)),
        ("massachusetts_roads", (24, 4, 8)),
        ("aerial", (27, 4, 9)),
    ],
)
def test_real_data_is_whole_and_disjoint(shared: Path, name: str, sizes: tuple[int, ...]) -> None:
    data = build(name, shared / "data")
    names = {split: data.names(split) for split in SPLITS}
    assert tuple(len(names[split]) for split in SPLITS) == sizes
    assert len({Path(each).stem for split in SPLITS for each in names[split]}) == sum(sizes)
    for split in SPLITS:
        image, mask = data.read(data.listed(split)[-1])
        assert image.shape[:2] == mask.shape
        assert mask.max() < max(2, data.num_classes)
