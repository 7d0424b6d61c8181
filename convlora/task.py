"""The LightningModule: one step for three stages, the optimiser, and state that is the adapter's only."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from convlora.data.module import Batch
from convlora.metrics.scores import Scores
from convlora.peft.method import aux_loss
from convlora.segmenter import Segmenter, fit_mask, restore_size, to_prediction


class SegmentationTask(LightningModule):
    """Trains a segmenter and scores it at the images' own size.

    Args:
        segmenter: the model.
        loss: of the head's outputs against class ids [n, 1, h, w]; a mean over images.
        scores: fed one image at a time.
        optimizer: makes the optimiser from the trainable parameters.
        identity: what a checkpoint must have been made with, besides the shapes: name and hash of the base
            weights. Stored in every Lightning checkpoint and compared on resume.
        seed: of the random numbers drawn in training steps.

    Attributes:
        arrays: what the scores of the last epoch gave besides numbers, by name.
    """

    arrays: dict[str, NDArray[Any]]

    def __init__(
        self,
        segmenter: Segmenter,
        loss: nn.Module,
        scores: Scores,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        identity: dict[str, str],
        seed: int = 0,
    ):
        super().__init__()
        self.segmenter = segmenter
        self.loss = loss
        self.optimizer = optimizer
        self.identity = identity
        self.seed = seed
        self.scores = nn.ModuleDict({stage: scores.clone(prefix=f"{stage}/") for stage in ("val", "test")})
        self.mean_loss = nn.ModuleDict({stage: MeanMetric() for stage in ("val", "test")})

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed the gate's noise by the position in training, so that a resumed run draws the same."""
        position = [self.seed, self.current_epoch, batch_idx, self.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(position).generate_state(1)[0]))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the segmentation loss plus the adapters' auxiliary loss."""
        outputs = self.segmenter.outputs(batch.images)
        loss: Tensor = self.loss(outputs, torch.stack(list(batch.masks))[:, None])
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.images))
        aux = aux_loss(self.segmenter)
        if aux is None:
            return loss
        self.log("train/aux_loss", aux, batch_size=len(batch.images))
        return loss + aux

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score a batch of the validation set."""
        self._score("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, dict[str, float]]:
        """Score a batch of the test set; returns the scores of each image by name."""
        return self._score("test", batch)

    def on_validation_epoch_end(self) -> None:
        """Log the means over the validation set."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log the means over the test set."""
        self._log_scores("test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimiser with a learning rate that falls linearly to 0, step by step."""
        optimizer = self.optimizer(p for p in self.parameters() if p.requires_grad)
        steps = self.trainer.estimated_stepping_batches
        schedule = LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the trained tensors only; the frozen ones are known by their hash."""
        return self.segmenter.trainable_state()

    def load_state_dict(self, state_dict: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> None:
        """Load what `state_dict` gave, strictly about trained tensors."""
        self.segmenter.load_trainable_state(state_dict)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what the tensors belong to."""
        checkpoint["identity"] = self.identity

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other base weights."""
        check_identity(checkpoint.get("identity", {}), self.identity)

    def _score(self, stage: str, batch: Batch) -> dict[str, dict[str, float]]:
        scores, mean_loss = self._metrics(stage)
        rows = {}
        outputs = self.segmenter.outputs(batch.images)
        logits = self.segmenter.logits(outputs)
        plain = isinstance(outputs, Tensor)  # which are the logits; of more, the loss is taken as in training
        if not plain:
            fitted = [
                fit_mask(m, c, logits.shape[3]) for m, c in zip(batch.masks, batch.contents, strict=True)
            ]
            mean_loss.update(self.loss(outputs, torch.stack(fitted)[:, None]), len(fitted))
        for name, mask, content, logit in zip(batch.names, batch.masks, batch.contents, logits, strict=True):
            native = restore_size(logit, content, (mask.shape[0], mask.shape[1]))
            if plain:
                mean_loss.update(self.loss(native[None], mask[None, None]))
            found = to_prediction(native)
            values = scores(found.classes.cpu(), found.prob.cpu(), mask.cpu())
            rows[name] = {key: values[f"{stage}/{key}"].item() for key in scores.names}
        return rows

    def _log_scores(self, stage: str) -> None:
        scores, mean_loss = self._metrics(stage)
        self.log(f"{stage}/loss", mean_loss.compute())
        values = scores.compute()
        for name in scores.names:
            value = values.pop(f"{stage}/{name}").float()
            self.log(f"{stage}/{name}", value, prog_bar=stage == "val" and name == scores.primary)
        self.arrays = {name.removeprefix(f"{stage}/"): value.cpu().numpy() for name, value in values.items()}
        mean_loss.reset()
        scores.reset()

    def scores_of(self, stage: str) -> Scores:
        """Return the scores of `val` or `test`."""
        scores = self.scores[stage]
        assert isinstance(scores, Scores)
        return scores

    def _metrics(self, stage: str) -> tuple[Scores, MeanMetric]:
        mean_loss = self.mean_loss[stage]
        assert isinstance(mean_loss, MeanMetric)
        return self.scores_of(stage), mean_loss


def check_identity(found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Compare the base weights that a checkpoint names with those in use.

    Raises:
        ValueError: they differ.
    """
    for key, value in expected.items():
        if found.get(key) != value:
            raise ValueError(
                f"the checkpoint was trained on {key} {found.get(key, 'unknown')}, but here it is {value}; "
                "set model= and model.weights= to what it was trained on"
            )
