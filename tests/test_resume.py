"""A run that was stopped and goes on is the run that was never stopped."""

import csv
import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SMALL, Commands
from PIL import Image
from processes import Training
from safetensors.torch import load

from convlora import adapter, evaluate, export, predict, run, train
from convlora.cli import FOLDER_NAME, folder_name

EPOCHS, STEPS = 4, 4
JOB = (
    *SMALL,
    "logger=csv",
    "dataset.train_size=8",
    "dataset.val_size=2",
    "dataset.test_size=2",
    f"trainer.max_epochs={EPOCHS}",
    "trainer.log_every_n_steps=1",
)
WORKERS = ("loading.num_workers=2",)
EVERYTHING = (
    *WORKERS,
    "trainer.precision=bf16-mixed",
    "trainer.accumulate_grad_batches=2",
    "model.activation_checkpointing=true",
    "augment=strong",
    "resize=longest_side",
    "peft.gate.top_k=2",
    "prompts.box=0.5",
)


class Whole:
    """Uninterrupted runs, each trained once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.runs: dict[tuple[str, ...], Path] = {}
        self.seconds: dict[tuple[str, ...], float] = {}

    def __call__(self, *settings: str) -> Path:
        if settings not in self.runs:
            path = self.folder / f"whole{len(self.runs)}"
            start = time.monotonic()
            done = Training(self.folder, (*JOB, *settings, f"run_dir={path}")).ended()
            assert done.code == 0, done.err
            self.runs[settings], self.seconds[settings] = path, time.monotonic() - start
        return self.runs[settings]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole"))


def same(one: Any, other: Any) -> bool:
    """Whether two checkpoints, or parts of them, are equal to the last bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def checkpoint(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def differences(one: Path, other: Path) -> list[str]:
    """What two runs that have ended do not have in common of all that follows from their settings."""
    found = []
    for name in ("last.ckpt", "best.ckpt"):
        a, b = checkpoint(one / name), checkpoint(other / name)
        parts = ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step", "facts")
        found += [f"{name}: {part}" for part in parts if not same(a[part], b[part])]
    a, b = (json.loads((each / "summary.json").read_text()) for each in (one, other))
    found += [f"summary: {key}" for key in a if key != "fit_seconds" and a[key] != b.get(key)]
    a, b = (list(csv.DictReader((each / "metrics.csv").open())) for each in (one, other))
    return found + ([] if a == b else ["metrics.csv"])


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize("settings", [(), EVERYTHING], ids=["plain", "everything"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, whole: Whole, settings: tuple[str, ...]) -> None:
    begun = Training(tmp_path, (*JOB, *settings, "run_dir=run"))
    begun.until((tmp_path / "run/last.ckpt").is_file).kill()
    assert 0 < checkpoint(tmp_path / "run/last.ckpt")["epoch"] + 1 < EPOCHS
    resumed = Training(tmp_path, ("resume=run",)).ended()
    assert resumed.code == 0, resumed.err
    assert differences(tmp_path / "run", whole(*settings)) == []


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_as_if_nothing_had_been(tmp_path: Path, whole: Whole) -> None:
    """CONVLORA_KILLS=20 tries more runs than one."""
    expected = whole(*WORKERS)
    seconds, draw, unlike = whole.seconds[WORKERS], random.Random(0), {}
    total = int(os.environ.get("CONVLORA_KILLS", "1"))
    for number in range(total):
        path = tmp_path / f"run{number}"
        moments = [draw.uniform(0, seconds) for _ in range(draw.randint(1, 3))]
        for moment in [*moments, None]:
            begun = (path / "config.yaml").is_file()
            arguments = (f"resume={path}",) if begun else (*JOB, *WORKERS, f"run_dir={path}")
            training = Training(tmp_path, arguments)
            if moment is not None:
                training.process.join(moment)
                training.kill()
        done = training.ended()
        found = differences(path, expected) if done.code == 0 else done.err.splitlines()[-1:]
        if found:
            unlike[number] = (moments, found)
    assert not unlike, f"{total - len(unlike)} of {total} runs ended as the one that was not killed"


def told_command(out: str, after: str) -> list[str]:
    """The arguments that a shell makes of the command line that a stopped run has told."""
    line = next(line for line in out.splitlines() if line.startswith(after)).removeprefix(after)
    shell = f"python() {{ printf '%s\\n' \"$@\"; }}; {line}"
    words = subprocess.run(["/bin/sh", "-c", shell], check=True, capture_output=True, text=True).stdout
    module, name, *arguments = words.splitlines()
    assert (module, name) == ("-m", "convlora.train")
    return arguments


@pytest.mark.parametrize(
    ("settings", "number", "to_group"),
    [
        ((), signal.SIGINT, False),
        (WORKERS, signal.SIGINT, True),
        (WORKERS, signal.SIGTERM, True),
    ],
)
def test_a_stopped_run_says_how_to_go_on(
    tmp_path: Path, whole: Whole, settings: tuple[str, ...], number: int, to_group: bool
) -> None:
    path = tmp_path / 'my "run" = $1 of it\'s'
    begun = Training(tmp_path, (*JOB, *settings, run.assign("run_dir", path)))
    begun.until((path / "last.ckpt").is_file)
    (os.killpg if to_group else os.kill)(begun.pid, number)
    done = begun.ended()
    assert done.code > 0
    assert "Traceback" not in done.err + done.out
    kept = checkpoint(path / "last.ckpt")["epoch"] + 1
    assert re.search(rf"stopped in epoch [{kept}{kept + 1}] of {EPOCHS}", done.out)
    assert f"kept: {path}/last.ckpt after {kept} epochs" in done.out
    resumed = Training(tmp_path, tuple(told_command(done.out, "go on: "))).ended()
    assert resumed.code == 0, resumed.err
    assert differences(path, whole(*settings)) == []


def test_a_loader_process_that_ends_while_a_run_stops_says_nothing() -> None:
    """Python tells of a race where a signal comes while SIG_DFL takes a handler's place."""

    def of_torch(number: int, frame: Any) -> None:
        raise RuntimeError("DataLoader worker (pid 17) is killed by signal: Terminated.")

    before = signal.getsignal(signal.SIGCHLD)
    with run.interruptible(0):
        own = signal.signal(signal.SIGCHLD, of_torch)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGCHLD) == own
        assert callable(own)
        os.kill(os.getpid(), signal.SIGCHLD)
    assert signal.getsignal(signal.SIGCHLD) == before


def test_a_run_that_slurm_requeues_goes_on(tmp_path: Path, whole: Whole) -> None:
    """SLURM announces by SIGUSR1 that the time of a job is up, and starts the same command again."""
    tool = tmp_path / "bin/scontrol"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho $* >> requeued\n")
    tool.chmod(0o755)
    job = {"PATH": f"{tool.parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "train"}
    job |= {"SLURM_NTASKS": "1"} | {f"SLURM_{name}": "0" for name in ("PROCID", "LOCALID", "NODEID")}
    command = (*JOB, *WORKERS, "run_dir=run")
    begun = Training(tmp_path, command, job).until((tmp_path / "run/last.ckpt").is_file)
    os.killpg(begun.pid, signal.SIGUSR1)  # loader processes too
    done = begun.ended()
    assert done.code > 0
    assert "Traceback" not in done.err + done.out
    assert "requeued: SLURM's job 17 goes on here" in done.out
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
    again = Training(tmp_path, command, job | {"SLURM_RESTART_COUNT": "1"}).ended()
    assert again.code == 0, again.err
    assert differences(tmp_path / "run", whole(*WORKERS)) == []
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "requeued", "run"}


def test_a_job_that_would_get_no_further_is_not_requeued(
    done: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3", "SLURM_NTASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", "")
    for first, is_given, reason in (
        (0, False, "SLURM's job 17_3 would begin another run; go on with this one by resume=run"),
        (EPOCHS, True, "no epoch has ended in the time of SLURM's job 17_3; resume=run with more time"),
        (0, True, "[Errno 2] No such file or directory: 'scontrol'; submit a job with resume=run"),
    ):
        told = run.requeue(done, first, is_given).replace(run.in_shell("resume", done), "resume=run")
        assert told == f"not requeued: {reason}"


def test_a_run_stopped_in_its_first_validation_begins_anew(tmp_path: Path, whole: Whole) -> None:
    long = ("dataset.val_size=40", "trainer.max_epochs=1", "trainer.num_sanity_val_steps=0")
    begun = Training(tmp_path, (*JOB, *long, "run_dir=run"))
    log = tmp_path / "run/metrics.csv"
    begun.until(lambda: log.is_file() and f"\n0,{STEPS - 1}," in log.read_text().replace("\r", ""))
    os.kill(begun.pid, signal.SIGTERM)
    done = begun.ended()
    assert done.code > 0
    assert "Traceback" not in done.err + done.out
    assert "stopped in epoch 1 of 1; no epoch had ended, so that nothing is saved" in done.out
    resumed = Training(tmp_path, tuple(told_command(done.out, "begin again: "))).ended()
    assert resumed.code == 0, resumed.err
    assert differences(tmp_path / "run", whole(*long)) == []


def test_a_run_stopped_before_its_first_step_leaves_nothing(tmp_path: Path) -> None:
    begun = Training(tmp_path, (*JOB, "run_dir=new/run"))
    begun.until((tmp_path / "new/run/.lock").is_file)
    os.kill(begun.pid, signal.SIGINT)
    done = begun.ended()
    assert done.code > 0
    assert "no epoch had ended" in done.out
    assert "Traceback" not in done.err + done.out
    assert list(tmp_path.iterdir()) == []


def test_a_run_stopped_while_it_takes_its_lock_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fcntl, "lockf", interrupted)
    hold = run.hold(tmp_path / "new/run", 1, lambda: False)
    with pytest.raises(KeyboardInterrupt):
        hold.__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_belongs_to_one_process(cli: Commands, tmp_path: Path, whole: Whole) -> None:
    """Also when its loader processes outlive it."""
    first = Training(tmp_path, (*JOB, *WORKERS, "run_dir=run")).until((tmp_path / "run/config.yaml").is_file)
    second = cli(train, "resume=run")
    assert second.code == 1
    assert f"run is in use by process {first.pid} on " in second.err
    first.until((tmp_path / "run/last.ckpt").is_file).kill()
    again = Training(tmp_path, ("resume=run",)).ended()
    assert again.code == 0, again.err
    assert differences(tmp_path / "run", whole(*WORKERS)) == []


@pytest.fixture
def done(whole: Whole, tmp_path: Path) -> Path:
    """A copy of a run that has ended, in the present folder."""
    return Path(shutil.copytree(whole(), tmp_path / "run"))


OTHER = {
    "optimizer.lr": "2e-3",
    "loss.boundary_weighted": "false",
    "metrics.primary": "iou",
    "augment": "strong",
    "loading.shots": "3",
    "loading.batch_size": "1",
    "loading.cache": "ram",
    "seed": "1",
    "dataset.train_size": "9",
    "trainer.max_epochs": "9",
    "trainer.precision": "bf16-mixed",
    "trainer.devices": "2",
    "peft.rank": "4",
    "model.depth": "3",
    "callbacks.early_stopping.patience": "3",
}


def test_other_settings_are_refused_with_all_that_differ(cli: Commands, done: Path) -> None:
    before = files(done)
    refused = cli(train, "resume=run", *(f"{key}={value}" for key, value in OTHER.items()))
    assert refused.code == 1
    assert "resume=run is another run with these settings: " in refused.err
    for key, value in OTHER.items():
        if key != "augment":
            assert re.search(
                rf"{key} was .*?, is {value}[;\s]", refused.err.replace("0.002", "2e-3"), re.I
            ), key
    assert "augment.transforms was" in refused.err
    assert files(done) == before


def test_another_loss_and_other_scores_are_refused(cli: Commands, done: Path) -> None:
    refused = cli(train, "resume=run", "loss=bce_dice", "metrics=shadow")
    assert refused.code == 1
    assert "loss._target_ was convlora.losses.StructureLoss, is " in refused.err
    assert "metrics.primary was dice, is " in refused.err


def test_a_finished_run_moves_trains_no_further_and_is_tested_again(cli: Commands, done: Path) -> None:
    """Where things lie and what is shown of them is free."""
    before, record = files(done), yaml.safe_load((done / "config.yaml").read_text())
    done.rename("it's moved")
    for name in ("summary.json", "adapter.safetensors"):
        Path("it's moved", name).unlink()
    free = ("data_root=elsewhere", "loading.num_workers=1", "logger=tensorboard", "seed=0")
    again = cli(train, "resume='it\\'s moved'", *free, "trainer.enable_progress_bar=true")
    assert again.code == 0, again.err
    after = files(Path("it's moved"))
    assert all(after[name] == before[name] for name in ("last.ckpt", "best.ckpt", "images.csv"))
    assert same(load(after["adapter.safetensors"]), load(before["adapter.safetensors"]))
    one, other = (json.loads(each["summary.json"]) for each in (before, after))
    assert {**one, "fit_seconds": 0} == {**other, "fit_seconds": 0}
    assert not Path("run").exists()
    found = yaml.safe_load(after["config.yaml"])
    assert (found["run_dir"], found["resume"], found["data_root"]) == ("it's moved", None, "elsewhere")
    assert not [each for each in found["command"] if each.startswith(("run_dir", "resume"))]
    cli(train, "resume='it\\'s moved'")
    assert yaml.safe_load(Path("it's moved/config.yaml").read_text())["command"] == found["command"]
    assert set(record["command"]) - set(found["command"]) == {"loading.num_workers=0", "logger=csv"} | {
        "trainer.enable_progress_bar=false"}  # fmt: skip


def test_caches_may_differ_but_not_whether_there_is_one(whole: Whole) -> None:
    record = run.read_record(whole())
    config = {key: value for key, value in record.items() if key != "command"}

    def given(key: str, value: object) -> dict[str, Any]:
        section, _, name = key.partition(".")
        return {**config, section: {**config[section], name: value}}

    run.check_same_settings(whole(), given("model.weights", "elsewhere.pth"))
    with pytest.raises(ValueError, match=r"loading\.cache was None, is ram"):
        run.check_same_settings(whole(), given("loading.cache", "ram"))
    folder = whole() / "cached"
    folder.mkdir()
    run.write_record(folder, [], given("loading.cache", "ram"))
    run.check_same_settings(folder, given("loading.cache", "/tmp/cache"))
    with pytest.raises(ValueError, match=r"loading\.cache was ram, is None"):
        run.check_same_settings(folder, config)


def test_a_run_from_before_a_setting_existed_goes_on_with_what_held_then(whole: Whole) -> None:
    config = {key: value for key, value in run.read_record(whole()).items() if key != "command"}
    now = run.flatten(config)
    before = {key: value for key, value in now.items() if key not in run.LATER}
    # which losses of one class lack, and drawn scenes
    assert run.LATER.keys() - now.keys() == {"loss.class_weights", "dataset.lists"}
    folder = whole() / "older"
    folder.mkdir()
    run.write_record(folder, [], before)
    for given in (now, before):
        run.check_same_settings(folder, given)
    for key in run.LATER:
        with pytest.raises(ValueError, match=rf"{re.escape(key)} was .*, is another"):
            run.check_same_settings(folder, {**now, key: "another"})


def test_a_run_on_several_nodes_is_resumed_by_its_folder_alone(cli: Commands, done: Path) -> None:
    record = run.read_record(done)
    trainer = record.pop("trainer") | {"num_nodes": 2}
    command = [*record.pop("command"), "trainer.num_nodes=2"]
    run.write_record(done, command, record | {"trainer": trainer})
    again = cli(train, "resume=run", "dry_run=true")
    assert again.code == 0, again.err
    assert "4 = 2 per device x 2 devices x 1 accumulated" in again.out


def test_one_run_is_resumed_and_not_a_sweep(cli: Commands, done: Path) -> None:
    before = files(done)
    for arguments in (("-m", "resume=run"), ("resume=run", "--multirun", "seed=1,2")):
        refused = cli(train, *arguments)
        assert refused.code == 1
        assert refused.err.splitlines()[-1] == "error: resume=run goes on with one run; leave out -m"
    assert files(done) == before
    assert not Path("multirun").exists()


@pytest.mark.parametrize("content", [b"no checkpoint", b"", b"PK\x03\x04cut"])
def test_a_damaged_checkpoint_is_refused(cli: Commands, done: Path, content: bytes) -> None:
    Path("run/last.ckpt").write_bytes(content)
    before = files(done)
    refused = cli(train, "resume=run")
    assert refused.code == 1
    assert "last.ckpt is no checkpoint or is damaged" in refused.err
    assert files(done) == before


def test_resuming_where_no_run_is_names_the_one_beside_it(cli: Commands, done: Path) -> None:
    refused = cli(train, "resume=other")
    assert refused.code == 1
    assert (
        "resume=other: no run there (no config.yaml); the newest run beside it is resume=run" in refused.err
    )
    again = cli(train, *JOB, "run_dir=run", "seed=3")
    assert again.code == 1
    assert "run already holds a run; go on with it by resume=run" in again.err
    assert not Path("other").exists()


def make_folder(size: int = 20) -> None:
    for split in ("train", "val", "test"):
        for kind in ("images", "masks"):
            Path("mine", split, kind).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (size, size), (i, 9, 9)).save(f"mine/{split}/images/{i}.png")
            Image.new("L", (size, size), 255).save(f"mine/{split}/masks/{i}.png")


