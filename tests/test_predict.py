import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import SMALL, Commands, train_in
from numpy.typing import NDArray
from PIL import Image

from convlora import predict
from convlora.adapter import load


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("trained")
    return f"checkpoint={train_in(folder, *SMALL, 'logger=csv', 'trainer.max_epochs=1')}/adapter.safetensors"


def photo(path: Path, height: int = 30, width: int = 50) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def read(path: str) -> NDArray[np.uint8]:
    picture = cv2.imread(path, cv2.IMREAD_UNCHANGED)
    assert picture is not None, path
    return picture  # type: ignore[return-value]


def test_every_image_gets_a_mask_of_its_own_size(cli: Commands, checkpoint: str) -> None:
    photo(Path("in/a.png"), 30, 50)
    photo(Path("in/sub/b.jpg"), 64, 20)
    done = cli(predict, checkpoint, "input=in", "output=out", "num_workers=0", "batch_size=2",
               "probabilities=true", "overlays=true")  # fmt: skip
    assert done.code == 0, done.err
    assert "2 of 2 masks written to out" in done.out
    for name, size in (("a", (30, 50)), ("sub/b", (64, 20))):
        mask, prob = read(f"out/{name}.png"), read(f"out/probabilities/{name}.png")
        assert mask.shape == prob.shape == size
        assert set(np.unique(mask)) <= {0, 255}
        assert np.array_equal(mask == 255, prob >= 128)
        assert read(f"out/overlays/{name}.png").shape == (*size, 3)


def test_batches_do_not_change_the_masks(cli: Commands, checkpoint: str) -> None:
    for i in range(3):
        photo(Path(f"in/{i}.png"), 20 + 9 * i, 40)
    for size in (1, 3):
        options = (f"output=out{size}", f"batch_size={size}", "num_workers=0", "probabilities=true")
        assert cli(predict, checkpoint, "input=in", *options).code == 0
    for i in range(3):
        one, three = (read(f"out{size}/probabilities/{i}.png").astype(int) for size in (1, 3))
        assert np.abs(one - three).max() <= 1


def test_one_file_is_enough(cli: Commands, checkpoint: str) -> None:
    photo(Path("in/a.png"))
    photo(Path("in/b.png"))
    assert cli(predict, checkpoint, "input=in/a.png", "output=out", "num_workers=0").code == 0
    assert [path.name for path in Path("out").iterdir()] == ["a.png"]


def test_unreadable_files_are_reported_and_the_rest_is_done(cli: Commands, checkpoint: str) -> None:
    photo(Path("in/good.png"))
    photo(Path("in/cut.jpg"), 300, 300)
    Path("in/cut.jpg").write_bytes(Path("in/cut.jpg").read_bytes()[:2000])
    Path("in/text.png").write_text("no image")
    done = cli(predict, checkpoint, "input=in", "output=out", "batch_size=3", "num_workers=0")
    assert done.code == 1
    assert "1 of 3 masks written" in done.out
    assert "cut.jpg" in done.err
    assert "text.png" in done.err
    assert read("out/good.png").shape == (30, 50)


def test_mask_of_a_rotated_photo_matches_what_a_viewer_shows(cli: Commands, checkpoint: str) -> None:
    Path("in").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (50, 30)).save("in/a.jpg", exif=exif)
    assert cli(predict, checkpoint, "input=in", "output=out", "num_workers=0").code == 0
    assert read("out/a.png").shape == (50, 30)


def test_images_of_one_stem_keep_their_whole_name(cli: Commands, checkpoint: str) -> None:
    photo(Path("in/a.png"))
    photo(Path("in/a.jpg"), 20, 20)
    assert cli(predict, checkpoint, "input=in", "output=out", "num_workers=0").code == 0
    assert read("out/a.png.png").shape == (30, 50)
    assert read("out/a.jpg.png").shape == (20, 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["input=nowhere", "output=out"], "input=nowhere: no such file or folder"),
        (["input=empty", "output=out"], "input=empty: no images in it"),
        (["input=in", "output=in"], "masks would replace images"),
        (["input=in/a.png", "output=in"], "masks would replace images"),
        (["input=in", "output=out", "device=tpu9000"], "device=tpu9000 or precision=32-true cannot be used"),
        (
            ["input=in", "output=out", "precision=half"],
            "precision=half cannot be used (Precision 'half' is invalid",
        ),
        (
            ["input=in", "output=out", "precision=bf16-true"],
            "precision=bf16-true rounds what is trained; set bf16-mixed",
        ),
    ],
)
def test_impossible_requests_are_explained(
    cli: Commands, checkpoint: str, arguments: list[str], message: str
) -> None:
    photo(Path("in/a.png"))
    Path("empty").mkdir()
    done = cli(predict, checkpoint, *arguments)
    assert done.code == 1
    assert message in done.err
    assert "Traceback" not in done.err


