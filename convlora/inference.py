"""Images of any size to predictions."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, overload

import albumentations as A
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn

from convlora.cleaning import Cleaning
from convlora.data.bands import Bands
from convlora.data.images import allow_large_images, read_image, to_rgb
from convlora.data.samples import to_tensor
from convlora.data.transforms import NativeSize, Resize, eval_transform
from convlora.prompts import Prompt, box_to_input, check_one_class, to_input
from convlora.segmenter import Segmenter, restore_size, to_prediction
from convlora.tiles import Grid, Tiling, choose_tiling

Pixels = NDArray[np.uint8]
One = str | Path | Image.Image | NDArray[Any]


class Found(NamedTuple):
    """What is found in an image.

    Attributes:
        classes: ids [h, w]; of a foreground alone 0 and 1.
        prob: 8-bit probability [h, w], of the foreground or, of several classes, of the one found.
    """

    classes: Pixels
    prob: Pixels


class Predictor:
    """A trained segmenter with all that it needs to be shown images as they are.

    Args:
        segmenter: on the device on which it computes.
        resize: with which it was trained.
        class_colors: name -> RGB colour of each class, in the order of their ids.
        context: makes the context of the precision in which it computes.
        bands: how image files are read; None reads plain images.
        median_side: of the longer sides of the images trained on, px; None where it is not known.
        cleaning: of the masks that are found.

    Attributes:
        prepare: makes the network's input [3, s, s] of RGB pixels [h, w, 3]; holds nothing of the model.
    """

    def __init__(
        self,
        segmenter: "Segmenter | TiledSegmenter",
        resize: Resize,
        class_colors: dict[str, list[int]],
        context: Callable[[], AbstractContextManager[object]],
        bands: Bands | None = None,
        median_side: int | None = None,
        cleaning: Cleaning = Cleaning(),  # noqa: B008, frozen
    ):
        self.segmenter = segmenter
        self.resize = resize
        self.class_colors = class_colors
        self.context = context
        self.bands = bands
        self.median_side = median_side
        self.cleaning = cleaning
        self.prepare: Callable[[Pixels], Tensor] = partial(as_input, eval_transform(resize))

    @overload
    def predict(self, images: str | Path | Image.Image, batch_size: int = 4) -> Found: ...
    @overload
    def predict(self, images: list[One] | tuple[One, ...], batch_size: int = 4) -> list[Found]: ...
    @overload
    def predict(self, images: NDArray[Any], batch_size: int = 4) -> Any: ...

    def predict(self, images: Any, batch_size: int = 4) -> Any:
        """Segment an image or several.

        Args:
            images: a file, a Pillow image, or RGB pixels [h, w, 3] uint8; or a list of such, of any sizes; or
                pixels [n, h, w, 3]. Where `bands` are read, pixels are what a file holds: [h, w, bands] of
                its type.
            batch_size: how many are read and segmented at a time.

        Returns:
            The prediction at the image's own size; of several a list of them.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a file cannot be decoded, the pixels are no RGB image, or what `Bands.check` refuses.
        """
        if isinstance(images, str | Path | Image.Image) or (
            isinstance(images, np.ndarray) and images.ndim != 4
        ):
            return self._segment([images])[0]
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        left: Iterator[One] = iter(images)
        found: list[Found] = []
        while batch := list(islice(left, batch_size)):
            found += self._segment(batch)
        return found

    def _segment(self, images: Sequence[One]) -> list[Found]:
        pixels = [self.read(image) for image in images]
        return self.segment([self.prepare(each) for each in pixels], [each.shape[:2] for each in pixels])

    def read(self, image: One) -> Pixels:
        """Return an image as RGB pixels [h, w, 3]; arguments and errors as of `predict`."""
        if isinstance(image, str | Path):
            return read_image(Path(image), self.bands)
        if isinstance(image, Image.Image) and self.bands is None:
            return to_rgb(ImageOps.exif_transpose(image), "the image")
        pixels = np.asarray(image)
        if self.bands is not None:
            if pixels.ndim != 3:
                raise ValueError(
                    f"the image is {list(pixels.shape)}, but pixels are [h, w, bands]; reshape it"
                )
            count = pixels.shape[2]
            self.bands.check(count, [str(pixels.dtype)] * count, "the image")
            chosen = [number - 1 for number in self.bands.channels]
            return self.bands.to_rgb(pixels[..., chosen].transpose(2, 0, 1))
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
            raise ValueError(
                f"the image is {pixels.dtype} {list(pixels.shape)}, but pixels are uint8 [h, w, 3], RGB; "
                "convert it, or give a file"
            )
        return pixels

    def tiled(self, tile: int | None = None, overlap: float = 0.25, batch_size: int = 4) -> "Predictor":
        """Return a predictor on the same model that cuts images into windows, for large photographs.

        Args:
            tile: side of a window, px; None takes the median side of the images trained on.
            overlap: of neighbouring windows, at least, as a share of the side.
            batch_size: windows at a time.

        Raises:
            ValueError: no side is known, a number is impossible, or this one cuts images already.
        """
        if isinstance(self.segmenter, TiledSegmenter):
            raise ValueError("this predictor cuts images already; call tiled of the one that load returned")
        tiling = choose_tiling(tile, overlap, self.median_side, "the adapter")
        allow_large_images()
        segmenter = TiledSegmenter(self.segmenter, self.resize, tiling, batch_size)
        colors, bands, side = self.class_colors, self.bands, self.median_side
        return Predictor(segmenter, NativeSize(), colors, self.context, bands, side, self.cleaning)

    def prompt(self, image: One, prompts: Sequence[Prompt]) -> list[Found]:
        """Segment the objects of one image that prompts tell, one by one.

        Args:
            image: as of `predict`.
            prompts: a box, or points, in pixels of the image as it is seen upright, for each object.

        Raises:
            FileNotFoundError: there is no such file.
            TypeError: `prompts` is no list of prompts.
            ValueError: what `predict` raises, a prompt lies outside the image, or there are several classes.
        """
        check_one_class(self.class_colors)
        if isinstance(prompts, Prompt) or not all(isinstance(each, Prompt) for each in prompts):
            raise TypeError(f"prompts={prompts} must be a list of Prompt, as [Prompt(box=(10, 20, 110, 90))]")
        segmenter, pixels = self._whole, self.read(image)
        size = pixels.shape[0], pixels.shape[1]
        name = str(image) if isinstance(image, str | Path) else "the image"
        content, device = self.resize.content(*size), segmenter.dense_prompt.device
        for each in prompts:
            each.check(*size, name)
        with self._computing():
            tokens = [embed(segmenter, each, size, content, device) for each in prompts]
            [objects] = segmenter.prompted(self.prepare(pixels)[None].to(device), [tokens])
            return [to_found(restore_size(each, content, size), self.cleaning) for each in objects]

    def united(self, pixels: Tensor, size: tuple[int, int], prompts: Sequence[Tensor]) -> Found:
        """Return what is found of all objects of one image together.

        Args:
            pixels: what `prepare` made of it.
            size: its height and width, px.
            prompts: tokens of each object, as `Segmenter.embed` gives them.
        """
        segmenter = self._whole
        with self._computing():
            [logits] = segmenter.united(pixels[None].to(segmenter.dense_prompt.device), [prompts])
            return to_found(restore_size(logits, self.resize.content(*size), size), self.cleaning)

    @property
    def _whole(self) -> Segmenter:
        if isinstance(self.segmenter, TiledSegmenter):
            raise ValueError("prompts are for whole images, and this predictor cuts them; leave tiles out")
        return self.segmenter

    def segment(self, inputs: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Found]:
        """Segment a batch.

        Args:
            inputs: what `prepare` made of the images.
            sizes: height and width of the images, px.

        Returns:
            What is found in each image, at its own size.
        """
        return [to_found(logits, self.cleaning) for logits in self.logits(inputs, sizes)]

    def logits(self, inputs: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Return the logits [c, h, w] of each image of a batch at its own size; arguments as of `segment`."""
        if not inputs:
            return []
        device, images = self.segmenter.dense_prompt.device, torch.stack(list(inputs))
        if device.type == "cuda":
            images = images.pin_memory()
        with self._computing():
            logits = self.segmenter(images.to(device, non_blocking=True))
        return [
            restore_size(logit, self.resize.content(*size), size)
            for logit, size in zip(logits, sizes, strict=True)
        ]

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Have the segmenter compute in its precision, without gradients, and leave its mode as it was."""
        training = self.segmenter.training
        self.segmenter.eval()
        try:
            with torch.inference_mode(), self.context():
                yield
        finally:
            self.segmenter.train(training)


def as_input(transform: A.Compose, pixels: Pixels) -> Tensor:
    """Return RGB pixels [h, w, 3] as the network takes them [3, s, s]."""
    return to_tensor(transform(image=pixels)["image"])


def to_found(logits: Tensor, cleaning: Cleaning) -> Found:
    """Return what logits [c, h, w] say, cleaned."""
    classes, prob = to_prediction(logits)
    return Found(*cleaning(classes.cpu().numpy(), prob.cpu().numpy()))


def embed(
    segmenter: Segmenter,
    prompt: Prompt,
    size: tuple[int, int],
    content: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """Return the tokens [1, p, c] of a prompt in an image of that size; `content` as of `Resize`."""
    box = points = labels = None
    if prompt.box is not None:
        box = box_to_input(torch.tensor([prompt.box]), size, content)[None].to(device)
    if prompt.points:
        points = to_input(torch.tensor(prompt.points), size, content)[None].to(device)
        labels = torch.tensor([prompt.labels], device=device)
    return segmenter.embed(box, points, labels)


class TiledSegmenter(nn.Module):
    """A segmenter of images at their own size, which it cuts into windows; for scores and single photographs.

    It stands where a segmenter does, with `NativeSize` in the place of the resize.

    Args:
        segmenter: of windows.
        resize: of windows to the segmenter's input.
        tiling: how images are cut.
        batch_size: windows at a time.
    """

    def __init__(self, segmenter: Segmenter, resize: Resize, tiling: Tiling, batch_size: int):
        super().__init__()
        self.segmenter = segmenter
        self.training = segmenter.training  # else to go back to it would switch the segmenter's
        self.tiling = tiling
        self.batch_size = batch_size
        self.windows = Predictor(segmenter, resize, {}, nullcontext)

    @property
    def dense_prompt(self) -> Tensor:
        """A tensor on the device on which it computes."""
        return self.segmenter.dense_prompt

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [n, c, h, w] of RGB images [n, 3, h, w] uint8."""
        return self.outputs(images)

    def outputs(self, images: Tensor) -> Tensor:
        """Return what `forward` does."""
        pixels = images.permute(0, 2, 3, 1).cpu().numpy()
        return torch.stack([self._blended(image) for image in pixels])

    def logits(self, outputs: Tensor) -> Tensor:
        """Return the outputs, which are logits."""
        return outputs

    def _blended(self, pixels: Pixels) -> Tensor:
        grid = Grid(len(pixels), pixels.shape[1], self.tiling)
        tiles = self._tiles(pixels, grid)
        first = next(tiles)
        store = first.new_zeros(len(first), grid.size[0], grid.width)
        rows = [rows.clone() for _, rows in grid.blend(chain([first], tiles), store)]
        return torch.cat(rows, dim=1)

    def _tiles(self, pixels: Pixels, grid: Grid) -> Iterator[Tensor]:
        height, width = grid.size
        for start in range(0, len(grid.windows), self.batch_size):
            few = grid.windows[start : start + self.batch_size]
            seen = [grid.padded(pixels[top : top + height, left : left + width]) for top, left, *_ in few]
            inputs = [self.windows.prepare(window) for window in seen]
            for logits in self.windows.logits(inputs, [(len(each), each.shape[1]) for each in seen]):
                yield logits[:, :height, :width]
