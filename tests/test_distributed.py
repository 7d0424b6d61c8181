import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, Commands
from ranks import command, together

from convlora import train


@pytest.mark.slow
def test_two_ranks_train_one_model(tmp_path: Path) -> None:
    """Plain DDP: every parameter is used, each rank sees its share, one set of files is left."""
    job = [*SMALL, "trainer.devices=2", "trainer.strategy=ddp", "run_dir=run", "logger=csv"]
    arguments = [sys.executable, "-m", "convlora.train", *job]
    subprocess.run(arguments, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["steps"] == 2 * 3  # 10 images on two ranks, two at a time
    assert 0 <= summary["test"]["dice"] <= 1
    state = torch.load(tmp_path / "run/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.isfinite(value).all() for value in state.values())
    assert (tmp_path / "run/adapter.safetensors").is_file()
    assert (tmp_path / "run/overlays.png").is_file()


def test_two_ranks_descend_as_one_process_on_the_same_images(cli: Commands, tmp_path: Path) -> None:
    """Steps of plain gradient descent on a gate without noise; the noise that another would draw differs."""
    job = (
        *SMALL,
        "logger=csv",
        "dataset.train_size=8",
        "trainer.max_epochs=1",
        "trainer.gradient_clip_val=null",
        "optimizer._target_=torch.optim.SGD",
        "optimizer.lr=0.1",
        "~optimizer.betas",
        "~optimizer.eps",
        "peft/gate=uniform",
        "peft.gate._target_=spies.SteadyGate",
        "callbacks.noise._target_=spies.Noise",
    )
    done = cli(train, *job, "loading.batch_size=4", "run_dir=one")
    assert done.code == 0, done.err
    together(command, tmp_path, train.__name__, *job, "loading.batch_size=2", "run_dir=two")
    one, both = (torch.load(tmp_path / run / "last.ckpt", weights_only=True) for run in ("one", "two"))
    assert one["global_step"] == both["global_step"] == 2
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(both["state_dict"][name], value, rtol=1e-4, atol=1e-6, msg=name)
    noise = torch.cat([torch.load(tmp_path / f"two/noise-{rank}.pt") for rank in range(2)])
    assert len(noise.unique()) == noise.numel() == 2 * 2 * 4
