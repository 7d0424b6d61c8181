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
from rasterio.control import GroundControlPoint
from rasterio.transform import from_origin
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from convlora import predict, scenes, tiles
from convlora.adapter import load
from convlora.data.bands import Bands
from convlora.geotiff import write_polygons
from convlora.inference import Predictor
from convlora.scenes import predict_scene
from convlora.tiles import Tiling
from convlora.writing import Item, Job

ALPHA = {"photometric": "RGB", "alpha": "YES"}
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

    item = Item(path, mask.stem, is_scene=True, kinds=["", "probabilities"], made_by="me")
    predict_scene(item, predictor, Tiling(tile), Job(mask.parent, False, 2, 0, track))


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


def test_a_part_of_other_settings_or_another_scene_is_not_gone_on_with(
    tmp_path: Path, predictor: Predictor
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

        item = Item(scene, "mask", is_scene=True, kinds=[""], made_by=made_by)
        predict_scene(item, predictor, Tiling(48), Job(tmp_path, False, 1, 0, stop))
        return seen

    with pytest.raises(KeyboardInterrupt):
        part("first")
    assert len(part("second")) == 9


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

    item = Item(scene, "mask", is_scene=True, kinds=["", "probabilities"], made_by="me")
    try:
        with pytest.raises(
            OSError, match=r"could not write .*probabilities/mask\.tif .* The same command goes on"
        ):
            predict_scene(item, predictor, Tiling(260), Job(tmp_path, False, 2, 0, fill))
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


def test_bands_are_read_by_windows_as_from_whole_files(cli: Commands, tmp_path: Path) -> None:
    """Channels in their order, values scaled as in training, a band that looks like transparency."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        for index in range(count):
            mask = np.zeros((48, 48), np.uint8)
            mask[8:30, 10:40] = 255
            values = rng.integers(0, 3000, (4, 48, 48)) + 3000 * (mask > 0)
            write_scene(tmp_path / f"data/{split}/images/{index}.tif", values.astype(np.uint16), **ALPHA)
            (tmp_path / f"data/{split}/masks").mkdir(exist_ok=True)
            Image.fromarray(mask).save(tmp_path / f"data/{split}/masks/{index}.png")
    folder = (
        "dataset=folder",
        f"data_root={tmp_path / 'data'}",
        "model=sam_tiny",
        "loading.channels=[4,2,1]",
    )
    small = [each for each in SMALL if not each.startswith("dataset.")]
    run = train_in(tmp_path, *folder, *small, "logger=csv", "trainer.max_epochs=1")
    path = run / "adapter.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    torch.manual_seed(3)
    noisy = {name: value + 0.3 * torch.randn_like(value) for name, value in load_file(path).items()}
    save_file(noisy, path, metadata)
    scene = pixels(96, 130, 4).astype(np.uint16) * 20
    scene[3, :, 100:] = 0  # water, dark in the infrared that the file calls alpha
    write_scene(tmp_path / "in/scene.tif", scene, **ALPHA)
    arguments = (f"checkpoint={run}", f"input={tmp_path / 'in'}", "num_workers=0", "probabilities=true")
    assert cli(predict, *arguments, "output=out", "tile=64", "polygons=true").code == 0
    found = load(run).tiled(64).predict(tmp_path / "in/scene.tif")
    assert np.array_equal(read(Path("out/scene.tif")), found.classes)
    assert np.abs(read(Path("out/probabilities/scene.tif")).astype(int) - found.prob).max() <= 1
    assert 0.05 < found.classes.mean() < 0.95
    with rasterio.open("out/scene.tif") as made, rasterio.open(tmp_path / "in/scene.tif") as source:
        assert made.bounds == source.bounds
        assert made.crs == source.crs


def test_values_that_are_no_numbers_are_no_data(tmp_path: Path, predictor: Predictor) -> None:
    values = pixels(64, 96).astype(np.float32)
    values[:, :, :40] = np.nan
    scene = write_scene(tmp_path / "scene.tif", values)
    bands = Bands((1, 2, 3), "float32", ((0.0, 255.0),) * 3)
    parts = (predictor.segmenter, predictor.resize, predictor.class_colors, predictor.context, bands)
    segment(scene, tmp_path / "mask.tif", Predictor(*parts))
    classes = read(tmp_path / "mask.tif")
    assert (classes[:, :40] == 255).all()
    assert (classes[:, 40:] < 255).all()


def test_wide_scenes_are_moved_in_parts(
    tmp_path: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = write_scene(tmp_path / "scene.tif", pixels(120, 200))
    segment(scene, tmp_path / "whole.tif", predictor)
    monkeypatch.setattr(tiles, "COLUMNS", 33)
    monkeypatch.setattr(scenes, "COLUMNS", 33)
    segment(scene, tmp_path / "parts.tif", predictor)
    assert np.array_equal(read(tmp_path / "whole.tif"), read(tmp_path / "parts.tif"))
    assert np.array_equal(read(prob_of(tmp_path / "whole.tif")), read(prob_of(tmp_path / "parts.tif")))


@pytest.mark.parametrize(
    ("crs", "transform"),
    [
        ("EPSG:32701", from_origin(160000, 8000000, 1000, 1000)),  # across the antimeridian
        ("EPSG:3413", from_origin(-20000, 20000, 1000, 1000)),  # around the pole
        ("EPSG:4326", from_origin(30, 60, 0.01, 0.01)),
    ],
)
def test_areas_are_true_anywhere_on_earth(tmp_path: Path, crs: str, transform: Any) -> None:
    """As the ellipsoid's own, by the scale of the projection in the middle of each pixel."""
    classes = np.ones((1, 40, 40), np.uint8)
    mask = write_scene(tmp_path / "mask.tif", classes, crs=crs, transform=transform)
    write_polygons(mask, tmp_path / "p.geojson", ["thing"], "me")
    [feature] = json.loads((tmp_path / "p.geojson").read_text())["features"]
    expected = 0.0
    for row in range(40):
        for column in range(40):
            place = [transform @ (column + dx, row + dy) for dx, dy in ((0, 0), (1, 0), (0, 1))]
            lon, lat = rasterio.warp.transform(crs, "EPSG:4326", *zip(*place, strict=True))[:2]
            sphere = [on_ellipsoid(*each) for each in zip(lon, lat, strict=True)]
            expected += float(np.linalg.norm(np.cross(sphere[1] - sphere[0], sphere[2] - sphere[0])))
    assert feature["properties"]["area_m2"] == pytest.approx(expected, rel=2e-3)


def on_ellipsoid(lon: float, lat: float) -> NDArray[np.float64]:
    """The point in space, m, of a longitude and latitude on the ellipsoid of WGS84."""
    a, e2 = 6378137.0, 0.00669437999014
    x, y = np.radians(lon), np.radians(lat)
    n = a / np.sqrt(1 - e2 * np.sin(y) ** 2)
    return np.array([n * np.cos(y) * np.cos(x), n * np.cos(y) * np.sin(x), n * (1 - e2) * np.sin(y)])


def test_a_local_crs_has_no_polygons_and_is_told_before_anything_is_computed(
    cli: Commands, run: Path
) -> None:
    local = 'LOCAL_CS["site",UNIT["metre",1]]'
    write_scene(Path("in/scene.tif"), pixels(96, 96), crs=local)
    done = cli(predict, f"checkpoint={run}", "input=in", "output=out", "polygons=true", "num_workers=0")
    assert done.code == 1
    assert "its coordinate reference system leads to no longitude and latitude" in done.err
    assert not Path("out").exists()
    assert cli(predict, f"checkpoint={run}", "input=in", "output=out", "num_workers=0").code == 0


def test_a_scene_placed_by_control_points_is_refused(cli: Commands, run: Path) -> None:
    gcps = [
        GroundControlPoint(r, c, 300000 + c, 2800000 - r) for r, c in ((0, 0), (0, 90), (90, 0), (90, 90))
    ]
    write_scene(Path("in/scene.tif"), pixels(96, 96), crs=None, transform=None)
    with rasterio.open("in/scene.tif", "r+") as file:
        file.gcps = (gcps, rasterio.crs.CRS.from_epsg(32640))
    done = cli(predict, f"checkpoint={run}", "input=in", "output=out", "num_workers=0")
    assert "has its place by control points" in done.err
    assert (
        cli(predict, f"checkpoint={run}", "input=in", "output=out", "num_workers=0", "tiles=false").code == 0
    )
