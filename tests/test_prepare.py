"""From an empty folder to a data set that is checked: by a local server, with mistakes planted."""

import json
import re
import shlex
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import Commands, Finished
from PIL import Image

from convlora import fetch, prepare, train
from convlora.data.sets.folder import Folder

SIZES = {"train": 6, "val": 2, "test": 3}
COUNTS = "dataset.source.images={train:6,val:2,test:3}"


def scene(seed: int, size: tuple[int, int] = (90, 120)) -> Image.Image:
    """Smooth noise, so that it survives a JPEG as a photograph does."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (9, 12, 3), np.uint8)
    return Image.fromarray(cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC))


def blob() -> Image.Image:
    mask = np.zeros((90, 120), np.uint8)
    cv2.circle(mask, (60, 45), 20, 255, cv2.FILLED)
    return Image.fromarray(mask)


@pytest.fixture
def isic(tmp_path: Path) -> Path:
    """The layout of the isic2017 archive with a few images."""
    root = tmp_path / "origin/isic2017"
    seed = 0
    for split, count in SIZES.items():
        rows = ["image,label"]
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for i in range(count):
            scene(seed).save(root / split / f"images/{i}.png")
            blob().save(root / split / f"masks/{i}.png")
            rows.append(f"{split}/images/{i}.png,{split}/masks/{i}.png")
            seed += 1
        (root / f"{split}.csv").write_text("\n".join(rows) + "\n")
    return root


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url(isic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    shutil.make_archive(str(tmp_path / "served/isic2017"), "zip", isic.parent, "isic2017")
    monkeypatch.setattr(fetch, "PAUSES", (0.01,))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "served")) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/isic2017.zip"
        server.shutdown()
        thread.join()


def get(cli: Commands, url: str, *arguments: str) -> Finished:
    return cli(
        prepare,
        "dataset=isic2017",
        f"dataset.source.url={url}",
        COUNTS,
        *arguments,
    )


def check(cli: Commands, root: Path, *arguments: str) -> tuple[Finished, list[dict[str, object]]]:
    done = cli(prepare, "dataset=isic2017", "action=check", f"data_root={root.parent}", "output=check",
               COUNTS, *arguments)  # fmt: skip
    findings: list[dict[str, object]] = json.loads(Path("check/check.json").read_text())["findings"]
    return done, findings


def kinds(findings: list[dict[str, object]]) -> dict[str, object]:
    return {str(finding["kind"]): finding["level"] for finding in findings}


def test_a_data_set_is_named_and_there(cli: Commands, url: str) -> None:
    done = get(cli, url)
    assert done.code == 0, done.err
    assert "isic2017 is whole" in done.out
    assert len(list(Path("data/isic2017/train/images").iterdir())) == 6
    left = sorted(path.name for path in Path("data").iterdir())
    assert left == ["isic2017", "isic2017.zip.sha256"]


def test_what_is_whole_is_left_alone(cli: Commands, url: str) -> None:
    get(cli, url)
    again = get(cli, "http://127.0.0.1:9/gone.zip")
    assert again.code == 0, again.err


def test_what_is_missing_is_fetched_again(cli: Commands, url: str) -> None:
    get(cli, url)
    Path("data/isic2017/val/masks/1.png").unlink()
    Path("data/isic2017/mine.txt").write_text("a user's own")
    done = get(cli, url)
    assert done.code == 0, done.err
    assert Path("data/isic2017/val/masks/1.png").is_file()
    [former] = Path("data").glob("isic2017.2*")
    assert (former / "mine.txt").read_text() == "a user's own"
    assert (
        f"what was in {Path('data/isic2017').resolve()} is now in {former.resolve()}" in done.out + done.err
    )


def test_an_archive_that_was_there_before_is_kept(cli: Commands, url: str, tmp_path: Path) -> None:
    Path("data").mkdir()
    shutil.copy(tmp_path / "served/isic2017.zip", "data")
    done = get(cli, "http://127.0.0.1:9/isic2017.zip")
    assert done.code == 0, done.err
    assert "data/isic2017.zip was there before and is kept" in done.out
    assert sorted(path.name for path in Path("data").iterdir()) == ["isic2017", "isic2017.zip"]


def test_all_of_a_data_set_is_verified_whatever_is_tested(cli: Commands) -> None:
    for folder in ("train", "validation/easy", "validation/hard", "test/easy", "test/hard"):
        for kind, suffix in (("images", ".jpg"), ("masks", "_mask.png")):
            path = Path("data/Trans10K") / folder / kind
            path.mkdir(parents=True)
            blob().save(path / f"1{suffix}")
    counts = "dataset.source.images={train:1,val:2,test:2}"
    done = cli(prepare, "dataset=trans10k_v1", "dataset.test_subsets=[hard]", counts)
    assert done.code == 0, done.err


def test_another_number_of_images_than_published_is_refused(cli: Commands, url: str) -> None:
    done = get(cli, url, "dataset.source.images={train:7}")
    assert done.code == 1
    assert "isic2017: train has 6 images, 7 were published; move data/isic2017 away" in done.err


def test_a_wrong_hash_is_refused(cli: Commands, url: str) -> None:
    done = get(cli, url, f"+dataset.source.sha256={'0' * 64}")
    assert done.code == 1
    assert "should start with 0000" in done.err
    assert not Path("data/isic2017").exists()


def test_what_needs_a_person_is_told_step_by_step_and_verified_afterwards(
    cli: Commands, tmp_path: Path
) -> None:
    done = cli(prepare, "dataset=chameleon")
    assert done.code == 1
    assert "chameleon: no Imgs under data/TestDataset/CHAMELEON, and it has to be fetched by hand" in done.err
    assert "github.com/DengPingFan/SINet" in done.err
    assert "data/TestDataset/CHAMELEON/Imgs and data/TestDataset/CHAMELEON/GT exist" in done.err
    for kind in ("Imgs", "GT"):
        (tmp_path / "data/TestDataset/CHAMELEON" / kind).mkdir(parents=True)
    for i in range(75):
        blob().save(f"data/TestDataset/CHAMELEON/Imgs/{i}.jpg")
        blob().save(f"data/TestDataset/CHAMELEON/GT/{i}.png")
    short = cli(prepare, "dataset=chameleon")
    assert short.code == 1
    assert "chameleon: test has 75 images, 76 were published" in short.err
    for kind, suffix in (("Imgs", "jpg"), ("GT", "png")):
        blob().save(f"data/TestDataset/CHAMELEON/{kind}/75.{suffix}")
    assert cli(prepare, "dataset=chameleon").code == 0


def test_a_sound_data_set_has_no_findings(cli: Commands, isic: Path) -> None:
    done, findings = check(cli, isic)
    assert done.code == 0, done.err
    assert findings == []
    summary = json.loads(Path("check/check.json").read_text())["splits"]
    assert {split: row["images"] for split, row in summary.items()} == SIZES
    assert summary["val"]["width"] == [120, 120]
    expected = float((np.asarray(blob()) > 0).mean())
    assert summary["test"]["class_shares"]["lesion"] == pytest.approx(expected, abs=1e-5)
    assert "errors: 0, warnings: 0" in done.out
    with Image.open("check/contact_sheet.png") as sheet:
        assert sheet.width > 1000


@pytest.mark.parametrize("way", ["copied", "jpeg", "smaller", "lossless"])
def test_an_image_planted_in_another_split_is_found(cli: Commands, isic: Path, way: str) -> None:
    source, leak = isic / "test/images/1.png", isic / "train/images/4.png"
    image = Image.open(source)
    if way == "copied":
        shutil.copy(source, leak)
    elif way == "lossless":
        image.save(leak, compress_level=0)
    elif way == "smaller":
        image.resize((84, 63)).save(leak)
        blob().resize((84, 63), Image.Resampling.NEAREST).save(isic / "train/masks/4.png")
    else:
        image.save(leak, "JPEG", quality=40)  # whatever its name says
    done, findings = check(cli, isic)
    assert done.code == 1
    assert kinds(findings) == {"leak": "error"}
    assert findings[0]["files"] == ["train/images/4.png = test/images/1.png"]
    assert "train and test share images, 1 of them" in done.out


def test_an_image_of_a_further_test_set_is_found_in_training(cli: Commands, isic: Path) -> None:
    for kind in ("Imgs", "GT"):
        (isic.parent / "TestDataset/NC4K" / kind).mkdir(parents=True)
    for i in range(2):
        scene(100 + i).save(isic.parent / f"TestDataset/NC4K/Imgs/{i}.png")
        blob().save(isic.parent / f"TestDataset/NC4K/GT/{i}.png")
    scene(3).save(isic.parent / "TestDataset/NC4K/Imgs/1.png")
    done, findings = check(cli, isic, "test_sets=[nc4k]")
    assert done.code == 1
    leaks = [finding for finding in findings if finding["kind"] == "leak"]
    assert [leak["files"] for leak in leaks] == [["train/images/3.png = Imgs/1.png"]]
    assert "train and nc4k/test share images" in done.out


def test_everything_wrong_is_told_at_once(cli: Commands, isic: Path) -> None:
    empty, grey = Image.new("L", (120, 90)), Image.new("L", (120, 90), 77)
    empty.save(isic / "train/masks/0.png")
    grey.save(isic / "train/masks/1.png")
    inverted = np.asarray(blob()) ^ 255
    Image.fromarray(inverted).save(isic / "val/masks/0.png")
    Image.new("L", (30, 90), 255).save(isic / "val/masks/1.png")
    (isic / "train/images/2.png").write_bytes(b"not an image")
    shutil.copy(isic / "train/images/4.png", isic / "train/images/3.png")
    (isic / "test/masks/0.png").unlink()
    done, findings = check(cli, isic)
    assert done.code == 1
    assert kinds(findings) == {
        "listing": "error",
        "unreadable": "error",
        "duplicate": "warning",
        "empty mask": "warning",
        "inverted mask": "warning",
    }
    assert sum(finding["kind"] == "unreadable" for finding in findings) == 3
    for part in (
        "1 of 6 files of test are missing",
        "1.png: the mask has the values 77",
        "30 x 90",
        "cannot be decoded",
        "errors: 4, warnings: 3",
    ):
        assert part in done.out.replace("\n", " "), part


def test_a_folder_of_ones_own_is_checked_with_its_classes(cli: Commands, tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        (tmp_path / "mine" / kind).mkdir(parents=True)
    for i in range(3):
        scene(i).save(f"mine/images/{i}.png")
        ids = np.zeros((90, 120), np.uint8)
        ids[:30], ids[60:] = 1, 255
        Image.fromarray(ids).save(f"mine/masks/{i}.png")
    done = cli(prepare, "dataset=folder", "data_root=mine", "action=check", "output=check",
               "dataset.class_names=[sand,sea,rock]", "dataset.ignore_index=255")  # fmt: skip
    assert done.code == 0, done.err
    report = json.loads(Path("check/check.json").read_text())
    assert report["splits"]["test"]["class_shares"] == {"sand": 0.5, "sea": 0.5, "rock": 0}
    assert report["splits"]["test"]["ignored_share"] == pytest.approx(1 / 3, abs=1e-5)
    assert "class rock is in no mask" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dataset=isic2017", "action=chekc"], "action=chekc must be download, check or split"),
        (["dataset=isic2017", "dataset.lists=fold"], "dataset.lists=fold has no effect with action=download"),
        (["dataset=folder", "data_root=nowhere"], "neither images nor splits in nowhere"),
        (["dataset=nc4k", "action=check"], "nc4k: no Imgs under data/TestDataset/NC4K; run"),
        ([], "dataset"),
    ],
)
def test_mistakes_are_one_clear_line(cli: Commands, arguments: list[str], message: str) -> None:
    done = cli(prepare, *arguments)
    assert done.code == 1
    assert message in done.err
    assert "overrides" not in done.err  # hydra's own line


def test_synthetic_scenes_can_be_checked_too(cli: Commands) -> None:
    sizes = ("dataset.train_size=6", "dataset.val_size=2", "dataset.test_size=2", "dataset.size=64")
    done = cli(prepare, "dataset=synthetic", "action=check", "output=check", *sizes)
    assert done.code == 0, done.err
    assert "errors: 0" in done.out


@pytest.fixture
def undivided(tmp_path: Path) -> Path:
    """Thirty images in a folder without a split; every fifth mask is empty, four images are near-copies."""
    root = tmp_path / "my images"
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    for i in range(30):
        scene(0 if i in (3, 17, 25) else i, (90, 120)).save(root / f"images/{i}.jpg", quality=95 - i)
        (Image.new("L", (120, 90)) if i % 5 == 0 else blob()).save(root / f"masks/{i}.png")
    return root


def listings(root: Path) -> dict[str, list[str]]:
    return {split: (root / f"{split}.txt").read_text().split() for split in ("train", "val", "test")}


SPLIT = ("dataset=folder", "action=split", "val=0.2", "test=0.2")


def test_a_folder_is_split_by_the_command_that_its_error_tells(cli: Commands, undivided: Path) -> None:
    told = cli(train, "dataset=folder", f"data_root={undivided}", "logger=csv")
    assert told.code == 1
    command = re.findall("`(.+?)`", told.err)[0]
    done = cli(prepare, *shlex.split(command)[3:], "val=0.2", "test=0.2")
    assert done.code == 0, done.err
    found = listings(undivided)
    everything = [name for names in found.values() for name in names]
    assert sorted(everything) == sorted(path.name for path in (undivided / "images").iterdir())
    assert {split: len(names) for split, names in found.items()} == {"train": 18, "val": 6, "test": 6}
    empty = {split: sum(int(Path(name).stem) % 5 == 0 for name in names) for split, names in found.items()}
    assert empty == {"train": 4, "val": 1, "test": 1}
    assert sum({"0.jpg", "3.jpg", "17.jpg", "25.jpg"} <= set(names) for names in found.values()) == 1
    assert "kept together: 4 images that are copies or nearly so, in 1 group, the largest of 4" in done.out
    checked = cli(prepare, "dataset=folder", f"data_root={undivided}", "action=check", "output=check")
    assert checked.code == 0, checked.err  # no image is in two splits


def test_the_same_images_are_split_alike_wherever_they_lie(cli: Commands, undivided: Path) -> None:
    copy = undivided.parent / "copy"
    for kind in ("images", "masks"):
        (copy / kind).mkdir(parents=True)
        for path in sorted((undivided / kind).iterdir(), reverse=True):
            shutil.copy(path, copy / kind)
    for root in (undivided, copy):
        assert cli(prepare, *SPLIT, f"data_root={root}").code == 0
    assert listings(undivided) == listings(copy)


@pytest.mark.parametrize("there", ["train.csv", "val.txt", "test/"])
def test_a_split_is_never_overwritten(cli: Commands, undivided: Path, there: str) -> None:
    path = undivided / there
    path.mkdir() if there.endswith("/") else path.write_text("0.jpg\n")
    before = sorted(undivided.iterdir())
    done = cli(prepare, *SPLIT, f"data_root={undivided}")
    assert done.code == 1
    assert f"{path} gives a split already, which is never overwritten; use it, or move" in done.err
    assert sorted(undivided.iterdir()) == before


def test_a_split_that_cannot_be_written_whole_leaves_nothing(undivided: Path) -> None:
    data = Folder(name="folder", root=undivided, class_names=["foreground"])
    with pytest.raises(ValueError, match="2 names cannot be listed line by line"):
        data.write_split({"train": ["0.jpg", " 1.jpg"], "val": ["a\nb.jpg"], "test": ["2.jpg"]})
    with pytest.raises(FileNotFoundError):
        data.write_split({"train": ["0.jpg"], "no/such": ["1.jpg"]})  # type: ignore[dict-item]
    assert not list(undivided.glob("*.txt"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["val=0.6", "test=0.5"], "val=0.6 and test=0.5 leave nothing to train on"),
        (["val=-0.1"], "val=-0.1 must lie between 0 and 1"),
        (["test=0"], "test=0 must lie between 0 and 1"),
        (["seed=-1"], "seed=-1 must be at least 0"),
        (["test_sets=[nc4k]"], "test_sets has no effect with action=split"),
        (["action=check"], "val has no effect with action=check"),
        (["dataset=kvasir"], "action=split is for a folder of your own, kvasir has its splits"),
        (["data_root=nowhere"], "neither images nor splits in nowhere"),
    ],
)
def test_impossible_splits_are_refused(
    cli: Commands, undivided: Path, arguments: list[str], message: str
) -> None:
    done = cli(prepare, *SPLIT, f"data_root={undivided}", *arguments)
    assert done.code == 1
    assert message in done.err
    assert not list(undivided.glob("*.txt"))


def test_too_few_images_and_damaged_ones_are_refused(cli: Commands, undivided: Path) -> None:
    for path in undivided.glob("*/*"):
        if path.stem not in ("1", "3", "17"):
            path.unlink()
    done = cli(prepare, *SPLIT, f"data_root={undivided}")
    assert "3 images, 2 that are no copies of others, are too few for 3 splits; add images" in done.err
    (undivided / "images/3.jpg").write_bytes(b"not an image")
    done = cli(prepare, *SPLIT, f"data_root={undivided}")
    assert "1 of 3 images cannot be split, first: " in done.err
    assert "3.jpg" in done.err
    assert not list(undivided.glob("*.txt"))
