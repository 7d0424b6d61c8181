"""The user's own images and masks."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote

from convlora.data.images import IMAGE_SUFFIXES
from convlora.data.listing import by_stem, csv_pairs, matched, refuse, refuse_overlap
from convlora.data.module import SPLITS, Pair, SegmentationDataModule, Split


class Folder(SegmentationDataModule):
    """Images and masks under one root, matched by stem.

    The first layout found gives a split:

    - `<root>/<split>.csv` with the columns image and label, paths relative to root
    - `<root>/<split>.txt` with the name or stem of one image per line, in `<root>/images` and `<root>/masks`
    - `<root>/<split>/images` and `<root>/<split>/masks`
    - `<root>/images` and `<root>/masks` and no split at all: all of it is the test set
    """

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits found, of a folder without any the test set."""
        return tuple(split for split in SPLITS if self._has(split)) or ("test",)

    def listing(self, split: Split) -> Path | None:
        """Return the list of a split; None where folders give it."""
        return next((path for path in self._places(split)[:2] if path.is_file()), None)

    def pairs(self, split: Split) -> list[Pair]:
        """List a split by the first layout found.

        Raises:
            FileNotFoundError: root does not exist or has no such split.
            ValueError: an image has no mask or the reverse, a stem stands for two files, a listed name is not
                there, or an image is listed in two splits.
        """
        if not (self.root / "images").is_dir() and not any(self._has(split) for split in SPLITS):
            raise FileNotFoundError(
                f"{self.name}: neither images nor splits in {self.root}; set data_root=YOUR_FOLDER"
            )
        refuse_overlap(self.name, split, {each: self._named(each) for each in SPLITS})
        if (listing := self.root / f"{split}.csv").is_file():
            return csv_pairs(listing)
        if (listing := self.root / f"{split}.txt").is_file():
            return self._listed_pairs(listing)
        if (folder := self.root / split).is_dir():
            return matched(self.name, folder / "images", folder / "masks")
        if self.splits != ("test",) or self._has("test"):
            raise FileNotFoundError(
                f"{self.name}: no {split} split under {self.root}; write {split}.txt there with one image "
                "name per line"
            )
        if split != "test":
            root = quote(f"data_root={self.root}")
            raise FileNotFoundError(
                f"{self.name}: no {split} split under {self.root}, and a split is never drawn at run time; "
                f"`python -m convlora.prepare dataset={self.name} {root} action=split` draws one and writes "
                "it down, or write train.txt, val.txt and test.txt there with one image name per line"
            )
        return matched(self.name, self.root / "images", self.root / "masks")

    def write_split(self, names: Mapping[Split, Sequence[str]]) -> None:
        """Write down which images each split has, or nothing at all.

        Args:
            names: split -> file names of its images.

        Raises:
            FileExistsError: there is a split already.
            OSError: a file cannot be written.
            ValueError: a name cannot stand in a line of its own.
        """
        self.refuse_split()
        odd = [name for own in names.values() for name in own if not _is_line(name)]
        if odd:
            raise ValueError(
                f"{self.name}: {len(odd)} names cannot be listed line by line (first {odd[0]!r}), because of "
                "spaces at an end, line breaks or bytes that are no text; rename these images and their masks"
            )
        made: list[Path] = []
        try:
            for split, own in names.items():
                with (self.root / f"{split}.txt").open("x", encoding="utf-8") as listing:
                    made.append(Path(listing.name))
                    listing.writelines(f"{name}\n" for name in own)
        except BaseException:
            for path in made:
                path.unlink()
            raise
        self.forget()

    def refuse_split(self) -> None:
        """Raise FileExistsError where the folder has a split, or a part of one."""
        found = [path for split in SPLITS for path in self._places(split) if path.exists()]
        if found:
            raise FileExistsError(
                f"{self.name}: {found[0]} gives a split already, which is never overwritten; use it, or move "
                f"{', '.join(path.name for path in found)} away to draw another"
            )

    def _has(self, split: Split) -> bool:
        *listings, folder = self._places(split)
        return any(path.is_file() for path in listings) or folder.is_dir()

    def _places(self, split: Split) -> tuple[Path, Path, Path]:
        return self.root / f"{split}.csv", self.root / f"{split}.txt", self.root / split

    def _listed_pairs(self, listing: Path) -> list[Pair]:
        images = by_stem(self.name, self.root / "images")
        masks = by_stem(self.name, self.root / "masks")
        names = _lines(listing)
        # a name with a suffix means that very file, not another of the same stem
        unknown = [n for n in names if _stem(n) not in images or n not in (_stem(n), images[_stem(n)].name)]
        refuse(self.name, f"{listing}: names that are not in {self.root / 'images'}", unknown)
        without = [name for name in names if _stem(name) not in masks]
        refuse(self.name, f"{listing}: images without a mask", without)
        return [Pair(images[_stem(name)], masks[_stem(name)]) for name in names]

    def _named(self, split: Split) -> set[str]:
        # by name alone: the images of another split need not be on this machine
        if (listing := self.root / f"{split}.csv").is_file():
            return {
                os.path.normpath(pair.image.parent / _stem(pair.image.name)) for pair in csv_pairs(listing)
            }
        if (listing := self.root / f"{split}.txt").is_file():
            return {os.path.normpath(self.root / "images" / _stem(name)) for name in _lines(listing)}
        return set()


def _lines(listing: Path) -> list[str]:
    return [line.strip() for line in listing.read_text(encoding="utf-8-sig").splitlines() if line.strip()]


def _is_line(name: str) -> bool:
    """Return whether a name is read from a listing as it is written there."""
    text = name.encode(errors="replace").decode()
    return [line.strip() for line in text.splitlines()] == [name]


def _stem(name: str) -> str:
    path = Path(name)
    return path.stem if path.suffix.lower() in IMAGE_SUFFIXES else name
