"""Which experts the maps of each layer pass through: in tests and training, and where in an image."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from numpy.typing import NDArray
from torch import Tensor, nn

from convlora import IGNORED, draw
from convlora.data.module import Batch
from convlora.peft.conv_lora import ConvLoRAEquationLinear
from convlora.run import write_rows
from convlora.task import SegmentationTask
from convlora.tracking import log_histogram

Layers = Mapping[str, ConvLoRAEquationLinear]


def routed_layers(encoder: nn.Module) -> dict[str, ConvLoRAEquationLinear]:
    """Return the layers of an encoder that have experts, by name."""
    return {name: each for name, each in encoder.named_modules() if isinstance(each, ConvLoRAEquationLinear)}


def shares(layer: ConvLoRAEquationLinear, images: int) -> Tensor:
    """Return how a layer split its last maps among its experts.

    Args:
        layer: has experts.
        images: number of images in its last pass.

    Returns:
        The weight of each expert for each map, of sum 1 [images, maps of an image, experts].
    """
    choice, gates = layer.routes.choice, layer.routes.gates.float()
    weights = gates / gates.sum(dim=1, keepdim=True)
    split = torch.zeros(len(gates), len(layer.experts.scales), device=gates.device)
    return split.scatter_add(1, choice, weights).view(images, -1, split.shape[1])


def entropy(split: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the entropy of rows of sum 1, bits: 0 where one expert does all, at most log2(experts)."""
    return np.asarray(np.abs((split * np.log2(np.maximum(split, 1e-12))).sum(axis=-1)))


def locate(layer: ConvLoRAEquationLinear, image: int, images: int, side: int) -> NDArray[np.int64]:
    """Return which expert has the greatest weight at each pixel of the network's input [side, side].

    Args:
        layer: has experts.
        image: which one of its last pass.
        images: number of images in that pass.
        side: of the network's input, px.
    """
    chosen = shares(layer, images)[image].argmax(dim=1).cpu().numpy()
    windows = math.isqrt(len(chosen))
    tokens = windows * layer.routes.side  # of the padded grid; a token is a power of two of pixels wide
    pixels = 2 ** math.ceil(math.log2(side / tokens)) if windows > 1 else -(-side // layer.routes.side)
    window = layer.routes.side * max(1, pixels)
    grid = chosen.reshape(windows, windows).repeat(window, axis=0).repeat(window, axis=1)
    return np.asarray(grid[:side, :side])


class Routing(Callback):
    """Writes which experts the test images pass through, and logs the same during training.

    Args:
        every_n_steps: optimiser steps between two entries in W&B or TensorBoard; 0 makes none.

    Attributes:
        folder: where the next test's routing.csv, routing_images.csv and routing.png go.
    """

    def __init__(self, every_n_steps: int = 100):
        self.every_n_steps = every_n_steps
        self.folder: Path | None = None
        self._logged = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = self.every_n_steps > 0 and step % self.every_n_steps == 0 and step != self._logged
        loggers = [each for each in trainer.loggers if isinstance(each, WandbLogger | TensorBoardLogger)]
        layers = _layers(pl_module)
        if not (due and loggers and layers and trainer.is_global_zero):
            return
        self._logged = step
        split = {name: shares(layer, 1)[0].mean(dim=0).cpu().numpy() for name, layer in layers.items()}
        picture = draw.routing_heatmap(split, _scales(layers))
        for logger in loggers:
            logger.log_metrics({f"routing/{name}": float(entropy(row)) for name, row in split.items()}, step)
            if isinstance(logger, WandbLogger):
                logger.log_image("train/routing", [picture], step)
                log_histogram(logger, "train/experts", np.mean([*split.values()], axis=0), step)
            else:
                logger.experiment.add_image("train/routing", picture, step, dataformats="HWC")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._split: dict[str, NDArray[np.float64]] = {}
        self._images: dict[str, dict[str, float]] = {}

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        layers = _layers(pl_module)
        if not layers:
            return
        octaves = np.log2(_scales(layers))
        means = []
        for name, layer in layers.items():
            split = shares(layer, len(batch.images)).double().cpu().numpy()
            self._split[name] = self._split.get(name, 0) + split.sum(axis=(0, 1))
            means.append(split.mean(axis=1) @ octaves)
        for index, (name, mask) in enumerate(zip(batch.names, batch.masks, strict=True)):
            seen = max(1, int((mask != IGNORED).sum()))
            self._images[name] = {
                "object_share": int(((mask > 0) & (mask != IGNORED)).sum()) / seen,
                "mean_scale": float(2 ** np.mean([mean[index] for mean in means])),
            }

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, (self._split, self._images))
            self._split = {name: sum(split[name] for split, _ in parts) for name in self._split}
            self._images = {name: row for _, images in parts for name, row in images.items()}

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (self._split and self.folder and trainer.is_global_zero):
            return
        scales = _scales(_layers(pl_module))
        maps = {name: round(float(counts.sum())) for name, counts in self._split.items()}
        split = {name: counts / counts.sum() for name, counts in self._split.items()}
        rows = {
            name: {
                **{
                    f"expert_{number}_scale_{scale:g}": float(part)
                    for number, (scale, part) in enumerate(zip(scales, row, strict=True), start=1)
                },
                "entropy": float(entropy(row)),
                "maps": maps[name],
            }
            for name, row in split.items()
        }
        write_rows(self.folder / "routing.csv", "layer", rows)
        images = dict(sorted(self._images.items()))
        write_rows(self.folder / "routing_images.csv", "image", images)
        points = np.array([list(row.values()) for row in images.values()])
        bits = [row["entropy"] for row in rows.values()]
        draw.draw_routing(split, bits, scales, points, self.folder / "routing.png")


def _layers(module: LightningModule) -> dict[str, ConvLoRAEquationLinear]:
    assert isinstance(module, SegmentationTask)
    return routed_layers(module.segmenter.get_submodule("image_encoder"))


def _scales(layers: Layers) -> Sequence[float]:
    return next(iter(layers.values())).experts.scales
