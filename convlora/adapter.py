"""The file that users keep: trained tensors with all that is needed to use them again."""

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path

import torch
from hydra.utils import get_object
from lightning import Fabric
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from convlora.build import (
    check_precision,
    is_half,
    make_segmenter,
    say_precision,
    settings_of,
)
from convlora.data.bands import Bands
from convlora.data.transforms import Resize
from convlora.fetch import fetch_from_hub
from convlora.heads import Head
from convlora.inference import Predictor
from convlora.peft.method import Method
from convlora.run import BEST, in_shell
from convlora.sam.shared import SharedSam, architecture, share_backbone
from convlora.sam.zoo import Backbone
from convlora.schema import Config, make
from convlora.segmenter import Segmenter
from convlora.task import check_agreement

log = logging.getLogger(__name__)

# A key that is absent means what it meant before it existed, so that later versions add keys.
FORMAT = "convlora-adapter-3"
NAME = "adapter.safetensors"
THRESHOLD = ("threshold", "threshold_by")  # keys that `keep_threshold` writes
WAY_OUT = "set model.weights=PATH to the weights it was trained on"
# Of the hub, USER/REPO@REVISION, and no file's name
REPOSITORY = re.compile(r"(\w[\w.-]*/\w[\w.-]*?(?<!\.safetensors)(?<!\.ckpt))(?:@([\w./-]+))?")
# What an adapter file may ask to be built: its config comes from whoever made the file.
PACKAGES = {
    "model": "convlora.sam.",
    "peft": "convlora.peft.",
    "head": "convlora.heads.",
    "resize": "convlora.data.transforms.",
}


@dataclass(frozen=True)
class Adapter:
    """What an adapter file describes.

    Attributes:
        segmenter: with the trained tensors loaded.
        resize: with which it was trained.
        class_colors: name -> RGB colour of each class, in the order of their ids.
        precision: to compute in, in Lightning's words.
        metadata: of the file.
        bands: how image files are read; None reads plain images.
    """

    segmenter: Segmenter
    resize: Resize
    class_colors: dict[str, list[int]]
    precision: str
    metadata: Mapping[str, str]
    bands: Bands | None = None

    @property
    def median_side(self) -> int | None:
        """Of the longer sides of the images trained on, px; None where it is not known."""
        return _median_side(self.metadata)


def _median_side(metadata: Mapping[str, str]) -> int | None:
    side = metadata.get("median_side")
    return None if side is None else int(side)


def describe(
    config: Config,
    class_colors: Mapping[str, Sequence[int]],
    identity: Mapping[str, str],
    precision: str,
    median_side: int | None = None,
    bands: Bands | None = None,
) -> dict[str, str]:
    """Return what an adapter file says of itself.

    Args:
        config: it is trained with.
        class_colors: name -> RGB colour of each class, in the order of their ids.
        identity: name and SHA-256 of the base weights.
        precision: in which it is trained, in Lightning's words.
        median_side: of the longer sides of the images that it is trained on, px; None where it is not known.
        bands: how image files are read; None reads plain images.
    """
    return {
        "format": FORMAT,
        "config": json.dumps(config),
        "class_names": json.dumps(list(class_colors)),
        "class_colors": json.dumps([list(color) for color in class_colors.values()]),
        "precision": precision,
        **({} if median_side is None else {"median_side": str(median_side)}),
        **({} if bands is None else {"bands": bands.to_json()}),
        **identity,
    }


def save(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write trained tensors and what `describe` gave to one safetensors file."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(
        to_bytes(tensors, dict(metadata))
    )  # with the permissions of other files, unlike `save_file`
    new.replace(path)


def keep_threshold(checkpoint: str | Path, threshold: float, found_by: str) -> None:
    """Write a threshold into an adapter's file, which `threshold=tuned` then takes; all else in it stays.

    Args:
        checkpoint: as of `load`, and not of the hub.
        threshold: the least probability of foreground.
        found_by: what it was chosen by, in words.
    """
    file = open_file(checkpoint, None, None)
    kept = dict(zip(THRESHOLD, (str(threshold), found_by), strict=True))
    save(file.path, file.state, {**file.metadata, **kept})


def check_own(checkpoint: str | Path) -> None:
    """Refuse to write into a file that is the hub's; raises ValueError."""
    if named := _of_hub(checkpoint):
        repository, revision = named.groups()
        folder = repository.partition("/")[2]
        chosen = "" if revision is None else f" --revision {revision}"
        raise ValueError(
            f"checkpoint={checkpoint} is a file of the Hugging Face Hub, in which no threshold is kept; `hf "
            f"download {repository} {NAME}{chosen} --local-dir {folder}` copies it, then set "
            f"checkpoint={folder}"
        )


