"""Queries are matched with the classes in an image, and learn from what they were matched with."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from literal import literal_set_loss
from ranks import LossOf, descend_on_halves, together
from torch import Tensor

from convlora import IGNORED, set_loss
from convlora.heads import Query
from convlora.peft.selective import DecoderOnly
from convlora.segmenter import Segmenter
from convlora.set_loss import Labels, Pairs, Queries, SetLoss, match, sample

SIZE = (12, 10)


def scene(
    seed: int = 0, n: int = 3, q: int = 5, c: int = 4, size: tuple[int, int] = SIZE
) -> tuple[Queries, Tensor]:
    """Queries of whole size and masks in blocks, of which the last class is in none, and some ignored."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randn(n, q, c + 1, generator=generator)
    masks = 2 * torch.randn(n, q, *size, generator=generator)
    ids = torch.randint(0, c - 1, (n, 1, 3, 3), generator=generator).to(torch.uint8)
    ids[0, 0, 2] = IGNORED
    return Queries(classes, masks, size), F.interpolate(ids, size)


def test_matching_is_the_cheapest_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    costs = torch.randn(8, 5, 4, generator=generator)
    present = torch.rand(8, 4, generator=generator) > 0.4
    present[0] = False
    pairs = match(costs, present)
    for image, (cost, there) in enumerate(zip(costs, present, strict=True)):
        own = pairs.image == image
        kinds = there.nonzero().flatten().tolist()
        assert sorted(pairs.kind[own].tolist()) == kinds
        assert len(set(pairs.query[own].tolist())) == len(kinds)
        least = min(
            sum(float(cost[query, kind]) for query, kind in zip(queries, kinds, strict=True))
            for queries in itertools.permutations(range(5), len(kinds))
        )
        assert float(cost[pairs.query[own], pairs.kind[own]].sum()) == pytest.approx(least, abs=1e-5)


@pytest.mark.parametrize("class_weights", [None, [1.0, 3.0, 0.5, 2.0]])
@pytest.mark.parametrize(
    ("costs", "weights"), [((2, 5, 5), (2, 5, 5)), ((1, 5, 5), (1, 1, 1)), ((0, 1, 0), (3, 0, 1))]
)
def test_loss_over_all_pixels_equals_the_literal_form(
    costs: tuple[float, ...], weights: tuple[float, ...], class_weights: list[float] | None
) -> None:
    outputs, ids = scene()
    loss = SetLoss(costs, weights, class_weights=class_weights)
    expected = literal_set_loss(outputs.classes, outputs.masks, ids[:, 0], loss, class_weights)
    torch.testing.assert_close(loss(outputs, ids), expected)
    torch.testing.assert_close(loss.eval()(outputs, ids), expected)


def test_coarser_masks_are_compared_as_they_are_interpolated() -> None:
    outputs, ids = scene()
    coarse = outputs._replace(masks=outputs.masks[..., ::2, ::2])
    fine = coarse._replace(masks=F.interpolate(coarse.masks, SIZE, mode="bilinear"))
    loss = SetLoss()
    torch.testing.assert_close(loss(coarse, ids), loss(fine, ids))


@pytest.mark.parametrize("shape", [(5, 6), (12, 10), (24, 31)])
def test_values_at_pixels_are_those_of_the_interpolated_maps(shape: tuple[int, int]) -> None:
    maps, points = torch.randn(2, 3, *shape), torch.randint(0, 120, (2, 50))
    expected = F.interpolate(maps, SIZE, mode="bilinear").flatten(2)
    torch.testing.assert_close(sample(maps, None, SIZE), expected)
    found = sample(maps, points, SIZE)
    torch.testing.assert_close(found, expected.gather(2, points[:, None].expand(-1, 3, -1)))


