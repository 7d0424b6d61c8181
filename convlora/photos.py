"""Images that fit in memory, segmented in batches while others are read and written."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

import cv2
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from convlora import draw
from convlora.data.images import read_image
from convlora.inference import Found, Predictor
from convlora.routing import Layers, locate, routed_layers
from convlora.writing import Item, Job, as_mask, as_overlay, save

WRITERS = 2  # threads that write while the next images are computed
AHEAD = 16  # images that wait to be written, at most


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


def check_routing(predictor: Predictor, checkpoint: str) -> None:
    """Refuse to show routing where no gate chooses by the image; raises ValueError."""
    if not any(layer.gate_sees_maps for layer in _layers(predictor).values()):
        raise ValueError(
            f"routing=true shows which expert has the say where, but in {checkpoint} no gate chooses by the "
            "image; leave it out, or take an adapter of peft=conv_lora with peft/gate=noisy_top_k"
        )


def _layers(predictor: Predictor) -> Layers:
    return routed_layers(predictor.segmenter.get_submodule("image_encoder"))


def predict_photos(items: Sequence[Item], predictor: Predictor, job: Job) -> list[str]:
    """Write what is found in images that fit in memory.

    They are read and written while others are computed.

    Args:
        items: the images.
        predictor: that segments them.
        job: further settings.

    Returns:
        The errors of images that could not be read.

    Raises:
        OSError: a file could not be written; those before it are.
    """
    failures: list[str] = []
    images = Images(items, predictor)
    loader = DataLoader(images, job.batch_size, num_workers=job.num_workers, collate_fn=list)
    with writers() as write:
        for batch in job.track(loader, "predict"):
            good = [each for each in batch if each.pixels is not None]
            failures += [each.error for each in batch if each.pixels is None]
            found = predictor.segment([each.pixels for each in good], [each.size for each in good])
            if good and "routing" in good[0].item.kinds:
                write_routing(good, predictor, job)
            for loaded, each in zip(good, found, strict=True):
                files = loaded.item.files(job.output)
                write(write_files, loaded.item, files, each, predictor)
    return failures


def predict_prompted(items: Sequence[Item], predictor: Predictor, job: Job) -> list[str]:
    """Write the objects that prompts tell, a mask for each.

    Args:
        items: one for each prompt, those of an image in a row.
        predictor: that segments them.
        job: further settings.

    Returns:
        The errors of images that could not be read, or of prompts that do not lie in them.
    """
    failures: list[str] = []
    images = [list(few) for _, few in groupby(items, key=lambda item: item.path)]
    with writers() as write:
        for few in job.track(images, "predict"):
            prompts = [item.prompt for item in few if item.prompt is not None]
            try:
                found = predictor.prompt(few[0].path, prompts)
            except (OSError, ValueError) as error:
                failures.append(str(error))
                continue
            for item, each in zip(few, found, strict=True):
                write(write_files, item, item.files(job.output), each, predictor)
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


def write_files(item: Item, files: dict[str, Path], found: Found, predictor: Predictor) -> None:
    """Write the mask of one image and what else was asked for, the mask last."""
    colors = predictor.class_colors
    if "probabilities" in files:
        save(Image.fromarray(found.prob), files["probabilities"], item.made_by)
    if "overlays" in files:
        image = read_image(item.path, predictor.bands)
        save(as_overlay(image, found.classes, colors), files["overlays"], item.made_by)
    save(as_mask(found.classes, colors), files[""], item.made_by)


def write_routing(items: Sequence[Loaded], predictor: Predictor, job: Job) -> None:
    """Write for each image of the last batch which expert each window of each layer chose."""
    layers, side = _layers(predictor), predictor.resize.image_size
    scales = next(iter(layers.values())).experts.scales
    for index, loaded in enumerate(items):
        height, width = predictor.resize.content(*loaded.size)
        image = read_image(loaded.item.path, predictor.bands)
        choices = {name: locate(layer, index, len(items), side) for name, layer in layers.items()}
        picture = BytesIO()
        draw.draw_choices(
            cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA),
            {name: choice[:height, :width] for name, choice in choices.items()},
            scales,
            picture,
        )
        save(Image.open(picture), loaded.item.files(job.output)["routing"], loaded.item.made_by)
