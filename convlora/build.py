"""Config -> objects, made and checked in one visible order."""

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning import Callback, Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_utilities.core.apply_func import apply_to_collection
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from convlora.callbacks import ProgressBar
from convlora.checkpoint import RunCheckpoint
from convlora.data.module import SegmentationDataModule
from convlora.heads import Head
from convlora.metrics.scores import Scores
from convlora.peft.conv_lora import EXPERTS
from convlora.peft.method import Method
from convlora.prompts import Prompts
from convlora.run import count
from convlora.sam.zoo import Backbone, hold_frozen, load_backbone
from convlora.schema import Config, check_section, make, resolve
from convlora.segmenter import Segmenter
from convlora.task import parameter_groups

Optimizer = Callable[[Iterable[Any]], torch.optim.Optimizer]

# In a wheel the configuration lies inside the package, in a checkout beside it.
CONF = next(
    path for path in (Path(__file__).with_name("conf"), Path(__file__).parents[1] / "conf") if path.is_dir()
)

SEEDS = 2**32
# Lightning's words; those that hold all in half precision are refused with a reason of their own
PRECISIONS = (
    "32-true",
    "32",
    "bf16-mixed",
    "bf16",
    "16-mixed",
    "16",
    "64-true",
    "64",
    "bf16-true",
    "16-true",
)

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What a training is made of, before it touches images, weights or devices.

    Attributes:
        data: the data set that is trained on.
        tests: all that are tested on, `data` the first.
        backbone: recipe of the frozen SAM.
        method: recipe of what learns in the encoder.
        head: recipe of the mask decoder.
        outline: the segmenter without storage.
        loss: of logits, or of the head's outputs.
        scores: of a validation or test.
        optimizer: makes the optimiser from groups of parameters.
        callbacks: those of `callbacks=`, by name.
        prompts: mixed into the training.
    """

    data: SegmentationDataModule
    tests: list[SegmentationDataModule]
    backbone: Backbone
    method: Method
    head: Head
    outline: Segmenter
    loss: nn.Module
    scores: Scores
    optimizer: Optimizer
    callbacks: dict[str, Callback]
    prompts: Prompts


def settings_of(group: str) -> list[DictConfig]:
    """Return the files of a group in conf/, each as it is written."""
    return [OmegaConf.load(path) for path in sorted((CONF / group).glob("*.yaml"))]  # type: ignore[misc]


def make_parts(config_name: str, config: Any) -> Parts:
    """Make and check all parts of a training in the order of their dependence.

    Args:
        config_name: of the command's own file, in whose settings further test sets are composed.
        config: attributes by the names of the groups in conf/.

    Raises:
        ValueError: a setting is impossible, alone or beside the others.
    """
    if not 0 <= config.seed < SEEDS:
        raise ValueError(f"seed={config.seed} must be 0 to {SEEDS - 1}")
    loading = make("loading", config.loading)
    data: SegmentationDataModule = make("dataset", config.dataset, loading=loading)
    tests = [data, *make_test_sets(config.test_sets, config_name, data)]
    backbone: Backbone = make("model", config.model)
    method: Method = make("peft", config.peft)
    head: Head = make("head", config.head)
    check_trainer(config.trainer)
    check_folder(config)
    check_precision("trainer.precision", str(config.trainer["precision"]))
    check_frozen_dtype(config.model, "trainer.precision", str(config.trainer["precision"]))
    outline = make_outline(backbone, method, head, data.num_classes)
    check_trained_dtype(outline, backbone.frozen_dtype, config.peft["_target_"])
    scores: Scores = make("metrics", config.metrics, class_names=data.class_names)
    loss = make_loss(config.loss, outline)
    optimizer: Optimizer = make("optimizer", config.optimizer)
    try:
        optimizer(parameter_groups(outline))
    except ValueError as error:  # torch's words: Invalid learning rate: -1
        raise ValueError(f"optimizer: {error}; choose another value") from error
    callbacks = {
        name: make(f"callbacks.{name}", part) for name, part in config.callbacks.items() if part is not None
    }
    check_monitors(callbacks, scores)
    prompts: Prompts = make("prompts", config.prompts)
    if prompts.box and data.num_classes > 1:
        raise ValueError(
            f"prompts.box={prompts.box} is for a foreground, but {data.name} has {data.num_classes} classes; "
            "leave it out"
        )
    return Parts(data, tests, backbone, method, head, outline, loss, scores, optimizer, callbacks, prompts)


def make_outline(backbone: Backbone, method: Method, head: Head, num_classes: int) -> Segmenter:
    """Build a segmenter without storage."""
    with torch.device("meta"):
        sam = backbone.build()
        hold_frozen(sam.image_encoder, backbone.frozen_dtype)
        return Segmenter(sam, method, head, num_classes)


def match_width(config: Any) -> Config:
    """Return the `peft` section with the greatest width at which no more than `match` parameters are trained.

    Args:
        config: attributes by the names of the groups in conf/.

    Raises:
        ValueError: the method has no width, one was given, or the least one trains more.
    """
    width = make("peft", config.peft).width
    wanted = f"match={config.match}"
    if width is None:
        raise ValueError(
            f"{wanted} is for methods of several sizes, this one has a single size; leave it out"
        )
    for override in HydraConfig.get().overrides.task:
        if override.lstrip("+").startswith(f"peft.{width}="):
            raise ValueError(f"{wanted} chooses peft.{width} itself; leave one of them out")
    data: SegmentationDataModule = make("dataset", config.dataset)
    backbone, head = make("model", config.model), make("head", config.head)

    def trained(size: int) -> int:
        method = make("peft", {**config.peft, width: size})
        return count(make_outline(backbone, method, head, data.num_classes), trainable=True)

    if trained(1) > config.match:
        raise ValueError(
            f"{wanted} is less than the {trained(1):,} parameters that are trained at peft.{width}=1; "
            "match more"
        )
    low, high = 1, 2
    while trained(high) <= config.match:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if trained(middle) <= config.match else (low, middle)
    return {**config.peft, width: low}


def make_segmenter(
    backbone: Backbone, method: Method, head: Head, num_classes: int
) -> tuple[Segmenter, dict[str, str]]:
    """Build a segmenter on pretrained weights.

    Returns:
        The segmenter and the identity of its base weights: name and SHA-256.
    """
    sam, sha256 = load_backbone(backbone)
    segmenter = Segmenter(sam, method, head, num_classes)
    return segmenter, {"base": backbone.name, "base_sha256": sha256}


def make_loss(loss: Config, segmenter: Segmenter) -> nn.Module:
    """Build a loss and try it, so that one for another head or number of classes is refused before training.

    Args:
        loss: its section.
        segmenter: whose head gives the outputs; it may be without storage.

    Raises:
        ValueError: it is for another one.
    """
    built: nn.Module = make("loss", loss)
    prompt = segmenter.dense_prompt
    with torch.no_grad():
        outputs = segmenter.mask_decoder.outputs(prompt, segmenter.position_encoding, prompt, (8, 8))
        zeros = apply_to_collection(outputs, Tensor, lambda part: torch.zeros(part.shape))
        built(segmenter.for_loss(built, zeros), torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    return built


def make_test_sets(
    names: Sequence[str], config_name: str, first: SegmentationDataModule
) -> list[SegmentationDataModule]:
    """Build further data sets to test on, loaded as the first one.

    Args:
        names: of files in conf/dataset.
        config_name: of the command's own file, in whose settings the data sets are composed; of the settings
            of the data set only `threshold` holds for them too.
        first: the data set that is trained on, or tested first.

    Raises:
        ValueError: a data set is named twice, or has other classes than the first.
    """
    other = re.compile(r"[~+]*(dataset(?!\.threshold=)|test_sets|resume)\b")
    own = [override for override in HydraConfig.get().overrides.task if not other.match(override)]
    sets: list[SegmentationDataModule] = []
    for name in names:
        composed = hydra.compose(config_name, [*own, f"dataset={name}"])
        config = resolve(composed.dataset)
        data: SegmentationDataModule = make(f"dataset={name}", config, loading=first.loading)
        if data.name in [known.name for known in (first, *sets)]:
            raise ValueError(f"test_sets: {name} is tested already; name each data set once")
        check_classes(first.name, first.class_names, data)
        sets.append(data)
    return sets


def make_trainer(config: Config, callbacks: Sequence[Callback], **given: Any) -> Trainer:
    """Build a Trainer whose samplers are the data module's, on as many devices as there are.

    Args:
        config: `trainer` section.
        callbacks: of the run.
        given: further arguments of the Trainer.

    Raises:
        ValueError: there are not so many devices.
    """
    shortage = missing_devices(config)
    if shortage is not None:
        raise ValueError(shortage)
    trainer: Trainer = make(
        "trainer",
        config,
        ("enable_progress_bar", "precision"),
        logger=False,
        callbacks=list(callbacks),
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=any(isinstance(each, ProgressBar) for each in callbacks),
        **given,
    )
    if trainer.is_global_zero:
        wanted = str(given.get("precision", config["precision"]))
        say_precision(wanted, str(trainer.precision), trainer.strategy.root_device)
    return trainer


def check_trainer(config: Config) -> None:
    """Refuse a `trainer` section that lacks what a run follows from, or trains nothing; raises ValueError."""
    for key in ("accelerator", "devices", "precision", "max_epochs", "accumulate_grad_batches"):
        if config.get(key) is None:
            raise ValueError(f"trainer.{key} must be given; leave it as it is in conf/trainer/default.yaml")
    if str(config["precision"]) not in PRECISIONS:
        raise ValueError(
            f"trainer.precision={config['precision']} must be 32-true, bf16-mixed or 16-mixed; set one"
        )
    strategy = str(config.get("strategy", "auto"))
    if re.search("fsdp|deepspeed|model_?parallel", strategy, re.IGNORECASE):
        raise ValueError(
            f"trainer.strategy={strategy} shares parameters out over devices, but so few are trained that "
            "each device holds them all; set trainer.strategy=ddp"
        )
    check_section("trainer", config)
    if config["devices"] in (0, "0", []):
        raise ValueError(f"trainer.devices={config['devices']} trains on nothing; set trainer.devices=1")
    if isinstance(config["devices"], str) and not re.fullmatch(r"auto|-1|\d+(,\d+)*,?", config["devices"]):
        raise ValueError(
            f"trainer.devices={config['devices']} must be a number, a list of them, or auto; set "
            "trainer.devices=1"
        )
    if config["accelerator"] not in ACCELERATORS:
        raise ValueError(
            f"trainer.accelerator={config['accelerator']} must be one of {', '.join(ACCELERATORS)}; set "
            "trainer.accelerator=auto"
        )
    if config["max_epochs"] < 1:
        raise ValueError(
            f"trainer.max_epochs={config['max_epochs']} must be at least 1, the number of epochs over which "
            "the learning rate falls to 0"
        )


def check_folder(config: Any) -> None:
    """Refuse to begin in processes that others start where these name no folder, or are not so many.

    Args:
        config: attributes by the names of the groups in conf/.

    Raises:
        ValueError: it is one of them.
    """
    nodes, devices, started = config.trainer.get("num_nodes") or 1, config.trainer["devices"], 1
    for environment in (TorchElasticEnvironment, SLURMEnvironment):
        if environment.detect():
            started = environment().world_size()
            break
    if max(nodes, started) > 1 and not is_folder_given():
        cause = f"trainer.num_nodes={nodes}" if nodes > 1 else f"a training in {started} processes"
        key = "sweep_dir" if HydraConfig.get().mode == RunMode.MULTIRUN else "run_dir"
        raise ValueError(f"{cause} needs {key}=FOLDER, a folder that all of them share")
    if started > 1 and isinstance(devices, int) and devices > 0 and started != nodes * devices:
        raise ValueError(
            f"{started} processes were started, but trainer.devices={devices} on trainer.num_nodes={nodes} "
            f"are {nodes * devices}; set trainer.devices={max(1, started // nodes)}"
        )


def is_folder_given() -> bool:
    """Return whether the command names the run's folder, and so finds it again."""
    given = {override.lstrip("+").partition("=")[0] for override in HydraConfig.get().overrides.task}
    named = {"sweep_dir"} if HydraConfig.get().mode == RunMode.MULTIRUN else {"run_dir", "resume"}
    return bool(given & named)