OWN = (*(each for each in JOB if not each.startswith("dataset.")), "dataset=folder", "model=sam_tiny")


def test_other_training_images_are_refused(cli: Commands) -> None:
    """Also other devices, which `trainer.devices=auto` may come to mean elsewhere."""
    make_folder()
    begun = cli(train, *OWN, "data_root=mine", "run_dir=run")
    assert begun.code == 0, begun.err
    before = files(Path("run"))
    for change in ("added", "removed", "changed", "moved"):
        shutil.copytree("mine", change)
    for kind in ("images", "masks"):
        shutil.copy(f"added/train/{kind}/0.png", f"added/train/{kind}/2.png")
        Path(f"removed/train/{kind}/0.png").unlink()
    Image.new("RGB", (20, 20), (200, 10, 77)).save("changed/train/images/0.png")
    for change in ("added", "removed", "changed"):
        refused = cli(train, "resume=run", f"data_root={change}")
        assert refused.code == 1, change
        assert "was trained on training images 2 (" in refused.err
    last = checkpoint(Path("run/last.ckpt"))
    assert last["facts"]["devices"] == "1 x cpu"
    torch.save({**last, "facts": {**last["facts"], "devices": "4 x cuda"}}, "run/last.ckpt")
    refused = cli(train, "resume=run")
    assert "was trained on devices 4 x cuda, but here it is 1 x cpu; resume as it was begun" in refused.err
    Path("run/last.ckpt").write_bytes(before["last.ckpt"])
    assert files(Path("run")) == before
    assert cli(train, "resume=run", "data_root=moved").code == 0


