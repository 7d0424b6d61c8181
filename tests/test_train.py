import csv
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import SMALL, Commands, plant_test_set, train_in
from dashboards import dashboards, missing, unshown, workspace
from PIL import Image
from processes import Training
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from convlora import predict, train

QUIET = (*SMALL, "logger=csv")
Weights = dict[str, torch.Tensor]


def weights(run: str | Path) -> Weights:
    state: Weights = torch.load(Path(run) / "last.ckpt", weights_only=True)["state_dict"]
    return state


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_says_what_it_trains_and_leaves_what_it_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    often = ("trainer.log_every_n_steps=1", "callbacks.routing.every_n_steps=2")
    plant_test_set(Path("sets/TestDataset/NC4K"), 2)
    tests = ("data_root=sets", "test_sets=[nc4k]")
    settings = (*SMALL, *often, *tests, "run_dir=run", "trainer.accumulate_grad_batches=2")
    done = Training(tmp_path, settings).ended()  # whose end W&B's own process waits for
    assert done.code == 0, done.err
    state = load_file("run/adapter.safetensors")
    trainable = sum(value.numel() for value in state.values())
    said = {line[:16].strip(): line[16:] for line in done.out.splitlines()}
    assert said["data"] == "synthetic: 10 train, 3 val, 5 test images; classes object"
    assert said["model"] == "sam_tiny at 64 px, random weights"
    assert said["parameters"].startswith(f"{trainable:,} trainable of ")
    assert said["method"].startswith("ConvLoRA(gate=NoisyTopK(top_k=1, sees=mean,")
    assert said["loss"] == "StructureLoss(boundary_weighted=True)"
    assert said["scores"].startswith("dice, iou, mae, ")
    assert "val/dice (max) chooses the epoch" in done.out
    assert said["optimiser"].startswith("AdamW(lr=0.001, weight_decay=0.0001, ")
    assert said["schedule"] == "6 steps in 2 epochs of 3"
    assert said["precision"] == "32-true"
    assert said["devices"] == "1 x cpu"
    assert said["batch"] == "4 = 2 per device x 1 device x 2 accumulated"
    assert said["run folder"] == "run"
    assert all(len(line) <= 100 for line in done.out.splitlines() if not line.startswith("epoch"))
    epochs = re.findall(
        r"^epoch (\d)/2  0:\d\d  train/loss \d.+  val/dice (0\.\d+)  best (0\.\d+)$", done.out, re.M
    )
    assert [number for number, _, _ in epochs] == ["1", "2"]
    assert epochs[1][2] == max(epochs[0][1], epochs[1][1])
    assert "weighted_f_measure" in done.out
    left = {path.name for path in Path("run").iterdir()}
    assert left >= {
        "adapter.safetensors",
        "last.ckpt",
        "best.ckpt",
        "summary.json",
        "metrics.csv",
        "config.yaml",
        "overlays.png",
        "curves.png",
        "wandb",
    }
    assert {"peft.rank: 3", "optimizer.lr: 0.001"} <= set(Path("run/hparams.yaml").read_text().splitlines())
    media = next(Path("run/wandb").glob("offline-run-*/files/media/images"))
    assert len(list(media.glob("val/overlays*.png"))) == 2 * 3  # each validation shows its three samples
    assert len(list(media.glob("mask/val/overlays*.png"))) == 2 * 3 * 2  # with truth and prediction
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["trainable_parameters"] == trainable
    assert summary["steps"] == 2 * 3  # 5 batches an epoch, the last one alone
    assert 0 <= summary["test"]["dice"] <= 1
    assert (summary["settings"]["peft.rank"], summary["settings"]["seed"]) == (3, 0)
    assert not {"data_root", "run_dir", "logger.project"} & summary["settings"].keys()
    assert yaml.safe_load(Path("run/config.yaml").read_text())["peft"]["num_experts"] == 8
    with Path("run/metrics.csv").open() as file:
        logged = list(csv.DictReader(file))
    assert sum(row["val/dice"] != "" for row in logged) == 2
    assert {column for column in logged[0] if column.startswith("val/")} == {"val/loss", "val/dice"}
    [dashboard] = dashboards(Path("run"))
    assert dashboard.kinds.keys() >= {
        "train/loss", "train/aux_loss", "train/lr", "train/grad_norm", "train/images_per_second",
        "train/memory_mib", "train/routing", "train/experts", "routing/blocks.0.attn.qkv", "val/loss",
        "val/dice", "val/overlays", "test/overlays", "test/reliability", "test/curves", "test/routing",
        "test/images_table", "test/routing_table",
    }  # fmt: skip
    assert (dashboard.group, dashboard.job_type) == ("synthetic/sam_tiny/conv_lora", "train")
    assert dashboard.tags == ["synthetic", "sam_tiny", "conv_lora"]
    view, of_classes = workspace(tmp_path), {"test/confusion", "test/confusion_table"}
    assert missing(view, dashboard) == of_classes | {"^val/iou_", "^test/[^/]+/iou_"}
    assert unshown(view, dashboard) == set()
    values = dashboard.summary
    assert values["trainable_parameters"] == trainable
    for scores, name in ((summary["test"], "synthetic"), (summary["test_sets"]["nc4k"], "nc4k")):
        assert {f"test/{name}/{key}": scores[key] for key in scores}.items() <= values.items()
    assert values["test/dice"] == values["score/test"] == summary["test"]["dice"]
    assert values["score/val"] == summary["val/dice"]
    table = dashboard.tables["test/images_table"]
    assert [row["dataset"] for row in table] == 5 * ["synthetic"] + 2 * ["nc4k"]
    by_set = [[row["dice"] for row in table[part]] for part in (slice(5), slice(5, 7))]
    assert by_set == [sorted(scores) for scores in by_set]  # the worst first
    assert [row["picture"] for row in (*table[:2], *table[5:])] == 4 * ["Image"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_in(tmp_path_factory.mktemp("trained"), *QUIET, "seed=1")


def test_checkpoints_hold_no_frozen_tensor(trained: Path) -> None:
    adapter = load_file(trained / "adapter.safetensors")
    assert weights(trained).keys() == adapter.keys()
    assert not any(".base." in name or name.startswith("prompt_encoder") for name in adapter)
    assert len({(trained / name).stat().st_mode for name in ("adapter.safetensors", "summary.json")}) == 1
    moments = torch.load(trained / "last.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    assert len(moments) == len(adapter)


def test_same_seed_same_weights(cli: Commands, trained: Path) -> None:
    for run, seed, workers in (("alike", 1, 2), ("other", 2, 0)):
        done = cli(train, *QUIET, f"run_dir={run}", f"seed={seed}", f"loading.num_workers={workers}")
        assert done.code == 0, done.err
    assert same(weights("alike"), weights(trained))
    assert not same(weights("other"), weights(trained))


def test_dry_run_says_what_is_known_and_what_is_not_there(cli: Commands) -> None:
    done = cli(train, "dry_run=true", "model=sam_vit_h", "model.image_size=512", "dataset=kvasir",
               "trainer.devices=64", "model.weights=nowhere.pth", "run_dir=a/run")  # fmt: skip
    assert done.code == 0, done.err
    assert "4,020,096 trainable of" in done.out
    assert "data            not there yet: kvasir: no train.csv under data/polyp; run `python -m" in done.out
    assert "model           sam_vit_h at 512 px, weights nowhere.pth (no such file)" in done.out
    assert "scores          dice, iou, dice_pooled" in done.out
    assert "batch           256 = 4 per device x 64 devices x 1 accumulated" in done.out
    assert "512 px: 32 x 32 tokens are padded to 42 x 42 in windows of 14, 72% more work there;" in done.out
    assert "448, 672, 896 fit" in done.out
    assert "warning         trainer.devices=64, but this machine has" in done.out
    assert not list(Path.cwd().iterdir())


def test_more_devices_than_there_are_is_an_error(cli: Commands) -> None:
    make_folder(grey_in="none")
    done = cli(train, *OWN_FOLDER, "trainer.accelerator=auto", "trainer.devices=64", "run_dir=run")
    assert done.code == 1
    there = torch.cuda.device_count()
    assert f"error: trainer.devices=64, but this machine has {there} GPUs; " in done.err
    assert not Path("run").exists()


def test_random_weights_on_real_images_are_shouted_about(cli: Commands) -> None:
    make_folder(grey_in="none")
    shout = "WARNING: sam_tiny HAS RANDOM WEIGHTS, SO THIS TRAINS A TOY ON REAL IMAGES."
    out = cli(train, *OWN_FOLDER, "dry_run=true").out
    assert shout in out
    assert "SET model.weights=PATH" in out
    assert "WARNING" not in cli(train, "dry_run=true").out
    assert "WARNING" not in cli(train, *OWN_FOLDER, "dry_run=true", "model.weights=nowhere.pth").out


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("dataset/mine.yaml", {"_target_": "convlora.data.sets.folder.Folder", "nmae": "mine"},
         "dataset: unknown key 'nmae'; did you mean 'name'?"),
        ("experiment/mine.yaml", {"sead": 3}, "error: unknown key 'sead'; did you mean 'seed'?"),
        ("experiment/mine.yaml", {"peft": {"num_expert": 3}},
         "peft: unknown key 'num_expert'; did you mean 'num_experts'?"),
    ],
)  # fmt: skip
def test_misspelt_key_in_a_file_is_named(
    cli: Commands, tmp_path: Path, file: str, content: dict[str, object], message: str
) -> None:
    path = tmp_path / "conf" / file
    path.parent.mkdir(parents=True)
    header = "# @package _global_\n" if "experiment" in file else ""
    path.write_text(header + yaml.safe_dump(content))
    group = file.split("/")[0]
    choice = [f"{group}=mine"] if group == "dataset" else ["experiment=mine", *QUIET]
    done = cli(train, "--config-dir", str(tmp_path / "conf"), *choice, "run_dir=run")
    assert done.code == 1
    assert message in done.err


