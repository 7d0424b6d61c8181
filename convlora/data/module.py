"""One data set: files listed by split, batched for training, validation and test."""

import hashlib
import json
import os
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from convlora import IGNORED
from convlora.data.bands import Bands, measure
from convlora.data.cache import CachedRead
from convlora.data.images import image_size
from convlora.data.loading import Loading
from convlora.data.masks import Masks
from convlora.data.samples import (
    Batch,
    EpochSampler,
    EvalSamples,
    Pair,
    Sample,
    TrainSamples,
    collate,
    read_pair,
)

__all__ = [
    "SPLITS",
    "Batch",
    "Pair",
    "SegmentationDataModule",
    "Source",
    "Split",
]

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
_STAGE_SPLITS: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
}


@dataclass(frozen=True)
class Source:
    """Where a data set comes from.

    Attributes:
        url: of the archive, which holds the data set's folder; None where a person has to fetch it.
        sha256: of the archive as published; None where nobody has published it.
        steps: what the person does, where there is no `url`.
        images: in a whole copy, of a split or of several together, as in `train+val`.
    """

    url: str | None = None
    sha256: str | None = None
    steps: str | None = None
    images: Mapping[str, int] = field(default_factory=dict)


@dataclass(kw_only=True, eq=False, repr=False)
class SegmentationDataModule(LightningDataModule, ABC):
    """Base of all data sets; a subclass lists `pairs(split)`.

    Attributes:
        name: for messages and tables.
        root: folder of the data set.
        class_names: of the foreground alone, for binary masks, or of every class.
        class_ids: see `Masks`, as for `ignore_index` and `threshold`.
        class_colors: RGB of the classes, in coloured masks and in pictures; None takes a standard palette.
        ignore_index: see there.
        threshold: see there.
        source: where the data set comes from.
        loading: how its images are read and batched.
        start_epoch: the first that is trained; of a resumed run the one after its checkpoint. Set before the
            training, since loader processes fetch the first batches before Lightning names the epoch.
        bands: which bands of the image files are read, and how they are scaled; None reads plain images.
    """

    name: str
    root: Path
    class_names: Sequence[str]
    class_ids: Sequence[int] | None = None
    class_colors: Sequence[Sequence[int]] | None = None
    ignore_index: int | Sequence[int] | None = None
    threshold: int | None = None
    source: Source = field(default_factory=Source)
    loading: Loading = field(default_factory=Loading)
    start_epoch: int = field(default=0, init=False)
    bands: Bands | None = field(default=None, init=False)

    drawn: ClassVar[bool] = False
    """Whether images are drawn from numbers, so that no file is read."""

    def __post_init__(self) -> None:
        super().__init__()
        self.root = Path(self.root)  # configs give a str
        self.masks = Masks(
            self.class_names, self.class_ids, self.class_colors, self.ignore_index, self.threshold
        )
        self._listed: dict[Split, list[Pair]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the trainer behind when loader processes that are spawned receive the data set."""
        return {**self.__dict__, "trainer": None}

    @property
    def num_classes(self) -> int:
        """Number of classes; 1 for a foreground alone."""
        return len(self.class_names)

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that there are."""
        return SPLITS

    @abstractmethod
    def pairs(self, split: Split) -> list[Pair]:
        """List the files of a split, without opening them."""

    def listing(self, split: Split) -> Path | None:
        """Return the user's own file that lists a split, which errors name; None where there is none."""
        return None

    def files(self, pair: Pair) -> list[Path]:
        """Return the files that a pair is read from, which must exist."""
        return [pair.image, pair.mask]

    def read(self, pair: Pair) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Load image [h, w, 3] and class ids [h, w]; raises what `read_pair` does."""
        return read_pair(pair, self.masks, self.bands)

    def read_mask(self, pair: Pair) -> NDArray[np.uint8]:
        """Load class ids [h, w]; raises what `Masks.read` does."""
        return self.masks.read(pair.mask)

    def class_shares(self) -> list[float]:
        """Return the share of each class in the pixels of the training images in which it is.

        It is a mean over those images, ignored pixels left out; 0 of a class that is in none. Raises what
        `setup` and `read_mask` do.
        """
        with ThreadPoolExecutor(max(1, self.loading.num_workers)) as readers:
            counts = np.stack(list(readers.map(self._count_pixels, self.listed("train"))))
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        found: list[float] = (shares.sum(axis=0) / np.maximum((counts > 0).sum(axis=0), 1)).tolist()
        return found

    def _count_pixels(self, pair: Pair) -> NDArray[np.int64]:
        return np.bincount(self.read_mask(pair).ravel(), minlength=IGNORED + 1)[: self.num_classes]

    def measure_bands(self) -> Bands | None:
        """Return the bands that `loading` names, with their range over the training images.

        None is for plain images. Raises what `setup` and `measure` do.
        """
        if self.loading.channels is None:
            return None
        images = [pair.image for pair in self.listed("train")]
        return measure(images, self.loading.channels, self.loading.percentiles)

    def use_bands(self, bands: Bands | None, *splits: Split) -> None:
        """Read images by these bands from now on, after a look at the heads of all images of the splits.

        Raises:
            ValueError: an image has not these bands, or values of another type.
        """
        self.bands = bands
        if bands is not None:
            for pair in (pair for split in splits for pair in self.listed(split)):
                bands.size(pair.image)

    def median_side(self) -> int:
        """Return the median of the training images' longer sides, px; raises what `setup` and `read` do."""
        sides = [max(image_size(pair.image, self.bands)) for pair in self.listed("train")]
        return int(np.median(sides))

    def content(self, split: Split) -> str:
        """Return what tells the files of a split from others: their number, names, sizes and ends, hashed."""
        files = [
            (name, *(_fingerprint(file) for file in self.files(pair)))
            for name, pair in zip(self.names(split), self.listed(split), strict=True)
        ]
        return f"{len(files)} ({hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]})"

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

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return the shuffled and augmented training images."""
        pairs, names = self.listed("train"), self.names("train")
        resize, cache, read = self.loading.resize, self.loading.cache, self.read
        if cache is not None:
            read = CachedRead(pairs, self.read, resize, cache, self.masks, self.bands)
        samples = TrainSamples(pairs, names, resize, self.loading.augment, read)
        sampler = EpochSampler(len(samples), self.loading.seed, *self._rank())
        sampler.set_epoch(self.start_epoch)
        return self._loader(samples, sampler)

    def val_dataloader(self) -> DataLoader[Sample]:
        """Return the validation images in order, each on one rank only."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader[Sample]:
        """Return the test images in order, each on one rank only."""
        return self._eval_loader("test")

    def _eval_loader(self, split: Split) -> DataLoader[Sample]:
        samples = EvalSamples(self.listed(split), self.names(split), self.loading.resize, self.read)
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
            batch_size=self.loading.batch_size,
            sampler=sampler,
            num_workers=self.loading.num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_limit_threads,
            # its own, because a loader draws from the global generator each time it is iterated
            generator=torch.Generator().manual_seed(self.loading.seed),
            persistent_workers=self.loading.num_workers > 0,
        )

    def _rank(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def listed(self, split: Split) -> list[Pair]:
        """Return `pairs(split)`, listed and checked once; raises what `setup` does."""
        if split not in self._listed:
            pairs = self.pairs(split)
            self._check(split, pairs)
            self._listed[split] = (
                self._few(pairs) if split == "train" and self.loading.shots is not None else pairs
            )
        return self._listed[split]

    def incomplete(self) -> list[str]:
        """Say which splits have not as many images as were published; raises what `setup` does."""
        counts = {split: len(self.listed(split)) if split in self.splits else 0 for split in SPLITS}
        found = {
            key: sum(counts[split] for split in SPLITS if split in key.split("+"))
            for key in self.source.images
        }
        return [
            f"{self.name}: {key} has {found[key]} images, {expected} were published"
            for key, expected in self.source.images.items()
            if found[key] != expected
        ]

    def forget(self) -> None:
        """List the splits anew when they are asked for again; the files have changed."""
        self._listed = {}

    def _few(self, pairs: list[Pair]) -> list[Pair]:
        shots = self.loading.shots
        if not isinstance(shots, int) or not 1 <= shots <= len(pairs):
            raise ValueError(
                f"loading.shots={shots} must be 1 to {len(pairs)}, the training images of {self.name}, "
                "or null for all of them"
            )
        order = np.random.default_rng(self.loading.seed).permutation(len(pairs))
        return [pairs[index] for index in sorted(order[:shots])]

    def absent(self, missing: str) -> FileNotFoundError:
        """Return the error for a data set that lacks a file or folder which it always has."""
        return FileNotFoundError(
            f"{self.name}: no {missing} under {self.root}; run `python -m convlora.prepare "
            f"dataset={self.name}`, or set data_root=FOLDER if it lies elsewhere"
        )

    def _check(self, split: Split, pairs: list[Pair]) -> None:
        listing = self.listing(split)
        if not pairs:
            way_out = "add some or choose another root" if listing is None else f"write some to {listing}"
            raise ValueError(f"{self.name}: {split} lists no images under {self.root}; {way_out}")
        files = [file for pair in pairs for file in self.files(pair)]
        missing = [str(file) for file in files if not file.is_file()]
        if missing:
            way_out = f"unpack the data set under {self.root} again"
            if listing is not None:
                way_out = f"correct {listing}, whose paths start at {self.root}"
            raise FileNotFoundError(
                f"{self.name}: {len(missing)} of {len(files)} files of {split} are missing: "
                f"{', '.join(missing[:3])}; {way_out}"
            )
        image, count = Counter(Path(os.path.normpath(pair.image)) for pair in pairs).most_common(1)[0]
        if count > 1:
            raise ValueError(
                f"{self.name}: {listing or split} lists {image} {count} times; list each image once"
            )


def _fingerprint(file: Path) -> tuple[int, int]:
    """Return a file's size and a checksum of its end, where different compressed images differ."""
    size = file.stat().st_size
    with file.open("rb") as content:
        content.seek(max(0, size - 4096))
        return size, zlib.crc32(content.read())


def _limit_threads(worker: int) -> None:
    # the workers are the parallelism; OpenCV's own threads would compete with them for the cores
    cv2.setNumThreads(0)