REFUSED = {
    "optimizer.lr=fast is not possible": ("optimizer.lr=fast",),
    "no train.csv under": ("dataset=kvasir", "model=sam_tiny"),
    "choose another data set": ("test_sets=[trans10k_v2]",),
    "mine/val/images/0.png": ("dataset=folder", "data_root=mine", "model=sam_tiny"),
    "MiB left on its disk": (),
    "": ("dry_run=true",),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_run_refused_before_its_first_step_leaves_nothing(
    cli: Commands, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    if "mine" in str(REFUSED[message]):
        make_folder()
        Path("mine/val/images/0.png").write_bytes(b"no image")
    if "disk" in message:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 2**30 - 2**20, 2**20))
    Path("mine/notes").mkdir(parents=True)
    Path("mine/notes/plan.txt").write_text("mine")
    before = files(Path.cwd())
    job = [each for each in JOB if not each.startswith("dataset.")] if REFUSED[message] else JOB
    for folder in ("new/deep/run", "mine/notes"):
        refused = cli(train, *job, *REFUSED[message], f"run_dir={folder}")
        assert refused.code == (1 if message else 0), refused.err
        assert message in refused.err
        assert "Traceback" not in refused.err
        assert files(Path.cwd()) == before
        assert sorted(Path.cwd().rglob(".lock")) == []
        assert not Path("new").exists()


