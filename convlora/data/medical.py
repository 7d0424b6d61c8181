"""Medicine: polyps in colonoscopy."""

from collections.abc import Sequence
from pathlib import Path

import albumentations as A

from convlora.data.base import Pair, SegmentationDataModule, Split, csv_pairs
from convlora.data.transforms import Resize

POLYP_URL = "https://automl-mm-bench.s3.amazonaws.com/semantic_segmentation/polyp.zip"


class Polyp(SegmentationDataModule):
    """PraNet's polyp split (Fan et al., MICCAI 2020): one training set, a test set per source.

    Args:
        name: for error messages.
        root: the archive's `polyp` folder.
        test_csv: `test_Kvasir.csv` or `test_CVC-ClinicDB.csv`.
        class_names: of the foreground class.
        resize: see `SegmentationDataModule`, as for the rest.
        augment: see there.
        batch_size: see there.
        num_workers: see there.
        seed: see there.
        threshold: see there.
        cache: see there.
    """

    def __init__(
        self,
        name: str,
        root: str | Path,
        test_csv: str,
        class_names: Sequence[str],
        resize: Resize,
        augment: A.Compose,
        batch_size: int = 4,
        num_workers: int = 2,
        seed: int = 0,
        threshold: int | None = None,
        cache: str | None = None,
    ):
        super().__init__(
            name, root, class_names, resize, augment, batch_size, num_workers, seed, threshold, cache
        )
        self.test_csv = test_csv

    def pairs(self, split: Split) -> list[Pair]:
        """List the files that the archive's CSV names.

        Raises:
            FileNotFoundError: the archive is not unpacked at `root`.
        """
        csv_path = self.root / (self.test_csv if split == "test" else f"{split}.csv")
        if not csv_path.is_file():
            raise FileNotFoundError(
                f"{self.name}: no {csv_path.name} under {self.root}; download {POLYP_URL} and unpack it into "
                f"{self.root.parent}, or set data_root=FOLDER_THAT_HOLDS_{self.root.name}"
            )
        return csv_pairs(csv_path)
