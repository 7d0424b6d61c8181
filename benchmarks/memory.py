"""The peak memory of real trainings on a CPU over the doctor's estimate: `python -m benchmarks.memory`.

Each training is a process of its own, on drawn images with random weights: two steps, a validation, a test.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from benchmarks.measure import report
from convlora.advice import GIBIBYTE, footprint_of
from convlora.build import CONF, make_parts
from convlora.schema import check_keys, resolve
from convlora.train import TrainConfig

SHORT = ("limit_train_batches=2", "limit_val_batches=1", "limit_test_batches=1", "max_epochs=1")
COMMON = (
    *(
        "model.url=null",
        "dataset=synthetic",
        "loading.num_workers=0",
        "logger=csv",
        "trainer.accelerator=cpu",
    ),
    *(f"++trainer.{each}" for each in SHORT),
)
CHECKPOINTING = "model.activation_checkpointing=true"
TRAININGS = [
    *(
        ("model=sam_vit_b", f"model.image_size={size}", "loading.batch_size=1", *extra)
        for size in (448, 1024)
        for extra in ((), (CHECKPOINTING,))
    ),
    ("model=sam_vit_b", "model.image_size=448", "loading.batch_size=4"),
    ("model=sam_vit_b", "model.image_size=448", "loading.batch_size=1", "peft=decoder_only"),
    ("model=mobile_sam", "model.image_size=256", "loading.batch_size=4"),
    ("model=mobile_sam", "model.image_size=512", "loading.batch_size=4"),
]


def estimated(arguments: tuple[str, ...]) -> float:
    """Return what the doctor says that a training needs, GiB."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("train", list(arguments), return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    settings = resolve(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))
    made = TrainConfig(**check_keys("", TrainConfig, settings))
    return footprint_of(made, make_parts("train", made)).total(made.loading["batch_size"]) / GIBIBYTE


def measured(arguments: tuple[str, ...]) -> float:
    """Return the peak of a training's process, GiB."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "convlora.train", *arguments, f"run_dir={folder}/run"]
        with Path(folder, "log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(Path(folder, "log").read_text())
    return usage.ru_maxrss * 1024 / GIBIBYTE


def main() -> None:
    """Measure, print the table and write the results."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows: list[dict[str, Any]] = []
    for training in TRAININGS:
        arguments = (*training, *COMMON)
        row: dict[str, Any] = {"training": " ".join(training), "GiB": measured(arguments)}
        row["estimated, GiB"] = estimated(arguments)
        row["estimated / measured"] = row["estimated, GiB"] / row["GiB"]
        rows.append(row)
        print(row, flush=True)
    report("memory", "Peak memory of a training on a CPU", rows, "cpu")


if __name__ == "__main__":
    main()
