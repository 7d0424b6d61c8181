from collections.abc import Sequence

import pytest
import torch
from composed import compose
from conftest import golden
from hydra.utils import instantiate
from torch import Tensor, nn

from convlora.peft.conv_lora import (
    ConvLoRA,
    ConvLoRAEquation,
    ConvLoRAEquationLinear,
    ConvLoRALinear,
    as_grid,
)
from convlora.peft.gating import NoisyTopK, Uniform, balance_loss
from convlora.peft.method import aux_loss
from convlora.sam.zoo import SamViT

CASES = ("windows_eval", "windows_train", "image_eval", "oblong_eval")
Reference = dict[str, Tensor]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def reference(case: str) -> Reference:
    return {key: torch.from_numpy(value) for key, value in golden("conv_lora_layer.npz", f"{case}/").items()}


@pytest.fixture
def layer(case: str, reference: Reference, monkeypatch: pytest.MonkeyPatch) -> ConvLoRALinear:
    c_out, c_in = reference["weight"].shape
    num_experts, rank = reference["expert_bias"].shape
    layer = ConvLoRALinear(nn.Linear(c_in, c_out), rank, 32, range(1, num_experts + 1), NoisyTopK())
    names = {
        "base.weight": "weight",
        "base.bias": "bias",
        "lora_a.weight": "lora_a",
        "lora_b.weight": "lora_b",
        "gate.weight": "gate_weight",
        "gate.noise_weight": "noise_weight",
        "experts.weight": "expert_weight",
        "experts.bias": "expert_bias",
    }
    layer.load_state_dict({own: reference[name] for own, name in names.items()})
    if "noise" in reference:
        monkeypatch.setattr(torch, "randn_like", lambda like: reference["noise"])
    return layer.train("train" in case)


def assert_close(found: Tensor | None, expected: Tensor) -> None:
    """Equal to 1e-5 of the largest expected value."""
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


def test_layer_equals_released_code(layer: ConvLoRALinear, reference: Reference) -> None:
    assert_close(layer(reference["x"]), reference["output"])
    routes = layer.gate(layer.lora_a(reference["x"]))
    gates = torch.zeros_like(reference["gates"]).scatter(1, *routes)
    assert_close(gates, reference["gates"])
    # the released code computes the loss in evaluation too, from the gates alone
    loss = layer.gate.aux_loss if layer.training else balance_loss(gates, (gates > 0).float(), 0.01)
    assert_close(loss, reference["aux_loss"])


def test_gradients_equal_released_code(layer: ConvLoRALinear, reference: Reference) -> None:
    x = reference["x"].requires_grad_()
    (layer(x) * reference["cotangent"]).sum().backward()
    assert_close(x.grad, reference["grad_x"])
    assert_close(layer.lora_a.weight.grad, reference["grad_lora_a"])
    assert_close(layer.lora_b.weight.grad, reference["grad_lora_b"])
    assert_close(layer.experts.weight.grad, reference["grad_expert_weight"])
    assert_close(layer.experts.bias.grad, reference["grad_expert_bias"])


@pytest.mark.parametrize("case", ["windows_train"], indirect=True)
def test_balance_loss_trains_the_gate_as_released(layer: ConvLoRALinear, reference: Reference) -> None:
    layer(reference["x"])
    layer.gate.aux_loss.backward()
    expected = {
        layer.gate.weight: "aux_grad_gate_weight",
        layer.gate.noise_weight: "aux_grad_noise_weight",
        layer.lora_a.weight: "aux_grad_lora_a",
    }
    for parameter, name in expected.items():
        assert parameter.grad is not None
        # The gradients are as small as 1e-5, so here the tolerance is relative to the largest of them.
        limit = 1e-5 * reference[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, reference[name], rtol=0, atol=limit)


@pytest.mark.parametrize("equation", [False, True])
def test_several_experts_add_up_by_their_gates(equation: bool) -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 9)
    kind = ConvLoRAEquationLinear if equation else ConvLoRALinear
    layer = kind(base, rank=3, alpha=6, scales=range(1, 5), gate=NoisyTopK(top_k=2))
    nn.init.normal_(layer.lora_b.weight)
    nn.init.normal_(layer.gate.weight)
    layer.eval()
    x = torch.randn(5, 4, 4, 6)
    z = layer.lora_a(x)
    choice, gates = layer.gate(z)
    assert (choice[:, 0] != choice[:, 1]).all()
    torch.testing.assert_close(gates.sum(dim=1), torch.ones(5))
    alone = [layer.experts(z, choice[:, k : k + 1], torch.ones(5, 1)) for k in range(2)]
    mixed = sum(gates[:, k, None, None, None] * alone[k] for k in range(2))
    # y = W x + (alpha / r) B sum_i G_i E_i(z), and as released y = W x + (alpha / r) B (z + sum_i G_i E_i(z))
    expected = base(x) + 2 * layer.lora_b(mixed if equation else z + mixed)
    torch.testing.assert_close(layer(x), expected)


def test_equation_is_linear_in_the_tokens_for_fixed_gates() -> None:
    torch.manual_seed(0)
    layer = ConvLoRAEquation(num_experts=5).adapt(nn.Linear(6, 9))
    routes = torch.arange(5)[:, None], torch.ones(5, 1)
    z = torch.randn(5, 7, 7, 3)
    bias = layer.experts(torch.zeros_like(z), *routes)
    torch.testing.assert_close(
        layer.experts(3 * z, *routes) - bias, 3 * (layer.experts(z, *routes) - bias), rtol=1e-4, atol=1e-5
    )


