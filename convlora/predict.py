"""Segment images: `python -m convlora.predict checkpoint=RUN input=photos/ output=masks/`."""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from convlora import adapter, run
from convlora.cleaning import Cleaning, choose_cleaning
from convlora.cli import command, plain, refuse_idle
from convlora.data.images import allow_large_images, image_size
from convlora.geotiff import check_place, is_scene, scene_size
from convlora.photos import check_routing, predict_photos, predict_prompted
from convlora.prompts import Prompt, by_image, check_one_class, read_prompts
from convlora.scenes import predict_scene
from convlora.schema import Config
from convlora.tiles import check_tile, choose_tiling
from convlora.writing import PROMPTED, Item, Job, check_targets, find_images, left_to_do, remove_stale

FORMAT = 1  # of what is written; changes when the same image and settings would give other files


@dataclass(frozen=True)
class PredictConfig:
    """The keys of conf/predict.yaml, where they are explained."""

    checkpoint: str
    input: str
    output: str
    threshold: float | str
    smallest: int
    fill_holes: int | bool
    probabilities: bool
    overlays: bool
    routing: bool
    polygons: bool
    prompts_file: str | None
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


def predict(config: PredictConfig) -> None:
    """Write a mask for every image of a file, folder or list.

    Raises:
        SystemExit: with code 1 where an image could not be read; all others are done by then.
    """
    refuse_idle("model")
    if config.tiles:
        allow_large_images()
    output = Path(config.output)
    wanted = {"probabilities": config.probabilities, "overlays": config.overlays, "routing": config.routing}
    kinds = ["", *(kind for kind, is_wanted in wanted.items() if is_wanted)]
    kinds += ["polygons"] * config.polygons
    file = adapter.open_file(config.checkpoint, config.model["weights"], config.precision)
    cleaning = cleaning_of(config, file.metadata, file.class_colors)
    prompts = None if config.prompts_file is None else read_prompts(Path(config.prompts_file))
    settings = identify(file, config, cleaning)
    items = [
        Item(image, name, is_scene(image, config.tiles), kinds, mark(settings, image))
        for image, name in find_images(Path(config.input), output).items()
    ]
    if prompts is not None:
        items = with_prompts(config, items, prompts, file.class_colors)
    check_items(config, items)
    check_targets(items, output)
    todo = left_to_do(items, output, config.overwrite)
    console = Console(highlight=False, soft_wrap=True)
    if len(todo) < len(items):
        console.print(
            f"{len(items) - len(todo)} of {len(items)} are there already; overwrite=true makes them anew"
        )
    try:
        failures = in_processes(config, todo) if todo else []
    except KeyboardInterrupt:
        console.print("\nstopped; the same command goes on after what is written")
        raise
    console.print(f"{len(todo) - len(failures)} of {len(todo)} masks written to {output}")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)  # noqa: T201
    if failures:
        raise SystemExit(1)


def with_prompts(
    config: PredictConfig,
    items: Sequence[Item],
    prompts: Mapping[str, Sequence[Prompt]],
    class_names: Collection[str],
) -> list[Item]:
    """Return an item for each prompt, called NAME_1 and so on; images without prompts are left out.

    Args:
        config: of the command.
        items: the images.
        prompts: what their file says.
        class_names: that the adapter tells apart.

    Raises:
        ValueError: a name is that of no image, there are several classes, or another setting does not go
            with prompts.
    """
    for name in ("tiles", "routing", "polygons"):
        if getattr(config, name):
            raise ValueError(
                f"{name}=true is for whole images without prompts; leave out {name} or prompts_file"
            )
    check_one_class(class_names)
    names = {item.path: str(Path(item.name).with_name(item.path.name)) for item in items}
    told = by_image(prompts, names, Path(config.prompts_file or ""))
    return [
        replace(
            item,
            name=f"{item.name}_{number}",
            is_scene=False,
            made_by=mark_prompted(item.made_by, prompt),
            prompt=prompt,
        )
        for item in items
        for number, prompt in enumerate(told.get(item.path, ()), start=1)
    ]


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
        reason = "is not read as one, by tiles=false" if config.tiles is False else "is none"
        raise ValueError(f"polygons=true is for GeoTIFF, but {photo} {reason}; leave that out")
    if config.polygons:
        for item in items:
            check_place(item.path)
    if scene is not None and (config.smallest or config.fill_holes):
        name = "smallest" if config.smallest else "fill_holes"
        raise ValueError(
            f"{name}={getattr(config, name)} needs the whole mask, but {scene} is written by windows; "
            "leave it out, or set tiles=false"
        )
    for name, least in (("batch_size", 1), ("num_workers", 0)):
        if getattr(config, name) < least:
            raise ValueError(f"{name}={getattr(config, name)} must be at least {least}")
    if config.devices < 1:
        raise ValueError(f"devices={config.devices} must be at least 1, the number of devices that share")
    if config.devices > 1 and ":" in config.device:
        raise ValueError(f"device={config.device} is one device; leave out devices={config.devices}")
    if config.devices > 1:
        check_devices(config)
    if config.tile is None:
        return
    if scene is None and not config.tiles:
        raise ValueError(f"tile={config.tile} has no effect, since no image is cut; add tiles=true")
    cut = (item for item in items if item.is_scene or config.tiles)
    check_tile(
        config.tile,
        ((item.path, (scene_size if item.is_scene else image_size)(item.path)) for item in cut),
    )