def missing_devices(config: Config) -> str | None:
    """Say how many devices a `trainer` section asks for, and how many there are, where these are too few."""
    devices, accelerator = config["devices"], config["accelerator"]
    wanted = len(devices) if isinstance(devices, list) else devices
    if not isinstance(wanted, int) or accelerator not in ("auto", "gpu", "cuda"):
        return None
    there = torch.cuda.device_count()
    if there == 0 and (accelerator != "auto" or wanted > 1) and not torch.backends.mps.is_available():
        return (
            f"trainer.devices={devices}, but this machine has 0 GPUs; trainer.devices=1 with "
            f"trainer.accelerator=auto trains on its CPU, trainer.accelerator=cpu in {max(wanted, 1)} "
            "processes on it"
        )
    if 0 < there < wanted:
        return f"trainer.devices={devices}, but this machine has {there} GPUs; set trainer.devices={there}"
    return None


def check_classes(name: str, class_names: Sequence[str], data: SegmentationDataModule) -> None:
    """Compare the classes that a model tells apart with a data set's; a foreground may have any name.

    Raises:
        ValueError: they differ.
    """
    if len(class_names) == data.num_classes == 1 or list(class_names) == list(data.class_names):
        return
    classes = "class" if len(class_names) == 1 else "classes"
    raise ValueError(
        f"{name} has {len(class_names)} {classes} ({', '.join(class_names)}), {data.name} has "
        f"{data.num_classes} ({', '.join(data.class_names)}); choose another data set"
    )


