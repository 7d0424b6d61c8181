"""Data sets with a CSV for each split, as the archives published with Conv-LoRA."""

from dataclasses import dataclass

from convlora.data.listing import csv_pairs
from convlora.data.module import Pair, SegmentationDataModule, Split


@dataclass(kw_only=True, eq=False, repr=False)
class CsvListed(SegmentationDataModule):
    """A folder with a CSV for each split, columns image and label, paths relative to the folder.

    Attributes:
        test_csv: where the archive tests on several sources, the CSV of one.
    """

    test_csv: str = "test.csv"

    def pairs(self, split: Split) -> list[Pair]:
        """List the files that the split's CSV names.

        Raises:
            FileNotFoundError: the data set is not at `root`.
        """
        csv_path = self.root / (self.test_csv if split == "test" else f"{split}.csv")
        if not csv_path.is_file():
            raise self.absent(csv_path.name)
        return csv_pairs(csv_path)
