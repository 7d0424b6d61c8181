"""A run that was stopped and goes on is the run that was never stopped."""

import csv
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, SMALL, Commands
from PIL import Image
from processes import Training

from convlora import adapter, evaluate, export, predict, run, train
from convlora.cli import FOLDER_NAME, folder_name

EPOCHS, STEPS = 4, 4
JOB = (
    *SMALL,
    "logger=csv",
    "dataset.train_size=8",
    "dataset.val_size=2",
    "dataset.test_size=2",
    f"trainer.max_epochs={EPOCHS}",
    "trainer.log_every_n_steps=1",
)
WORKERS = ("loading.num_workers=2",)
EVERYTHING = (
    *WORKERS,
    "trainer.precision=bf16-mixed",
    "trainer.accumulate_grad_batches=2",
    "model.activation_checkpointing=true",
    "augment=strong",
    "resize=longest_side",
    "peft.gate.top_k=2",
)


class Whole:
    """Uninterrupted runs, each trained once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.runs: dict[tuple[str, ...], Path] = {}

    def __call__(self, *settings: str) -> Path:
        if settings not in self.runs:
            path = self.folder / f"whole{len(self.runs)}"
            done = Training(self.folder, (*JOB, *settings, f"run_dir={path}")).ended()
            assert done.code == 0, done.err
            self.runs[settings] = path
        return self.runs[settings]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole"))


def same(one: Any, other: Any) -> bool:
    """Whether two checkpoints, or parts of them, are equal to the last bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def checkpoint(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def differences(one: Path, other: Path) -> list[str]:
    """What two runs that have ended do not have in common of all that follows from their settings."""
    found = []
    for name in ("last.ckpt", "best.ckpt"):
        a, b = checkpoint(one / name), checkpoint(other / name)
        parts = ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step", "facts")
        found += [f"{name}: {part}" for part in parts if not same(a[part], b[part])]
    a, b = (json.loads((each / "summary.json").read_text()) for each in (one, other))
    found += [f"summary: {key}" for key in a if key != "fit_seconds" and a[key] != b.get(key)]
    a, b = (list(csv.DictReader((each / "metrics.csv").open())) for each in (one, other))
    return found + ([] if a == b else ["metrics.csv"])


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize("settings", [(), EVERYTHING], ids=["plain", "everything"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, whole: Whole, settings: tuple[str, ...]) -> None:
    begun = Training(tmp_path, (*JOB, *settings, "run_dir=run"))
    begun.until((tmp_path / "run/last.ckpt").is_file).kill()
    assert 0 < checkpoint(tmp_path / "run/last.ckpt")["epoch"] + 1 < EPOCHS
    resumed = Training(tmp_path, ("resume=run",)).ended()
    assert resumed.code == 0, resumed.err
    assert differences(tmp_path / "run", whole(*settings)) == []


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_as_if_nothing_had_been(tmp_path: Path, whole: Whole) -> None:
    """CONVLORA_KILLS=20 tries more runs than three."""
    start = time.monotonic()
    expected = whole(*WORKERS)
    seconds, draw = time.monotonic() - start, random.Random(0)
    for number in range(int(os.environ.get("CONVLORA_KILLS", "3"))):
        path, moments = tmp_path / f"run{number}", []
        for kill in range(draw.randint(1, 3) + 1):
            arguments = (f"resume={path}",) if (path / "config.yaml").is_file() else (
                *JOB, *WORKERS, f"run_dir={path}")  # fmt: skip
            training = Training(tmp_path, arguments)
            if kill < 3:
                moments.append(draw.uniform(0, seconds))
                training.process.join(moments[-1])
                training.kill()
        done = training.ended() if training.process.exitcode == 0 else Training(tmp_path, arguments).ended()
        assert done.code == 0, done.err
        assert differences(path, expected) == [], moments
