"""A segmenter as an ONNX model, held against PyTorch's before it is handed out."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convlora.adapter import Adapter
from convlora.formats.graph import (
    BATCH,
    INPUT,
    OUTPUT,
    Trial,
    compare,
    quiet,
    record,
    refused,
)
from convlora.formats.readme import Form, facts, readme

NAME = "model.onnx"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
FORM = Form(
    file=NAME,
    kind="An ONNX model",
    imports="import onnxruntime",
    opening=f'model = onnxruntime.InferenceSession("{NAME}")',
    call=f'model.run(None, {{"{INPUT}": x[None]}})[0][0]',
    needs="onnxruntime, numpy and Pillow",
)


def check_packages() -> None:
    """Refuse to begin without the packages that write and run ONNX; raises ValueError."""
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(
                f"format=onnx: the package {name} is missing; install it by pip install 'convlora[onnx]'"
            ) from error


def write(adapter: Adapter, folder: Path, trial: Trial) -> str:
    """Write the model with a README beside it, and return what was measured.

    Weights beyond the 2 GB that a file of ONNX can hold lie in a second one, `model.onnx.data`.

    Raises:
        OSError: the disk is full.
        ValueError: the segmenter cannot be written as ONNX, or the model computes something else.
    """
    recorded = record(adapter)
    try:
        with quiet(), torch.no_grad():
            made = torch.onnx.export(
                recorded,
                (),
                dynamo=True,
                verbose=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: BATCH},),
            )
    except Exception as error:  # of many kinds, none of which says what to do
        raise refused("onnx", adapter, error) from error
    assert made is not None
    path = folder / NAME
    made.save(path, external_data=False)
    difference = compare("onnx", adapter.segmenter, open_model(path), trial)
    made.model.metadata_props.update(facts(adapter, difference, trial.source))
    made.save(path, external_data=False)
    (folder / "README.md").write_text(readme(adapter, FORM, difference, trial.source))
    return f"largest difference of the logits {difference:.1e}, on {trial.source}"


def open_model(path: Path) -> Callable[[Tensor], Tensor]:
    """Return what a model computes of images [n, 3, s, s], by onnxruntime on the CPU."""
    runtime: Any = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

    return run
