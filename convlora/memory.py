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
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from convlora.announce import count_devices
from convlora.build import Parts, is_half, make_outline
from convlora.peft.method import aux_loss
from convlora.run import MEBIBYTE, count
from convlora.task import parameter_groups

# Freed memory that is not given back, as a share of the tensors that a step without checkpointing holds at
# its peak. On a CPU the C library keeps those below 32 MiB in a heap with gaps, and hands greater ones back;
# on a GPU the allocator's blocks have gaps. Beside that, what kernels need; on a GPU also the context. Those
# of the CPU are such that no measurement of `python -m benchmarks.memory` lies above its estimate.
MAPPED = 32 * MEBIBYTE
GAPS = {"cpu": (1.8, 0.4), "cuda": (0.15, 0.15)}
RUNTIME = {"cpu": 128 * MEBIBYTE, "cuda": 640 * MEBIBYTE}

# What this program holds by itself, bytes: read when all it needs is loaded, and there is no model yet
PROGRAM = psutil.Process().memory_info().rss

GIBIBYTE = 1024 * MEBIBYTE
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
SMALLEST = 64  # pixels, below which no image is advised to be made smaller


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
        gaps: how much of the freed ones, below `MAPPED` and from there on.
        loading: what the program holds while it loads the weights, bytes.
    """

    program: int
    weights: int
    gradients: int
    optimizer: int
    constants: int
    held: NDArray[np.int64]
    freed: NDArray[np.int64]
    gaps: tuple[float, float]
    loading: int

    def total(self, batch_size: int) -> int:
        """Return the peak with so many images a device, bytes."""
        state = self.program + self.weights + self.gradients + self.optimizer
        return max(self.loading, state + self.activations(batch_size))

    def activations(self, batch_size: int) -> int:
        """Return what a step holds for so many images, and the gaps that it leaves, bytes."""
        freed = batch_size * self.freed
        below, above = self.gaps
        gaps = np.where(freed < MAPPED, below, above) @ freed
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
                loss = parts.loss(segmenter.outputs(images), masks)
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


def available(device: str) -> int:
    """Return the bytes that a process can have on its device, those that this one holds included."""
    if device == "cuda":  # of the fullest
        free = [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]
        return min(free) + torch.cuda.memory_reserved()
    limits = [free for free in map(left_by_limit, limited_groups()) if free is not None]
    return int(min([psutil.virtual_memory().available, *limits]) + psutil.Process().memory_info().rss)


def limited_groups() -> Iterator[Path]:
    """Yield the folders in which Linux tells the limits of this process: a container's, a cluster job's."""
    try:
        lines = (PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = CGROUPS / controllers
            inner = root / path.lstrip("/")
            yield from (each for each in (inner, *inner.parents) if each.is_relative_to(root))


def left_by_limit(group: Path) -> int | None:
    """Return the bytes that a group of processes has left, files in memory being given up; None: no limit."""
    for limit, usage, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, used = (group / limit).read_text(), int((group / usage).read_text())
            lines = (group / "memory.stat").read_text().splitlines()
        except OSError:
            continue
        files = dict(line.split() for line in lines).get(cache, 0)
        return None if most.strip() == "max" else int(most) - used + int(files)
    return None


def spell(size: int) -> str:
    """Return a number of bytes as a user reads it."""
    return f"{size / GIBIBYTE:.1f} GiB" if size >= GIBIBYTE else f"{size / MEBIBYTE:.0f} MiB"


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
    needed = footprint_of(config, parts)
    total, half = needed.total(batch), needed.total(0) + needed.activations(batch) // 2
    settings = advise(config, parts, room if total > room else half)
    least = "" if total > room else ", of which a limit or another program takes a part"
    way_out = f"set {settings}" if settings else "take a smaller model, or more memory"
    images = f"{batch} image{'s' * (batch > 1)}"
    return f"a step of {images} needs about {spell(total)} a device, {spell(room)} are free{least}; {way_out}"


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
    size, patch = last.parts.backbone.image_size, last.parts.backbone.patch_size
    while (size := size // 2 // patch * patch) >= SMALLEST:
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