def test_a_stopped_run_becomes_an_adapter(cli: Commands, done: Path) -> None:
    best = checkpoint(done / "best.ckpt")
    for name in ("adapter.safetensors", "summary.json"):
        (done / name).unlink()
    Image.new("RGB", (40, 30)).save("image.png")
    uses = (
        (evaluate, ("dataset=synthetic", "dataset.size=48", "dataset.test_size=2", "output=scores")),
        (predict, ("input=image.png", "output=masks")),
    )
    for module, arguments in uses:
        refused = cli(module, "checkpoint=run", *arguments, *(["num_workers=0"] if module is predict else []))
        assert refused.code == 1
        assert "`python -m convlora.export checkpoint=run` makes one" in refused.err
    made = cli(export, "checkpoint=run")
    assert made.code == 0, made.err
    assert f"adapter of epoch {best['epoch'] + 1}: run/adapter.safetensors" in made.out
    for module, arguments in uses:
        used = cli(module, "checkpoint=run", *arguments, *(["num_workers=0"] if module is predict else []))
        assert used.code == 0, used.err
    assert same(adapter.read("run").segmenter.trainable_state(), best["state_dict"])
    assert adapter.load("run").predict("image.png").classes.shape == (30, 40)
    Path("empty").mkdir()
    Path("run/best.ckpt").unlink()
    for folder in ("empty", "nowhere", "run"):
        refused = cli(export, f"checkpoint={folder}")
        assert refused.code == 1
        way_out = "name the folder of a run that has ended an epoch"
        assert refused.err.strip() == f"error: checkpoint={folder}: no {folder}/best.ckpt; {way_out}"