def test_masks_inside_the_input_are_not_taken_for_images(cli: Commands, checkpoint: str) -> None:
    photo(Path("in/images/a.png"))
    for told in ("1 of 1 masks written", "1 of 1 are there already"):
        assert told in cli(predict, checkpoint, "input=in", "output=in/masks", "num_workers=0").out
    photo(Path("in/masks/truth.png"))
    refused = cli(predict, checkpoint, "input=in", "output=out", "num_workers=0")
    assert refused.err == "error: input=in holds masks beside images; set input=in/images"
    assert cli(predict, checkpoint, "input=in/images", "output=out", "num_workers=0").code == 0


def bytes_in(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_what_is_written_is_not_made_again_until_it_is_asked_for(cli: Commands, checkpoint: str) -> None:
    photo(Path("in/a.png"))
    photo(Path("in/b.png"), 20, 30)
    arguments = (checkpoint, "input=in", "output=out", "num_workers=0")
    assert cli(predict, *arguments).code == 0
    first, changed = bytes_in("out"), Path("out/a.png").stat().st_mtime_ns
    Path("out/b.png").unlink()
    again = cli(predict, *arguments)
    assert "1 of 2 are there already; overwrite=true makes them anew" in again.out
    assert "1 of 1 masks written" in again.out
    assert (bytes_in("out"), Path("out/a.png").stat().st_mtime_ns) == (first, changed)
    assert "2 of 2 masks written" in cli(predict, *arguments, "overwrite=true").out
    assert Path("out/a.png").stat().st_mtime_ns > changed


def test_what_else_is_asked_for_later_is_made_then(cli: Commands, checkpoint: str) -> None:
    photo(Path("in/a.png"))
    assert cli(predict, checkpoint, "input=in", "output=out", "num_workers=0").code == 0
    assert cli(predict, checkpoint, "input=in", "output=out", "num_workers=0", "overlays=true").code == 0
    assert Path("out/overlays/a.png").is_file()


@pytest.mark.parametrize("maker", ["another adapter", "other settings", "something else"])
def test_masks_of_another_origin_are_neither_kept_nor_replaced_unsaid(
    cli: Commands, checkpoint: str, tmp_path: Path, maker: str
) -> None:
    photo(Path("in/a.png"), 64, 90)
    arguments = ["input=in", "output=out", "num_workers=0"]
    if maker == "something else":
        photo(Path("out/a.png"))
    elif maker == "other settings":
        assert cli(predict, checkpoint, *arguments, "tiles=true", "tile=48").code == 0
    else:
        other = train_in(tmp_path, *SMALL, "logger=csv", "trainer.max_epochs=1", "seed=1")
        assert cli(predict, f"checkpoint={other}", *arguments).code == 0
    before = bytes_in("out")
    refused = cli(predict, checkpoint, *arguments)
    assert refused.code == 1
    assert "output=out holds files of 1 of these images that another adapter or other settings" in refused.err
    assert bytes_in("out") == before
    assert cli(predict, checkpoint, *arguments, "overwrite=true").code == 0
    assert bytes_in("out") != before


def test_a_list_names_the_images(cli: Commands, checkpoint: str) -> None:
    photo(Path("data/x/a.png"))
    photo(Path("data/y/b.png"))
    photo(Path("data/y/c.png"))
    Path("data/list.txt").write_text("x/a.png\n\n y/b.png \nx/a.png\n")
    done = cli(predict, checkpoint, "input=data/list.txt", "output=out", "num_workers=0")
    assert "2 of 2 masks written" in done.out
    assert sorted(str(path) for path in Path("out").rglob("*.png")) == ["out/x/a.png", "out/y/b.png"]
    Path("data/list.txt").write_text("x/a.png\ny/d.png\n")
    refused = cli(predict, checkpoint, "input=data/list.txt", "output=out", "num_workers=0")
    assert "lists 1 files that are not there (first " in refused.err
    assert "data/y/d.png" in refused.err


def test_a_list_beside_its_images_does_not_let_masks_replace_them(cli: Commands, checkpoint: str) -> None:
    photo(Path("data/x/a.png"))
    photo(Path("data/x/b.png"))
    Path("list.txt").write_text("data/x/a.png\ndata/x/b.png\n")
    before = bytes_in("data")
    assert cli(predict, checkpoint, "input=list.txt", "output=data/x", "overwrite=true").code == 1
    assert bytes_in("data") == before


def test_devices_share_the_images_out(cli: Commands, checkpoint: str) -> None:
    for i in range(3):
        photo(Path(f"in/{i}.png"), 20 + 9 * i, 40)
    Path("in/broken.png").write_bytes(b"no image")
    for count in (1, 2):
        done = cli(predict, checkpoint, "input=in", f"output=out{count}", f"devices={count}", "device=cpu",
                   "num_workers=0", "batch_size=1")  # fmt: skip
        assert done.code == 1
        assert "3 of 4 masks written" in done.out
        assert "broken.png: cannot be decoded" in done.err
    assert bytes_in("out1") == bytes_in("out2")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("devices=0", "devices=0 must be at least 1"),
        ("devices=999 device=cpu", f"has {os.cpu_count()} CPU cores, and each process takes one; set"),
        ("tile=48", "tile=48 has no effect, since no image is cut; add tiles=true"),
        ("polygons=true", "polygons=true is for GeoTIFF, but in/a.png is none; leave that out"),
    ],
)
def test_settings_without_effect_are_refused(
    cli: Commands, checkpoint: str, argument: str, message: str
) -> None:
    photo(Path("in/a.png"))
    done = cli(predict, checkpoint, "input=in", "output=out", *argument.split())
    assert (done.code, message in done.err) == (1, True), done.err
    assert not Path("out").exists()