class LoadedPredictor(Predictor):
    """A predictor on a backbone that others may share.

    Args:
        file: what it is made of.
        base: the backbone.
        fabric: of the precision in which it computes.

    Attributes:
        metadata: of the adapter file.
    """

    def __init__(self, file: "File", base: SharedSam, fabric: Fabric):
        check_agreement(f"adapter {file.path}", file.metadata, base.identity, WAY_OUT)
        with torch.device(base.device):
            segmenter = Segmenter(base.take(), file.method, file.head, len(file.class_colors))
        segmenter.take_trainable_state(file.state)
        segmenter.to(base.device)
        side, colors = _median_side(file.metadata), file.class_colors
        super().__init__(segmenter.eval(), file.resize, colors, fabric.autocast, file.bands, side)
        self.base = base
        self.metadata = file.metadata

    def with_adapter(self, checkpoint: str | Path, precision: str | None = None) -> "LoadedPredictor":
        """Return a predictor of another adapter on the same backbone, which is in memory once.

        This one goes on as it is. Both have their own copy of what was trained, the mask decoder above all.

        Args:
            checkpoint: a run's folder, or an adapter file.
            precision: to compute in; None takes that of its training.

        Raises:
            FileNotFoundError: no such file.
            ValueError: what `read` refuses, or the adapter is of another base, image size or type of weights.
        """
        file = open_file(checkpoint, None, precision)
        way_out = f"open it beside this one by load({str(checkpoint)!r})"
        check_agreement(f"adapter {file.path}", file.metadata, self.base.identity, way_out)
        wanted, held = architecture(file.backbone), self.base.backbone
        differing = [
            f"model.{each.name}={getattr(wanted, each.name, None)} and not {getattr(held, each.name)}"
            for each in fields(held)
            if getattr(wanted, each.name, None) != getattr(held, each.name)
        ]
        if differing:
            raise ValueError(
                f"the adapter {file.path} needs {', '.join(differing)}, as the backbone in use has; {way_out}"
            )
        return LoadedPredictor(file, self.base, _fabric(str(self.base.device), file.precision))


def load(
    checkpoint: str | Path,
    weights: str | None = None,
    precision: str | None = None,
    device: str = "auto",
) -> LoadedPredictor:
    """Return a trained segmenter that takes images of any size: `load("RUN").predict("photo.jpg")`.

    A backbone that another predictor holds on the same device is shared with it and not read again.

    Args:
        checkpoint: a run's folder, an adapter file, or USER/REPO of the Hugging Face Hub.
        weights: base weights, where they lie elsewhere than at training.
        precision: to compute in; None takes that of the training.
        device: `auto`, a GPU where there is one, or `cpu`, `cuda`, `cuda:1`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what `read` refuses, or there is no such device or precision.
    """
    file = open_file(checkpoint, weights, precision)
    fabric = _fabric(device, file.precision)
    say_precision(file.precision, str(fabric._precision.precision), fabric.device)
    sha256 = file.metadata.get("base_sha256", "")
    try:
        base = share_backbone(file.backbone, sha256, fabric.device, weights is not None)
        return LoadedPredictor(file, base, fabric)
    except RuntimeError as error:  # of the device, mostly that its memory is full
        raise _unusable(device, file.precision, error) from error


def _fabric(device: str, precision: str) -> Fabric:
    """Return what knows a device and a precision; raises ValueError where there is no such one."""
    kind, _, index = device.partition(":")
    try:
        return Fabric(
            accelerator=kind,
            devices=[int(index)] if index else 1,
            precision=precision,  # type: ignore[arg-type]
        )
    except (RuntimeError, ValueError) as error:
        raise _unusable(device, precision, error) from error


def _unusable(device: str, precision: str, error: Exception) -> ValueError:
    reason = str(error).splitlines()[0]  # which says why: no such device, no driver
    return ValueError(
        f"device={device} or precision={precision} cannot be used ({reason}); use device=auto, cpu or cuda, "
        "and precision=32-true, bf16-mixed or 16-mixed"
    )


def say_prompts(name: str, metadata: Mapping[str, str]) -> None:
    """Warn of prompts for an adapter that was trained without; `metadata` is its file's."""
    if not json.loads(metadata["config"]).get("prompts", {}).get("box"):
        log.warning(
            f"{name} was trained without prompts (prompts.box=0), so that masks show what is left of SAM's "
            "own sense of them; train prompts.box=0.5 for both"
        )


def find(checkpoint: str | Path) -> Path:
    """Return the adapter file that a run's folder holds, or the file itself, or one of the Hugging Face Hub.

    Args:
        checkpoint: a path; or USER/REPO or USER/REPO@REVISION, where there is no folder USER.

    Raises:
        FileNotFoundError: there is none.
        OSError: the hub cannot be reached.
    """
    path = Path(checkpoint)
    if (path / NAME).is_file():
        return path / NAME
    if (path / BEST).is_file():
        raise FileNotFoundError(
            f"{path} has not ended and has no adapter yet; "
            f"`python -m convlora.export {in_shell('checkpoint', path)}` makes one of its best epoch so far"
        )
    if named := _of_hub(checkpoint):
        log.warning(f"{checkpoint}: no such folder, taken from the Hugging Face Hub")
        return fetch_from_hub(named[1], named[2], NAME)
    if not path.is_file():
        raise FileNotFoundError(f"no adapter at {path}; a training run leaves one, name its folder")
    return path


