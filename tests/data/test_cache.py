import os
import shutil
from functools import partial
from pathlib import Path

import albumentations as A
import numpy as np
import pytest
import torch
from PIL import Image

from convlora.data.cache import CachedRead
from convlora.data.loading import Loading
from convlora.data.masks import Masks
from convlora.data.module import Batch, Pair, SegmentationDataModule, Split
from convlora.data.samples import read_pair
from convlora.data.transforms import LongestSideResize, Resize, SquareResize

COUNT = 7
STILL = A.Compose([])
FLIP = A.Compose([A.HorizontalFlip(p=0.5)])


class Noise(SegmentationDataModule):
    """The same images of several sizes in each split."""

    def pairs(self, split: Split) -> list[Pair]:
        return [Pair(self.root / f"{i}.png", self.root / f"{i}_mask.png") for i in range(COUNT)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(COUNT):
        size = (20 + 5 * i, 50 - 4 * i)
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(folder / f"{i}.png")
        Image.fromarray(rng.integers(0, 2, size, np.uint8) * np.uint8(255)).save(folder / f"{i}_mask.png")
    return folder


@pytest.fixture(params=["ram", "disk"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "ram" if request.param == "ram" else str(tmp_path / "cache")


def noise(root: Path, cache: str | None, resize: Resize, augment: A.Compose, num_workers: int = 0) -> Noise:
    return Noise(
        name="noise",
        root=root,
        class_names=["object"],
        loading=Loading(resize, augment, batch_size=3, num_workers=num_workers, cache=cache),
    )


def epochs(data: Noise, count: int = 1) -> list[Batch]:
    loader, seen = data.train_dataloader(), []
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        seen.extend(loader)
    return seen


def assert_equal(found: list[Batch], expected: list[Batch], grey_levels: float = 0) -> None:
    limit = 1.01 * grey_levels / 255 / 0.224  # after normalisation
    for a, b in zip(found, expected, strict=True):
        assert a.names == b.names
        assert a.contents == b.contents
        torch.testing.assert_close(a.images, b.images, rtol=0, atol=limit)
        assert all(torch.equal(x, y) for x, y in zip(a.masks, b.masks, strict=True))


@pytest.mark.parametrize("resize", [SquareResize(32), LongestSideResize(32)], ids=["square", "longest"])
def test_batches_are_those_of_the_files(root: Path, cache: str, resize: Resize) -> None:
    assert_equal(epochs(noise(root, cache, resize, STILL), 2), epochs(noise(root, None, resize, STILL), 2))


@pytest.mark.parametrize("resize", [SquareResize(16), LongestSideResize(16)], ids=["square", "longest"])
def test_flips_commute_with_the_resize(root: Path, cache: str, resize: Resize) -> None:
    cached = epochs(noise(root, cache, resize, FLIP), 2)
    plain = epochs(noise(root, None, resize, FLIP), 2)
    for batch in cached + plain:
        batch.masks[:] = [
            torch.zeros(0) for _ in batch.masks
        ]  # nearest neighbours of ties differ when flipped
    assert_equal(cached, plain, grey_levels=1)


def test_files_are_read_once(root: Path, cache: str) -> None:
    data = noise(root, cache, SquareResize(32), FLIP)
    loader = data.train_dataloader()
    list(loader)
    shutil.rmtree(root)
    assert sum(len(batch.names) for batch in loader) == COUNT


def test_workers_fill_one_store(root: Path, cache: str) -> None:
    loader = noise(root, cache, SquareResize(32), STILL, num_workers=2).train_dataloader()
    found = list(loader)
    read: CachedRead = loader.dataset.read  # type: ignore[attr-defined]
    assert (read.sizes > 0).all()  # seen by this process, which read nothing itself
    assert_equal(found, epochs(noise(root, None, SquareResize(32), STILL)))


def test_later_runs_find_the_store(root: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    expected = epochs(noise(root, cache, SquareResize(32), FLIP))
    loader = noise(root, cache, SquareResize(32), FLIP).train_dataloader()
    read: CachedRead = loader.dataset.read  # type: ignore[attr-defined]
    assert (read.sizes > 0).all()
    for file in root.iterdir():
        file.write_bytes(b"")
    assert_equal(list(loader), expected)


def test_changed_files_and_settings_get_a_store_of_their_own(root: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    before = epochs(noise(root, cache, SquareResize(32), STILL))
    Image.fromarray(np.zeros((20, 50, 3), np.uint8)).save(root / "0.png")
    os.utime(root / "0.png", ns=(1, 1))
    after = epochs(noise(root, cache, SquareResize(32), STILL))
    assert any(not torch.equal(a.images, b.images) for a, b in zip(before, after, strict=True))
    assert_equal(after, epochs(noise(root, None, SquareResize(32), STILL)))
    epochs(noise(root, cache, LongestSideResize(32), STILL))
    assert len(list((tmp_path / "cache").glob("*.images"))) == 3


def test_what_was_not_finished_is_read_again(root: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    expected = epochs(noise(root, cache, SquareResize(32), FLIP))
    loader = noise(root, cache, SquareResize(32), FLIP).train_dataloader()
    read: CachedRead = loader.dataset.read  # type: ignore[attr-defined]
    read.pixels[2] = 7  # as if the process had been killed while it wrote sample 2
    read.sizes[2] = 0
    assert_equal(list(loader), expected)


def test_damaged_store_is_made_anew(root: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    expected = epochs(noise(root, cache, SquareResize(32), FLIP))
    (store,) = (tmp_path / "cache").iterdir()
    os.truncate(store, store.stat().st_size // 2)
    assert_equal(epochs(noise(root, cache, SquareResize(32), FLIP)), expected)


def test_too_little_room_is_named(root: Path) -> None:
    pairs = [Pair(root / f"{i}.png", root / f"{i}_mask.png") for i in range(COUNT)]
    masks = Masks(["object"])
    with pytest.raises(OSError, match=r"needs \d+.\d GiB for 7 images, .* GiB left; .* loading.cache=FOLDER"):
        CachedRead(pairs, partial(read_pair, masks=masks), SquareResize(2**22), "ram", masks)


def test_folder_that_cannot_be_made_is_named(root: Path) -> None:
    with pytest.raises(
        OSError, match=r"loading.cache=.*0.png/cache cannot be used .*; choose another folder"
    ):
        noise(root, str(root / "0.png" / "cache"), SquareResize(32), FLIP).train_dataloader()


def test_empty_cache_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match=r"loading.cache is empty"):
        noise(root, "", SquareResize(32), FLIP).train_dataloader()
