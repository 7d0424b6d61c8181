"""What every head in conf/head must do, and one that is not there: class logits and masks of queries."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from conftest import ROOT
from hydra.utils import instantiate
from lightning import Trainer
from segment_anything.modeling import MaskDecoder as SamMaskDecoder
from segment_anything.modeling import TwoWayTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from convlora import IGNORED
from convlora.build import make_loss
from convlora.data.samples import Batch
from convlora.data.transforms import LongestSideResize
from convlora.heads import Head, MaskDecoder, PerClass
from convlora.losses import CrossEntropyDiceLoss
from convlora.metrics.scores import Scores
from convlora.peft.conv_lora import ConvLoRA
from convlora.peft.selective import DecoderOnly
from convlora.sam.zoo import SamViT
from convlora.segmenter import Segmenter, fit_mask
from convlora.task import SegmentationTask


class Queries(NamedTuple):
    """What a set loss needs: class logits [n, q, c] and mask logits [n, q, s, s] of queries."""

    classes: Tensor
    masks: Tensor


class QueryHead:
    """More masks than classes, each of which learns how much it is of a class."""

    def build(self, decoder: SamMaskDecoder, num_classes: int) -> MaskDecoder:
        return QueryDecoder(decoder, num_classes)


class QueryDecoder(MaskDecoder):
    def __init__(self, decoder: SamMaskDecoder, num_classes: int):
        super().__init__()
        self.masks = PerClass().build(decoder, num_classes + 2)
        self.classes = nn.Parameter(torch.randn(num_classes + 2, num_classes))

    def outputs(
        self, embeddings: Tensor, position_encoding: Tensor, dense_prompt: Tensor, size: tuple[int, int]
    ) -> Queries:
        masks = self.masks.outputs(embeddings, position_encoding, dense_prompt, size)
        return Queries(self.classes.expand(len(masks), -1, -1), masks)

    def logits(self, outputs: Queries) -> Tensor:
        return torch.einsum("nqc,nqhw->nchw", outputs.classes.softmax(-1), outputs.masks.sigmoid()).log()


def set_loss(outputs: Queries, masks: Tensor) -> Tensor:
    """Cross-entropy of the queries' classes and masks, where query i stands for class i."""
    own = torch.cat([masks == index for index in range(outputs.classes.shape[2])], dim=1).float()
    valid = (masks != IGNORED).float()
    classes = outputs.classes[:, : own.shape[1]].softmax(-1).diagonal(dim1=1, dim2=2)
    found = outputs.masks[:, : own.shape[1]]
    return nn.functional.binary_cross_entropy_with_logits(found, own, valid) - classes.log().mean()


CONF = [
    pytest.param(lambda path=path: instantiate(yaml.safe_load(path.read_text())), id=path.stem)
    for path in sorted((ROOT / "conf/head").glob("*.yaml"))
]
heads = pytest.mark.parametrize("make", [*CONF, pytest.param(QueryHead, id="queries")])


def parts(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


@heads
@pytest.mark.parametrize("num_classes", [1, 3])
def test_outputs_amount_to_logits_of_the_inputs_size(
    make: Callable[[], Head], num_classes: int, tiny: SamViT
) -> None:
    segmenter = Segmenter(tiny.build(), ConvLoRA(), make(), num_classes).eval()
    images = torch.randn(2, 3, 32, 32)
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            outputs = segmenter.outputs(images)
            logits = segmenter.logits(outputs)
            assert torch.equal(segmenter(images), logits)
        assert logits.shape == (2, num_classes, 32, 32)
        assert {part.dtype for part in (logits, *parts(outputs))} == {torch.float32}
        assert logits.isfinite().all()


@heads
def test_images_of_a_batch_do_not_meet(make: Callable[[], Head], tiny: SamViT) -> None:
    segmenter = Segmenter(tiny.build(), DecoderOnly(), make(), 3).eval()
    images = torch.randn(2, 3, 32, 32)
    alone = torch.cat([segmenter(image[None]) for image in images])
    torch.testing.assert_close(segmenter(images), alone, rtol=1e-4, atol=1e-5)


@heads
def test_a_head_is_trained_in_full_and_its_state_loads(make: Callable[[], Head], tiny: SamViT) -> None:
    """A parameter without a gradient would stop distributed training."""
    segmenter = Segmenter(tiny.build(), DecoderOnly(), make(), 3).train()
    outputs = segmenter.outputs(torch.randn(2, 3, 32, 32))
    sum(part.square().sum() for part in parts(outputs)).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for p in segmenter.mask_decoder.parameters())
    other = Segmenter(tiny.build(), DecoderOnly(), make(), 3)
    other.load_trainable_state(segmenter.trainable_state())
    trained = {f"mask_decoder.{name}" for name, _ in segmenter.mask_decoder.named_parameters()}
    assert other.trainable_state().keys() == trained


