"""Boxes and points that say which object of an image is meant, as segment-anything takes them.

A box is (x, y) of its first and of its last pixel, a point that of its pixel; pixels are counted from 0, in
the image as it is seen upright (EXIF). They go to the network's input as the resize takes pixels there, by
their centres. segment-anything's `apply_coords` multiplies by the scale alone, so that a prompt lies
(1 - scale) / 2 px of the input further right and down there.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convlora import IGNORED

SHAKE = 0.1  # deviation of a trained box's corners, as a share of its side,
FURTHEST = 20 / 1024  # and at most as a share of the image's; as SAM was trained (appendix A)
KEYS = ("box", "points", "labels")


@dataclass(frozen=True)
class Prompts:
    """Which prompts a training mixes in, so that one adapter segments with and without them.

    Args:
        box: share of the steps in which each image comes with the box of one of its objects, and that object
            alone is to be found; 0 trains without prompts, as the paper does.
    """

    box: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.box < 1:
            raise ValueError(
                f"prompts.box={self.box} must be at least 0 and below 1, the share of the steps with boxes; "
                "without any step that has none the segmenter would not work alone"
            )


@dataclass(frozen=True)
class Prompt:
    """What tells one object of an image.

    Attributes:
        box: x and y of two corners, px; None where there are points alone.
        points: x and y of each, px.
        labels: 1 of a point in the object, 0 of one beside it.

    Raises:
        ValueError: it tells nothing, has another form, labels do not go with the points, or the box ends
            before it begins.
    """

    box: tuple[float, float, float, float] | None = None
    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.box is not None:
            object.__setattr__(
                self, "box", _numbers(self.box, 4, "the box must be [left, top, right, bottom]")
            )
        points, rule = _listed(self.points, "points"), "each of the points must be [x, y]"
        object.__setattr__(self, "points", tuple(_numbers(point, 2, rule) for point in points))
        object.__setattr__(self, "labels", _listed(self.labels, "labels"))
        if self.box is None and not self.points:
            raise ValueError("a prompt needs a box or points")
        if len(self.points) != len(self.labels) or any(label not in (0, 1) for label in self.labels):
            raise ValueError(
                f"{len(self.points)} points have the labels {list(self.labels)}, but each has one, 1 in the "
                "object and 0 beside it"
            )
        if self.box is not None and (self.box[0] > self.box[2] or self.box[1] > self.box[3]):
            raise ValueError(
                f"the box {list(self.box)} ends before it begins; write [left, top, right, bottom]"
            )

    def check(self, height: int, width: int, name: str) -> None:
        """Refuse a prompt that does not lie in an image; raises ValueError."""
        corners = [] if self.box is None else [self.box[:2], self.box[2:]]
        for x, y in [*corners, *self.points]:
            if not (0 <= x < width and 0 <= y < height):
                raise ValueError(
                    f"{name}: ({x:g}, {y:g}) lies outside the image of {width} x {height} pixels; prompts "
                    "are x and y in pixels of the image as it is seen upright, from 0"
                )


def _numbers(values: Any, count: int, rule: str) -> tuple[float, ...]:
    try:
        found = [float(value) for value in values if not isinstance(value, str | bool)]
        if len(found) == len(values) == count:
            return tuple(found)
    except (RuntimeError, TypeError, ValueError):  # of what is no number or, in torch's words, several
        pass
    raise ValueError(f"{rule}, {count} numbers, and not {_as_written(values)}")


def _listed(values: Any, name: str) -> tuple[Any, ...]:
    try:
        return tuple(values)
    except TypeError:
        raise ValueError(f"{name} must be a list, and not {_as_written(values)}") from None


def _as_written(value: Any) -> str:
    """Return a value as JSON has it, or in Python's words."""
    return json.dumps(value, default=repr)


def check_one_class(class_names: Collection[str]) -> None:
    """Refuse prompts for what tells several classes apart; raises ValueError."""
    if len(class_names) > 1:
        raise ValueError(
            f"prompts tell one object from the rest, the adapter {len(class_names)} classes apart "
            f"({', '.join(class_names)}); leave the prompts out"
        )


def read_prompts(path: Path) -> dict[str, list[Prompt]]:
    """Read a JSON file: the name of each image -> prompts, each with a box, or points and their labels.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON or of another form, tells an image twice, or has a prompt that no image
            could have.
    """
    example = '{"a.jpg": [{"box": [10, 20, 110, 90]}, {"points": [[50, 60]], "labels": [1]}]}'
    if not path.is_file():
        raise FileNotFoundError(f"prompts_file={path}: no such file; write {example}")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
        if not isinstance(content, dict):
            raise ValueError("what is in it must be {name of an image: its prompts}")
        prompts = {name: _prompts(name, told) for name, told in content.items()}
    except ValueError as error:
        raise ValueError(f"prompts_file={path} cannot be understood ({error}); write {example}") from error
    if not any(prompts.values()):
        raise ValueError(f"prompts_file={path} tells no prompt; write {example}")
    return prompts


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"'{key}' is there twice, join the two")
        content[key] = value
    return content