def check_monitors(callbacks: Mapping[str, Callback], scores: Scores) -> None:
    """Refuse to watch a score that no validation gives, or none; raises ValueError."""
    if not isinstance(callbacks.get("best"), RunCheckpoint):
        raise ValueError(
            "callbacks.best must be a convlora.checkpoint.RunCheckpoint, which chooses the epoch; leave it"
        )
    known = [f"val/{name}" for name in ("loss", *scores.for_validation().names)]
    for name, callback in callbacks.items():
        monitor = getattr(callback, "monitor", None)
        if monitor is not None and monitor not in known:
            raise ValueError(
                f"callbacks.{name}.monitor={monitor} is not one of {', '.join(known)}, which are computed in "
                f"validation; metrics.validate=[NAME] adds one of {', '.join(scores.names)}"
            )


def check_precision(key: str, precision: str) -> None:
    """Refuse to hold what is trained in half precision; raises ValueError."""
    if is_half(precision) and precision.endswith("-true"):
        raise ValueError(f"{key}={precision} rounds what is trained; set bf16-mixed")


def say_precision(wanted: str, taken: str, device: torch.device) -> None:
    """Tell a user whose device does not compute in the precision that was asked for, or does so slowly."""
    if wanted.startswith("16") and taken.startswith("bf16"):
        log.warning("precision=%s is for GPUs; the CPU computes in %s", wanted, taken)
    if is_half(taken) and device.type == "cpu" and not has_fast_bf16():
        log.warning(
            "precision=%s is many times slower on this CPU, which has no instructions for it; "
            "32-true is the fast one here",
            taken,
        )