def test_a_head_of_queries_learns_from_more_than_its_logits(tiny: SamViT) -> None:
    torch.manual_seed(0)
    segmenter = Segmenter(tiny.build(), DecoderOnly(), QueryHead(), 2).train()
    images, masks = torch.randn(2, 3, 32, 32), torch.zeros(2, 1, 32, 32, dtype=torch.uint8)
    masks[..., 16:] = 1
    optimizer = torch.optim.Adam(segmenter.mask_decoder.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        losses.append(set_loss(segmenter.outputs(images), masks))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
    assert (segmenter(images).argmax(1) == masks[:, 0]).float().mean() > 0.9


def test_per_class_equals_segment_anything_with_one_mask_token(tiny: SamViT) -> None:
    """Batched, it gives what segment-anything's decoder gives image by image, once that has token 0 alone."""
    torch.manual_seed(0)
    sam = tiny.build()
    transformer = TwoWayTransformer(depth=2, embedding_dim=32, mlp_dim=32, num_heads=8)
    reference = SamMaskDecoder(transformer_dim=32, transformer=transformer, num_multimask_outputs=0)
    state = {
        key: value for key, value in sam.mask_decoder.state_dict().items() if "iou_prediction" not in key
    }
    state["mask_tokens.weight"] = state["mask_tokens.weight"][:1]
    own = reference.state_dict()
    reference.load_state_dict(own | {key: value for key, value in state.items() if key in own})
    images = torch.randn(3, 3, 32, 32)
    sparse, dense = sam.prompt_encoder(points=None, boxes=None, masks=None)
    position = sam.prompt_encoder.get_dense_pe()
    masks = [reference(sam.image_encoder(image[None]), position, sparse, dense, False)[0] for image in images]
    expected = nn.functional.interpolate(torch.cat(masks), (32, 32), mode="bilinear")
    torch.testing.assert_close(Segmenter(sam, DecoderOnly())(images), expected, atol=1e-5, rtol=1e-4)


def test_each_class_starts_from_the_token_for_unambiguous_prompts(tiny: SamViT) -> None:
    sam = tiny.build()
    token = sam.mask_decoder.mask_tokens.weight[0].clone()
    segmenter = Segmenter(sam, DecoderOnly(), num_classes=5).eval()
    assert all(torch.equal(row, token) for row in segmenter.mask_decoder.mask_tokens.weight)
    images = torch.randn(2, 3, 32, 32)
    logits = segmenter(images)
    torch.testing.assert_close(logits, logits[:, :1].expand(2, 5, 32, 32))
    nn.init.normal_(segmenter.mask_decoder.mask_tokens.weight)
    assert segmenter(images).diff(dim=1).abs().amax(dim=(0, 2, 3)).min() > 1e-3


def test_classes_part_after_one_step(tiny: SamViT) -> None:
    torch.manual_seed(0)
    segmenter = Segmenter(tiny.build(), DecoderOnly(), num_classes=3)
    images, ids = torch.randn(1, 3, 32, 32), torch.randint(0, 3, (1, 32, 32))
    optimizer = torch.optim.SGD(segmenter.mask_decoder.parameters(), lr=0.1)
    nn.functional.cross_entropy(segmenter(images), ids).backward()
    optimizer.step()
    logits = segmenter(images)
    assert (logits[:, 0] - logits[:, 1]).abs().max() > 1e-4


def test_names_of_trained_tensors_are_those_of_saved_adapters(tiny: SamViT) -> None:
    names = Segmenter(tiny.build(), DecoderOnly(), num_classes=2).trainable_state().keys()
    assert {name.split(".")[1] for name in names} == {
        "transformer", "iou_token", "mask_tokens", "output_upscaling", "output_hypernetworks_mlps",
    }  # fmt: skip
    assert {
        "mask_decoder.mask_tokens.weight",
        "mask_decoder.output_hypernetworks_mlps.1.layers.0.weight",
    } <= names


class SetLoss(nn.Module):
    def forward(self, outputs: Queries, masks: Tensor) -> Tensor:
        return set_loss(outputs, masks)


@pytest.mark.parametrize(("head", "loss"), [(PerClass(), CrossEntropyDiceLoss()), (QueryHead(), SetLoss())])
def test_the_loss_sees_outputs_and_masks_of_one_size(
    head: Head, loss: nn.Module, tiny: SamViT, tmp_path: Path
) -> None:
    """In evaluation that of the image if they are logits, that of the network's input if they are more."""
    torch.manual_seed(0)
    resize, sizes, names = LongestSideResize(32), [(40, 60), (20, 11)], ["a", "b"]
    contents = [resize.content(*size) for size in sizes]
    masks = [torch.randint(0, 2, size, dtype=torch.uint8) for size in sizes]
    fitted = [fit_mask(mask, content, 32) for mask, content in zip(masks, contents, strict=True)]
    images = torch.randn(2, 3, 32, 32)
    calls: list[tuple[Any, Tensor]] = []
    loss.register_forward_pre_hook(lambda _, args: calls.append(args))
    scores = Scores("miou", "max", {"classes": "convlora.metrics.classes.ClassScores"}, names)
    segmenter = Segmenter(tiny.build(), ConvLoRA(), head, 2)
    task = SegmentationTask(segmenter, loss, scores, torch.optim.AdamW, {}, {})
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", max_epochs=1, **quiet)  # type: ignore[arg-type]
    trainer.fit(task, DataLoader([Batch(images, fitted, contents, names)], batch_size=None))
    [(outputs, given)] = calls
    assert torch.equal(given[:, 0], torch.stack(fitted))
    calls.clear()
    trainer.test(task, DataLoader([Batch(images, masks, contents, names)], batch_size=None), verbose=False)
    if isinstance(outputs, Tensor):
        assert [tuple(given.shape[2:]) for _, given in calls] == sizes
        assert [tuple(logits.shape[2:]) for logits, _ in calls] == sizes
    else:
        [(_, given)] = calls
        assert torch.equal(given[:, 0], torch.stack(fitted))
    mean = sum(len(given) * loss(outputs, given) for outputs, given in list(calls)) / 2
    assert trainer.callback_metrics["test/loss"] == pytest.approx(mean.item())


@heads
@pytest.mark.parametrize("num_classes", [1, 3])
def test_a_loss_is_tried_on_what_the_head_gives(
    make: Callable[[], Head], num_classes: int, tiny: SamViT
) -> None:
    with torch.device("meta"):
        outline = Segmenter(tiny.build(), DecoderOnly(), make(), num_classes)
    loss = {"_target_": "test_heads.SetLoss" if make is QueryHead else "convlora.losses.StructureLoss"}
    if make is QueryHead or num_classes == 1:
        make_loss(loss, outline)
    else:
        with pytest.raises(ValueError, match="for a foreground, here are 3 classes"):
            make_loss(loss, outline)
