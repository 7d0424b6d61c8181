"""Boxes and points: where they lie, what they are trained on, what they find."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, Commands, plant_test_set, train_in
from PIL import Image
from segment_anything.modeling import Sam as SamAsPublished
from torch import Tensor

from convlora import IGNORED, evaluate, predict, report, train
from convlora.adapter import load
from convlora.data.transforms import LongestSideResize, SquareResize
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
    read_prompts,
    shake,
)
from convlora.sam.zoo import SamViT
from convlora.segmenter import Segmenter, unite
from convlora.task import BoxPrompted, SegmentationTask

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


def test_an_image_without_an_object_has_its_own_box_and_nothing_to_find() -> None:
    boxes, targets = draw_boxes(torch.zeros(2, 1, 32, 32, dtype=torch.uint8))
    assert (targets == 0).all()
    assert (boxes - torch.tensor([0.0, 0, 31, 31])).abs().max() <= 20 / 1024 * 32


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
            [found] = segmenter.prompted(images, [[tokens]])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert expected.std() > 1e-3


def test_prompts_are_embedded_in_full_precision(tiny: SamViT) -> None:
    segmenter = Segmenter(tiny.build(), DecoderOnly()).eval()
    box = torch.tensor([[[3.0, 5, 20, 25]]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        blurred = segmenter.embed(box)
    with torch.no_grad():
        assert torch.equal(blurred, segmenter.embed(box))


def test_objects_are_united_by_the_surest() -> None:
    logits = torch.tensor([[[[1.0, -3]]], [[[-2.0, 4]]]])
    assert unite(logits).tolist() == [[[1.0, 4.0]]]
    assert (unite(torch.empty(0, 1, 2, 2)) < -10).all()


def make_task(kind: type[SegmentationTask], segmenter: Segmenter, **given: Any) -> SegmentationTask:
    scores = Scores("dice", "max", {"dice": "convlora.metrics.overlap.dice"})
    return kind(segmenter, StructureLoss(), scores, torch.optim.SGD, {}, {}, **given)


def test_scored_boxes_are_those_of_each_image(tiny: SamViT) -> None:
    """The image encoder's features meet the boxes of their own image, at its own size."""
    from convlora.data.samples import Batch

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
        united = [segmenter.prompted(images[:1], [[tokens]])[0][0] for tokens in first]
        place = (torch.tensor([20.0, 10, 99, 39]) + 0.5) / 4 - 0.5
        second = segmenter.prompted(images[1:2], [[segmenter.embed(place[None, None])]])[0][0]
    torch.testing.assert_close(found[0], torch.maximum(*united))
    torch.testing.assert_close(found[1], second)
    assert (found[2] < -10).all()


