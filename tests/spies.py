"""What tests add to a run by `callbacks.NAME._target_=spies...` and `peft.gate._target_=spies...`."""

from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from convlora.peft.gating import Gate, Routes


class Interrupt(Callback):
    """Ends the run at the start of its second epoch, where there is a file of that name; removes the file."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1 and Path("interrupt").exists():
            Path("interrupt").unlink()
            raise OSError("interrupted")


class Poison(Callback):
    """Makes the images, or the gradients, of one batch NaN."""

    def __init__(self, what: Literal["images", "gradients"], epoch: int, batch: int):
        self.what = what
        self.position = (epoch, batch)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.now = (trainer.current_epoch, batch_idx)
        if self.what == "images" and self.now == self.position:
            batch.images.fill_(torch.nan)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.what == "gradients" and self.now == self.position:
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(torch.nan)


class Noise(Callback):
    """Saves what random numbers each training step of each rank would draw next."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.drawn: list[Tensor] = []
        trained = pl_module.get_submodule("segmenter.mask_decoder.transformer")
        trained.register_forward_pre_hook(lambda module, _: self.draw() if module.training else None)

    def draw(self) -> None:
        with torch.random.fork_rng():
            self.drawn.append(torch.randn(4))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.save(torch.stack(self.drawn), Path(trainer.default_root_dir, f"noise-{trainer.global_rank}.pt"))


class NoSearch(Callback):
    """Fails where each step looks for parameters that it did not use."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert trainer.strategy.model.find_unused_parameters is False


class SteadyGate(Gate):
    """Routes without noise, balance loss or parameters: by a fixed projection of each map's mean."""

    def build(self, channels: int, num_experts: int) -> "SteadyRoutes":
        return SteadyRoutes(channels, num_experts)


class SteadyRoutes(nn.Module):
    directions: Tensor

    def __init__(self, channels: int, num_experts: int):
        super().__init__()
        directions = torch.randn(channels, num_experts, generator=torch.Generator().manual_seed(0))
        self.register_buffer("directions", directions, persistent=False)

    def forward(self, z: Tensor) -> Routes:
        choice = (z.mean(dim=(1, 2)) @ self.directions).argmax(dim=1, keepdim=True)
        return Routes(choice, torch.ones_like(choice, dtype=z.dtype))
