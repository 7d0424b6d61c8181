from pathlib import Path

import albumentations as A
import numpy as np
import pytest

from convlora.data.medical import Polyp
from convlora.data.transforms import SquareResize


def polyp(root: Path, test_csv: str = "test_Kvasir.csv") -> Polyp:
    return Polyp("kvasir", root, test_csv, ["polyp"], SquareResize(32), A.Compose([]), num_workers=0)


def test_missing_archive_names_csv_url_and_way_out(tmp_path: Path) -> None:
    message = r"kvasir: no train\.csv under .*polyp; download https://.*polyp\.zip .*=FOLDER_THAT_HOLDS_polyp"
    with pytest.raises(FileNotFoundError, match=message):
        polyp(tmp_path / "polyp").setup("fit")


def test_each_source_is_tested_by_its_own_csv(tmp_path: Path) -> None:
    for name in ("Kvasir", "CVC-ClinicDB"):
        (tmp_path / f"test_{name}.csv").write_text(f"image,label\n{name}/a.jpg,{name}/a.png\n")
    pairs = [polyp(tmp_path, f"test_{name}.csv").pairs("test") for name in ("Kvasir", "CVC-ClinicDB")]
    assert [pair.image for (pair,) in pairs] == [tmp_path / "Kvasir/a.jpg", tmp_path / "CVC-ClinicDB/a.jpg"]


def test_real_kvasir_is_whole_disjoint_and_binary(shared: Path) -> None:
    data = polyp(shared / "data/polyp")
    data.setup("fit")
    data.setup("test")
    names = {split: data.names(split) for split in ("train", "val", "test")}
    assert {split: len(listed) for split, listed in names.items()} == {"train": 798, "val": 80, "test": 120}
    assert len({name for listed in names.values() for name in listed}) == 998
    for split in ("train", "val", "test"):
        for pair in data.pairs(split)[::20]:
            image, mask = data.read(pair)
            assert image.shape[:2] == mask.shape
            assert set(np.unique(mask)) == {0, 1}
