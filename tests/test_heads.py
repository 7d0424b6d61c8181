"""What every head in conf/head must do, and what each of them does."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY
from lightning import Trainer
from segment_anything.modeling import MaskDecoder as SamMaskDecoder
from segment_anything.modeling import TwoWayTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from convlora.build import make_loss
from convlora.data.samples import Batch
from convlora.data.transforms import LongestSideResize
from convlora.heads import Head, Query, QueryDecoder
from convlora.losses import CrossEntropyDiceLoss
from convlora.metrics.scores import Scores
from convlora.peft.conv_lora import ConvLoRA
from convlora.peft.selective import DecoderOnly
from convlora.sam.zoo import SamViT
from convlora.schema import make
from convlora.segmenter import Segmenter, fit_mask, restore_size, to_prediction
from convlora.set_loss import Queries, SetLoss
from convlora.task import SegmentationTask

FILES = sorted(path.stem for path in (ROOT / "conf/head").glob("*.yaml"))


def head_from_conf(name: str) -> Head:
    config = yaml.safe_load((ROOT / f"conf/head/{name}.yaml").read_text())
    head: Head = make("head", {key: value for key, value in config.items() if key != "defaults"})
    return head


def builds(name: str, num_classes: int) -> bool:
    """Whether a head is for so many classes."""
    with torch.device("meta"):
        try:
            head_from_conf(name).build(TINY.build().mask_decoder, num_classes)
        except ValueError:
            return False
    return True


heads = pytest.mark.parametrize("name", FILES)
heads_and_classes = pytest.mark.parametrize(
    ("name", "num_classes"),
    [(name, count) for name in FILES for count in (1, 3) if count == 3 or builds(name, count)],
)


def parts(outputs: Any) -> list[Tensor]:
    """Tensors of what a head gives."""
    return (
        [outputs] if isinstance(outputs, Tensor) else [each for each in outputs if isinstance(each, Tensor)]
    )


@heads_and_classes
def test_outputs_amount_to_logits_of_the_inputs_size(name: str, num_classes: int, tiny: SamViT) -> None:
    segmenter = Segmenter(tiny.build(), ConvLoRA(), head_from_conf(name), num_classes).eval()
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
def test_images_of_a_batch_do_not_meet(name: str, tiny: SamViT) -> None:
    segmenter = Segmenter(tiny.build(), DecoderOnly(), head_from_conf(name), 3).eval()
    images = torch.randn(2, 3, 32, 32)
    alone = torch.cat([segmenter(image[None]) for image in images])
    torch.testing.assert_close(segmenter(images), alone, rtol=1e-4, atol=1e-5)


@heads
def test_a_head_is_trained_in_full_and_its_state_loads(name: str, tiny: SamViT) -> None:
    """A parameter without a gradient would stop distributed training."""
    segmenter = Segmenter(tiny.build(), DecoderOnly(), head_from_conf(name), 3).train()
    outputs = segmenter.outputs(torch.randn(2, 3, 32, 32))
    sum(part.square().sum() for part in parts(outputs)).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for p in segmenter.mask_decoder.parameters())
    other = Segmenter(tiny.build(), DecoderOnly(), head_from_conf(name), 3)
    other.load_trainable_state(segmenter.trainable_state())
    trained = {f"mask_decoder.{name}" for name, _ in segmenter.mask_decoder.named_parameters()}
    assert other.trainable_state().keys() == trained


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


@pytest.mark.parametrize(
    ("name", "loss"), [("per_class", "logits"), ("query", "logits"), ("query", "outputs")]
)
def test_the_loss_sees_what_it_is_a_function_of_and_masks_of_one_size(
    name: str, loss: str, tiny: SamViT, tmp_path: Path
) -> None:
    """In evaluation logits have the size of the image, outputs that of the network's input."""
    torch.manual_seed(0)
    resize, sizes, names = LongestSideResize(32), [(40, 60), (20, 11)], ["a", "b"]
    contents = [resize.content(*size) for size in sizes]
    masks = [torch.randint(0, 2, size, dtype=torch.uint8) for size in sizes]
    fitted = [fit_mask(mask, content, 32) for mask, content in zip(masks, contents, strict=True)]
    images = torch.randn(2, 3, 32, 32)
    calls: list[tuple[Any, Tensor]] = []
    criterion = CrossEntropyDiceLoss() if loss == "logits" else SetLoss()
    criterion.register_forward_pre_hook(lambda _, args: calls.append(args))
    scores = Scores("miou", "max", {"classes": "convlora.metrics.classes.ClassScores"}, names)
    segmenter = Segmenter(tiny.build(), ConvLoRA(), head_from_conf(name), 2)
    task = SegmentationTask(segmenter, criterion, scores, torch.optim.AdamW, {}, {})
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", max_epochs=1, **quiet)  # type: ignore[arg-type]
    trainer.fit(task, DataLoader([Batch(images, fitted, contents, names)], batch_size=None))
    [(outputs, given)] = calls
    assert isinstance(outputs, Queries if loss == "outputs" else Tensor)
    assert torch.equal(given[:, 0], torch.stack(fitted))
    calls.clear()
    batches = [
        Batch(images, masks, contents, names),
        Batch(images[1:], masks[1:], contents[1:], ["c"]),
    ]
    trainer.test(task, DataLoader(batches, batch_size=None), verbose=False)
    if loss == "logits":
        assert [tuple(given.shape[2:]) for _, given in calls] == [*sizes, sizes[1]]
        assert [tuple(logits.shape[2:]) for logits, _ in calls] == [*sizes, sizes[1]]
    else:
        (_, first), (_, second) = calls
        assert torch.equal(torch.cat([first, second])[:, 0], torch.stack([*fitted, fitted[1]]))
    mean = sum(len(given) * criterion(outputs, given) for outputs, given in list(calls)) / 3
    assert trainer.callback_metrics["test/loss"] == pytest.approx(mean.item())


