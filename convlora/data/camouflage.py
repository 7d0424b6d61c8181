"""Test sets of camouflaged objects: COD10K, CHAMELEON, NC4K."""

from dataclasses import dataclass

from convlora.data.base import Pair, SegmentationDataModule, Split
from convlora.data.listing import matched


@dataclass(kw_only=True, eq=False, repr=False)
class TestFolder(SegmentationDataModule):
    """Images in `<root>/Imgs`, masks of the same stem in `<root>/GT`; nothing to train on."""

    __test__ = False  # of data, not of code

    @property
    def splits(self) -> tuple[Split, ...]:
        """The test set alone."""
        return ("test",)

    def pairs(self, split: Split) -> list[Pair]:
        """List the images with their masks.

        Raises:
            FileNotFoundError: the data set is not at `root`.
            ValueError: an image has no mask or the reverse, or it is not the test split that is asked for.
        """
        if split != "test":
            raise ValueError(
                f"{self.name} is a test set and has no {split} split; train on another, as in dataset=camo "
                f"test_sets=[{self.name}]"
            )
        if not (self.root / "Imgs").is_dir():
            raise self.absent("Imgs")
        return matched(self.name, self.root / "Imgs", self.root / "GT")
