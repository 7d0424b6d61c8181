"""A segmenter as one graph of operations in float32, and how far another form of it is off."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from convlora.adapter import Adapter
from convlora.data.images import list_images, read_image
from convlora.data.samples import to_tensor
from convlora.data.sets.synthetic import draw_scene
from convlora.data.transforms import eval_transform
from convlora.segmenter import Segmenter

INPUT, OUTPUT, BATCH = "images", "logits", "batch"
TRACED = 2  # images in the batch that the graph is recorded with
BATCHES = (1, 3)  # sizes to try, none of them the recorded one; the rest of the images is one more
MOST = 16  # images that are tried
SCENES = 6
SIDE = 256  # of a scene, px
BOUND = 1e-4  # on the difference of logits,
RELATIVE = 1e-5  # and of large ones as a part of the largest: PyTorch itself is as far from float64


@dataclass(frozen=True)
class Trial:
    """Images on which two forms of a segmenter are compared.

    Attributes:
        images: as the network takes them [n, 3, s, s].
        source: what they are, in words.
    """

    images: Tensor
    source: str

    def batches(self) -> Iterator[Tensor]:
        """Give all images in batches of different sizes."""
        rest = len(self.images) - sum(BATCHES)
        return iter(torch.split(self.images, [*BATCHES, *([rest] if rest else [])]))


def make_trial(adapter: Adapter, folder: Path | None) -> Trial:
    """Take images of a folder, spread evenly over it, or draw synthetic scenes.

    Args:
        adapter: of the segmenter.
        folder: of the images; None draws scenes.

    Raises:
        FileNotFoundError: the folder holds no image.
        NotADirectoryError: there is no such folder.
    """
    if folder is None:
        pixels = [draw_scene(np.random.default_rng([0, index]), SIDE)[0] for index in range(SCENES)]
        source = f"{SCENES} synthetic scenes"
    else:
        paths = list_images(folder, recursive=True)
        if not paths:
            raise FileNotFoundError(f"images={folder} holds no image; name a folder that does")
        chosen = paths[:: -(-len(paths) // MOST)]
        pixels = [read_image(path, adapter.bands) for path in chosen]
        source = f"{len(chosen)} of the {len(paths)} images given"
    transform = eval_transform(adapter.resize)
    inputs = [to_tensor(transform(image=each)["image"]) for each in pixels]
    enough = inputs * -(-sum(BATCHES) // len(inputs))  # few images are shown several times
    return Trial(torch.stack(enough), source)


def record(adapter: Adapter) -> ExportedProgram:
    """Return the graph of an adapter's segmenter, for batches of any size; freezes the segmenter.

    Raises:
        ValueError: PyTorch cannot follow what its fine-tuning method computes.
    """
    segmenter, size = adapter.segmenter.eval().requires_grad_(False), adapter.resize.image_size
    images = torch.zeros(TRACED, 3, size, size)
    try:
        with torch.no_grad(), quiet():
            return torch.export.export(segmenter, (images,), dynamic_shapes=({0: Dim(BATCH, min=1)},))
    except Exception as error:  # of many kinds, none of which says what to do
        raise refused("torch", adapter, error) from error


def refused(form: str, adapter: Adapter, error: Exception) -> ValueError:
    """Return the error of a segmenter that cannot be brought into a form."""
    reason = " ".join(str(error).split())[:200]
    return ValueError(
        f"format={form} cannot hold what {method_of(adapter)} computes ({reason}); use format=adapter, which "
        "convlora.adapter.load reads"
    )


def method_of(adapter: Adapter) -> str:
    """Return the name of the fine-tuning method that an adapter was trained with."""
    return str(json.loads(adapter.metadata["config"])["peft"]["_target_"]).rpartition(".")[2]


@torch.no_grad()
def compare(form: str, segmenter: Segmenter, run: Callable[[Tensor], Tensor], trial: Trial) -> float:
    """Return by how much the logits of another form differ at most.

    Raises:
        ValueError: by more than 1e-4, or by more than 1e-5 of logits beyond 10, or they are no numbers.
    """
    pairs = [(run(batch), segmenter(batch)) for batch in trial.batches()]
    difference = float(torch.stack([(found - right).abs().max() for found, right in pairs]).max())
    largest = float(torch.stack([right.abs().max() for _, right in pairs]).max())
    bound = max(BOUND, RELATIVE * largest)
    if not difference <= bound:
        raise ValueError(
            f"format={form} differs from PyTorch by {difference:.1e} in the logits of {trial.source}, more "
            f"than {bound:.1e}, and was not written; use another format"
        )
    return difference


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what PyTorch says of its own workings from the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
