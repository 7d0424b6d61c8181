import copy
from collections.abc import Sequence

import pytest
import torch
from conftest import golden
from literal import LiteralExperts
from torch import Tensor

from convlora.peft.conv_experts import Activation, ConvExperts, Interpolation, axis_of, grid_size

SCALES = range(1, 17)
ANY_SCALES = [0.125, 0.25, 0.5, 0.75, 1.25, 1.5, 2.5, 3.3]
GRIDS = [(14, 14), (9, 13), (1, 4), (3, 1)]


def make(scales: Sequence[float], activation: Activation, interpolation: Interpolation) -> ConvExperts:
    torch.manual_seed(0)
    experts = ConvExperts(3, scales, activation, interpolation)
    torch.nn.init.normal_(experts.bias)
    return experts


def assert_same_function(experts: ConvExperts, z: Tensor, choice: Tensor, gates: Tensor) -> None:
    """Outputs and all gradients equal the literal form's to 3e-5 of their largest value."""
    inputs = [z.requires_grad_(), gates.requires_grad_(), experts.weight, experts.bias]
    cotangent = torch.randn(z.shape)
    found, expected = experts(z, choice, gates), LiteralExperts(experts)(z, choice, gates)
    pairs = [(found, expected)]
    pairs += zip(
        torch.autograd.grad(found, inputs, cotangent),
        torch.autograd.grad(expected, inputs, cotangent),
        strict=True,
    )
    for ours, reference in pairs:
        limit = 3e-5 * max(reference.abs().max().item(), 1e-3)
        torch.testing.assert_close(ours, reference, rtol=0, atol=limit)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("activation", ["gelu", "identity"])
@pytest.mark.parametrize("scale", [*SCALES, *ANY_SCALES])
def test_one_expert_equals_literal_form(
    scale: float, activation: Activation, interpolation: Interpolation
) -> None:
    experts = make([scale], activation, interpolation)
    for h, w in GRIDS:
        choice, gates = torch.zeros(2, 1, dtype=torch.long), torch.rand(2, 1)
        assert_same_function(experts, torch.randn(2, h, w, 3), choice, gates)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("activation", ["gelu", "identity"])
def test_routed_experts_equal_literal_form(activation: Activation, top_k: int) -> None:
    experts = make(range(1, 9), activation, "bicubic")
    for h, w in GRIDS:
        choice = torch.rand(12, 8).topk(top_k).indices
        assert_same_function(experts, torch.randn(12, h, w, 3), choice, torch.rand(12, top_k))


@pytest.mark.parametrize("activation", ["gelu", "identity"])
@pytest.mark.parametrize("size", [(64, 64), (48, 20), (10, 45)])
def test_global_grids_equal_literal_form(size: tuple[int, int], activation: Activation) -> None:
    experts = make(range(1, 9), activation, "bicubic")
    choice = torch.tensor([[1, 0], [7, 2], [3, 4]])
    assert_same_function(experts, torch.randn(3, *size, 3), choice, torch.rand(3, 2))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("activation", ["gelu", "identity"])
@pytest.mark.parametrize("scales", [[0.25, 0.5], [0.5, 1, 2, 4], [1.5, 0.75, 3]])
@pytest.mark.parametrize("size", [(64, 64), (48, 20)])
def test_any_scales_equal_literal_form_on_global_grids(
    size: tuple[int, int], scales: list[float], activation: Activation, interpolation: Interpolation
) -> None:
    experts = make(scales, activation, interpolation)
    choice = torch.stack([torch.arange(len(scales)), torch.arange(len(scales)).roll(1)], dim=1)
    assert_same_function(experts, torch.randn(len(scales), *size, 3), choice, torch.rand(len(scales), 2))


def test_experts_of_one_scale_are_two() -> None:
    experts = make([2, 2, 0.5], "gelu", "bicubic")
    assert_same_function(experts, torch.randn(3, 9, 13, 3), torch.tensor([[0], [1], [2]]), torch.rand(3, 1))


def test_an_axis_is_cut_into_tiles_where_the_reach_is_short() -> None:
    """At scale 2 a token reads 3 beyond its own, beside others too; at 1/4 tiles would be no smaller."""
    expected = {(0.25,): (1, 64), (1,): (4, 18), (2,): (4, 22), (3,): (4, 20), (1, 2): (4, 22)}
    axes = {scales: axis_of(64, scales, "bicubic", "gelu", torch.device("cpu")) for scales in expected}
    assert {scales: tuple(axis.tokens.shape) for scales, axis in axes.items()} == expected


@pytest.mark.parametrize(("scale", "points"), [(1.1, 11), (0.1, 1), (1 / 3, 4), (0.01, 1), (2.7, 27)])
def test_rounding_adds_no_point_to_a_grid(scale: float, points: int) -> None:
    assert grid_size(10, scale) == points


