import pytest
import torch
from torch import Tensor, nn

from convlora.peft.dora import DoRALinear


def moved(bias: bool = True) -> DoRALinear:
    """A layer that has learnt something."""
    torch.manual_seed(0)
    layer = DoRALinear(nn.Linear(10, 12, bias=bias).requires_grad_(False), rank=2, alpha=6)
    nn.init.normal_(layer.lora_b.weight)
    with torch.no_grad():
        layer.magnitude *= torch.rand(12) + 0.5
    return layer


def literal(layer: DoRALinear, x: Tensor) -> Tensor:
    """The paper's equations 5 and 11, with the matrix V in full."""
    direction = layer.base.weight + layer.scaling * layer.lora_b.weight @ layer.lora_a.weight
    length = direction.norm(dim=1, keepdim=True).detach()
    return nn.functional.linear(x, layer.magnitude[:, None] * direction / length, layer.base.bias)


@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_those_of_the_literal_form(bias: bool) -> None:
    layer, x = moved(bias), torch.randn(5, 10, requires_grad=True)
    learnt = {"x": x, **{name: p for name, p in layer.named_parameters() if p.requires_grad}}
    assert learnt.keys() == {"x", "magnitude", "lora_a.weight", "lora_b.weight"}
    found, expected = layer(x), literal(layer, x)
    torch.testing.assert_close(found, expected)
    seed = torch.randn(5, 12)
    pairs = (torch.autograd.grad(y, list(learnt.values()), seed) for y in (found, expected))
    for name, *pair in zip(learnt, *pairs, strict=True):
        torch.testing.assert_close(*pair, msg=lambda m, name=name: f"{name}: {m}")


def test_scale_is_computed_in_single_precision_under_autocast() -> None:
    layer = moved()
    expected = layer.scale()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.scale(), expected)


def test_rows_of_zeros_stay_so_without_harm() -> None:
    base = nn.Linear(4, 3)
    nn.init.zeros_(base.weight)
    layer, x = DoRALinear(base, rank=2, alpha=2), torch.randn(5, 4)
    assert torch.equal(layer(x), base(x))
    nn.init.normal_(layer.lora_b.weight)
    torch.testing.assert_close(layer(x), base(x))