def _of_hub(checkpoint: str | Path) -> re.Match[str] | None:
    return None if Path(checkpoint).parent.exists() else REPOSITORY.fullmatch(str(checkpoint))


def read(checkpoint: str | Path, weights: str | None = None, precision: str | None = None) -> Adapter:
    """Rebuild the segmenter that an adapter file was saved from; arguments as of `load`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no adapter, damaged, asking for code outside the library or for an unknown download,
            or of other base weights.
    """
    file = open_file(checkpoint, weights, precision)
    segmenter, identity = make_segmenter(file.backbone, file.method, file.head, len(file.class_colors))
    check_agreement(f"adapter {file.path}", file.metadata, identity, WAY_OUT)
    segmenter.load_trainable_state(file.state)
    return Adapter(
        segmenter.eval(), file.resize, file.class_colors, file.precision, file.metadata, file.bands
    )


@dataclass(frozen=True)
class File:
    """What an adapter file holds, checked, before anything of it is built."""

    path: Path
    metadata: Mapping[str, str]
    state: dict[str, Tensor]
    backbone: Backbone
    method: Method
    head: Head
    resize: Resize
    class_colors: dict[str, list[int]]
    precision: str
    bands: Bands | None

    @property
    def identity(self) -> str:
        """SHA-256 of tensors and metadata, the same whether or not a threshold has been kept since."""
        described = {key: value for key, value in self.metadata.items() if key not in THRESHOLD}
        content = to_bytes(self.state) + json.dumps(described, sort_keys=True).encode()
        return hashlib.sha256(content).hexdigest()


def open_file(checkpoint: str | Path, weights: str | None, precision: str | None) -> File:
    """Read an adapter file, and build nothing of it; arguments and errors as of `read`."""
    path = find(checkpoint)
    if path.suffix == ".ckpt":
        made = f"`python -m convlora.export {in_shell('checkpoint', path.parent)}` makes one of it"
        raise ValueError(f"{path} is a checkpoint to go on from and no adapter; {made}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no adapter file or is damaged ({error}); use RUN/{NAME}, which a training leaves "
            "in its folder"
        ) from error
    if metadata.get("format") != FORMAT:
        found = metadata.get("format", "unmarked")
        raise ValueError(f"{path} is no {FORMAT} file but {found}; use an adapter that this version trained")
    try:
        bands = Bands.from_json(metadata["bands"]) if "bands" in metadata else None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; fetch it again, or train anew") from error
    config = json.loads(metadata["config"])
    precision = precision or metadata["precision"]
    check_precision("precision", precision)
    given = {"weights": weights, "frozen_dtype": None if is_half(precision) else "float32"}
    parts = {section: make(section, _trusted(path, section, config.get(section, {}))) for section in PACKAGES}
    backbone = replace(parts["model"], **{key: value for key, value in given.items() if value is not None})
    names, colors = json.loads(metadata["class_names"]), json.loads(metadata["class_colors"])
    classes = dict(zip(names, colors, strict=True))
    method, head, resize = parts["peft"], parts["head"], parts["resize"]
    return File(path, metadata, state, backbone, method, head, resize, classes, precision, bands)


@cache
def _known_urls() -> frozenset[str | None]:
    return frozenset(conf.get("url") for conf in settings_of("model"))


def _trusted(path: Path, section: str, config: Config) -> Config:
    """Return a section of an adapter's config if it can do no more than build what this library offers.

    Its target must be a class of the section's package, by its own name and not by way of another module, its
    arguments plain values or sections of the same kind, and its download one that conf/model/ knows.
    """
    target = str(config.get("_target_"))
    offered = target.startswith(PACKAGES[section])
    try:
        found = get_object(target) if offered else None
    except (ImportError, ValueError) as error:
        raise ValueError(f"{path} needs {target}, which this version lacks; update the library") from error
    if not isinstance(found, type) or f"{found.__module__}.{found.__qualname__}" != target:
        raise ValueError(f"{path} asks for {target}, which is no {section} of this library; it was not built")
    if config.get("url") is not None and config["url"] not in _known_urls():
        raise ValueError(f"{path} asks to download {config['url']}, which conf/model/ does not know")
    arguments = {}
    for key, value in config.items():
        if isinstance(value, dict) and "_target_" in value:
            value = _trusted(path, section, value)
        elif (key.startswith("_") and key != "_target_") or "_target_" in json.dumps(value):
            raise ValueError(f"{path} hides calls in its {section} section; it was not built")
        arguments[key] = value
    return arguments
