"""Training images kept decoded and resized, in memory or on disk."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import torch
from numpy.typing import NDArray

from convlora.data.bands import Bands
from convlora.data.masks import Masks
from convlora.data.samples import Pair, Read
from convlora.data.transforms import Resize

FORMAT = 2  # changes when the same files would be stored otherwise
GIBIBYTE = 2**30
SHARED_MEMORY = Path("/dev/shm")


class CachedRead:
    """Reads a pair at the network's scale: each is decoded and resized once, then taken from the store.

    The store is filled while training and shared by all loader processes, on disk also by ranks and later
    runs.

    Args:
        pairs: all that will be read.
        read: loads image and mask of a pair.
        resize: to the network's input.
        cache: `ram`, or a folder.
        masks: how `read` takes mask files.
        bands: how it takes image files.

    Raises:
        OSError: there is no room, or the folder cannot be written.
        ValueError: `cache` is empty.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        read: Read,
        resize: Resize,
        cache: str,
        masks: Masks,
        bands: Bands | None = None,
    ):
        if not cache:
            raise ValueError("loading.cache is empty; set it to ram, to a folder, or to null")
        self.read = read
        self.resize = resize
        self.scale = A.Compose(resize.steps()[:1])
        self.index = {pair: index for index, pair in enumerate(pairs)}
        side = resize.image_size
        self.shape = (len(pairs), side, side, 4)
        self.bytes = len(pairs) * 8 + int(np.prod(self.shape))
        self.file: Path | None = None
        if cache == "ram":
            self._check_room(SHARED_MEMORY if SHARED_MEMORY.is_dir() else None, "loading.cache=FOLDER")
            self._open()
            return
        folder = Path(cache).expanduser()
        self.file = folder / f"{_fingerprint(pairs, resize, masks, bands)}.images"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not self.file.exists() or self.file.stat().st_size != self.bytes:
                self._check_room(folder, "another folder in loading.cache")
                reserve(self.file, self.bytes)
            self._open()
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"loading.cache={cache} cannot be used ({error}); choose another folder, ram or null"
            ) from error

    def __call__(self, pair: Pair) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Load image [h, w, 3] and mask [h, w], the longest side that of the network's input."""
        index = self.index[pair]
        height, width = self.sizes[index].tolist()
        if height == 0:
            image, mask = self.read(pair)
            scaled = self.scale(image=image, mask=mask)
            height, width = scaled["mask"].shape
            self.pixels[index, :height, :width, :3] = torch.from_numpy(scaled["image"])
            self.pixels[index, :height, :width, 3] = torch.from_numpy(scaled["mask"])
            self.sizes[index] = torch.tensor([height, width])  # last: it tells that the pixels are there
        stored = self.pixels[index, :height, :width].numpy()
        return stored[..., :3].copy(), stored[..., 3].copy()

    def __getstate__(self) -> dict[str, Any]:
        """Let processes that are spawned open a file themselves."""
        if self.file is None:
            return self.__dict__
        return {key: value for key, value in self.__dict__.items() if key not in ("pixels", "sizes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        if self.file is not None:
            self._open()

    def _open(self) -> None:
        """Map the store: height and width of each sample, 0 where it is not there yet, then the pixels."""
        if self.file is None:
            store = torch.zeros(self.bytes, dtype=torch.uint8)
            store.share_memory_()  # type: ignore[no-untyped-call]
        else:
            store = torch.from_file(str(self.file), shared=True, size=self.bytes, dtype=torch.uint8)
        head = len(self.index) * 8
        self.sizes = store[:head].view(torch.int32).view(-1, 2)
        self.pixels = store[head:].view(self.shape)

    def _check_room(self, folder: Path | None, way_out: str) -> None:
        free = shutil.disk_usage(folder).free if folder is not None else self.bytes
        if free < self.bytes:
            raise OSError(
                f"the cache needs {self.bytes / GIBIBYTE:.1f} GiB for {self.shape[0]} images, {folder} has "
                f"{free / GIBIBYTE:.1f} GiB left; free some, use {way_out}, or set loading.cache=null"
            )


def reserve(path: Path, size: int) -> None:
    """Make a file of zeros that has its room on the disk, or none at all."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with fresh.open("wb") as file:
            if hasattr(os, "posix_fallocate"):  # else a disk that fills up later ends the process
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def _fingerprint(pairs: Sequence[Pair], resize: Resize, masks: Masks, bands: Bands | None) -> str:
    """Name what the store's content follows from: changed files or settings get a store of their own."""
    files = [
        (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
        for pair in pairs
        for path in (pair.image, pair.mask)
    ]
    taken = [] if bands is None else [bands.to_json()]
    content = json.dumps([FORMAT, repr(resize), repr(masks), *taken, files])
    return hashlib.sha256(content.encode()).hexdigest()[:32]