def test_the_share_of_prompted_steps_is_what_was_asked_for(
    tiny: SamViT, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from convlora.data.samples import Batch

    segmenter, seen = Segmenter(tiny.build(), LoRA()), list[bool]()
    original = Segmenter.outputs

    def outputs(self: Segmenter, images: Tensor, boxes: Tensor | None = None) -> Any:
        seen.append(boxes is not None)
        return original(self, images, boxes)

    monkeypatch.setattr(Segmenter, "outputs", outputs)
    masks = [torch.from_numpy(two_objects())]
    batch = Batch(torch.randn(1, 3, 32, 32), masks, [(32, 32)], ["a"])
    for share, least, most in ((0.0, 0, 0), (0.3, 8, 23)):
        task = make_task(SegmentationTask, segmenter, prompts=Prompts(share))
        task.trainer = SimpleNamespace(  # type: ignore[assignment]
            optimizers=[SimpleNamespace(param_groups=[{"lr": 0.1}])], precision="32-true", loggers=[],
            estimated_stepping_batches=10, global_step=0, current_epoch=0, training=True,
        )  # fmt: skip
        task.log = lambda *_, **__: None  # type: ignore[method-assign]
        seen.clear()
        torch.manual_seed(0)
        before = torch.random.get_rng_state()
        for step in range(50):
            task.training_step(batch, step)
        # without prompts nothing is drawn, so that older runs can be repeated and resumed
        assert torch.equal(torch.random.get_rng_state(), before) == (share == 0)
        assert least <= sum(seen) <= most


def test_a_training_with_prompts_says_so_and_its_adapter_knows(cli: Commands, run: Path) -> None:
    done = cli(train, *SMALL, "prompts.box=0.5", "dry_run=true")
    assert "a box in 50% of the steps, none in the others" in done.out
    assert json.loads(load(run).metadata["config"])["prompts"]["box"] == 0.5


def test_boxes_are_scored_by_the_command_line_and_a_stranger_to_them_is_told(
    cli: Commands, run: Path
) -> None:
    plant_test_set(Path("data/TestDataset/CHAMELEON"), 2)
    arguments = ("dataset=chameleon", *QUIET, "protocol=box")
    done = cli(evaluate, f"checkpoint={run}", *arguments, "output=box")
    assert done.code == 0, done.err
    assert "was trained without prompts" not in done.out
    record = json.loads(Path("box/scores.json").read_text())
    assert record["protocol"] == "box"
    assert Path("box/overlays.png").is_file()
    other = train_in(Path.cwd(), *SMALL, "logger=csv", "trainer.max_epochs=1")
    assert "was trained without prompts" in cli(evaluate, f"checkpoint={other}", *arguments, "output=b").out


def test_sam_as_it_is_is_scored_and_a_row_of_the_report(cli: Commands, run: Path) -> None:
    model = ("model=sam_tiny", "model.image_size=64", "model.embed_dim=16", "model.depth=2",
             "model.num_heads=2", "model.global_attn_indexes=[1]", "model.decoder_dim=32")  # fmt: skip
    data = ("dataset=synthetic", "dataset.size=48", "dataset.test_size=5", *QUIET)
    done = cli(evaluate, *model, *data, "output=plain")
    assert done.code == 0, done.err
    assert "has random weights, so its scores mean nothing" in done.out
    assert json.loads(Path("plain/scores.json").read_text())["checkpoint"] is None
    assert cli(evaluate, *model, *data, "output=box", "protocol=box").code == 0
    made = cli(report, f"runs=[{run},plain,box]", "output=report")
    assert made.code == 0, made.err
    text = Path("report/report.md").read_text()
    assert "peft=none protocol=box" in text
    assert "3 runs" in made.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "checkpoint=RUN must be given, or model=sam_vit_b to score SAM as it is"),
        ((*SEVERAL, "model=sam_tiny"), "sam_tiny has 1 classes (foreground), synthetic has 3 (a, b, c)"),
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
    Path("prompts.json").write_text(json.dumps({"a.png": [{"box": [1, 1, 40, 30]}]}))
    assert "another adapter or other settings" in cli(predict, *arguments, "num_workers=0").err


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
        ('{"a.png": [{"box": [0, 0, 5]}]}', "cannot be understood"),
        ('["a.png"]', "cannot be understood"),
        ("{", "cannot be understood"),
        ('{"a.png": [{"points": [[1, 2]], "labels": [1, 0]}]}', "1 points have the labels [1, 0]"),
        ('{"a.png": [{"points": [[1, 2]], "labels": [2]}]}', "1 points have the labels [2]"),
        ('{"a.png": [{}]}', "a prompt needs a box or points"),
        ('{"a.png": [{"box": [9, 9, 5, 5]}]}', "the box [9.0, 9.0, 5.0, 5.0] ends before it begins"),
    ],
)
def test_mistakes_in_a_file_of_prompts_are_told(cli: Commands, run: Path, content: str, message: str) -> None:
    Path("in").mkdir()
    Image.new("RGB", (30, 20)).save("in/a.png")
    Path("p.json").write_text(content)
    done = cli(predict, f"checkpoint={run}", "input=in", "output=out", "prompts_file=p.json", "num_workers=0")
    assert (done.code, message in done.err) == (1, True), done.err
    assert "Traceback" not in done.err


def test_a_name_that_two_images_have_is_told(tmp_path: Path) -> None:
    names = {Path("x/a.png"): "x/a.png", Path("y/a.png"): "y/a.png"}
    with pytest.raises(ValueError, match=r"2 images of the input are called a\.png"):
        by_image({"a.png": [Prompt(box=(0, 0, 1, 1))]}, names, tmp_path)
    assert list(by_image({"y/a.png": [Prompt()]}, names, tmp_path)) == [Path("y/a.png")]


def test_a_missing_file_of_prompts_shows_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r'write \{"a\.jpg"'):
        read_prompts(tmp_path / "none.json")


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
        predictor.prompt(np.zeros((9, 9, 3), np.uint8), [Prompt(box=(0, 0, 5, 5))])
