"""The experiments of the paper have its settings, and say what to expect."""

import re

import pytest
import yaml
from composed import compose
from conftest import ROOT, Commands
from omegaconf import OmegaConf

from convlora import train

PAPER = sorted(path.stem for path in (ROOT / "conf/experiment/paper").glob("*.yaml"))
EPOCHS = {"camo": 20, "massachusetts_roads": 20, "sbu": 10}
LOSSES = {"sbu": "BalancedBceLoss"} | dict.fromkeys(("trans10k_v1", "trans10k_v2"), "SetLoss")
MONITORS = {
    "camo": "val/s_measure",
    "isic2017": "val/jaccard",
    "leaf_disease": "val/iou",
    "massachusetts_roads": "val/iou",
    "polyp": "val/s_measure",
    "sbu": "val/ber",
    "trans10k_v1": "val/miou",
    "trans10k_v2": "val/miou",
}
FAST = ("leaf_disease", "massachusetts_roads")
each = pytest.mark.parametrize("name", PAPER)


@each
def test_experiment_is_the_papers_run(cli: Commands, name: str) -> None:
    """Of the released settings every one that the defaults do not show."""
    done = cli(train, f"experiment=paper/{name}", "--cfg", "job", "--resolve")
    config = yaml.safe_load(done.out)
    assert config["model"]["name"] == "sam_vit_h"
    assert config["model"]["image_size"] == config["resize"]["image_size"] == 1024
    assert config["resize"]["_target_"].endswith("SquareResize")
    peft = config["peft"]
    assert peft["_target_"].endswith(".ConvLoRA")
    assert (peft["rank"], peft["alpha"], peft["num_experts"]) == (3, 32, 8)
    assert peft["gate"] == {
        "_target_": "convlora.peft.gating.NoisyTopK",
        "top_k": 1,
        "sees": "mean",
        "balance": 0.01,
        "schedule": "constant",
    }
    optimizer = config["optimizer"]
    assert optimizer["lr"] == (3e-4 if name in FAST else 1e-4)
    assert (optimizer["weight_decay"], optimizer["eps"], optimizer["betas"]) == (1e-4, 1e-6, [0.9, 0.999])
    trainer = config["trainer"]
    assert trainer["max_epochs"] == EPOCHS.get(name, 30)
    assert (trainer["precision"], trainer["gradient_clip_val"]) == ("16-mixed", 1.0)
    assert config["loading"]["batch_size"] * trainer["accumulate_grad_batches"] == 4
    assert config["callbacks"]["early_stopping"]["patience"] == 10
    assert [step["p"] for step in config["augment"]["transforms"]] == [0.5]
    loss = LOSSES.get(name, "StructureLoss")
    assert config["loss"]["_target_"].endswith(f".{loss}")
    assert config["loss"].get("boundary_weighted") == (False if loss == "StructureLoss" else None)
    assert config["callbacks"]["early_stopping"]["monitor"] == MONITORS[name]
    if loss == "SetLoss":
        own = {key: value for key, value in config["loss"].items() if key[0] != "_"}
        assert own == {
            "costs": [1, 5, 5],
            "weights": [1, 1, 1],
            "no_class_weight": 0.1,
            "num_points": 12544,
            "oversample_ratio": 3,
            "importance_sample_ratio": 0.75,
            "class_weights": None,
        }
        assert (config["head"]["_target_"], config["head"]["spread"]) == ("convlora.heads.Query", 0)
    if name == "sbu":
        assert config["metrics"]["scores"]["ber"] == "convlora.metrics.shadow.ber"


@each
def test_experiment_trains_the_papers_parameters(cli: Commands, name: str) -> None:
    done = cli(train, f"experiment=paper/{name}", "dry_run=true")
    assert done.code == 0, done.err
    [trainable] = re.findall(r"([\d,]+) trainable", done.out)
    if name.startswith("trans10k"):  # 15 mask tokens more, and a linear layer that tells their classes
        classes = {"trans10k_v1": 3, "trans10k_v2": 12}[name]
        assert int(trainable.replace(",", "")) == 4_020_096 + 15 * 256 + (256 + 1) * (classes + 1)
    else:
        assert trainable == "4,020,096"


@each
def test_experiment_names_its_command_and_the_papers_value(name: str) -> None:
    header = (ROOT / f"conf/experiment/paper/{name}.yaml").read_text().split("defaults:")[0]
    assert f"python -m convlora.train -m experiment=paper/{name} seed=0,1,2" in header
    assert re.search(r"# Hardware and hours: .*expected value: ", header)
    assert re.search(r"# Paper, three seeds: .*\d\d?\.\d", header)


def test_each_seed_of_the_roads_tests_another_fold() -> None:
    params = compose("train", "sweep=evidence/roads", return_hydra_config=True).hydra.sweeper.params
    for seed in params["seed"].split(","):
        lists = f"dataset.lists={params['dataset.lists']}"
        config = compose("train", f"dataset={params['dataset']}", lists, f"seed={seed}")
        assert (ROOT / config.dataset.lists / "test.csv").is_file()
        assert config.dataset.lists == f"docs/evidence/road_folds/{seed}"


def test_the_forms_of_the_evidence_share_all_but_the_method() -> None:
    """But for a learning rate of its own; and the sweeps try forms that there are."""
    folder = ROOT / "conf/experiment/evidence"
    names = [path.stem for path in folder.glob("*.yaml")]
    forms = [OmegaConf.to_container(compose("train", f"experiment=evidence/{name}")) for name in names]
    methods = [form.pop("peft") for form in forms]
    for form in forms:
        form["optimizer"].pop("lr")
    assert all(method not in methods[:place] for place, method in enumerate(methods))
    assert all(form == forms[0] for form in forms)
    assert (forms[0]["model"]["name"], forms[0]["trainer"]["max_epochs"]) == ("sam_vit_tiny", 5)
    for path in (ROOT / "conf/sweep/evidence").glob("*.yaml"):
        composed = compose("train", f"sweep=evidence/{path.stem}", return_hydra_config=True)
        params = composed.hydra.sweeper.params
        tried = {name.partition("/")[2] for name in params["experiment"].split(",")}
        assert tried == {*names} if path.stem == "forms" else tried < {*names}
        if "dataset" in params:
            assert params["seed"] == "10,11,12,13,14"
            assert f"sweep=evidence/{path.stem}" in path.read_text()
