"""What a training starts from: an adapter that was trained before, on other images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from convlora import adapter
from convlora.build import Parts
from convlora.sam.checkpoints import mismatches
from convlora.segmenter import Segmenter
from convlora.task import check_agreement

# Parts of a mask decoder that know nothing of classes; all others start anew where classes differ.
CLASS_FREE = ("transformer", "iou_token", "output_upscaling")
# Of a backbone, what leaves the weights as they are, or is checked by their hash
OPEN = ("weights", "url", "image_size", "frozen_dtype", "activation_checkpointing")
SIZED = ("image_size",)  # of these, what the shapes of an encoder that is trained itself follow from
WITHOUT = "or train without init"


@dataclass(frozen=True)
class Origin:
    """An adapter, and what a training takes of it.

    Attributes:
        path: of the file.
        sha256: of tensors and metadata, the adapter's `identity`.
        metadata: of the file.
        taken: tensors that the training starts from, by name.
        told: the same in words, with what starts anew.
    """

    path: Path
    sha256: str
    metadata: Mapping[str, str]
    taken: Mapping[str, Tensor]
    told: str

    def give(self, segmenter: Segmenter, identity: Mapping[str, str]) -> None:
        """Load what is taken.

        Args:
            segmenter: that is about to be trained.
            identity: name and SHA-256 of its base weights.

        Raises:
            ValueError: the adapter is of other base weights.
        """
        way_out = f"{adapter.WAY_OUT}, {WITHOUT}"
        check_agreement(f"adapter {self.path}", self.metadata, identity, way_out)
        segmenter.load_state_dict(dict(self.taken), strict=False)


def read_origin(init: str, parts: Parts) -> Origin:
    """Read the adapter that a training starts from, and find out what the training can take of it.

    All that is trained in the encoder has to fit. Of the mask decoder it is what has the same name and shape
    and, where classes or the kind of head differ, belongs to no class. A single class is the foreground,
    whatever its name.

    Args:
        init: a run's folder, or an adapter file.
        parts: of the training.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no adapter, or one of another backbone, method, size of it, or bands.
    """
    given = f"init={init}"
    if not init:
        raise ValueError(
            "init= names no adapter; set init=RUN, the folder of a training run, or leave it out"
        )
    try:
        file = adapter.open_file(init, None, None)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{given}: {error}") from error
    channels, wanted = None if file.bands is None else file.bands.channels, parts.data.loading.channels
    if _plain(channels) != _plain(wanted):
        shown = "null" if channels is None else f"[{','.join(map(str, channels))}]"
        raise ValueError(f"{given} was trained with loading.channels={shown}; set that, {WITHOUT}")
    of_backbone = _compare("model", file.backbone, parts.backbone)
    if others := [each for each in of_backbone if not _is_among(each, OPEN)]:
        raise ValueError(f"{given} is of another backbone: {'; '.join(others)}; set what it was, {WITHOUT}")
    expected = parts.outline.trainable_state()
    in_encoder = [{n: t for n, t in s.items() if not _is_head(n)} for s in (file.state, expected)]
    others = _compare("peft", file.method, parts.method)
    if problems := mismatches(*in_encoder):
        others += [each for each in of_backbone if _is_among(each, SIZED)]
        raise ValueError(f"{given} does not fit, {problems}: {'; '.join(others)}; set what it was, {WITHOUT}")
    sized = [each for each in of_backbone if _is_among(each, SIZED)]
    if sized and file.backbone.is_random and parts.backbone.is_random:
        raise ValueError(
            f"{given} is of other random weights, which follow from the size: {'; '.join(sized)}; set what "
            f"it was, {WITHOUT}"
        )
    others += _compare("head", file.head, parts.head)
    before, now = list(file.class_colors), list(parts.data.class_names)
    same_classes = len(before) == len(now) == 1 or before == now
    is_same = same_classes and type(file.head) is type(parts.head)
    taken = {
        name: tensor
        for name, tensor in file.state.items()
        if name in expected
        and tensor.shape == expected[name].shape
        and (is_same or not _is_head(name) or name.split(".")[1] in CLASS_FREE)
    }
    told = [f"{len(taken)} of {len(expected)} trained tensors from {file.path}"]
    if anew := sorted({".".join(name.split(".")[:2]) for name in expected.keys() - taken.keys()}):
        why = "" if same_classes else f", since its classes are {', '.join(before)}"
        told.append(f"{', '.join(anew)} start anew{why}")
    if others:
        told.append(f"differing: {'; '.join(others)}")
    return Origin(file.path, file.identity, file.metadata, taken, "; ".join(told))


def _is_head(name: str) -> bool:
    return name.startswith("mask_decoder.")


def _is_among(difference: str, settings: Sequence[str]) -> bool:
    return difference.split()[0].removeprefix("model.") in settings


def _compare(name: str, was: Any, now: Any) -> list[str]:
    """Say in which settings two recipes differ."""
    if is_dataclass(was) and type(was) is type(now):
        own = [each.name for each in fields(was)]
        return [
            difference
            for key in own
            for difference in _compare(f"{name}.{key}", getattr(was, key), getattr(now, key))
        ]
    return [] if _plain(was) == _plain(now) else [f"{name} was {_plain(was)}, is {_plain(now)}"]


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return type(value).__name__
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
