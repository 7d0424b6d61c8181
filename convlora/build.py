"""Config or checkpoint -> objects; with the entry points, the only code that knows hydra."""

import difflib
import inspect
import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import get_object, instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from convlora.data.module import SegmentationDataModule
from convlora.sam.zoo import load_backbone
from convlora.segmenter import Segmenter
from convlora.task import check_identity

Config = dict[str, Any]
T = TypeVar("T")

# In a wheel the configuration lies inside the package, in a checkout beside it.
CONF = next(
    path for path in (Path(__file__).with_name("conf"), Path(__file__).parents[1] / "conf") if path.is_dir()
)

# What a user can mend; anything else is a defect and keeps its traceback.
USER_ERRORS = (OSError, ValueError, HydraException, OmegaConfBaseException, MisconfigurationException)

FORMAT = "convlora-adapter-2"
# What an adapter file may ask to be built: its config comes from whoever made the file.
ADAPTER_PACKAGES = {
    "model": "convlora.sam.",
    "peft": "convlora.peft.",
    "head": "convlora.heads.",
    "resize": "convlora.data.transforms",
}


def command(config_name: str, schema: Callable[..., T], job: Callable[[T], Any]) -> Callable[[], None]:
    """Return a command-line entry point: compose conf/<config_name>.yaml and call `job(schema(**config))`.

    The schema's signature is that of the file's top level. A mistake of the user's ends in one line on stderr
    and exit code 1; HYDRA_FULL_ERROR=1 shows the traceback.
    """

    def main() -> None:
        _quiet()
        full = os.environ.get("HYDRA_FULL_ERROR", "0")

        def run(cfg: DictConfig) -> Any:
            try:
                return job(schema(**check_keys(config_name, schema, resolve(cfg))))
            except USER_ERRORS as error:
                if HydraConfig.get().mode == RunMode.MULTIRUN:  # whose other jobs go on
                    raise
                sys.exit(_explain(error, full != "0"))  # past hydra, which would add a line of its own

        os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra hands its exceptions on instead of printing them
        try:
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(run)()
        except USER_ERRORS as error:
            sys.exit(_explain(error, full != "0"))
        finally:
            os.environ["HYDRA_FULL_ERROR"] = full

    return main


def _explain(error: Exception, full: bool) -> str:
    """Return the line that tells a user of an error; `full` also prints the traceback."""
    if full:
        traceback.print_exc()
    message = str(error)
    if message.startswith("Caught "):  # a loader process wraps its error in a traceback
        message = message.rstrip().splitlines()[-1].partition("Error: ")[2]
    elif isinstance(error, OmegaConfBaseException):  # what follows are its internals
        message = message.splitlines()[0]
    return f"error: {message}"


