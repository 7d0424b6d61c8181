"""Segment images: `python -m convlora.predict checkpoint=RUN input=photos/ output=masks/`."""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from convlora import adapter, draw, run
from convlora.cli import command, refuse_idle
from convlora.data.bands import Bands
from convlora.data.images import image_size, read_image
from convlora.inference import Found, Predictor
from convlora.routing import locate, routed_layers
from convlora.scenes import Writing, check_place, is_scene, scene_size, segment_scene, write_polygons
from convlora.schema import Config
from convlora.tiles import check_tile, choose_tiling
from convlora.writing import Item, as_mask, as_overlay, find_images, left_to_do, save

WRITERS = 2  # threads that write while the next images are computed
AHEAD = 16  # images that wait to be written, at most


@dataclass(frozen=True)
class PredictConfig:
    """The keys of conf/predict.yaml, where they are explained."""

    checkpoint: str
    input: str
    output: str
    probabilities: bool
    overlays: bool
    routing: bool
    polygons: bool
    overwrite: bool
    tiles: bool | None
    tile: int | None
    overlap: float
    batch_size: int
    num_workers: int
    device: str
    devices: int
    precision: str | None
    model: Config


@dataclass(frozen=True)
class Loaded:
    """One image as the network takes it, or why it could not be read."""

    item: Item
    pixels: Tensor | None = None
    size: tuple[int, int] = (0, 0)
    error: str = ""


class Images(Dataset[Loaded]):
    """Image files; one that cannot be read comes with its error instead of pixels."""

    def __init__(self, items: Sequence[Item], predictor: Predictor):
        self.items = items
        self.prepare = predictor.prepare
        self.bands = predictor.bands

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Loaded:
        item = self.items[index]
        try:
            image = read_image(item.path, self.bands)
        except (OSError, ValueError) as error:
            return Loaded(item, error=str(error))
        return Loaded(item, self.prepare(image), image.shape[:2])


def predict(config: PredictConfig) -> None:
    """Write a mask for every image of a file, folder or list.

    Raises:
        SystemExit: with code 1 where an image could not be read; all others are done by then.
    """
    refuse_idle("model")
    output, path = Path(config.output), adapter.find(config.checkpoint)
    wanted = {"probabilities": config.probabilities, "overlays": config.overlays, "routing": config.routing}
    kinds = ["", *(kind for kind, is_wanted in wanted.items() if is_wanted)]
    polygons = ["polygons"] * config.polygons
    items = [
        Item(image, name, is_scene(image, config.tiles), [*kinds, *polygons])
        for image, name in find_images(Path(config.input), output).items()
    ]
    check_items(config, items)
    made_by = identify(path, config)
    todo = left_to_do(items, output, made_by, config.overwrite)
    run.make_folder("output", output)
    console = Console(highlight=False, soft_wrap=True)
    if len(todo) < len(items):
        console.print(
            f"{len(items) - len(todo)} of {len(items)} are there already; overwrite=true makes them anew"
        )
    failures = in_processes(config, todo, made_by) if todo else []
    console.print(f"{len(todo) - len(failures)} of {len(todo)} masks written to {output}")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)  # noqa: T201
    if failures:
        raise SystemExit(1)


def check_items(config: PredictConfig, items: Sequence[Item]) -> None:
    """Refuse settings that are impossible or have no effect; raises ValueError."""
    scene = next((item.path for item in items if item.is_scene), None)
    photo = next((item.path for item in items if not item.is_scene), None)
    if scene is not None and (config.overlays or config.routing):
        name = "overlays" if config.overlays else "routing"
        raise ValueError(
            f"{name}=true draws on photographs, but {scene} is written as GeoTIFF, by windows; leave it out, "
            "or set tiles=false"
        )
    if config.routing and config.tiles:
        raise ValueError("routing=true shows whole images, but tiles=true cuts them; leave one of them out")
    if config.polygons and photo is not None:
        raise ValueError(f"polygons=true is for GeoTIFF, but {photo} is none; leave it out")
    if config.polygons:
        for item in items:
            check_place(item.path)
    if config.devices < 1:
        raise ValueError(f"devices={config.devices} must be at least 1, the number of devices that share")
    if config.devices > 1 and ":" in config.device:
        raise ValueError(f"device={config.device} is one device; leave out devices={config.devices}")
    if config.tile is None:
        return
    if scene is None and not config.tiles:
        raise ValueError(f"tile={config.tile} has no effect, since no image is cut; add tiles=true")
    cut = (item for item in items if item.is_scene or config.tiles)
    check_tile(
        config.tile,
        ((item.path, (scene_size if item.is_scene else image_size)(item.path)) for item in cut),
    )


def identify(path: Path, config: PredictConfig) -> str:
    """Return what tells the masks of an adapter and of settings from those of others."""
    settings = [config.precision, config.tiles, config.tile, config.overlap]
    content = hashlib.sha256(path.read_bytes()).hexdigest() + json.dumps(settings)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def in_processes(config: PredictConfig, items: Sequence[Item], made_by: str) -> list[str]:
    """Predict on one or several devices, each by a process of its own; returns what could not be read."""
    count = min(config.devices, len(items))
    if count == 1:
        return predict_share(config, items, made_by)
    there = torch.cuda.device_count()
    kind = config.device if config.device != "auto" else "cuda" if there else "cpu"
    if kind == "cuda" and there < config.devices:
        raise ValueError(f"devices={config.devices}, but this machine has {there} GPUs; set devices={there}")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, _begin, (count if kind == "cpu" else 1,)) as pool:
        shares = [
            pool.submit(predict_share, config, items[rank::count], made_by, rank, kind)
            for rank in range(count)
        ]
        return [failure for share in shares for failure in share.result()]


