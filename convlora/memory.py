"""How much memory a training takes at its peak, found out before it begins."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from convlora.build import Parts, is_half, make_outline
from convlora.peft.method import aux_loss
from convlora.run import MEBIBYTE, count
from convlora.task import parameter_groups

# Freed memory that is not given back, as a share of the tensors that a step without checkpointing holds at
# its peak. On a CPU the C library keeps those below 32 MiB in a heap, where greater ones leave greater gaps,
# and hands back those from 32 MiB on; on a GPU the allocator's blocks have gaps. Beside that, what kernels
# need; on a GPU also the context. Those of the CPU are such that no training of SAM measured by
# `python -m benchmarks.memory` lies above its estimate.
MAPPED = 32 * MEBIBYTE
GAPS = {"cpu": (1.2, 3.6, 0.4), "cuda": (0.15, 0.0, 0.15)}
RUNTIME = {"cpu": 128 * MEBIBYTE, "cuda": 640 * MEBIBYTE}

# What this program holds by itself, bytes: read when all it needs is loaded, and there is no model yet
PROGRAM = psutil.Process().memory_info().rss


@dataclass(frozen=True)
class Footprint:
    """The peak memory of a device in a training step.

    Attributes:
        program: what there is before there is a model, and what kernels need, bytes.
        weights: the model's tensors, frozen and trained, bytes.
        gradients: of the trained tensors, with the buffers in which several processes exchange them, bytes.
        optimizer: its state, bytes.
        constants: what a step holds whatever the batch, such as weights cast to half precision, bytes.
        held: sizes of the tensors that a step of one image holds at its peak, bytes.
        freed: sizes of those whose memory leaves gaps, bytes.
        gaps: a and b of the share a + b (size / `MAPPED`)^2 of the freed ones below that size, and the share
            of those above.
        loading: what the program holds while it loads the weights, bytes.
    """

    program: int
    weights: int
    gradients: int
    optimizer: int
    constants: int
    held: NDArray[np.int64]
    freed: NDArray[np.int64]
    gaps: tuple[float, float, float]
    loading: int

    def total(self, batch_size: int) -> int:
        """Return the peak with so many images a device, bytes."""
        state = self.program + self.weights + self.gradients + self.optimizer
        return max(self.loading, state + self.activations(batch_size))

    def activations(self, batch_size: int) -> int:
        """Return what a step holds for so many images, and the gaps that it leaves, bytes."""
        freed, (least, more, above) = batch_size * self.freed, self.gaps
        gaps = np.where(freed < MAPPED, least + more * (freed / MAPPED) ** 2, above) @ freed
        return self.constants + batch_size * int(self.held.sum()) + int(gaps)

    def largest_batch(self, room: int) -> int:
        """Return how many images a device can take at a time; 0 where not even one fits."""
        least = int(self.held.sum() + min(self.gaps) * self.freed.sum())  # of an image in the greatest batch
        most = max(0, room // least)
        return next((size for size in range(most, 0, -1) if self.total(size) <= room), 0)


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the sizes of the tensors that are made while it is on, for as long as each lives.

    Args:
        images: those from which on all grows with the batch: an operation's output does where an input does.
        known: tensors that do not count.
        kind: of tensors that count; constants that a step has no need to follow are real among fake ones.
    """

    def __init__(self, images: Iterable[Tensor], known: Iterable[Tensor], kind: type[Tensor] = FakeTensor):
        super().__init__()  # type: ignore[no-untyped-call]
        self.kind = kind
        self._changes: list[tuple[int, int, bool]] = []  # number, bytes (negative at its end), grows or not
        self._growing = {_storage(each): False for each in known} | {_storage(each): True for each in images}
        self._numbers: dict[int, int] = {}  # of what lives, by storage, whose address another may have later

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        grows = any(self._growing.get(_storage(each), False) for each in given)
        for leaf in tree_leaves(out):
            if isinstance(leaf, self.kind):
                self._add(leaf.untyped_storage(), grows)
        return out

    def _add(self, storage: torch.UntypedStorage, grows: bool) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._growing:
            self._growing[key] = grows
            self._numbers[key] = len(self._changes)
            self._changes.append((self._numbers[key], size, grows))
            weakref.finalize(storage, self._end, key, size, grows)

    def _end(self, key: int, size: int, grows: bool) -> None:
        del self._growing[key]
        self._changes.append((self._numbers.pop(key), -size, grows))

    def at_peak(self, without: Iterable[Tensor] = ()) -> tuple[NDArray[np.int64], int]:
        """Return what lived when the tensors held the most, those that still live and are left out apart.

        Returns:
            The bytes of each tensor that grows with the batch, and of all others together.
        """
        left_out = {self._numbers.get(_storage(each)) for each in without}
        changes = [each for each in self._changes if each[0] not in left_out]
        peak = int(np.cumsum([size for _, size, _ in changes]).argmax())
        alive: dict[int, tuple[int, bool]] = {}
        for number, size, grows in changes[: peak + 1]:
            if size < 0:
                del alive[number]
            else:
                alive[number] = size, grows
        growing = np.array([size for size, grows in alive.values() if grows], dtype=np.int64)
        return growing, sum(size for size, grows in alive.values() if not grows)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def footprint(parts: Parts, device: str, precision: str, processes: int = 1) -> Footprint:
    """Follow a training step through tensors that have shapes and a device but no memory.

    What loader processes hold is not in it, nor what a test of very large images takes.

    Args:
        parts: of the training.
        device: cpu or cuda.
        precision: as Lightning names it.
        processes: that train together.
    """
    step = freed = _follow(parts, device, precision)
    if device == "cpu" and parts.backbone.activation_checkpointing:
        plain = replace(parts.backbone, activation_checkpointing=False)
        freed = _follow(replace(parts, backbone=plain), device, precision)
    program = RUNTIME[device] + (PROGRAM if device == "cpu" else 0)
    copies = 1 if parts.backbone.is_random else 2  # the model's, and that of the file
    return Footprint(
        program=program,
        weights=step.weights,
        gradients=step.gradients * (2 if processes > 1 else 1),
        optimizer=step.optimizer,
        constants=step.constants,
        held=step.held,
        freed=freed.held,
        gaps=GAPS[device],
        loading=program + copies * 4 * count(parts.outline) if device == "cpu" else 0,
    )


