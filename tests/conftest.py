import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from hydra.utils import instantiate
from numpy.typing import NDArray
from PIL import Image

from convlora.data.sets.synthetic import draw_scene
from convlora.sam.zoo import Backbone, SamViT

torch.set_num_threads(1)  # models this small gain nothing from more, and lose when cores are busy
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).with_name("golden")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "slow" not in item.keywords)  # else one process waits for another at the end
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real images and weights, which are no part of the project."""
    folder = Path(os.environ.get("CONVLORA_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set CONVLORA_SHARED")
    return folder


TINY = SamViT(
    name="tiny",
    embed_dim=16,
    depth=2,
    num_heads=2,
    global_attn_indexes=(1,),
    image_size=32,
    patch_size=4,
    window_size=4,
    decoder_dim=32,
    decoder_mlp_dim=32,
)
"""A SAM of a few thousand parameters: windowed and global blocks, relative positions, grid 8 x 8."""


@pytest.fixture
def tiny() -> SamViT:
    return TINY


def from_conf(name: str) -> Backbone:
    """The backbone that conf/model/<name>.yaml describes."""
    config = yaml.safe_load((ROOT / f"conf/model/{name}.yaml").read_text())
    backbone: Backbone = instantiate(
        {key: value for key, value in config.items() if key != "defaults"}, _convert_="all"
    )
    return backbone


def golden(file: str, prefix: str = "") -> dict[str, NDArray[np.float32]]:
    """Reference arrays whose key starts with `prefix`, under the rest of the key."""
    with np.load(GOLDEN / file) as arrays:
        return {key.removeprefix(prefix): arrays[key] for key in arrays.files if key.startswith(prefix)}


@dataclass(frozen=True)
class Finished:
    """A command that ran to its end: what it printed and the code it exited with."""

    code: int
    out: str
    err: str


class Commands:
    """Runs the command lines in this process, from a folder of their own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self.monkeypatch = monkeypatch
        self.capsys = capsys

    def __call__(self, module: ModuleType, *arguments: str) -> Finished:
        self.monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
        self.capsys.readouterr()
        code, message = 0, ""
        try:
            module.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
            message = "" if isinstance(stop.code, int) else str(stop.code)
        out, err = self.capsys.readouterr()
        return Finished(code, out, err + message)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Commands:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return Commands(monkeypatch, capsys)


def train_in(folder: Path, *arguments: str) -> Path:
    """Train a run that the tests of a module share; returns where it is."""
    from convlora import train

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "offline")
        patch.setattr(sys, "argv", [train.__name__, *arguments, "run_dir=run"])
        train.main()
    return folder / "run"


def plant_test_set(root: Path, count: int) -> None:
    """Camouflaged scenes of different sizes in the layout of a test set."""
    rng = np.random.default_rng(count)
    for kind in ("Imgs", "GT"):
        (root / kind).mkdir(parents=True)
    for i in range(count):
        image, mask = draw_scene(rng, 48 + 8 * i)
        Image.fromarray(image).save(root / f"Imgs/{i}.jpg")
        Image.fromarray(mask * 255).save(root / f"GT/{i}.png")


SMALL = (
    "model.embed_dim=16",
    "model.depth=2",
    "model.num_heads=2",
    "model.global_attn_indexes=[1]",
    "model.decoder_dim=32",
    "model.decoder_mlp_dim=32",
    "model.image_size=64",
    "dataset.size=48",
    "dataset.train_size=10",
    "dataset.val_size=3",
    "dataset.test_size=5",
    "loading.batch_size=2",
    "loading.num_workers=0",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "optimizer.lr=1e-3",
)
"""A default job of a few seconds."""