def test_large_photographs_are_cut_into_windows(cli: Commands, checkpoint: str) -> None:
    photo(Path("in/a.png"), 100, 150)
    photo(Path("in/small.png"), 40, 40)
    arguments = ("input=in", "num_workers=0", "probabilities=true", "overlays=true")
    assert cli(predict, checkpoint, *arguments, "output=cut", "tiles=true", "tile=64").code == 0
    assert cli(predict, checkpoint, *arguments, "output=whole").code == 0
    [cut, whole], [small, expected] = (
        [read(f"{folder}/probabilities/{name}.png").astype(int) for folder in ("cut", "whole")]
        for name in ("a", "small")
    )
    assert cut.shape == whole.shape
    assert np.abs(cut - whole).max() > 3  # seen at another scale
    assert np.abs(small - expected).max() <= 1  # one window holds it


def test_a_failure_while_writing_ends_the_call_and_leaves_no_half_file(
    cli: Commands, checkpoint: str
) -> None:
    for name in ("a", "b"):
        photo(Path(f"in/{name}.png"))
    Path("out/b.png").mkdir(parents=True)  # which cannot be replaced by a file
    done = cli(predict, checkpoint, "input=in", "output=out", "num_workers=0", "overwrite=true")
    assert done.code == 1
    assert "error: could not write out/b.png" in done.err
    assert read("out/a.png").shape == (30, 50)
    assert not list(Path("out").glob("*.new"))


def test_another_image_of_the_same_name_is_not_taken_for_done(cli: Commands, checkpoint: str) -> None:
    photo(Path("one/a.png"))
    photo(Path("two/a.png"), 40, 40)
    assert cli(predict, checkpoint, "input=one", "output=out", "num_workers=0").code == 0
    refused = cli(predict, checkpoint, "input=two", "output=out", "num_workers=0")
    assert "or of other images of these names (as out/a.png)" in refused.err
    photo(Path("one/a.png"), 31, 50)  # replaced in its place
    assert cli(predict, checkpoint, "input=one", "output=out", "num_workers=0").code == 1


@pytest.mark.parametrize("setting", ["precision=bf16-mixed", "overlap=0.5"])
def test_settings_that_change_masks_are_part_of_their_mark(
    cli: Commands, checkpoint: str, setting: str
) -> None:
    photo(Path("in/a.png"), 64, 90)
    arguments = (checkpoint, "input=in", "output=out", "num_workers=0", "tiles=true", "tile=48")
    assert cli(predict, *arguments).code == 0
    assert "another adapter or other settings" in cli(predict, *arguments, setting).err