def has_fast_bf16() -> bool:
    """Return whether the CPU has instructions for half precision, as far as torch knows."""
    check = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # not in every build
    return check is None or bool(check())


def check_frozen_dtype(model: Config, key: str, precision: str) -> None:
    """Refuse frozen weights in half precision where products are in single precision; raises ValueError."""
    held = model.get("frozen_dtype", "float32")
    if held != "float32" and not is_half(precision):
        raise ValueError(
            f"model.frozen_dtype={held} does not go with {key}={precision}, which multiplies in single "
            f"precision; set {key}=bf16-mixed"
        )


def num_experts(scales: object) -> int:
    """Return how many experts conf/peft means where only their scales are given, or nothing is."""
    return len(scales) if isinstance(scales, Sequence) else EXPERTS


OmegaConf.register_new_resolver("num_experts", num_experts, replace=True)


def check_trained_dtype(segmenter: Segmenter, held: str, method: str) -> None:
    """Refuse to train what the backbone holds in half precision, which rounds it; raises ValueError."""
    rounded = [name for name, p in segmenter.trainable_state().items() if p.dtype != torch.float32]
    if rounded:
        raise ValueError(
            f"model.frozen_dtype={held} does not go with peft._target_={method}, which trains "
            f"{len(rounded)} tensors that are held so (first {rounded[0]}); set model.frozen_dtype=float32"
        )


def is_half(precision: str) -> bool:
    """Return whether matrix products run in half precision, which weights held in half precision need."""
    return precision.startswith(("bf16", "16"))
