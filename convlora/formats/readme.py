"""What stands beside an exported model: how to feed it, and what was measured of it."""

import json
from dataclasses import dataclass

from convlora.adapter import Adapter
from convlora.data.transforms import IMAGENET_MEAN, IMAGENET_STD, LongestSideResize
from convlora.formats.graph import BATCH, INPUT, OUTPUT, method_of


@dataclass(frozen=True)
class Form:
    """A form of the segmenter, in the words of its README.

    Attributes:
        file: its name.
        kind: what it is.
        imports: of the snippet.
        opening: line that opens the file as `model`.
        call: expression that gives the logits [c, s, s] of the input `x` [3, s, s].
        needs: packages of the snippet.
    """

    file: str
    kind: str
    imports: str
    opening: str
    call: str
    needs: str


def facts(adapter: Adapter, difference: float, source: str) -> dict[str, str]:
    """Return what a program has to know of a model, by name."""
    return {
        "class_names": json.dumps(list(adapter.class_colors)),
        "class_colors": json.dumps(list(adapter.class_colors.values())),
        "image_size": str(adapter.resize.image_size),
        "resize": type(adapter.resize).__name__,
        "mean": json.dumps(IMAGENET_MEAN),
        "std": json.dumps(IMAGENET_STD),
        "base": adapter.metadata["base"],
        "base_sha256": adapter.metadata["base_sha256"],
        "method": method_of(adapter),
        **({} if adapter.bands is None else {"bands": adapter.bands.to_json()}),
        "trained_in": adapter.metadata["precision"],
        "largest_difference": f"{difference:.2e}",
        "compared_on": source,
    }


def readme(adapter: Adapter, form: Form, difference: float, source: str) -> str:
    """Return the README of an exported model, with a snippet that segments an image."""
    size, names = adapter.resize.image_size, list(adapter.class_colors)
    least = min(-mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True))
    most = max((1 - mean) / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True))
    several = len(names) > 1
    meaning = "the class of the greatest is found" if several else f"{names[0]} where at least 0"
    rows = "\n".join(f"| {index} | {name} | {adapter.class_colors[name]} |" for index, name in _ids(names))
    if isinstance(adapter.resize, LongestSideResize):
        resizing = (
            f"scaled so that the longest side is {size}, normalised, then padded right and below with zeros"
        )
    else:
        resizing = f"stretched to {size} x {size}, which loses its aspect ratio, and normalised"
    precision = adapter.metadata["precision"]
    rounding = (
        ""
        if precision.startswith("32")
        else f" It was trained in {precision}, which rounds differently: masks of that differ in some pixels."
    )
    values = (
        f"RGB from 0 to 1, less {IMAGENET_MEAN}, divided by {IMAGENET_STD}: from {least:.2f} to {most:.2f}"
    )
    photo, needs, read = "photo.jpg", form.needs, ""
    if adapter.bands is not None:
        photo, needs = "scene.tif", f"rasterio, {form.needs}"
        read = f" RGB are the bands {adapter.bands}, of a file of bands counted from 1, as 0 to 255."
    return f"""# {", ".join(names)}: a segmenter without prompts

{form.kind} in float32, `{form.file}`: {adapter.metadata["base"]}, fine-tuned by convlora with
{method_of(adapter)}, all of whose parts are inside.{rounding}

| | name | shape | values |
|---|---|---|---|
| input | `{INPUT}` | [{BATCH}, 3, {size}, {size}], float32 | {values} |
| output | `{OUTPUT}` | [{BATCH}, {len(names)}, {size}, {size}], float32 | logits; {meaning} |

`{BATCH}` is any number of images.{read} An image is {resizing};
bicubic with antialiasing, as Pillow does. The part of the logits that the image fills is brought back to the
image's own size, bilinear without antialiasing, before the decision.

| id | class | RGB |
|---|---|---|
{rows}

Largest difference of the logits from PyTorch's: {difference:.1e}, on {source} in batches of
several sizes.

The mask of `{photo}`, with {needs} (`mask.png` holds {"class ids" if several else "0 and 255"}):

```python
{snippet(adapter, form)}
```
"""


def _ids(names: list[str]) -> list[tuple[int, str]]:
    return list(enumerate(names)) if len(names) > 1 else [(1, names[0])]


def opening(adapter: Adapter) -> tuple[str, str]:
    """Return the import and the lines that open an image as `image`, Pillow's."""
    bands = adapter.bands
    if bands is None:
        return (
            "from PIL import Image, ImageOps",
            'image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")',
        )
    low, high = ([pair[end] for pair in bands.ranges] for end in (0, 1))
    return (
        "import rasterio\nfrom PIL import Image",
        f"""values = rasterio.open("scene.tif").read({list(bands.channels)}, masked=True).astype(float)
values = values.filled(np.nan).transpose(1, 2, 0)  # no data is black
pixels = np.clip((values - {low}) / np.subtract({high}, {low}) * 255, 0, 255)
image = Image.fromarray(np.rint(np.nan_to_num(pixels)).astype(np.uint8))""",
    )


def snippet(adapter: Adapter, form: Form) -> str:
    """Return code that segments an image by an exported model."""
    size, several = adapter.resize.image_size, len(adapter.class_colors) > 1
    if isinstance(adapter.resize, LongestSideResize):
        filled = (
            f"w, h = (max(1, round(side * {size} / max(image.size))) for side in image.size)"
            "  # the part that the image fills"
        )
        pad = f"\nx = np.pad(x, ((0, 0), (0, {size} - h), (0, {size} - w)))"
    else:
        filled, pad = f"w, h = {size}, {size}", ""
    mask = "logits.argmax(axis=0).astype(np.uint8)" if several else "(logits[0] >= 0).astype(np.uint8) * 255"
    imports, opened = opening(adapter)
    return f"""{form.imports}
import numpy as np
{imports}

{form.opening}
{opened}
{filled}
x = np.asarray(image.resize((w, h), Image.Resampling.BICUBIC), np.float32) / 255
x = ((x - np.float32({IMAGENET_MEAN})) / np.float32({IMAGENET_STD})).transpose(2, 0, 1){pad}
logits = {form.call}[:, :h, :w]

def bilinear(to, n):  # the matrix that brings an axis of n points to another number
    at = np.clip((np.arange(to) + 0.5) * n / to - 0.5, 0, n - 1)
    return np.maximum(0, 1 - abs(at[:, None] - np.arange(n))).astype(np.float32)

logits = bilinear(image.height, h) @ logits @ bilinear(image.width, w).T
mask = {mask}
Image.fromarray(mask).save("mask.png")"""
