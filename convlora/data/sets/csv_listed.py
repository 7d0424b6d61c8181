"""Data sets with a CSV for each split, as the archives published with Conv-LoRA."""

import os
from dataclasses import dataclass
from pathlib import Path

from convlora.data.listing import csv_pairs, refuse_overlap
from convlora.data.module import SPLITS, Pair, SegmentationDataModule, Split


@dataclass(kw_only=True, eq=False, repr=False)
class CsvListed(SegmentationDataModule):
    """A folder with a CSV for each split, columns image and label, paths relative to the folder.

    Attributes:
        test_csv: where the archive tests on several sources, the CSV of one.
        lists: folder of CSVs that stand for the archive's own, as of a fold of a cross-validation; the paths
            in them are relative to `root` all the same.
    """

    test_csv: str = "test.csv"
    lists: str | None = None

    def listing(self, split: Split) -> Path | None:
        """Return the CSV of `lists` for a split; None where the archive's own is taken."""
        return None if self.lists is None else Path(self.lists) / self._csv(split)

    def pairs(self, split: Split) -> list[Pair]:
        """List the files that the split's CSV names.

        Raises:
            FileNotFoundError: the data set is not at `root`, or there is no such list.
            ValueError: a list has another form, or an image is in two of `lists`. What the archive itself
                lists is taken as it was published; `prepare action=check` looks for leaks there.
        """
        if self.lists is None:
            if not (self.root / self._csv(split)).is_file():
                raise self.absent(self._csv(split))
            return csv_pairs(self.root / self._csv(split))
        listings = {each: Path(self.lists) / self._csv(each) for each in SPLITS}
        if not listings[split].is_file():
            raise FileNotFoundError(
                f"{self.name}: no {self._csv(split)} in dataset.lists={self.lists}; a list of each split "
                f"lies there, columns image,label, paths from {self.root}"
            )
        if not self.root.is_dir():  # or the paths in a list of one's own would seem to be wrong
            raise self.absent("images")
        pairs = {each: csv_pairs(path, self.root) for each, path in listings.items() if path.is_file()}
        # by name alone: the images of another split need not be on this machine
        images = {
            str(listings[each]): [os.path.normpath(p.image) for p in own] for each, own in pairs.items()
        }
        refuse_overlap(self.name, str(listings[split]), images)
        return pairs[split]

    def incomplete(self) -> list[str]:
        """Say which splits have not as many images as were published, where the lists are the published."""
        return super().incomplete() if self.lists is None else []

    def _csv(self, split: Split) -> str:
        return self.test_csv if split == "test" else f"{split}.csv"
