"""Lightning's checkpoints of a run: written whole, read without running code, fit to go on from."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from convlora.task import SegmentationTask, check_agreement


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a Lightning checkpoint of this library, without running code.

    Raises:
        ValueError: the file is damaged or no such checkpoint.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{path} is no checkpoint or is damaged; train anew in another run_dir") from error
    if not isinstance(checkpoint, dict) or "metadata" not in checkpoint:
        raise ValueError(f"{path} is no checkpoint of this version; train anew in another run_dir")
    return checkpoint


def check_resumable(checkpoint: Mapping[str, Any], task: SegmentationTask, path: Path) -> None:
    """Refuse a checkpoint of other base weights, data or devices, or of other trained tensors.

    Raises:
        ValueError: it is one.
    """
    way_out = "resume as it was begun, or train anew in another run_dir"
    check_agreement(f"run in {path.parent}", checkpoint["facts"], task.facts, way_out)
    task.segmenter.check_trainable_state(checkpoint["state_dict"])


def next_epoch(checkpoint: Mapping[str, Any]) -> int:
    """Return the epoch, from 0, that a run which is resumed from the checkpoint trains first."""
    return int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside the one it replaces, so that a run that is killed never leaves half a file.

    Lightning's own goes by way of the folder for temporary files, which may lie on another disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        new = Path(f"{path}.new")
        torch.save(checkpoint, new)
        new.replace(path)


class RunCheckpoint(ModelCheckpoint):
    """A checkpoint under one name in the run folder, which may have been moved since it was saved.

    Args:
        name: of the file, less its suffix.
        monitor: the score by which it is the best so far; None keeps the last.
        mode: `max` where a greater score is better, else `min`.
    """

    def __init__(self, name: str, monitor: str | None = None, mode: str = "min"):
        super().__init__(
            None, name, monitor, mode=mode, enable_version_counter=False, save_on_train_epoch_end=True
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.dirpath = trainer.default_root_dir
        super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score so far; the files lie in the present folder."""

        def moved(path: str) -> str:
            return str(Path(str(self.dirpath), Path(path).name)) if path else ""

        paths = {key: moved(state_dict[key]) for key in state_dict if key.endswith("_path")}
        scores = {moved(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "dirpath": self.dirpath, "best_k_models": scores})


class StayStopped(Callback):
    """Ends a resumed run at once that early stopping had ended; Lightning would train another epoch."""

    stopped = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        return {"stopped": self.trainer.should_stop}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.stopped = state_dict["stopped"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.should_stop or self.stopped