def test_square_windows_equal_grids() -> None:
    torch.manual_seed(0)
    layer = ConvLoRA(num_experts=3).adapt(nn.Linear(6, 9)).eval()
    nn.init.normal_(layer.lora_b.weight)
    x = torch.randn(4, 5, 5, 6)
    torch.testing.assert_close(layer(x.flatten(1, 2)), layer(x).flatten(1, 2))


@pytest.mark.parametrize("shape", [(2, 12, 3), (12, 3)])
def test_tokens_without_a_grid_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="peft=lora"):
        as_grid(torch.zeros(shape))


@pytest.mark.parametrize("method", [ConvLoRA, ConvLoRAEquation])
def test_impossible_mixtures_are_refused(method: type[ConvLoRA | ConvLoRAEquation]) -> None:
    with pytest.raises(ValueError, match=r"peft.rank=0"):
        method(rank=0)
    with pytest.raises(ValueError, match=r"peft.num_experts=0 must be at least 1"):
        method(num_experts=0)
    with pytest.raises(ValueError, match=r"peft.gate.top_k=3 must lie between 1 and peft.num_experts=2"):
        method(num_experts=2, gate=NoisyTopK(top_k=3)).adapt(nn.Linear(6, 9))
    for no_gate in (None, {"top_k": 1}, NoisyTopK, NoisyTopK().build(3, 8)):
        with pytest.raises(
            ValueError, match=r"peft.gate=.* is no gate; choose one such as peft/gate=noisy_top_k"
        ):
            method(gate=no_gate)


@pytest.mark.parametrize("method", ["conv_lora", "conv_lora_equation"])
@pytest.mark.parametrize(
    ("line", "scales"),
    [
        ([], range(1, 9)),
        (["peft.num_experts=4"], range(1, 5)),
        (["peft.scales=[0.5,1,2,4]"], [0.5, 1, 2, 4]),
        (["peft.scales=[3]", "peft.num_experts=1"], [3]),
    ],
)
def test_either_number_or_scales_of_the_experts_is_enough(
    method: str, line: list[str], scales: Sequence[float]
) -> None:
    made = instantiate(compose("train", f"peft={method}", *line).peft, _convert_="all")
    layer = made.adapt(nn.Linear(6, 9))
    assert layer.experts.scales == tuple(scales)
    assert layer.gate.weight.shape == (3, len(scales))


def test_ablations_of_the_paper_are_conv_lora_without_a_gate() -> None:
    multi, fixed = (
        instantiate(compose("train", f"peft={name}").peft, _convert_="all")
        for name in ("multi_scale", "fixed_scale")
    )
    assert multi == ConvLoRA(gate=Uniform(), targets=["qkv"], num_experts=8)
    assert fixed == ConvLoRA(gate=Uniform(), targets=["qkv"], num_experts=1, scales=[2])


@pytest.mark.parametrize("method", [ConvLoRA, ConvLoRAEquation])
def test_impossible_scales_are_refused(method: type[ConvLoRA | ConvLoRAEquation]) -> None:
    with pytest.raises(ValueError, match=r"peft.scales=\[1, 2\] has 2 entries, but peft.num_experts=8"):
        method(num_experts=8, scales=[1, 2])
    assert list(method(scales=[1, 2]).expert_scales) == [1, 2]
    assert list(method().expert_scales) == list(range(1, 9))
    for bad in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"peft.scales=.* must be numbers from 1/128 to 128"):
            method(scales=[1, bad], num_experts=2)


def test_the_equation_has_no_alpha() -> None:
    layer = ConvLoRAEquation(rank=5).adapt(nn.Linear(6, 9))
    assert layer.scaling == 1


def test_balance_loss_sums_over_layers(tiny: SamViT) -> None:
    encoder = ConvLoRA(num_experts=4).inject(tiny.build().image_encoder.requires_grad_(False)).train()
    encoder(torch.randn(2, 3, 32, 32))
    single = [block.attn.qkv.gate.aux_loss for block in encoder.blocks]
    found = aux_loss(encoder)
    assert found is not None
    assert len(single) == 2
    torch.testing.assert_close(found, single[0] + single[1])


def test_nothing_is_kept_before_the_first_adapted_block(tiny: SamViT) -> None:
    encoder = ConvLoRA(blocks=[-1]).inject(tiny.build().image_encoder.requires_grad_(False)).train()
    learns: list[bool] = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, inputs, output: learns.append(output.requires_grad))
    encoder(torch.randn(1, 3, 32, 32))
    assert learns == [False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gate_stays_in_full_precision_under_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = ConvLoRA(num_experts=4).adapt(nn.Linear(6, 9)).train()
    nn.init.normal_(layer.lora_b.weight)
    x = 200 * torch.randn(4, 6, 6, 6)
    with torch.autocast("cpu", dtype):
        gates = layer.gate(layer.lora_a(x)).gates
        y = layer(x)
    assert gates.dtype == layer.gate.aux_loss.dtype == torch.float32
    assert torch.isfinite(layer.gate.aux_loss)
    assert y.dtype == dtype
    layer.gate.aux_loss.backward()
    assert layer.gate.noise_weight.grad is not None
    assert torch.isfinite(layer.gate.noise_weight.grad).all()
