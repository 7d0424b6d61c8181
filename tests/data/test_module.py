from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import albumentations as A
import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from PIL import Image

from convlora.data.listing import csv_pairs
from convlora.data.loading import Loading
from convlora.data.module import Batch, Pair, SegmentationDataModule, Source, Split
from convlora.data.samples import EpochSampler
from convlora.data.sets.csv_listed import CsvListed
from convlora.data.transforms import LongestSideResize, Resize, SquareResize

SIZE = 11
SQUARE = SquareResize(16)


class Quadrants(SegmentationDataModule):
    """The same files in each split: image i is i wide at least, its top left foreground and white."""

    def pairs(self, split: Split) -> list[Pair]:
        return [Pair(self.root / f"{i}.png", self.root / f"{i}_mask.png") for i in range(SIZE)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i in range(SIZE):
        mask = np.zeros((8 + i, 12 + i), np.uint8)
        mask[:4, :5] = 255
        Image.fromarray(mask // 2 + np.uint8(i)).convert("RGB").save(tmp_path / f"{i}.png")
        Image.fromarray(mask).save(tmp_path / f"{i}_mask.png")
    return tmp_path


def quadrants(
    root: Path, augment: A.Compose | None = None, resize: Resize = SQUARE, num_workers: int = 0
) -> Quadrants:
    augment = A.Compose([A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)]) if augment is None else augment
    return Quadrants(
        name="quadrants",
        root=root,
        class_names=["top_left"],
        loading=Loading(resize, augment, num_workers=num_workers, seed=3),
    )


def train_epoch(data: Quadrants, epoch: int) -> list[Batch]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return list(loader)


def equal(a: list[Batch], b: list[Batch]) -> bool:
    return all(
        x.names == y.names and torch.equal(x.images, y.images) and all(map(torch.equal, x.masks, y.masks))
        for x, y in zip(a, b, strict=True)
    )


def test_training_depends_on_seed_and_epoch_not_on_workers(root: Path) -> None:
    noisy = A.Compose(
        [A.SomeOf([A.RandomBrightnessContrast(p=1), A.HorizontalFlip(p=1)], n=1), A.RandomCrop(6, 6)]
    )
    alone, workers = quadrants(root, noisy), quadrants(root, noisy, num_workers=2)
    torch.manual_seed(0)
    first = train_epoch(alone, epoch=5)
    train_epoch(alone, epoch=6)
    torch.manual_seed(1)
    assert equal(first, train_epoch(alone, epoch=5))
    assert equal(first, train_epoch(workers, epoch=5))
    assert not equal(first, train_epoch(alone, epoch=6))


def test_loaders_leave_the_global_generator_alone(root: Path) -> None:
    data = quadrants(root)
    state = torch.get_rng_state()
    train_epoch(data, epoch=0)
    list(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), state)


def test_flips_move_image_and_mask_together(root: Path) -> None:
    batch = next(iter(quadrants(root, A.Compose([A.HorizontalFlip(p=1)])).train_dataloader()))
    for image, mask in zip(batch.images, batch.masks, strict=True):
        assert mask[0, -1] == 1
        assert mask[0, 0] == 0
        assert image[0, 1, -2] > image[0, 1, 1]


def test_two_flips_are_drawn_independently(root: Path) -> None:
    data = quadrants(root)
    corners = set()
    for epoch in range(3):
        for batch in train_epoch(data, epoch):
            corners |= {(int(m[:, 0].any()), int(m[0].any())) for m in batch.masks}
    assert corners == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_training_content_is_of_the_augmented_image(root: Path) -> None:
    data = quadrants(root, A.Compose([A.RandomCrop(4, 8)]), LongestSideResize(16))
    for batch in train_epoch(data, epoch=0):
        assert batch.contents == [(8, 16)] * len(batch.names)
        assert (batch.images[:, :, :8] != 0).all()
        assert (batch.images[:, :, 8:] == 0).all()


