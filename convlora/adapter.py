"""The file that users keep: trained tensors with all that is needed to use them again."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
from convlora.data.transforms import Resize
from convlora.fetch import fetch_from_hub
from convlora.inference import Predictor
from convlora.run import BEST, in_shell
from convlora.schema import Config, make
from convlora.segmenter import Segmenter
from convlora.task import check_agreement

# A key that is absent means what it meant before it existed, so that later versions add keys.
FORMAT = "convlora-adapter-3"
NAME = "adapter.safetensors"
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
    """

    segmenter: Segmenter
    resize: Resize
    class_colors: dict[str, list[int]]
    precision: str
    metadata: Mapping[str, str]


def describe(
    config: Config,
    class_colors: Mapping[str, Sequence[int]],
    identity: Mapping[str, str],
    precision: str,
    median_side: int | None = None,
) -> dict[str, str]:
    """Return what an adapter file says of itself.

    Args:
        config: it is trained with.
        class_colors: name -> RGB colour of each class, in the order of their ids.
        identity: name and SHA-256 of the base weights.
        precision: in which it is trained, in Lightning's words.
        median_side: of the longer sides of the images that it is trained on, px; None where it is not known.
    """
    return {
        "format": FORMAT,
        "config": json.dumps(config),
        "class_names": json.dumps(list(class_colors)),
        "class_colors": json.dumps([list(color) for color in class_colors.values()]),
        "precision": precision,
        **({} if median_side is None else {"median_side": str(median_side)}),
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


def load(
    checkpoint: str | Path,
    weights: str | None = None,
    precision: str | None = None,
    device: str = "auto",
) -> Predictor:
    """Return a trained segmenter that takes images of any size: `load("RUN").predict("photo.jpg")`.

    Args:
        checkpoint: a run's folder, an adapter file, or USER/REPO of the Hugging Face Hub.
        weights: base weights, where they lie elsewhere than at training.
        precision: to compute in; None takes that of the training.
        device: `auto`, a GPU where there is one, or `cpu`, `cuda`, `cuda:1`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what `read` refuses, or there is no such device or precision.
    """
    adapter = read(checkpoint, weights, precision)
    kind, _, index = device.partition(":")
    try:
        fabric = Fabric(
            accelerator=kind,
            devices=[int(index)] if index else 1,
            precision=adapter.precision,  # type: ignore[arg-type]
        )
        segmenter = adapter.segmenter.to(fabric.device)
    except (RuntimeError, ValueError) as error:  # its first line says why: no such device, no driver
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device={device} or precision={adapter.precision} cannot be used ({reason}); use device=auto, "
            "cpu or cuda, and precision=32-true, bf16-mixed or 16-mixed"
        ) from error
    say_precision(adapter.precision, str(fabric._precision.precision), fabric.device)
    return Predictor(segmenter, adapter.resize, adapter.class_colors, fabric.autocast)


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
    if not path.parent.exists() and (named := REPOSITORY.fullmatch(str(checkpoint))):
        return fetch_from_hub(named[1], named[2], NAME)
    if not path.is_file():
        raise FileNotFoundError(f"no adapter at {path}; a training run leaves one, checkpoint=RUN names it")
    return path


def read(checkpoint: str | Path, weights: str | None = None, precision: str | None = None) -> Adapter:
    """Rebuild the segmenter that an adapter file was saved from; arguments as of `load`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no adapter, damaged, asking for code outside the library or for an unknown download,
            or of other base weights.
    """
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
    config = json.loads(metadata["config"])
    precision = precision or metadata["precision"]
    check_precision("precision", precision)
    given = {"weights": weights, "frozen_dtype": None if is_half(precision) else "float32"}
    parts = {section: make(section, _trusted(path, section, config.get(section, {}))) for section in PACKAGES}
    backbone = replace(parts["model"], **{key: value for key, value in given.items() if value is not None})
    names, colors = json.loads(metadata["class_names"]), json.loads(metadata["class_colors"])
    segmenter, identity = make_segmenter(backbone, parts["peft"], parts["head"], len(names))
    way_out = "set model.weights=PATH to the weights it was trained on"
    check_agreement(f"adapter {path}", metadata, identity, way_out)
    segmenter.load_trainable_state(state)
    classes = dict(zip(names, colors, strict=True))
    return Adapter(segmenter.eval(), parts["resize"], classes, precision, metadata)


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
    known = {conf.get("url") for conf in settings_of("model")}
    if config.get("url") not in known:
        raise ValueError(f"{path} asks to download {config['url']}, which conf/model/ does not know")
    arguments = {}
    for key, value in config.items():
        if isinstance(value, dict) and "_target_" in value:
            value = _trusted(path, section, value)
        elif (key.startswith("_") and key != "_target_") or "_target_" in json.dumps(value):
            raise ValueError(f"{path} hides calls in its {section} section; it was not built")
        arguments[key] = value
    return arguments