def _begin(processes: int) -> None:
    """Prepare a process that is one of several: Ctrl-C ends it unsaid, and the cores are shared."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


def predict_share(
    config: PredictConfig, items: Sequence[Item], made_by: str, rank: int = 0, kind: str | None = None
) -> list[str]:
    """Predict on one device.

    Args:
        config: of the command.
        items: those of this process.
        made_by: identifies adapter and settings.
        rank: of this process among those that share; the first shows its progress.
        kind: of device; None takes the one of the config.

    Returns:
        The errors of the images that could not be read.
    """
    device = config.device if kind is None else f"cuda:{rank}" if kind == "cuda" else kind
    predictor = adapter.load(config.checkpoint, config.model["weights"], config.precision, device)
    console = Console(highlight=False, soft_wrap=True)

    def show(steps: Iterable[Any], title: str = "predict") -> Iterable[Any]:
        return track(steps, title, console=console) if rank == 0 else steps

    photos = [item for item in items if not item.is_scene]
    scenes = [item for item in items if item.is_scene]
    failures = []
    if photos:
        settings = (config.tile, config.overlap, config.batch_size)
        seer = predictor.tiled(*settings) if config.tiles else predictor
        failures += predict_photos(seer, photos, config, made_by, show)
    for item in scenes:
        tiling = choose_tiling(config.tile, config.overlap, predictor.median_side, config.checkpoint)
        files = item.files(Path(config.output))
        writing = Writing(made_by, config.batch_size, config.num_workers, partial(show, title=item.path.name))
        try:
            segment_scene(item.path, files[""], files.get("probabilities"), predictor, tiling, writing)
        except ValueError as error:
            failures.append(str(error))
            continue
        if "polygons" in files:
            write_polygons(files[""], files["polygons"], list(predictor.class_colors), made_by)
    return failures


def predict_photos(
    predictor: Predictor,
    items: Sequence[Item],
    config: PredictConfig,
    made_by: str,
    show: Callable[[Iterable[Any]], Iterable[Any]],
) -> list[str]:
    """Write what is found in images that fit in memory; returns the errors of those that cannot be read."""
    layers = routed_layers(predictor.segmenter.get_submodule("image_encoder")) if config.routing else {}
    if config.routing and not any(layer.gate_sees_maps for layer in layers.values()):
        raise ValueError(
            f"routing=true shows which expert has the say where, but in {config.checkpoint} no gate chooses "
            "by the image; leave it out, or take an adapter of peft=conv_lora with peft/gate=noisy_top_k"
        )
    failures: list[str] = []
    loader = DataLoader(
        Images(items, predictor),
        1 if config.tiles else config.batch_size,
        num_workers=config.num_workers,
        collate_fn=list,
    )
    with writers() as write:
        for batch in show(loader):
            good = [each for each in batch if each.pixels is not None]
            failures += [each.error for each in batch if each.pixels is None]
            found = predictor.segment([each.pixels for each in good], [each.size for each in good])
            for index, (loaded, each) in enumerate(zip(good, found, strict=True)):
                files = loaded.item.files(Path(config.output))
                if layers:
                    side = predictor.resize.image_size
                    located = {name: locate(layer, index, len(good), side) for name, layer in layers.items()}
                    scales = next(iter(layers.values())).experts.scales
                    shown = predictor.resize.content(*loaded.size)
                    picture = draw_routing(loaded.item.path, predictor.bands, shown, located, scales)
                    save(picture, files["routing"], made_by)
                write(write_files, loaded.item.path, files, each, predictor, made_by)
    return failures


@contextmanager
def writers() -> Iterator[Callable[..., None]]:
    """Call functions in threads, in their order and not far behind; raises what they do."""
    waiting: deque[Future[None]] = deque()
    with ThreadPoolExecutor(WRITERS) as pool:

        def call(function: Callable[..., None], *arguments: Any) -> None:
            waiting.append(pool.submit(function, *arguments))
            while len(waiting) > AHEAD:
                waiting.popleft().result()

        yield call
        for future in waiting:
            future.result()


def write_files(
    source: Path, files: dict[str, Path], found: Found, predictor: Predictor, made_by: str
) -> None:
    """Write the mask of one image and what else was asked for, the mask last."""
    colors = predictor.class_colors
    if "probabilities" in files:
        save(Image.fromarray(found.prob), files["probabilities"], made_by)
    if "overlays" in files:
        image = read_image(source, predictor.bands)
        save(as_overlay(image, found.classes, colors), files["overlays"], made_by)
    save(as_mask(found.classes, colors), files[""], made_by)


def draw_routing(
    path: Path,
    bands: Bands | None,
    shown: tuple[int, int],
    located: dict[str, NDArray[np.int64]],
    scales: Sequence[float],
) -> Image.Image:
    """Return the image at the network's scale with the expert that each window of each layer chose."""
    height, width = shown
    image = cv2.resize(read_image(path, bands), (width, height), interpolation=cv2.INTER_AREA)
    picture = BytesIO()
    choices = {name: choice[:height, :width] for name, choice in located.items()}
    draw.draw_choices(image, choices, scales, picture)
    return Image.open(picture)


main = command("predict", PredictConfig, predict)

if __name__ == "__main__":
    main()
