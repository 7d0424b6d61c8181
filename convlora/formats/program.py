"""A segmenter as a program that PyTorch alone runs, `torch.export`'s."""

import io
from pathlib import Path

import torch

from convlora.adapter import Adapter
from convlora.formats.graph import Trial, compare, quiet, record
from convlora.formats.readme import Form, readme

NAME = "model.pt2"
FORM = Form(
    file=NAME,
    kind="A program of torch.export",
    imports="import torch",
    opening=f'model = torch.export.load("{NAME}").module()',
    call="model(torch.from_numpy(x[None])).numpy()[0]",
    needs="torch, numpy and Pillow",
)


def write(adapter: Adapter, folder: Path, trial: Trial) -> str:
    """Write the program with a README beside it, and return what was measured.

    Raises:
        OSError: the disk is full.
        ValueError: the segmenter cannot be recorded, or the program computes something else.
    """
    recorded = record(adapter)
    written = io.BytesIO()  # PyTorch's own writer meets a full disk with a crash
    with quiet():
        torch.export.save(recorded, written)
    (folder / NAME).write_bytes(written.getbuffer())
    with quiet():
        program = torch.export.load(folder / NAME).module()
    difference = compare("torch", adapter.segmenter, program, trial)
    (folder / "README.md").write_text(readme(adapter, FORM, difference, trial.source))
    return f"largest difference of the logits {difference:.1e}, on {trial.source}"
