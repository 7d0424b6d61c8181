from pathlib import Path

import pytest
from PIL import Image

from convlora.data.images import IMAGE_SUFFIXES
from convlora.data.sets.folder import Folder


def folder(root: Path) -> Folder:
    return Folder(
        name="folder",
        root=root,
        class_names=["foreground"],
    )


def fill(root: Path, images: str, masks: str | None = None) -> Path:
    for kind, names in (("images", images), ("masks", images if masks is None else masks)):
        (root / kind).mkdir(parents=True, exist_ok=True)
        for name in names.split():
            file = root / kind / (name if Path(name).suffix in IMAGE_SUFFIXES else f"{name}.png")
            Image.new("L", (4, 4)).save(file)
    return root


def stems(data: Folder, split: str) -> list[str]:
    pairs = data.pairs(split)  # type: ignore[arg-type]
    assert all(pair.image.stem == pair.mask.stem for pair in pairs)
    return [pair.image.stem for pair in pairs]


def test_images_and_masks_match_by_stem_whatever_their_suffix(tmp_path: Path) -> None:
    data = folder(fill(tmp_path, "a.jpg b.png c.v2.png", "a.png b.bmp c.v2.png"))
    assert stems(data, "test") == ["a", "b", "c.v2"]


def test_without_splits_all_is_test_and_training_is_refused(tmp_path: Path) -> None:
    data = folder(fill(tmp_path, "a b"))
    data.setup("test")
    assert data.names("test") == ["images/a.png", "images/b.png"]
    with pytest.raises(
        FileNotFoundError, match=r"never drawn at run time; .*, or write train\.txt, val\.txt and test\.txt"
    ):
        data.setup("fit")


def test_text_files_choose_by_name_or_stem(tmp_path: Path) -> None:
    fill(tmp_path, "a b c d.v2")
    (tmp_path / "train.txt").write_text("b.png\n\na\n")
    (tmp_path / "val.txt").write_text("d.v2\r\n")
    data = folder(tmp_path)
    assert stems(data, "train") == ["b", "a"]
    assert stems(data, "val") == ["d.v2"]
    with pytest.raises(FileNotFoundError, match=r"no test split .* write test\.txt"):
        data.setup("test")


def test_csv_wins_over_text_and_text_over_folder(tmp_path: Path) -> None:
    fill(fill(tmp_path, "a b") / "val", "c")
    assert stems(folder(tmp_path), "val") == ["c"]
    (tmp_path / "val.txt").write_text("b\n")
    assert stems(folder(tmp_path), "val") == ["b"]
    (tmp_path / "val.csv").write_text("image,label\nimages/a.png,masks/a.png\n")
    assert stems(folder(tmp_path), "val") == ["a"]


def test_split_folders_may_repeat_a_stem(tmp_path: Path) -> None:
    for split in ("train", "val"):
        fill(tmp_path / split, "1 2")
    data = folder(tmp_path)
    data.setup("fit")
    assert data.names("train") == ["train/images/1.png", "train/images/2.png"]


def test_images_without_masks_are_counted_and_named(tmp_path: Path) -> None:
    data = folder(fill(tmp_path, "a b c d e", "a"))
    with pytest.raises(ValueError, match=r"images without a mask \(4\): b, c, d; "):
        data.setup("test")


def test_masks_without_images_are_counted_and_named(tmp_path: Path) -> None:
    data = folder(fill(tmp_path, "a", "a b"))
    with pytest.raises(ValueError, match=r"masks without an image \(1\): b; "):
        data.setup("test")


@pytest.mark.parametrize(("images", "masks"), [("a.png a.jpg", "a.png"), ("a.png", "a.png a.bmp")])
def test_two_files_of_one_stem_are_refused(tmp_path: Path, images: str, masks: str) -> None:
    data = folder(fill(tmp_path, images, masks))
    with pytest.raises(ValueError, match=r"files that share their stem with another \(1\): a"):
        data.setup("test")


def test_listed_name_that_is_not_there_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "a b", "a")
    (tmp_path / "test.txt").write_text("a\nz\n")
    with pytest.raises(ValueError, match=r"test\.txt: names that are not in .*images \(1\): z"):
        folder(tmp_path).setup("test")
    (tmp_path / "test.txt").write_text("a.jpg\n")
    with pytest.raises(ValueError, match=r"names that are not in .*images \(1\): a\.jpg"):
        folder(tmp_path).setup("test")
    (tmp_path / "test.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"images without a mask \(1\): b"):
        folder(tmp_path).setup("test")


def test_image_in_two_splits_is_named_across_kinds_of_listing(tmp_path: Path) -> None:
    fill(tmp_path, "a b c")
    (tmp_path / "train.txt").write_text("a\nb.png\n")
    (tmp_path / "val.csv").write_text("image,label\nimages/b.png,masks/b.png\n")
    for split in ("train", "val"):
        with pytest.raises(
            ValueError, match=r"images in both .*\(1\), first .*images/b; list each image in one"
        ):
            folder(tmp_path).pairs(split)  # type: ignore[arg-type]


def test_test_split_needs_no_training_images(tmp_path: Path) -> None:
    fill(tmp_path, "a")
    (tmp_path / "test.txt").write_text("a\n")
    (tmp_path / "train.txt").write_text("elsewhere\n")
    folder(tmp_path).setup("test")


def test_image_listed_twice_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "a")
    (tmp_path / "test.txt").write_text("a\na.png\n")
    with pytest.raises(ValueError, match=r"test\.txt lists .*a\.png 2 times"):
        folder(tmp_path).setup("test")


def test_empty_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="test lists no images"):
        folder(fill(tmp_path, "")).setup("test")


def test_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"neither images nor splits in .*none; set data_root=YOUR_FOLDER"
    ):
        folder(tmp_path / "none").setup("test")
    with pytest.raises(FileNotFoundError, match=r"neither images nor splits"):
        folder(tmp_path).setup("test")
