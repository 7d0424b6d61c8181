"""What memory there is for a training, and by which settings one that needs more fits."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from convlora.announce import count_devices
from convlora.build import Parts, is_half
from convlora.memory import Footprint, footprint
from convlora.run import MEBIBYTE

GIBIBYTE = 1024 * MEBIBYTE
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
SMALLEST = 64  # pixels, below which no image is advised to be made smaller


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


def footprint_of(config: Any, parts: Parts) -> Footprint:
    """Return the peak memory of a device of this machine.

    Args:
        config: attributes by the names of the groups in conf/.
        parts: what is made of it.
    """
    precision = str(config.trainer["precision"])
    return footprint(parts, device_of(config), precision, count_devices(config.trainer, None))


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