@pytest.mark.parametrize(
    ("setting", "epochs"),
    [("patience=1 callbacks.early_stopping.min_delta=1", 2), ("stopping_threshold=-1", 1)],
)
def test_a_run_that_stopped_early_trains_no_further(cli: Commands, setting: str, epochs: int) -> None:
    early = f"trainer.max_epochs=9 callbacks.early_stopping.{setting}".split()
    assert cli(train, *JOB, *early, "run_dir=run").code == 0
    before = files(Path("run"))
    Path("run/summary.json").unlink()
    assert cli(train, "resume=run").code == 0
    after = files(Path("run"))
    assert all(after[name] == before[name] for name in ("last.ckpt", "best.ckpt"))
    one, other = (json.loads(each["summary.json"]) for each in (before, after))
    assert one["epochs"] == epochs
    assert {**one, "fit_seconds": 0} == {**other, "fit_seconds": 0}


def test_a_run_of_files_of_ones_own_goes_on_with_them(cli: Commands) -> None:
    for file, content in {
        "own/mine.yaml": {"defaults": ["train", "_self_"], "seed": 5},
        "own/peft/small.yaml": {"_target_": "convlora.peft.lora.LoRA", "rank": 1},
        "more/loss/plain.yaml": {"_target_": "convlora.losses.StructureLoss", "boundary_weighted": False},
    }.items():
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(yaml.safe_dump(content))
    files_of = ("--config-dir=own", "--config-name=mine", "hydra.searchpath=[file://more]")
    done = cli(train, *files_of, *JOB, "peft=small", "loss=plain", "trainer.max_epochs=1", "run_dir=run")
    assert done.code == 0, done.err
    record = yaml.safe_load(Path("run/config.yaml").read_text())
    assert (record["seed"], record["peft"]["rank"], record["loss"]["boundary_weighted"]) == (5, 1, False)
    Path("run/summary.json").unlink()
    resumed = cli(train, "resume=run")
    assert resumed.code == 0, resumed.err
    assert yaml.safe_load(Path("run/config.yaml").read_text()) == record


