import pytest
import torch
from conftest import golden

from convlora.losses import NEIGHBOURHOOD, StructureLoss, local_mean


@pytest.mark.parametrize(("boundary_weighted", "name"), [(True, "as_published"), (False, "as_released")])
def test_structure_loss_equals_reference(boundary_weighted: bool, name: str) -> None:
    arrays = {key: torch.from_numpy(value) for key, value in golden("structure_loss.npz").items()}
    found = StructureLoss(boundary_weighted)(arrays["logits"], arrays["mask"])
    torch.testing.assert_close(found, arrays[name], rtol=0, atol=1e-5)


def test_structure_loss_vanishes_for_a_sure_and_right_prediction() -> None:
    mask = torch.zeros(2, 1, 40, 40)
    mask[:, :, 10:30, 5:25] = 1
    for boundary_weighted in (True, False):
        assert StructureLoss(boundary_weighted)(40 * (mask - 0.5), mask) < 1e-6


def test_structure_loss_of_an_empty_mask_falls_with_the_false_area() -> None:
    mask = torch.zeros(1, 1, 40, 40)
    quiet, loud = torch.full_like(mask, -8), torch.full_like(mask, -8)
    loud[..., :20, :] = 8
    assert StructureLoss()(quiet, mask) < 0.5 < StructureLoss()(loud, mask)


def test_structure_loss_is_computed_in_full_precision() -> None:
    mask = torch.ones(1, 1, 512, 512)  # its weighted sums overflow half precision
    loss = StructureLoss()(torch.zeros(1, 1, 512, 512, dtype=torch.float16), mask.to(torch.uint8))
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)


def test_local_mean_equals_the_square_window() -> None:
    masks = torch.rand(2, 1, 37, 50)
    expected = torch.nn.functional.avg_pool2d(masks, NEIGHBOURHOOD, stride=1, padding=NEIGHBOURHOOD // 2)
    torch.testing.assert_close(local_mean(masks), expected)
