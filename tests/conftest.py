import os
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from convlora.sam.zoo import SamViT

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).with_name("golden")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
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


@pytest.fixture
def tiny() -> SamViT:
    """A SAM of a few thousand parameters: windowed and global blocks, relative positions, grid 8 x 8."""
    return SamViT(
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


def golden(file: str, prefix: str = "") -> dict[str, NDArray[np.float32]]:
    """Reference arrays whose key starts with `prefix`, under the rest of the key."""
    with np.load(GOLDEN / file) as arrays:
        return {key.removeprefix(prefix): arrays[key] for key in arrays.files if key.startswith(prefix)}