def _quiet() -> None:
    """Leave the terminal to the command's own lines."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers",
        ".*isinstance.treespec, LeafSpec",
        "Found .* in eval mode at the start of training",  # the frozen ones are meant to be
        "The number of training batches .* is smaller than the logging interval",
        "It is recommended to use .self.log.*sync_dist",  # the scores are already those of all ranks
        "Experiment logs directory",
        "Checkpoint directory .* exists and is not empty",
    ):
        warnings.filterwarnings("ignore", message=message)


def resolve(cfg: DictConfig) -> Config:
    """Return the config with all interpolations resolved."""
    settings = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


def make(section: str, config: Mapping[str, Any], **given: Any) -> Any:
    """Build the object that a config section describes, after checking its keys against the signature.

    Args:
        section: the section's name, for messages.
        config: `_target_` and its arguments.
        given: further arguments that the config does not know.

    Raises:
        ValueError: a key that the target does not take, a value of a wrong type, or no such target.
        Exception: what the target raised.
    """
    _check_section(section, config)
    try:
        return instantiate({**config, **dict.fromkeys(given)}, **given, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, TypeError | ImportError):
            raise ValueError(f"{section}: {config['_target_']}: {cause}") from cause
        raise cause from None


def check_keys(section: str, target: Callable[..., Any], config: Mapping[str, Any]) -> Config:
    """Return `config` if the target takes every key of it.

    Raises:
        ValueError: naming the key, what it may have meant and what there is.
    """
    parameters = inspect.signature(target).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return dict(config)
    known = [parameter.name for parameter in parameters]
    for key in config:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            raise ValueError(f"{section}: unknown key '{key}'; {hint}it takes {', '.join(known)}")
    return dict(config)


def _check_section(section: str, config: Mapping[str, Any]) -> None:
    if "_target_" in config:
        try:
            target = get_object(config["_target_"])
        except (ImportError, ValueError) as error:
            raise ValueError(f"{section}: there is no {config['_target_']} ({error})") from error
        check_keys(section, target, {key: value for key, value in config.items() if not key.startswith("_")})
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_section(f"{section}.{key}", value)


def make_loss(loss: Config, segmenter: Segmenter) -> nn.Module:
    """Build a loss and try it, so that one for another head or number of classes is refused before training.

    Args:
        loss: its section.
        segmenter: whose head gives the outputs; it may be without storage.

    Raises:
        ValueError: it is not for that many classes.
    """
    built: nn.Module = make("loss", loss)
    prompt = segmenter.dense_prompt
    with torch.no_grad():
        outputs = segmenter.mask_decoder.outputs(prompt, segmenter.position_encoding, prompt, (8, 8))
    zeros = apply_to_collection(outputs, Tensor, lambda part: torch.zeros(part.shape))
    built(zeros, torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    return built


def make_test_sets(
    names: Sequence[str], config_name: str, first: SegmentationDataModule
) -> list[SegmentationDataModule]:
    """Build further data sets to test on, read and batched as the first one, its threshold included.

    Args:
        names: of files in conf/dataset.
        config_name: of the command's own file, in whose settings the data sets are composed.
        first: the data set that is trained on, or tested first.

    Raises:
        ValueError: a data set is named twice, or has other classes than the first, or there is no list.
    """
    if isinstance(names, str):
        raise ValueError(f"test_sets={names} must be a list; write test_sets=[{names}]")
    own = [o for o in HydraConfig.get().overrides.task if not re.match(r"[~+]*(dataset|test_sets)\b", o)]
    sets: list[SegmentationDataModule] = []
    for name in names:
        composed = hydra.compose(config_name, [*own, f"dataset={name}"])
        config = resolve(composed.dataset)
        if config.get("threshold") is None:
            config["threshold"] = first.threshold
        data: SegmentationDataModule = make(f"dataset={name}", config)
        data.resize, data.batch_size, data.num_workers = first.resize, first.batch_size, first.num_workers
        if data.name in [known.name for known in (first, *sets)]:
            raise ValueError(f"test_sets: {name} is tested already; name each data set once")
        check_classes(first.name, first.class_names, data)
        sets.append(data)
    return sets


def check_classes(name: str, class_names: Sequence[str], data: SegmentationDataModule) -> None:
    """Compare the classes that a model tells apart with a data set's; a foreground may have any name.

    Raises:
        ValueError: they differ.
    """
    if len(class_names) == data.num_classes == 1 or list(class_names) == list(data.class_names):
        return
    raise ValueError(
        f"{name} has {len(class_names)} classes ({', '.join(class_names)}), {data.name} has "
        f"{data.num_classes} ({', '.join(data.class_names)}); choose another data set"
    )


def make_segmenter(
    model: Config, peft: Config, head: Config, num_classes: int
) -> tuple[Segmenter, dict[str, str]]:
    """Build a segmenter on pretrained weights.

    Returns:
        The segmenter and the identity of its base weights: name and SHA-256.
    """
    backbone = make("model", model)
    sam, sha256 = load_backbone(backbone)
    segmenter = Segmenter(sam, make("peft", peft), make("head", head), num_classes)
    return segmenter, {"base": backbone.name, "base_sha256": sha256}


def outline_segmenter(model: Config, peft: Config, head: Config, num_classes: int) -> Segmenter:
    """Build a segmenter without storage, to count its parameters."""
    with torch.device("meta"):
        return Segmenter(make("model", model).build(), make("peft", peft), make("head", head), num_classes)


@dataclass(frozen=True)
class Adapter:
    """What an adapter file describes.

    Attributes:
        segmenter: with the trained tensors loaded.
        resize: config of the resize it was trained with.
        class_names: one for each class.
        class_colors: RGB, one for each class, for pictures.
        identity: name and SHA-256 of the base weights.
        precision: to compute in, in Lightning's words.
    """

    segmenter: Segmenter
    resize: Config
    class_names: list[str]
    class_colors: list[list[int]]
    identity: dict[str, str]
    precision: str


def save_adapter(
    path: Path,
    segmenter: Segmenter,
    config: Config,
    classes: Mapping[str, Sequence[int]],
    identity: dict[str, str],
) -> None:
    """Write the trained tensors and what is needed to use them again to one safetensors file.

    Args:
        path: the file.
        segmenter: whose trained tensors it holds.
        config: it was trained with.
        classes: name -> RGB colour, in the order of their ids.
        identity: of the base weights.
    """
    metadata = {
        "format": FORMAT,
        "config": json.dumps(config),
        "class_names": json.dumps(list(classes)),
        "class_colors": json.dumps([list(color) for color in classes.values()]),
        **identity,
    }
    state = {name: tensor.cpu().contiguous() for name, tensor in segmenter.trainable_state().items()}
    path.write_bytes(save(state, metadata))  # with the permissions of other files, unlike `save_file`


def load_adapter(path: str | Path, weights: str | None = None, precision: str | None = None) -> Adapter:
    """Rebuild the segmenter that an adapter file was saved from.

    Args:
        path: the file.
        weights: base weights, where they lie elsewhere than at training.
        precision: to compute in; None takes that of the training.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no adapter, damaged, asking for code outside the library or for an unknown download,
            or of other base weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no adapter at {path}; a training run writes RUN/adapter.safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no adapter file or is damaged ({error}); use RUN/adapter.safetensors"
        ) from error
    if metadata.get("format") != FORMAT:
        found = metadata.get("format", "unmarked")
        raise ValueError(f"{path} is no {FORMAT} file but {found}; use an adapter that this version trained")
    config = json.loads(metadata["config"])
    parts = {key: _trusted(path, key, config[key]) for key in ADAPTER_PACKAGES}
    if weights is not None:
        parts["model"]["weights"] = weights
    precision = precision or str(config["trainer"]["precision"])
    if not is_half(precision):
        parts["model"]["frozen_dtype"] = "float32"
    class_names, class_colors = json.loads(metadata["class_names"]), json.loads(metadata["class_colors"])
    segmenter, identity = make_segmenter(parts["model"], parts["peft"], parts["head"], len(class_names))
    check_identity(metadata, identity)
    segmenter.load_trainable_state(state)
    return Adapter(segmenter.eval(), parts["resize"], class_names, class_colors, identity, precision)


def is_half(precision: str) -> bool:
    """Return whether matrix products run in half precision, which weights held in half precision need."""
    return precision.startswith(("bf16", "16"))


def _trusted(path: Path, section: str, config: Config) -> Config:
    """Return a section of an adapter's config if it can do no more than build what this library offers.

    Its target must be a class of the section's package, by its own name and not by way of another module, its
    arguments plain values, and its download one that conf/model/ knows.
    """
    target = str(config.get("_target_"))
    offered = target.startswith(ADAPTER_PACKAGES[section])
    found = get_object(target) if offered else None
    if not isinstance(found, type) or f"{found.__module__}.{found.__qualname__}" != target:
        raise ValueError(f"{path} asks for {target}, which is no {section} of this library; it was not built")
    reserved = [key for key in config if key.startswith("_") and key != "_target_"]
    if reserved or "_target_" in json.dumps(list(config.values())):
        raise ValueError(f"{path} hides calls in its {section} section; it was not built")
    known = {OmegaConf.select(OmegaConf.load(file), "url") for file in (CONF / "model").glob("*.yaml")}
    if config.get("url") not in known:
        raise ValueError(f"{path} asks to download {config['url']}, which conf/model/ does not know")
    return dict(config)