def test_points_are_drawn_evenly_among_pixels_with_a_label() -> None:
    torch.manual_seed(0)
    _, ids = scene()
    points = Labels(ids[:, 0], 4).draw(torch.tensor([0, 2, 0]), 40000)
    for image, own in zip((0, 2, 0), points, strict=True):
        valid = (ids[image].flatten() != IGNORED).float()
        counts = own.bincount(minlength=120)
        expected = 40000 * valid / valid.sum()
        assert (counts[valid == 0] == 0).all()
        assert (counts - expected).abs().max() < 5 * expected.max().sqrt()
    assert (points[0] != points[2]).any()


def test_at_points_the_loss_is_that_of_all_pixels_but_for_chance() -> None:
    torch.manual_seed(0)
    outputs, ids = scene(size=(40, 40))
    exact = SetLoss(num_points=1600)(outputs, ids)
    even = SetLoss(num_points=1500, importance_sample_ratio=0.0)
    found = torch.stack([even(outputs, ids) for _ in range(20)])
    assert found.std() > 0
    assert (found.mean() - exact).abs() < 0.05


def test_unsure_points_are_the_least_sure_of_the_candidates() -> None:
    torch.manual_seed(0)
    outputs, ids = scene(n=2, size=(40, 40))
    outputs.masks[..., :20] *= 100  # half of all pixels are sure
    loss = SetLoss(num_points=200, importance_sample_ratio=0.75)
    pairs = match(torch.rand(2, 5, 4), Labels(ids[:, 0], 4).present)
    chosen = outputs.masks[pairs.image, pairs.query][:, None]
    points = loss._unsure_points(chosen, Labels(ids[:, 0], 4), pairs)
    sure = sample(chosen, points, (40, 40))[:, 0].abs()
    assert points.shape == (len(pairs.image), 200)
    assert (sure[:, :150] < 10).all()
    assert 0.3 < (points[:, 150:] % 40 < 20).float().mean() < 0.7


@pytest.mark.parametrize("num_points", [60, 1000])
@pytest.mark.parametrize("training", [True, False])
def test_ignored_pixels_have_no_influence(num_points: int, training: bool) -> None:
    outputs, ids = scene()
    ids[1, :, :, :4] = IGNORED
    loss = SetLoss(num_points=num_points).train(training)

    def run(masks: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        masks = masks.clone().requires_grad_()
        value = loss(outputs._replace(masks=masks), ids)
        value.backward()
        assert masks.grad is not None
        return value.detach(), masks.grad

    value, gradient = run(outputs.masks)
    beneath = (ids == IGNORED).expand_as(outputs.masks)
    assert (gradient[beneath] == 0).all()
    assert (gradient[~beneath] != 0).any()
    strange = torch.where(beneath, 97 * torch.randn_like(outputs.masks), outputs.masks)
    other, changed = run(strange)
    assert torch.equal(value, other)
    assert torch.equal(gradient, changed)
    costs = []
    for masks in (outputs.masks, strange):
        torch.manual_seed(0)
        costs.append(loss._costs(outputs.classes, masks, Labels(ids[:, 0], 4)))
    assert torch.equal(*costs)


def test_an_image_without_labels_costs_nothing_and_the_loss_is_the_mean_over_images() -> None:
    outputs, ids = scene()
    loss = SetLoss()
    each = [loss(Queries(c[None], m[None], SIZE), i[None]) for c, m, i in zip(*outputs[:2], ids, strict=True)]
    torch.testing.assert_close(loss(outputs, ids), torch.stack(each).mean())
    ids[1] = IGNORED
    torch.testing.assert_close(loss(outputs, ids), (each[0] + each[2]) / 3)
    parts = [part.requires_grad_() for part in outputs[:2]]
    for training in (True, False):  # with gradients, which several devices wait for
        nothing = SetLoss(num_points=30).train(training)(outputs, torch.full_like(ids, IGNORED))
        gradients = torch.autograd.grad(nothing, parts)
        assert nothing == 0
        assert all((gradient == 0).all() for gradient in gradients)


def test_unmatched_queries_learn_to_be_of_no_class() -> None:
    outputs, ids = scene(n=1)
    classes = outputs.classes.requires_grad_()
    SetLoss()(outputs, ids).backward()
    assert classes.grad is not None
    pulled = (classes.grad < 0).float().argmax(dim=2)[0]
    assert sorted(pulled.tolist()) == sorted(
        [*ids[ids != IGNORED].unique().tolist(), *[4] * (5 - len(ids[ids != IGNORED].unique()))]
    )


def test_logits_that_are_no_numbers_make_no_other_error() -> None:
    outputs, ids = scene()
    outputs.masks[0] = torch.nan
    assert SetLoss()(outputs, ids).isnan()


def test_loss_and_costs_are_computed_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    costs: list[Tensor] = []

    def watched(*given: Tensor) -> Pairs:
        costs.append(given[0])
        return match(*given)

    monkeypatch.setattr(set_loss, "match", watched)
    outputs, ids = scene(size=(300, 300))
    half = Queries(outputs.classes.half(), outputs.masks.half(), outputs.size)
    loss = SetLoss().eval()
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(half, ids)
    assert found.dtype == torch.float32
    expected = loss(Queries(half.classes.float(), half.masks.float(), half.size), ids)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*costs)


