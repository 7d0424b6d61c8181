"""Images of any size to predictions."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import albumentations as A
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from convlora.data.images import read_image
from convlora.data.samples import to_tensor
from convlora.data.transforms import Resize, eval_transform
from convlora.segmenter import Segmenter, restore_size, to_prediction

Pixels = NDArray[np.uint8]


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

    Attributes:
        transform: makes the network's input of an image.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        resize: Resize,
        class_colors: dict[str, list[int]],
        context: Callable[[], AbstractContextManager[object]],
    ):
        self.segmenter = segmenter
        self.resize = resize
        self.class_colors = class_colors
        self.context = context
        self.transform: A.Compose = eval_transform(resize)

    def predict(self, image: str | Path | Image.Image | Pixels) -> Found:
        """Segment one image.

        Args:
            image: a file, a Pillow image, or RGB pixels [h, w, 3] uint8.

        Returns:
            The prediction at the image's own size.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file cannot be decoded, or the pixels are no RGB image.
        """
        if isinstance(image, str | Path):
            pixels = read_image(Path(image))
        else:
            pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
            raise ValueError(
                f"the image is {pixels.dtype} {list(pixels.shape)}, but pixels are uint8 [h, w, 3], RGB; "
                "convert it, or give a file"
            )
        return self.segment([self.prepare(pixels)], [(pixels.shape[0], pixels.shape[1])])[0]

    def prepare(self, pixels: Pixels) -> Tensor:
        """Return RGB pixels [h, w, 3] as the network takes them [3, s, s]."""
        return to_tensor(self.transform(image=pixels)["image"])

    def segment(self, inputs: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Found]:
        """Segment a batch.

        Args:
            inputs: what `prepare` made of the images.
            sizes: height and width of the images, px.

        Returns:
            What is found in each image, at its own size.
        """
        if not inputs:
            return []
        training, device = self.segmenter.training, self.segmenter.dense_prompt.device
        images = torch.stack(list(inputs))
        if device.type == "cuda":
            images = images.pin_memory()
        self.segmenter.eval()
        with torch.inference_mode(), self.context():
            logits = self.segmenter(images.to(device, non_blocking=True))
        self.segmenter.train(training)
        found = (
            to_prediction(restore_size(logit, self.resize.content(*size), size))
            for logit, size in zip(logits, sizes, strict=True)
        )
        return [Found(classes.cpu().numpy(), prob.cpu().numpy()) for classes, prob in found]