def test_two_images_are_never_written_to_one_file(cli: Commands, checkpoint: str) -> None:
    for name in ("a.jpg", "a.png", "a.jpg.bmp"):
        photo(Path("in") / name)
    done = cli(predict, checkpoint, "input=in", "output=out", "num_workers=0")
    assert "would both be written to out/a.jpg.png; rename one of the two" in done.err


def test_lists_may_mix_kinds_of_paths_but_never_lead_masks_over_images(
    cli: Commands, checkpoint: str, tmp_path: Path
) -> None:
    photo(Path("images/b.png"))
    photo(Path("lists/a.png"))
    here = Path.cwd()
    Path("lists/l.txt").write_text(f"\ufeffa.png\n../images/b.png\n{here}/lists/../lists/a.png\n", "utf-8")
    done = cli(predict, checkpoint, "input=lists/l.txt", "output=masks", "num_workers=0")
    assert done.code == 0, done.err
    assert sorted(map(str, Path("masks").rglob("*.png"))) == ["masks/images/b.png", "masks/lists/a.png"]
    before = bytes_in("images")
    refused = cli(
        predict, checkpoint, "input=lists/l.txt", f"output={here}", "overwrite=true", "num_workers=0"
    )
    assert refused.code == 1
    assert bytes_in("images") == before
    Path("lists/l.txt").write_bytes("\xe9.png".encode("latin-1"))
    assert "is no text in UTF-8" in cli(predict, checkpoint, "input=lists/l.txt", "output=m").err


def test_masks_written_inside_the_input_are_never_images(cli: Commands, checkpoint: str) -> None:
    photo(Path("in/a.png"))
    assert cli(predict, checkpoint, "input=in", "output=in/out", "num_workers=0").code == 0
    done = cli(predict, checkpoint, "input=in", "output=elsewhere", "num_workers=0")
    assert "1 of 1 masks written" in done.out


def test_pictures_of_older_masks_do_not_stay_beside_newer_ones(
    cli: Commands, checkpoint: str, tmp_path: Path
) -> None:
    photo(Path("in/a.png"))
    arguments = ("input=in", "output=out", "num_workers=0")
    assert cli(predict, checkpoint, *arguments, "overlays=true").code == 0
    other = train_in(tmp_path, *SMALL, "logger=csv", "trainer.max_epochs=1", "seed=1")
    assert cli(predict, f"checkpoint={other}", *arguments, "overwrite=true").code == 0
    assert not Path("out/overlays/a.png").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("batch_size=0", "batch_size=0 must be at least 1"),
        ("num_workers=-1", "num_workers=-1 must be at least 0"),
        ("tile=0", "tile=0 must be at least 16"),
    ],
)
def test_numbers_are_looked_at_first(cli: Commands, checkpoint: str, argument: str, message: str) -> None:
    photo(Path("in/a.png"))
    done = cli(predict, checkpoint, "input=in", "output=out", "tiles=true", argument)
    assert (done.code, message in done.err) == (1, True), done.err


def test_a_predictor_that_cuts_leaves_the_other_as_it_was(checkpoint: str) -> None:
    predictor = load(checkpoint.partition("=")[2])
    assert not predictor.segmenter.training
    predictor.tiled(48).predict(np.zeros((80, 90, 3), np.uint8))
    assert not any(module.training for module in predictor.segmenter.modules())


def test_an_image_of_pillow_is_read_as_its_file_is(checkpoint: str, tmp_path: Path) -> None:
    predictor = load(checkpoint.partition("=")[2])
    deep = np.arange(0, 64000, 32, dtype=np.uint16).reshape(40, 50)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    turned = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned.save(tmp_path / "turned.jpg", exif=exif, quality=100)
    for name in ("deep.png", "turned.jpg"):
        path = tmp_path / name
        assert np.array_equal(predictor.read(Image.open(path)), predictor.read(path))
    with pytest.raises(ValueError, match="pixels of Pillow's mode F"):
        predictor.read(Image.fromarray(np.zeros((5, 5), np.float32)))


def test_tiles_take_images_that_pillow_takes_for_bombs(
    cli: Commands, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    photo(Path("in/a.png"), 64, 90)
    arguments = (checkpoint, "input=in", "output=out", "num_workers=0")
    assert "set tiles=true, which cuts images into windows" in cli(predict, *arguments).err
    assert cli(predict, *arguments, "tiles=true", "tile=48").code == 0
