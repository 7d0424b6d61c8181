"""Segment images: `python -m convlora.predict checkpoint=ADAPTER input=photos/ output=masks/`."""

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from convlora import draw
from convlora.build import Config, command, load_adapter, make
from convlora.data.images import list_images, read_image
from convlora.data.samples import to_tensor
from convlora.data.transforms import Resize, eval_transform
from convlora.segmenter import Prediction, Segmenter, restore_size, to_prediction

HALF = {
    "32-true": None,
    "32": None,
    "bf16-mixed": torch.bfloat16,
    "bf16": torch.bfloat16,
    "16-mixed": torch.float16,
    "16": torch.float16,
}


@dataclass(frozen=True)
class PredictConfig:
    """The keys of conf/predict.yaml, where they are explained."""

    checkpoint: str
    input: str
    output: str
    probabilities: bool
    overlays: bool
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

    def __init__(self, paths: Sequence[Path], resize: Resize):
        self.paths = paths
        self.transform = eval_transform(resize)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Loaded:
        path = self.paths[index]
        try:
            image = read_image(path)
        except (OSError, ValueError) as error:
            return Loaded(path, error=str(error))
        return Loaded(path, to_tensor(self.transform(image=image)["image"]), image.shape[:2])


def predict(config: PredictConfig) -> None:
    """Write a mask for every image of a file or folder.

    Raises:
        SystemExit: with code 1 where an image could not be read; all others are done by then.
    """
    source, output = Path(config.input), Path(config.output)
    paths = find_images(source, output)
    device = pick_device(config.device)
    precision = config.precision or ("bf16-mixed" if device.type == "cuda" else None)
    adapter = load_adapter(config.checkpoint, config.model["weights"], precision)
    half = pick_half(adapter.precision, device)
    segmenter = adapter.segmenter.to(device)
    resize: Resize = make("resize", adapter.resize)
    names = name_outputs(paths, source)
    colors = dict(zip(adapter.class_names, adapter.class_colors, strict=True))
    loader = DataLoader(
        Images(paths, resize),
        config.batch_size,
        num_workers=config.num_workers,
        collate_fn=list,
    )
    failures: list[Loaded] = []
    console = Console(highlight=False, soft_wrap=True)
    columns = ("predict", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress, torch.inference_mode():
        bar = progress.add_task("predict", total=len(paths))
        for batch in loader:
            good = [item for item in batch if item.pixels is not None]
            failures += [item for item in batch if item.pixels is None]
            for item, found in zip(good, segment(segmenter, good, resize, device, half), strict=True):
                write(output, names[item.path], item.path, found, colors, config)
            progress.advance(bar, len(batch))
    console.print(f"{len(paths) - len(failures)} of {len(paths)} masks written to {output}")
    if failures:
        for item in failures:
            print(f"error: {item.error}", file=sys.stderr)  # noqa: T201
        raise SystemExit(1)


def segment(
    segmenter: Segmenter,
    items: Sequence[Loaded],
    resize: Resize,
    device: torch.device,
    half: torch.dtype | None,
) -> list[Prediction]:
    """Return what is found in each image at its own size."""
    if not items:
        return []
    images = torch.stack([item.pixels for item in items if item.pixels is not None])
    if device.type == "cuda":
        images = images.pin_memory()
    with torch.autocast(device.type, half, enabled=half is not None):
        logits = segmenter(images.to(device, non_blocking=True))
    return [
        to_prediction(restore_size(logit, resize.content(*item.size), item.size))
        for logit, item in zip(logits, items, strict=True)
    ]


def write(
    output: Path,
    name: str,
    source: Path,
    found: Prediction,
    colors: Mapping[str, Sequence[int]],
    config: PredictConfig,
) -> None:
    """Write the mask of one image and what else was asked for."""
    classes, prob = (np.asarray(part.cpu().numpy()) for part in found)
    pictures: dict[str, Callable[[], Image.Image]] = {"": lambda: as_mask(classes, colors)}
    if config.probabilities:
        pictures["probabilities"] = lambda: Image.fromarray(prob)
    if config.overlays:
        pictures["overlays"] = lambda: as_overlay(read_image(source), classes, colors)
    for folder, picture in pictures.items():
        path = output / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            picture().save(path)
        except OSError as error:
            raise OSError(f"could not write {path} ({error}); is there room on the disk?") from error


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


def pick_device(name: str) -> torch.device:
    """Return the device of that name, `auto` being a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except RuntimeError as error:  # its first line says why: no such device, no driver
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name} cannot be used ({reason}); use auto, cpu or cuda") from error


def pick_half(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the half precision to compute in as the Trainer would, None for single precision."""
    if precision not in HALF:
        raise ValueError(f"precision={precision} is not one of {', '.join(HALF)}")
    half = HALF[precision]
    return torch.bfloat16 if half is torch.float16 and device.type == "cpu" else half


main = command("predict", PredictConfig, predict)

if __name__ == "__main__":
    main()
