"""Work that two processes share as the ranks of one group."""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed
from lightning.pytorch.utilities import rank_zero_only
from processes import CONTEXT
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from convlora.peft.method import aux_loss
from convlora.segmenter import Segmenter

RANKS = 2


def together(work: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """Call `work(rank, folder, *arguments)` in two processes, which meet in the folder."""
    ranks = [CONTEXT.Process(target=_join, args=(rank, work, folder, arguments)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert not any(process.exitcode for process in ranks)


def _join(rank: int, work: Callable[..., None], folder: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    meeting = folder / "meeting"
    torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=RANKS)
    work(rank, folder, *arguments)
    torch.distributed.destroy_process_group()


def command(rank: int, folder: Path, module: str, *arguments: str) -> None:
    """Be one of the two processes of `python -m MODULE ARGUMENTS` in a folder."""
    os.environ["LOCAL_RANK"] = str(rank)  # tells Lightning that the other has been started
    rank_zero_only.rank = rank
    os.chdir(folder)
    sys.argv = [module, *arguments, f"trainer.devices={RANKS}"]
    importlib.import_module(module).main()


def task_gradients(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return what trained tensors learn from the task alone, of a pass without noise."""
    model.zero_grad()
    with patch("torch.randn_like", torch.zeros_like), patch("torch.nn.functional.dropout", _keep):
        output = model(images)
    loss, aux = output.square().mean(), aux_loss(model)
    (loss if aux is None else loss + 0 * aux).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _keep(x: Tensor, *_: Any) -> Tensor:
    return x


def learn_from_halves(rank: int, folder: Path) -> None:
    """Write what models learn by plain DDP in their second step; one that left out a tensor fails there."""
    models, images = torch.load(folder / "models.pt", weights_only=False)
    share, found = images.chunk(RANKS)[rank], []
    for model in models:
        parallel = DistributedDataParallel(model)
        task_gradients(parallel, share)
        learnt = task_gradients(parallel, share)
        found.append({name.removeprefix("module."): gradient for name, gradient in learnt.items()})
    torch.save(found, folder / f"{rank}.pt")


class LossOf(nn.Module):
    """A loss of what a segmenter makes of images."""

    def __init__(self, segmenter: Segmenter, loss: nn.Module):
        super().__init__()
        self.segmenter = segmenter
        self.loss = loss

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        given = self.segmenter.for_loss(self.loss, self.segmenter.outputs(images))
        loss: Tensor = self.loss(given, masks)
        return loss

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.named_parameters() if p.grad is not None}


def descend_on_halves(rank: int, folder: Path) -> None:
    """Write the gradients of a `LossOf` that plain DDP finds, in its second step."""
    module, images, masks = torch.load(folder / "step.pt", weights_only=False)
    parallel = DistributedDataParallel(module)
    for _ in range(2):
        module.zero_grad()
        parallel(images.chunk(RANKS)[rank], masks.chunk(RANKS)[rank]).backward()
    torch.save(module.gradients(), folder / f"{rank}.pt")
