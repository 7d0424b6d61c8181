"""How much memory a training takes at its peak, found out before it begins, and what makes it fit."""

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from convlora.announce import count_devices
from convlora.build import Parts, is_half, make_outline
from convlora.peft.method import aux_loss
from convlora.run import MEBIBYTE
from convlora.sam.zoo import Backbone
from convlora.task import parameter_groups

# Freed memory that is not given back, as a share of the tensors that a step without checkpointing holds at
# its peak. On a CPU the C library keeps those below 32 MiB in a heap with gaps, and hands greater ones back;
# on a GPU the allocator's blocks have gaps. Beside that, what kernels need; on a GPU also the context. Those
# of the CPU are such that no measurement of `python -m benchmarks.memory` lies above its estimate.
MAPPED = 32 * MEBIBYTE
GAPS = {"cpu": (1.6, 0.45), "cuda": (0.15, 0.15)}
RUNTIME = {"cpu": 205 * MEBIBYTE, "cuda": 640 * MEBIBYTE}

# What this program holds by itself, bytes: read when all it needs is loaded, and there is no model yet
PROGRAM = psutil.Process().memory_info().rss

GIBIBYTE = 1024 * MEBIBYTE
CONTAINER = Path("/sys/fs/cgroup")  # limits of a container, as seen in it
SMALLEST = 64  # pixels, below which no image is advised to be made smaller


@dataclass(frozen=True)
class Footprint:
    """The peak memory of a device in a training step.

    Attributes:
        program: what there is before there is a model, and what kernels need, bytes.
        weights: the model's tensors, frozen and trained, bytes.
        gradients: of the trained tensors, with the buffers in which several processes exchange them, bytes.
        optimizer: its state, bytes.
        held: sizes of the tensors that a step of one image holds at its peak, bytes.
        freed: sizes of those whose memory leaves gaps, bytes.
        gaps: how much of the freed ones, below `MAPPED` and from there on.
    """

    program: int
    weights: int
    gradients: int
    optimizer: int
    held: NDArray[np.int64]
    freed: NDArray[np.int64]
    gaps: tuple[float, float]

    def total(self, batch_size: int) -> int:
        """Return the peak with so many images a device, bytes."""
        return self.program + self.weights + self.gradients + self.optimizer + self.activations(batch_size)

    def activations(self, batch_size: int) -> int:
        """Return what a step holds for so many images, and the gaps that it leaves, bytes."""
        freed = batch_size * self.freed
        below, above = self.gaps
        gaps = np.where(freed < MAPPED, below, above) @ freed
        return batch_size * int(self.held.sum()) + int(gaps)

    def largest_batch(self, room: int) -> int:
        """Return how many images a device can take at a time; 0 where not even one fits."""
        least = int(self.held.sum() + min(self.gaps) * self.freed.sum())  # of an image in the greatest batch
        most = max(0, (room - self.total(0)) // least)
        return next(size for size in range(most, -1, -1) if size == 0 or self.total(size) <= room)


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the sizes of the tensors that are made while it is on, for as long as each lives.

    Args:
        known: tensors that do not count.
    """

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()  # type: ignore[no-untyped-call]
        self._changes: list[int] = []  # bytes, negative where a tensor ends
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self._changes.append(size)
            weakref.finalize(storage, self._end, key, size)

    def _end(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._changes.append(-size)

    def at_peak(self) -> NDArray[np.int64]:
        """Return the sizes of the tensors that lived when they held the most, bytes."""
        changes = np.array(self._changes, dtype=np.int64)
        changes = changes[: 1 + int(changes.cumsum().argmax())]
        sizes, counts = np.unique(np.abs(changes), return_counts=True)
        ended = np.array([np.count_nonzero(changes == -size) for size in sizes])
        return np.repeat(sizes, counts - 2 * ended)


def footprint_of(config: Any, parts: Parts) -> Footprint:
    """Return the peak memory of a device of this machine.

    Args:
        config: attributes by the names of the groups in conf/.
        parts: what is made of it.
    """
    precision = str(config.trainer["precision"])
    return footprint(parts, device_of(config), precision, count_devices(config.trainer, None))


def footprint(parts: Parts, device: str, precision: str, processes: int = 1) -> Footprint:
    """Follow a training step through tensors that have shapes and a device but no memory.

    What loader processes hold is not in it, nor what a test of very large images takes.

    Args:
        parts: of the training.
        device: cpu or cuda.
        precision: as Lightning names it.
        processes: that train together.
    """
    backbone = parts.backbone
    weights, gradients, optimizer, plain = _follow(
        parts, replace(backbone, activation_checkpointing=False), device, precision
    )
    step = _follow(parts, backbone, device, precision)[-1] if backbone.activation_checkpointing else plain
    return Footprint(
        program=RUNTIME[device] + (PROGRAM if device == "cpu" else 0),
        weights=weights,
        gradients=gradients * (2 if processes > 1 else 1),
        optimizer=optimizer,
        held=step,
        freed=plain,
        gaps=GAPS[device],
    )


def _follow(
    parts: Parts, backbone: Backbone, device: str, precision: str
) -> tuple[int, int, int, NDArray[np.int64]]:
    """Return the bytes of weights, gradients and the optimiser, and the tensors of a step of one image."""
    outline = make_outline(backbone, parts.method, parts.head, parts.data.num_classes)
    half = torch.float16 if precision.startswith("16") and device != "cpu" else torch.bfloat16
    with FakeTensorMode(allow_non_fake_inputs=True):
        segmenter = outline.to_empty(device=device).train()
        tensors = [*segmenter.parameters(), *segmenter.buffers()]
        shape = backbone.image_size, backbone.image_size
        with Live(tensors) as live:
            images = torch.empty(1, 3, *shape, device=device)
            masks = torch.empty(1, 1, *shape, dtype=torch.uint8, device=device)
            with torch.autocast(device, half, enabled=is_half(precision)):
                loss = parts.loss(segmenter.outputs(images), masks)
            aux = aux_loss(segmenter)
            (loss if aux is None else loss + aux).backward()
        optimizer = parts.optimizer(parameter_groups(segmenter))
        optimizer.step()
        gradients = [p.grad for p in segmenter.parameters() if p.grad is not None]
        return (
            _bytes(tensors),
            _bytes(gradients),
            _bytes(tree_leaves(list(optimizer.state.values()))),
            live.at_peak(),
        )


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(each.nbytes for each in tensors if isinstance(each, Tensor))


def available(device: str) -> int:
    """Return the bytes that a process can have on its device, those that this one holds included."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    free: int = psutil.virtual_memory().available
    limit = CONTAINER / "memory.max"
    if limit.is_file() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int((CONTAINER / "memory.current").read_text()))
    return free + int(psutil.Process().memory_info().rss)


