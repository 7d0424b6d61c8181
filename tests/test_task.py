"""What steps, epochs and whole runs do to weights and numbers."""

import copy
import csv
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, Commands
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from convlora import adapter, evaluate, predict, train
from convlora.checkpoint import next_epoch, read_checkpoint
from convlora.data.loading import Loading
from convlora.data.sets.synthetic import Synthetic
from convlora.data.transforms import SquareResize
from convlora.losses import StructureLoss
from convlora.metrics.overlap import dice
from convlora.metrics.saliency import mae
from convlora.metrics.scores import Scores
from convlora.peft.conv_lora import ConvLoRA, ConvLoRAEquation
from convlora.peft.gating import NoisyTopKGate
from convlora.peft.lora import LoRA
from convlora.sam.zoo import SamViT
from convlora.segmenter import Segmenter, restore_size
from convlora.task import SegmentationTask, parameter_groups

QUIET = (*SMALL, "logger=csv")
QUIETER = ("trainer.accelerator=cpu", "trainer.enable_progress_bar=false")
Optimizer = Callable[[Iterable[Any]], torch.optim.Optimizer]


def scenes(size: int = 32, scene_seed: int = 0) -> Synthetic:
    """Three scenes of each split, in batches of two."""
    return Synthetic(
        class_names=["object"],
        train_size=3,
        val_size=3,
        test_size=3,
        size=size,
        scene_seed=scene_seed,
        loading=Loading(SquareResize(32), batch_size=2, num_workers=0),
    )


def adapted(tiny: SamViT) -> Segmenter:
    """A segmenter whose every trained tensor matters, unlike at the start of a training."""
    torch.manual_seed(0)
    segmenter = Segmenter(tiny.build(), ConvLoRA(rank=2, num_experts=3))
    for parameter in segmenter.image_encoder.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return segmenter


def gates_of(segmenter: Segmenter) -> list[NoisyTopKGate]:
    return [module for module in segmenter.modules() if isinstance(module, NoisyTopKGate)]


def make_task(segmenter: Segmenter, optimizer: Optimizer) -> SegmentationTask:
    named = {"dice": "convlora.metrics.overlap.dice", "mae": "convlora.metrics.saliency.mae"}
    return SegmentationTask(segmenter, StructureLoss(), Scores("dice", "max", named), optimizer, {}, {})


def make_trainer(**given: Any) -> Trainer:
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return Trainer(
        accelerator="cpu", devices=1, use_distributed_sampler=False, **dict.fromkeys(off, False), **given
    )


def numbers(trainer: Trainer, stage: str) -> dict[str, float]:
    return {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith(stage)}


def test_a_step_descends_on_segmentation_plus_balance_loss(tiny: SamViT) -> None:
    data, segmenter = scenes(), adapted(tiny)
    by_hand, states = copy.deepcopy(segmenter), []
    gates_of(segmenter)[0].register_forward_pre_hook(
        lambda gate, _: states.append(torch.get_rng_state()) if gate.training else None
    )
    trainer = make_trainer(max_epochs=1, limit_train_batches=1)
    trainer.fit(make_task(segmenter, partial(torch.optim.SGD, lr=0.1)), data)

    batch = next(iter(data.train_dataloader()))
    gates = gates_of(by_hand)
    torch.set_rng_state(states[0])
    segmentation = StructureLoss()(by_hand.train()(batch.images), torch.stack(batch.masks)[:, None])
    (segmentation + gates[0].aux_loss + gates[1].aux_loss).backward()
    found = segmenter.trainable_state()
    for name, parameter in by_hand.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            expected = parameter.detach() - 0.1 * parameter.grad
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-7, msg=name)
    assert all(gate.weight.grad.abs().max() > 1e-3 for gate in gates)  # type: ignore[union-attr]

    losses = [
        StructureLoss()(logit[None], mask[None, None]).item()
        for batch in data.val_dataloader()
        for logit, mask in zip(segmenter.eval()(batch.images), batch.masks, strict=True)
    ]
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(segmentation.item(), rel=1e-5)
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_what_is_trained_is_in_training_mode_and_what_is_frozen_is_not(tiny: SamViT) -> None:
    segmenter = adapted(tiny)
    modes: dict[str, bool] = {}
    for name, module in segmenter.named_modules():
        module.register_forward_pre_hook(
            lambda module, _, name=name: modes.update({name: module.training})  # type: ignore[misc]
        )
    trainer = make_trainer(max_epochs=1, limit_val_batches=0)
    trainer.fit(make_task(segmenter, torch.optim.AdamW), scenes())
    assert modes["mask_decoder.transformer"]
    assert modes["image_encoder.blocks.0.attn.qkv.gate"]
    assert not modes["image_encoder.blocks.0"]


