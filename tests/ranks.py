"""Work that two processes share as the ranks of one group."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed
from processes import CONTEXT
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from convlora.peft.method import aux_loss

Gradients = dict[str, Tensor | None]


def together(work: Callable[[int, Path], None], folder: Path) -> None:
    """Call `work(rank, folder)` in two processes, which meet in the folder."""
    ranks = [CONTEXT.Process(target=_join, args=(rank, work, folder)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]


def _join(rank: int, work: Callable[[int, Path], None], folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    work(rank, folder)
    torch.distributed.destroy_process_group()


def task_gradients(model: nn.Module, images: Tensor) -> Gradients:
    """Return what trained tensors learn from the task alone, of a pass without noise."""
    model.zero_grad()
    with patch("torch.randn_like", torch.zeros_like), patch("torch.nn.functional.dropout", _keep):
        output = model(images)
    aux = aux_loss(model)
    loss = output.square().mean()
    (loss if aux is None else loss + 0 * aux).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def _keep(x: Tensor, *_: Any) -> Tensor:
    return x


def learn_from_halves(rank: int, folder: Path) -> None:
    """Write what models learn by plain DDP in their second step; one that left out a tensor fails there."""
    models, images = torch.load(folder / "models.pt", weights_only=False)
    found = []
    for model in models:
        parallel = DistributedDataParallel(model)
        share = images.chunk(2)[rank]
        task_gradients(parallel, share)
        task_gradients(parallel, share)
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    torch.save(found, folder / f"{rank}.pt")