def test_experiment_file_in_the_wrong_package_is_refused(cli: Commands, tmp_path: Path) -> None:
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/mine.yaml").write_text("peft: {rank: 7}\n")
    done = cli(train, "--config-dir", str(tmp_path / "conf"), "experiment=mine", *QUIET, "run_dir=run")
    assert done.code == 1
    assert "error: unknown key 'experiment'" in done.err


def test_a_score_that_does_not_exist_cannot_be_watched(cli: Commands) -> None:
    done = cli(train, *QUIET, "run_dir=run", "callbacks.early_stopping.monitor=val/nonsense")
    assert done.code == 1
    assert "callbacks.early_stopping.monitor=val/nonsense is not one of val/loss, val/dice" in done.err


def make_folder(grey_in: str) -> None:
    """A data set of one's own whose `grey_in` split has a mask that is not binary."""
    for split in ("train", "val", "test"):
        for kind in ("images", "masks"):
            Path("mine", split, kind).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (20, 20), (i, 9, 9)).save(f"mine/{split}/images/{i}.png")
            Image.new("L", (20, 20), 100 if split == grey_in else 255).save(f"mine/{split}/masks/{i}.png")


OWN_FOLDER = (
    *(option for option in QUIET if not option.startswith("dataset.")),
    "dataset=folder",
    "data_root=mine",
    "model=sam_tiny",
)


