"""Pairs of files as samples and batches, and the order in which training takes them.

Everything random is a pure function of seed, epoch and sample, so the number of workers does not matter and a
resumed run sees what an uninterrupted one does.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

import albumentations as A
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from convlora.data.bands import Bands
from convlora.data.images import read_image
from convlora.data.masks import Masks
from convlora.data.transforms import Resize, eval_transform


@dataclass(frozen=True)
class Pair:
    """An image file and its mask file."""

    image: Path
    mask: Path


Read = Callable[[Pair], tuple[NDArray[np.uint8], NDArray[np.uint8]]]


class Sample(NamedTuple):
    """One image as the network takes it; fields as in `Batch`."""

    image: Tensor
    mask: Tensor
    content: tuple[int, int]
    name: str


class Batch(NamedTuple):
    """What the loaders give.

    Attributes:
        images: [n, 3, s, s] float32, normalised.
        masks: n of [h, w] uint8, class ids (0 and 1 if there is one class) and `IGNORED`: in training
            transformed with the image (h = w = s), else at the size of the file.
        contents: n of (height, width), the area at the top left of the input that the image fills.
        names: n image paths relative to the data set's root, unique within a split.
    """

    images: Tensor
    masks: list[Tensor]
    contents: list[tuple[int, int]]
    names: list[str]


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields (index, seed of its augmentation) in an order drawn from seed and epoch; `rank` gets its share.

    The order is padded from its start to a multiple of `world_size`, so that all ranks take as many steps.
    """

    def __init__(self, size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.size = size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Lightning does so before each."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        for position in range(self.rank, len(self) * self.world_size, self.world_size):
            index = int(order[position % self.size])
            draw = np.random.SeedSequence([self.seed, self.epoch, index]).generate_state(1, np.uint64)
            yield index, int(draw[0])

    def __len__(self) -> int:
        return -(-self.size // self.world_size)


class TrainSamples(Dataset[Sample]):
    """Images and masks, augmented and transformed together.

    Args:
        pairs: the files.
        names: of the samples.
        resize: to the network's input.
        augment: before the resize.
        read: loads image and mask of a pair.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        names: Sequence[str],
        resize: Resize,
        augment: A.Compose,
        read: Read,
    ):
        self.pairs = pairs
        self.names = names
        self.resize = resize
        self.augment = augment
        self.transform = eval_transform(resize)
        self.read = read

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        index, draw = item
        image, mask = self.read(self.pairs[index])
        # One generator for all steps: `set_random_seed` would start each step with the same random numbers.
        self.augment.set_random_state(np.random.default_rng(draw), Random(draw))
        try:
            augmented = self.augment(image=image, mask=mask)
        except Exception as error:
            raise ValueError(f"{self.pairs[index].image} cannot be augmented: {error}") from error
        out = self.transform(image=augmented["image"], mask=augmented["mask"])
        content = self.resize.content(*augmented["mask"].shape)
        return Sample(to_tensor(out["image"]), torch.from_numpy(out["mask"]), content, self.names[index])


class EvalSamples(Dataset[Sample]):
    """Images transformed, masks as they are; arguments as of `TrainSamples`."""

    def __init__(self, pairs: Sequence[Pair], names: Sequence[str], resize: Resize, read: Read):
        self.pairs = pairs
        self.names = names
        self.resize = resize
        self.transform = eval_transform(resize)
        self.read = read

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        image, mask = self.read(self.pairs[index])
        content = self.resize.content(*mask.shape)
        out = self.transform(image=image)
        return Sample(to_tensor(out["image"]), torch.from_numpy(mask), content, self.names[index])


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack the images; masks may differ in size and stay a list."""
    images, masks, contents, names = zip(*samples, strict=True)
    return Batch(torch.stack(images), list(masks), list(contents), list(names))


def read_pair(
    pair: Pair, masks: Masks, bands: Bands | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Load image [h, w, 3] and class ids [h, w].

    Args:
        pair: the files.
        masks: how mask files are taken.
        bands: see `read_image`.

    Raises:
        ValueError: a file is unusable (see `read_image`, `Masks`) or their sizes differ.
    """
    image, mask = read_image(pair.image, bands), masks.read(pair.mask)
    if image.shape[:2] != mask.shape:
        raise ValueError(
            f"{pair.image} is {image.shape[1]} x {image.shape[0]} but its mask {pair.mask} is "
            f"{mask.shape[1]} x {mask.shape[0]} (width x height); export the mask at the image's size"
        )
    return image, mask


def to_tensor(image: NDArray[np.float32]) -> Tensor:
    """Return an image [h, w, 3] as a tensor [3, h, w]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
