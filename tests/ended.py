"""Runs that have ended, as far as a report looks at them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from convlora import results
from convlora.results import Run
from convlora.run import METRICS, SUMMARY, write_json, write_record, write_rows

IMAGES = 12


def plant(
    folder: Path,
    arguments: str,
    seed: int,
    images: ArrayLike,
    settings: Mapping[str, object] | None = None,
    dataset: str = "kvasir",
    training: str = "8 (1f)",
    validation: float | None = None,
    **scores: float,
) -> Run:
    """A run that has ended with these scores of its test images, as far as a report looks at it.

    Its score in validation is that of the test where none is given.
    """
    folder.mkdir(parents=True)
    values = np.asarray(images, float)
    best = {"monitor": "val/dice", "mode": "max"}
    config = {"callbacks": {"best": best}, "seed": seed, **(settings or {})}
    write_record(folder, [*arguments.split(), f"seed={seed}"], config)
    rows = {f"{i:03}.png": {"dice": value, "ber": value} for i, value in enumerate(values.tolist())}
    write_rows(folder / "images.csv", "image", rows)
    test = {"loss": 0.5, "dice": float(values.mean()), **scores}
    costs = {"fit_seconds": 10.0 + seed, "trainable_parameters": 1000 + 10 * len(arguments)}
    best_of_validation = {"val/dice": float(values.mean()) if validation is None else validation}
    facts = {"dataset": dataset, "training images": training, "validation images": "2 (2f)"}
    facts |= {"base_sha256": "0f", "steps": 20}
    write_json(folder / SUMMARY, {**facts, "test": test, "test_sets": {}, **best_of_validation, **costs})
    (folder / METRICS).write_text("epoch,step,train/loss,val/dice\n0,4,0.5,\n0,9,,0.25\n1,19,,0.5\n")
    found = results.read(folder)
    assert found is not None
    return found


def drawn(seed: int, shift: float = 0.0, spread: float = 0.1) -> list[float]:
    rng = np.random.default_rng(seed)
    base = np.random.default_rng(0).uniform(0.3, 0.7, IMAGES)
    return (base + shift + rng.normal(0, spread, IMAGES)).tolist()
