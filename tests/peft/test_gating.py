import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from composed import compose, names
from hydra.utils import instantiate
from torch import Tensor, nn

from convlora.peft.gating import (
    Gate,
    Layer,
    NoisyTopK,
    Routes,
    Soft,
    Switch,
    Uniform,
    cv_squared,
    prob_in_top_k,
)
from convlora.peft.method import HasAuxLoss, aux_loss

BALANCED = [NoisyTopK(balance=0.1), NoisyTopK(top_k=2, balance=0.1), Switch(balance=0.1), Soft(balance=0.1)]


@pytest.fixture(params=names("peft/gate"))
def recipe(request: pytest.FixtureRequest) -> Gate:
    made: Gate = instantiate(compose(f"peft/gate/{request.param}").peft.gate, _convert_="all")
    return made


@pytest.fixture
def gate(recipe: Gate) -> nn.Module:
    """One that has learnt something: among equal experts any choice would do."""
    return learnt(recipe)


def learnt(recipe: Gate) -> nn.Module:
    torch.manual_seed(0)
    gate = recipe.build(channels=3, num_experts=5)
    for parameter in gate.parameters():
        nn.init.normal_(parameter)
    return gate


def assert_routes(routes: Routes, num_maps: int, num_experts: int) -> None:
    choice, gates = routes
    assert choice.shape == gates.shape
    assert len(choice) == num_maps
    assert choice.dtype == torch.long
    assert ((choice >= 0) & (choice < num_experts)).all()
    assert all(len(set(row)) == len(row) for row in choice.tolist()), "an expert is chosen twice"
    assert (gates.isfinite() & (gates > 0)).all()


