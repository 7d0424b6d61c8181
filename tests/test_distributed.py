import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, Commands
from ranks import command, together

from convlora import train


@pytest.mark.slow
def test_two_ranks_train_one_model_and_go_on_after_one_of_them_died(tmp_path: Path) -> None:
    """Plain DDP: every parameter is used, each rank sees its share, one set of files is left."""

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "convlora.train", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    begun = start(*SMALL, "trainer.devices=2", "trainer.max_epochs=4", "run_dir=run", "logger=csv")
    while not (tmp_path / "run/last.ckpt").is_file():
        assert begun.poll() is None
        time.sleep(0.01)
    [other] = Path(f"/proc/{begun.pid}/task/{begun.pid}/children").read_text().split()
    os.kill(int(other), signal.SIGKILL)
    said, _ = begun.communicate(timeout=60)
    by_lightning = f"Child process with PID {other} terminated with code -9: the others are stopped too"
    by_itself = "error: the process of another device has ended"  # whichever notices first
    assert (begun.returncode, by_lightning in said) == (-9, True) or (
        begun.returncode,
        by_itself in said,
    ) == (1, True)
    assert "kept: run/last.ckpt" in said
    assert "go on: python -m convlora.train resume=run" in said

    assert start("resume=run").wait() == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["steps"] == 4 * 3  # 10 images on two ranks, two at a time
    assert 0 <= summary["test"]["dice"] <= 1
    state = torch.load(tmp_path / "run/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.isfinite(value).all() for value in state.values())
    assert (tmp_path / "run/adapter.safetensors").is_file()
    assert (tmp_path / "run/overlays.png").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


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
