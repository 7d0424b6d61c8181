"""One data set: files listed by split, batched for training, validation and test."""

import csv
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import albumentations as A
import cv2
import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from convlora.data.cache import CachedRead
from convlora.data.samples import (
    Batch,
    EpochSampler,
    EvalSamples,
    Pair,
    Read,
    Sample,
    TrainSamples,
    collate,
    read_pair,
)
from convlora.data.transforms import Resize

__all__ = ["SPLITS", "Batch", "Pair", "SegmentationDataModule", "Split", "csv_pairs"]

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
_STAGE_SPLITS: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
}


class SegmentationDataModule(LightningDataModule, ABC):
    """Base of all data sets; a subclass lists `pairs(split)`.

    Args:
        name: for error messages.
        root: folder of the data set.
        class_names: of the foreground class.
        resize: how an image becomes the network's input.
        augment: of image and mask in training, before the resize.
        batch_size: per device.
        num_workers: loader processes per device; 0 loads in the main process.
        seed: of order and augmentation in training.
        threshold: foreground is above it; None for masks that are binary as they are.
        cache: keeps the training images decoded and resized, `ram` in memory or else in the folder so named;
            the resize then comes before the augmentation instead of after it. None reads the files each time.
    """

    def __init__(
        self,
        name: str,
        root: str | Path,
        class_names: Sequence[str],
        resize: Resize,
        augment: A.Compose,
        batch_size: int = 4,
        num_workers: int = 2,
        seed: int = 0,
        threshold: int | None = None,
        cache: str | None = None,
    ):
        super().__init__()
        if len(class_names) != 1:
            raise ValueError(
                f"{name}: masks of 0 and 1 hold one class, but dataset.class_names lists {len(class_names)} "
                f"({', '.join(class_names)}); name the foreground alone"
            )
        self.name = name
        self.root = Path(root)
        self.class_names = tuple(class_names)
        self.resize = resize
        self.augment = augment
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.threshold = threshold
        self.cache = cache
        self._listed: dict[Split, list[Pair]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the trainer behind when loader processes that are spawned receive the data set."""
        return {**self.__dict__, "trainer": None}

    @property
    def num_classes(self) -> int:
        """Number of foreground classes."""
        return len(self.class_names)

    @abstractmethod
    def pairs(self, split: Split) -> list[Pair]:
        """List the files of a split, without opening them."""

    def files(self, pair: Pair) -> list[Path]:
        """Return the files that a pair is read from, which must exist."""
        return [pair.image, pair.mask]

    def read(self, pair: Pair) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Load image [h, w, 3] and mask [h, w], 0 or 1; raises what `read_pair` does."""
        return read_pair(pair, self.threshold)

    def setup(self, stage: str) -> None:
        """List the splits of Lightning's stage (`fit`, `validate`, `test`) and check that they are whole.

        Raises:
            FileNotFoundError: a listed file does not exist.
            ValueError: a split is empty or lists an image twice.
        """
        for split in _STAGE_SPLITS.get(stage, ()):
            self.listed(split)

    def names(self, split: Split) -> list[str]:
        """Return the samples' names in the order of the split; raises what `setup` does."""
        images = [pair.image for pair in self.listed(split)]
        return [(i.relative_to(self.root) if i.is_relative_to(self.root) else i).as_posix() for i in images]

    def batch(self, split: Split, indices: Sequence[int]) -> Batch:
        """Load samples of a split as evaluation does: not augmented, masks at their own size."""
        samples = self._eval_samples(split)
        return collate([samples[index] for index in indices])

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return the shuffled and augmented training images."""
        pairs, names = self.listed("train"), self.names("train")
        read: Read = self.read
        if self.cache is not None:
            read = CachedRead(pairs, self.read, self.resize, self.cache, self.threshold)
        samples = TrainSamples(pairs, names, self.resize, self.augment, read)
        return self._loader(samples, EpochSampler(len(samples), self.seed, *self._rank()))

    def val_dataloader(self) -> DataLoader[Sample]:
        """Return the validation images in order, each on one rank only."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader[Sample]:
        """Return the test images in order, each on one rank only."""
        return self._eval_loader("test")

    def _eval_samples(self, split: Split) -> EvalSamples:
        return EvalSamples(self.listed(split), self.names(split), self.resize, self.read)

    def _eval_loader(self, split: Split) -> DataLoader[Sample]:
        samples = self._eval_samples(split)
        rank, world_size = self._rank()
        if len(samples) < world_size:
            raise ValueError(
                f"{self.name}: {split} has {len(samples)} images for {world_size} devices, but each device "
                f"needs one; set trainer.devices={len(samples)} or less"
            )
        return self._loader(samples, UnrepeatedDistributedSampler(samples, world_size, rank, shuffle=False))

    def _loader(self, samples: Dataset[Sample], sampler: Sampler[Any]) -> DataLoader[Sample]:
        return DataLoader(
            samples,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_limit_threads,
            # its own, because a loader draws from the global generator each time it is iterated
            generator=torch.Generator().manual_seed(self.seed),
            persistent_workers=self.num_workers > 0,
        )

    def _rank(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def listed(self, split: Split) -> list[Pair]:
        """Return `pairs(split)`, listed and checked once; raises what `setup` does."""
        if split not in self._listed:
            pairs = self.pairs(split)
            self._check(split, pairs)
            self._listed[split] = pairs
        return self._listed[split]

    def _check(self, split: Split, pairs: list[Pair]) -> None:
        if not pairs:
            raise ValueError(
                f"{self.name}: {split} lists no images under {self.root}; add some or choose another root"
            )
        files = [file for pair in pairs for file in self.files(pair)]
        missing = [str(file) for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{self.name}: {len(missing)} of {len(files)} files of {split} are missing: "
                f"{', '.join(missing[:3])}; unpack the data set under {self.root} again"
            )
        image, count = Counter(pair.image for pair in pairs).most_common(1)[0]
        if count > 1:
            raise ValueError(f"{self.name}: {split} lists {image} {count} times; list each image once")


def csv_pairs(csv_path: Path) -> list[Pair]:
    """List the pairs of a CSV with the columns `image` and `label`, paths relative to the CSV's folder.

    Raises:
        ValueError: a column is missing, or a row has no value in one.
    """
    with csv_path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        if not {"image", "label"} <= set(columns):
            raise ValueError(
                f"{csv_path} has the columns {', '.join(columns)}; name its two columns image and label"
            )
        rows = list(reader)
    for number, row in enumerate(rows, start=1):
        if not (row["image"] and row["label"]):
            raise ValueError(
                f"{csv_path}: row {number} lacks an image or a label; fill it in or delete the row"
            )
    return [Pair(csv_path.parent / row["image"], csv_path.parent / row["label"]) for row in rows]


def _limit_threads(worker: int) -> None:
    # the workers are the parallelism; OpenCV's own threads would compete with them for the cores
    cv2.setNumThreads(0)
