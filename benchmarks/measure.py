"""How things are measured: alternately in one run, medians and ratios, one JSON file per benchmark."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
MEBIBYTE = 2**20


def default_device() -> str:
    """Return a GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine(device: str) -> str:
    """Say where a measurement was taken."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


def warm_heap() -> None:
    """Make the C library keep freed memory, as in a long run; else page faults are what is measured."""
    torch.ones(31 * MEBIBYTE // 4)


def seconds(call: Callable[[], Any], device: str, repeat: int = 1) -> float:
    """Return how long one call takes, of several in a row."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeat


def alternate(
    calls: Mapping[str, Callable[[], Any]], rounds: int, device: str, repeat: int = 1
) -> dict[str, list[float]]:
    """Time the calls in turn, round by round after one that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 1):
        for name, call in calls.items():
            value = seconds(call, device, repeat)
            if index:
                taken[name].append(value)
    return taken


def ratio(taken: Mapping[str, Sequence[float]], name: str, to: str) -> float:
    """Return the median over rounds of one call's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(taken[name], taken[to], strict=True))


def memory(field: str) -> float:
    """Return a figure of this process from Linux, MiB: VmRSS is held now, VmHWM was the most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def report(name: str, title: str, rows: Sequence[Mapping[str, Any]], device: str) -> None:
    """Print rows as a table and write them to results/<name>.json with where they were taken."""
    table = Table(*rows[0], title=f"{title}\n{machine(device)}", title_justify="left")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    RESULTS.mkdir(exist_ok=True)
    record = {"title": title, "machine": machine(device), "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
