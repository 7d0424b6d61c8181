"""Data sets published as folders of images beside folders of masks: COD10K, CHAMELEON, NC4K, Trans10K."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from convlora.data.listing import matched
from convlora.data.module import SPLITS, Pair, SegmentationDataModule, Split


@dataclass(kw_only=True, eq=False, repr=False)
class ImageFolders(SegmentationDataModule):
    """Images in `<root>/<split folder>/[<subset>/]<image_folder>`, masks of the same stems beside them.

    Attributes:
        split_folders: folder of each split under `root`; a split without one does not exist.
        image_folder: its name.
        mask_folder: its name.
        mask_suffix: of a mask's stem after its image's.
        subsets: folders within those of validation and test; () where there are none.
        test_subsets: those of them that are tested.
    """

    split_folders: Mapping[Split, str] = field(default_factory=lambda: {split: split for split in SPLITS})
    image_folder: str = "images"
    mask_folder: str = "masks"
    mask_suffix: str = ""
    subsets: Sequence[str] = ()
    test_subsets: Sequence[str] = ()

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that have a folder."""
        return tuple(split for split in SPLITS if split in self.split_folders)

    def pairs(self, split: Split) -> list[Pair]:
        """List the images of a split with their masks.

        Raises:
            FileNotFoundError: the data set is not at `root`.
            ValueError: an image has no mask or the reverse, or there is no such split or subset.
        """
        if split not in self.splits:
            raise ValueError(
                f"{self.name} is a test set and has no {split} split; train on another, as in dataset=camo "
                f"test_sets=[{self.name}]"
            )
        unknown = [subset for subset in self.test_subsets if subset not in self.subsets]
        if unknown:
            raise ValueError(
                f"dataset.test_subsets: {self.name} has no subset {unknown[0]}; choose among "
                f"{', '.join(self.subsets)}"
            )
        subsets = {"train": (), "val": self.subsets, "test": self.test_subsets}[split]
        own = Path(self.split_folders[split])
        folders = [own / subset for subset in subsets] or [own]
        for folder in folders:
            if not (self.root / folder / self.image_folder).is_dir():
                raise self.absent(str(folder / self.image_folder))
        return [
            pair
            for folder in folders
            for pair in matched(
                self.name,
                self.root / folder / self.image_folder,
                self.root / folder / self.mask_folder,
                self.mask_suffix,
            )
        ]