def test_a_bad_mask_is_one_line_even_from_a_loader_process(cli: Commands) -> None:
    make_folder(grey_in="train")
    done = cli(train, *OWN_FOLDER, "run_dir=run", "trainer.max_epochs=1", "loading.num_workers=1")
    assert done.code == 1
    last = done.err.splitlines()[-1]
    assert last.startswith("error: mine/train/masks/")
    assert "for background and 255 for foreground" in last
    assert "Traceback" not in done.err


def test_a_bad_test_image_does_not_cost_the_training(cli: Commands) -> None:
    make_folder(grey_in="test")
    done = cli(train, *OWN_FOLDER, "run_dir=run", "trainer.max_epochs=1", "loading.num_workers=0")
    assert done.code == 1
    assert Path("run/adapter.safetensors").is_file()
    assert "go on: python -m convlora.train resume=run" in done.out
    for image in (0, 1):
        Image.new("L", (20, 20), 255).save(f"mine/test/masks/{image}.png")
    resumed = cli(train, "resume=run")
    assert resumed.code == 0, resumed.err
    assert Path("run/summary.json").is_file()


def test_run_folder_that_cannot_be_written_is_named(cli: Commands) -> None:
    Path("file").write_text("")
    for folder in ("file/run", "/proc/self"):
        done = cli(train, *QUIET, f"run_dir={folder}")
        assert done.code == 1
        assert folder.replace("self", "") in done.err
        assert "Traceback" not in done.err


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_half_precision_trains(cli: Commands, precision: str) -> None:
    done = cli(train, *QUIET, "run_dir=run", f"trainer.precision={precision}", "trainer.max_epochs=1")
    assert done.code == 0, done.err
    assert all(
        torch.isfinite(value).all() and value.dtype == torch.float32 for value in weights("run").values()
    )


def test_jobs_of_a_sweep_have_settings_of_their_own(cli: Commands) -> None:
    done = cli(train, "-m", *QUIET, "trainer.max_epochs=1", "peft.num_experts=2,3", "peft.rank=2",
               "hydra.sweep.dir=sweep", "hydra.sweep.subdir=${hydra.job.num}")  # fmt: skip
    assert done.code == 0, done.err
    for job, experts in (("0", 2), ("1", 3)):
        assert load_file(f"sweep/{job}/adapter.safetensors")[
            "image_encoder.blocks.0.attn.qkv.gate.weight"
        ].shape == (2, experts)


def test_early_stopping_keeps_the_best_epoch(cli: Commands) -> None:
    done = cli(train, *QUIET, "run_dir=run", "trainer.max_epochs=9", "callbacks.early_stopping.patience=1",
               "+callbacks.early_stopping.min_delta=1")  # fmt: skip
    assert done.code == 0, done.err
    assert "stopped after epoch 2 of 9 by callbacks.early_stopping, which follows val/dice" in done.out
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["epochs"] == 2
    with Path("run/metrics.csv").open() as file:
        dice = [float(row["val/dice"]) for row in csv.DictReader(file) if row["val/dice"]]
    assert summary["val/dice"] == pytest.approx(max(dice), abs=1e-6)


