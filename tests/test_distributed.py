import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL


@pytest.mark.slow
def test_two_ranks_train_one_model(tmp_path: Path) -> None:
    """Plain DDP: every parameter is used, each rank sees its share, one set of files is left."""
    job = [*SMALL, "trainer.devices=2", "trainer.strategy=ddp", "run_dir=run", "logger=csv"]
    command = [sys.executable, "-m", "convlora.train", *job]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["steps"] == 2 * 3  # 10 images on two ranks, two at a time
    assert 0 <= summary["test"]["dice"] <= 1
    state = torch.load(tmp_path / "run/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.isfinite(value).all() for value in state.values())
    assert (tmp_path / "run/adapter.safetensors").is_file()
    assert (tmp_path / "run/overlays.png").is_file()