@dataclass(frozen=True)
class _Followed:
    """A step of one image: `held` is the size of each tensor that grows with the batch, the rest are sums."""

    weights: int
    gradients: int
    optimizer: int
    constants: int
    held: NDArray[np.int64]


def _follow(parts: Parts, device: str, precision: str) -> _Followed:
    outline = make_outline(parts.backbone, parts.method, parts.head, parts.data.num_classes)
    side = parts.backbone.image_size
    half = torch.float16 if precision.startswith("16") and device != "cpu" else torch.bfloat16
    with FakeTensorMode(allow_non_fake_inputs=True):
        segmenter = outline.to_empty(device=device).train()
        tensors = [*segmenter.parameters(), *segmenter.buffers()]
        images = torch.empty(1, 3, side, side, device=device)
        masks = torch.empty(1, 1, side, side, dtype=torch.uint8, device=device)
        with Live([images, masks], tensors) as live:
            with torch.autocast(device, half, enabled=is_half(precision)):
                outputs = segmenter.outputs(images)
                loss = parts.loss(segmenter.for_loss(parts.loss, outputs), masks)
            aux = aux_loss(segmenter)
            (loss if aux is None else loss + aux).backward()
        gradients = [p.grad for p in segmenter.parameters() if p.grad is not None]
        held, constants = live.at_peak(without=gradients)
        optimizer = parts.optimizer(parameter_groups(segmenter))
        optimizer.step()
        return _Followed(
            weights=_bytes(tensors),
            gradients=_bytes(gradients),
            optimizer=_bytes(tree_leaves(list(optimizer.state.values()))),
            constants=constants,
            held=np.append(held, [images.nbytes, masks.nbytes]),
        )


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(each.nbytes for each in tensors if isinstance(each, Tensor))
