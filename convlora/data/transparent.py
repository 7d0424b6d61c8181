"""Transparent objects: Trans10K, versions 1 and 2."""

from collections.abc import Sequence
from dataclasses import dataclass

from convlora.data.base import Pair, SegmentationDataModule, Split
from convlora.data.listing import matched

FOLDERS = {"train": "train", "val": "validation", "test": "test"}


@dataclass(kw_only=True, eq=False, repr=False)
class Trans10K(SegmentationDataModule):
    """Images in `<split>/images`, masks `<stem>_mask.png` beside them (Xie et al., ECCV 2020; IJCAI 2021).

    Attributes:
        mask_folder: `masks`, in version 2 `masks_12`.
        subsets: folders within validation and test, in version 1 easy and hard; () in version 2.
        test_subsets: those of them that are tested.
    """

    mask_folder: str = "masks"
    subsets: Sequence[str] = ()
    test_subsets: Sequence[str] = ()

    def pairs(self, split: Split) -> list[Pair]:
        """List the images of a split with their masks.

        Raises:
            FileNotFoundError: the data set is not at `root`.
            ValueError: an image has no mask or the reverse, or there is no such subset.
        """
        unknown = [subset for subset in self.test_subsets if subset not in self.subsets]
        if unknown:
            raise ValueError(
                f"dataset.test_subsets: {self.name} has no subset {unknown[0]}; choose among "
                f"{', '.join(self.subsets)}"
            )
        folder = self.root / FOLDERS[split]
        if not folder.is_dir():
            raise self.absent(folder.name)
        subsets = {"train": (), "val": self.subsets, "test": self.test_subsets}[split]
        folders = [folder / subset for subset in subsets] or [folder]
        return [
            pair
            for part in folders
            for pair in matched(self.name, part / "images", part / self.mask_folder, suffix="_mask")
        ]
