"""Boxes and points: where they lie, what they are trained on, what they find."""

import csv
import gc
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composed import compose
from conftest import SMALL, Commands, plant_test_set, train_in
from lightning import Trainer
from omegaconf import OmegaConf
from PIL import Image
from segment_anything.modeling import Sam as SamAsPublished
from torch import Tensor, nn
from torch.utils.data import DataLoader

from convlora import IGNORED, adapter, evaluate, predict, report, results, train
from convlora.adapter import load
from convlora.cleaning import Cleaning
from convlora.data.samples import Batch
from convlora.data.transforms import LongestSideResize, Resize, SquareResize
from convlora.heads import PerClass, SamsOwn
from convlora.inference import Predictor
from convlora.losses import StructureLoss
from convlora.metrics.scores import Scores
from convlora.peft.lora import LoRA
from convlora.peft.selective import DecoderOnly
from convlora.prompts import (
    Prompt,
    Prompts,
    box_to_input,
    by_image,
    component_boxes,
    draw_boxes,
    shake,
)
from convlora.sam.zoo import SamViT, load_backbone
from convlora.schema import make
from convlora.segmenter import Segmenter, restore_size, to_prediction
from convlora.task import BoxPrompted, SegmentationTask
from convlora.writing import Item

SEVERAL = (
    "dataset=synthetic", "dataset.class_names=[a,b,c]", "metrics=multiclass", "loss=cross_entropy_dice",
)  # fmt: skip
QUIET = ("trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "loading.num_workers=0")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    return train_in(folder, *SMALL, "logger=csv", "trainer.max_epochs=1", "prompts.box=0.5")


def two_objects() -> np.ndarray[Any, np.dtype[np.uint8]]:
    mask = np.zeros((32, 32), np.uint8)
    mask[2:6, 3:10] = 1
    mask[20:30, 15:18] = 1
    mask[0, 31] = IGNORED
    return mask


def test_each_connected_part_has_its_box() -> None:
    assert component_boxes(two_objects()).tolist() == [[3, 2, 9, 5], [15, 20, 17, 29]]
    assert component_boxes(np.zeros((5, 5), np.uint8)).shape == (0, 4)
    assert component_boxes(np.eye(5, dtype=np.uint8)).tolist() == [[0, 0, 4, 4]]  # corners connect


def test_a_trained_box_is_that_of_the_object_to_be_found() -> None:
    masks = torch.from_numpy(two_objects())[None, None].repeat(30, 1, 1, 1)
    torch.manual_seed(0)
    boxes, targets = draw_boxes(masks)
    expected = torch.from_numpy(component_boxes(two_objects()))
    seen = set()
    for box, target in zip(boxes, targets[:, 0], strict=True):
        [own] = component_boxes(target.numpy())
        which = expected.tolist().index(own.tolist())
        seen.add(which)
        assert (box - expected[which]).abs().max() <= 20 / 1024 * 32  # no further than SAM's were shaken
        assert ((target == 1) <= (masks[0, 0] == 1)).all()
        assert (target[masks[0, 0] == IGNORED] == IGNORED).all()
    assert seen == {0, 1}
    assert len({tuple(box.tolist()) for box in boxes}) == 30  # shaken, each otherwise


def test_an_image_without_an_object_has_any_box_of_what_it_fills_and_nothing_to_find() -> None:
    torch.manual_seed(0)
    masks = torch.zeros(200, 1, 32, 32, dtype=torch.uint8)
    masks[:, :, 20:] = IGNORED  # the padding
    boxes, targets = draw_boxes(masks)
    assert torch.equal(targets, masks)
    assert (boxes[:, :2] <= boxes[:, 2:]).all()
    moved = 20 / 1024 * 32
    assert boxes[:, 2].max() > 29
    assert 18 < boxes[:, 3].max() <= 19 + moved
    assert boxes.min() < 1
    assert (boxes[:, 2:] - boxes[:, :2]).std(dim=0).min() > 3  # small and large ones
    nothing = torch.full((2, 1, 32, 32), IGNORED, dtype=torch.uint8)
    assert torch.equal(draw_boxes(nothing)[1], nothing)


def test_shaken_boxes_move_by_a_tenth_of_their_side_and_stay_boxes() -> None:
    torch.manual_seed(0)
    boxes = torch.tensor([[500.0, 500, 519, 599]]).repeat(4000, 1)
    moved = shake(boxes, 1024) - boxes
    assert moved.std(dim=0).tolist() == pytest.approx([2, 10, 2, 10], rel=0.15)
    assert moved.abs().max() <= 20
    edge = shake(torch.tensor([[0.0, 0, 3, 1023]]).repeat(500, 1), 1024)
    assert edge.min() >= 0
    assert edge.max() <= 1023
    assert (edge[:, :2] <= edge[:, 2:]).all()


@pytest.mark.parametrize("resize", [SquareResize(32), LongestSideResize(32)])
def test_a_box_goes_where_its_pixels_go(resize: SquareResize | LongestSideResize) -> None:
    mask = np.zeros((64, 128), np.uint8)
    mask[16:32, 64:96] = 1
    size, content = mask.shape, resize.content(*mask.shape)
    scaled = np.asarray(Image.fromarray(mask).resize(content[::-1], Image.Resampling.NEAREST))
    [expected] = component_boxes(scaled)
    [found] = box_to_input(torch.from_numpy(component_boxes(mask)), (size[0], size[1]), content).numpy()
    assert np.abs(found - expected).max() <= 0.5


def as_published(tiny: SamViT, state: dict[str, Tensor]) -> SamAsPublished:
    built = tiny.build()
    built.load_state_dict(state)
    return SamAsPublished(built.image_encoder, built.prompt_encoder, built.mask_decoder).eval()


@pytest.mark.parametrize("kind", ["nothing", "box", "points", "both"])
def test_sam_as_it_is_gives_what_segment_anything_does(tiny: SamViT, kind: str) -> None:
    torch.manual_seed(0)
    sam = tiny.build()
    state = {key: value + 0.1 * torch.randn_like(value) for key, value in sam.state_dict().items()}
    sam.load_state_dict(state)
    segmenter, images = Segmenter(sam, DecoderOnly(), SamsOwn()).eval(), torch.randn(1, 3, 32, 32)
    published = as_published(tiny, state)
    box, points = torch.tensor([[[3.0, 5, 20, 25]]]), torch.tensor([[[4.0, 6], [30, 2]]])
    labels = torch.tensor([[1, 0]])
    given = {
        "nothing": (None, None), "box": (box, None), "points": (None, points), "both": (box, points),
    }[kind]  # fmt: skip
    pairs = None if given[1] is None else (given[1], labels)
    with torch.no_grad():
        sparse, dense = published.prompt_encoder(points=pairs, boxes=given[0], masks=None)
        features = published.image_encoder(images)
        position = published.prompt_encoder.get_dense_pe()
        low, _ = published.mask_decoder(features, position, sparse, dense, multimask_output=False)
        expected = torch.nn.functional.interpolate(low, (32, 32), mode="bilinear", align_corners=False)
        if kind == "nothing":
            found = segmenter(images)
        else:
            tokens = segmenter.embed(given[0], given[1], None if given[1] is None else labels)
            [[found]] = segmenter.prompted(images, [[tokens]])
            found = found[None]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert expected.std() > 1e-3


def test_an_image_that_is_no_square_is_seen_by_sam_as_it_is_as_segment_anything_sees_it() -> None:
    """At the input's own scale, since the two scale images in different ways."""
    small = [each for each in SMALL if each.startswith("model.")]
    composed = compose("evaluate", "dataset=synthetic", "model=sam_tiny", *small, "output=out")
    settings = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(settings, dict)
    fields = evaluate.EvaluateConfig.__dataclass_fields__
    config = evaluate.EvaluateConfig(**{key: settings[key] for key in fields})
    scored = evaluate.untrained(config)
    sam, _ = load_backbone(make("model", config.model))
    published = SamAsPublished(sam.image_encoder, sam.prompt_encoder, sam.mask_decoder).eval()
    image = np.random.default_rng(0).integers(0, 255, (40, 64, 3), np.uint8)
    predictor = Predictor(scored.segmenter, scored.resize, scored.class_colors, torch.no_grad)
    [found] = predictor.logits([predictor.prepare(image)], [(40, 64)])
    seen = {"image": torch.from_numpy(image).permute(2, 0, 1).float(), "original_size": (40, 64)}
    low = published([seen], multimask_output=False)[0]["low_res_logits"]
    [expected] = published.postprocess_masks(low, (40, 64), (40, 64))
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    assert expected.std() > 1e-3


def test_prompts_are_embedded_in_full_precision(tiny: SamViT) -> None:
    segmenter = Segmenter(tiny.build(), DecoderOnly()).eval()
    box = torch.tensor([[[3.0, 5, 20, 25]]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        blurred = segmenter.embed(box)
    with torch.no_grad():
        assert torch.equal(blurred, segmenter.embed(box))


def telling(tiny: SamViT) -> Segmenter:
    """A segmenter whose masks depend much on the prompts, unlike those of weights that are all small."""
    torch.manual_seed(0)
    segmenter = Segmenter(tiny.build(), DecoderOnly()).eval()
    for parameter in segmenter.mask_decoder.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return segmenter


def test_objects_are_united_by_the_surest_and_of_none_there_is_nothing(tiny: SamViT) -> None:
    segmenter, images = telling(tiny), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = [
            segmenter.embed(torch.from_numpy(box)[None, None]) for box in component_boxes(two_objects())
        ]
        one, other = segmenter.prompted(images, [tokens, []])[0]
        united = segmenter.united(images, [tokens, []])
    assert not torch.equal(one, other)
    torch.testing.assert_close(united[0], torch.maximum(one, other))
    assert united.shape == (2, 1, 32, 32)
    assert (united[1] < -10).all()


def test_memory_does_not_grow_with_the_number_of_objects(tiny: SamViT) -> None:
    segmenter, images, held = telling(tiny), torch.randn(1, 3, 32, 32), list[int]()

    def count(*_: object) -> None:
        found = 0
        if len(held) % 16 in (4, 15):
            tensors = (each for each in gc.get_objects() if type(each) is Tensor)
            found = sum(each.is_floating_point() and each.shape[-2:] == (32, 32) for each in tensors)
        held.append(found)

    segmenter.mask_decoder.get_submodule("transformer").register_forward_pre_hook(count)
    scattered = np.zeros((32, 32), np.uint8)
    scattered[::8, ::8] = 1
    batch = Batch(images, [torch.from_numpy(scattered)], [(32, 32)], ["a"])
    predictor = Predictor(segmenter, SquareResize(32), {"object": [0, 0, 0]}, torch.no_grad)
    with torch.no_grad():
        make_task(BoxPrompted, segmenter).look(batch)
    found = predictor.prompt(np.zeros((32, 32, 3), np.uint8), [Prompt((i, 0, 19, 9)) for i in range(16)])
    assert len(held) == 2 * len(found) == 32
    for early, late in ((held[4], held[15]), (held[20], held[31])):
        assert 0 < late <= early
    assert predictor.prompt(np.zeros((32, 32, 3), np.uint8), []) == []


@pytest.mark.parametrize("resize", [SquareResize(32), LongestSideResize(32)])
def test_a_prompt_lies_where_it_was_told_in_the_image(tiny: SamViT, resize: Resize) -> None:
    segmenter = telling(tiny)
    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    predictor = Predictor(segmenter, resize, {"object": [0, 0, 0]}, torch.no_grad)
    told = Prompt((12, 4, 47, 27), ((20, 10), (5, 35)), (1, 0))
    [found] = predictor.prompt(image, [told])
    x, y = 32 / 60, (32 / 40 if isinstance(resize, SquareResize) else 21 / 40)
    box = [12.5 * x - 0.5, 4.5 * y - 0.5, 47.5 * x - 0.5, 27.5 * y - 0.5]
    points = [[20.5 * x - 0.5, 10.5 * y - 0.5], [5.5 * x - 0.5, 35.5 * y - 0.5]]
    with torch.no_grad():
        tokens = segmenter.embed(torch.tensor([[box]]), torch.tensor([points]), torch.tensor([[1, 0]]))
        [[logits]] = segmenter.prompted(predictor.prepare(image)[None], [[tokens]])
        unscaled = segmenter.embed(
            torch.tensor([[told.box]]), torch.tensor([told.points]), torch.tensor([[1, 0]])
        )
        [[elsewhere]] = segmenter.prompted(predictor.prepare(image)[None], [[unscaled]])
    content = resize.content(40, 60)
    expected, other = (
        to_prediction(restore_size(each, content, (40, 60))).prob.numpy().astype(int)
        for each in (logits, elsewhere)
    )
    assert np.abs(found.prob - expected).max() <= 1
    assert np.abs(other - expected).max() > 10


def make_task(kind: type[SegmentationTask], segmenter: Segmenter, **given: Any) -> SegmentationTask:
    scores = Scores("dice", "max", {"dice": "convlora.metrics.overlap.dice"})
    return kind(segmenter, StructureLoss(), scores, torch.optim.SGD, {}, {}, **given)


def test_scored_boxes_are_those_of_each_image(tiny: SamViT) -> None:
    """The image encoder's features meet the boxes of their own image, at its own size."""
    torch.manual_seed(0)
    segmenter = Segmenter(tiny.build(), LoRA()).eval()
    small = two_objects()
    large = np.zeros((64, 128), np.uint8)
    large[10:40, 20:100] = 1
    images, empty = torch.randn(3, 3, 32, 32), np.zeros((32, 32), np.uint8)
    masks = [torch.from_numpy(mask) for mask in (small, large, empty)]
    contents = [(32, 32), (16, 32), (32, 32)]
    task = make_task(BoxPrompted, segmenter)
    with torch.no_grad():
        found = task.look(Batch(images, masks, contents, ["a", "b", "c"]))
        first = [segmenter.embed(torch.from_numpy(box)[None, None]) for box in component_boxes(small)]
        united = list(segmenter.prompted(images[:1], [first])[0])
        place = (torch.tensor([20.0, 10, 99, 39]) + 0.5) / 4 - 0.5
        [[second]] = segmenter.prompted(images[1:2], [[segmenter.embed(place[None, None])]])
    torch.testing.assert_close(found[0], torch.maximum(*united))
    torch.testing.assert_close(found[1], second)
    assert (found[2] < -10).all()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_pictures_show_what_is_scored_with_the_boxes_of_all_objects(tiny: SamViT, count: int) -> None:
    segmenter, resize = telling(tiny), LongestSideResize(32)
    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    mask = np.zeros((40, 60), np.uint8)
    for part in range(count):
        mask[5 + part : 20, 20 * part : 20 * part + 9] = 1
    predictor = Predictor(segmenter, resize, {"object": [0, 0, 0]}, torch.no_grad)
    task = make_task(BoxPrompted, segmenter)
    content = resize.content(40, 60)
    with torch.no_grad():
        images = predictor.prepare(image)[None]
        [logits] = task.look(Batch(images, [torch.from_numpy(mask)], [content], ["a"]))
    expected = to_prediction(restore_size(logits, content, (40, 60)))
    found = task.found(image, mask, predictor)
    assert np.abs(found.prob - expected.prob.numpy().astype(int)).max() <= 1
    assert (found.prob.std() > 5) == (count > 0)


class Watched(nn.Module):
    """A loss that keeps the masks that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.loss, self.seen = StructureLoss(), list[Tensor]()

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        self.seen.append(masks)
        loss: Tensor = self.loss(logits, masks)
        return loss


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0, 0), (0.3, 8, 23)])
def test_the_share_of_prompted_steps_is_what_was_asked_for_and_they_learn_one_object(
    tiny: SamViT, share: float, least: int, most: int
) -> None:
    segmenter, loss = Segmenter(tiny.build(), LoRA()), Watched()
    prompted, states = set[int](), list[Tensor]()
    segmenter.prompt_encoder.register_forward_pre_hook(lambda *_: prompted.add(len(states)))
    segmenter.image_encoder.register_forward_pre_hook(lambda *_: states.append(torch.get_rng_state()))
    scores = Scores("dice", "max", {"dice": "convlora.metrics.overlap.dice"})
    optimizer = partial(torch.optim.SGD, lr=0.1)
    task = SegmentationTask(segmenter, loss, scores, optimizer, {}, {}, prompts=Prompts(share))
    masks = [torch.from_numpy(two_objects())]
    batches = [Batch(torch.randn(1, 3, 32, 32), masks, [(32, 32)], ["a"])] * 50
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=1, **dict.fromkeys(off, False))
    trainer.fit(task, DataLoader(batches, batch_size=None))
    assert len(loss.seen) == len(states) == 50
    assert least <= len(prompted) <= most
    whole, parts = component_boxes(two_objects()).tolist(), []
    for step, given in enumerate(loss.seen):
        boxes = component_boxes(given[0, 0].numpy()).tolist()
        assert (given[0, 0] == IGNORED).nonzero().tolist() == [[0, 31]]
        if step in prompted:
            parts += boxes
            assert boxes in [[box] for box in whole]
        else:
            assert boxes == whole
            if not share:  # nothing is drawn, so that older runs can be repeated and resumed
                seed = int(np.random.SeedSequence([0, 0, step, 0]).generate_state(1)[0])
                assert torch.equal(states[step], torch.Generator().manual_seed(seed).get_state())
    assert all(box in parts for box in whole) == (share > 0)


def test_a_training_with_prompts_says_so_and_its_adapter_knows(cli: Commands, run: Path) -> None:
    done = cli(train, *SMALL, "prompts.box=0.5", "dry_run=true")
    assert "a box in 50% of the steps, none in the others" in done.out
    assert json.loads(load(run).metadata["config"])["prompts"]["box"] == 0.5


def test_boxes_are_scored_by_the_command_line_and_a_stranger_to_them_is_told(
    cli: Commands, run: Path
) -> None:
    plant_test_set(Path("data/TestDataset/CHAMELEON"), 3)
    several = np.zeros((48, 48), np.uint8)
    Image.fromarray(np.zeros((64, 64), np.uint8)).save("data/TestDataset/CHAMELEON/GT/2.png")
    several[4:9, 4:9] = several[30:40, 10:40] = 255
    Image.fromarray(several).save("data/TestDataset/CHAMELEON/GT/0.png")
    arguments = ("dataset=chameleon", *QUIET, "protocol=box")
    done = cli(evaluate, f"checkpoint={run}", *arguments, "output=box")
    assert done.code == 0, done.err
    assert "was trained without prompts" not in done.out
    record = json.loads(Path("box/scores.json").read_text())
    assert (record["protocol"], record["images"]) == ("box", 3)
    assert "1 of 3 images has no object and so no box: nothing is found there" in done.out
    assert Path("box/overlays.png").is_file()
    other = train_in(Path.cwd(), *SMALL, "logger=csv", "trainer.max_epochs=1")
    few = ("loading.batch_size=2", "trainer.limit_test_batches=1")
    done = cli(evaluate, f"checkpoint={other}", *arguments, *few, "output=b")
    assert "was trained without prompts" in done.out
    assert "no object" not in done.out
    assert json.loads(Path("b/scores.json").read_text())["images"] == 2


def test_sam_as_it_is_is_scored_and_a_row_of_the_report(cli: Commands, run: Path) -> None:
    model = ("model=sam_tiny", "model.image_size=64", "model.embed_dim=16", "model.depth=2",
             "model.num_heads=2", "model.global_attn_indexes=[1]", "model.decoder_dim=32")  # fmt: skip
    data = ("dataset=synthetic", "dataset.size=48", "dataset.test_size=5", *QUIET)
    done = cli(evaluate, *model, *data, "output=plain")
    assert done.code == 0, done.err
    assert "has random weights, so its scores mean nothing" in done.out
    assert json.loads(Path("plain/scores.json").read_text())["checkpoint"] is None
    box = (*model, *data, "protocol=box")
    assert cli(evaluate, *box, "output=box", "resize=longest_side").code == 0
    assert cli(evaluate, *box, "output=strict", "threshold=0.9").code == 0
    assert cli(evaluate, *box, "output=again", "resize=longest_side", "seed=1").code == 0
    made = cli(report, f"runs=[{run},plain,box,strict,again]", "output=report")
    assert made.code == 0, made.err
    with Path("report/report.csv").open(newline="") as file:
        rows = {
            (row["protocol"], row["threshold"]): row for row in csv.DictReader(file) if row["peft"] == "none"
        }
    assert {key: row["seeds"] for key, row in rows.items()} == {
        ("", ""): "0", ("box", ""): "0 1", ("box", "0.9"): "0"
    }  # fmt: skip
    assert all("output" not in row["setting"] for row in rows.values())
    strict = results.read(Path("strict"))
    assert strict is not None
    assert strict.settings["cleaning.threshold"] == 0.9
    assert strict.images.startswith("5 (")
    assert "5 runs" in made.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "checkpoint=RUN must be given, or model=sam_vit_b to score SAM as it is"),
        ((*SEVERAL, "model=sam_tiny"), "sam_tiny has 1 class (foreground), synthetic has 3 (a, b, c)"),
        (("model=sam_tiny", "protocol=boxes"), "protocol=boxes: did you mean 'box'?"),
        (
            ("model=sam_tiny", "protocol=box", "tiles=true", "tile=32"),
            "protocol=box is for one object",
        ),
    ],
)
def test_what_cannot_be_scored_is_told(cli: Commands, arguments: tuple[str, ...], message: str) -> None:
    plant_test_set(Path("data/TestDataset/CHAMELEON"), 1)
    done = cli(evaluate, "dataset=chameleon", *QUIET, "output=out", *arguments)
    assert (done.code, message in done.err) == (1, True), done.err


def test_prompts_from_a_file_give_a_mask_each(cli: Commands, run: Path) -> None:
    Path("in").mkdir()
    for name, size in (("a", (60, 40)), ("b", (30, 30)), ("c", (20, 20))):
        Image.fromarray(np.random.default_rng(1).integers(0, 255, (*size[::-1], 3), np.uint8)).save(
            f"in/{name}.png"
        )
    prompts = {
        "a.png": [{"box": [5, 5, 40, 30]}, {"points": [[10, 10], [50, 30]], "labels": [1, 0]}],
        "b.png": [{"points": [[3, 4]]}],
    }
    Path("prompts.json").write_text(json.dumps(prompts))
    arguments = (f"checkpoint={run}", "input=in", "output=out", "prompts_file=prompts.json", "overlays=true")
    done = cli(predict, *arguments, "num_workers=0")
    assert done.code == 0, done.err
    assert sorted(path.name for path in Path("out").glob("*.png")) == ["a_1.png", "a_2.png", "b_1.png"]
    predictor = load(run)
    told = [Prompt(box=(5, 5, 40, 30)), Prompt(None, ((10, 10), (50, 30)), (1, 0))]
    found = predictor.prompt("in/a.png", told)
    for number, each in enumerate(found, start=1):
        assert np.array_equal(np.asarray(Image.open(f"out/a_{number}.png")), each.classes * 255)
        assert each.prob.shape == (40, 60)
    assert not np.array_equal(found[0].prob, found[1].prob)
    assert "3 of 3 are there already" in cli(predict, *arguments, "num_workers=0").out
    prompts["c.png"] = [{"box": [1, 1, 10, 10]}]
    Path("prompts.json").write_text(json.dumps(prompts), encoding="utf-8-sig")
    assert "3 of 4 are there already" in cli(predict, *arguments, "num_workers=0").out
    prompts = {"a.png": [{"box": [1, 1, 40, 30]}]}
    Path("prompts.json").write_text(json.dumps(prompts))
    assert "another adapter or other settings" in cli(predict, *arguments, "num_workers=0").err
    for name in ("a_x", "a_3"):  # not called as, and not made as, the mask of a prompt
        Image.new("L", (60, 40)).save(f"out/{name}.png")
    assert cli(predict, *arguments, "num_workers=0", "overwrite=true").code == 0
    expected = ["a_1.png", "a_3.png", "a_x.png", "b_1.png", "c_1.png"]
    assert sorted(path.name for path in Path("out").glob("*.png")) == expected
    pictures = sorted(path.name for path in Path("out/overlays").glob("*.png"))
    assert pictures == ["a_1.png", "b_1.png", "c_1.png"]


def prediction() -> predict.PredictConfig:
    composed = compose("predict", "checkpoint=run", "input=in", "output=out", "prompts_file=p.json")
    return predict.PredictConfig(**{key: composed[key] for key in predict.PredictConfig.__dataclass_fields__})


def test_a_mark_knows_of_a_prompt_what_it_tells_and_of_none_nothing(run: Path, tmp_path: Path) -> None:
    with_file, file = prediction(), adapter.open_file(str(run), None, None)
    without = replace(with_file, prompts_file=None)
    assert predict.identify(file, with_file, Cleaning()) == predict.identify(file, without, Cleaning())
    items = [Item(tmp_path / f"{name}.png", name, False, [""], "mark") for name in ("a", "a.png")]
    one, other, same = predict.with_prompts(
        with_file, items, {"a.png": [Prompt((0, 0, 1, 1)), Prompt((0, 0, 1, 2)), Prompt((0, 0, 1, 1))]}, ["o"]
    )
    assert one.made_by == same.made_by != other.made_by
    assert [each.name for each in (one, other, same)] == ["a_1", "a_2", "a_3"]


def test_the_prompts_of_an_image_are_shared_out_together() -> None:
    names = ["a", "a", "a", "b", "c", "c", "d"]
    items = [Item(Path(name), f"{name}_{i}", False, [""], "") for i, name in enumerate(names)]
    for count, expected in ((1, ["aaabccd"]), (2, ["aaacc", "bd"]), (3, ["aaad", "b", "cc"])):
        shares = predict.deal(items, count)
        assert ["".join(item.path.name for item in share) for share in shares] == expected
    assert len(predict.deal(items, 9)) == 4  # no device without an image


def test_a_prompt_outside_its_image_costs_that_image_alone(cli: Commands, run: Path) -> None:
    Path("in").mkdir()
    for name in "ab":
        Image.new("RGB", (30, 20)).save(f"in/{name}.png")
    told = {"a.png": [{"box": [0, 0, 30, 5]}], "b.png": [{"box": [0, 0, 29, 19]}]}
    Path("p.json").write_text(json.dumps(told))
    done = cli(predict, f"checkpoint={run}", "input=in", "output=out", "prompts_file=p.json", "num_workers=0")
    assert done.code == 1
    assert "in/a.png: (30, 5) lies outside the image of 30 x 20 pixels" in done.err
    assert [path.name for path in Path("out").iterdir()] == ["b_1.png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"d.png": [{"box": [0, 0, 5, 5]}]}', "no image of the input is called d.png"),
        ('{"a.png": [{"bbox": [0, 0, 5, 5]}]}', "unknown key 'bbox', a prompt has box, points, labels"),
        (
            '{"a.png": [{"box": [0, 0, 5]}]}',
            "(a.png: the box must be [left, top, right, bottom], 4 numbers, and not [0, 0, 5]); write {",
        ),
        ('{"a.png": [{"box": [0, 0, "5", 5, 5]}]}', '4 numbers, and not [0, 0, "5", 5, 5]); write {'),
        (
            '{"a.png": [{"points": [50, 60]}]}',
            "each of the points must be [x, y], 2 numbers, and not 50); write",
        ),
        ('{"a.png": [{"points": 50}]}', "(a.png: points must be a list, and not 50); write {"),
        (
            '{"a.png": [null]}',
            '(a.png: a prompt must be {"box": ...} or {"points": ...}, and not null); write {',
        ),
        ('{"a.png": {"box": [0, 0, 5, 5]}}', "(a.png: the prompts of an image must be a list, and not {"),
        ('["a.png"]', "(what is in it must be {name of an image: its prompts}); write {"),
        ("{}", "prompts_file=p.json tells no prompt; write {"),
        ('{"a.png": []}', "prompts_file=p.json tells no prompt; write {"),
        ("{", "cannot be understood"),
        ('{"a.png": [], "a.png": []}', "'a.png' is there twice, join the two"),
        ('{"a.png": [{"box": [0, 0, 5, 5]}], "./a.png": []}', "no image of the input is called ./a.png"),
        ('{"a.png": [{"points": [[1, 2]], "labels": [1, 0]}]}', "a.png: 1 points have the labels [1, 0]"),
        ('{"a.png": [{"points": [[1, 2]], "labels": [2]}]}', "a.png: 1 points have the labels [2]"),
        ('{"a.png": [{"points": [[1, 2]], "labels": [[1]]}]}', "a.png: 1 points have the labels [[1]]"),
        ('{"a.png": [{"points": [[1, 2]], "labels": 1}]}', "(a.png: labels must be a list, and not 1); "),
        ('{"a.png": [{}]}', "a.png: a prompt needs a box or points"),
        ('{"a.png": [{"box": [9, 9, 5, 5]}]}', "a.png: the box [9.0, 9.0, 5.0, 5.0] ends before it begins"),
        (None, 'prompts_file=p.json: no such file; write {"a.jpg"'),
    ],
)
def test_mistakes_in_a_file_of_prompts_are_told_once_before_the_model_is_loaded(
    cli: Commands, run: Path, content: str | None, message: str
) -> None:
    Path("in").mkdir()
    Image.new("RGB", (30, 20)).save("in/a.png")
    if content is not None:
        Path("p.json").write_text(content)
    arguments = (f"checkpoint={run}", "input=in", "output=out", "prompts_file=p.json", "num_workers=0")
    done = cli(predict, *arguments)
    assert (done.code, done.err.count(message)) == (1, 1), done.err
    assert "Traceback" not in done.err
    assert "masks written" not in done.out
    assert not Path("out").exists()


def test_a_name_is_a_path_first_and_one_that_two_images_have_is_told(tmp_path: Path) -> None:
    first, second = [Prompt(box=(0, 0, 1, 1))], [Prompt(box=(0, 0, 2, 2))]
    names = {Path("x/a.png"): "x/a.png", Path("y/a.png"): "y/a.png", Path("y/b.png"): "y/b.png"}
    with pytest.raises(ValueError, match=r"2 images of the input are called a\.png"):
        by_image({"a.png": first}, names, tmp_path)
    assert by_image({"y/a.png": first, "b.png": second}, names, tmp_path) == {
        Path("y/a.png"): first,
        Path("y/b.png"): second,
    }
    with_root = names | {Path("a.png"): "a.png"}
    told = {"a.png": first, "x/a.png": second}
    assert by_image(told, with_root, tmp_path) == {Path("a.png"): first, Path("x/a.png"): second}
    with pytest.raises(ValueError, match=r"b\.png and y/b\.png are one image; join .* under y/b\.png"):
        by_image({"b.png": first, "y/b.png": second}, names, tmp_path)


class Name(str):
    """Counts how often names are compared."""

    count = 0

    def __eq__(self, other: object) -> bool:
        Name.count += 1
        return str(self) == other

    __hash__ = str.__hash__


def test_a_prompt_is_not_compared_with_every_image(tmp_path: Path) -> None:
    names = {Path(f"{i % 7}/{i}.png"): f"{i % 7}/{i}.png" for i in range(200)}
    told = {Name(path.name): [Prompt((0, 0, 1, 1))] for path in names}
    Name.count = 0
    assert by_image(told, names, tmp_path).keys() == names.keys()
    assert Name.count < 5 * len(names)


@pytest.mark.parametrize("share", [-0.1, 1.0, 2.0])
def test_a_share_that_leaves_no_step_alone_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=rf"prompts\.box={share} must be at least 0 and below 1"):
        Prompts(share)


def test_prompts_are_for_one_class(cli: Commands, tiny: SamViT) -> None:
    done = cli(train, *SMALL, *SEVERAL, "prompts.box=0.5", "dry_run=true")
    assert "prompts.box=0.5 is for a foreground, but synthetic has 3 classes" in done.err
    predictor = Predictor(Segmenter(tiny.build(), DecoderOnly(), PerClass(), 3), SquareResize(32),
                          {"a": [0, 0, 0], "b": [1, 1, 1], "c": [2, 2, 2]}, torch.no_grad)  # fmt: skip
    with pytest.raises(ValueError, match="prompts tell one object from the rest"):
        predict.with_prompts(prediction(), [], {}, ["a", "b", "c"])
    with pytest.raises(ValueError, match="prompts tell one object from the rest"):
        predictor.prompt(np.zeros((9, 9, 3), np.uint8), [Prompt(box=(0, 0, 5, 5))])


def test_prompts_in_python_are_numbers_of_any_kind_and_come_in_a_list(tiny: SamViT) -> None:
    points = torch.tensor([[1, 2]])
    told = Prompt(np.array([0, 1, 5, 5]), points, [1])  # type: ignore[arg-type]
    assert told == Prompt((0.0, 1.0, 5.0, 5.0), ((1.0, 2.0),), (1,))
    with pytest.raises(ValueError, match=r"^the box must be .* 4 numbers, and not \[1, 2\]$"):
        Prompt([1, 2])  # type: ignore[arg-type]
    predictor = Predictor(Segmenter(tiny.build(), DecoderOnly(), PerClass(), 1), SquareResize(32),
                          {"object": [0, 0, 0]}, torch.no_grad)  # fmt: skip
    for prompts in (told, [{"box": [0, 0, 5, 5]}]):
        with pytest.raises(TypeError, match=r"must be a list of Prompt, as \[Prompt\(box="):
            predictor.prompt(np.zeros((9, 9, 3), np.uint8), prompts)  # type: ignore[arg-type]
