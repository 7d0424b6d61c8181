"""The LightningModule: one step for three stages, the optimiser, and state that is the adapter's only."""

import time
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

from convlora.cleaning import Cleaning
from convlora.data.module import Batch
from convlora.inference import Found, Predictor
from convlora.losses import takes_outputs
from convlora.metrics.scores import Scores
from convlora.peft.method import aux_loss, learning_rates
from convlora.prompts import Prompts, box_to_input, component_boxes, draw_boxes
from convlora.segmenter import Segmenter, fit_mask, restore_size, to_prediction


class SegmentationTask(LightningModule):
    """Trains a segmenter and scores it at the images' own size.

    Args:
        segmenter: the model.
        loss: of logits, or of the head's outputs, against class ids [n, 1, h, w]; a mean over images.
        scores: fed one image at a time.
        optimizer: makes the optimiser from groups of parameters.
        metadata: what an adapter file says of itself, kept in every Lightning checkpoint.
        facts: what a resumed run must agree in with the run that it goes on with, by what it is called.
        seed: of the random numbers drawn in training steps.
        prompts: mixed into the training.

    Attributes:
        arrays: what the scores of the last epoch gave besides numbers, by name.
        cleaning: of the masks that are scored.
    """

    arrays: dict[str, NDArray[Any]]

    def __init__(
        self,
        segmenter: Segmenter,
        loss: nn.Module,
        scores: Scores,
        optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer],
        metadata: Mapping[str, str],
        facts: Mapping[str, str],
        seed: int = 0,
        prompts: Prompts = Prompts(),  # noqa: B008
    ):
        super().__init__()
        self.segmenter = segmenter
        self.loss = loss
        self.optimizer = optimizer
        self.metadata = metadata
        self.facts = facts
        self.seed = seed
        self.prompts = prompts
        self.scores = nn.ModuleDict({"val": scores.for_validation(), "test": scores.clone()})
        # by default a mean would leave out what is no number
        self.mean_loss = nn.ModuleDict(
            {stage: MeanMetric(nan_strategy="disable") for stage in ("val", "test")}
        )
        self.cleaning = Cleaning()
        self.seconds = 0.0
        self._started = time.monotonic()
        self._watched: list[tuple[Tensor, str, str]] = []
        self._last_step = "no step ("

    @property
    def fit_seconds(self) -> float:
        """How long the training has taken, that of the runs that it goes on with included."""
        return self.seconds + time.monotonic() - self._started

    def on_fit_start(self) -> None:
        """Start the clock; what SAM's own code builds arrives in evaluation mode."""
        self._started = time.monotonic()
        self.segmenter.train()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed gates' noise and dropout by the position in training, so that a resumed run draws the same."""
        if batch_idx % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._refuse_infinite()
        position = [self.seed, self.current_epoch, batch_idx, self.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(position).generate_state(1)[0]))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the segmentation loss plus the adapters' auxiliary loss."""
        masks, boxes = torch.stack(list(batch.masks))[:, None], None
        if self.prompts.box and torch.rand(()) < self.prompts.box:
            boxes, masks = draw_boxes(masks)
        given = self.segmenter.for_loss(self.loss, self.segmenter.outputs(batch.images, boxes))
        loss: Tensor = self.loss(given, masks)
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.images))
        self.log("train/lr", lr, batch_size=len(batch.images))
        aux = aux_loss(self.segmenter, self.global_step / self.trainer.estimated_stepping_batches)
        if aux is not None:
            self.log("train/aux_loss", aux, batch_size=len(batch.images))
            loss = loss + aux
        self._last_step = f"step {self.global_step} (epoch {self.current_epoch + 1}, learning rate {lr:.3g}, "
        self._watched.append((torch.isfinite(loss.detach()), self._last_step, ", ".join(batch.names)))
        return loss

    def _refuse_infinite(self) -> None:
        """Stop where the loss of a step was not finite; looked at now and then, so that few wait for a GPU.

        Raises:
            FloatingPointError: it was not, on any device.
        """
        if not self._watched:
            return
        finite, steps, names = zip(*self._watched, strict=True)
        self._watched = []
        own = torch.stack(finite).float()
        gathered = self.all_gather(own)
        assert isinstance(gathered, Tensor)
        broken = (gathered.view(-1, len(own)).amin(dim=0) == 0).nonzero().flatten().tolist()
        if broken:
            first = broken[0]
            images = "of another device" if own[first] else names[first]
            raise FloatingPointError(
                f"the loss is not finite at {steps[first]}precision {self.trainer.precision}, images "
                f"{images}); lower optimizer.lr, set trainer.precision=bf16-mixed or 32-true, or look at "
                "these images, in a new run"
            )

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._score("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, dict[str, float]]:
        """Score a batch of the test set; returns the scores of each image by name."""
        return self._score("test", batch)

    def on_validation_start(self) -> None:
        """See the last step of the epoch before anything is scored or saved."""
        self._refuse_infinite()

    def on_train_epoch_end(self) -> None:
        """See the last step of the epoch also where nothing is validated."""
        self._refuse_infinite()

    def on_validation_epoch_end(self) -> None:
        """Log the means over the validation set.

        Raises:
            FloatingPointError: the loss is not finite, so that the weights are not either.
        """
        loss = self._log_scores("val")
        if not (self.trainer.sanity_checking or torch.isfinite(loss)):
            raise FloatingPointError(
                f"val/loss is {loss.item()} after {self._last_step}precision {self.trainer.precision}), so "
                "that the weights are broken; lower optimizer.lr, or set trainer.precision=bf16-mixed or "
                "32-true, in a new run"
            )

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimiser with learning rates that fall linearly to 0, step by step."""
        optimizer = self.optimizer(parameter_groups(self.segmenter))
        for group in optimizer.param_groups:
            group["lr"] *= group.pop("multiple", 1.0)
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
        """Note what the tensors belong to and how long they took."""
        checkpoint["metadata"] = dict(self.metadata)
        checkpoint["facts"] = dict(self.facts)
        checkpoint["seconds"] = self.fit_seconds

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the clock of the run that is resumed."""
        self.seconds = checkpoint["seconds"]

    def look(self, batch: Batch) -> Any:
        """Return the outputs of the segmenter for a batch that is scored."""
        return self.segmenter.outputs(batch.images)

    def found(self, image: NDArray[np.uint8], mask: NDArray[np.uint8], predictor: Predictor) -> Found:
        """Return what is found in an image [h, w, 3] with a known mask, in the way in which it is scored."""
        return predictor.segment([predictor.prepare(image)], [(image.shape[0], image.shape[1])])[0]

    def _score(self, stage: str, batch: Batch) -> dict[str, dict[str, float]]:
        scores, mean_loss = self._metrics(stage)
        rows = {}
        outputs = self.look(batch)
        logits = self.segmenter.logits(outputs)
        at_native_size = not takes_outputs(self.loss)  # but of logits, which can be brought to any size
        if not at_native_size:
            side = batch.images.shape[-1]
            masks = [fit_mask(*pair, side) for pair in zip(batch.masks, batch.contents, strict=True)]
            loss: Tensor = self.loss(outputs, torch.stack(masks)[:, None])
            mean_loss.update(loss.expand(len(masks)))  # a weight is not looked at where NaN is kept
        for name, mask, content, logit in zip(batch.names, batch.masks, batch.contents, logits, strict=True):
            native = restore_size(logit, content, (mask.shape[0], mask.shape[1]))
            if at_native_size:
                mean_loss.update(self.loss(native[None], mask[None, None]))
            found = self.cleaning(*(part.cpu().numpy() for part in to_prediction(native)))
            values = scores(*map(torch.from_numpy, found), mask.cpu())
            rows[name] = {key: values[key].item() for key in scores.names}
        return rows

    def _log_scores(self, stage: str) -> Tensor:
        scores, mean_loss = self._metrics(stage)
        loss, values = mean_loss.compute(), scores.compute()
        if not self.trainer.sanity_checking:  # a batch of it is no score of anything
            self.log(f"{stage}/loss", loss)
            for name in scores.names:
                shown = stage == "val" and name == scores.primary
                self.log(f"{stage}/{name}", values[name].float(), prog_bar=shown)
        self.arrays = {key: value.cpu().numpy() for key, value in values.items() if key not in scores.names}
        mean_loss.reset()
        scores.reset()
        assert isinstance(loss, Tensor)
        return loss

    def scores_of(self, stage: str) -> Scores:
        """Return the scores of `val` or `test`."""
        scores = self.scores[stage]
        assert isinstance(scores, Scores)
        return scores

    def _metrics(self, stage: str) -> tuple[Scores, MeanMetric]:
        mean_loss = self.mean_loss[stage]
        assert isinstance(mean_loss, MeanMetric)
        return self.scores_of(stage), mean_loss


class BoxPrompted(SegmentationTask):
    """Scores with a prompt: the boxes of the parts of the true mask, whose masks are united."""

    def look(self, batch: Batch) -> Tensor:
        """Return the greatest of the logits of all objects [n, 1, s, s]."""
        prompts = [
            self._boxes(mask.cpu().numpy(), content)
            for mask, content in zip(batch.masks, batch.contents, strict=True)
        ]
        return self.segmenter.united(batch.images, prompts)

    def found(self, image: NDArray[np.uint8], mask: NDArray[np.uint8], predictor: Predictor) -> Found:
        """Return what is found with the boxes of the mask."""
        size = image.shape[0], image.shape[1]
        prompts = self._boxes(mask, predictor.resize.content(*size))
        return predictor.united(predictor.prepare(image), size, prompts)

    def _boxes(self, mask: NDArray[np.uint8], content: tuple[int, int]) -> list[Tensor]:
        boxes = torch.from_numpy(component_boxes(mask))
        placed = box_to_input(boxes, (mask.shape[0], mask.shape[1]), content)
        return [self.segmenter.embed(box[None, None]) for box in placed.to(self.device)]


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups: biases and norms, as released, take no weight decay.

    The first two, with and without decay, learn at the optimiser's own rate; those after them at a `multiple`
    of it, by which `configure_optimizers` scales them.
    """
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    plain = {name for name, p in trained if p.ndim < 2 or name.rsplit(".", 1)[-1] == "bias"}
    rates = learning_rates(module)
    groups: list[dict[str, Any]] = []
    for multiple in sorted({1.0, *rates.values()}, key=lambda multiple: (multiple != 1, multiple)):
        own = [(name, p) for name, p in trained if rates.get(name, 1.0) == multiple]
        extra = {} if multiple == 1 else {"multiple": multiple}
        decaying = {"params": [p for name, p in own if name not in plain], **extra}
        constant = {"params": [p for name, p in own if name in plain], "weight_decay": 0.0, **extra}
        groups += [group for group in (decaying, constant) if multiple == 1 or group["params"]]
    return groups


def check_agreement(kind: str, found: Mapping[str, str], expected: Mapping[str, str], way_out: str) -> None:
    """Compare what a checkpoint says of itself with what is in use.

    Args:
        kind: of thing that is compared, for the message.
        found: in the checkpoint.
        expected: in use.
        way_out: of the user.

    Raises:
        ValueError: they differ.
    """
    for key, value in expected.items():
        if found.get(key) != value:
            raise ValueError(
                f"the {kind} was trained on {key} {found.get(key, 'unknown')}, but here it is {value}; "
                f"{way_out}"
            )
