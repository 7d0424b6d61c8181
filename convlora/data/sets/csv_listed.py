"""Data sets with a CSV for each split, as the archives published with Conv-LoRA."""

from dataclasses import dataclass
from pathlib import Path

from convlora.data.listing import csv_pairs
from convlora.data.module import Pair, SegmentationDataModule, Split


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

    def pairs(self, split: Split) -> list[Pair]:
        """List the files that the split's CSV names.

        Raises:
            FileNotFoundError: the data set is not at `root`, or there is no such list.
        """
        name = self.test_csv if split == "test" else f"{split}.csv"
        if self.lists is not None:
            listing = Path(self.lists) / name
            if not listing.is_file():
                raise FileNotFoundError(
                    f"{self.name}: no {name} in dataset.lists={self.lists}; a list of each split lies there, "
                    f"columns image,label, paths from {self.root}"
                )
            return csv_pairs(listing, self.root)
        if not (self.root / name).is_file():
            raise self.absent(name)
        return csv_pairs(self.root / name)