def _prompts(name: str, content: Any) -> list[Prompt]:
    try:
        if not isinstance(content, list):
            raise ValueError(f"the prompts of an image must be a list, and not {_as_written(content)}")
        return [_prompt(each) for each in content]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _prompt(content: Any) -> Prompt:
    if not isinstance(content, dict):
        raise ValueError(
            f'a prompt must be {{"box": ...}} or {{"points": ...}}, and not {_as_written(content)}'
        )
    unknown = [key for key in content if key not in KEYS]
    if unknown:
        raise ValueError(f"unknown key '{unknown[0]}', a prompt has {', '.join(KEYS)}")
    points = _listed(content.get("points", ()), "points")
    return Prompt(content.get("box"), points, content.get("labels", [1] * len(points)))


def component_boxes(mask: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the box [k, 4] of each connected part of the foreground of a mask [h, w], px."""
    _, _, stats, _ = cv2.connectedComponentsWithStats((mask == 1).astype(np.uint8), connectivity=8)
    left, top, width, height = stats[1:, :4].T  # the first is the background
    return np.stack([left, top, left + width - 1, top + height - 1], axis=1).astype(np.float32)


def draw_boxes(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Choose an object in each mask, one of its connected parts, by torch's random numbers.

    Args:
        masks: class ids [n, 1, s, s], uint8.

    Returns:
        Its box [n, 4], shaken, and masks of it alone. Where there is no foreground the box is drawn anywhere
        in the image: nobody gives one of the whole input, padding included, and it would be learnt as the
        sign that there is nothing to find.
    """
    side, boxes, targets = masks.shape[-1], [], []
    for mask in masks[:, 0].cpu().numpy():
        count, parts = cv2.connectedComponents((mask == 1).astype(np.uint8), connectivity=8)
        target = mask.copy()
        if count > 1:
            chosen = 1 + int(torch.randint(count - 1, ()))
            target[(mask == 1) & (parts != chosen)] = 0
            [box] = component_boxes(target)
        else:
            seen = mask != IGNORED
            places = np.argwhere(seen if seen.any() else ~seen)[:, ::-1]
            corners = places[torch.randint(len(places), (2,)).numpy()].astype(np.float32)
            box = np.concatenate([corners.min(axis=0), corners.max(axis=0)])
        boxes.append(torch.from_numpy(box))
        targets.append(torch.from_numpy(target))
    return shake(torch.stack(boxes), side).to(masks.device), torch.stack(targets)[:, None].to(masks.device)


def shake(boxes: Tensor, side: int) -> Tensor:
    """Move the corners of boxes [n, 4] at random, as SAM was trained, within an image of that side."""
    size = (boxes[:, 2:] - boxes[:, :2] + 1).repeat(1, 2)
    furthest = FURTHEST * side
    moved = boxes + (torch.randn(boxes.shape) * SHAKE * size).clamp(-furthest, furthest)
    moved = moved.clamp(0, side - 1)
    return torch.cat(
        [torch.minimum(moved[:, :2], moved[:, 2:]), torch.maximum(moved[:, :2], moved[:, 2:])], 1
    )


def to_input(xy: Tensor, size: tuple[int, int], content: tuple[int, int]) -> Tensor:
    """Bring x and y [..., 2] from pixels of an image to those of the network's input.

    Args:
        xy: in the image.
        size: its height and width.
        content: height and width that it fills of the input.
    """
    scale = torch.tensor([content[1] / size[1], content[0] / size[0]])
    return (xy + 0.5) * scale - 0.5


def box_to_input(boxes: Tensor, size: tuple[int, int], content: tuple[int, int]) -> Tensor:
    """Bring boxes [n, 4] to pixels of the network's input, as `to_input` does points."""
    return to_input(boxes.view(-1, 2, 2), size, content).view(-1, 4)


def by_image(
    prompts: Mapping[str, Sequence[Prompt]], names: Mapping[Path, str], source: Path
) -> dict[Path, Sequence[Prompt]]:
    """Return the prompts of each image.

    Args:
        prompts: by the image's path in the folder, or its name where that is enough.
        names: path of each image -> its path in the folder, with the ending.
        source: the file of the prompts, for messages.

    Raises:
        ValueError: a name is that of no image, or of several, or two are of one image.
    """
    in_folder = {known: path for path, known in names.items()}
    called: dict[str, list[Path]] = defaultdict(list)
    for path, known in names.items():
        called[Path(known).name].append(path)
    found: dict[Path, Sequence[Prompt]] = {}
    told: dict[Path, str] = {}
    for name, wanted in prompts.items():
        fitting = [in_folder[name]] if name in in_folder else called.get(name, [])
        if len(fitting) != 1:
            count = "no image" if not fitting else f"{len(fitting)} images"
            raise ValueError(
                f"prompts_file={source}: {count} of the input {'is' if len(fitting) < 2 else 'are'} called "
                f"{name}; write its path in the folder"
            )
        [path] = fitting
        if path in told:
            raise ValueError(
                f"prompts_file={source}: {told[path]} and {name} are one image; join their prompts under "
                f"{names[path]}"
            )
        told[path], found[path] = name, wanted
    return found