def test_draws_follow_from_the_seed() -> None:
    outputs, ids = scene()
    loss = SetLoss(num_points=40)
    values = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        values.append(loss(outputs, ids).item())
    assert values[0] == values[1] != values[2]
    state = torch.get_rng_state()
    loss.eval()(outputs, ids)
    assert torch.equal(state, torch.get_rng_state())


def test_two_processes_descend_as_one_does_on_all_images(tmp_path: Path) -> None:
    """Also where images have other numbers of classes, and one of the processes no label at all."""
    torch.manual_seed(0)
    module = LossOf(Segmenter(TINY.build(), DecoderOnly(), Query(4), 3), SetLoss())
    images, masks = torch.randn(4, 3, 32, 32), torch.randint(0, 3, (4, 1, 4, 4)).to(torch.uint8)
    masks[0], masks[2:] = masks[0].clamp(max=1), IGNORED
    masks = F.interpolate(masks, (32, 32))
    torch.save((module, images, masks), tmp_path / "step.pt")
    together(descend_on_halves, tmp_path)
    module(images, masks).backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, gradient in module.gradients().items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"costs": [1, 2]}, r"loss.costs=\[1, 2\] must be three numbers"),
        ({"weights": [0, 0, 0]}, r"loss.weights=\[0, 0, 0\] must be .* not all 0"),
        ({"weights": [1, -1, 0]}, r"loss.weights=\[1, -1, 0\] must be three numbers of at least 0"),
        ({"no_class_weight": 0.0}, "loss.no_class_weight=0.0 must be more than 0"),
        ({"num_points": 0}, "loss.num_points=0 .* must be at least 1"),
        ({"importance_sample_ratio": 1.5}, "loss.importance_sample_ratio=1.5 from 0 to 1"),
    ],
)
def test_impossible_numbers_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SetLoss(**given)


def test_eight_scenes_of_three_classes_are_learnt() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    grids = [rng.permuted([[0, 1, 2, 1], [2, 0, 1, 0]], axis=1) for _ in range(8)]
    ids = torch.from_numpy(np.stack([grid.repeat(16, axis=0).repeat(8, axis=1) for grid in grids]))
    images = torch.randn(8, 3, 32, 32) * torch.tensor([0.1, 1.0, 3.0])[ids][:, None]
    segmenter = Segmenter(TINY.build(), DecoderOnly(), Query(5), 3).train()
    embeddings = segmenter.image_encoder(images).detach()
    decoder, loss = segmenter.mask_decoder, SetLoss(num_points=200)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    for _ in range(100):
        given = decoder.outputs(embeddings, segmenter.position_encoding, segmenter.dense_prompt, (32, 32))
        optimizer.zero_grad()
        loss(given, ids[:, None].to(torch.uint8)).backward()
        optimizer.step()
    found = segmenter(images).argmax(1)
    iou = [((found == c) & (ids == c)).sum() / ((found == c) | (ids == c)).sum() for c in range(3)]
    assert torch.stack(iou).mean() > 0.9