@pytest.mark.parametrize("scale", SCALES)
def test_expert_equals_golden_numbers(scale: int) -> None:
    reference = {k: torch.from_numpy(v) for k, v in golden("conv_expert_scales.npz", f"s{scale}/").items()}
    x = torch.from_numpy(golden("conv_expert_scales.npz")["x"])
    experts = ConvExperts(3, [scale])
    experts.load_state_dict({"weight": reference["weight"][None], "bias": reference["bias"][None]})
    found = experts(x.permute(0, 2, 3, 1), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))
    torch.testing.assert_close(found.permute(0, 3, 1, 2), reference["output"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_tables_keep_all_weight_of_the_resampling(interpolation: Interpolation) -> None:
    axis = axis_of(5, tuple(SCALES), interpolation, "gelu", torch.device("cpu"))
    torch.testing.assert_close(axis.points.sum(dim=2), torch.ones(16, 1, 5))


def test_work_does_not_depend_on_the_scale() -> None:
    cpu = torch.device("cpu")
    for scales in ([3], [15]), ([6], [16]):
        small, large = (axis_of(14, tuple(s), "bicubic", "gelu", cpu) for s in scales)
        assert [table.shape for table in small] == [table.shape for table in large]


def test_only_tokens_and_preactivations_are_kept_for_backward() -> None:
    experts = make(range(1, 9), "gelu", "bicubic")
    z = torch.randn(7, 14, 14, 3, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if len(tensor) == 7 and tensor.ndim > 2:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mixed = experts(z, torch.randint(8, (7, 1)), torch.ones(7, 1))
    # the gates' gradient needs the experts' output: r more
    assert sum(kept.values()) <= 7 * 14 * 14 * (3 + 16 * 3 + 3)
    mixed.sum().backward()


def test_tables_made_in_inference_serve_training() -> None:
    experts = make([2, 3], "gelu", "bicubic")
    choice, gates = torch.tensor([[0], [1]]), torch.ones(2, 1)
    with torch.inference_mode():
        experts(torch.randn(2, 11, 17, 3), choice, gates)
    experts(torch.randn(2, 11, 17, 3), choice, gates).sum().backward()
    assert experts.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_costs_the_rounding_of_the_tokens_only(dtype: torch.dtype) -> None:
    experts = make(range(1, 9), "gelu", "bicubic")
    z, choice, gates = torch.randn(8, 14, 14, 3).to(dtype), torch.arange(8)[:, None], torch.ones(8, 1)
    with torch.autocast("cpu", dtype):
        found = experts(z, choice, gates)
    assert found.dtype == dtype
    torch.testing.assert_close(found, experts(z.float(), choice, gates).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_may_be_held_in_any_precision(dtype: torch.dtype) -> None:
    """Computed in float32 from what is held; only gradients and output are rounded to it."""
    held = make(range(1, 9), "gelu", "bicubic").to(dtype)
    exact = copy.deepcopy(held).float()
    z, choice, gates = torch.randn(8, 14, 14, 3).to(dtype), torch.arange(8)[:, None], torch.ones(8, 1)
    found, expected = held(z, choice, gates), exact(z.float(), choice, gates)
    torch.testing.assert_close(found, expected.to(dtype))
    found.sum().backward()
    expected.sum().backward()
    for ours, reference in zip(held.parameters(), exact.parameters(), strict=True):
        assert ours.grad is not None
        assert reference.grad is not None
        torch.testing.assert_close(ours.grad, reference.grad.to(dtype))


def test_second_derivatives_are_refused() -> None:
    experts = make([2, 3], "gelu", "bicubic")
    z, gates = torch.randn(2, 4, 4, 3, requires_grad=True), torch.ones(2, 1, requires_grad=True)
    out = experts(z, torch.tensor([[0], [1]]), gates)
    (slope,) = torch.autograd.grad(out.sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()


def test_idle_experts_get_a_zero_gradient() -> None:
    experts = make(range(1, 9), "gelu", "bicubic")
    experts(torch.randn(1, 4, 4, 3), torch.tensor([[5]]), torch.ones(1, 1)).sum().backward()
    assert experts.weight.grad is not None
    used = experts.weight.grad.flatten(1).abs().sum(dim=1) > 0
    assert used.nonzero().flatten().tolist() == [5]


@pytest.mark.slow
def test_compiles_as_one_graph() -> None:
    experts = make(range(1, 9), "gelu", "bicubic")
    z = torch.randn(6, 7, 7, 3, requires_grad=True)
    choice, gates = torch.randint(8, (6, 2)), torch.rand(6, 2)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    expected = experts(z, choice, gates)
    torch.testing.assert_close(compiled(z, choice, gates), expected)
    (ours,) = torch.autograd.grad(compiled(z, choice, gates).square().sum(), z)
    (reference,) = torch.autograd.grad(expected.square().sum(), z)
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)