def spell(size: int) -> str:
    """Return a number of bytes as a user reads it."""
    return f"{size / GIBIBYTE:.1f} GiB" if size >= GIBIBYTE else f"{size / MEBIBYTE:.0f} MiB"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error tells that memory ran out; on a CPU torch has only words for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def device_of(config: Any) -> str:
    """Return whether a training is on GPUs (cuda) or on the CPU (cpu) of this machine."""
    wants_gpu = config.trainer["accelerator"] in ("auto", "gpu", "cuda")
    return "cuda" if wants_gpu and torch.cuda.is_available() else "cpu"


def room_of(config: Any) -> int:
    """Return the bytes that each process of a training has on its device; those of a CPU share its memory."""
    device = device_of(config)
    nodes = config.trainer.get("num_nodes") or 1
    return available(device) // (count_devices(config.trainer, None) // nodes if device == "cpu" else 1)


def shortage(config: Any, parts: Parts) -> str:
    """Say in a line how much memory a training needs that has too little, and what to set.

    Args:
        config: attributes by the names of the groups in conf/.
        parts: what is made of it.
    """
    batch, room = config.loading["batch_size"], room_of(config)
    total = footprint_of(config, parts).total(batch)
    # where it should fit, another program has the memory, or a limit of the shell keeps it
    settings = advise(config, parts, min(room, total - 1))
    return (
        f"a step of {batch} image{'s' * (batch > 1)} needs about {spell(total)} a device, {spell(room)} are "
        f"free; {f'set {settings}' if settings else 'take a smaller model, or more memory'}"
    )


def advise(config: Any, parts: Parts, room: int) -> str:
    """Return the settings by which a training fits that does not; "" where none do.

    Those that keep the batch whole come first: half precision on a GPU, then checkpointing. After them come
    smaller batches whose gradients add up to the same, and at last smaller images.

    Args:
        config: attributes by the names of the groups in conf/.
        parts: what is made of it.
        room: bytes of each process.
    """
    batch, device = config.loading["batch_size"], device_of(config)
    processes = count_devices(config.trainer, None)
    divisors = [size for size in range(batch, 0, -1) if batch % size == 0]

    def part_of_batch(step: _Step) -> int:
        """Return how much of a batch fits at a time, or 0."""
        needed = footprint(step.parts, device, step.precision, processes)
        return next((size for size in divisors if needed.total(size) <= room), 0)

    def spelt(step: _Step, part: int) -> str:
        accumulated = config.trainer["accumulate_grad_batches"] * batch // part
        parted = [f"loading.batch_size={part}", f"trainer.accumulate_grad_batches={accumulated}"]
        return " ".join([*step.settings, *(parted if part < batch else [])])

    steps = list(_thriftier(parts, device, str(config.trainer["precision"])))
    found = [(step, part_of_batch(step)) for step in steps]
    for least in (batch, 1):
        for step, part in found:
            if part >= least:
                return spelt(step, part)
    last = steps[-1]
    size = last.parts.backbone.image_size
    while (size := size // 2 // 64 * 64) >= SMALLEST:
        backbone = replace(last.parts.backbone, image_size=size)
        if part := part_of_batch(replace(last, parts=replace(last.parts, backbone=backbone))):
            return f"{spelt(last, part)} model.image_size={size}"
    return ""


@dataclass(frozen=True)
class _Step:
    """Settings that take less memory, and what becomes of a training by them."""

    settings: tuple[str, ...]
    parts: Parts
    precision: str


def _thriftier(parts: Parts, device: str, precision: str) -> Iterator[_Step]:
    """Yield a training as it is, then with one setting more at a time."""
    settings: tuple[str, ...] = ()
    yield _Step(settings, parts, precision)
    if device != "cpu" and not is_half(precision):
        settings, precision = (*settings, "trainer.precision=bf16-mixed"), "bf16-mixed"
        yield _Step(settings, parts, precision)
    if not parts.backbone.activation_checkpointing:
        settings = (*settings, "model.activation_checkpointing=true")
        parts = replace(parts, backbone=replace(parts.backbone, activation_checkpointing=True))
        yield _Step(settings, parts, precision)