def cleaning_of(config: PredictConfig, metadata: Mapping[str, str], class_names: Iterable[str]) -> Cleaning:
    """Return how masks are cleaned; arguments and errors as of `choose_cleaning`."""
    given = (config.threshold, config.smallest, config.fill_holes)
    return choose_cleaning(*given, metadata, list(class_names), config.checkpoint)


def identify(file: adapter.File, config: PredictConfig, cleaning: Cleaning) -> str:
    """Return what tells the masks of an adapter and of settings from those of others."""
    settings: list[Any] = [config.precision, config.tiles, config.tile, config.overlap]
    settings += [] if cleaning.is_idle else [asdict(cleaning)]
    content = file.identity + json.dumps(settings)
    return hashlib.sha256(content.encode()).hexdigest()


def mark(settings: str, image: Path) -> str:
    """Return what tells the files of an image, as it is now, from those of other images and settings."""
    stat = image.stat()
    content = f"{FORMAT} {settings} {stat.st_size} {stat.st_mtime_ns}"
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def mark_prompted(made_by: str, prompt: Prompt) -> str:
    """Return what tells the files of one prompt from those of others; `made_by` marks the image's own."""
    content = f"{made_by} {json.dumps(asdict(prompt))}"
    return hashlib.sha256(content.encode()).hexdigest()[:16] + PROMPTED


def deal(items: Sequence[Item], count: int) -> list[list[Item]]:
    """Share items out; those of one image, which are in a row, stay together, since it is encoded once."""
    images = [list(few) for _, few in groupby(items, key=lambda item: item.path)]
    dealt = (chain.from_iterable(images[rank::count]) for rank in range(count))
    return [share for each in dealt if (share := list(each))]


def in_processes(config: PredictConfig, items: Sequence[Item]) -> list[str]:
    """Predict on one or several devices, each by a process of its own; returns what could not be read."""
    dealt = deal(items, config.devices)
    count = len(dealt)
    if count == 1:
        return predict_share(config, items)
    kind = kind_of_device(config)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, _begin, (count if kind == "cpu" else 1,)) as pool:
        shares = [pool.submit(predict_share, config, share, rank, kind) for rank, share in enumerate(dealt)]
        try:
            return [failure for share in shares for failure in share.result()]
        except BrokenProcessPool as error:
            raise OSError(
                "the process of a device has ended; if memory ran out, set batch_size=1 or fewer devices. "
                "The same command goes on after what is written"
            ) from error


def check_devices(config: PredictConfig) -> None:
    """Refuse more processes than there are GPUs or, of a CPU, cores; raises ValueError."""
    kind = kind_of_device(config)
    if kind not in ("cuda", "cpu"):
        return
    there = torch.cuda.device_count() if kind == "cuda" else os.cpu_count() or 1
    if config.devices > there:
        what = "GPUs" if kind == "cuda" else "CPU cores, and each process takes one"
        way_out = f"set devices={there}" if there else "set device=cpu"
        raise ValueError(f"devices={config.devices}, but this machine has {there} {what}; {way_out}")


def kind_of_device(config: PredictConfig) -> str:
    """Return the kind of device that several processes take, for `auto` GPUs where there are any."""
    return config.device if config.device != "auto" else "cuda" if torch.cuda.device_count() else "cpu"


def _begin(processes: int) -> None:
    """Prepare a process that is one of several: Ctrl-C ends it unsaid, and the cores are shared."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


def predict_share(
    config: PredictConfig, items: Sequence[Item], rank: int = 0, kind: str | None = None
) -> list[str]:
    """Predict on one device.

    Args:
        config: of the command.
        items: those of this process.
        rank: of this process among those that share; the first shows its progress.
        kind: of device; None takes the one of the config.

    Returns:
        The errors of the images that could not be read.
    """
    device = config.device if kind is None else f"cuda:{rank}" if kind == "cuda" else kind
    predictor = adapter.load(config.checkpoint, config.model["weights"], config.precision, device)
    predictor.cleaning = cleaning_of(config, predictor.metadata, predictor.class_colors)
    if config.routing:
        check_routing(predictor, config.checkpoint)
    run.make_folder("output", Path(config.output))
    if config.overwrite:
        remove_stale(items, Path(config.output))
    console = Console(highlight=False, soft_wrap=True)

    def show(steps: Iterable[Any], title: str) -> Iterable[Any]:
        return track(steps, title, console=console) if rank == 0 else steps

    size, workers = config.batch_size, config.num_workers
    job = Job(Path(config.output), config.overwrite, size, workers, show)
    photos = [item for item in items if not item.is_scene]
    scenes = [item for item in items if item.is_scene]
    failures = []
    if config.prompts_file is not None:
        adapter.say_prompts(config.checkpoint, predictor.metadata)
        return predict_prompted(photos, predictor, job)
    if photos and config.tiles:
        allow_large_images()
        cut = predictor.tiled(config.tile, config.overlap, size)
        failures += predict_photos(photos, cut, replace(job, batch_size=1))
    elif photos:
        failures += predict_photos(photos, predictor, job)
    for scene in scenes:
        tiling = choose_tiling(config.tile, config.overlap, predictor.median_side, config.checkpoint)
        try:
            predict_scene(scene, predictor, tiling, job)
        except ValueError as error:
            failures.append(plain(error))
    return failures


main = command("predict", PredictConfig, predict)

if __name__ == "__main__":
    main()