def test_a_job_of_a_sweep_is_resumed_by_its_folder(cli: Commands) -> None:
    swept = cli(train, "-m", *JOB, "trainer.max_epochs=1", "peft/gate=noisy_top_k", "peft.rank=2,3",
                "hydra.sweep.dir=sweep")  # fmt: skip
    assert swept.code == 0, swept.err
    jobs = sorted(path.parent for path in Path("sweep").rglob("config.yaml"))
    assert len(jobs) == 2
    for job in jobs:
        assert job.parent == Path("sweep")
        assert re.fullmatch(rf"[A-Za-z0-9._-]{{1,{FOLDER_NAME}}}", job.name)
    before = files(jobs[0])
    (jobs[0] / "summary.json").unlink()
    resumed = cli(train, f"resume={jobs[0]}")
    assert resumed.code == 0, resumed.err
    after = files(jobs[0])
    assert after.keys() == before.keys()
    assert after["last.ckpt"] == before["last.ckpt"]
    one, other = (yaml.safe_load(each["config.yaml"]) for each in (before, after))
    assert {**one, "run_dir": ""} == {**other, "run_dir": ""}


def test_names_of_folders_hold_plain_characters_and_never_collide() -> None:
    draw = random.Random(0)
    pieces = [*"x2,=/.-_[]{} '\"ü\n$+~\\", "..", "a" * 50]
    values = ["".join(draw.choices(pieces, k=draw.randint(0, 5))) for _ in range(20_000)]
    given = {f"{key}={value},seed=0" for value in values for key in ("++peft.blocks", "peft/gate")}
    given |= set(values) - {""}
    names: dict[str, str] = {}
    for overrides in given:
        name = folder_name(overrides)
        assert re.fullmatch(rf"[A-Za-z0-9._-]{{1,{FOLDER_NAME}}}", name), overrides
        assert name[0] not in ".-", overrides
        assert names.setdefault(name, overrides) == overrides