def maps(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(64, 4, 6, 3, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("training", [False, True])
def test_every_gate_gives_each_map_experts_with_weights(gate: nn.Module, training: bool) -> None:
    routes = gate.train(training)(maps())
    assert_routes(routes, 64, 5)
    assert len(routes.choice.unique()) > 1


def test_every_gate_records_its_loss_in_training_only(gate: nn.Module) -> None:
    gate.eval()(maps())
    assert aux_loss(gate) is None
    gate.train()(maps())
    loss = aux_loss(gate)
    assert (loss is None) <= (not isinstance(gate, HasAuxLoss) or gate.recipe.balance == 0)
    assert loss is None or (loss.shape == () and loss.isfinite())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_gate_learns_from_task_and_balance(gate: nn.Module, dtype: torch.dtype) -> None:
    gates = gate.to(dtype).train()(maps(dtype)).gates
    loss, aux = (gates * torch.randn_like(gates)).sum(), aux_loss(gate)
    loss = loss if aux is None else loss + aux
    if any(True for _ in gate.parameters()):
        loss.backward()
    for name, parameter in gate.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == dtype, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_every_gate_decides_alike_in_evaluation(gate: nn.Module) -> None:
    first, second = gate.eval()(maps()), gate(maps())
    assert torch.equal(first.choice, second.choice)
    assert torch.equal(first.gates, second.gates)


def test_every_gate_is_its_layers_own(recipe: Gate) -> None:
    first, second = recipe.build(3, 5), recipe.build(3, 5)
    assert not {id(m) for m in first.modules()} & {id(m) for m in second.modules()}
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}


def test_every_gate_computes_in_full_precision(gate: nn.Module) -> None:
    held = gate.bfloat16().train()
    assert held(maps(torch.bfloat16)).gates.dtype == torch.float32
    loss = aux_loss(held)
    assert loss is None or loss.dtype == torch.float32
    exact = copy.deepcopy(held).float().eval()(maps(torch.bfloat16).float())
    found = held.eval()(maps(torch.bfloat16))
    assert torch.equal(found.choice, exact.choice)
    assert torch.equal(found.gates, exact.gates)


@pytest.mark.parametrize("method", ["conv_lora", "conv_lora_equation"])
def test_command_line_chooses_the_gate_and_sets_it(method: str) -> None:
    line = (f"peft={method}", "peft/gate=noisy_top_k", "peft.gate.top_k=2")
    made = instantiate(compose("train", *line).peft, _convert_="all")
    assert made.gate == NoisyTopK(top_k=2)


@pytest.mark.parametrize("top_k", [0, -1])
def test_no_experts_are_refused(top_k: int) -> None:
    with pytest.raises(ValueError, match=rf"peft.gate.top_k={top_k} must be at least 1"):
        NoisyTopK(top_k=top_k)


def test_more_experts_than_there_are_are_refused() -> None:
    with pytest.raises(ValueError, match=r"peft.gate.top_k=3 must lie between 1 and peft.num_experts=2"):
        NoisyTopK(top_k=3).build(channels=3, num_experts=2)


def test_top_k_is_the_number_of_experts_per_map() -> None:
    routes = NoisyTopK(top_k=2).build(3, 6)(maps())
    assert routes.choice.shape == (64, 2)
    torch.testing.assert_close(routes.gates.sum(dim=1), torch.ones(64))


def test_balance_loss_is_least_when_experts_share_evenly() -> None:
    even, skewed = torch.full((4,), 2.0), torch.tensor([8.0, 0.0, 0.0, 0.0])
    assert cv_squared(even) == 0
    torch.testing.assert_close(cv_squared(skewed), torch.tensor(4.0))  # var 16 / mean 2^2
    assert cv_squared(torch.tensor([3.0])) == 0


def test_probability_of_staying_chosen_equals_simulation() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, std = torch.tensor([[0.3, 0.0, -0.4, 0.1]]), torch.tensor([[0.5, 0.7, 0.4, 1.0]])
    noisy = clean + std * torch.randn(1, 4, generator=generator)
    found = prob_in_top_k(clean, noisy, std, top_k=2)
    for i in range(4):
        fresh = noisy.repeat(200_000, 1)
        fresh[:, i] = clean[0, i] + std[0, i] * torch.randn(200_000, generator=generator)
        share = (fresh.topk(2).indices == i).any(dim=1).float().mean()
        torch.testing.assert_close(found[0, i], share, atol=5e-3, rtol=0)


def test_noise_only_in_training() -> None:
    gate = NoisyTopK(top_k=2).build(3, 6)
    torch.nn.init.normal_(gate.weight)
    z = torch.randn(64, 4, 4, 3)
    assert torch.equal(gate.eval()(z).gates, gate(z).gates)
    assert not torch.equal(gate.train()(z).gates, gate(z).gates)


def test_balance_loss_only_in_training() -> None:
    gate = NoisyTopK(top_k=2).build(3, 6).eval()
    gate(torch.randn(8, 4, 4, 3))
    assert not hasattr(gate, "aux_loss")
    gate.train()(torch.randn(8, 4, 4, 3))
    assert gate.aux_loss > 0


@pytest.mark.parametrize(
    ("recipe", "reaches"),
    [
        (NoisyTopK(top_k=1), False),
        (NoisyTopK(top_k=2), True),
        (Switch(), True),
        (Soft(), True),
        (Layer(), True),
        (Uniform(), None),
    ],
    ids=str,
)
def test_task_gradient_reaches_the_gate(recipe: Gate, reaches: bool | None) -> None:
    """As released it never does; `None` says that there is nothing to reach."""
    gate = learnt(recipe).train()
    gates = gate(maps()).gates
    assert gates.requires_grad == (reaches is not None)
    if reaches is not None:
        (gates * torch.randn_like(gates)).sum().backward()
        grads = [parameter.grad for parameter in gate.parameters()]
        assert all(grad is not None and (grad.abs().max() > 0) == reaches for grad in grads)


def test_one_expert_has_nothing_to_balance() -> None:
    gate = NoisyTopK().build(3, 1).train()
    assert torch.equal(gate(torch.randn(5, 4, 4, 3)).gates, torch.ones(5, 1))
    assert gate.aux_loss == 0


def test_switch_weights_the_most_probable_expert_by_its_probability() -> None:
    gate = learnt(Switch(balance=0.5)).train()
    choice, gates = gate(maps())
    probs = (maps().mean(dim=(1, 2)) @ gate.weight).softmax(dim=1)
    torch.testing.assert_close(gates[:, 0], probs.amax(dim=1))
    assert torch.equal(choice[:, 0], probs.argmax(dim=1))
    share = torch.bincount(choice[:, 0], minlength=5) / 64
    torch.testing.assert_close(gate.aux_loss, 0.5 * 5 * (share * probs.mean(dim=0)).sum())


def test_switch_uses_several_experts_from_the_start() -> None:
    torch.manual_seed(0)
    assert len(Switch().build(3, 8)(maps()).choice.unique()) > 1
    for channels in (10, 1000):  # a tenth of the usual variance, as the paper advises
        weight = Switch().build(channels, 200).weight
        assert weight.std().item() == pytest.approx((0.1 / channels) ** 0.5, rel=0.05)


def test_the_spread_is_the_standard_deviation_over_the_tokens() -> None:
    features = Soft(sees="spread").features(maps())
    mean, std = maps().flatten(1, 2).numpy().mean(axis=1), maps().flatten(1, 2).numpy().std(axis=1)
    np.testing.assert_allclose(features, np.concatenate([mean, std], axis=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", [Soft(), Layer(), Uniform()], ids=str)
def test_gates_of_all_experts_start_with_equal_weights(recipe: Gate) -> None:
    choice, gates = recipe.build(3, 5)(maps())
    assert torch.equal(choice, torch.arange(5).expand(64, 5))
    torch.testing.assert_close(gates, torch.full((64, 5), 0.2))


def test_soft_gates_depend_on_the_map_and_those_of_a_layer_do_not() -> None:
    soft, layer = (learnt(recipe)(maps()).gates for recipe in (Soft(), Layer()))
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(64))
    torch.testing.assert_close(layer.sum(dim=1), torch.ones(64))
    assert len(soft.unique(dim=0)) == 64
    assert len(layer.unique(dim=0)) == 1


@pytest.mark.parametrize("recipe", BALANCED, ids=str)
def test_balance_is_the_weight_of_the_loss_and_0_switches_it_off(recipe: Gate) -> None:
    losses = []
    for each in (recipe, replace(recipe, balance=1.0)):
        gate = learnt(each).train()
        gate(maps())
        losses.append(aux_loss(gate))
    assert losses[0] is not None
    torch.testing.assert_close(losses[1], 10 * losses[0])
    if recipe == NoisyTopK(balance=0.1):  # which nothing else trains
        with pytest.raises(
            ValueError, match=r"peft.gate.balance=0 leaves a gate of top_k=1 nothing to learn"
        ):
            replace(recipe, balance=0)
    else:
        gate = learnt(replace(recipe, balance=0)).train()
        gate(maps())
        assert aux_loss(gate) is None


@pytest.mark.parametrize("recipe", BALANCED, ids=str)
def test_linear_schedule_lets_the_balance_loss_fall_to_0(recipe: Gate) -> None:
    for schedule, expected in {"constant": [1, 1, 1], "linear": [1, 0.75, 0]}.items():
        gate = learnt(replace(recipe, schedule=schedule)).train()
        gate(maps())
        found = [aux_loss(gate, progress) / gate.aux_loss for progress in (0, 0.25, 1)]
        torch.testing.assert_close(torch.stack(found), torch.tensor(expected).float())


@pytest.mark.parametrize("recipe", BALANCED, ids=str)
def test_a_gate_may_see_the_spread_of_the_tokens(recipe: Gate) -> None:
    """Maps of one mean that differ in their spread are told apart; one without any has finite slopes."""
    sign, spread = torch.tensor([1.0, -1.0]), torch.arange(192.0).view(64, 3) % 7
    z = (sign[:, None, None] * spread[:, None, None]).expand(-1, -1, 4, -1).clone().requires_grad_()
    by_mean, by_spread = (learnt(replace(recipe, sees=sees)).eval() for sees in ("mean", "spread"))
    assert not any((part != part[0]).any() for part in by_mean(z))
    assert by_spread.weight.shape == (6, 5)
    assert any((part != part[0]).any() for part in by_spread(z))
    by_spread.train()(z).gates.sum().backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("recipe", [NoisyTopK, Switch, Soft])
def test_negative_balance_is_refused(recipe: type[NoisyTopK | Switch | Soft]) -> None:
    with pytest.raises(ValueError, match=r"peft.gate.balance=-1 must be a number of at least 0"):
        recipe(balance=-1)