@heads_and_classes
def test_a_loss_is_tried_on_what_the_head_gives(name: str, num_classes: int, tiny: SamViT) -> None:
    with torch.device("meta"):
        outline = Segmenter(tiny.build(), DecoderOnly(), head_from_conf(name), num_classes)
    foreground, several, queries = (
        {"_target_": f"convlora.{each}"}
        for each in ("losses.StructureLoss", "losses.CrossEntropyDiceLoss", "set_loss.SetLoss")
    )
    if num_classes == 1:
        make_loss(foreground, outline)
    else:
        make_loss(several, outline)
        with pytest.raises(ValueError, match="for a foreground, here are 3 classes"):
            make_loss(foreground, outline)
    if isinstance(outline.outputs(torch.empty(1, 3, 32, 32, device="meta")), Queries):
        make_loss(queries, outline)
    else:
        with pytest.raises(
            ValueError, match="loss=set is for a head of queries, and this one gives logits; "
        ):
            make_loss(queries, outline)


def test_queries_equal_segment_anything_with_one_mlp_for_all_tokens(tiny: SamViT) -> None:
    """The masks of the queries are those of its decoder, image by image, with their tokens."""
    torch.manual_seed(0)
    sam = tiny.build()
    transformer = TwoWayTransformer(depth=2, embedding_dim=32, mlp_dim=32, num_heads=8)
    reference = SamMaskDecoder(transformer_dim=32, transformer=transformer, num_multimask_outputs=5)
    images = torch.randn(3, 3, 32, 32)
    sparse, dense = sam.prompt_encoder(points=None, boxes=None, masks=None)
    position, encoder = sam.prompt_encoder.get_dense_pe(), sam.image_encoder
    segmenter = Segmenter(sam, DecoderOnly(), Query(6), 3)
    own = reference.state_dict()
    for key, value in segmenter.mask_decoder.state_dict().items():
        if key in own:
            own[key] = value
    for key in own:
        if "hypernetworks" in key:
            own[key] = own[re.sub(r"mlps\.\d", "mlps.0", key)]
    reference.load_state_dict(own)
    tokens: list[Tensor] = []
    reference.transformer.register_forward_hook(lambda *call: tokens.append(call[2][0][:, 1:]))
    masks = [reference.predict_masks(encoder(image[None]), position, sparse, dense)[0] for image in images]
    outputs = segmenter.outputs(images)
    torch.testing.assert_close(outputs.masks, torch.cat(masks), atol=1e-5, rtol=1e-4)
    classes = segmenter.mask_decoder.output_classifier(torch.cat(tokens))
    torch.testing.assert_close(outputs.classes, classes, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("spread", [0.0, 0.1, 2.0])
def test_queries_start_around_the_token_for_unambiguous_prompts(spread: float, tiny: SamViT) -> None:
    torch.manual_seed(0)
    sam = tiny.build()
    token = sam.mask_decoder.mask_tokens.weight[0].detach().clone()
    decoder = Segmenter(sam, DecoderOnly(), Query(200, spread), 3).mask_decoder
    moved = (decoder.mask_tokens.weight.detach() - token) / token.std()
    assert moved.std().item() == pytest.approx(spread, rel=0.05)
    assert moved.mean(dim=0).abs().max() <= 0.3 * spread


def test_logits_of_queries_are_what_they_say_of_each_class() -> None:
    """Pixel by pixel; their softmax is each class's share, as 8-bit probabilities show it."""
    torch.manual_seed(0)
    classes, masks = 3 * torch.randn(2, 6, 4), 5 * torch.randn(2, 6, 5, 7)
    logits = QueryDecoder.logits(None, Queries(classes, masks, (5, 7)))  # type: ignore[arg-type]
    said = torch.zeros(2, 3, 5, 7)
    for image, kind, y, x in np.ndindex(2, 3, 5, 7):
        for query in range(6):
            share = classes[image, query].exp()[kind] / classes[image, query].exp().sum()
            said[image, kind, y, x] += share / (1 + (-masks[image, query, y, x]).exp())
    torch.testing.assert_close(logits, torch.log(said + 1e-6))
    for own, each in zip(logits, said, strict=True):
        found = to_prediction(own)
        assert torch.equal(found.classes.long(), each.argmax(0))
        share = each.amax(0) / each.sum(0)
        torch.testing.assert_close(found.prob.float() / 255, share, atol=0.5 / 255 + 1e-4, rtol=0)


def test_pixels_that_no_query_sees_have_no_class_and_do_not_outweigh_others() -> None:
    classes, masks = torch.zeros(1, 2, 3), torch.full((1, 2, 1, 2), -200.0)
    classes[0, 0, 0] = classes[0, 1, 1] = 50
    masks[0, 1, 0, 1] = 50  # the second pixel is of the second class
    logits = QueryDecoder.logits(None, Queries(classes, masks, (1, 2)))[0]  # type: ignore[arg-type]
    assert to_prediction(logits).prob.tolist() == [[128, 255]]
    between = restore_size(logits, (1, 2), (1, 4))
    assert to_prediction(between).classes[0, 1:].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("num_queries", "num_classes", "message"),
    [
        (16, 1, "head=query tells several classes apart, here is one; set head=per_class"),
        (0, 4, "head.num_queries=0 must be at least 1"),
        (3, 4, r"head.num_queries=3 is less than the 4 classes, .*; set head.num_queries=4 or more"),
    ],
)
def test_queries_of_a_number_that_cannot_be_are_refused(
    num_queries: int, num_classes: int, message: str, tiny: SamViT
) -> None:
    with pytest.raises(ValueError, match=message):
        Segmenter(tiny.build(), DecoderOnly(), Query(num_queries), num_classes)
