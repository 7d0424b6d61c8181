import json
import os
import signal
import socket
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, Commands
from processes import Training
from ranks import command, together

from convlora import evaluate, run, train

NEW = {"PYTHONPATH": str(ROOT)}  # of processes that Lightning starts


def children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def command_line(process: int) -> str:
    return Path(f"/proc/{process}/cmdline").read_text()


@pytest.mark.slow
def test_a_sweep_on_two_devices_leaves_its_jobs_alone_and_goes_on_after_one_process_died(
    cli: Commands, tmp_path: Path
) -> None:
    """Each job has processes of its own; the one that has lost its second says how to go on."""
    job = (*SMALL, "trainer.devices=2", "callbacks.unused._target_=spies.NoSearch")
    grid = ("-m", *job, "seed=0,1", "sweep_dir=sweep", "hydra.sweep.subdir=${seed}")
    spies = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    first, second = (tmp_path / f"sweep/{seed}" for seed in (0, 1))
    begun = Training(tmp_path, grid, spies).until((second / "last.ckpt").is_file)
    assert (first / "summary.json").is_file()
    [other] = [pid for pid in children(begun.pid) if "convlora.train" in command_line(pid)]
    os.kill(other, signal.SIGKILL)
    done = begun.ended(60)
    by_lightning = f"Child process with PID {other} terminated with code -9: the others are stopped too"
    by_itself = "error: the process of another device has ended"  # whichever notices first
    assert (done.code, by_lightning in done.out, by_itself in done.out) in (
        (-9, True, False),
        (1, False, True),
    )
    assert f"kept: {second}/last.ckpt" in done.out
    assert f"go on: python -m convlora.train resume={second}" in done.out

    together(command, tmp_path, train.__name__, f"resume={second}")
    assert {path.name for path in tmp_path.iterdir()} == {"sweep"}
    assert {path.name for path in (tmp_path / "sweep").iterdir()} <= {"0", "1", "multirun.yaml", "sweep.csv"}
    for folder, parts in ((first, 1), (second, 2)):
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["steps"] == 2 * 3  # 10 images on two ranks, two at a time
        assert (folder / "adapter.safetensors").is_file()
        logged = [path.name.rpartition("-")[2] for path in (folder / "wandb").glob("offline-run-*")]
        assert (len(logged), len(set(logged))) == (parts, 1)

    same = [each for each in SMALL if each.startswith(("dataset.", "trainer.a", "trainer.e"))]
    alone = cli(evaluate, f"checkpoint={first}", "dataset=synthetic", *same, "output=alone")
    assert alone.code == 0, alone.err
    shared = json.loads((first / "summary.json").read_text())["test"]
    found = json.loads(Path("alone/scores.json").read_text())
    assert {name: found[name] for name in shared} == pytest.approx(shared, abs=1e-6)
    assert Path("alone/images.csv").read_text() == (first / "images.csv").read_text()


def test_two_nodes_descend_and_score_as_one_process_on_the_same_images(cli: Commands, tmp_path: Path) -> None:
    """Steps of plain gradient descent on a gate without noise; the noise that another would draw differs."""
    job = (
        *SMALL,
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
    done = cli(train, *job, "logger=csv", "loading.batch_size=4", "run_dir=one")
    assert done.code == 0, done.err
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [
        Training(
            tmp_path,
            (*job, "loading.batch_size=2", "run_dir=two", "trainer.num_nodes=2"),
            {  # what torchrun tells the process of each node
                "TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "WORLD_SIZE": "2", "RANK": str(node), "GROUP_RANK": str(node), "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "1",
            },
        )
        for node in range(2)
    ]  # fmt: skip
    for node in nodes:
        ended = node.ended()
        assert ended.code == 0, ended.err
    one, both = (torch.load(tmp_path / run / "last.ckpt", weights_only=True) for run in ("one", "two"))
    assert one["global_step"] == both["global_step"] == 2
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(both["state_dict"][name], value, rtol=1e-4, atol=1e-6, msg=name)
    noise = torch.cat([torch.load(tmp_path / f"two/noise-{rank}.pt") for rank in range(2)])
    assert len(noise.unique()) == noise.numel() == 2 * 2 * 4
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}
    assert len(list((tmp_path / "two/wandb").glob("offline-run-*"))) == 1
    scores = [json.loads(Path(name, "summary.json").read_text())["test"] for name in ("one", "two")]
    assert scores[1] == pytest.approx(scores[0], abs=1e-6)


def test_a_process_that_waits_for_others_ends_after_a_while(tmp_path: Path) -> None:
    """What waits in a collective never comes to see a second signal; the alarm ends it all the same."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with run.interruptible(0):
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
            assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= run.STOPPING
            assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    finally:
        torch.distributed.destroy_process_group()