def test_tensorboard_is_an_option(cli: Commands) -> None:
    done = cli(train, *SMALL, "logger=tensorboard", "trainer.max_epochs=1", "run_dir=run")
    assert done.code == 0, done.err
    events = EventAccumulator("run/tensorboard").Reload()
    assert events.Tags()["images"] == [f"val/overlays/{number}" for number in range(3)]
    for tag in events.Tags()["images"]:
        [picture] = events.Images(tag)
        assert picture.step == 5
        pixels = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)))
        assert pixels.shape[0] >= 48
        assert pixels.std() > 0
    assert Path("run/metrics.csv").is_file()


def test_frozen_weights_in_half_precision_need_half_precision_training(cli: Commands) -> None:
    done = cli(train, *QUIET, "model.frozen_dtype=bfloat16")
    assert done.code == 1
    assert "model.frozen_dtype=bfloat16 does not go with trainer.precision=32-true" in done.err
    assert "set trainer.precision=bf16-mixed" in done.err


def test_weights_that_are_trained_are_not_held_in_half_precision(cli: Commands) -> None:
    done = cli(train, *QUIET, "model.frozen_dtype=bfloat16", "trainer.precision=bf16-mixed", "peft=full")
    assert done.code == 1
    assert "bfloat16 does not go with peft._target_=convlora.peft.selective.Full, which trains" in done.err
    assert "set model.frozen_dtype=float32" in done.err


def test_memory_savers_train_and_their_adapters_predict(cli: Commands) -> None:
    done = cli(
        train,
        *QUIET,
        "run_dir=run",
        "trainer.max_epochs=1",
        "trainer.precision=bf16-mixed",
        "model.frozen_dtype=bfloat16",
        "model.activation_checkpointing=true",
        "peft.blocks=[-1]",
    )
    assert done.code == 0, done.err
    state = load_file("run/adapter.safetensors")
    assert all("blocks.1." in name for name in state if name.startswith("image_encoder"))
    Image.new("RGB", (40, 30)).save("image.png")
    for precision in ("bf16-mixed", "32-true"):
        options = ("input=image.png", f"output={precision}", f"precision={precision}", "num_workers=0")
        done = cli(predict, "checkpoint=run/adapter.safetensors", *options)
        assert done.code == 0, done.err
        assert Path(precision, "image.png").is_file()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs g++")
def test_compiled_encoder_trains_by_the_same_losses(cli: Commands) -> None:
    # images one by one throughout: a batch of another size would be compiled anew
    short = (
        "trainer.max_epochs=1",
        "loading.batch_size=1",
        "model.depth=1",
        "model.global_attn_indexes=[0]",
        *(f"dataset.{split}_size={size}" for split, size in (("train", 5), ("val", 1), ("test", 1))),
    )
    losses = []
    for run, compiled in (("eager", "false"), ("compiled", "true")):
        log = (f"run_dir={run}", f"compile={compiled}", "trainer.log_every_n_steps=1")
        done = cli(train, *QUIET, *short, *log)
        assert done.code == 0, done.err
        with Path(run, "metrics.csv").open() as file:
            losses.append([float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]])
    assert len(losses[0]) == 5
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert weights("compiled").keys() == weights("eager").keys()


def test_match_chooses_the_greatest_width_that_fits_and_records_it(cli: Commands) -> None:
    def trained(*arguments: str) -> int:
        out = cli(train, *QUIET, "dry_run=true", *arguments).out
        return int(re.search(r"parameters +([\d,]+) trainable", out)[1].replace(",", ""))  # type: ignore[index]

    most = trained("peft.rank=6") - 1
    done = cli(train, *QUIET, "trainer.max_epochs=1", f"match={most}", "run_dir=run")
    assert done.code == 0, done.err
    assert yaml.safe_load(Path("run/config.yaml").read_text())["peft"]["rank"] == 5
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["trainable_parameters"] == trained("peft.rank=5") <= most
    assert trained(f"match={most + 1}") == most + 1
    assert cli(train, "resume=run").code == 0
    for arguments, message in (
        (["match=10"], "match=10 is less than the "),
        (["match=10", "peft=decoder_only"], "match=10 is for methods of several sizes"),
        ([f"match={most}", "peft.rank=2"], f"match={most} chooses peft.rank itself; leave one of them out"),
    ):
        refused = cli(train, *QUIET, *arguments)
        assert refused.code == 1
        assert message in refused.err