def test_scores_of_one_pass_leave_nothing_to_the_next(tiny: SamViT) -> None:
    data, other = scenes(), scenes(scene_seed=9)
    task = make_task(adapted(tiny), partial(torch.optim.SGD, lr=0.1))
    trainer = make_trainer(max_epochs=1, num_sanity_val_steps=1)
    trainer.fit(task, data)
    after_the_sanity_check = numbers(trainer, "val/")
    trainer.test(task, data, verbose=False)
    trainer.test(task, other, verbose=False)
    after_two_tests = numbers(trainer, "test/")
    trainer.validate(task, other, verbose=False)
    after_the_tests = numbers(trainer, "val/")

    for found, stage, images in (
        (after_the_sanity_check, "validate", data),
        (after_two_tests, "test", other),
        (after_the_tests, "validate", other),
    ):
        alone, fresh = make_trainer(), make_task(task.segmenter, task.optimizer)
        getattr(alone, stage)(fresh, images, verbose=False)
        expected = {name: value.item() for name, value in alone.callback_metrics.items()}
        assert len(expected) == (3 if stage == "test" else 2)  # a validation computes fewer scores
        assert found == pytest.approx(expected, rel=1e-6)


def test_a_loss_that_is_not_finite_for_one_image_is_not_averaged_away(tiny: SamViT) -> None:
    data, segmenter = scenes(), adapted(tiny)
    seen: list[int] = []

    def break_one(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        seen.append(len(output))
        return output if len(seen) > 1 else output * torch.nan

    segmenter.image_encoder.register_forward_hook(break_one)
    with pytest.raises(FloatingPointError, match="val/loss is nan"):
        make_trainer().validate(make_task(segmenter, torch.optim.AdamW), data, verbose=False)


@pytest.mark.parametrize("method", [LoRA, ConvLoRA])
def test_b_learns_at_a_multiple_of_the_rate_over_all_steps(
    tiny: SamViT, method: type[LoRA | ConvLoRA]
) -> None:
    segmenter = Segmenter(tiny.build(), method(b_rate=8.0))
    seen: list[list[float]] = []

    def note(trainer: Trainer, *_: Any) -> None:
        seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    trainer = make_trainer(max_epochs=2, callbacks=LambdaCallback(on_train_batch_start=note))
    trainer.fit(make_task(segmenter, partial(torch.optim.AdamW, lr=0.01)), scenes())
    for step, rates in enumerate(seen):
        own = 0.01 * (1 - step / 4)
        assert rates == pytest.approx([own, own, 8 * own])
    assert len(seen) == 4
    groups = trainer.optimizers[0].param_groups
    fast = {id(p) for p in groups[2]["params"]}
    assert fast == {id(p) for name, p in segmenter.named_parameters() if name.endswith("lora_b.weight")}
    assert not fast & {id(p) for group in groups[:2] for p in group["params"]}


def test_groups_are_two_where_all_learn_at_one_rate(tiny: SamViT) -> None:
    """Checkpoints hold that many, in this order."""
    groups = parameter_groups(Segmenter(tiny.build(), ConvLoRA()))
    assert [sorted(group) for group in groups] == [["params"], ["params", "weight_decay"]]


@pytest.mark.parametrize("method", [LoRA, ConvLoRA, ConvLoRAEquation])
@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(method: type[LoRA | ConvLoRAEquation], rate: float) -> None:
    with pytest.raises(ValueError, match=r"peft.b_rate=.* must be positive"):
        method(b_rate=rate)


def test_layers_weight_their_loss_by_the_share_of_the_training_that_is_done(
    tiny: SamViT, tmp_path: Path
) -> None:
    def fit(epochs: int, resumed: Path | None = None) -> list[float]:
        segmenter, seen = adapted(tiny), []
        first = gates_of(segmenter)[0]
        first.aux_weight = lambda progress: seen.append(progress) or 1.0  # type: ignore[assignment,func-returns-value]
        trainer = make_trainer(max_epochs=3, num_sanity_val_steps=0)
        if epochs < 3:
            trainer.callbacks.append(LambdaCallback(on_train_epoch_end=stop_after(epochs)))  # type: ignore[attr-defined]
        trainer.fit(make_task(segmenter, torch.optim.AdamW), scenes(), ckpt_path=resumed)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return seen

    def stop_after(epochs: int) -> Callable[[Trainer, LightningModule], None]:
        def stop(trainer: Trainer, task: LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch + 1 >= epochs

        return stop

    whole = [step / 6 for step in range(6)]  # 3 epochs of 2 batches
    assert fit(3) == pytest.approx(whole)
    assert fit(1) == pytest.approx(whole[:2])
    assert fit(3, tmp_path / "last.ckpt") == pytest.approx(whole[2:])


def test_every_trained_parameter_is_in_one_group_and_only_weights_decay(tiny: SamViT) -> None:
    segmenter = adapted(tiny)
    decaying, plain = torch.optim.AdamW(parameter_groups(segmenter), lr=0.1, weight_decay=0.5).param_groups
    assert (decaying["weight_decay"], plain["weight_decay"]) == (0.5, 0)
    grouped = [id(p) for p in (*decaying["params"], *plain["params"])]
    trained = {id(p): name for name, p in segmenter.named_parameters() if p.requires_grad}
    assert sorted(grouped) == sorted(trained)
    norms = {id(p) for m in segmenter.modules() if "Norm" in type(m).__name__ for p in m.parameters()}
    biases = {key for key, name in trained.items() if name.endswith("bias")}
    assert norms & trained.keys()
    assert {id(p) for p in plain["params"]} == (norms | biases) & trained.keys()


def test_weight_decay_shrinks_weights_and_leaves_biases(tiny: SamViT) -> None:
    segmenter = adapted(tiny)
    before = {name: value.clone() for name, value in segmenter.trainable_state().items()}
    optimizer = torch.optim.AdamW(parameter_groups(segmenter), lr=0.1, weight_decay=0.5)
    for parameter in segmenter.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    after = segmenter.trainable_state()
    shrunk = "image_encoder.blocks.0.attn.qkv.lora_a.weight"
    kept = "mask_decoder.transformer.final_attn_token_to_image.q_proj.bias"
    torch.testing.assert_close(after[shrunk], before[shrunk] * (1 - 0.1 * 0.5))
    assert torch.equal(after[kept], before[kept])


def logged(run: str, column: str) -> dict[int, list[float]]:
    """What a run logged, by step."""
    found: dict[int, list[float]] = {}
    with Path(run, "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            if row[column]:
                found.setdefault(int(row["step"]), []).append(float(row[column]))
    return found


def test_learning_rate_falls_linearly_to_0_over_all_steps_also_after_a_resume(cli: Commands) -> None:
    job = (
        *QUIET,
        "trainer.accumulate_grad_batches=2",
        "trainer.max_epochs=3",
        "trainer.log_every_n_steps=1",
        "callbacks.interrupt._target_=spies.Interrupt",
        "run_dir=run",
    )
    Path("interrupt").touch()
    assert "interrupted" in cli(train, *job).err
    assert set(logged("run", "train/lr")) == set(range(3))
    resumed = cli(train, "resume=run")
    assert resumed.code == 0, resumed.err
    found = logged("run", "train/lr")
    assert list(found) == list(range(9))  # 3 epochs of 5 batches, two to a step and the last alone
    for step, rates in found.items():
        assert rates == pytest.approx([1e-3 * (1 - step / 9)] * len(rates), rel=1e-6)
    last = torch.load("run/last.ckpt", weights_only=True)
    assert [group["lr"] for group in last["optimizer_states"][0]["param_groups"]] == [0, 0]


def test_the_adapter_and_the_test_scores_are_those_of_the_best_epoch(cli: Commands) -> None:
    """The loss falls, so that the epoch of the greatest loss is not the last."""
    best_is_early = ("callbacks.best.monitor=val/loss", "callbacks.best.mode=max")
    done = cli(train, *QUIET, *best_is_early, "trainer.max_epochs=3", "optimizer.lr=1e-2", "run_dir=run")
    assert done.code == 0, done.err
    best, last = (read_checkpoint(Path("run", name)) for name in ("best.ckpt", "last.ckpt"))
    assert next_epoch(best) < next_epoch(last) == 3
    kept = load_file("run/adapter.safetensors")
    assert kept.keys() == best["state_dict"].keys()
    assert all(torch.equal(kept[name], value) for name, value in best["state_dict"].items())
    assert not all(torch.equal(kept[name], value) for name, value in last["state_dict"].items())
    data = ("dataset=synthetic", "dataset.size=48", "dataset.test_size=5", "loading.num_workers=0")
    assert cli(evaluate, "checkpoint=run", *data, "loading.batch_size=2", *QUIETER, "output=out").code == 0
    scores = json.loads(Path("out/scores.json").read_text())
    summary = json.loads(Path("run/summary.json").read_text())
    assert {name: scores[name] for name in summary["test"]} == pytest.approx(summary["test"], abs=1e-6)
    assert summary["val/loss"] == pytest.approx(max(max(v) for v in logged("run", "val/loss").values()))


def plant(folder: str, sizes: list[tuple[int, int]]) -> None:
    """Images with masks, in the layout of a data set of one's own; sizes are heights and widths."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for kind in ("images", "masks"):
            Path(folder, split, kind).mkdir(parents=True)
        for i, (height, width) in enumerate(sizes):
            image = rng.integers(0, 255, (height, width, 3), np.uint8)
            mask = np.zeros((height, width), np.uint8)
            mask[height // 3 :, : width // 2] = 255
            cv2.imwrite(f"{folder}/{split}/images/{i}.png", image)
            cv2.imwrite(f"{folder}/{split}/masks/{i}.png", mask)


def read(path: str) -> NDArray[np.uint8]:
    picture = cv2.imread(path, cv2.IMREAD_GRAYSCALE)
    assert picture is not None, path
    return picture  # type: ignore[return-value]


def test_padding_is_cropped_and_predicted_maps_are_those_that_are_scored(cli: Commands) -> None:
    """Trained, evaluated and predicted in the precision of the training, where images are not square."""
    sizes = [(40, 90), (70, 30), (64, 64)]
    plant("mine", sizes)
    own = ("dataset=folder", "data_root=mine", "loading.num_workers=0", "loading.batch_size=1")
    settings = [option for option in QUIET if not option.startswith(("dataset.", "loading."))]
    job = (
        "model=sam_tiny",
        "resize=longest_side",
        "trainer.precision=bf16-mixed",
        "optimizer.lr=1e-2",
        "run_dir=run",
    )
    done = cli(train, *settings, *own, *job)
    assert done.code == 0, done.err
    done = cli(evaluate, "checkpoint=run", *own, *QUIETER, "output=out")
    assert done.code == 0, done.err
    options = ("input=mine/test/images", "num_workers=0", "batch_size=1", "device=cpu", "probabilities=true")
    assert cli(predict, "checkpoint=run", *options, "output=found").code == 0
    assert cli(predict, "checkpoint=run", *options, "output=exact", "precision=32-true").code == 0
    assert Path("run/images.csv").read_text() == Path("out/images.csv").read_text()
    with Path("out/images.csv").open() as file:
        rows = {Path(row["image"]).stem: row for row in csv.DictReader(file)}
    predictor = adapter.load("run", device="cpu")
    rounded = False
    for name, (height, width) in zip("012", sizes, strict=True):
        prob, truth = read(f"found/probabilities/{name}.png"), read(f"mine/test/masks/{name}.png") > 0
        assert float(rows[name]["mae"]) == pytest.approx(mae(prob, truth), abs=1e-12)
        assert float(rows[name]["dice"]) == pytest.approx(dice(prob, truth), abs=1e-12)
        pixels = cv2.cvtColor(cv2.imread(f"mine/test/images/{name}.png"), cv2.COLOR_BGR2RGB)  # type: ignore[arg-type]
        with torch.inference_mode(), predictor.context():
            logits = predictor.segmenter(predictor.prepare(pixels)[None])
        scale = 64 / max(height, width)
        filled = logits[:, :, : round(height * scale), : round(width * scale)]
        native = F.interpolate(filled, (height, width), mode="bilinear")[0, 0]
        assert np.array_equal(prob, (native.sigmoid() * 255).round().byte().numpy())
        if height != width:
            assert not torch.equal(native, restore_size(logits[0], (64, 64), (height, width))[0])
        rounded |= not np.array_equal(prob, read(f"exact/probabilities/{name}.png"))
    assert rounded, "bfloat16 rounds what single precision does not"


def test_float16_on_a_cpu_becomes_bfloat16_and_is_said_once(
    cli: Commands, recwarn: pytest.WarningsRecorder
) -> None:
    plant("mine", [(20, 20)])
    data = ("dataset=folder", "data_root=mine", "loading.num_workers=0")
    settings = [option for option in QUIET if not option.startswith(("dataset.", "loading."))]
    done = cli(train, "model=sam_tiny", *settings, *data, "trainer.precision=16-mixed", "run_dir=run")
    assert done.code == 0, done.err
    said = "precision=16-mixed is for GPUs; the CPU computes in bf16-mixed"
    assert done.out.splitlines().count(said) == 1
    assert json.loads(Path("run/summary.json").read_text())["precision"] == "bf16-mixed"
    done = cli(evaluate, "checkpoint=run", *data, *QUIETER, "precision=16-mixed", "output=out")
    assert done.code == 0, done.err
    assert done.out.splitlines().count(said) == 1
    assert json.loads(Path("out/scores.json").read_text())["precision"] == "bf16-mixed"
    options = ("input=mine/test/images", "output=found", "num_workers=0", "device=cpu")
    done = cli(predict, "checkpoint=run", *options, "precision=16-mixed")
    assert done.code == 0, done.err
    assert done.out.splitlines().count(said) == 1
    assert not [each for each in recwarn if "fp16 is not supported" in str(each.message)]


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_precisions_that_round_the_trained_weights_are_refused(cli: Commands, precision: str) -> None:
    done = cli(train, *QUIET, f"trainer.precision={precision}", "run_dir=run")
    assert done.code == 1
    assert done.err == f"error: trainer.precision={precision} rounds what is trained; set bf16-mixed"
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("what", "batch", "message"),
    [
        ("images", 2, "the loss is not finite at step 7 (epoch 2, learning rate 0.0003, precision 32-true"),
        ("images", 4, "the loss is not finite at step 9 (epoch 2, learning rate 0.0001, precision 32-true"),
        ("gradients", 4, "val/loss is nan after step 9 (epoch 2, learning rate 0.0001, precision 32-true"),
    ],
)
def test_broken_numbers_end_the_run_and_leave_the_last_good_checkpoint(
    cli: Commands, what: str, batch: int, message: str
) -> None:
    poison = [f"callbacks.poison.{key}={value}" for key, value in
              {"_target_": "spies.Poison", "what": what, "epoch": 1, "batch": batch}.items()]  # fmt: skip
    done = cli(train, *QUIET, *poison, "run_dir=run", "callbacks.early_stopping=null")
    assert done.code == 1
    assert "Traceback" not in done.err
    [line] = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert message in line
    assert ("images train/images/000" in line) == (what == "images")
    for help_ in ("optimizer.lr", "trainer.precision=bf16-mixed or 32-true"):
        assert help_ in line
    kept = {path.name: read_checkpoint(path) for path in Path("run").rglob("*.ckpt")}
    assert kept.keys() == {"best.ckpt", "last.ckpt"}
    for checkpoint in kept.values():
        assert next_epoch(checkpoint) == 1
        assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    assert not Path("run/adapter.safetensors").exists()
    assert "run/last.ckpt after 1 epochs" in done.out
    assert "go on:" not in done.out  # to meet the same again
