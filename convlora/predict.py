"""Segment images: `python -m convlora.predict checkpoint=RUN input=photos/ output=masks/`."""

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from convlora import draw, run
from convlora.adapter import load
from convlora.cli import command, refuse_idle
from convlora.data.images import list_images, read_image
from convlora.inference import Found, Predictor
from convlora.routing import Layers, locate, routed_layers
from convlora.schema import Config


@dataclass(frozen=True)
class PredictConfig:
    """The keys of conf/predict.yaml, where they are explained."""

    checkpoint: str
    input: str
    output: str
    probabilities: bool
    overlays: bool
    routing: bool
    batch_size: int
    num_workers: int
    device: str
    precision: str | None
    model: Config


@dataclass(frozen=True)
class Loaded:
    """One image as the network takes it, or why it could not be read."""

    path: Path
    pixels: Tensor | None = None
    size: tuple[int, int] = (0, 0)
    error: str = ""


class Images(Dataset[Loaded]):
    """Image files; one that cannot be read comes with its error instead of pixels."""

    def __init__(self, paths: Sequence[Path], prepare: Callable[[NDArray[np.uint8]], Tensor]):
        self.paths = paths
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Loaded:
        path = self.paths[index]
        try:
            image = read_image(path)
        except (OSError, ValueError) as error:
            return Loaded(path, error=str(error))
        return Loaded(path, self.prepare(image), image.shape[:2])


def predict(config: PredictConfig) -> None:
    """Write a mask for every image of a file or folder.

    Raises:
        SystemExit: with code 1 where an image could not be read; all others are done by then.
    """
    refuse_idle("model")
    source, output = Path(config.input), Path(config.output)
    paths = find_images(source, output)
    predictor = load(config.checkpoint, config.model["weights"], config.precision, config.device)
    layers = routed_layers(predictor.segmenter.image_encoder)
    if config.routing and not any(layer.gate_sees_maps for layer in layers.values()):
        raise ValueError(
            f"routing=true shows which expert has the say where, but in {config.checkpoint} no gate chooses "
            "by the image; leave it out, or take an adapter of peft=conv_lora with peft/gate=noisy_top_k"
        )
    run.make_folder("output", output)
    names = name_outputs(paths, source)
    loader = DataLoader(
        Images(paths, predictor.prepare),
        config.batch_size,
        num_workers=config.num_workers,
        collate_fn=list,
    )
    failures: list[Loaded] = []
    console = Console(highlight=False, soft_wrap=True)
    for batch in track(loader, "predict", console=console):
        good = [item for item in batch if item.pixels is not None]
        failures += [item for item in batch if item.pixels is None]
        found = predictor.segment([item.pixels for item in good], [item.size for item in good])
        for item, each in zip(good, found, strict=True):
            write(output, names[item.path], item.path, each, predictor.class_colors, config)
        if config.routing and good:
            write_routing(output / "routing", good, names, predictor, layers)
    console.print(f"{len(paths) - len(failures)} of {len(paths)} masks written to {output}")
    if failures:
        for item in failures:
            print(f"error: {item.error}", file=sys.stderr)  # noqa: T201
        raise SystemExit(1)


def write(
    output: Path,
    name: str,
    source: Path,
    found: Found,
    colors: Mapping[str, Sequence[int]],
    config: PredictConfig,
) -> None:
    """Write the mask of one image and what else was asked for."""
    pictures: dict[str, Callable[[], Image.Image]] = {"": lambda: as_mask(found.classes, colors)}
    if config.probabilities:
        pictures["probabilities"] = lambda: Image.fromarray(found.prob)
    if config.overlays:
        pictures["overlays"] = lambda: as_overlay(read_image(source), found.classes, colors)
    for folder, picture in pictures.items():
        path = output / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            picture().save(path)
        except OSError as error:
            raise OSError(f"could not write {path} ({error}); is there room on the disk?") from error


def write_routing(
    output: Path, items: Sequence[Loaded], names: Mapping[Path, str], predictor: Predictor, layers: Layers
) -> None:
    """Write for each image of the last batch which expert each window of each layer chose."""
    side = predictor.resize.image_size
    scales = next(iter(layers.values())).experts.scales
    for index, item in enumerate(items):
        height, width = predictor.resize.content(*item.size)
        image = cv2.resize(read_image(item.path), (width, height), interpolation=cv2.INTER_AREA)
        located = {name: locate(layer, index, len(items), side) for name, layer in layers.items()}
        path = output / names[item.path]
        path.parent.mkdir(parents=True, exist_ok=True)
        choices = {name: choice[:height, :width] for name, choice in located.items()}
        draw.draw_choices(image, choices, scales, path)


def as_mask(classes: NDArray[np.uint8], colors: Mapping[str, Sequence[int]]) -> Image.Image:
    """Return 0 and 255 for a foreground alone, else the class ids with a palette of the classes' colours."""
    if len(colors) == 1:
        return Image.fromarray(classes * np.uint8(255))
    picture = Image.fromarray(classes)
    picture.putpalette([channel for color in colors.values() for channel in color])
    return picture


def as_overlay(
    image: NDArray[np.uint8], classes: NDArray[np.uint8], colors: Mapping[str, Sequence[int]]
) -> Image.Image:
    """Return the classes drawn on the image, of several with a legend below."""
    picture = draw.draw_classes(image, classes, colors)
    return Image.fromarray(picture if len(colors) == 1 else draw.add_legend(picture, colors))


def find_images(source: Path, output: Path) -> list[Path]:
    """Return the images at `source`.

    Raises:
        FileNotFoundError: no such file or folder, or no images in it.
        ValueError: the output would overwrite the input.
    """
    if source.is_file():
        paths, folder = [source], source.parent
    elif source.is_dir():
        found, folder = list_images(source, recursive=True), source
        paths = [path for path in found if output.resolve() not in path.resolve().parents]
    else:
        raise FileNotFoundError(f"input={source}: no such file or folder")
    if {"images", "masks"} <= {path.relative_to(folder).parts[0] for path in paths}:
        raise ValueError(f"input={source} holds masks beside images; set input={source / 'images'}")
    if output.resolve() == folder.resolve():
        raise ValueError(f"output={output} is the input's folder, masks would replace images; choose another")
    if not paths:
        raise FileNotFoundError(f"input={source}: no images in it")
    return paths


def name_outputs(paths: Sequence[Path], source: Path) -> dict[Path, str]:
    """Return the mask's file name for each image: the image's stem, or its whole name where stems clash."""
    root = source if source.is_dir() else source.parent
    names = {path: path.relative_to(root) for path in paths}
    stems = Counter(name.with_suffix("") for name in names.values())
    return {
        path: f"{name.with_suffix('') if stems[name.with_suffix('')] == 1 else name}.png"
        for path, name in names.items()
    }


main = command("predict", PredictConfig, predict)

if __name__ == "__main__":
    main()
