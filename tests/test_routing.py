"""Where maps went is counted by layer, by image and by place."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, Commands
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from convlora import evaluate, predict, train
from convlora.data.sets.synthetic import Synthetic
from convlora.peft.conv_lora import ConvLoRA, Routed
from convlora.peft.gating import NoisyTopK
from convlora.routing import entropy, locate, routed_layers, shares
from convlora.sam.zoo import MobileSam, SamViT
from convlora.segmenter import Segmenter


def rows(path: str) -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def test_entropy_is_that_of_the_experts_use() -> None:
    split = np.array([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25, 0.25, 0.25, 0.25]])
    np.testing.assert_allclose(entropy(split), [0, 1, 2], atol=1e-9)


def test_shares_are_those_of_the_gates_for_each_image(tiny: SamViT) -> None:
    segmenter = Segmenter(tiny.build(), ConvLoRA(num_experts=5, gate=NoisyTopK(top_k=2))).eval()
    segmenter(torch.randn(3, 3, 32, 32))
    [windowed, whole] = routed_layers(segmenter.image_encoder).values()
    for layer, maps in ((windowed, 4), (whole, 1)):
        found = shares(layer, 3)
        assert found.shape == (3, maps, 5)
        torch.testing.assert_close(found.sum(dim=2), torch.ones(3, maps))
        for number, (choice, gates) in enumerate(zip(layer.routes.choice, layer.routes.gates, strict=True)):
            torch.testing.assert_close(found[number // maps, number % maps, choice], gates / gates.sum())


@pytest.mark.parametrize(
    ("kind", "size", "window"), [("vit", 32, 16), ("tiny_vit", 128, 7 * 8), ("tiny_vit", 256, 7 * 8)]
)
def test_experts_are_shown_where_their_window_lies(tiny: SamViT, kind: str, size: int, window: int) -> None:
    """The first layer with windows; `window` is the side of one in pixels of the input."""
    backbone = tiny if kind == "vit" else MobileSam(name="mobile_sam", image_size=size)
    encoder = Segmenter(backbone.build(), ConvLoRA(num_experts=8)).eval().image_encoder
    layers = list(routed_layers(encoder).values())
    encoder(torch.randn(2, 3, size, size))
    side = -(-size // window)
    chosen = torch.randint(8, (2, side, side), generator=torch.Generator().manual_seed(0))
    routes = layers[0].routes
    assert len(routes.choice) == 2 * side**2
    layers[0].routes = Routed(chosen.view(-1, 1), torch.ones(2 * side**2, 1), routes.side)
    for image in range(2):
        found = locate(layers[0], image, 2, size)
        assert found.shape == (size, size)
        y, x = np.mgrid[:size, :size] // window
        assert np.array_equal(found, chosen[image].numpy()[y, x])
    for layer in [each for each in layers if len(each.routes.choice) == 2]:  # whose map is all of the image
        layer.routes = Routed(torch.tensor([[3], [5]]), torch.ones(2, 1), layer.routes.side)
        for image, expert in enumerate((3, 5)):
            assert np.array_equal(locate(layer, image, 2, size), np.full((size, size), expert))


def test_a_run_tells_how_its_test_images_were_routed(cli: Commands) -> None:
    log = ("logger=tensorboard", "callbacks.routing.every_n_steps=2", "trainer.max_epochs=1")
    done = cli(train, *SMALL, *log, "peft.num_experts=4", "run_dir=run")
    assert done.code == 0, done.err
    layers = rows("run/routing.csv")
    assert [row["layer"] for row in layers] == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    for row in layers:
        split = [float(row[f"expert_{s}_scale_{s}"]) for s in (1, 2, 3, 4)]
        assert sum(split) == pytest.approx(1)
        assert float(row["entropy"]) == pytest.approx(float(entropy(np.array(split))))
    images, windows = 5, 1  # 64 px: 8 x 8 patches in one window of 8
    assert [int(row["maps"]) for row in layers] == [images * windows, images]
    by_image = rows("run/routing_images.csv")
    assert [row["image"] for row in by_image] == [row["image"] for row in rows("run/images.csv")]
    octaves = [sum(float(row[f"expert_{s}_scale_{s}"]) * np.log2(s) for s in (1, 2, 3, 4)) for row in layers]
    by_images = np.mean([np.log2(float(row["mean_scale"])) for row in by_image])
    assert by_images == pytest.approx(np.mean(octaves), abs=1e-6)  # all images have as many maps
    scenes = Synthetic(train_size=10, val_size=3, test_size=5, size=48, class_names=["object"])
    masks = [scenes.read(pair)[1] for pair in scenes.pairs("test")]
    assert [float(row["object_share"]) for row in by_image] == pytest.approx([mask.mean() for mask in masks])
    logged = EventAccumulator("run/tensorboard").Reload()
    assert {event.step for event in logged.Scalars("routing/blocks.0.attn.qkv")} == {2, 4}
    assert [event.step for event in logged.Images("train/routing")] == [2, 4]

    data = ("dataset=synthetic", "dataset.size=48", "dataset.test_size=5", "loading.num_workers=0")
    again = cli(evaluate, "checkpoint=run", *data, "trainer.accelerator=cpu", "output=scores")
    assert again.code == 0, again.err
    assert rows("scores/routing.csv") == layers

    Image.new("RGB", (40, 30)).save("image.png")
    shown = cli(predict, "checkpoint=run", "input=image.png", "output=masks", "routing=true", "num_workers=0")
    assert shown.code == 0, shown.err
    assert Image.open("masks/routing/image.png").size[0] > 100


@pytest.mark.parametrize(("method", "experts"), [("lora", False), ("multi_scale", True)])
def test_where_no_gate_chooses_there_are_no_choices_to_show(
    cli: Commands, method: str, experts: bool
) -> None:
    small = (*SMALL, "trainer.max_epochs=1", "logger=csv", "run_dir=run")
    assert cli(train, *small, f"peft={method}").code == 0
    assert Path("run/routing.csv").exists() == experts
    Image.new("RGB", (40, 30)).save("image.png")
    refused = cli(predict, "checkpoint=run", "input=image.png", "output=masks", "routing=true")
    assert "in run no gate chooses by the image; leave it out" in refused.err
    assert not Path("masks").exists()