def test_evaluation_keeps_each_mask_as_the_file_has_it(root: Path) -> None:
    data = quadrants(root, resize=LongestSideResize(16))
    for loader in (data.val_dataloader(), data.test_dataloader()):
        for batch in loader:
            for name, mask, content in zip(batch.names, batch.masks, batch.contents, strict=True):
                file = np.asarray(Image.open(root / name.replace(".png", "_mask.png")))
                assert np.array_equal(mask.numpy(), file // 255)
                assert content == data.loading.resize.content(*file.shape)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_takes_each_image_once_over_all_ranks(
    root: Path, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, names = quadrants(root), []
    for rank in range(world_size):
        monkeypatch.setattr(data, "_rank", lambda rank=rank: (rank, world_size))
        names += [name for batch in data.val_dataloader() for name in batch.names]
    assert sorted(names) == sorted(data.names("val"))


def test_fewer_images_than_devices_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = quadrants(root)
    monkeypatch.setattr(data, "_rank", lambda: (0, 12))
    with pytest.raises(ValueError, match=r"val has 11 images for 12 devices.*trainer\.devices=11"):
        data.val_dataloader()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_training_shards_are_disjoint_but_for_the_padding(world_size: int) -> None:
    shards = [
        list(EpochSampler(SIZE, seed=0, rank=rank, world_size=world_size)) for rank in range(world_size)
    ]
    assert {len(shard) for shard in shards} == {-(-SIZE // world_size)}
    drawn = [item for position in zip(*shards, strict=True) for item in position]
    assert sorted(index for index, _ in drawn[:SIZE]) == list(range(SIZE))
    assert drawn[SIZE:] == drawn[: len(drawn) - SIZE]


def test_sampler_covers_more_ranks_than_images() -> None:
    shards = [list(EpochSampler(2, seed=0, rank=rank, world_size=5)) for rank in range(5)]
    assert all(len(shard) == 1 for shard in shards)
    assert all(a != b for a, b in pairwise(shards))


def test_draws_differ_between_samples_epochs_and_seeds() -> None:
    draws = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        sampler = EpochSampler(SIZE, seed)
        sampler.set_epoch(epoch)
        draws += [draw for _, draw in sampler]
    assert len(set(draws)) == 3 * SIZE


class Recorder(LightningModule):
    """Trains nothing and notes what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[str]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch.names)
        return self.weight * batch.images.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_lightning_sets_the_epoch_of_the_sampler(root: Path, num_workers: int) -> None:
    data, module = quadrants(root, num_workers=num_workers), Recorder()
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, datamodule=data)
    expected = [batch.names for epoch in range(2) for batch in train_epoch(quadrants(root), epoch)]
    assert module.seen == expected


def test_sizes_that_differ_are_told_with_both_files(root: Path) -> None:
    Image.new("L", (3, 2)).save(root / "0_mask.png")
    message = r"0\.png is 12 x 8 but its mask .*0_mask\.png is 3 x 2"
    data = quadrants(root)
    with pytest.raises(ValueError, match=message):
        data.read(data.pairs("val")[0])
    workers = quadrants(root, num_workers=1)
    workers.loading = replace(
        workers.loading, batch_size=SIZE
    )  # one batch: torch is slow to stop workers whose batches nobody took
    with pytest.raises(ValueError, match=message):
        list(workers.val_dataloader())


def test_failing_augmentation_names_the_file(root: Path) -> None:
    data = quadrants(root, A.Compose([A.RandomCrop(100, 100)]))
    with pytest.raises(Exception, match=r"\.png cannot be augmented: "):
        train_epoch(data, epoch=0)


def test_half_unpacked_data_is_counted_and_named(root: Path) -> None:
    for i in range(4):
        (root / f"{i}_mask.png").unlink()
    message = r"4 of 22 files of val are missing: .*0_mask\.png, .*1_mask\.png, .*2_mask\.png; unpack"
    with pytest.raises(FileNotFoundError, match=message):
        quadrants(root).setup("validate")


def test_csv_paths_start_at_its_folder_and_other_columns_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",image,label,fold\n0,x/1.jpg,y/1.png,7\n", encoding="utf-8-sig")
    assert csv_pairs(tmp_path / "a.csv") == [Pair(tmp_path / "x/1.jpg", tmp_path / "y/1.png")]


def test_lists_of_a_fold_stand_for_those_of_the_archive(tmp_path: Path) -> None:
    (tmp_path / "fold").mkdir()
    for folder, image in ((tmp_path, "own"), (tmp_path / "fold", "fold")):
        for split in ("train", "test"):
            (folder / f"{split}.csv").write_text(f"image,label\n{image}_{split}.jpg,{split}.png\n")
    data = partial(CsvListed, name="x", root=str(tmp_path), class_names=["a"])
    assert data().pairs("test") == [Pair(tmp_path / "own_test.jpg", tmp_path / "test.png")]
    fold = data(lists=str(tmp_path / "fold"))
    assert fold.pairs("train") == [Pair(tmp_path / "fold_train.jpg", tmp_path / "train.png")]
    with pytest.raises(FileNotFoundError, match=r"x: no val\.csv in dataset\.lists=.*fold; a list of each"):
        fold.pairs("val")
    elsewhere = data(lists=str(tmp_path / "fold"), root=tmp_path / "none")
    with pytest.raises(
        FileNotFoundError, match=r"x: no images under .*none; run `python -m convlora\.prepare"
    ):
        elsewhere.setup("test")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", r"x: test lists no images under .*; write some to .*fold/test\.csv"),
        (
            "0.png,0_mask.png\n99.png,0_mask.png",
            r"1 of 4 files of test are missing: .*99\.png; correct .*fold/test",
        ),
        (
            "0.png,0_mask.png\nfold/../0.png,0_mask.png",
            r"fold/test\.csv lists .*0\.png 2 times; list each image once",
        ),
        (
            "0.png,0_mask.png\nfold/../1.png,1_mask.png",
            r"images in both .*fold/test.csv and .*fold/train.csv \(1\), fir",
        ),
    ],
)
def test_mistakes_in_a_list_of_ones_own_name_the_list(root: Path, rows: str, message: str) -> None:
    fold = root / "fold"
    fold.mkdir()
    (fold / "train.csv").write_text("image,label\n1.png,1_mask.png\n")
    (fold / "test.csv").write_text(f"image,label\n{rows}\n")
    source = Source(images={"train": 7})
    data = CsvListed(name="x", root=root, class_names=["a"], lists=str(fold), source=source)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        data.setup("test")
    (fold / "test.csv").write_text("image,label\n0.png,0_mask.png\n")
    data.setup("test")
    (fold / "val.csv").write_text("image,label\n2.png,2_mask.png\n")
    assert data.incomplete() == []  # a fold has not as many as were published


def test_the_lists_of_an_archive_are_taken_as_they_were_published(root: Path) -> None:
    for split in ("train", "test"):
        (root / f"{split}.csv").write_text("image,label\n0.png,0_mask.png\n")
    assert len(CsvListed(name="x", root=root, class_names=["a"]).pairs("train")) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,mask\na,b\n", r"a\.csv has the columns image, mask; name its two columns image and label"),
        ("image,label\na,b\nc\n", r"a\.csv: row 2 lacks an image or a label"),
    ],
)
def test_csv_without_image_or_label_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        csv_pairs(tmp_path / "a.csv")
