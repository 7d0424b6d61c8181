"""What a user types, and what a mistake is answered with."""

import re
from pathlib import Path
from types import ModuleType

import pytest
from composed import compose, names
from conftest import SMALL, Commands

from convlora import convert, dashboard, evaluate, export, predict, prepare, train
from convlora.cli import FOLDER_NAME, folder_name
from convlora.run import assign

QUIET = (*SMALL, "logger=csv", "trainer.max_epochs=1")


def one_line(err: str) -> str:
    """The last line, where a mistake is told; no other one is hydra's, and nothing is a traceback."""
    assert "Traceback" not in err
    assert "hydra" not in err.lower()
    return err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (train, "peft.rnak=3", "peft: unknown key 'rnak'; did you mean 'rank'? it takes "),
        (train, "sead=3", "unknown key 'sead'; did you mean 'seed'? it takes "),
        (train, "datset=kvasir", "unknown key 'datset'; did you mean 'dataset'?"),
        (train, "trainer.max_epoch=3", "trainer: unknown key 'max_epoch'; did you mean 'max_epochs'?"),
        (train, "dataset=kvasirr", "dataset=kvasirr: there is none of that name; did you mean 'kvas"),
        (train, "experiment=evidence/loro", "experiment=evidence/loro: there is none of that name; did you"),
        (train, "peft/gate=sof", "peft/gate=sof: there is none of that name; did you mean 'soft'?"),
        (train, "peft=zzz", "peft=zzz: there is none of that name; there are adapter, adaptformer, "),
        (train, "peft=lora peft/gate=noisy_top_k", "peft/gate=... is for methods with experts"),
        (dashboard, "projct=x", "unknown key 'projct'; did you mean 'project'?"),
        (train, "seed=abc", "seed=abc is not possible: input should be a valid integer"),
        (train, "seed=-1", "seed=-1 must be 0 to 4294967295"),
        (train, "trainer.max_epochs=ten", "trainer.max_epochs=ten is not possible: input should be"),
        (train, "optimizer.lr=fast", "optimizer.lr=fast is not possible: input should be a valid"),
        (train, "dry_run=true ~trainer.precision", "~trainer.precision would leave precision to a default"),
        (train, "dry_run=true ~optimizer.lr", "~optimizer.lr would leave lr to a default of torch.optim.A"),
        (train, "dry_run=true ~peft.gate", "~peft.gate would leave gate to a default of convlora.peft.con"),
        (train, "dry_run=true ~peft/gate", "~peft.gate would leave gate to a default of convlora.peft.con"),
        (train, "dry_run=true peft/gate=null", "peft/gate=null leaves nothing to build; there are layer, "),
        (train, "dry_run=true peft.gate.balance=0", "peft.gate.balance=0 leaves a gate of top_k=1 nothing"),
        (train, "dry_run=true peft=adaptformer peft.scale=0", "peft.scale=0 must be a number other than 0"),
        (train, "dry_run=true peft=mona peft.dropout=1", "peft.dropout=1 must be at least 0 and below 1"),
        (train, "dry_run=true ~loss._target_", "~loss._target_ leaves nothing to build; leave it out"),
        (train, "dry_run=true ~optimizer", "~optimizer takes away what the command needs; leave it out, or"),
        (train, "dry_run=true ~seed", "~seed takes away what the command needs; leave it out, or set seed"),
        (train, "dry_run=true augment=null", "augment=null leaves nothing to build; there are none, paper"),
        (train, "dry_run=true trainer.precision=fp8", "trainer.precision=fp8 must be 32-true, bf16-mixed "),
        (train, "dry_run=true trainer.max_epochs=null", "trainer.max_epochs must be given; leave it as it"),
        (train, "dry_run=true dataset.val_size=0", "dataset.val_size=0 must be at least 1"),
        (train, "dry_run=true optimizer.lr=null", "optimizer.lr=null is not possible: input should be a "),
        (train, "dry_run=true trainer.devices=two", "trainer.devices=two must be a number, a list of them"),
        (train, "dry_run=true trainer.accelerator=tpu", "trainer.accelerator=tpu must be one of auto, cpu"),
        (train, "run_dir=a(1", """run_dir=a(1 cannot be read; if that is one value, write "run_dir='a("""),
        (train, "dry_run=true trainer.devices=[]", "trainer.devices=[] trains on nothing; set trainer.de"),
        (train, "dry_run=true trainer.strategy=fsdp", "trainer.strategy=fsdp shares parameters out over"),
        (train, "dry_run=true trainer.strategy=deepspeed", "trainer.strategy=deepspeed shares parameters o"),
        (train, "dry_run=true trainer.strategy={_target_:lightning.pytorch.strategies.ModelParallelStrategy}",
         "trainer.strategy={'_target_': 'lightning.pytorch.strategies.ModelParallelStrategy'} shares parame"),
        (train, "dry_run=true trainer.num_nodes=2", "trainer.num_nodes=2 needs run_dir=FOLDER, a folder t"),
        (train, "dry_run=true peft.gate=soft", "peft.gate=soft is not possible: input should be an instance o"
         "f Gate; write peft/gate=soft"),
        (train, "dry_run=true peft/gates=soft", "train takes no peft/gates=...; did you mean 'peft/gate'?"),
        (train, "dry_run=true gate=soft", "gate has another name by now: write peft/gate=NAME"),
        (train, "dry_run=true peft/gate=layer peft.gate.sees=mean", "peft.gate: unknown key 'sees'; it take"
         "s none"),
        (train, "dry_run=true peft.scales=2", "peft.scales=2 is not possible: input should be an instance of "
         "Sequence; write peft.scales=[2]"),
        (train, "dry_run=true peft.scales=[]", "peft.scales=[] leaves no experts; give one for each, or nu"),
        (train, "dry_run=true peft.scales=[1e9]", "peft.scales=[1000000000.0] must be numbers from 1/128 to"),
        (train, "dry_run=true peft.scales=1,2", "Ambiguous value for argument 'peft.scales=1,2'"),
        (train, "dry_run", "Error parsing override 'dry_run' missing EQUAL at '<EOF>'"),
        (train, "dry_run=true peft.gate.balance=inf", "peft.gate.balance=inf must be a number of at least 0"),
        (train, "dry_run=true trainer.devices=0", "trainer.devices=0 trains on nothing; set trainer.devi"),
        (train, "dry_run=true trainer.max_epochs=-1", "trainer.max_epochs=-1 must be at least 1, the num"),
        (train, "dry_run=true optimizer.lr=-1", "optimizer: Invalid learning rate: -1"),
        (train, "trainer.logger=true", "trainer.logger is set by the command itself; leave it out"),
        (train, "loading.batch_size=0", "loading.batch_size=0 must be at least 1"),
        (train, "test_sets=nc4k", "test_sets=nc4k is not possible: input should be a valid list; "),
        (train, "dataset=folder", "folder: neither images nor splits in data; set data_root=YOUR_FOLDER"),
        (train, "dataset.batch_size=2", "dataset.batch_size has another name by now: write loading."),
        (train, "dataset.cache=ram", "dataset.cache has another name by now: write loading.cache"),
        (train, "peft.top_k=2", "peft.top_k has another name by now: write peft.gate.top_k"),
        (train, "loss=bce_dice loss.class_weights=balanced", "loss: unknown key 'class_weights'; it takes n"),
        (train, "prompts=0.5", "prompts=0.5 names no file of conf/prompts; there are default; a setting in "
         "it is given as prompts.box=0.5"),
        (train, "model.head=per_class", "model.head has another name by now: write head"),
        (train, "early_stopping.patience=3", "early_stopping has another name by now: write callbacks."),
        (train, "ckpt_path=last", "ckpt_path has another name by now: write resume=RUN"),
        (evaluate, "checkpoint=run", "dataset=NAME must be given; there are aerial, "),
        (evaluate, "checkpoint=run peft=lora dataset=synthetic", "evaluate takes no peft=...; there "),
        (evaluate, "checkpoint=a dataset=synthetic trainer.precision=32-true", "trainer.precision has no"),
        (predict, "input=a output=b", "checkpoint must be given; write checkpoint=VALUE"),
        (predict, "checkpoint=a.png input=a.png output=b", "a.png is no adapter file or is damaged (Erro"),
        (predict, "checkpoint=nowhere input=a.png output=b", "no adapter at nowhere; a training run"),
        (export, "checkpoint=a.png", "checkpoint=a.png is a file; name the folder of a run, which has a "),
        (export, "checkpoint=nowhere", "checkpoint=nowhere: no nowhere/best.ckpt; name the folder"),
        (convert, "checkpoint=a.png output=b.safetensors", "model=NAME must be given; there are mobile_sam,"),
        (convert, "checkpoint=a.png model=sam_vit_h output=b", "output=b must be a file name that ends in "),
        (train, "dry_run=true model.decoder_eps=0", "sam_tiny: model.decoder_eps=0 must lie between 0 and 1"),
        (prepare, "dataset=isic2018", "dataset=isic2018: there is none of that name; did you mean 'isic"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_the_key(
    cli: Commands, module: ModuleType, arguments: str, message: str
) -> None:
    Path("a.png").write_bytes(b"")
    done = cli(module, *(["dataset=synthetic"] if arguments.startswith("peft") else []), *arguments.split())
    assert done.code == 1
    assert one_line(done.err).startswith(f"error: {message}")
    assert [path.name for path in Path.cwd().iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    "launched",
    [
        {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "train"},
        {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"},
    ],
    ids=["srun", "torchrun"],
)
def test_processes_that_others_start_must_be_told_their_folder(
    cli: Commands, monkeypatch: pytest.MonkeyPatch, launched: dict[str, str]
) -> None:
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    refused = cli(train, "dry_run=true")
    assert refused.code == 1
    assert "a training in 2 processes needs run_dir=FOLDER, a folder that all of them share" in refused.err
    other = cli(train, "dry_run=true", "run_dir=run").err
    assert (
        "2 processes were started, but trainer.devices=1 on trainer.num_nodes=1 are 1; set trainer.d" in other
    )
    assert cli(train, "dry_run=true", "run_dir=run", "trainer.devices=2", "trainer.accelerator=cpu").code == 0


def test_any_argument_of_lightnings_trainer_is_taken_as_it_is(cli: Commands) -> None:
    done = cli(train, *QUIET, "trainer.limit_train_batches=2", "+trainer.limit_val_batches=1", "run_dir=run")
    assert done.code == 0, done.err
    assert "2 steps in 1 epochs of 2" in done.out
    assert "\n0,1," in Path("run/metrics.csv").read_text()


COMMANDS = {"train": (), "evaluate": ("checkpoint=run",), "prepare": ()}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("dataset", names("dataset"))
def test_every_data_set_composes_under_every_command(command: str, dataset: str) -> None:
    """An override that a data set makes is an error where its group is not listed."""
    config = compose(command, f"dataset={dataset}", *COMMANDS[command])
    assert config.dataset._target_.startswith("convlora.data.sets.")
    if command != "prepare":
        several = len(config.dataset.class_names) > 1
        assert several == (config.loss._target_ == "convlora.losses.CrossEntropyDiceLoss")
        assert several == (config.metrics.primary == "miou")


def test_a_real_data_set_is_trained_with_a_real_model_and_the_papers_optimiser() -> None:
    config = compose("train", "dataset=kvasir", "trainer.devices=4")
    assert config.model.name == "sam_vit_b"
    assert (config.optimizer.lr, config.trainer.max_epochs, config.trainer.accelerator) == (1e-4, 30, "auto")
    toy = compose("train")
    assert toy.model.name == "sam_tiny"
    assert (toy.optimizer.lr, toy.trainer.max_epochs, toy.trainer.accelerator) == (3e-3, 5, "cpu")
    for choice in (["model=sam_vit_h"], ["dataset=kvasir", "model=sam_tiny"]):
        mixed = compose("train", *choice)
        assert mixed.model.name == choice[-1].removeprefix("model=")
        assert (mixed.optimizer.lr, mixed.trainer.max_epochs, mixed.trainer.accelerator) == (1e-4, 30, "auto")


@pytest.mark.parametrize(
    "path", ["run", "outputs/a/2026-11-25_10-00-00", "my run", "a=b", "it's", 'a "b"', "c,d", "e\\f", "[g]"]
)
def test_a_folder_is_given_as_it_is_called(path: str) -> None:
    with_config = compose("export", assign("checkpoint", path))
    assert with_config.checkpoint == path


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ("++peft.num_experts=4,++peft.rank=2", "peft.num_experts-4_peft.rank-2"),
        ("++seed=0,peft/gate=noisy_top_k", "seed-0_peft.gate-noisy_top_k"),
        ("", "defaults"),
    ],
)
def test_a_sweeps_folders_tell_their_overrides(overrides: str, name: str) -> None:
    assert folder_name(overrides) == name


@pytest.mark.parametrize(
    "overrides", ["++peft.blocks=[-1]", "++name=it's mine", "++x=" + 99 * "long", "++n=ü"]
)
def test_a_sweeps_folders_can_be_pasted_and_never_collide(overrides: str) -> None:
    name = folder_name(overrides)
    assert re.fullmatch(rf"[A-Za-z0-9._-]{{1,{FOLDER_NAME}}}", name)
    others = {folder_name(overrides + end) for end in ("'", " ", "é", "]", "[")}
    assert len(others | {name}) == 6


def test_no_arguments_are_arguments_too(cli: Commands) -> None:
    done = cli(train, "--cfg", "job")
    assert done.code == 0, done.err
    assert cli(export).err == "error: checkpoint must be given; write checkpoint=VALUE"
