"""Prediction on GeoTIFF by windows, through the command line and by hand."""

import json
import resource
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.features
import rasterio.warp
import torch
from conftest import SMALL, Commands, train_in
from numpy.typing import NDArray
from PIL import Image
from rasterio.transform import from_origin
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from convlora import predict
from convlora.adapter import load
from convlora.geotiff import write_polygons
from convlora.inference import Predictor
from convlora.scenes import predict_scene
from convlora.tiles import Tiling
from convlora.writing import Item, Job

PLACE = {"crs": "EPSG:32640", "transform": from_origin(300000, 2800000, 0.5, 0.5)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose adapter finds something and nothing, each in about half of an image."""
    run = train_in(tmp_path_factory.mktemp("trained"), *SMALL, "logger=csv", "trainer.max_epochs=1")
    path = run / "adapter.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    torch.manual_seed(3)
    state = {name: value + 0.3 * torch.randn_like(value) for name, value in load_file(path).items()}
    save_file(state, path, metadata)
    return run


@pytest.fixture
def predictor(run: Path) -> Predictor:
    return load(run)


def pixels(height: int, width: int, count: int = 3) -> NDArray[np.uint8]:
    """Bands [count, height, width] that are smooth enough to give areas."""
    coarse = np.random.default_rng(0).integers(1, 255, (height // 8, width // 8, count), np.uint8)
    fine = [np.asarray(Image.fromarray(coarse[..., band]).resize((width, height))) for band in range(count)]
    return np.stack(fine)


def write_scene(path: Path, values: NDArray[Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = values.shape
    profile = {"driver": "GTiff", "dtype": values.dtype, "count": count, "height": height, "width": width}
    with rasterio.open(path, "w", **{**profile, **PLACE, **options}) as file:
        file.write(values)
    return path


def segment(
    path: Path, mask: Path, predictor: Predictor, seen: list[Any] | None = None, tile: int = 48
) -> None:
    def track(steps: Iterable[Any], title: str) -> Iterable[Any]:
        for step in steps:
            if seen is not None:
                seen.append(step)
            yield step

    item = Item(path, mask.stem, is_scene=True, kinds=["", "probabilities"])
    predict_scene(item, predictor, Tiling(tile), Job(mask.parent, "me", False, 2, 0, track))


def prob_of(mask: Path) -> Path:
    return mask.parent / "probabilities" / mask.name


def read(path: Path) -> NDArray[np.uint8]:
    with rasterio.open(path) as file:
        return file.read(1)  # type: ignore[no-any-return]


def test_a_scene_keeps_its_place_its_size_and_what_it_lacks(cli: Commands, run: Path) -> None:
    values = pixels(600, 520)
    values[:, :40, :200] = 0
    write_scene(Path("in/scene.tif"), values, nodata=0, photometric="RGB")
    done = cli(predict, f"checkpoint={run}", "input=in/scene.tif", "output=out", "num_workers=0",
               "probabilities=true")  # fmt: skip
    assert done.code == 0, done.err
    assert "1 of 1 masks written to out" in done.out
    for path in (Path("out/scene.tif"), Path("out/probabilities/scene.tif")):
        with rasterio.open(path) as file:
            assert (file.crs, file.transform) == (PLACE["crs"], PLACE["transform"])
            assert file.shape == (600, 520)
            assert file.block_shapes == [(512, 512)]
            assert file.compression.name == "deflate"
            assert file.overviews(1) == [2]
            assert np.array_equal(file.dataset_mask() == 0, (values == 0).all(axis=0))
    classes, prob = read(Path("out/scene.tif")), read(Path("out/probabilities/scene.tif"))
    assert set(np.unique(classes)) == {0, 1, 255}
    valid = classes < 255
    assert np.array_equal(classes[valid] == 1, prob[valid] >= 128)
    assert not list(Path("out").rglob("*.part*"))
    assert not list(Path("out").rglob("*.new"))


def test_windows_from_the_disk_give_what_windows_in_memory_do(tmp_path: Path, predictor: Predictor) -> None:
    values = pixels(100, 150)
    segment(write_scene(tmp_path / "scene.tif", values), tmp_path / "mask.tif", predictor)
    found = predictor.tiled(48).predict(values.transpose(1, 2, 0))
    assert np.array_equal(read(tmp_path / "mask.tif"), found.classes)
    assert np.abs(read(prob_of(tmp_path / "mask.tif")).astype(int) - found.prob).max() <= 1
    assert 0.01 < found.classes.mean() < 0.99


def test_a_grey_scene_and_one_with_transparency_are_rgb_too(tmp_path: Path, predictor: Predictor) -> None:
    values = pixels(64, 64, 1)
    grey = write_scene(tmp_path / "grey.tif", values)
    segment(grey, tmp_path / "grey_mask.tif", predictor)
    alpha = np.concatenate([values.repeat(3, axis=0), np.full_like(values, 255)])
    colour = write_scene(tmp_path / "colour.tif", alpha, photometric="RGB", alpha="YES")
    segment(colour, tmp_path / "colour_mask.tif", predictor)
    assert np.array_equal(read(tmp_path / "grey_mask.tif"), read(tmp_path / "colour_mask.tif"))


def test_a_scene_of_several_classes_has_ids_in_their_colours(tmp_path: Path) -> None:
    names = "dataset.class_names=[ground,blob,rock]"
    several = ("metrics=multiclass", "loss=cross_entropy_dice", "logger=csv", "trainer.max_epochs=1")
    predictor = load(train_in(tmp_path, *SMALL, names, *several))
    segment(write_scene(tmp_path / "scene.tif", pixels(64, 96)), tmp_path / "mask.tif", predictor)
    with rasterio.open(tmp_path / "mask.tif") as file:
        assert set(np.unique(file.read(1))) <= {0, 1, 2}
        colors = [list(file.colormap(1)[index][:3]) for index in range(3)]
        assert colors == list(predictor.class_colors.values())
        assert json.loads(file.tags()["CLASSES"]) == ["ground", "blob", "rock"]


def test_a_scene_that_was_cut_off_goes_on_where_it_stopped(tmp_path: Path, predictor: Predictor) -> None:
    scene = write_scene(tmp_path / "scene.tif", pixels(200, 100))
    whole: list[Any] = []
    segment(scene, tmp_path / "whole.tif", predictor, whole)
    expected = read(tmp_path / "whole.tif"), read(prob_of(tmp_path / "whole.tif"))

    class Stopping(Predictor):
        calls = 0

        def logits(self, *arguments: Any) -> list[torch.Tensor]:
            self.calls += 1
            if self.calls > 6:
                raise KeyboardInterrupt
            return super().logits(*arguments)

    stopping = Stopping(predictor.segmenter, predictor.resize, predictor.class_colors, predictor.context)
    with pytest.raises(KeyboardInterrupt):
        segment(scene, tmp_path / "mask.tif", stopping)
    assert not (tmp_path / "mask.tif").exists()
    rest: list[Any] = []
    segment(scene, tmp_path / "mask.tif", predictor, rest)
    assert len(rest) < len(whole) - 2
    assert np.array_equal(read(tmp_path / "mask.tif"), expected[0])
    assert np.array_equal(read(prob_of(tmp_path / "mask.tif")), expected[1])


@pytest.mark.parametrize("change", ["settings", "scene"])
def test_a_part_of_other_settings_or_another_scene_is_not_gone_on_with(
    tmp_path: Path, predictor: Predictor, change: str
) -> None:
    scene = write_scene(tmp_path / "scene.tif", pixels(100, 100))

    def part(made_by: str) -> list[Any]:
        seen: list[Any] = []

        def stop(steps: Iterable[Any], title: str) -> Iterable[Any]:
            for step in steps:
                seen.append(step)
                if len(seen) > 8 and made_by == "first":
                    raise KeyboardInterrupt
                yield step

        item = Item(scene, "mask", is_scene=True, kinds=[""])
        predict_scene(item, predictor, Tiling(48), Job(tmp_path, made_by, False, 1, 0, stop))
        return seen

    with pytest.raises(KeyboardInterrupt):
        part("first")
    if change == "scene":
        write_scene(scene, 255 - pixels(100, 100))
    else:
        assert len(part("second")) == 9
        return
    with pytest.raises(KeyboardInterrupt):
        part("first")


def test_a_window_without_data_is_not_computed(tmp_path: Path, predictor: Predictor) -> None:
    values = pixels(48, 144)
    values[:, :, :90] = 0
    scene = write_scene(tmp_path / "scene.tif", values, nodata=0)
    seen: list[Any] = []
    segment(scene, tmp_path / "mask.tif", predictor, seen)
    windows = [window is None for batch in seen for window in batch]
    assert windows == [True, False, False, False] or windows == [True, True, False, False]
    classes = read(tmp_path / "mask.tif")
    assert (classes[:, :90] == 255).all()
    assert (classes[:, 90:] < 255).all()


def test_polygons_cover_what_the_mask_does(tmp_path: Path) -> None:
    classes = np.zeros((1, 60, 80), np.uint8)
    classes[0, 10:40, 20:60] = 1
    classes[0, 20:30, 30:40] = 0  # a hole
    classes[0, 50:55, 5:15] = 1
    classes[0, :5] = 255
    mask = write_scene(tmp_path / "mask.tif", classes, nodata=255)
    write_polygons(mask, tmp_path / "polygons.geojson", ["thing"], "me")
    content = json.loads((tmp_path / "polygons.geojson").read_text())
    assert content["type"] == "FeatureCollection"
    areas = sorted(feature["properties"]["area_m2"] for feature in content["features"])
    assert areas == pytest.approx([50 * 0.25, 1100 * 0.25], rel=2e-3)  # a pixel is 0.5 m wide
    assert {feature["properties"]["class"] for feature in content["features"]} == {"thing"}
    on_earth = [feature["geometry"] for feature in content["features"]]
    shapes = rasterio.warp.transform_geom("EPSG:4326", PLACE["crs"], on_earth)
    burnt = rasterio.features.rasterize(shapes, (60, 80), transform=PLACE["transform"])
    assert np.array_equal(burnt == 1, classes[0] == 1)


def test_polygons_of_several_classes_have_their_names(tmp_path: Path) -> None:
    classes = np.zeros((1, 20, 20), np.uint8)
    classes[0, :, 10:] = 2
    write_polygons(write_scene(tmp_path / "m.tif", classes, nodata=255), tmp_path / "p.geojson", "abc", "me")
    features = json.loads((tmp_path / "p.geojson").read_text())["features"]
    assert sorted(feature["properties"]["class"] for feature in features) == ["a", "c"]


def test_polygons_by_the_command_line_are_made_once(cli: Commands, run: Path) -> None:
    write_scene(Path("in/scene.tif"), pixels(96, 96))
    arguments = (f"checkpoint={run}", "input=in", "output=out", "num_workers=0", "polygons=true", "tile=48")
    assert cli(predict, *arguments).code == 0
    features = json.loads(Path("out/polygons/scene.geojson").read_text())["features"]
    inside = sum(feature["properties"]["area_m2"] for feature in features)
    assert inside == pytest.approx((read(Path("out/scene.tif")) == 1).sum() * 0.25, rel=2e-3)
    assert inside > 0
    assert "1 of 1 are there already" in cli(predict, *arguments).out
    written = Path("out/scene.tif").stat().st_mtime_ns
    Path("out/polygons/scene.geojson").unlink()
    assert "1 of 1 masks written" in cli(predict, *arguments).out
    assert Path("out/polygons/scene.geojson").is_file()
    assert Path("out/scene.tif").stat().st_mtime_ns == written  # what there is serves
    assert cli(predict, *arguments, "overwrite=true").code == 0
    assert Path("out/scene.tif").stat().st_mtime_ns > written


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        (
            {"crs": None},
            ("polygons=true", "tiles=true"),
            "has no coordinate reference system, so its polygons have no place",
        ),
        ({}, ("overlays=true",), "overlays=true draws on photographs"),
        ({}, ("tile=500",), "tile=500 is larger than the images"),
        ({}, ("tile=48", "tiles=false"), "tile=48 has no effect, since no image is cut; add tiles=true"),
        ({}, ("tile=48", "overlap=0.9"), "overlap=0.9 must lie above 0"),
        ({}, ("tiles=true", "routing=true"), "routing=true draws on photographs"),
    ],
)
def test_what_cannot_be_done_with_a_scene_is_refused(
    cli: Commands, run: Path, options: dict[str, Any], arguments: tuple[str, ...], message: str
) -> None:
    write_scene(Path("in/scene.tif"), pixels(96, 96), **options)
    done = cli(predict, f"checkpoint={run}", "input=in/scene.tif", "output=out", "num_workers=0", *arguments)
    assert done.code == 1
    assert message in done.err
    assert len(done.err.splitlines()) == 1


def test_scenes_of_another_kind_than_trained_on_do_not_stop_the_others(cli: Commands, run: Path) -> None:
    write_scene(Path("in/a.tif"), pixels(96, 96, 4), photometric="MINISBLACK")
    write_scene(Path("in/b.tif"), pixels(96, 96).astype(np.uint16))
    Path("in/c.tif").write_bytes(b"II*\0 is no image")
    write_scene(Path("in/d.tif"), pixels(96, 96))
    done = cli(predict, f"checkpoint={run}", "input=in", "output=out", "num_workers=0")
    assert done.code == 1
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert "a.tif has 4 bands of uint8, but the adapter was trained on 8-bit RGB" in " ".join(errors)
    assert "b.tif has 3 bands of uint16, but the adapter was trained on 8-bit RGB" in " ".join(errors)
    assert len(errors) == 3
    assert [path.name for path in Path("out").iterdir()] == ["d.tif"]


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_disk_that_fills_up_loses_nothing(tmp_path: Path, predictor: Predictor, share: float) -> None:
    """GDAL tells of it in several ways, by how far it came."""
    scene = write_scene(tmp_path / "scene.tif", pixels(520, 520))
    mask, prob = tmp_path / "mask.tif", tmp_path / "probabilities/mask.tif"
    segment(scene, mask, predictor, tile=260)
    size, whole = prob.stat().st_size, (read(mask), read(prob))
    mask.unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(steps: Iterable[Any], title: str) -> Iterable[Any]:
        yield from steps
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size), before[1]))

    item = Item(scene, "mask", is_scene=True, kinds=["", "probabilities"])
    try:
        with pytest.raises(
            OSError, match=r"could not write .*probabilities/mask\.tif .* The same command goes on"
        ):
            predict_scene(item, predictor, Tiling(260), Job(tmp_path, "me", False, 2, 0, fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not mask.exists()
    seen: list[Any] = []
    segment(scene, mask, predictor, seen, tile=260)
    assert not seen
    assert np.array_equal(read(mask), whole[0])
    assert np.array_equal(read(prob), whole[1])


def test_a_disk_without_room_is_told_before_anything_is_computed(
    tmp_path: Path, predictor: Predictor
) -> None:
    scene = write_scene(tmp_path / "scene.tif", pixels(100, 100))
    before, seen = resource.getrlimit(resource.RLIMIT_FSIZE), list[Any]()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(OSError, match=r"no room for mask\.tif\.part"):
            segment(scene, tmp_path / "mask.tif", predictor, seen)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not seen
    assert not list(tmp_path.glob("mask.tif*"))
